"""What a PromQL query names, and queries with Grafana's variables filled in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import promql_parser as promql

_VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$__interval": "1m"}


def fill_in(query: str) -> str:
    """Return a panel's query as Prometheus takes it: every run, every adapter."""
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    return re.sub(r"\$\{?\w+\}?", ".*", query)


def names_in(query: str) -> set[str]:
    """Return the names of series that a query reads. ValueError says where it does not parse."""
    return {_name(selector) for selector in _selectors(promql.parse(query))}


def _name(selector: Any) -> str:
    return selector.name or next((m.value for m in selector.matchers.matchers if m.name == "__name__"), "")


def _selectors(node: object) -> Iterator[Any]:
    if isinstance(node, promql.VectorSelector):
        yield node
        return
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    for child in (*children, *(getattr(node, "args", None) or ())):
        if child is not None:
            yield from _selectors(child)


def values_in(query: str) -> set[tuple[str, str, str]]:
    """Return series, label and value of all that a query's selectors ask for or shut out, alternatives one by one.

    A pattern that is more than alternatives stays as it is: see whether a value matches it.
    """
    found: set[tuple[str, str, str]] = set()
    for selector in _selectors(promql.parse(query)):
        for matcher in selector.matchers.matchers:
            pattern = matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe)
            values = matcher.value.split("|") if pattern else [matcher.value]
            found |= {(_name(selector), matcher.name, value) for value in values}
    return found


def labels_of_result(query: str, labels_of: Mapping[str, set[str]]) -> set[str]:
    """Return the labels that a query's answers may carry, `labels_of` being those of each series by its name.

    ValueError names a label that a selector, `by` or `on` asks for where the series has none of it; KeyError names a
    series that is not in `labels_of`.
    """
    return _result(promql.parse(query), labels_of)


def _result(node: Any, labels_of: Mapping[str, set[str]]) -> set[str]:
    for kind, answer in _KINDS.items():
        if isinstance(node, kind):
            return answer(node, labels_of)
    inner = getattr(node, "vector_selector", None) or getattr(node, "expr", None)  # a range, parentheses, a subquery
    return _result(inner, labels_of) if inner is not None else set()  # else a number or a string


def _of_selector(node: Any, labels_of: Mapping[str, set[str]]) -> set[str]:
    name = _name(node)
    _refuse({m.name for m in node.matchers.matchers} - {"__name__"} - labels_of[name], name)
    return set(labels_of[name])


def _refuse(missing: set[str], where: str) -> None:
    if missing:
        raise ValueError(f"{where} has no label {', '.join(sorted(missing))}")


def _of_aggregate(node: Any, labels_of: Mapping[str, set[str]]) -> set[str]:
    inner, modifier = _result(node.expr, labels_of), node.modifier
    if str(node.op) in ("topk", "bottomk"):
        return inner
    if modifier is None:
        return set()
    named = set(modifier.labels)
    _refuse(named - inner, str(node.op))
    return named if modifier.type == promql.AggModifierType.By else inner - named


def _of_two(node: Any, labels_of: Mapping[str, set[str]]) -> set[str]:
    left, right = _result(node.lhs, labels_of), _result(node.rhs, labels_of)
    matching = node.modifier.matching if node.modifier is not None else None
    if matching is not None and matching.type == promql.LabelModifierType.Include:
        _refuse(set(matching.labels) - (left & right), f"one side of {node.op}")
    return left | right if str(node.op) == "or" else left or right


def _of_call(node: Any, labels_of: Mapping[str, set[str]]) -> set[str]:
    name, given = node.func.name, list(node.args)
    if name == "label_replace":
        source = given[3].val
        inner = _result(given[0], labels_of)
        _refuse({source} - inner, name)
        return inner | {given[1].val}
    found = set[str]().union(*(_result(one, labels_of) for one in given))
    if name == "absent":
        return {m.name for m in given[0].matchers.matchers if m.op == promql.MatchOp.Equal} - {"__name__"}
    return found - {"le"} if name == "histogram_quantile" else found


_KINDS: dict[Any, Callable[[Any, Mapping[str, set[str]]], set[str]]] = {
    promql.VectorSelector: _of_selector,
    promql.AggregateExpr: _of_aggregate,
    promql.BinaryExpr: _of_two,
    promql.Call: _of_call,
}
