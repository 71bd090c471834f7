"""What a pipeline file says, checked: no key is ignored, every mistake is told with its line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.inference.v1 import inference_pb2
from loraline.api.merger.v1 import merger_pb2
from loraline.api.trainer.v1 import trainer_pb2

DatasetRequest = datagen_pb2.ConvertDatasetRequest | datagen_pb2.GenerateDatasetRequest


def artifact_place(request: DatasetRequest, number: int) -> artifact_pb2.ArtifactRef:
    """Return where a request names the artifact of its source number `number`: files to convert, or texts to read."""
    if isinstance(request, datagen_pb2.ConvertDatasetRequest):
        return request.source.artifact
    source = request.sources[number]
    return source.llm.texts.artifact if source.WhichOneof("source") == "llm" else source.convert.artifact


@dataclass(frozen=True)
class BaseModelSpec:
    """The model to tune: a toy to make (`tiny`), or one that is there already (`existing`)."""

    tiny: trainer_pb2.CreateTinyModelRequest | None = None
    tiny_texts: tuple[str, ...] = ()
    """Names of the sources that the toy's tokenizer is learned from."""
    existing: trainer_pb2.BaseModel | None = None


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset to make, or one that is there already (`artifact`)."""

    request: DatasetRequest | None = None
    sources: tuple[tuple[int, str], ...] = ()
    """Sources of the file that it is made from: the number of the request's source, and the name in the file."""
    artifact: artifact_pb2.ArtifactRef | None = None


@dataclass(frozen=True)
class TrainSpec:
    """The run: everything of the request but its inputs, and the weight of each dataset."""

    request: trainer_pb2.TrainRequest
    weights: dict[str, float]


@dataclass(frozen=True)
class ServeSpec:
    """What to serve: the base with the adapter on it, or the merged model; and the alias to move."""

    merged: bool = False
    adapter: bool = True
    alias: str = "production"


@dataclass(frozen=True)
class AskSpec:
    """Questions by group, how to sample, and marks of the wanted style."""

    groups: dict[str, tuple[str, ...]]
    sampling: inference_pb2.SamplingParameters
    system_prompt: str = ""
    markers: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineSpec:
    """A checked pipeline file. Names of artifacts derive from `name`."""

    file: Path
    name: str
    base_model: BaseModelSpec
    sources: dict[str, Path] = field(default_factory=dict)
    datasets: dict[str, DatasetSpec] = field(default_factory=dict)
    train: TrainSpec | None = None
    merge: merger_pb2.MergeRequest | None = None
    serve: ServeSpec | None = None
    ask: AskSpec | None = None

    def artifact_name(self, part: str = "") -> str:
        """Return the name of this pipeline's artifact, such as `mareva` or `mareva-dialogue`."""
        return f"{self.name}-{part}" if part else self.name
