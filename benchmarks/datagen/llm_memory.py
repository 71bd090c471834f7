"""Measures the memory of the language model path and of templates at many rows: what a row costs while a job holds it.

`python benchmarks/datagen/llm_memory.py`. Each size runs in a fresh process: prompt, limiter, salvage, schema,
duplicates, ledger with its index, and the spool that a job writes its rows to. The figure for a million rows is drawn
from the two largest sizes: the memory of the larger one, and its growth for each row more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench import mock_server

RESULTS = Path(__file__).resolve().parents[1] / "results" / "datagen-llm-memory.txt"
BATCH, IN_FLIGHT = 50, 16
MIB = 2**20
MILLION = 1_000_000
MOST_BYTES_A_ROW = 100.0


def with_model(url: str, rows: int, folder: Path) -> int:
    """Ask for rows as a job does; return how many there are."""
    from loraline.datagen.llms.answer_index import AnswerIndex
    from loraline.datagen.llms.endpoint import Endpoint
    from loraline.datagen.llms.generate import LlmRun
    from loraline.datagen.llms.intake import Intake
    from loraline.datagen.llms.ledger_file import FileLedger
    from loraline.datagen.llms.prompting import LlmSettings
    from loraline.datagen.llms.recipes import RECIPES
    from loraline.datagen.llms.routes import Pace
    from loraline.datagen.publish.spool import RowSpool

    settings = LlmSettings(RECIPES["instruction-response"], rows, BATCH)
    spool = RowSpool(folder, drop_duplicates=True)
    index = AnswerIndex(folder / "llm-answers.db")
    ledger = FileLedger(folder / "jobs" / "one" / "llm-1" / "ledger.jsonl", index)
    intake = Intake(settings, "asked", lambda row: spool.add(row, "asked"))
    endpoint = Endpoint("default", url, "mock", "none")
    asyncio.run(LlmRun(settings, [endpoint], ledger, intake, 1, None, Pace(IN_FLIGHT)).run())
    ledger.close()
    return len(spool)


def with_templates(rows: int, folder: Path) -> int:
    """Make rows of a template as a job does; return how many there are."""
    from loraline.api.datagen.v1 import datagen_pb2
    from loraline.datagen.publish.spool import RowSpool
    from loraline.datagen.sources import template_rows

    recipe = datagen_pb2.TemplateRecipe(rows=rows)
    for name in ("place", "thing", "time"):
        recipe.pools[name].items.extend(datagen_pb2.PoolItem(text=f"{name} {n}") for n in range(150))
    recipe.templates.add(prompt="Where is {thing} at {time}?", response="At {time} {thing} is in {place}.")
    spool = RowSpool(folder, drop_duplicates=True)
    for row in template_rows(recipe, 1, "made"):
        spool.add(row, "made")
    return len(spool)


def client(kind: str, url: str, rows: int) -> None:
    """Make rows in this process and print the largest resident set."""
    with tempfile.TemporaryDirectory() as folder:
        made = with_model(url, rows, Path(folder)) if kind == "model" else with_templates(rows, Path(folder))
    print(json.dumps({"rows": made, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def measure(kind: str, url: str, rows: int) -> float:
    """Return the largest resident set, in bytes, of a process that makes so many rows."""
    command = [sys.executable, __file__, "--client", kind, "--url", url, "--rows", str(rows)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert told["rows"] == rows, told
    return float(told["bytes"])


def run(sizes: list[int]) -> tuple[list[str], bool]:
    """Return the lines, and whether rows are as cheap as they shall be."""
    lines, met = [], True
    with mock_server(0.0) as url:
        for kind in ("model", "template"):
            told = [measure(kind, url, size) for size in sizes]
            a_row = (told[-1] - told[-2]) / (sizes[-1] - sizes[-2])
            met = met and a_row <= MOST_BYTES_A_ROW
            for size, used in zip(sizes, told, strict=True):
                lines.append(f"info {kind}_rows {size} largest_resident_mib {used / MIB:.0f}")
            lines.append(f"info {kind}_bytes_a_row {a_row:.0f}")
            lines.append(
                f"info {kind}_mib_at_a_million_extrapolated {(told[-1] + a_row * (MILLION - sizes[-1])) / MIB:.0f}"
            )
    word = "ok  " if met else "MISS"
    return [*lines, f"{word} a row more costs {MOST_BYTES_A_ROW:.0f} bytes or less"], met


def main() -> int:
    """Measure, print and keep the lines."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--client", choices=["model", "template"])
    arguments.add_argument("--url", default="")
    arguments.add_argument("--rows", type=int, default=0)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[20_000, 100_000, 300_000])
    arguments.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    wanted = arguments.parse_args()
    if wanted.client:
        client(wanted.client, wanted.url, wanted.rows)
        return 0
    lines, met = run(wanted.sizes)
    if wanted.keep:
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
