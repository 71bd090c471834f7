"""How a failure is told: what, where, what to do, and the exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import grpc
from rich.text import Text

from loraline.client.cli.output import Output, clean
from loraline.client.errors import JobNotSuccessful, LoralineApiError

OK, FAILED, USAGE, UNREACHABLE, AUTH, INTERRUPTED = 0, 1, 2, 3, 4, 130

_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: USAGE,
    grpc.StatusCode.OUT_OF_RANGE: USAGE,
    grpc.StatusCode.NOT_FOUND: USAGE,
    grpc.StatusCode.ALREADY_EXISTS: USAGE,
    grpc.StatusCode.UNIMPLEMENTED: USAGE,
    grpc.StatusCode.UNAUTHENTICATED: AUTH,
    grpc.StatusCode.PERMISSION_DENIED: AUTH,
}


_BY_REASON = {
    "NO_MODEL_LOADED": "loraline models list, then loraline models load model/NAME",
    "MODEL_NOT_READY": "The engine is loading; the same command works when it is done.",
    "MODEL_LOAD_FAILED": "loraline doctor (on the server), then loraline models load model/NAME",
    "JOB_NOT_FOUND": "loraline jobs list",
    "ARTIFACT_NOT_FOUND": "loraline artifacts list",
    "MODEL_NOT_SERVED": "loraline adapters list",
    "RECIPE_NOT_FOUND": "loraline datasets recipes",
}
"""What to do next, by reason, where the command line has a command for it."""


class CommandFailed(Exception):
    """Ends a command with an exit code after it has told what there was to tell."""

    def __init__(self, exit_code: int):
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


def exit_code(error: LoralineApiError) -> int:
    """Return the exit code for an error: 1 failed, 2 bad input, 3 unreachable, 4 not allowed."""
    if isinstance(error, JobNotSuccessful):
        return FAILED  # whatever the job's own error is: the command was fine
    return UNREACHABLE if error.unreachable else _CODES.get(error.code, FAILED)


def next_step(error: LoralineApiError) -> str:
    """Return what to do when the error's own text does not say it."""
    if error.unreachable:
        return "Start one here with `loraline up`, or name another with --address HOST:PORT (or LORALINE_ADDRESS)."
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        return (
            "Give an API key with --key, LORALINE_API_KEY, or the file client.key in the server's data folder "
            "(LORALINE_DATA_DIR, default ~/.loraline). `loraline keys create` makes one on the server's machine."
        )
    if error.code is grpc.StatusCode.PERMISSION_DENIED:
        return "Use a key with the role that this needs; `loraline keys list` shows the roles on the server's machine."
    return _BY_REASON.get(error.reason, "")


def tell(
    output: Output,
    error: LoralineApiError,
    *,
    where: str = "",
    then: str = "",
    siblings: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write an error block to standard error: what, where, remedy, next command, and what became of sibling stages."""
    if output.json:
        more = {"where": where, "next": then, "other_stages": dict(siblings)}
        data = {"error": error.as_dict() | {name: value for name, value in more.items() if value}}
        sys.stderr.write(json.dumps(data, ensure_ascii=False) + "\n")
        return
    lines = [Text.assemble(("error: ", "bold red"), (clean(error.message), "red"))]
    if where:
        lines.append(Text(f"  where: {where}"))
    lines += [Text.assemble("  ", (clean(path), "bold"), f" {clean(text)}") for path, text in error.fields.items()]
    for advice in (next_step(error), then):
        if advice:
            lines.append(Text.assemble(("  next: ", "cyan"), advice))
    lines += [Text.assemble("  ", (f"{stage}: ", "bold"), clean(text)) for stage, text in siblings.items()]
    job = error.metadata.get("job", "")
    if job and job not in error.message + where + then:
        lines.append(Text(f"  job: {job}"))
    lines += [Text(f"  more: {link}", style="dim") for link in error.help if ".invalid" not in link]
    for line in lines:
        output.err.print(line, soft_wrap=True)


@contextmanager
def told(output: Output, *, then: str = "") -> Iterator[None]:
    """Turn expected failures into an error block and an exit code; LORALINE_DEBUG=1 lets them through."""
    if os.environ.get("LORALINE_DEBUG") == "1":
        yield
        return
    try:
        yield
    except LoralineApiError as error:
        tell(output, error, then=then)
        raise CommandFailed(exit_code(error)) from None
