"""Fetching models from the Hugging Face Hub, with errors that name the remedy.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import os
from pathlib import Path

import grpc

from loraline.core.errors import LoralineError, failed_precondition, not_found, unavailable

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]


def download(
    hub_id: str, revision: str, *, timeout: float = 20.0, code: bool = False, target: Path | None = None
) -> tuple[Path, str]:
    """Return the snapshot's folder and its commit; only safetensors weights are fetched.

    `target` gets plain files, where the cache has links that lead out of the model's folder; the commit is then empty.
    Raises FAILED_PRECONDITION (ENGINE_NOT_INSTALLED) where nothing can speak to a Hub, UNAVAILABLE (HUB_UNREACHABLE),
    NOT_FOUND (HUB_MODEL_MISSING, HUB_REVISION_MISSING, HUB_NOT_CACHED), PERMISSION_DENIED (HUB_GATED).
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(int(timeout)))
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(timeout)))
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        message = "Hub models need huggingface_hub, which comes with the engine extras of every stage."
        raise failed_precondition("ENGINE_NOT_INSTALLED", message) from error
    patterns = [*PATTERNS, "*.py"] if code else PATTERNS
    try:
        folder = Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns, local_dir=target))
    except Exception as error:
        raise _explain(error, hub_id, revision, offline=constants.HF_HUB_OFFLINE) from error
    return folder, "" if target is not None else folder.name


def _explain(error: Exception, hub_id: str, revision: str, *, offline: bool) -> LoralineError:
    from huggingface_hub import errors

    at = f"{hub_id} at revision {revision}" if revision else hub_id
    endpoint = os.environ.get("HF_ENDPOINT", "the Hugging Face Hub")
    if isinstance(error, errors.GatedRepoError):
        message = f"{hub_id} is gated: accept its terms on the Hub and give the server a token in HF_TOKEN."
        return LoralineError(grpc.StatusCode.PERMISSION_DENIED, "HUB_GATED", message)
    if isinstance(error, errors.RevisionNotFoundError):
        return not_found("HUB_REVISION_MISSING", f"{hub_id} has no revision {revision}.", hub_id=hub_id)
    if isinstance(error, errors.RepositoryNotFoundError):
        message = f"There is no model {hub_id} on {endpoint}, or it is private: check the id, or set HF_TOKEN."
        return not_found("HUB_MODEL_MISSING", message, hub_id=hub_id)
    if offline:
        message = (
            f"{at} is not in this machine's cache, and HF_HUB_OFFLINE is set. Fetch it on a connected machine and "
            "carry it over as an artifact, or unset HF_HUB_OFFLINE."
        )
        return not_found("HUB_NOT_CACHED", message, hub_id=hub_id)
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
        message = f"{endpoint} refused {at}: {error}"
        return failed_precondition("HUB_REFUSED", message, hub_id=hub_id)
    message = (
        f"{endpoint} could not be reached for {at}, and it is not in this machine's cache ({type(error).__name__}). "
        "Check network and proxy, set HF_ENDPOINT to a mirror, or import the model from a path or an artifact."
    )
    return unavailable("HUB_UNREACHABLE", message, hub_id=hub_id)
