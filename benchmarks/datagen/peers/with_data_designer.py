"""NVIDIA NeMo Data Designer: one LLM text column over a seed dataset, written to its artifact folder."""

from __future__ import annotations

# Installed in its own virtual environment only.
import data_designer.config as dd  # type: ignore[import-not-found]
import pandas as pd  # type: ignore[import-not-found]
from data_designer.interface import DataDesigner, ResumeMode  # type: ignore[import-not-found]
from measured import Task, main, prompts


def work(task: Task) -> int:
    # Its defaults otherwise: row groups of 1000, 3 of them at a time, adaptive admission, early shutdown at half of the
    # tasks failing. It is told to resume, which it does not do by default.
    model = dd.ModelConfig(
        alias="writer", model="mock", provider="mock",
        inference_parameters=dd.ChatCompletionInferenceParams(max_parallel_requests=task.in_flight),
    )  # fmt: skip
    builder = dd.DataDesignerConfigBuilder(model_configs=[model])
    builder.with_seed_dataset(dd.DataFrameSeedSource(df=pd.DataFrame({"question": prompts(task.rows)})))
    builder.add_column(dd.LLMTextColumnConfig(name="answer", model_alias="writer", prompt="{{ question }}"))
    provider = dd.ModelProvider(name="mock", endpoint=task.url, provider_type="openai", api_key="none")
    designer = DataDesigner(artifact_path=task.folder, model_providers=[provider])
    told = designer.create(builder, num_records=task.rows, dataset_name="asked", resume=ResumeMode.IF_POSSIBLE)
    return int(told.load_dataset()["answer"].notna().sum())


if __name__ == "__main__":
    main("data-designer", work)
