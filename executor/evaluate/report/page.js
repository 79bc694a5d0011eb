"use strict";
// Everything that comes from the runs is set as text (textContent), never as HTML. A page of samples is drawn at a time.
const PAGE = 25;
const RIGHT_FROM = 0.5;
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const report = read("report-data");
const pictures = read("picture-data");
const one = (selector) => document.querySelector(selector);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// Figures
const points = (share) => (100 * share).toFixed(1);
const signed = (share) => {
  const text = points(Math.abs(share));
  return text === "0.0" ? "0.0" : `${share < 0 ? "\u2212" : "+"}${text}`;
};
const aside = (text) => make("bdi", {}, text); // its direction of writing ends with it
const soft = (text) => make("span", { className: "soft" }, text);

function verdict() {
  const { first, second, difference, samples } = report.whole;
  const range = `95 % interval ${signed(difference.ci95[0])} to ${signed(difference.ci95[1])}`;
  const scores = `A scores ${points(first.score)} %, B ${points(second.score)} %, over ${samples} samples. `;
  const changed = `Better in B: ${difference.better}, worse: ${difference.worse}`;
  const chance = `sign test p ${difference.p_value < 0.001 ? "< 0.001" : `= ${difference.p_value.toFixed(3)}`}`;
  if (!difference.better && !difference.worse) return `${scores}No sample scores differently in B.`;
  const how = difference.mean < 0 ? "worse" : "better";
  const end = difference.is_real
    ? `B is ${points(Math.abs(difference.mean))} points ${how} (${range}).`
    : `The difference of ${signed(difference.mean)} points (${range}) may be chance.`;
  return `${scores}${changed} (${chance}). ${end}`;
}

function scoreRow(name, contrast, kind) {
  const cell = ({ score, ci95 }) => make("td", {}, `${points(score)} `, soft(`[${points(ci95[0])}, ${points(ci95[1])}]`));
  const { difference } = contrast;
  const change = make("td", {}, `${signed(difference.mean)} `, soft(`[${signed(difference.ci95[0])}, ${signed(difference.ci95[1])}]`));
  return make("tr", { className: kind }, make("th", { scope: "row" }, aside(name)), make("td", {}, String(contrast.samples)),
    cell(contrast.first), cell(contrast.second), change,
    make("td", {}, String(difference.better)), make("td", {}, String(difference.worse)));
}

function drawHead() {
  const [a, b] = report.runs;
  const title = `${report.dataset}: ${a.name} and ${b.name}`;
  document.title = title;
  one("#title").textContent = title;
  one("#verdict").textContent = verdict();
  one("#warnings").hidden = !report.warnings.length;
  one("#warnings").append(...report.warnings.map((text) => make("li", {}, aside(text))));
  for (const [head, run] of [["#head-a", a], ["#head-b", b]]) {
    one(head).append(`${run.letter}, ${report.metric} %`, make("span", { className: "model" }, run.model || run.name));
  }
  const body = one("#scores tbody");
  body.append(scoreRow("all", report.whole, "whole"));
  for (const [label, values] of Object.entries(report.breakdown)) {
    for (const [value, contrast] of Object.entries(values)) body.append(scoreRow(`${label}: ${value}`, contrast, ""));
  }
}

// Samples
const worded = (row) => row.answers[0].text !== row.answers[1].text;
const FILTERS = [
  ["worse", "Worse in B", (row) => row.verdict === "worse"],
  ["better", "Better in B", (row) => row.verdict === "better"],
  ["wrong", "Wrong in both", (row) => row.verdict === "wrong"],
  ["words", "Other words, same score", (row) => (row.verdict === "right" || row.verdict === "wrong") && worded(row)],
  ["right", "Right in both", (row) => row.verdict === "right"],
  ["all", "All", () => true],
];
const counts = Object.fromEntries(FILTERS.map(([name, , fits]) => [name, report.rows.filter(fits).length]));
const state = { filter: FILTERS.map(([name]) => name).find((name) => counts[name]) || "all", page: 0, labels: {}, text: "" };

function found() {
  const fits = FILTERS.find(([name]) => name === state.filter)[2];
  const wanted = Object.entries(state.labels).filter(([, value]) => value !== "");
  const text = state.text.toLowerCase();
  const holds = (row) => [row.id, row.question, ...row.references, ...row.answers.map((answer) => answer.text || "")]
    .some((each) => each.toLowerCase().includes(text));
  return report.rows.filter((row) => fits(row) && wanted.every(([label, value]) => row.labels[label] === value)
    && (!text || holds(row)));
}

