"""`python tools/monitoring/dashboards.py [FOLDER]`: writes deploy/grafana/dashboards/*.json, or into another folder."""

from __future__ import annotations

import sys
from pathlib import Path

from boards_platform import INFERENCE, OVERVIEW, PLATFORM
from boards_stages import DATAGEN, MERGE, TRAINING
from panels import to_json

FOLDER = Path(__file__).resolve().parents[2] / "deploy/grafana/dashboards"
BOARDS = (OVERVIEW, DATAGEN, TRAINING, MERGE, INFERENCE, PLATFORM)


def main(folder: Path = FOLDER) -> None:
    """Write every dashboard."""
    for board in BOARDS:
        (folder / f"{board.uid.removeprefix('loraline-')}.json").write_text(to_json(board), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
