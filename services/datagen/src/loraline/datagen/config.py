"""Datagen's own settings, from the environment (prefix `LORALINE_DATAGEN_`).

Where language models are and their keys is not here but in `LLM_BASE_URL`, `LLM_API_KEY` or `LLM_API_KEY_FILE`, and
`LLM_MODEL`, the names that the field uses; see llms/endpoint.py.
"""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class DatagenSettings(BaseSettings):
    """Every field is `LORALINE_DATAGEN_<FIELD>` in the environment."""

    model_config = SettingsConfigDict(env_prefix="LORALINE_DATAGEN_", extra="ignore")

    llm_concurrency: int = Field(default=4, ge=1, le=1024)
    """Most calls at a time for an endpoint, model and key, of all jobs of this service together."""
    llm_backoff_seconds: float = Field(default=1.0, gt=0)
    """First pause after an endpoint failed in a way that may pass; it doubles with every further failure."""
    llm_answers_days: float = Field(default=30.0, ge=0)
    """How long an answer is given to later jobs that ask the same, from the time it came, while the job that paid for
    it is not deleted; 0 gives none."""
    probe_timeout_seconds: float = Field(default=15.0, gt=0)
    """How long ProbeEndpoint waits."""
