"""distilabel: a pipeline of LoadDataFromDicts and TextGeneration, with its cache as it is by default."""

from __future__ import annotations

# Installed in its own virtual environment only.
from distilabel.models import OpenAILLM  # type: ignore[import-not-found]
from distilabel.pipeline import Pipeline  # type: ignore[import-not-found]
from distilabel.steps import LoadDataFromDicts  # type: ignore[import-not-found]
from distilabel.steps.tasks import TextGeneration  # type: ignore[import-not-found]
from measured import Task, main, prompts


def work(task: Task) -> int:
    # A step asks for one batch at a time and for all of its rows at once: the batch is its number in flight. Retries
    # (6, of the openai client) are its default. Answers are not parsed as JSON, which spares it what ours does.
    with Pipeline(name="asked", cache_dir=task.folder) as pipeline:
        rows = LoadDataFromDicts(data=[{"instruction": prompt} for prompt in prompts(task.rows)],
                                 batch_size=task.in_flight)  # fmt: skip
        llm = OpenAILLM(model="mock", base_url=task.url, api_key="none")
        rows.connect(TextGeneration(name="answers", llm=llm, input_batch_size=task.in_flight))
    told = pipeline.run(use_cache=True)
    return sum(text is not None for text in told["default"]["train"]["generation"])


if __name__ == "__main__":
    main("distilabel", work)
