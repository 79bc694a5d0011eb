// One question with its answer: what was said, how far it is, and how it is shown.

// What the browser sees of a short answer, or of one that comes in a single burst, is no time per token.
const TPOT_TOKENS = 8;
const TPOT_MS = 20;

class Turn {
  /** `pictures`: those that the answer may speak of, of this question or the last one that had some. */
  constructor(text, media, pictures) {
    this.question = { text, media };
    this.answer = { text: "", reasoning: "", calls: [], finish: null, usage: null, error: null };
    this.state = "waiting"; // then streaming; then done, stopped or failed
    this.times = { sent: performance.now(), first: null, last: null };
    this.request = null; // {settings, before}: what it was asked with, for the curl command
    this.isDue = false;
    this.marked = new MarkedPicture(pictures);
    this.build();
  }

  get isOver() {
    return this.state !== "waiting" && this.state !== "streaming";
  }

  /** Whether the conversation goes on from it: a turn without an answer is left out. */
  get counts() {
    return Boolean(this.answer.text);
  }

  build() {
    const { text, media } = this.question;
    const asked = make("div", { className: "question" }, make("h2", { className: "unseen", textContent: "You" }));
    if (media.length) {
      const items = media.map((medium, index) => make("li", {}, preview(medium, nameOf(medium, index), true)));
      asked.append(make("ol", { className: "shown" }, ...items));
    }
    if (text) asked.append(make("p", { className: "said", textContent: text }));
    this.thought = make("div", { className: "thought" });
    this.thinking = make("details", { className: "thinking", hidden: true }, make("summary", { textContent: "Reasoning" }), this.thought);
    this.body = make("div", { className: "body" });
    this.calls = make("div", { className: "calls" });
    this.wait = make("p", { className: "wait", textContent: media.length ? "Looking…" : "Waiting…" });
    this.fault = make("div", { className: "fault", hidden: true });
    this.actions = make("div", { className: "actions" });
    this.figures = make("p", { className: "figures" });
    this.foot = make("div", { className: "foot", hidden: true }, this.figures, this.actions);
    const answered = make("div", { className: "answer" }, make("h2", { className: "unseen", textContent: "Answer" }));
    answered.append(this.thinking, this.wait, this.body, this.calls, this.marked.figure, this.fault, this.foot);
    this.element = make("article", { className: "turn" }, asked, answered);
  }

  /** Takes in a chunk of the stream. */
  push(chunk) {
    if (chunk.usage) this.answer.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
    if (content || reasoning || calls?.length) {
      this.state = "streaming";
      this.times.last = performance.now();
      this.times.first ??= this.times.last;
    }
    if (reasoning) this.answer.reasoning += reasoning;
    for (const call of calls ?? []) this.pushCall(call);
    if (content) {
      this.answer.text += content;
      speaker.push(content);
      if (/[\]}]/.test(content)) this.marked.look(this.answer.text);
    }
    if (choice.finish_reason) this.answer.finish = choice.finish_reason;
    this.showSoon();
  }

  pushCall(part) {
    const call = (this.answer.calls[part.index ?? 0] ??= { name: "", text: "" });
    call.name += part.function?.name ?? "";
    call.text += part.function?.arguments ?? "";
  }

  finish(state, error = null) {
    [this.state, this.answer.error] = [state, error];
    this.show();
    if (this.answer.text) this.marked.look(this.answer.text);
  }

  /** Shows it with the next picture of the screen: many tokens may come in between. */
  showSoon() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      if (!this.isOver) this.show();
    });
  }

  show() {
    keepAtEnd(() => {
      const { text, reasoning, calls } = this.answer;
      this.element.dataset.state = this.state;
      this.wait.hidden = this.state !== "waiting";
      this.thinking.hidden = !reasoning;
      this.thought.textContent = reasoning;
      showMarkdown(this.body, text);
      this.calls.replaceChildren(...calls.filter(Boolean).map(makeCall));
      this.foot.hidden = !this.isOver;
      this.figures.textContent = this.isOver ? this.measured() : "";
      this.showFault();
    });
  }

  showFault() {
    const { error, finish } = this.answer;
    const words = [];
    if (this.state === "failed") words.push(asSentence(error));
    if (this.state === "stopped") words.push("Stopped.");
    if (finish === "length") words.push("The answer was cut at max tokens, or at the end of the context.");
    if (this.isOver && !this.counts) words.push("Without an answer, this question is left out of the conversation.");
    this.fault.hidden = !words.length;
    this.fault.classList.toggle("error", this.state === "failed");
    this.fault.replaceChildren(...words.map((line) => make("p", { textContent: line })));
  }

  /** TTFT and TPOT as the browser saw them, and the tokens as the server counted them. */
  measured() {
    const { sent, first, last } = this.times;
    const usage = this.answer.usage;
    const parts = [];
    if (first !== null) parts.push(`TTFT ${milliseconds(first - sent)}`);
    if (first !== null && usage?.completion_tokens >= TPOT_TOKENS && last - first >= TPOT_MS)
      parts.push(`TPOT ${milliseconds((last - first) / (usage.completion_tokens - 1))}`);
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens;
      parts.push(`${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}`);
      parts.push(`${usage.completion_tokens} output tokens`);
    }
    return parts.join(" · ");
  }
}

/** Begins with a capital, unless it begins with a name: of a field, a path in the body or a file. */
const asSentence = (words) => (/^[a-z]+[ ,]/.test(words) ? words[0].toUpperCase() + words.slice(1) : words);

const milliseconds = (time) => (time >= 1000 ? `${(time / 1000).toFixed(2)} s` : `${time.toFixed(time < 10 ? 1 : 0)} ms`);

function makeCall(call) {
  const pre = make("pre", { tabIndex: 0, role: "region", "aria-label": `Call of ${call.name}` });
  pre.append(make("code", { textContent: call.text }));
  return make("div", { className: "code" }, make("div", { className: "code-head", textContent: `Calls ${call.name}` }), pre);
}

const isAtEnd = () => {
  const page = find("main");
  return page.scrollHeight - page.scrollTop - page.clientHeight < 80;
};

function goToEnd() {
  find("main").scrollTop = find("main").scrollHeight;
}

/** Runs `change`, and stays at the conversation's end where the user was there. */
function keepAtEnd(change) {
  const wasAtEnd = isAtEnd();
  change();
  if (wasAtEnd) goToEnd();
}
