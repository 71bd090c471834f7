"""Every reason that the code can raise is explained on the troubleshooting page."""

import ast
import re
from pathlib import Path

from loraline.core.diagnostics import find

ROOT = Path(__file__).parents[4]
HELPERS = {
    "invalid_argument",
    "not_found",
    "already_exists",
    "failed_precondition",
    "data_loss",
    "resource_exhausted",
    "unavailable",
    "JobPaused",
    "rows_error",
}
REASON = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


def reasons_in(source: str) -> set[str]:
    """Return the reasons of all error helper calls in a Python source."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in HELPERS:
            candidates = node.args[:1]
        elif name == "LoralineError":
            candidates = node.args[1:2]
        else:
            continue
        candidates += [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
        found.update(
            value.value
            for value in candidates
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and REASON.fullmatch(value.value)
        )
    return found


def raised_reasons() -> dict[str, list[str]]:
    """Return each reason with the files that raise it."""
    places: dict[str, list[str]] = {}
    for folder in ("packages", "services"):
        for path in sorted((ROOT / folder).glob("*/src/**/*.py")):
            if path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                continue
            for reason in reasons_in(path.read_text("utf-8")):
                places.setdefault(reason, []).append(str(path.relative_to(ROOT)))
    return places


def test_the_search_sees_helpers_and_constructors():
    lines = (
        'raise errors.not_found("A_B", "x")',
        'LoralineError(c, "C", "y")',
        'JobPaused(reason="D_E")',
        'other("F_G")',
    )
    source = "\n".join(lines)
    assert reasons_in(source) == {"A_B", "C", "D_E"}


def test_every_reason_has_an_entry():
    places = raised_reasons()
    assert len(places) > 50
    missing = {reason: files for reason, files in sorted(places.items()) if find(reason) is None}
    assert not missing, "add these to core/diagnostics/entries/*.yaml:\n" + "\n".join(
        f"  {reason}  ({files[0]})" for reason, files in missing.items()
    )
