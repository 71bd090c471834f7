"""Loraline's Python SDK: `Loraline` for scripts, `AsyncLoraline` for asyncio programs.

from loraline.client import Loraline

with Loraline.connect() as client:
    print(client.inference.answer("mareva@production", "How are you today?").text)
"""

from loraline.client.aio import AsyncLoraline
from loraline.client.errors import JobNotSuccessful, LoralineApiError
from loraline.client.refs import format_ref, parse_ref
from loraline.client.resources.artifacts import Upload
from loraline.client.resources.inference import Answer
from loraline.client.sync import Loraline

__all__ = [
    "Answer",
    "AsyncLoraline",
    "JobNotSuccessful",
    "Loraline",
    "LoralineApiError",
    "Upload",
    "format_ref",
    "parse_ref",
]
