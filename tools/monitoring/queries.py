"""What a PromQL query names, and queries with Grafana's variables filled in."""

from __future__ import annotations

import re

import promql_parser as promql

_VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$__interval": "1m"}


def fill_in(query: str) -> str:
    """Return a panel's query as Prometheus takes it: every run, every adapter."""
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    return re.sub(r"\$\{?\w+\}?", ".*", query)


def names_in(query: str) -> set[str]:
    """Return the names of series that a query reads. ValueError says where it does not parse."""
    names: set[str] = set()
    _visit(promql.parse(query), names)
    return names


def _visit(node: object, names: set[str]) -> None:
    if isinstance(node, promql.VectorSelector):
        name = node.name or next((m.value for m in node.matchers.matchers if m.name == "__name__"), "")
        names.add(name)
        return
    for attribute in ("expr", "lhs", "rhs", "vector_selector", "param"):
        child = getattr(node, attribute, None)
        if child is not None:
            _visit(child, names)
    for child in getattr(node, "args", None) or ():
        _visit(child, names)


def labels_in(query: str) -> set[str]:
    """Return the names of labels that a query selects, groups or joins by, without those that label_replace makes."""
    found: set[str] = set()
    _visit_labels(promql.parse(query), found)
    return found


def _visit_labels(node: object, found: set[str]) -> None:
    if isinstance(node, promql.VectorSelector):
        found.update(matcher.name for matcher in node.matchers.matchers if matcher.name != "__name__")
        return
    if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
        found.update(node.modifier.labels)
    if isinstance(node, promql.BinaryExpr) and node.modifier is not None and node.modifier.matching is not None:
        found.update(node.modifier.matching.labels)
    for attribute in ("expr", "lhs", "rhs", "vector_selector", "param"):
        child = getattr(node, attribute, None)
        if child is not None:
            _visit_labels(child, found)
    for child in getattr(node, "args", None) or ():
        _visit_labels(child, found)
