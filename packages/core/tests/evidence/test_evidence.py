"""The evidence files: what is written is what is read, and a changed file is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraline.core.errors import LoralineError
from loraline.core.evidence.probes import Probe, ProbeSet, compare_logprobs, load_probes
from loraline.core.evidence.receipt import (
    ReceiptCounts,
    ReceiptRow,
    TokenReceipt,
    compare_rendering,
    digest_ids,
    digest_text,
    load_receipt,
)

MESSAGES = [{"role": "user", "content": "你好 🙂"}, {"role": "assistant", "content": "안녕"}]


def a_receipt(**counts: int) -> TokenReceipt:
    row = ReceiptRow("train.jsonl:17", MESSAGES, [5, 6, 7, 2], [0, 0, 1, 1])
    return TokenReceipt(
        digest_text("template"), "generation_marks", 2, ReceiptCounts(rows=1, tokens=4, **counts), [row]
    )


def a_probe_set() -> ProbeSet:
    first = Probe("train-1", MESSAGES[:1], [5, 6], [7, 2], [-3.0, -2.5], [-0.5, -0.25])
    second = Probe("fixed-en", MESSAGES[:1], [5], [9], [-1.0], [-1.5])
    return ProbeSet("float32", [first, second])


def test_receipt_survives_the_file(tmp_path: Path) -> None:
    receipt = a_receipt(trained_tokens=2, rows_teaching_eos=1)
    path = receipt.save(tmp_path)
    assert path.name == "token_receipt.json"
    assert load_receipt(path) == receipt == load_receipt(tmp_path)
    assert json.loads(path.read_text())["rows"][0]["sha256"] == digest_ids([5, 6, 7, 2])
    assert [entry.name for entry in tmp_path.iterdir()] == ["token_receipt.json"]


def test_probes_survive_the_file(tmp_path: Path) -> None:
    probes = a_probe_set()
    assert load_probes(probes.save(tmp_path)) == probes == load_probes(tmp_path)
    assert probes.max_shift == pytest.approx(2.5)
    assert probes.mean_base_logprob == pytest.approx(-6.5 / 3)
    assert probes.mean_adapter_logprob == pytest.approx(-0.75)


@pytest.mark.parametrize(("load", "reason"), [(load_receipt, "TOKEN_RECEIPT_MISSING"), (load_probes, "PROBES_MISSING")])
def test_missing_file_is_not_found(tmp_path: Path, load: Any, reason: str) -> None:
    with pytest.raises(LoralineError) as caught:
        load(tmp_path)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, reason)


def _changed(content: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["version"], 2, "version"),
        (["counts", "rows"], -1, "counts.rows"),
        (["counts", "tokens"], True, "counts.tokens"),
        (["rows", 0, "input_ids"], [5, 6, 7, 3], "rows[0].sha256"),
        (["rows", 0, "labels_mask"], [0, 1], "rows[0].labels_mask"),
        (["rows", 0, "labels_mask"], [0, 0, 1, 2], "rows[0].labels_mask"),
        (["rows", 0, "messages"], [{"role": "user"}], "messages[0]"),
        (["eos_token_id"], None, "eos_token_id"),
        (["rows"], "none", "rows"),
    ],
)
def test_changed_receipt_names_the_field(tmp_path: Path, path: list[Any], value: Any, field: str) -> None:
    file = a_receipt().save(tmp_path)
    file.write_text(json.dumps(_changed(json.loads(file.read_text()), path, value)))
    with pytest.raises(LoralineError) as caught:
        load_receipt(file)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.DATA_LOSS, "TOKEN_RECEIPT_MALFORMED")
    assert field in caught.value.metadata["field"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["probes", 0, "base_logprobs"], [-1.0]),
        (["probes", 0, "adapter_logprobs"], [float("nan"), -1.0]),
        (["probes", 0, "response_ids"], []),
        (["probes", 1, "name"], "train-1"),
    ],
)
def test_changed_probes_are_refused(tmp_path: Path, path: list[Any], value: Any) -> None:
    file = a_probe_set().save(tmp_path)
    file.write_text(json.dumps(_changed(json.loads(file.read_text()), path, value)))
    with pytest.raises(LoralineError) as caught:
        load_probes(file)
    assert caught.value.reason == "PROBES_MALFORMED"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_garbage_is_data_loss(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token_receipt.json").write_bytes(content)
    with pytest.raises(LoralineError) as caught:
        load_receipt(tmp_path)
    assert caught.value.code is grpc.StatusCode.DATA_LOSS


def test_same_rendering_has_no_mismatch() -> None:
    assert compare_rendering(a_receipt(), lambda messages: [5, 6, 7, 2]) == []


@pytest.mark.parametrize(
    ("rendered", "position", "expected", "found"),
    [([5, 6, 8, 2], 2, 7, 8), ([5, 6, 7], 3, 2, None), ([5, 6, 7, 2, 9], 4, None, 9), ([], 0, 5, None)],
)
def test_other_rendering_is_pointed_at(
    rendered: list[int], position: int, expected: int | None, found: int | None
) -> None:
    (mismatch,) = compare_rendering(a_receipt(), lambda messages: rendered)
    assert (mismatch.source, mismatch.position, mismatch.expected, mismatch.rendered) == (
        "train.jsonl:17",
        position,
        expected,
        found,
    )


def test_rows_that_were_cut_may_render_longer() -> None:
    assert compare_rendering(a_receipt(truncated_rows=1), lambda messages: [5, 6, 7, 2, 9]) == []


def test_logprobs_are_compared_token_by_token() -> None:
    one = compare_logprobs([-1.0, -2.0], [-1.5, -2.0])
    assert (one.max_abs, one.mean_abs, one.tokens) == (0.5, 0.25, 2)
    many = compare_logprobs([[-1.0], [-2.0, -3.0]], [[-1.0], [-2.0, -2.0]])
    assert (many.max_abs, many.tokens) == (1.0, 3)


def test_a_figure_that_is_no_number_never_looks_close() -> None:
    assert compare_logprobs([-1.0], [float("nan")]).max_abs == float("inf")


@pytest.mark.parametrize(
    ("left", "right"), [([-1.0], []), ([[-1.0], [-2.0]], [[-1.0, -2.0]]), ([[-1.0]], [[-1.0], []])]
)
def test_other_tokens_are_not_compared(left: Any, right: Any) -> None:
    with pytest.raises(LoralineError, match="same tokens"):
        compare_logprobs(left, right)
