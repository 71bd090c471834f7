"""The stages of a pipeline: what each makes and what it waits for."""

from __future__ import annotations

from dataclasses import dataclass

from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.pipeline.spec import PipelineSpec
from loraline.client.refs import format_ref


@dataclass(frozen=True)
class PlannedStage:
    """A stage before it runs. `needs` names stages."""

    name: str
    what: str
    needs: tuple[str, ...] = ()


def plan(spec: PipelineSpec) -> list[PlannedStage]:
    """Return the stages in an order in which each comes after what it needs."""
    stages = [
        PlannedStage(f"source:{name}", f"upload {path} as source/{spec.artifact_name(name)}")
        for name, path in spec.sources.items()
    ]
    stages.append(_base_model(spec))
    for name, dataset in spec.datasets.items():
        if dataset.artifact is not None:
            what = f"use {format_ref(dataset.artifact)}"
        else:
            what = f"make dataset/{spec.artifact_name(name)}"
        needs = tuple(dict.fromkeys(f"source:{source}" for _, source in dataset.sources))
        stages.append(PlannedStage(f"dataset:{name}", what, needs))
    if spec.train is not None:
        needs = ("base_model", *(f"dataset:{name}" for name in spec.train.weights))
        stages.append(PlannedStage("train", f"train adapter/{spec.artifact_name()}", needs))
    if spec.merge is not None:
        stages.append(PlannedStage("merge", f"merge into model/{spec.artifact_name()}", ("train",)))
    if spec.serve is not None:
        stages.append(_serve(spec))
    if spec.ask is not None:
        count = sum(len(prompts) for prompts in spec.ask.groups.values())
        stages.append(PlannedStage("ask", f"ask {count} questions", ("serve",)))
    return stages


def describe_base(model: trainer_pb2.BaseModel) -> str:
    """Return a base model as people name it."""
    if model.WhichOneof("source") == "artifact":
        return format_ref(model.artifact)
    revision = f"@{model.revision}" if model.revision else ""
    return (model.hub_id or model.path) + revision


def _base_model(spec: PipelineSpec) -> PlannedStage:
    base = spec.base_model
    if base.existing is not None:
        return PlannedStage("base_model", f"use {describe_base(base.existing)}")
    name = base.tiny.name if base.tiny is not None and base.tiny.name else "tiny"
    return PlannedStage("base_model", f"make model/{name}", tuple(f"source:{text}" for text in base.tiny_texts))


def _serve(spec: PipelineSpec) -> PlannedStage:
    assert spec.serve is not None  # noqa: S101 - the caller has looked
    if spec.serve.merged:
        return PlannedStage("serve", f"serve model/{spec.artifact_name()}", ("merge",))
    if spec.serve.adapter:
        return PlannedStage("serve", f"serve {spec.artifact_name()}@{spec.serve.alias} on its base", ("train",))
    return PlannedStage("serve", "serve the base model", ("base_model",))
