"""The two questions that panels ask Prometheus' HTTP API."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One series of an answer."""

    labels: dict[str, str]
    times: list[float]
    """Seconds since 1970."""
    values: list[float]


class PrometheusApi:
    """A Prometheus server by its base URL."""

    def __init__(self, url: str):
        self._url = url

    def over(self, query: str, start: float, end: float, step: float) -> list[Line]:
        """Return a query's series over a time, points that are no number left out. ValueError: what Prometheus said."""
        found = self._ask("query_range", query=query, start=str(start), end=str(end), step=str(step))
        lines = []
        for series in found["result"]:
            points = [(float(at), float(value)) for at, value in series["values"]]
            points = [(at, value) for at, value in points if math.isfinite(value)]
            if points:
                lines.append(Line(series["metric"], [at for at, _ in points], [value for _, value in points]))
        return lines

    def now(self, query: str) -> list[Line]:
        """Return a query's value now."""
        found = self._ask("query", query=query)
        if found["resultType"] == "scalar":
            return [Line({}, [found["result"][0]], [float(found["result"][1])])]
        return [Line(s["metric"], [float(s["value"][0])], [float(s["value"][1])]) for s in found["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules with their health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        """Return what is scraped, with its health."""
        return self._get("targets")["activeTargets"]

    def _ask(self, path: str, **parameters: str) -> Any:
        return self._get(f"{path}?{urllib.parse.urlencode(parameters)}")

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{path}", timeout=30) as answer:  # noqa: S310 - http by ours
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode(errors="replace")) from error
