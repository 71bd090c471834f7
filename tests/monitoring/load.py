"""A load that exercises what panels show: the line, a language model's rows, answers of all kinds, errors."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from google.protobuf import json_format

from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.inference.v1.inference_pb2 import SamplingParameters
from loraline.api.merger.v1 import merger_pb2
from loraline.client import Loraline, LoralineApiError
from pipeline_deployments import Deployment

QUESTIONS = ("晚上好！", "Good evening!", "今天过得好吗？", "What do you see from the tower?")
ADAPTER = "mareva@production"


def run_line(deployment: Deployment, file: Path) -> None:
    """Run the pipeline file through the command line, as people do."""
    command = [sys.executable, "-m", "loraline.client.cli.main", "--format", "json", "run", str(file)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LORALINE_")} | deployment.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2400)
    logs = "".join(f"\n--- {name}\n{deployment.log(name)[-2000:]}" for name in deployment.processes)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}{logs}"


WORD = {"type": "string", "pattern": "^[a-z]{3,12}$"}
OWN_ROWS: dict[str, Any] = {
    "type": "object", "properties": {"prompt": WORD, "completion": WORD}, "required": ["prompt", "completion"],
    "additionalProperties": False,
}  # fmt: skip
"""The rows that a model which knows nothing can write."""


def recipe_of(model: str, rows: int, endpoint: str = "") -> datagen_pb2.LlmRecipe:
    """Return the recipe for rows of the served model, or of a named endpoint, which writes what is asked for."""
    asked = datagen_pb2.LlmEndpoint(name=endpoint, model=model)
    recipe = datagen_pb2.LlmRecipe(
        recipe="instruction-response", rows=rows, batch_size=1, endpoints=[asked], system_prompt="Write.",
        temperature=1, topics=["sea", "salt", "rope", "snow"], max_tokens=160, max_candidates_ratio=20,
    )  # fmt: skip
    if not endpoint:
        json_format.ParseDict(OWN_ROWS, recipe.item_schema)
    return recipe


def generate(client: Loraline, name: str, recipe: datagen_pb2.LlmRecipe) -> str:
    """Start a job that makes such rows; returns its name."""
    request = datagen_pb2.GenerateDatasetRequest(name=name, sources=[datagen_pb2.DatasetSource(llm=recipe)])
    return client.datagen.generate(request).name


def rows_of_a_model(client: Loraline, base: str) -> None:
    """Have datagen ask the served model for rows: a look at a few, then a dataset."""
    source = datagen_pb2.DatasetSource(llm=recipe_of(base, 2))
    client.datagen.preview(datagen_pb2.PreviewDatasetRequest(source=source, rows=2))
    client.jobs.result(generate(client, "nonsense", recipe_of(base, 12)), datagen_pb2.DatasetResult)


def check_model(client: Loraline) -> None:
    """Have the merger look at the merged model."""
    model = client.artifacts.show("model/mareva").ref
    job = client.merger.check(merger_pb2.CheckModelRequest(model=merger_pb2.ModelLocation(artifact=model)))
    client.jobs.result(job.name, merger_pb2.CheckModelResult)


def ask(deployment: Deployment, client: Loraline, rounds: int) -> None:
    """Ask base and adapter over gRPC and HTTP, in a session, in a shape, streamed and wrongly."""
    http = openai.OpenAI(base_url=f"{deployment.http}/v1", api_key=deployment.key, max_retries=0)
    for turn in range(rounds):
        question = QUESTIONS[turn % len(QUESTIONS)]
        messages: list[Any] = [{"role": "user", "content": question}]
        client.inference.answer(ADAPTER, question, sampling=SamplingParameters(max_tokens=32))
        client.inference.answer("", question, sampling=SamplingParameters(max_tokens=16))
        for _ in http.chat.completions.create(model=ADAPTER, messages=messages, max_tokens=24, stream=True):
            pass
        shape = {"structured_outputs": {"choice": ["yes", "no"]}}
        http.chat.completions.create(model=ADAPTER, messages=messages, max_tokens=24, extra_body=shape)
        with contextlib.suppress(LoralineApiError):  # the caller's error: it is shown, and spends no budget
            client.inference.answer("nobody:v7", question)
    session = client.inference.create_session(model=ADAPTER)
    for question in QUESTIONS[:2]:
        client.inference.answer("", question, session=session.name, sampling=SamplingParameters(max_tokens=16))
    client.inference.reset_session(session.name)
    client.inference.delete_session(session.name)


def ask_at_once(deployment: Deployment, client: Loraline, callers: int = 4, rounds: int = 6) -> None:
    """Ask from several callers at a time."""
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda _: ask(deployment, client, rounds), range(callers)))
