// What the page asks of its server, with the key where there is one, and an answer's stream.

class AskError extends Error {
  constructor(words, needsKey = false) {
    super(words);
    this.needsKey = needsKey;
  }
}

const key = {
  get value() {
    return stored.get(() => sessionStorage, "api_key");
  },
  set value(text) {
    stored.set(() => sessionStorage, "api_key", text);
  },
};

/** The address of a route, also where the server stands behind a path of another one. */
const address = (route) => new URL(route, document.baseURI).href;

/** A reply with status 200. Raises AskError with the server's words, and AbortError. */
async function ask(route, body = null, signal = null) {
  const headers = {};
  const sentKey = key.value;
  if (sentKey) headers.Authorization = `Bearer ${sentKey}`;
  if (body !== null) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(address(route), { method: body === null ? "GET" : "POST", headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new AskError("The server cannot be reached. Is it still running?");
  }
  if (reply.ok) return reply;
  throw await refusal(reply, Boolean(sentKey));
}

async function refusal(reply, hadKey) {
  const told = await reply.json().catch(() => null);
  const words = told?.error?.message ?? `The server answered ${reply.status} ${reply.statusText}`.trim();
  if (reply.status === 401) {
    const advice = hadKey ? "The server does not accept this key." : "The server asks for a key.";
    return new AskError(advice, true);
  }
  const wait = reply.headers.get("Retry-After");
  return new AskError(wait ? `The server is busy: ${words}. Try again in ${wait} s.` : words);
}

/**
 * The chunks of a streamed chat completion. Raises AskError for an answer that is refused, fails, or ends without its
 * closing mark, and AbortError.
 */
async function* chunksOf(body, signal) {
  const reply = await ask("v1/chat/completions", body, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        if (event === "data: [DONE]") return;
        const chunk = JSON.parse(event.slice(6));
        if (chunk.error) throw new AskError(chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof AskError) throw error;
    throw new AskError("The connection broke before the answer was whole.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new AskError("The connection was closed before the answer was whole.");
}
