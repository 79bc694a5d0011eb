// packages: openai@6.49.0 ai@6.0.326 @ai-sdk/openai@3.0.141 @ai-sdk/openai-compatible@2.0.92 zod@4 sharp@0.34
// The npm openai SDK and Vercel's ai: chat, streams, structured output, tools, responses, a picture by data URL.

import assert from "node:assert/strict";
import OpenAI from "openai";
import sharp from "sharp";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const [url] = process.argv.slice(2);
const red = await sharp({ create: { width: 160, height: 128, channels: 3, background: "red" } }).png().toBuffer();
const dataUrl = `data:image/png;base64,${red.toString("base64")}`;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const content = [{ type: "image_url", image_url: { url: dataUrl } }, { type: "text", text: "Which colour is it?" }];
const messages = [{ role: "user", content }];

const whole = await client.chat.completions.create({ model, messages, max_tokens: 12, temperature: 0 });
const said = whole.choices[0].message.content;
let text = "", usage = null, finished = 0;
const stream = await client.chat.completions.create({
  model, messages, max_tokens: 12, temperature: 0, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta.content ?? "";
  finished += chunk.choices[0]?.finish_reason ? 1 : 0;
  usage = chunk.usage ?? usage;
}
assert.equal(text, said);
assert.deepEqual([usage.completion_tokens, finished], [whole.usage.completion_tokens, 1]);
const helper = client.chat.completions.stream({ model, messages, max_tokens: 64, temperature: 0 });
assert.equal((await helper.finalChatCompletion()).choices[0].message.role, "assistant");
console.log("openai: chat, stream, stream helper:", said);

const schema = {
  type: "object", properties: { colour: { enum: ["red", "blue"] }, count: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["colour", "count"], additionalProperties: false,
};
const shaped = await client.chat.completions.create({
  model, messages, max_tokens: 64, temperature: 0,
  response_format: { type: "json_schema", json_schema: { name: "shape", strict: true, schema } },
});
assert.ok(["red", "blue"].includes(JSON.parse(shaped.choices[0].message.content).colour));
const reply = await client.responses.create({ model, input: "hi", max_output_tokens: 8, temperature: 0 });
assert.equal(reply.object, "response");
console.log("openai: json_schema, responses:", shaped.choices[0].message.content, "|", reply.output_text);
await assert.rejects(client.chat.completions.create({ model, messages, temperature: -1 }), /temperature/);

const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "here", baseURL: `${url}/v1`, includeUsage: true, supportsStructuredOutputs: true,
});
const parts = [{ type: "image", image: red }, { type: "text", text: "Which colour is it?" }];
const asked = { messages: [{ role: "user", content: parts }], maxOutputTokens: 12, temperature: 0, maxRetries: 0 };
for (const [name, one] of [
  ["openai (responses)", openai(model)], ["openai.chat", openai.chat(model)], ["compatible", compatible(model)],
]) {
  const full = await generateText({ model: one, ...asked });
  assert.equal(full.text, said, name);
  const streamed = streamText({ model: one, ...asked });
  let joined = "";
  for await (const piece of streamed.textStream) joined += piece;
  assert.equal(joined, said, name);
  const counted = await streamed.usage;
  assert.equal(counted.outputTokens, whole.usage.completion_tokens, name);
  const object = await generateObject({ model: one, ...asked, maxOutputTokens: 64, schema: jsonSchema(schema) });
  assert.ok(["red", "blue"].includes(object.object.colour), name);
  const called = await generateText({
    model: one, ...asked, maxOutputTokens: 100, toolChoice: "required",
    tools: { look: tool({ description: "Look.", inputSchema: jsonSchema(schema) }) },
  });
  assert.equal(called.toolCalls[0].toolName, "look", name);
  console.log(`ai, ${name}: text, stream, object, tool:`, called.toolCalls[0].input);
}
