"""Fetching models from the Hugging Face Hub, with errors that name the remedy.

HF_ENDPOINT (a mirror), HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, HF_DATASETS_OFFLINE, HF_HOME and HF_TOKEN mean what they
mean to huggingface_hub. Before anything is fetched the Hub is asked one short question with a time limit, so that a hub
out of reach, a gated model or a wrong id is told in seconds rather than after rounds of repeated attempts.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import grpc

from loraline.core.errors import LoralineError, failed_precondition, not_found, unavailable
from loraline.core.hub_cache import CacheLook, look, offline

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
_AWAY = ("HUB_UNREACHABLE", "HUB_PROXY_FAILED")


@dataclass(frozen=True)
class Remote:
    """A model as the Hub lists it."""

    commit: str
    sizes: dict[str, int]
    """Bytes by file name, of all files of the repository."""


def ask(hub_id: str, revision: str, *, timeout: float = 20.0) -> Remote:
    """Ask the Hub for a model's files, and whether this machine may read them; at most two requests of `timeout` s.

    Raises as `download` does.
    """
    api, hub_url, metadata = _client()
    try:
        info = api().model_info(hub_id, revision=revision or None, timeout=timeout, files_metadata=True)
        commit = info.sha or revision
        sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        # The list of a gated model is public, its files are not.
        if sizes:
            name = "config.json" if "config.json" in sizes else min(sizes)
            metadata(hub_url(hub_id, name, revision=commit), timeout=timeout)
    except Exception as error:
        raise _explain(error, hub_id, revision) from error
    return Remote(commit, sizes)


def fetch_file(hub_id: str, commit: str, name: str, *, timeout: float = 20.0) -> Path:
    """Return one small file of a model, such as its config.json, from the cache or the Hub. Raises as `download`."""
    _client()
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, name, revision=commit, etag_timeout=timeout))
    except Exception as error:
        raise _explain(error, hub_id, commit) from error


def cached(hub_id: str, revision: str, *, code: bool = False) -> CacheLook:
    """Return what of a model lies in this machine's cache; FAILED_PRECONDITION (ENGINE_NOT_INSTALLED) without one."""
    _client()
    return look(hub_id, revision, _patterns(code))


def forbidden(hub_id: str, revision: str, found: CacheLook) -> LoralineError | None:
    """Return NOT_FOUND (HUB_NOT_CACHED) when the model is needed from the Hub and an operator forbade the network."""
    variable = offline()
    if not variable or found.complete:
        return None
    message = (
        f"{_named(hub_id, revision)} is not complete on this machine, and {variable} is set: {found.described}. Fetch "
        "it on a connected machine (`loraline models pull`, then `loraline artifacts pack`) and unpack it here, or "
        f"unset {variable}."
    )
    return not_found("HUB_NOT_CACHED", message, hub_id=hub_id, missing=",".join(found.missing[:20]))


def download(
    hub_id: str, revision: str, *, timeout: float = 20.0, code: bool = False, target: Path | None = None
) -> tuple[Path, str]:
    """Return the snapshot's folder and its commit; only safetensors weights are fetched.

    A model that is complete in the cache is used when the Hub is out of reach. `target` gets plain files, where the
    cache has links that lead out of the model's folder; the commit is then empty. Raises FAILED_PRECONDITION
    (ENGINE_NOT_INSTALLED) where nothing can speak to a Hub, UNAVAILABLE (HUB_UNREACHABLE, HUB_PROXY_FAILED),
    NOT_FOUND (HUB_MODEL_MISSING, HUB_REVISION_MISSING, HUB_NOT_CACHED), PERMISSION_DENIED (HUB_GATED).
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(int(timeout)))
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(timeout)))
    found = cached(hub_id, revision, code=code)
    refusal = forbidden(hub_id, revision, found)
    if refusal is not None:
        raise refusal
    if offline():
        return _from_cache(found, target)
    try:
        ask(hub_id, revision, timeout=timeout)
    except LoralineError as error:
        if error.reason in _AWAY and found.complete:
            return _from_cache(found, target)
        raise
    from huggingface_hub import snapshot_download

    patterns = _patterns(code)
    try:
        folder = Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns, local_dir=target))
    except Exception as error:
        raise _explain(error, hub_id, revision, look(hub_id, revision, patterns)) from error
    return folder, "" if target is not None else folder.name


def _patterns(code: bool) -> list[str]:
    return [*PATTERNS, "*.py"] if code else PATTERNS


def _from_cache(found: CacheLook, target: Path | None) -> tuple[Path, str]:
    if found.folder is None:
        raise ValueError("nothing of the model is in the cache")
    if target is None:
        return found.folder, found.commit
    for name in found.present:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found.folder / name, place)
    return target, ""


def _client():
    try:
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    except ImportError as error:
        message = "Hub models need huggingface_hub, which comes with the engine extras of every stage."
        raise failed_precondition("ENGINE_NOT_INSTALLED", message) from error
    return HfApi, hf_hub_url, get_hf_file_metadata


def _named(hub_id: str, revision: str) -> str:
    return f"{hub_id} at revision {revision}" if revision else hub_id


def _explain(error: Exception, hub_id: str, revision: str, found: CacheLook | None = None) -> LoralineError:
    from huggingface_hub import errors

    at, endpoint = _named(hub_id, revision), os.environ.get("HF_ENDPOINT") or "the Hugging Face Hub"
    if isinstance(error, errors.GatedRepoError):
        message = f"{hub_id} is gated: accept its terms on the Hub and give the server a token in HF_TOKEN."
        return LoralineError(grpc.StatusCode.PERMISSION_DENIED, "HUB_GATED", message)
    if isinstance(error, errors.RevisionNotFoundError):
        return not_found("HUB_REVISION_MISSING", f"{hub_id} has no revision {revision}.", hub_id=hub_id)
    if isinstance(error, errors.RepositoryNotFoundError):
        message = f"There is no model {hub_id} on {endpoint}, or it is private: check the id, or set HF_TOKEN."
        return not_found("HUB_MODEL_MISSING", message, hub_id=hub_id)
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
        token = " Set a valid HF_TOKEN." if error.response.status_code in (401, 403) else ""
        return failed_precondition("HUB_REFUSED", f"{endpoint} refused {at}: {error}.{token}", hub_id=hub_id)
    state = f"; {found.described}" if found is not None else ""
    kind = type(error).__name__
    proxy = _proxy(endpoint)
    if proxy:
        message = (
            f"{endpoint} could not be reached for {at} through the proxy {proxy} ({kind}){state}. Check HTTPS_PROXY "
            "and HTTP_PROXY of the server's process, or name the host in NO_PROXY."
        )
        return unavailable("HUB_PROXY_FAILED", message, hub_id=hub_id)
    message = (
        f"{endpoint} could not be reached for {at} ({kind}){state}. Check network and proxy, set HF_ENDPOINT to a "
        "mirror, or import the model from a path or an artifact."
    )
    return unavailable("HUB_UNREACHABLE", message, hub_id=hub_id)


def _proxy(endpoint: str) -> str:
    """Return host and port of the proxy that requests to the Hub go through, without its password; empty for none."""
    from urllib.request import proxy_bypass

    address = urlsplit(endpoint if "://" in endpoint else "https://huggingface.co")
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all", "")
    if not proxy or proxy_bypass(address.netloc):
        return ""
    parts = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    return parts.netloc.rpartition("@")[2]
