"""The licence of a model: what its own card says, and the licence files that lie beside its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FIELD = re.compile(r"^license(?:_name)?:\s*[\"']?([A-Za-z0-9._-]{1,60})[\"']?\s*$", re.MULTILINE)
_MOST = 64 * 1024
"""Characters of a card that are looked at; its front matter is at the top."""


@dataclass(frozen=True)
class Licence:
    """A licence's identifier, empty when the card names none, and its files."""

    identifier: str
    files: tuple[str, ...]

    def front_matter(self, base_model: str = "") -> list[str]:
        """Return the lines that a model card begins with, as the Hub reads them; none when nothing is known."""
        lines = [f"license: {self.identifier}"] if self.identifier else []
        lines += [f"base_model: {base_model}"] if base_model else []
        return ["---", *lines, "---", ""] if lines else []

    def section(self, owner: str) -> list[str]:
        """Return the card's section about the licence; `owner` is whose licence it is, such as `base`."""
        said = self.identifier or f"The {owner} names no licence; ask its authors before passing this model on."
        files = f" Files: {', '.join(self.files)}." if self.files else ""
        return ["", "## Licence", "", f"As of the {owner}: {said}.{files}" if self.identifier else f"{said}{files}"]


def find_licence(folder: Path) -> Licence:
    """Read a model folder's licence from README.md and from LICENSE and NOTICE files."""
    files = sorted(p.name for pattern in ("LICENSE*", "NOTICE*") for p in folder.glob(pattern) if p.is_file())
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[:_MOST] if card.is_file() else ""
    head = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    match = _FIELD.search(head)
    return Licence(match[1] if match else "", tuple(files))
