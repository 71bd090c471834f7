"""The weight files of a model folder: which shards there are and which tensor lies where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loraline.core.errors import LoralineError, failed_precondition, invalid_argument
from loraline.core.model_files.objects import load_object
from loraline.merger.weights.header import ShardHeader, TensorInfo, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_NAMES = "model-[0-9]*-of-[0-9]*.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one folder, headers read."""

    folder: Path
    shards: tuple[ShardHeader, ...]
    indexed: bool

    def tensors(self) -> Iterator[tuple[ShardHeader, TensorInfo]]:
        """Yield every tensor with its shard, in file order."""
        for shard in self.shards:
            for tensor in shard.tensors:
                yield shard, tensor

    def by_name(self) -> dict[str, TensorInfo]:
        """Return tensors by name."""
        return {tensor.name: tensor for _, tensor in self.tensors()}

    @property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.data_size for shard in self.shards)


def open_weights(folder: Path) -> WeightFiles:
    """Read the headers of a model folder's weights and check index against shards.

    Raises FAILED_PRECONDITION (NO_SAFETENSORS, PICKLE_WEIGHTS, MISSING_SHARD, INDEX_MISMATCH), INVALID_ARGUMENT
    (UNSAFE_PATH) or DATA_LOSS (CORRUPT_WEIGHTS), each naming the file.
    """
    index_path = folder / INDEX_FILE
    if index_path.exists():
        weight_map = read_index(index_path)
        shards = tuple(read_header(shard_path(folder, name)) for name in dict.fromkeys(weight_map.values()))
        problems = [*index_problems(weight_map, shards), *unnamed_shards(folder, weight_map)]
        if problems:
            raise failed_precondition(
                "INDEX_MISMATCH",
                f"{INDEX_FILE} does not match its shards: {problems[0]} ({len(problems)} such). "
                "Take index and shards from one save.",
                file=INDEX_FILE,
            )
        return WeightFiles(folder, shards, indexed=True)
    if (folder / SINGLE_FILE).exists():
        return WeightFiles(folder, (read_header(shard_path(folder, SINGLE_FILE)),), indexed=False)
    raise no_weights(folder)


def read_index(path: Path) -> dict[str, str]:
    """Return the index's map of tensor name to shard file."""
    try:
        weight_map = load_object(path)["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError("weight_map is no map of tensor names to file names")
    except (OSError, ValueError, KeyError) as error:
        raise failed_precondition(
            "INDEX_UNREADABLE", f"{path.name} cannot be read: {error}. Save the model again.", file=path.name
        ) from error
    return weight_map


def shard_path(folder: Path, name: str) -> Path:
    """Return the shard's path, refusing names and links that lead out of the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise unsafe_path(name, "it leads out of the model folder")
    if pure.suffix in PICKLE_SUFFIXES:
        raise pickle_weights(name)
    path = folder / pure
    if not path.is_file():
        raise failed_precondition(
            "MISSING_SHARD",
            f"{INDEX_FILE} names {name}, which is not in the folder. Copy the missing shard, or save the model again.",
            file=name,
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise unsafe_path(name, f"it is a link to {path.resolve()}")
    return path


def index_problems(weight_map: dict[str, str], shards: tuple[ShardHeader, ...]) -> list[str]:
    """Say how an index and its shards differ; empty when they agree."""
    found: dict[str, str] = {}
    problems: list[str] = []
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in found:
                problems.append(f"{tensor.name} is in {found[tensor.name]} and in {shard.path.name}")
            found[tensor.name] = shard.path.name
    for name, file in weight_map.items():
        if found.get(name) != Path(file).name:
            problems.append(f"{name} should be in {file} but is in {found.get(name, 'no shard')}")
    problems += [f"{name} of {file} is not in the index" for name, file in found.items() if name not in weight_map]
    return problems


def unnamed_shards(folder: Path, weight_map: dict[str, str]) -> list[str]:
    """Say which files are named like shards, yet not in the index: their weights would be invented anew."""
    named = set(weight_map.values())
    return [f"{p.name} is not in the index" for p in sorted(folder.glob(SHARD_NAMES)) if p.name not in named]


def no_weights(folder: Path) -> LoralineError:
    """Say why there is nothing to read."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES and p.name != "training_args.bin")
    if pickles:
        return pickle_weights(pickles[0])
    return failed_precondition(
        "NO_SAFETENSORS",
        f"The folder has neither {SINGLE_FILE} nor {INDEX_FILE}. Save the model with safetensors.",
        file=SINGLE_FILE,
    )


def pickle_weights(name: str) -> LoralineError:
    """FAILED_PRECONDITION for weights whose loading would run code."""
    return failed_precondition(
        "PICKLE_WEIGHTS",
        f"{name} is a pickle, which can run code when it is loaded. Convert it to safetensors where you trust it.",
        file=name,
    )


def unsafe_path(name: str, why: str) -> LoralineError:
    """INVALID_ARGUMENT for a file name that leaves its folder."""
    error = invalid_argument("UNSAFE_PATH", f"The file name {name!r} is refused: {why}. Copy the file into the folder.")
    error.metadata["file"] = name
    return error
