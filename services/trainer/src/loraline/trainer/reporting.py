"""Where a run reports to besides this platform: TensorBoard, trackio, MLflow, Weights & Biases, by transformers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from loraline.core.errors import failed_precondition

_PROJECT = "loraline"


def check_reporters(names: Sequence[str]) -> None:
    """Raise FAILED_PRECONDITION (REPORTER_MISSING) where a library is not installed; none is loaded for that."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        message = (
            f"parameters.report_to names {', '.join(missing)}, which this server does not have. Install it in the "
            f"trainer's environment: pip install {' '.join(missing)}. Or leave it out of report_to."
        )
        raise failed_precondition("REPORTER_MISSING", message, libraries=",".join(missing))


def prepare_reports(names: Sequence[str], run: str, folder: Path) -> None:
    """Check that the libraries are there and tell them to write below `folder`, unless the environment says otherwise.

    Raises as check_reporters does, before anything is fetched or loaded.
    """
    check_reporters(names)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for variable, value in _places(name, run, folder / name).items():
            os.environ.setdefault(variable, value)
    if "wandb" in names and not os.environ.get("WANDB_API_KEY"):
        # Without a key it would ask for one on a terminal that a job does not have; `wandb sync` sends the run later.
        os.environ.setdefault("WANDB_MODE", "offline")


def _places(name: str, run: str, folder: Path) -> dict[str, str]:
    return {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(folder / run)},
        "trackio": {"TRACKIO_DIR": str(folder), "TRACKIO_PROJECT": _PROJECT},
        "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "MLFLOW_EXPERIMENT_NAME": _PROJECT},
        "wandb": {"WANDB_DIR": str(folder), "WANDB_PROJECT": _PROJECT},
    }[name]
