// The conversation: what is asked, stopped, asked again, changed and begun anew.

let turns = [];
let running = null; // AbortController of the answer that is being written
let isEditing = false;
let settings = null;

const last = () => turns.at(-1);

// --- What is sent ---

/** The messages of these turns; `urlOf` gives the address of a medium. */
function messagesOf(system, asked, urlOf) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of asked) {
    const { text, media } = turn.question;
    const parts = media.map((medium) => ({ type: `${medium.kind}_url`, [`${medium.kind}_url`]: { url: urlOf(medium) } }));
    if (text) parts.push({ type: "text", text });
    messages.push({ role: "user", content: media.length ? parts : text });
    if (turn !== asked.at(-1)) messages.push({ role: "assistant", content: turn.answer.text });
  }
  return messages;
}

function chosenSettings() {
  const number = (id) => (find(id).value === "" ? undefined : find(id).valueAsNumber);
  return { system: find("system").value.trim(), temperature: number("temperature"), max_tokens: number("max-tokens") };
}

function bodyOf({ chosen, asked }, urlOf) {
  const { system, temperature, max_tokens } = chosen;
  return { model: settings?.model, messages: messagesOf(system, asked, urlOf), temperature, max_tokens };
}

/** An error's words, with the names of files in place of where they stand in the body. */
function withFileNames(words, { chosen, asked }) {
  const messages = messagesOf(chosen.system, asked, (medium) => medium);
  return words.replace(/messages\[(\d+)\]\.content\[(\d+)\](\.\w+)*/g, (path, message, part) => {
    const found = messages[message]?.content[part];
    const medium = found?.[found.type]?.url;
    return medium ? `“${medium.name}”` : path;
  });
}

const mediaOf = (asked) => asked.flatMap((turn) => turn.question.media);

async function wholeBody(request) {
  const urls = new Map();
  for (const medium of mediaOf(request.asked)) urls.set(medium, await dataUrl(medium));
  const body = bodyOf(request, (medium) => urls.get(medium));
  return JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
}

function curlOf(turn) {
  const media = mediaOf(turn.request.asked);
  const mark = `@${crypto.getRandomValues(new Uint32Array(4)).join("")}@`;
  return curlCommand(bodyOf(turn.request, (medium) => `${mark}${media.indexOf(medium)}${mark}`), media, mark);
}

// --- Asking ---

function send() {
  const text = find("question").value.trim();
  if (running || (!text && !tray.media.length)) return;
  const kept = isEditing ? turns.slice(0, -1) : turns;
  const fault = tray.fault([...mediaOf(kept.filter((turn) => turn.counts)), ...tray.media]);
  if (fault) return notice(fault);
  if (isEditing) dropLast();
  stopEditing();
  const media = tray.take();
  find("question").value = "";
  fitQuestion();
  answerTo(text, media);
}

function dropLast() {
  turns.pop().element.remove();
}

/** Asks, and shows the answer as it comes. */
async function answerTo(text, media) {
  const shown = turns.filter((turn) => turn.counts).map((turn) => turn.question.media);
  const own = [media, ...shown.reverse()].find((list) => list.some((medium) => medium.kind === "image")) ?? [];
  const turn = new Turn(text, media, own.filter((medium) => medium.kind === "image"));
  turn.request = { chosen: chosenSettings(), asked: [...turns.filter((earlier) => earlier.counts), turn] };
  turns.push(turn);
  find("turns").append(turn.element);
  showState();
  goToEnd();
  notice("");
  running = new AbortController();
  showState();
  speaker.begin("Answering.");
  await run(turn, running.signal);
  running = null;
  showState();
}

async function run(turn, signal) {
  try {
    const body = await wholeBody(turn.request);
    turn.times.sent = performance.now();
    for await (const chunk of chunksOf(body, signal)) turn.push(chunk);
    turn.finish("done");
    speaker.end();
    if (!turn.counts && !turn.answer.calls.length) speaker.begin("The answer is empty.");
  } catch (error) {
    if (signal.aborted) {
      turn.finish("stopped");
      speaker.end();
      speaker.begin("Stopped.");
      return;
    }
    if (!(error instanceof AskError)) console.error(error);
    const words = withFileNames(error.message, turn.request);
    turn.finish("failed", words);
    speaker.begin(`No answer: ${words}`);
    if (error.needsKey) askForKey(error.message, again);
  }
}

function stop() {
  running?.abort();
}

/** The last question once more. */
function again() {
  if (running || !turns.length) return;
  const { text, media } = last().question;
  dropLast();
  answerTo(text, media);
  find("question").focus();
}

function edit() {
  const { text, media } = last().question;
  isEditing = true;
  find("question").value = text;
  tray.fill(media);
  fitQuestion();
  showState();
  find("question").focus();
}

function stopEditing() {
  isEditing = false;
  showState();
}

function cancelEditing() {
  find("question").value = "";
  tray.take();
  fitQuestion();
  stopEditing();
  find("question").focus();
}

