"""`python -m loraline.core.diagnostics.page [FILE]`: writes docs/troubleshooting.md from the entries.

Without FILE the page goes to standard output. A test compares the page in the repository with what this makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loraline.core.diagnostics.catalog import LANGUAGES, STAGES, Entry, Language, anchor, entries

_STAGE_TITLES = {
    "setup": "The machine and its network",
    "server": "Server, keys and requests",
    "artifacts": "Artifacts and the store",
    "jobs": "Jobs and the database",
    "datagen": "Making data",
    "trainer": "Training",
    "merger": "Merging",
    "inference": "Serving",
    "client": "Client and pipelines",
}
_LABELS: dict[Language, tuple[str, str, str]] = {
    "en": ("English", "What happened", "What to do"),
    "zh": ("中文", "发生了什么", "怎么办"),
    "ko": ("한국어", "무슨 일인가", "해결 방법"),
}
_HEAD = """# Troubleshooting

<!-- Made by `python -m loraline.core.diagnostics.page docs/troubleshooting.md`; edit the entries, not this page. -->

Every error of Loraline carries a reason in capitals, and every reason has its place here: `PORT_TAKEN` is
[`#port-taken`](#port-taken). An error's details link to its place; the texts are in English, 中文 and
한국어.
"""


def render() -> str:
    """Return the whole page."""
    parts = [_HEAD, _contents()]
    for stage in STAGES:
        found = [entry for entry in entries() if entry.stage == stage]
        if found:
            parts.append(f"## {_STAGE_TITLES[stage]}\n")
            parts.extend(_section(entry) for entry in found)
    return "\n".join(parts).rstrip() + "\n"


def _contents() -> str:
    lines: list[str] = []
    for stage in STAGES:
        found = [entry for entry in entries() if entry.stage == stage]
        if found:
            lines.append(f"- {_STAGE_TITLES[stage]}")
            lines += [f"  - [{entry.text().title}](#{anchor(entry.reason)})" for entry in found]
    return "\n".join(lines) + "\n"


def _section(entry: Entry) -> str:
    anchors = "".join(f'<a id="{anchor(reason)}"></a>' for reason in entry.reasons)
    lines = [f"### {entry.text().title}", "", anchors, "", " · ".join(f"`{reason}`" for reason in entry.reasons), ""]
    for language in LANGUAGES:
        name, happened, todo = _LABELS[language]
        text = entry.text(language)
        head = "" if language == "en" else f"**{name} — {text.title}.** "
        lines += [f"{head}**{happened}:** {text.what}", "", f"**{todo}:** {text.do}", ""]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Write the page to the file given, or to standard output."""
    if arguments:
        Path(arguments[0]).write_text(render(), encoding="utf-8")
    else:
        sys.stdout.write(render())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
