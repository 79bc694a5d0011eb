// Small helpers over the document. Text enters it as text only: nothing here or elsewhere parses HTML.

const find = (id) => document.getElementById(id);

/** An element; `properties` are assigned, `data-*`, `aria-*`, `role` and `for` become attributes; text stays text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(aria-|data-|role$|for$)/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

const button = (words, onClick, className = "quiet") =>
  make("button", { type: "button", className, textContent: words, onclick: onClick });

/** A word to the user below the question, read out by screen readers; `action` is a button beside it. */
function notice(words, action = null) {
  find("notice").replaceChildren(words, ...(action ? [" ", action] : []));
}

/** Copies text; also where the page comes over plain http from another machine and has no clipboard of its own. */
async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = make("textarea", { value: text, className: "unseen", readOnly: true });
  document.body.append(area);
  const focused = document.activeElement;
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!isCopied) throw new Error("the browser does not let this page copy");
}

/** A button that copies what `textOf` gives and says so. */
function copyButton(words, textOf, said = () => "Copied.") {
  return button(words, async () => {
    try {
      await copyText(await textOf());
      notice(said());
    } catch (error) {
      notice(`Not copied: ${error.message}`);
    }
  });
}

const stored = {
  get(store, name) {
    try {
      return store().getItem(name);
    } catch {
      return null; // turned off in this browser
    }
  },
  set(store, name, value) {
    try {
      store().setItem(name, value);
    } catch {
      // Turned off in this browser: the page works without.
    }
  },
};

/** Bytes in words. */
function size(bytes) {
  const units = ["bytes", "KB", "MB", "GB"];
  let step = 0;
  while (bytes >= 1024 && step < units.length - 1) [bytes, step] = [bytes / 1024, step + 1];
  return `${step ? bytes.toFixed(1) : bytes} ${units[step]}`;
}

/** Reads an answer out in sentences, not tokens: each sentence is added to the live region once. */
const speaker = {
  pending: "",
  begin(words) {
    this.pending = "";
    find("spoken").replaceChildren(make("p", { textContent: words }));
  },
  push(text) {
    this.pending += text;
    const end = Math.max(...["\n", ". ", "! ", "? ", "。", "！", "？"].map((mark) => this.pending.lastIndexOf(mark)));
    if (end > 0) this.say(end + 1);
  },
  end() {
    this.say(this.pending.length);
  },
  say(count) {
    const words = this.pending.slice(0, count).trim();
    this.pending = this.pending.slice(count);
    if (words) find("spoken").append(make("p", { textContent: words }));
  },
};
