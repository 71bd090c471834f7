"""Measures convert and check: rows a second, and memory from a hundred thousand to a million rows.

`python benchmarks/datagen/quality.py [ROWS]`, or `… near` for near duplicates alone (datagen-near.txt). Every
measurement runs in a process of its own, whose largest resident set is read when it ends; memory is flat when ten
times the rows need little more. Near duplicates are measured beside
datasketch's own in-memory index (MinHashLSH) on the same rows; what that finds are candidates, compared no further.
Recall is measured on pairs whose Jaccard index is known: a text and the same with some of its words replaced.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "datagen-quality.txt"
NEAR_ROWS = 20_000
RECALL_PAIRS = 4_000
FLAT_MIB = 100
"""Growth in MiB from a tenth of the rows to all of them that still counts as flat."""
NOUNS = (
    "boat",
    "lamp",
    "tide",
    "gull",
    "rope",
    "bell",
    "net",
    "pier",
    "salt",
    "storm",
    "sail",
    "harbour",
    "anchor",
    "wave",
)
VERBS = (
    "counts",
    "mends",
    "watches",
    "paints",
    "carries",
    "follows",
    "repairs",
    "hides",
    "measures",
    "lights",
    "forgets",
)


def texts(rows: int) -> Iterator[tuple[str, str]]:
    """Yield prompts and answers of some 200 characters; one in a hundred repeats an earlier one but for a word."""
    source = random.Random(7)
    before = ""
    for number in range(rows):
        if number % 100 == 99:
            answer = before.replace("the", "a", 1)
        else:
            parts = [f"The {source.choice(NOUNS)} {source.choice(VERBS)} the {source.choice(NOUNS)}" for _ in range(6)]
            answer = f"{', and '.join(parts).lower()} until {source.randrange(10**6)} o'clock."
        before = answer
        yield f"What happens on day {number}?", answer


def write_raw(folder: Path, rows: int) -> None:
    """Write raw prompt/completion rows."""
    with (folder / "raw.jsonl").open("w", encoding="utf-8") as out:
        for prompt, answer in texts(rows):
            out.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


def convert_rows(folder: Path, rows: int) -> dict[str, float]:
    """Convert, drop duplicates, split and write the dataset."""
    from loraline.datagen.convert.engine import ConvertCounts, ConvertSettings, convert
    from loraline.datagen.convert.files import find_files
    from loraline.datagen.publish.spool import RowSpool

    (folder / "dataset").mkdir()
    begin = time.perf_counter()
    spool = RowSpool(folder, drop_duplicates=True)
    for row in convert(find_files(folder / "raw.jsonl"), ConvertSettings(), ConvertCounts()):
        spool.add(row, "raw")
    spool.write(folder / "dataset", 0.05, 0)
    spool.close()
    return {"seconds": time.perf_counter() - begin}


def check_rows(folder: Path, rows: int) -> dict[str, float]:
    """Check the dataset with every rule that needs no tokenizer."""
    from loraline.datagen.quality.checks import check_folder

    begin = time.perf_counter()
    check = check_folder(folder / "dataset", scratch=folder)
    near = next((f.row_count for f in check.findings if f.code == "NEAR_DUPLICATES"), 0)
    return {"seconds": time.perf_counter() - begin, "near": near}


def near_ours(folder: Path, rows: int) -> dict[str, float]:
    """Find near duplicates only, as the check does."""
    from loraline.datagen.quality.rules.near import NearDuplicatesRule
    from loraline.datagen.quality.seen import TRAIN, LineIndex, SeenRow, read_rows

    index, rule = LineIndex(), NearDuplicatesRule(folder, 0.8)
    begin = time.perf_counter()
    for line, row in read_rows(folder / "dataset" / TRAIN):
        rule.see(SeenRow(TRAIN, index.number(TRAIN, line), row, row["messages"]))
    found = list(rule.findings(rows, index))
    return {"seconds": time.perf_counter() - begin, "near": found[0].row_count if found else 0}


def near_peer(folder: Path, rows: int) -> dict[str, float]:
    """Find near duplicates with datasketch alone, as its documentation shows: SHA-1 of n-grams, MinHashLSH."""
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(threshold=0.8, num_perm=128)
    near = 0
    begin = time.perf_counter()
    for number, line in enumerate((folder / "dataset" / "train.jsonl").open(encoding="utf-8")):
        text = "\n".join(message["content"] for message in json.loads(line)["messages"]).casefold()
        sketch = MinHash(num_perm=128)
        sketch.update_batch({text[at : at + 5].encode() for at in range(len(text) - 4)})
        near += bool(lsh.query(sketch))
        lsh.insert(number, sketch)
    return {"seconds": time.perf_counter() - begin, "near": near}


def recall(folder: Path, rows: int) -> dict[str, float]:
    """Find the second of each of so many pairs; the share found, by the pair's exact Jaccard index in tenths."""
    import numpy as np

    from loraline.datagen.quality.rules.near import FirstRows, NearDuplicatesRule, shingles
    from loraline.datagen.quality.seen import TRAIN, LineIndex, SeenRow

    class Every(FirstRows):
        numbers_found: set[int] = set()  # noqa: RUF012 - one rule in one process

        def add(self, number: int) -> None:
            self.numbers_found.add(number)
            super().add(number)

    index, rule, source = LineIndex(), NearDuplicatesRule(folder, 0.8), random.Random(5)
    rule._near = Every()
    indices: list[float] = []
    for number in range(rows):
        pair = _pair(source)
        one, other = shingles(pair[0]), shingles(pair[1])
        common = len(np.intersect1d(one, other))
        indices.append(common / (len(one) + len(other) - common))
        for at, text in enumerate(pair, start=1):
            messages = [{"role": "assistant", "content": text}]
            rule.see(SeenRow(TRAIN, index.number(TRAIN, 2 * number + at), {}, messages))
    list(rule.findings(2 * rows, index))
    found = Every.numbers_found
    told: dict[str, float] = {}
    for low, high in ((0.0, 0.75), (0.75, 0.8), (0.8, 0.85), (0.85, 0.9), (0.9, 1.0)):
        members = [number for number, value in enumerate(indices) if low <= value < high]
        told[f"pairs {low}"], told[f"found {low}"] = len(members), sum(2 * number + 2 in found for number in members)
    return told


