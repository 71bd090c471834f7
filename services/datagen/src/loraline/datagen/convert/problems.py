"""The errors of conversion: each names the file, the line and the remedy."""

from __future__ import annotations

import grpc

from loraline.core.errors import LoralineError

SKIP_HINT = "or set skip_bad_records to leave such records out and count them"


def bad_record(reason: str, file: str, line: int, what: str, remedy: str) -> LoralineError:
    """Return the error for one record; `line` counts from 1, 0 when the whole file is meant."""
    place = f"{file}:{line}" if line else file
    metadata = {"file": file}
    if line:
        metadata["line"] = str(line)
    message = f"{place}: {what} {remedy}, {SKIP_HINT}."
    return LoralineError(grpc.StatusCode.INVALID_ARGUMENT, reason, message, metadata=metadata)


def bad_location(reason: str, field: str, what: str, remedy: str) -> LoralineError:
    """Return the error for a location that cannot be used at all; skip_bad_records does not help here."""
    return LoralineError(grpc.StatusCode.INVALID_ARGUMENT, reason, f"{what} {remedy}.", fields={field: what})


def missing_source(message: str, field: str) -> LoralineError:
    """Return the error for a source, or a part of it, that is not there."""
    return LoralineError(grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND", message, fields={field: "does not exist"})


def path_denied(path: str, why: str) -> LoralineError:
    """Return the error for a path outside the folders that the operator allowed."""
    return LoralineError(
        grpc.StatusCode.PERMISSION_DENIED,
        "PATH_NOT_ALLOWED",
        f"{path}: {why} Upload the files as a source artifact, or ask the operator to add the folder to "
        "LORALINE_ALLOWED_PATHS.",
        fields={"source.path": why},
    )
