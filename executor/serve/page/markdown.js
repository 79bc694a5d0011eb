// The part of Markdown that answers use, as elements: code, headings, lists, tables, quotes, bold, italic.
// Links and pictures stay text: what a model writes must not make the browser ask anybody for anything.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_LINE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 8;

/** Brings `parent` up to `text`; blocks that have not changed keep their elements, and with them a selection. */
function showMarkdown(parent, text) {
  const blocks = splitBlocks(text);
  blocks.forEach((block, index) => {
    const old = parent.children[index];
    if (old?.source === block.source) return;
    const fresh = makeBlock(block, 0);
    fresh.source = block.source;
    old ? old.replaceWith(fresh) : parent.append(fresh);
  });
  while (parent.children.length > blocks.length) parent.lastElementChild.remove();
}

/** Blocks in order: {kind, lines, source}. */
function splitBlocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let index = 0;
  const take = (kind, belongs) => {
    const from = index++;
    while (index < lines.length && belongs(lines[index], index)) index++;
    const taken = lines.slice(from, index);
    blocks.push({ kind, lines: taken, source: `${kind}\n${taken.join("\n")}` });
  };
  while (index < lines.length) {
    const line = lines[index];
    const kind = kindOf(lines, index);
    if (kind === "blank") index++;
    else if (kind === "code") takeCode(line);
    else if (kind === "heading" || kind === "rule") take(kind, () => false);
    else if (kind === "quote") take(kind, (next) => QUOTE.test(next));
    else if (kind === "table") take(kind, (next) => next.includes("|"));
    else if (kind === "list") take(kind, (next) => ITEM.test(next) || /^\s+\S/.test(next));
    else take(kind, (next, at) => kindOf(lines, at) === "text");
  }
  return blocks;

  function takeCode(opening) {
    const mark = FENCE.exec(opening)[1];
    let isOpen = true;
    take("code", (next) => {
      const wasOpen = isOpen;
      if (next.trim().startsWith(mark) && !next.trim().replaceAll(mark[0], "")) isOpen = false;
      return wasOpen;
    });
    blocks.at(-1).isClosed = !isOpen;
    blocks.at(-1).source += isOpen ? "" : "\nclosed";
  }
}

function kindOf(lines, index) {
  const line = lines[index];
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (line.includes("|") && index + 1 < lines.length && lines[index + 1].includes("-") && TABLE_LINE.test(lines[index + 1]))
    return "table";
  return "text";
}

function makeBlock(block, depth) {
  const { kind, lines } = block;
  if (kind === "code") return makeCode(lines, block.isClosed);
  if (kind === "rule") return make("hr");
  if (kind === "table") return makeTable(lines);
  if (kind === "list" && depth < MAX_DEPTH) return makeList(lines, depth);
  if (kind === "heading") {
    const [, marks, words] = HEADING.exec(lines[0]);
    return withInline(make(`h${Math.min(marks.length + 2, 6)}`), words);
  }
  if (kind === "quote" && depth < MAX_DEPTH) {
    const quote = make("blockquote");
    const inner = lines.map((line) => line.replace(QUOTE, "")).join("\n");
    for (const part of splitBlocks(inner)) quote.append(makeBlock(part, depth + 1));
    return quote;
  }
  return withInline(make("p"), lines.join("\n"));
}

function makeCode(lines, isClosed) {
  const language = FENCE.exec(lines[0])[2];
  const text = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  const head = make("div", { className: "code-head" }, make("span", { textContent: language || "text" }));
  head.append(copyButton("Copy", () => text));
  const pre = make("pre", { tabIndex: 0, role: "region", "aria-label": `Code, ${language || "text"}` });
  pre.append(make("code", { textContent: text }));
  return make("div", { className: "code" }, head, pre);
}

function makeTable(lines) {
  const cells = (line) =>
    line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => make("tr", {}, ...cells(line).map((cell) => withInline(make(tag), cell)));
  const table = make("table", {}, make("thead", {}, row(lines[0], "th")));
  table.append(make("tbody", {}, ...lines.slice(2).map((line) => row(line, "td"))));
  return make("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" }, table);
}

/** Items at the first one's indent; deeper lines belong to the item before them. */
function makeList(lines, depth) {
  const [, indent, firstMark] = ITEM.exec(lines[0]);
  const isOrdered = /\d/.test(firstMark);
  const list = make(isOrdered ? "ol" : "ul");
  if (isOrdered) list.start = parseInt(firstMark, 10);
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= indent.length + 1) items.push([match[3]]);
    else items.at(-1).push(line);
  }
  for (const [first, ...rest] of items) {
    const item = withInline(make("li"), first);
    if (rest.length) {
      const least = Math.min(...rest.filter((line) => line.trim()).map((line) => line.search(/\S/)));
      const inner = rest.map((line) => line.slice(least)).join("\n");
      for (const part of splitBlocks(inner)) item.append(makeBlock(part, depth + 1));
    }
    list.append(item);
  }
  return list;
}

const INLINE = [["**", "strong"], ["~~", "s"], ["*", "em"]];

/** Appends `text` with its `code`, **bold**, *italic* and ~~struck~~ parts. One pass; what is not closed stays text. */
function withInline(parent, text, depth = 0) {
  let plain = "";
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  for (let at = 0; at < text.length; ) {
    const letter = text[at];
    if (letter === "\\" && /[\\`*~_#[\]()>|-]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    const found = letter === "`" ? codeAt(text, at) : depth < MAX_DEPTH ? emphasisAt(text, at) : null;
    if (!found) {
      const run = letter === "`" ? /^`+/.exec(text.slice(at, at + 64))[0] : letter;
      plain += run;
      at += run.length;
      continue;
    }
    flush();
    const element = make(found.tag);
    if (found.tag === "code") element.textContent = found.inner;
    else withInline(element, found.inner, depth + 1);
    parent.append(element);
    at = found.end;
  }
  flush();
  return parent;
}

function codeAt(text, at) {
  let count = 1;
  while (text[at + count] === "`") count++;
  const mark = "`".repeat(count);
  const close = text.indexOf(mark, at + count);
  if (close < 0 || text[close + count] === "`") return null;
  return { tag: "code", inner: text.slice(at + count, close), end: close + count };
}

function emphasisAt(text, at) {
  for (const [mark, tag] of INLINE) {
    if (!text.startsWith(mark, at)) continue;
    const from = at + mark.length;
    const close = text.indexOf(mark, from);
    const inner = text.slice(from, close);
    if (close < 0 || !inner || inner !== inner.trim()) return null;
    return { tag, inner, end: close + mark.length };
  }
  return null;
}
