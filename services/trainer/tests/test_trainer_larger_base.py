"""A larger base is advised where nothing else would help, and only one that is there."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraline.api.artifact.v1.artifact_pb2 import (
    ARTIFACT_KIND_ADAPTER,
    ARTIFACT_KIND_MODEL,
    ARTIFACT_KIND_SOURCE,
    Artifact,
    ArtifactKind,
    ArtifactRef,
)
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.serving.component import Platform
from loraline.core.serving.server import open_platform
from loraline.trainer.diagnosis.history import History, Point
from loraline.trainer.diagnosis.larger_base import models_in
from loraline.trainer.diagnosis.sign import Facts
from loraline.trainer.diagnosis.subject import Subject, diagnose
from loraline.trainer.outcome import count_parameters


def settled(at: float, steps: int) -> History:
    """Return a curve that has come to rest at a loss, where it is long enough."""
    draw = random.Random(3)
    losses = [(at + (3.6 - at) * math.exp(-step / 20)) * (1 + draw.uniform(-0.02, 0.02)) for step in range(steps)]
    return History(tuple(Point(step + 1, loss, None, 1e-4, 1.0) for step, loss in enumerate(losses)), (), 4.0, 4.0)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    opened = open_platform(CoreSettings(data_dir=tmp_path / "data", auth="off"))
    yield opened
    opened.database.close()


@pytest.fixture
def bases(platform: Platform, tmp_path: Path) -> list[Artifact]:
    """Bases of 1, 1.2, 2 and 4 million weights, an adapter, and a merged model of 1.6 million."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    def publish(
        name: str, millions: float, kind: ArtifactKind.ValueType = ARTIFACT_KIND_MODEL, **more: Any
    ) -> ArtifactRef:
        facts = {"parameters": int(millions * 1e6), "source": f"harbour/{name}"}
        return platform.library.publish(kind, name, folder, facts=facts, **more).ref

    for name, millions in (("four", 4), ("nearly", 1.2), ("one", 1)):
        publish(name, millions)
    texts = publish("texts", 0, ARTIFACT_KIND_SOURCE)
    publish("two", 2, inputs=[texts])  # made here, with a tokenizer of these texts
    publish("adapter", 3, ARTIFACT_KIND_ADAPTER)
    one = next(found.ref for found in models_in(platform.library) if found.ref.name == "one")
    publish("merged", 1.6, inputs=[one])
    return models_in(platform.library)


def ref(bases: list[Artifact], name: str) -> ArtifactRef:
    return next(found.ref for found in bases if found.ref.name == name)


def advised(
    bases: list[Artifact],
    base: pb.BaseModel,
    *,
    loss: float = 0.9,
    rank: int = 128,
    full: bool = False,
    steps: int = 200,
) -> pb.DiagnoseResponse:
    lora = None if full else pb.LoraParameters(r=rank, alpha=2 * rank)
    parameters = pb.TrainingParameters(epochs=4, learning_rate=1e-4, lora=lora)
    return diagnose(Subject("harbour", settled(loss, steps), Facts(rows=500), parameters, base), bases)


def test_the_next_larger_one_is_advised_and_shown(bases: list[Artifact]) -> None:
    answer = advised(bases, pb.BaseModel(artifact=ref(bases, "one")))
    assert "lora" not in answer.config_patch.fields  # its rank is at the limit, and stays as it is
    assert answer.verdict == pb.VERDICT_UNDERTRAINED
    assert answer.base_model == ref(bases, "two")  # not `nearly`, which is hardly larger, nor what was tuned
    assert "base_model: {artifact: model/two:v1}" in answer.html
    assert advised(bases, pb.BaseModel(artifact=ref(bases, "two"))).base_model.name == "four"
    assert advised(bases, pb.BaseModel(artifact=ref(bases, "merged"))).base_model.name == "four"


def test_a_hub_base_is_known_by_its_import_and_a_path_by_its_weights(bases: list[Artifact], small_base: Path) -> None:
    assert advised(bases, pb.BaseModel(hub_id="harbour/two")).base_model.name == "four"
    assert count_parameters(small_base) < 1e6
    assert advised(bases, pb.BaseModel(path=str(small_base))).base_model.name == "one"


@pytest.mark.parametrize(
    "case",
    ["largest", "unknown", "gone", "good", "rank left", "few steps"],
    ids=lambda case: str(case).replace(" ", "-"),
)
def test_none_is_advised(bases: list[Artifact], tmp_path: Path, case: str) -> None:
    one = pb.BaseModel(artifact=ref(bases, "one"))
    answers = {
        "largest": lambda: advised(bases, pb.BaseModel(artifact=ref(bases, "four"))),
        "unknown": lambda: advised(bases, pb.BaseModel(hub_id="harbour/never-imported")),
        "gone": lambda: advised(bases, pb.BaseModel(path=str(tmp_path / "gone"))),
        "good": lambda: advised(bases, one, loss=0.15),
        "rank left": lambda: advised(bases, one, rank=32),
        "few steps": lambda: advised(bases, one, steps=5),
    }
    answer = answers[case]()
    assert not answer.HasField("base_model") and "base_model:" not in answer.html


def test_where_all_weights_are_trained_there_is_no_rank_to_raise_first(bases: list[Artifact]) -> None:
    assert advised(bases, pb.BaseModel(artifact=ref(bases, "one")), full=True).base_model.name == "two"
