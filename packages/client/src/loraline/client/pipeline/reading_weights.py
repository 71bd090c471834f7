"""How much of which dataset a run is shown: weights by name, or a dialogue with its settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loraline.client.pipeline.document import Node
from loraline.client.pipeline.protofill import as_number

SETTINGS_WEIGHT = 5.0
"""Facts about a character stand in few rows; shown once an epoch they drown in the dialogue."""
SHORT = ("dataset", "settings", "settings_weight")
"""Keys of `train` that name one dataset and its settings, instead of `datasets`."""


def known(node: Node, names: Collection[str], what: str) -> str:
    """Return the name that a node says; a fault tells which names there are."""
    name = node.text()
    if name and name not in names:
        there = f"The {what}s of this file are: {', '.join(names)}." if names else f"This file has no {what}s."
        node.fault(f"there is no {what} {name!r}. {there}")
    return name


def read_weights(node: Node | None, short: Mapping[str, Node], datasets: Collection[str]) -> dict[str, float]:
    """Return the weight of each dataset of a run, by name.

    `node` is what `datasets` says: a list, or weights by name; without it and `short`, every dataset once.
    """
    if short:
        return _dialogue_and_settings(node, short, datasets)
    if node is None:
        return dict.fromkeys(datasets, 1.0)
    if isinstance(node.value, list):
        return dict.fromkeys((known(child, datasets, "dataset") for child in node.value), 1.0)
    weights: dict[str, float] = {}
    for name, child in node.mapping("a mapping from dataset to weight").items():
        known(Node(name, child.line, child.path, child.problems), datasets, "dataset")
        weights[name] = _weight(child)
    return weights


def _dialogue_and_settings(node: Node | None, short: Mapping[str, Node], datasets: Collection[str]) -> dict[str, float]:
    if node is not None:
        next(iter(short.values())).fault("cannot stand beside `datasets`. Keep one of the two.")
        return {}
    if "dataset" not in short:
        next(iter(short.values())).fault("needs `dataset` beside it, the name of the dialogue.")
        return {}
    weights = {known(short["dataset"], datasets, "dataset"): 1.0}
    weight = _weight(short["settings_weight"]) if "settings_weight" in short else SETTINGS_WEIGHT
    if "settings" in short:
        weights[known(short["settings"], datasets, "dataset")] = weight
    elif "settings_weight" in short:
        short["settings_weight"].fault("weighs the dataset that `settings` names, which is missing.")
    return weights


def _weight(node: Node) -> float:
    number = as_number(node.value)
    if number is None or number <= 0:
        node.fault("is a weight: a number above 0, such as 1 or 5.")
    return float(number or 1)