function drawn(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function marksOf({ size: [width, height] }, boxes) {
  // Boxes are parts of the picture's width and height. White lines lie under all of them, to be seen on any ground.
  const placed = boxes.map(({ of, box: [x1, y1, x2, y2] }) => [of, { x: Math.min(x1, x2) * width, y: Math.min(y1, y2) * height,
    width: Math.abs(x2 - x1) * width, height: Math.abs(y2 - y1) * height }]);
  return [...placed.map(([, place]) => drawn("rect", { ...place, class: "box ground" })),
    ...placed.map(([of, place]) => drawn("rect", { ...place, class: `box ${of}` }))];
}

function viewOf(picture, boxes) {
  if (!boxes.length) return make("img", { src: pictures[picture.at], alt: picture.name, loading: "lazy" });
  const [width, height] = picture.size;
  const names = [...new Set(boxes.map(({ of }) => of))].join(", ");
  return drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${picture.name}, boxes: ${names}` },
    drawn("image", { href: pictures[picture.at], width, height }), ...marksOf(picture, boxes));
}

function pictureOf(picture, boxes) {
  if (picture.at === null) {
    return make("div", { className: "absent" }, make("b", {}, picture.name), picture.reason || "no picture");
  }
  const button = make("button", { type: "button", className: "picture", title: "Enlarge" }, viewOf(picture, boxes));
  button.addEventListener("click", () => {
    one("#large div").replaceChildren(viewOf(picture, boxes));
    one("#large p").textContent = picture.name;
    one("#large").showModal();
  });
  return button;
}

function legendOf(boxes) {
  const names = [...new Set(boxes.map(({ of }) => of))];
  return make("p", { className: "legend" }, ...names.map((of) => make("span", { className: `key ${of}` }, of)));
}

function answerOf(answer, run) {
  const isRight = answer.score >= RIGHT_FROM;
  const score = Number.isInteger(answer.score) ? "" : ` ${answer.score.toFixed(2)}`;
  const mark = answer.error !== null ? "not answered" : (isRight ? "\u2713 right" : "\u2717 wrong") + score;
  const box = make("div", { className: `answer ${isRight ? "right" : "wrong"}` },
    make("h4", {}, make("span", {}, `${run.letter} ${run.name}`), make("span", { className: "mark" }, mark)),
    make("p", { className: "said", dir: "auto" }, answer.error !== null ? answer.error : answer.text));
  if (answer.extracted !== null && answer.extracted !== answer.text) {
    box.append(make("p", { className: "soft" }, answer.extracted === "" ? "nothing in it could be scored" : `scored: ${answer.extracted}`));
  }
  return box;
}

function sampleOf(row) {
  const labels = Object.entries(row.labels).map(([label, value]) => `${label}: ${value}`);
  const shown = make("div", { className: "pictures" }, ...row.pictures.map((picture) => pictureOf(picture, row.boxes)));
  if (row.boxes.length) shown.append(legendOf(row.boxes));
  if (row.more_pictures > 0) shown.append(soft(`and ${row.more_pictures} more`));
  const told = make("div", {}, make("h3", {}, ...[row.id, ...labels].flatMap((text, at) => (at ? [" \u00b7 ", aside(text)] : [aside(text)]))),
    make("p", { className: "said question", dir: "auto" }, row.question));
  if (row.other_question !== null) told.append(make("p", { className: "said" }, soft("B was asked: "), aside(row.other_question)));
  if (row.references.length) told.append(make("p", { className: "said" }, soft("Wanted: "), aside(row.references.join(" | "))));
  told.append(make("div", { className: "answers" }, ...row.answers.map((answer, at) => answerOf(answer, report.runs[at]))));
  return make("li", { className: "sample" }, shown, told);
}

function drawSamples() {
  const rows = found();
  const pages = Math.max(1, Math.ceil(rows.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  const from = state.page * PAGE;
  one("#samples").replaceChildren(...rows.slice(from, from + PAGE).map(sampleOf));
  for (const said of document.querySelectorAll(".said")) {
    if (said.scrollHeight > said.clientHeight) said.tabIndex = 0; // a keyboard can scroll it, too
  }
  one("#count").textContent = rows.length
    ? `${from + 1} to ${Math.min(from + PAGE, rows.length)} of ${rows.length} samples` : "No sample of this kind.";
  one("#pages").hidden = pages === 1;
  one("#place").textContent = `Page ${state.page + 1} of ${pages}`;
  one("#before").disabled = state.page === 0;
  one("#after").disabled = state.page === pages - 1;
  for (const button of one("#filters").children) {
    button.setAttribute("aria-pressed", String(button.value === state.filter));
  }
}

function choose(change) {
  Object.assign(state, { page: 0 }, change);
  drawSamples();
}

function turn(by) {
  state.page += by;
  drawSamples();
  one("#samples-title").scrollIntoView();
}

function drawFilters() {
  for (const [name, words] of FILTERS) {
    const button = make("button", { type: "button", value: name, disabled: !counts[name] }, `${words} (${counts[name]})`);
    button.addEventListener("click", () => choose({ filter: name }));
    one("#filters").append(button);
  }
  for (const [label, values] of Object.entries(report.breakdown)) {
    const select = make("select", {}, make("option", { value: "" }, "all"),
      ...Object.keys(values).map((value) => make("option", { value }, value)));
    select.addEventListener("change", () => choose({ labels: { ...state.labels, [label]: select.value } }));
    one("#labels").append(make("label", {}, label, select));
  }
  let waiting = 0;
  one("#search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => choose({ text: event.target.value }), 150);
  });
  one("#narrow").addEventListener("submit", (event) => event.preventDefault());
  one("#before").addEventListener("click", () => turn(-1));
  one("#after").addEventListener("click", () => turn(1));
  one("#large button").addEventListener("click", () => one("#large").close());
}

drawHead();
drawFilters();
drawSamples();