def _pair(source: random.Random) -> tuple[str, str]:
    """Return a text of 15 to 60 invented words and the same with one to four of them replaced."""

    def word() -> str:
        return "".join(source.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(source.randint(3, 9)))

    words = [word() for _ in range(source.randint(15, 60))]
    others = list(words)
    for _ in range(source.randint(1, 4)):
        others[source.randrange(len(others))] = word()
    return " ".join(words), " ".join(others)


def _child(work: Callable[[Path, int], dict[str, float]], folder: Path, rows: int, out: Any) -> None:
    measured = work(folder, rows)
    measured["mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out.send(measured)


def alone(work: Callable[[Path, int], dict[str, float]], folder: Path, rows: int) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, folder, rows, send))
    process.start()
    send.close()
    measured = receive.recv()
    process.join()
    return measured


def measure(rows: int) -> dict[str, dict[str, float]]:
    """Convert and check so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        write_raw(Path(folder), rows)
        return {work.__name__: alone(work, Path(folder), rows) for work in (convert_rows, check_rows)}


def compare_near() -> tuple[dict[str, float], dict[str, float]]:
    """Measure near duplicates, ours and the peer's, on the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        write_raw(Path(folder), NEAR_ROWS)
        alone(convert_rows, Path(folder), NEAR_ROWS)
        return alone(near_ours, Path(folder), NEAR_ROWS), alone(near_peer, Path(folder), NEAR_ROWS)


def told_near() -> list[str]:
    """Measure near duplicates: speed beside the peer, and recall."""
    ours, peer = compare_near()
    train = NEAR_ROWS * 0.95
    return [
        f"info near-duplicates {train / ours['seconds']:,.0f} rows/s, {ours['near']:.0f} found, {ours['mib']:.0f} MiB; "
        f"datasketch alone {train / peer['seconds']:,.0f} rows/s, {peer['near']:.0f} found, {peer['mib']:.0f} MiB",
        f"ratio near-duplicates rows/s over datasketch {peer['seconds'] / ours['seconds']:.2f}",
        told_recall(),
    ]


def told_recall() -> str:
    """Measure recall and say it, with what was told of pairs below the bound."""
    with tempfile.TemporaryDirectory() as folder:
        told = alone(recall, Path(folder), RECALL_PAIRS)
    names = {0.0: "below 0.75", 0.75: "0.75 to 0.8", 0.8: "0.8 to 0.85", 0.85: "0.85 to 0.9", 0.9: "0.9 to 1"}
    shares = [
        f"{name}: {told[f'found {low}']:.0f} of {told[f'pairs {low}']:.0f}"
        for low, name in names.items()
        if told[f"pairs {low}"]
    ]
    above = [low for low in names if low >= 0.8]
    share = sum(told[f"found {low}"] for low in above) / sum(told[f"pairs {low}"] for low in above)
    return (
        f"info near-duplicate recall at 0.8 and above {100 * share:.2f} %; found by Jaccard index {'; '.join(shares)}"
    )


def main() -> int:
    """Measure, print and write the results; 1 when memory is not flat."""
    lines = told_near()
    if sys.argv[1:] == ["near"]:
        RESULTS.with_name("datagen-near.txt").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
        return 0
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    few, many = measure(rows // 10), measure(rows)
    flat = True
    for name in many:
        growth = many[name]["mib"] - few[name]["mib"]
        flat = flat and growth <= FLAT_MIB
        lines.append(
            f"info {name} {rows / many[name]['seconds']:,.0f} rows/s at {rows:,} rows; largest resident set "
            f"{few[name]['mib']:.0f} MiB at {rows // 10:,} rows, {many[name]['mib']:.0f} MiB at {rows:,} "
            f"({growth * 2**20 / (rows - rows // 10):.0f} bytes a row)"
        )
    lines.append(f"{'ok  ' if flat else 'fail'} memory grows by {FLAT_MIB} MiB or less from {rows // 10:,} to {rows:,}")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    RESULTS.write_text(text)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
