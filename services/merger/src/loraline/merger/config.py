"""Settings of the merger, from the environment (prefix `LORALINE_MERGER_`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from loraline.merger.spec import MeasureSettings


class MergerSettings(BaseSettings):
    """How merges are measured. Every field is `LORALINE_MERGER_<FIELD>` in the environment."""

    model_config = SettingsConfigDict(env_prefix="LORALINE_MERGER_", extra="ignore")

    measure_tokens: int = Field(default=512, ge=8)
    """Tokens whose distributions are compared; each needs four bytes per vocabulary entry on disk."""
    measure_length: int = Field(default=2048, ge=8)
    """Longest text that is measured, in tokens."""
    measure_dtype: Literal["float32", "auto"] = "float32"
    """Type that models are measured in; `auto` takes the stored type and half the memory, with a device's rounding."""

    def measure(self) -> MeasureSettings:
        """Return the settings of the measurement."""
        return MeasureSettings(self.measure_tokens, self.measure_length, self.measure_dtype)
