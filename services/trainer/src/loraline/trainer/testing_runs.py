"""Whole runs in this process, for tests: what they start from, and an observer that takes notes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.base_models import ResolvedBase
from loraline.trainer.engines import training
from loraline.trainer.rows import load_dataset
from loraline.trainer.spec import TrainingSpec, training_spec


@dataclass
class Watcher:
    """Takes notes; asks to stop at a step."""

    stop_at: int = 0
    cause: str = "pause"
    steps: list[int] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def progress(self, step: int, total: int, eta_seconds: float, metrics: Mapping[str, float]) -> None:
        """Keep step and figures."""
        self.steps.append(step)
        self.metrics.append(dict(metrics))

    def saved(self, checkpoint: Path) -> None:
        """Check that the checkpoint is whole."""
        if not (checkpoint / "seal.json").is_file():
            raise AssertionError(f"{checkpoint} was told of before it was sealed")

    run = "harbour"

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add up."""
        self.counts[name] += int(amount)

    def note(self, message: str, *, severity: str = "info", reason: str = "") -> None:
        """Keep the reason."""
        self.notes.append(reason)

    @property
    def stop_cause(self) -> str:
        """`cause` from the step before `stop_at` on."""
        done = self.steps[-1] if self.steps else 0
        return self.cause if self.stop_at and done >= self.stop_at - 1 else ""


def spec(**fields: Any) -> TrainingSpec:
    """Return settings of a short run; fields are those of TrainingParameters, and method, objective, launcher."""
    request = {name: fields.pop(name) for name in ("method", "objective", "launcher") if name in fields}
    usual = None if request.get("method") == pb.METHOD_FULL else pb.LoraParameters(r=4, dropout=0.1)
    lora = fields.pop("lora", usual)
    defaults: dict[str, Any] = {"epochs": 4, "learning_rate": 5e-3, "batch_size": 8, "max_length": 128, "save_steps": 3}
    parameters = pb.TrainingParameters(lora=lora, **{**defaults, **fields})
    return training_spec(pb.TrainRequest(name="harbour", parameters=parameters, **request))


def inputs(base: Path, dataset: Path, *, pairs: bool = False) -> training.RunInputs:
    """Return a run on a folder of a base and one of rows, or of preference pairs."""
    resolved = ResolvedBase(base, pb.BaseModel(path=str(base)), False)
    rows = load_dataset(dataset, weight=1, pairs=pairs)
    return training.RunInputs("harbour", resolved, [rows], 0.0, ["dataset/harbour:v1"])


def digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights, or of a model's."""
    file = next(path for name in ("adapter_model", "model") if (path := folder / f"{name}.safetensors").is_file())
    return hashlib.sha256(file.read_bytes()).hexdigest()