function beginAnew() {
  stop();
  const before = turns;
  turns = [];
  find("turns").replaceChildren();
  find("spoken").replaceChildren();
  if (isEditing) cancelEditing();
  showState();
  find("question").focus();
  if (!before.length) return;
  const undo = () => {
    if (turns.length) return;
    turns = before;
    find("turns").replaceChildren(...turns.map((turn) => turn.element));
    notice("");
    showState();
    find("question").focus();
  };
  notice("A new conversation.", button("Bring the last one back", undo));
}

// --- What can be done now ---

function showState() {
  const isBusy = running !== null;
  find("welcome").hidden = turns.length > 0;
  find("editing").hidden = !isEditing;
  find("send").hidden = isBusy;
  find("stop").hidden = !isBusy;
  find("turns").setAttribute("aria-busy", String(isBusy));
  keepAtEnd(() => {
    for (const turn of turns) {
      turn.element.classList.toggle("changing", isEditing && turn === last());
      turn.actions.replaceChildren(...(turn.isOver ? actionsOf(turn, turn === last() && !isBusy) : []));
    }
  });
}

function actionsOf(turn, isLast) {
  const actions = turn.counts ? [copyButton("Copy", () => turn.answer.text)] : [];
  actions.push(copyButton("Copy as curl", () => curlOf(turn), () => curlAdvice(mediaOf(turn.request.asked))));
  if (isLast) actions.unshift(button(turn.state === "failed" ? "Retry" : "Regenerate", again), button("Edit question", edit));
  return actions;
}

function fitQuestion() {
  const area = find("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

function askForKey(words, afterwards) {
  find("key-words").textContent = `${words} What you enter is kept until this tab is closed, and sent to this server only.`;
  find("key").value = "";
  find("key-form").onsubmit = () => {
    key.value = find("key").value.trim();
    loadSettings().then((isLoaded) => isLoaded && afterwards());
  };
  if (!find("key-dialog").open) find("key-dialog").showModal();
}

/** The server's limits and defaults. Returns whether they came. */
async function loadSettings() {
  try {
    settings = await (await ask("page/settings")).json();
  } catch (error) {
    if (error.needsKey) askForKey(error.message, () => {});
    else notice(error.message, button("Retry", loadSettings));
    return false;
  }
  notice("");
  tray.limits = settings;
  document.title = `Chat · ${settings.model}`;
  find("model").textContent = settings.model;
  find("temperature").placeholder = String(settings.temperature);
  if (settings.max_tokens !== null) find("max-tokens").placeholder = String(settings.max_tokens);
  find("max-tokens").max = settings.max_model_len;
  return true;
}

// --- What the user does ---

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const showTheme = () => find("theme").setAttribute("aria-pressed", String(isDark()));

find("theme").onclick = () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  stored.set(() => localStorage, "theme", document.documentElement.dataset.theme);
  showTheme();
};
find("new").onclick = beginAnew;
find("stop").onclick = stop;
find("show-settings").onclick = () => {
  const isOpen = find("settings").toggleAttribute("hidden") === false;
  find("show-settings").setAttribute("aria-expanded", String(isOpen));
};
find("change-key").onclick = () => askForKey("A key is sent with each request.", () => notice("The key is kept."));
find("key-cancel").onclick = () => find("key-dialog").close();
find("cancel-editing").onclick = cancelEditing;
find("choose").onclick = () => find("files").click();
find("files").onchange = () => {
  tray.add(find("files").files, true);
  find("files").value = "";
};
for (const idea of document.querySelectorAll(".idea")) {
  idea.onclick = () => {
    find("question").value = idea.textContent;
    fitQuestion();
    find("question").focus();
  };
}
find("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
find("question").oninput = fitQuestion;
find("question").onkeydown = (event) => {
  // While an input method composes a word, Enter is its own.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || find("key-dialog").open) return;
  if (running) stop();
  else if (isEditing) cancelEditing();
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  // Cells of a table come as text and as a picture of it: the text is meant.
  if (!files.length || event.clipboardData.getData("text/plain") || find("key-dialog").open) return;
  event.preventDefault();
  tray.add(files, false);
});

let numEntered = 0; // elements that a dragged file is over: they nest
const showDrop = (count) => {
  numEntered = count;
  find("drop").hidden = count <= 0;
};
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => hasFiles(event) && showDrop(numEntered + 1));
document.addEventListener("dragleave", (event) => hasFiles(event) && showDrop(numEntered - 1));
document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  showDrop(0);
  tray.add(event.dataTransfer.files, true);
});

// The settings, pictures and a longer question take room from the conversation: its end stays in sight.
let wasAtEnd = true;
find("main").addEventListener("scroll", () => (wasAtEnd = isAtEnd()), { passive: true });
new ResizeObserver(() => wasAtEnd && goToEnd()).observe(find("main"));

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();
showState();
loadSettings();
find("question").focus();
