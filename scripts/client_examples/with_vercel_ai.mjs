// Vercel's ai: text, streams, objects and tools, by @ai-sdk/openai (responses, chats) and by
// @ai-sdk/openai-compatible.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const base = `${process.env.JAXSYS_URL}/v1`;
const openai = createOpenAI({ baseURL: base, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "here", baseURL: base, apiKey: "none", supportsStructuredOutputs: true,
});
const models = {
  responses: openai("served"),
  chat: openai.chat("served"),
  compatible: compatible("served"),
};
const prompt = "Which is the capital of France?";
const schema = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });
const weather = tool({
  description: "Weather of a city.", inputSchema: schema, execute: async () => "sunny",
});

function check(value, what) {
  if (!value) throw new Error(what);
}

async function example(name, run) {
  const start = performance.now();
  let why = "";
  try {
    await run();
  } catch (error) {
    why = `${error.name}: ${error.message}`.replaceAll("\n", " ");
  }
  const seconds = Math.round((performance.now() - start) / 10) / 100;
  console.log(`{"example": ${JSON.stringify(name)}, "ok": ${!why}, "seconds": ${seconds}, ` +
    `"why": ${JSON.stringify(why)}}`);
}

for (const [name, model] of Object.entries(models)) {
  await example(`${name}_text`, async () => {
    const { text } = await generateText({ model, prompt, maxOutputTokens: 30 });
    check(text, "no text");
  });
  await example(`${name}_stream`, async () => {
    const result = streamText({ model, prompt, maxOutputTokens: 30 });
    let text = "";
    for await (const part of result.textStream) text += part;
    check(text, "no text");
  });
  await example(`${name}_object`, async () => {
    const output = Output.object({ schema });
    const result = await generateText({ model, prompt, output, maxOutputTokens: 200 });
    check(result.output.days >= 1, "no object");
  });
  await example(`${name}_tool`, async () => {
    const tools = { weather };
    const asked = { model, prompt, tools, toolChoice: "required", maxOutputTokens: 300 };
    const result = await generateText({ ...asked, stopWhen: stepCountIs(2) });
    check(result.steps.length === 2, `${result.steps.length} steps`);
    check(result.steps[0].toolResults.length, "no result");
    const streamed = streamText(asked);
    const calls = await streamed.toolCalls;
    check(calls.length, "no call in the stream");
  });
}
await example("embeddings", async () => {
  const model = openai.embedding("served");
  const { embeddings } = await embedMany({ model, values: ["a cat", "a dog"] });
  check(embeddings.length === 2 && embeddings[0].length > 8, "no vectors");
});
