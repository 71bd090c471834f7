"""The trainer's own settings, from the environment (prefix `LORALINE_TRAINER_`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class TrainerSettings(BaseSettings):
    """Every field is `LORALINE_TRAINER_<FIELD>` in the environment."""

    model_config = SettingsConfigDict(env_prefix="LORALINE_TRAINER_", extra="ignore")

    models_dirs: list[Path] = Field(default_factory=list)
    """Folders of base models that requests may name by path, besides LORALINE_ALLOWED_PATHS."""
    hub_timeout_seconds: float = 20.0
    """How long the Hub may be silent before it counts as out of reach."""
    threads: int = 0
    """CPU threads of a training process; 0 leaves the choice to torch."""
    ranks: int = Field(default=0, ge=0, le=1024)
    """Training processes of LAUNCHER_TORCHRUN; 0 for one on each GPU."""
    publish_checkpoints: Literal["auto", "always", "never"] = "auto"
    """Send checkpoints to the artifact store too, so that another machine can go on; `auto` does for an S3 store."""
    fused_kernels: bool = True
    """Train with flash attention and Liger's layers where they are installed beside a GPU; off where one misbehaves."""
