// Starts a job, follows it to its end, and prints the dataset that it made.
import { createRegistry } from "@bufbuild/protobuf";
import { anyUnpack } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { transport } from "./connection.js";
import { ErrorInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { DatagenService, file_loraline_api_datagen_v1_datagen } from "./gen/loraline/api/datagen/v1/datagen_pb.js";
import type { DatasetResult } from "./gen/loraline/api/datagen/v1/datagen_pb.js";
import { JobService, JobState } from "./gen/loraline/api/job/v1/job_pb.js";

const datagen = createClient(DatagenService, transport);
const jobs = createClient(JobService, transport);
const texts = (...values: string[]) => ({ items: values.map((text) => ({ text })) });

const { job } = await datagen.generateDataset({
  requestId: "harbour-typescript-1", // sent again, the same request returns the same job
  name: "harbour",
  sources: [
    {
      name: "ferries",
      source: {
        case: "template",
        value: {
          rows: 12n,
          pools: {
            place: texts("the island", "the lighthouse", "the north pier", "the fish market"),
            hour: texts("seven", "noon", "dusk"),
          },
          templates: [
            { prompt: "Is there a ferry to {place} at {hour}?", response: "Yes, to {place} at {hour} sharp." },
          ],
        },
      },
    },
  ],
});

let last = job;
let seen = 0n;
while (last && ![JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED].includes(last.state)) {
  try {
    for await (const { event, job: now } of jobs.watchJob({ name: last.name, afterSequence: seen })) {
      seen = event?.sequence ?? seen;
      last = now ?? last;
      if (event?.event.case === "progress") console.log(`${Math.round(event.event.value.fraction * 100)} %`);
    }
    if (last.state === JobState.PAUSED) break;
  } catch (error) {
    // A server that restarts ends the stream; asked again from the last event, nothing is missed.
    if (ConnectError.from(error).code !== Code.Unavailable) throw error;
    await new Promise((again) => setTimeout(again, 1000));
  }
}
const known = createRegistry(file_loraline_api_datagen_v1_datagen);
const result = last?.result && (anyUnpack(last.result, known) as DatasetResult | undefined);
if (!result?.dataset) throw new Error(`The job ended otherwise: ${last?.error?.message ?? last?.pause?.message}`);
const version = result.dataset.selector.case === "version" ? result.dataset.selector.value : 0n;
console.log(`dataset/${result.dataset.name}:v${version} with ${result.trainRows} rows to train on`);

try {
  await jobs.getJob({ name: "nobody" });
} catch (error) {
  const failure = ConnectError.from(error);
  const [info] = failure.findDetails(ErrorInfoSchema);
  console.log(`${Code[failure.code]} ${info?.reason}: ${failure.rawMessage}`); // NotFound JOB_NOT_FOUND: …
}
