// packages: ai@6.0.326 @ai-sdk/openai@3.0.141 zod@4
// The Vercel SDK's own default, openai("m"): /v1/responses whole, streamed, with a schema and tools; and kept turns.

import assert from "node:assert";
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, streamText, stepCountIs, tool } from "ai";
import { z } from "zod";

const [url] = process.argv.slice(2);
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const models = await (await fetch(`${url}/v1/models`)).json();
const model = openai(models.data[0].id);
const png = readFileSync("dataset/media/objects.png");
const messages = [
  { role: "user", content: [{ type: "image", image: png }, { type: "text", text: "What do you see?" }] },
];
const greedy = { model, temperature: 0, maxOutputTokens: 48, maxRetries: 0 };

const whole = await generateText({ ...greedy, messages });
assert(whole.text && whole.usage.outputTokens && whole.usage.inputTokens, JSON.stringify(whole.usage));
console.log("generateText:", whole.text, whole.finishReason);

const stream = streamText({ ...greedy, messages });
let text = "";
for await (const part of stream.textStream) text += part;
assert.equal(text, whole.text);
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
console.log("streamText:", await stream.finishReason);

// Turns that the server keeps: the SDK names the answer by its id.
const turns = [...messages, ...whole.response.messages, { role: "user", content: "Count the objects." }];
const next = await generateText({ ...greedy, messages: turns });
assert(next.text);
console.log("next turn:", next.text);

const schema = z.object({ colour: z.enum(["red", "blue"]), count: z.number().int().min(0).max(9) });
const shaped = await generateObject({ ...greedy, messages, schema });
schema.parse(shaped.object);
console.log("generateObject:", JSON.stringify(shaped.object));

const weather = tool({
  description: "The weather",
  inputSchema: z.object({ unit: z.enum(["C", "F"]) }),
  execute: async ({ unit }) => `12 ${unit}`,
});
const called = await generateText({
  ...greedy, messages, tools: { weather }, toolChoice: "required", stopWhen: stepCountIs(1),
});
assert.equal(called.finishReason, "tool-calls");
assert(["C", "F"].includes(called.toolCalls[0].input.unit));
console.log("tools:", JSON.stringify(called.toolCalls[0].input));
const told = streamText({ ...greedy, messages, tools: { weather }, toolChoice: "required", stopWhen: stepCountIs(1) });
assert.deepEqual((await told.toolCalls)[0].input, called.toolCalls[0].input);

await assert.rejects(generateText({ ...greedy, model: openai("another"), messages }), /another/);
