"""Paths on the server that a request names: only below the folders that the operator allowed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import grpc

from loraline.core.errors import LoralineError, not_found


def allowed_path(path: str, allowed: Sequence[Path], field: str) -> Path:
    """Return the real path of `path`, which may not exist; `field` is where the request names it.

    PERMISSION_DENIED (PATH_NOT_ALLOWED) unless it is absolute and, links resolved, lies below an allowed folder.
    """
    try:
        expanded = Path(path).expanduser()
        real = Path(os.path.realpath(expanded))
    except (ValueError, RuntimeError) as error:  # a NUL in it, or the home of nobody
        raise _not_allowed(path, f"it is no path ({error})", field) from error
    if not expanded.is_absolute():
        # The server's working directory is no business of a request.
        raise _not_allowed(path, "a path on the server must be absolute", field)
    if not any(real.is_relative_to(os.path.realpath(root.expanduser())) for root in allowed):
        # The same words for a missing and a forbidden path: the answer must not tell what exists elsewhere.
        raise _not_allowed(path, "it is not below a folder that this server allows", field)
    return real


def model_folder(path: str, allowed: Sequence[Path] | None, field: str) -> Path:
    """Return the folder of a model: below an allowed one, or anywhere when `allowed` is None (the operator named it).

    Raises as `allowed_path` does, and NOT_FOUND (MODEL_PATH_MISSING).
    """
    trusted = allowed is None
    folder = Path(os.path.realpath(Path(path).expanduser())) if trusted else allowed_path(path, allowed, field)
    if not folder.is_dir():
        message = f"There is no folder {path} on the server. Check the path, or import the model as an artifact."
        raise not_found("MODEL_PATH_MISSING", message, path=path)
    return folder


def _not_allowed(path: str, why: str, field: str) -> LoralineError:
    message = (
        f"{path!r} may not be read: {why}. Add its folder to LORALINE_ALLOWED_PATHS, or upload it as an artifact and "
        "name that."
    )
    return LoralineError(grpc.StatusCode.PERMISSION_DENIED, "PATH_NOT_ALLOWED", message, fields={field: why})
