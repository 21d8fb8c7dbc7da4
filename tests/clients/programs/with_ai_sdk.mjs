import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { stepCountIs, streamText, tool } from "ai";
import { readFile, writeFile } from "node:fs/promises";
import { z } from "zod";

const { URL: url, PROTOCOL, TASK } = process.env;
const openai = { baseURL: `${url}/v1`, apiKey: "none" };
const models = {
  chat: () => createOpenAICompatible({ name: "optiq", ...openai })("m"),
  responses: () => createOpenAI(openai).responses("m"),
  anthropic: () => createAnthropic(openai)("m"),
};
const { textStream } = streamText({
  model: models[PROTOCOL](),
  prompt: TASK,
  stopWhen: stepCountIs(6),
  tools: {
    read_file: tool({
      description: "Read a text file",
      inputSchema: z.object({ path: z.string() }),
      execute: ({ path }) => readFile(path, "utf8"),
    }),
    write_file: tool({
      description: "Write a text file",
      inputSchema: z.object({ path: z.string(), content: z.string() }),
      execute: async ({ path, content }) => (await writeFile(path, content), "written"),
    }),
  },
});
for await (const text of textStream) process.stdout.write(text);
