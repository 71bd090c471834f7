"""Where base models come from: a Hub id, a folder on the server, an artifact. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.model_files.tokenizer import read_token_names, token_text
from loraline.core.server_paths import model_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")

FetchArtifact = Callable[[artifact_pb2.ArtifactRef], Path]


@dataclass(frozen=True)
class ResolvedBase:
    """A base model on this machine."""

    folder: Path
    """Hugging Face folder; read-only."""
    model: pb.BaseModel
    """The source with exact version or commit."""
    trust_remote_code: bool

    @property
    def label(self) -> str:
        """How people would name it: `model/tiny:v1`, a Hub id or a folder's name."""
        source = self.model.WhichOneof("source")
        if source == "artifact":
            return format_ref(self.model.artifact)
        return self.model.hub_id or Path(self.model.path).name

    def record(self) -> dict[str, str]:
        """Return the content of base_model.json: what an adapter remembers of its base."""
        source = self.model.WhichOneof("source") or ""
        content = {
            "source": source.removesuffix("_id"),
            "ref": "",
            "digest": "",
            "hub_id": "",
            "revision": "",
            "path": "",
        }
        if source == "artifact":
            content |= {"ref": format_ref(self.model.artifact), "digest": self.model.artifact.digest}
        else:
            content |= {"hub_id": self.model.hub_id, "path": self.model.path, "revision": self.model.revision}
        for name in ("config", "tokenizer"):
            file = self.folder / f"{name}.json"
            digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
            content[f"{name}_sha256"] = digest
        return content


def resolve_base(
    model: pb.BaseModel,
    *,
    fetch: FetchArtifact,
    allowed_paths: Sequence[Path],
    remote_code: Sequence[str],
    download: Callable[[str, str], tuple[Path, str]],
) -> ResolvedBase:
    """Bring the base to this machine and check that it is whole.

    `download(hub_id, revision)` gives folder and commit. `fetch` gets an exact reference.
    """
    source = model.WhichOneof("source")
    resolved = pb.BaseModel()
    resolved.CopyFrom(model)
    if source == "artifact":
        name, folder = format_ref(model.artifact), fetch(model.artifact)
    elif source == "hub_id":
        name = model.hub_id
        folder, resolved.revision = download(model.hub_id, model.revision)
    else:
        name, folder = model.path, model_folder(model.path, allowed_paths, "base_model.path")
    if model.trust_remote_code and name not in remote_code:
        raise _remote_code_refused(name)
    check_folder(folder, name)
    return ResolvedBase(folder, resolved, model.trust_remote_code)


def check_folder(folder: Path, name: str) -> None:
    """Check that a model folder is whole: config, tokenizer and every safetensors shard.

    Raises FAILED_PRECONDITION: MODEL_INCOMPLETE, MODEL_SHARDS_MISSING or MODEL_NOT_SAFETENSORS.
    """
    if not (folder / "config.json").is_file():
        raise failed_precondition("MODEL_INCOMPLETE", f"{name} has no config.json: this is no Hugging Face model.")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        message = f"{name} has no tokenizer. Put the model's tokenizer files (tokenizer.json, …) beside its weights."
        raise failed_precondition("MODEL_INCOMPLETE", message)
    weights = weight_files(folder, name)
    missing = [file for file in weights if not (folder / file).is_file()]
    if missing:
        message = (
            f"{name} lacks {len(missing)} of {len(weights)} weight files: {', '.join(missing[:5])}. Fetch them again."
        )
        raise failed_precondition("MODEL_SHARDS_MISSING", message, files=",".join(missing[:20]))


def check_end(folder: Path, name: str) -> None:
    """Refuse a base whose files call white space the end of an answer; FAILED_PRECONDITION (EOS_TOKEN_BLANK).

    Files that cannot be read are left to whoever loads the tokenizer.
    """
    blank = read_token_names(folder).blank_eos()
    if blank:
        _, value = blank[0]
        raise blank_end(name, token_text(value))


def blank_end(name: str, text: str) -> LoralineError:
    """Return FAILED_PRECONDITION (EOS_TOKEN_BLANK)."""
    message = (
        f"The eos_token of {name} is blank ({text!r}): its tokenizer takes white space for the end of an answer, so "
        "that the tuned model would stop at any word or never. Take the tokenizer files that came with the model, or "
        "let the merger mend the folder (RepairModel) and train on the model that it publishes."
    )
    return failed_precondition("EOS_TOKEN_BLANK", message)


def weight_files(folder: Path, name: str) -> list[str]:
    """Return the names of the safetensors files that the model consists of."""
    index = folder / INDEX
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            message = f"{name}: {INDEX} cannot be read ({error}). Fetch it again."
            raise failed_precondition("MODEL_INCOMPLETE", message) from error
        return sorted(set(shards))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    other = sorted(file.name for file in folder.iterdir() if file.suffix in _OTHER_WEIGHTS)
    if other:
        message = (
            f"{name} has weights in another format only ({', '.join(other[:3])}); those may run code when loaded. "
            "Save the model with save_pretrained(safe_serialization=True) and use that folder."
        )
        raise failed_precondition("MODEL_NOT_SAFETENSORS", message)
    raise failed_precondition("MODEL_INCOMPLETE", f"{name} has no {SINGLE} and no {INDEX}: there are no weights.")


def _remote_code_refused(name: str) -> LoralineError:
    message = (
        f"{name} would run code of its own (trust_remote_code), which the operator has not allowed. "
        "Unset it, or add the model to LORALINE_ALLOW_REMOTE_CODE."
    )
    return LoralineError(grpc.StatusCode.PERMISSION_DENIED, "REMOTE_CODE_REFUSED", message)
