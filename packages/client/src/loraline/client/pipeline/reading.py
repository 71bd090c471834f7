"""Reads a pipeline file into a PipelineSpec, section by section."""

from __future__ import annotations

import re
from pathlib import Path

from google.protobuf.message import Message

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.merger.v1 import merger_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.pipeline.document import Node, SpecError, read_yaml
from loraline.client.pipeline.protofill import fill, fill_ref, set_field
from loraline.client.pipeline.reading_serve import read_ask, read_serve
from loraline.client.pipeline.reading_weights import SHORT, known, read_weights
from loraline.client.pipeline.spec import BaseModelSpec, DatasetSpec, PipelineSpec, TrainSpec
from loraline.client.pipeline.training_params import read_training_params

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,40}")
SECTIONS = ("name", "base_model", "sources", "datasets", "train", "merge", "serve", "ask")
_SPLIT_KEYS = {"validation_fraction", "seed"}


def read_pipeline(file: Path | str) -> PipelineSpec:
    """Read and check a pipeline file; SpecError tells every mistake in it with file, line and remedy."""
    path = Path(file)
    root = read_yaml(path)
    root.only(SECTIONS)
    entries = root.mapping("a mapping with a name, base_model, datasets and train")
    for required in ("name", "base_model"):
        if required not in entries:
            root.fault(f"`{required}` is missing.")
    sources = _read_sources(entries.get("sources"), path.parent)
    datasets = _read_datasets(entries.get("datasets"), sources)
    train = _read_train(entries["train"], datasets) if "train" in entries else None
    merge = _read_merge(entries["merge"]) if _wanted(entries, "merge") else None
    spec = PipelineSpec(
        file=path,
        name=_read_name(entries["name"]) if "name" in entries else "",
        base_model=_read_base_model(entries["base_model"], sources) if "base_model" in entries else BaseModelSpec(),
        sources=sources,
        datasets=datasets,
        train=train,
        merge=merge,
        serve=read_serve(entries["serve"]) if _wanted(entries, "serve") else None,
        ask=read_ask(entries["ask"], path.parent, datasets) if "ask" in entries else None,
    )
    _check_order(spec, entries)
    if root.problems:
        raise SpecError(path, root.problems)
    return spec


def _wanted(entries: dict[str, Node], section: str) -> bool:
    return section in entries and entries[section].value is not False


def _check_order(spec: PipelineSpec, entries: dict[str, Node]) -> None:
    if spec.merge is not None and spec.train is None:
        entries["merge"].fault("needs a `train` section: it merges the adapter trained there.")
    if spec.serve is not None and spec.serve.merged and spec.merge is None:
        entries["serve"].fault("`model: merged` needs a `merge` section.")
    if spec.serve is not None and spec.serve.adapter and not spec.serve.merged and spec.train is None:
        entries["serve"].fault("needs a `train` section, or `adapter: false` to serve the base alone.")
    if spec.train is not None and spec.train.request.method == trainer_pb2.METHOD_FULL:
        if spec.merge is not None:
            entries["merge"].fault("has no adapter to merge: `method: full` trains a model of its own.")
        if spec.serve is not None and spec.serve.adapter:
            load = f"`loraline models load model/{spec.name}`"
            entries["serve"].fault(f"has no adapter to serve: `method: full` trains a model; {load} serves it.")
    if spec.ask is not None and spec.serve is None:
        entries["ask"].fault("needs a `serve` section: something must answer.")


def _read_name(node: Node) -> str:
    name = node.text()
    if name and not _NAME.fullmatch(name):
        node.fault("must be lower-case letters, digits, `-`, `_` and `.`, at most 41 characters.")
    return name


def _read_sources(node: Node | None, folder: Path) -> dict[str, Path]:
    sources: dict[str, Path] = {}
    for name, child in (node.mapping() if node else {}).items():
        _check_part(name, child)
        text = child.text()
        path = folder / Path(text).expanduser()
        if text and not path.exists():
            child.fault(f"there is no folder or file {path}.")
        sources[name] = path
    return sources


