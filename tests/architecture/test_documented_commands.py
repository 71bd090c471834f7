"""Every command that a text tells people to run exists, with its subcommand."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main

from loraline.client.cli.main import build

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = ROOT / "packages" / "core" / "src" / "loraline" / "core" / "diagnostics" / "entries"
PLACES = (
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("*/*/README.md"),
    *ENTRIES.glob("*.yaml"),
)
# Written as code: after a backtick, or at the start of an indented or fenced line. Within code, lines may break.
MENTION = re.compile(
    r"(?:`|^[ \t]*(?:\$ )?)loraline[ \t]+([a-z][a-z-]*)(?:\s+([a-z][a-z-]*))?(?=[\s`]|$)", re.MULTILINE
)


def commands() -> dict[str, set[str]]:
    """Return each command with its subcommands; a group without any is no group."""
    root = typer.main.get_command(build())
    tree = {}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        assert "Not available here" not in (command.help or ""), f"`loraline {name}` cannot be loaded"
        tree[name] = set(getattr(command, "commands", {}))
    return tree


def unknown_commands(text: str, known: dict[str, set[str]]) -> list[str]:
    """Return the commands in a text that do not exist."""
    found = []
    for name, second in MENTION.findall(text):
        if name not in known:
            found.append(f"loraline {name}")
        elif known[name] and second and second not in known[name]:
            found.append(f"loraline {name} {second}")
    return found


def test_the_search_sees_spans_lines_and_subcommands() -> None:
    known = {"jobs": {"list"}, "up": set[str]()}
    fine = "run `loraline up` or\n\n    loraline jobs list   # all\n\nLoraline starts, and loraline is; `loraline jobs`"
    assert unknown_commands(fine, known) == []
    wrong = "`loraline doctor`\n    loraline jobs look\n`loraline jobs\n  probe`, $ loraline up"
    assert unknown_commands(wrong, known) == ["loraline doctor", "loraline jobs look", "loraline jobs probe"]


def test_documented_commands_exist() -> None:
    known = commands()
    wrong = {str(place.relative_to(ROOT)): unknown_commands(place.read_text("utf-8"), known) for place in PLACES}
    assert not {place: names for place, names in wrong.items() if names}
    assert any(MENTION.search(place.read_text("utf-8")) for place in PLACES if place.suffix == ".yaml")
