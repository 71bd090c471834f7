"""The chat template of a model folder."""

from __future__ import annotations

from pathlib import Path

from loraline.core.errors import failed_precondition
from loraline.core.model_files.tokenizer import read_tokenizer


def chat_template(folder: Path) -> str:
    """Return the folder's chat template from its file, else from tokenizer_config.json; empty without one.

    FAILED_PRECONDITION CHAT_TEMPLATE_FAILED for a file that is no text.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise failed_precondition(
                "CHAT_TEMPLATE_FAILED", f"{file.name} cannot be read: {error}. Take the base's file.", file=file.name
            ) from error
    value = read_tokenizer(folder).config.get("chat_template")
    if isinstance(value, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""
