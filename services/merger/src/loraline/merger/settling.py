"""Config, tokenizer and evidence of a merged folder: taken from the base, repaired, proven; its weights are there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.probes import FILE_NAME as PROBES_FILE
from loraline.core.evidence.receipt import FILE_NAME as RECEIPT_FILE
from loraline.core.evidence.receipt import load_receipt
from loraline.merger.check.findings import Finding
from loraline.merger.check.folder import check_folder
from loraline.merger.check.tokens import chat_template
from loraline.merger.engines.rendering import receipt_mismatches
from loraline.merger.repair import adopt_template, adopt_training, repair_folder
from loraline.merger.sync import copy_base_files, write_dtype
from loraline.merger.vocabulary import adopt_tokenizer, write_untied, write_vocabulary
from loraline.merger.weights.header import Form
from loraline.merger.weights.layout import INDEX_FILE

if TYPE_CHECKING:
    from loraline.merger.merging import AdapterInput


def _remove_leftovers(out: Path) -> None:
    """Delete what an interrupted attempt left beside the weights, so that it is not taken for the base's."""
    for path in out.rglob("*"):
        if path.is_file() and not path.name.endswith((".safetensors", INDEX_FILE)):
            path.unlink()


def settle_files(base: Path, inputs: Sequence[AdapterInput], out: Path, dtype: str, form: Form) -> list[Finding]:
    """Bring the base's files beside the weights, repair them, and take from the adapters what they were trained with.

    Returns every difference from the base, with its reason.
    """
    _remove_leftovers(out)
    copy_base_files(base, out)
    changes = write_dtype(out, dtype) if dtype else []
    rows = max((shape[0] for name, shape in form.shapes.items() if len(shape) == 2), default=0)
    changes += write_vocabulary(out, rows) if rows else []
    changes += write_untied(out) if form.added else []
    if len(inputs) == 1:
        changes += adopt_tokenizer(out, inputs[0].folder, grown=bool(rows))
    changes += repair_folder(out)
    for one in inputs:
        changes += adopt_training(out, one.folder)
    return changes


def prove_rendering(inputs: Sequence[AdapterInput], out: Path, repairs: list[Finding]) -> int:
    """Render every receipt again; take the adapter's template when the base's renders other ids, else refuse."""
    rows = 0
    for one in inputs:
        if not (one.folder / RECEIPT_FILE).exists():
            continue
        receipt = load_receipt(one.folder)
        mismatches = receipt_mismatches(out, receipt)
        theirs = chat_template(one.folder)
        if mismatches and theirs and theirs != chat_template(out) and len(inputs) == 1:
            repairs.append(adopt_template(out, one.folder, f"the base's renders other ids ({mismatches[0]})"))
            mismatches = receipt_mismatches(out, receipt)
        if mismatches:
            raise failed_precondition(
                "RECEIPT_MISMATCH",
                f"The merged model's tokenizer does not give the ids that {one.name} was trained on: {mismatches[0]} "
                f"({len(mismatches)} of {len(receipt.rows)} rows). Merge into the base that it was trained on.",
                row=mismatches[0].source,
                position=str(mismatches[0].position),
                expected=str(mismatches[0].expected),
                rendered=str(mismatches[0].rendered),
            )
        rows += len(receipt.rows)
    return rows


def copy_evidence(inputs: Sequence[AdapterInput], out: Path) -> None:
    """Carry receipt and probes along, for the server of the merged model; only one adapter's make sense together."""
    if len(inputs) != 1 or inputs[0].weight != 1:
        return
    for name in (RECEIPT_FILE, PROBES_FILE):
        if (inputs[0].folder / name).exists():
            shutil.copyfile(inputs[0].folder / name, out / name)


def refuse_broken(out: Path) -> None:
    """Raise MODEL_DEFECTIVE when a server could not load the folder."""
    grave = [finding for finding in check_folder(out) if finding.severity == "error"]
    if grave:
        raise broken_model(grave)


def broken_model(grave: Sequence[Finding]) -> LoralineError:
    """FAILED_PRECONDITION for a merged folder that a server could not load."""
    first = grave[0]
    return failed_precondition(
        "MODEL_DEFECTIVE",
        f"The merged folder would not load ({len(grave)} errors): {first.code} in {first.file}: {first.message} "
        f"{first.remedy} The base has the same defect; repair it with RepairModel, or use another.",
        codes=",".join(sorted({finding.code for finding in grave})),
        file=first.file,
    )