def _check_part(name: str, node: Node) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,20}", name):
        node.fault("is a name: lower-case letters, digits, `-`, `_` and `.`, at most 21 characters.")


def _read_base_model(node: Node, sources: dict[str, Path]) -> BaseModelSpec:
    entries = node.mapping("a mapping such as {hub: org/name}")
    kinds = [kind for kind in ("tiny", "hub", "path", "artifact") if kind in entries]
    if isinstance(node.value, dict) and len(kinds) != 1:
        node.fault("needs exactly one of `tiny`, `hub`, `path`, `artifact`.")
    if kinds == ["tiny"]:
        node.only(["tiny"])
        return _read_tiny(entries["tiny"], sources)
    model = trainer_pb2.BaseModel()
    aliases = {"hub": "hub_id"}
    fill(model, node, aliases=aliases, without=("hub_id",) if "hub_id" in entries else ())
    return BaseModelSpec(existing=model)


def _read_tiny(node: Node, sources: dict[str, Path]) -> BaseModelSpec:
    request = trainer_pb2.CreateTinyModelRequest()
    entries = dict(node.mapping())
    texts_node = entries.pop("tokenizer_texts", None)
    rest = Node(entries, node.line, node.path, node.problems)
    fill(request, rest, without=("request_id",))
    texts: list[str] = []
    if texts_node is not None:
        single = isinstance(texts_node.value, str)
        for child in [texts_node] if single else texts_node.sequence("the name of a source, or a list of them"):
            texts.append(known(child, sources, "source"))
    return BaseModelSpec(tiny=request, tiny_texts=tuple(texts))


def _read_datasets(node: Node | None, sources: dict[str, Path]) -> dict[str, DatasetSpec]:
    datasets: dict[str, DatasetSpec] = {}
    for name, child in (node.mapping() if node else {}).items():
        _check_part(name, child)
        datasets[name] = _read_dataset(child, sources)
    return datasets


def _read_dataset(node: Node, sources: dict[str, Path]) -> DatasetSpec:
    entries = node.mapping("a mapping with one of convert, template, llm, sources, artifact")
    gate_fields = datagen_pb2.QualityGate.DESCRIPTOR.fields_by_name
    kinds = [kind for kind in ("convert", "template", "llm", "sources", "artifact") if kind in entries]
    node.only(["convert", "template", "llm", "sources", "artifact", *_SPLIT_KEYS, *gate_fields])
    if len(kinds) != 1:
        if isinstance(node.value, dict):
            node.fault("needs exactly one of `convert`, `template`, `llm`, `sources`, `artifact`.")
        return DatasetSpec()
    if kinds == ["artifact"]:
        node.only(["artifact"])
        ref = artifact_pb2.ArtifactRef()
        fill_ref(ref, entries["artifact"], default_kind="dataset")
        return DatasetSpec(artifact=ref)
    if kinds == ["convert"]:
        request = datagen_pb2.ConvertDatasetRequest()
        name = _fill_convert(request.source, entries["convert"], sources)
        used = [(0, name)] if name else []
    else:
        request = datagen_pb2.GenerateDatasetRequest()
        used = _fill_sources(request, kinds[0], entries[kinds[0]], sources)
    for key, child in entries.items():
        if key in _SPLIT_KEYS:
            set_field(request.split, datagen_pb2.Split.DESCRIPTOR.fields_by_name[key], child)
        elif key in gate_fields:
            set_field(request.gate, gate_fields[key], child)
    return DatasetSpec(request=request, sources=tuple(used))


def _fill_convert(message: datagen_pb2.ConvertSource, node: Node, sources: dict[str, Path]) -> str:
    entries = dict(node.mapping())
    source_node = entries.pop("source", None)
    name = ""
    if source_node is not None:
        name = known(source_node, sources, "source")
        for other in ("artifact", "path"):
            if other in entries:
                entries[other].fault("cannot stand beside `source`.")
    elif not {"artifact", "path"} & set(entries):
        node.fault("needs `source`, the name of an entry under `sources`.")
    rest = Node(entries, node.line, node.path, node.problems)
    fill(message, rest, aliases={"aliases": "character_aliases"})
    return name


