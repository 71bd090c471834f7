// Asks a model and prints the answer while it is written. The model's name is the first argument; none means the base.
import { createClient } from "@connectrpc/connect";
import { transport } from "./connection.js";
import { FinishReason, InferenceService } from "./gen/loraline/api/inference/v1/inference_pb.js";

const inference = createClient(InferenceService, transport);
const question = {
  model: process.argv[2] ?? "",
  messages: [{ role: "user", content: "When does the ferry leave?" }],
  sampling: { temperature: 0, maxTokens: 64 },
};
for await (const piece of inference.chat(question, { timeoutMs: 120_000 })) {
  process.stdout.write(piece.delta);
  if (piece.usage) {
    console.log(`\n[${FinishReason[piece.finishReason]}, ${piece.usage.completionTokens} tokens]`);
  }
}
