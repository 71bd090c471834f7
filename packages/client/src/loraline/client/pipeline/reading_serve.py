"""Reads the last sections of a pipeline file: what to serve, and what to ask."""

from __future__ import annotations

import re
from pathlib import Path

from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.inference.v1 import inference_pb2
from loraline.client.pipeline.document import Node, SpecError, read_yaml
from loraline.client.pipeline.protofill import fill
from loraline.client.pipeline.spec import AskSpec, DatasetSpec, ServeSpec

_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")


def read_serve(node: Node) -> ServeSpec:
    """Return what to serve; mistakes are noted at their places."""
    if node.value is True:
        return ServeSpec()
    entries = node.mapping("true, or a mapping with model, adapter, alias")
    node.only(["model", "adapter", "alias"])
    merged = False
    if "model" in entries:
        merged = entries["model"].value == "merged"
        if entries["model"].value not in ("base", "merged"):
            entries["model"].fault("must be `base` or `merged`.")
    adapter = not merged
    if "adapter" in entries:
        adapter = entries["adapter"].value is True
        if not isinstance(entries["adapter"].value, bool):
            entries["adapter"].fault("must be true or false.")
        elif adapter and merged:
            entries["adapter"].fault("is in the merged model already; leave it out, or serve `model: base`.")
    alias = entries["alias"].text() if "alias" in entries else "production"
    if alias and not _ALIAS.fullmatch(alias):
        entries["alias"].fault("must be lower-case letters, digits, `-`, `_` and `.`, starting with a letter.")
    if re.fullmatch(r"v[0-9]+|latest", alias):
        entries["alias"].fault("would be read as a version; choose another word, such as production.")
    return ServeSpec(merged=merged, adapter=adapter, alias=alias)


def read_ask(node: Node, folder: Path, datasets: dict[str, DatasetSpec]) -> AskSpec:
    """Return what to ask; without a system prompt of its own, the one that the datasets teach is used."""
    entries = dict(node.mapping())
    prompts = entries.pop("prompts", None)
    system = entries.pop("system_prompt", None)
    markers_node = entries.pop("markers", None)
    sampling = inference_pb2.SamplingParameters()
    fill(sampling, Node(entries, node.line, node.path, node.problems), without=("n",))
    groups: dict[str, tuple[str, ...]] = {}
    markers: tuple[str, ...] = ()
    if prompts is None:
        node.fault("needs `prompts`: a file, or a list of questions.")
    elif isinstance(prompts.value, str):
        groups, markers = _read_prompts(folder / prompts.value)
    else:
        groups = {"prompts": tuple(child.text() for child in prompts.sequence("a file, or a list of questions"))}
    if markers_node is not None:
        markers = tuple(child.text() for child in markers_node.sequence())
    shared = _shared_system_prompt(datasets)
    return AskSpec(groups, sampling, system.text() if system is not None else shared, markers)


def _read_prompts(file: Path) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Read a prompts file: a list, or groups of questions with an optional group `markers`."""
    root = read_yaml(file)
    if isinstance(root.value, list):
        groups = {"prompts": tuple(child.text() for child in root.value)}
    else:
        groups = {
            name: tuple(child.text() for child in group.sequence("a list of questions"))
            for name, group in root.mapping("a list of questions, or groups of them").items()
        }
    if root.problems:
        raise SpecError(file, root.problems)
    return groups, groups.pop("markers", ())


def _shared_system_prompt(datasets: dict[str, DatasetSpec]) -> str:
    """Return the system prompt that all converted datasets teach; empty when they differ."""
    prompts = {
        dataset.request.source.system_prompt.replace("{character}", dataset.request.source.character)
        for dataset in datasets.values()
        if isinstance(dataset.request, datagen_pb2.ConvertDatasetRequest)
    }
    return prompts.pop() if len(prompts) == 1 else ""
