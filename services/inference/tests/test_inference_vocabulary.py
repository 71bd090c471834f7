"""A served folder whose config or tokenizer does not fit its weights: refused, told, or refused prompt by prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
from counting_engine import CountingChoice, MakeHost, answer, generation_of

from loraline.api.inference.v1 import inference_pb2
from loraline.core.errors import LoralineError
from loraline.inference.base_model import parse_base
from loraline.inference.engines.choice import choose
from loraline.inference.engines.port import Sampling
from loraline.inference.host import ModelHost
from loraline.inference.question import Question
from loraline.inference.servicer import InferenceServicer

pytestmark = pytest.mark.asyncio


def spoiled(toy: Any, folder: Path, name: str, **changes: Any) -> Path:
    """Copy the toy with fields of one JSON file changed."""
    shutil.copytree(toy.model, folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))
    return folder


def with_token(toy: Any, folder: Path, token: str) -> Path:
    """Copy the toy with one token more in its tokenizer, which its embedding has no row for."""
    document = json.loads((toy.model / "tokenizer.json").read_text())
    like = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    more = {"id": len(document["model"]["vocab"]), "content": token, **like}
    return spoiled(toy, folder, "tokenizer.json", added_tokens=[*document["added_tokens"], more])


async def load(host: ModelHost, folder: Path) -> None:
    await host.load_model(parse_base(str(folder)), trusted=True)


async def diagnoses(host: ModelHost) -> list[inference_pb2.Diagnosis]:
    nothing: Any = None
    servicer = InferenceServicer(host, generation_of(host), nothing, nothing)
    return list((await servicer.GetCapabilities(inference_pb2.GetCapabilitiesRequest(), nothing)).diagnoses)


@pytest.mark.parametrize("more", [1, -1])
async def test_a_config_of_other_weights_is_refused_before_the_engine(
    make_host: MakeHost, toy: Any, tmp_path: Path, more: int
) -> None:
    rows = json.loads((toy.model / "config.json").read_text())["vocab_size"]
    folder = spoiled(toy, tmp_path / "spoiled", "config.json", vocab_size=rows + more)
    made: list[str] = []

    class Choice(CountingChoice):
        def create(self) -> Any:
            made.append("engine")
            return super().create()

    host = make_host(lambda _: Choice("transformers", "test"))
    with pytest.raises(LoralineError, match=f"vocab_size {rows + more}; the embedding has {rows} rows") as refused:
        await load(host, folder)
    assert (refused.value.code, refused.value.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION, "VOCAB_SIZE_MISMATCH",
    )  # fmt: skip
    assert not made


async def test_another_models_tokenizer_is_refused(make_host: MakeHost, toy: Any, tmp_path: Path) -> None:
    document = json.loads((toy.model / "tokenizer.json").read_text())
    vocabulary = {**document["model"]["vocab"], "another": 5000}
    folder = spoiled(toy, tmp_path / "other", "tokenizer.json", model={**document["model"], "vocab": vocabulary})
    host = make_host()
    with pytest.raises(LoralineError, match="'another' the id 5000") as refused:
        await load(host, folder)
    assert refused.value.reason == "TOKEN_ID_OUT_OF_RANGE"


async def test_a_blank_eos_is_told_in_the_status(make_host: MakeHost, toy: Any, tmp_path: Path) -> None:
    host = make_host()
    await load(host, spoiled(toy, tmp_path / "blank", "tokenizer_config.json", eos_token=" "))
    assert await answer(host) == "0 1 2 "
    [told] = await diagnoses(host)
    assert (told.reason, "eos_token is blank (' ')" in told.message) == ("EOS_TOKEN_BLANK", True)
    assert set(told.explanations) == {"en", "zh", "ko"}
    await load(host, toy.model)
    assert await diagnoses(host) == []


async def test_text_that_becomes_an_id_without_a_row_is_refused(make_host: MakeHost, toy: Any, tmp_path: Path) -> None:
    host = make_host(lambda _: choose("transformers"))
    await load(host, with_token(toy, tmp_path / "added", "<zebra>"))
    assert [told.reason for told in await diagnoses(host)] == ["TOKEN_ID_OUT_OF_RANGE"]
    generation = generation_of(host)
    for question in (
        Question("", Sampling(max_tokens=2), prompt="a <zebra> b"),
        Question("", Sampling(max_tokens=2), messages=[{"role": "user", "content": "a <zebra> b"}]),
    ):
        with pytest.raises(LoralineError) as refused:
            async with generation.answer(question):
                pass
        assert refused.value.reason == "TOKEN_ID_OUT_OF_RANGE"
    assert await answer(host, tokens=2) is not None  # all other texts are answered