def _fill_sources(
    request: datagen_pb2.GenerateDatasetRequest, kind: str, node: Node, sources: dict[str, Path]
) -> list[tuple[int, str]]:
    """Fill the request; return which of its sources are made from which of the file's."""
    if kind != "sources":
        entry = Node({kind: node}, node.line, node.path, node.problems)
        used = _fill_one(request.sources.add(name=kind), entry, sources)
        return [(0, used)] if used else []
    found = [(number, _fill_one(request.sources.add(), child, sources)) for number, child in enumerate(node.sequence())]
    return [(number, name) for number, name in found if name]


def _fill_one(message: datagen_pb2.DatasetSource, node: Node, sources: dict[str, Path]) -> str:
    """Fill one source; return the name of the file's source that it is made from, or nothing."""
    entries, used = dict(node.mapping()), ""
    given = [key for key in ("convert", "template", "llm") if key in entries]
    if len(given) != 1 and isinstance(node.value, dict):
        node.fault("needs exactly one of `convert`, `template`, `llm`.")
    if "convert" in entries:
        used = _fill_convert(message.convert, entries.pop("convert"), sources)
    llm = entries.get("llm")
    texts = llm.value.get("texts") if llm is not None and isinstance(llm.value, dict) else None
    if llm is not None and texts is not None and isinstance(texts.value, dict) and "source" in texts.value:
        rest = Node(
            {key: child for key, child in llm.value.items() if key != "texts"}, llm.line, llm.path, llm.problems
        )
        fill(message.llm, rest)
        used = _fill_texts(message.llm.texts, texts, sources)
        del entries["llm"]
    fill(message, Node(entries, node.line, node.path, node.problems))
    return used


def _fill_texts(message: datagen_pb2.TextSource, node: Node, sources: dict[str, Path]) -> str:
    entries = dict(node.mapping())
    name = known(entries.pop("source"), sources, "source")
    for other in ("artifact", "path", "texts"):
        if other in entries:
            entries[other].fault("cannot stand beside `source`.")
    fill(message, Node(entries, node.line, node.path, node.problems))
    message.SetInParent()
    return name


def _read_train(node: Node, datasets: dict[str, DatasetSpec]) -> TrainSpec:
    entries = dict(node.mapping())
    datasets_node = entries.pop("datasets", None)
    short = {key: entries.pop(key) for key in SHORT if key in entries}
    parameter_nodes = [entries.pop(key) for key in ("training_params", "parameters") if key in entries]
    request = trainer_pb2.TrainRequest()
    rest = Node(entries, node.line, node.path, node.problems)
    own = _fields(request, _OURS)
    rest.only([*own, "datasets", *SHORT, "training_params"])
    fill(
        request, Node({key: child for key, child in entries.items() if key in own}, node.line, node.path, node.problems)
    )
    if parameter_nodes:
        request.parameters.CopyFrom(read_training_params(parameter_nodes[0]))
    for extra in parameter_nodes[1:]:
        extra.fault("says the same as `training_params`. Keep one of them.")
    weights = read_weights(datasets_node, short, datasets)
    if not weights and not short:
        node.fault("needs `datasets`, names of entries under `datasets` with their weights.")
    return TrainSpec(request, weights)


_OURS = ("request_id", "name", "base_model", "labels", "serving_contract", "parameters", "datasets")


def _fields(message: Message, without: tuple[str, ...]) -> list[str]:
    return [name for name in message.DESCRIPTOR.fields_by_name if name not in without]


def _read_merge(node: Node) -> merger_pb2.MergeRequest:
    request = merger_pb2.MergeRequest()
    if node.value is not True:
        fill(request, node, without=("request_id", "name", "adapters", "base_model", "labels", "combine"))
    return request
