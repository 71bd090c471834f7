"""bespokelabs-curator: curator.LLM over a dataset, its responses kept in its cache folder as it does by default."""

from __future__ import annotations

import os

from bespokelabs import curator  # type: ignore[import-not-found]  # installed in its own virtual environment only
from measured import Task, main, prompts


class Writer(curator.LLM):
    def prompt(self, input: dict) -> str:
        return input["prompt"]

    def parse(self, input: dict, response: str) -> list[dict]:
        return [{"row": input["prompt"], "response": response}]


def work(task: Task) -> int:
    os.environ["OPENAI_API_KEY"] = "none"
    # Limits a minute are set so high that they never throttle; retries (10), the pause after a 429 (10 s) and
    # that all responses are required are its defaults. Answers are not parsed as JSON, which spares it what ours does.
    writer = Writer(model_name="mock", backend="openai", backend_params={
        "base_url": task.url, "max_concurrent_requests": task.in_flight, "max_requests_per_minute": 10_000_000,
        "max_tokens_per_minute": 10_000_000_000,
    })  # fmt: skip
    told = writer([{"prompt": prompt} for prompt in prompts(task.rows)], working_dir=str(task.folder))
    return sum(row["response"] is not None for row in told.dataset)


if __name__ == "__main__":
    main("bespokelabs-curator", work)
