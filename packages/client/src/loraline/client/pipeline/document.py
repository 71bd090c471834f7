"""YAML with positions: every value knows its line and key path, so that a mistake can be shown where it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml

from loraline.client.errors import LoralineApiError

MOST_ALIASES = 32
DEEPEST = 50


@dataclass(frozen=True)
class Problem:
    """One mistake in a file: the line (from 1), the key path, and what is wrong with the remedy."""

    line: int
    path: str
    message: str


class SpecError(LoralineApiError):
    """A pipeline file that cannot be used; `fields` maps `file:line key.path` to what is wrong there."""

    def __init__(self, file: Path, problems: Iterable[Problem]):
        entries = sorted(set(problems), key=lambda problem: (problem.line, problem.path))
        fields: dict[str, str] = {}
        for problem in entries:
            where = f"{file}:{problem.line} {problem.path}".rstrip()
            fields[where] = f"{fields[where]} {problem.message}" if where in fields else problem.message
        count = "a mistake" if len(entries) == 1 else f"{len(entries)} mistakes"
        message = f"{file.name} has {count}."
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PIPELINE", message, fields)


@dataclass
class Node:
    """A YAML value: a scalar, a list of nodes, or a dictionary of nodes."""

    value: Any
    line: int
    path: str
    problems: list[Problem] = field(repr=False)

    def fault(self, message: str) -> None:
        """Note a mistake at this place and go on, so that one reading tells all mistakes."""
        self.problems.append(Problem(self.line, self.path, message))

    def mapping(self, what: str = "a mapping") -> dict[str, Node]:
        """Return the entries; anything but a mapping is a mistake and gives none."""
        if self.value is None:
            return {}
        if isinstance(self.value, dict):
            return self.value
        self.fault(f"must be {what}, not {shown(self.value)}.")
        return {}

    def sequence(self, what: str = "a list") -> list[Node]:
        """Return the items; anything but a list is a mistake and gives none."""
        if isinstance(self.value, list):
            return self.value
        self.fault(f"must be {what}, not {shown(self.value)}.")
        return []

    def text(self) -> str:
        """Return a string; a number or a bare yes/no is a mistake, because YAML would change it silently."""
        if isinstance(self.value, str):
            return self.value
        hint = " Put it in quotes." if isinstance(self.value, int | float) else ""
        self.fault(f"must be text, not {shown(self.value)}.{hint}")
        return ""

    def only(self, known: Iterable[str], hints: dict[str, str] | None = None) -> None:
        """Note a mistake for every key that is not known, with the nearest one that is."""
        names = list(known)
        for key, child in self.mapping().items():
            if key not in names:
                child.fault(unknown_key(key, names, hints))


def unknown_key(key: str, known: Iterable[str], hints: dict[str, str] | None = None) -> str:
    """Return what to say about an unknown key."""
    names = sorted(set(known))
    if hints and key in hints:
        return f"is not known here. {hints[key]}"
    near = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
    if near:
        return f"is not known here. Did you mean `{near[0]}`?"
    return f"is not known here. Known are: {', '.join(names)}."


def shown(value: Any) -> str:
    """Return how to name a wrong value to a person."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"{'true' if value is True else 'false' if value is False else repr(value)}"


def read_yaml(file: Path) -> Node:
    """Read a YAML file; SpecError tells a file that is missing, broken, or has a key twice."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        message = f"There is no file {file}."
        raise LoralineApiError(grpc.StatusCode.NOT_FOUND, "NO_SUCH_FILE", message) from None
    except (OSError, UnicodeDecodeError) as error:
        message = f"{file} cannot be read: {error}."
        raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "UNREADABLE_FILE", message) from error
    problems: list[Problem] = []
    loader = yaml.SafeLoader(content)
    try:
        _refuse_bombs(file, content)
        root = loader.get_single_node()
        return Node(None, 1, "", problems) if root is None else _node(loader, root, "", problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        text = f"is not valid YAML: {error.problem or error.context}."
        raise SpecError(file, [Problem(mark.line + 1 if mark else 1, "", text)]) from None
    except yaml.YAMLError as error:
        raise SpecError(file, [Problem(1, "", f"is not valid YAML: {error}.")]) from None
    finally:
        loader.dispose()


def _refuse_bombs(file: Path, content: str) -> None:
    """Refuse what a few lines can blow up: aliases of aliases (billions of nodes) and brackets without end."""
    aliases = depth = 0
    for event in yaml.parse(content, yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 1
        if aliases > MOST_ALIASES:
            raise SpecError(
                file, [Problem(line, "", f"has more than {MOST_ALIASES} aliases (`*name`); write them out.")]
            )
        if depth > DEEPEST:
            raise SpecError(file, [Problem(line, "", f"is nested deeper than {DEEPEST} levels.")])


def _node(loader: yaml.SafeLoader, node: yaml.Node, path: str, problems: list[Problem]) -> Node:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        items = [_node(loader, child, f"{path}[{index}]", problems) for index, child in enumerate(node.value)]
        return Node(items, line, path, problems)
    if isinstance(node, yaml.MappingNode):
        return Node(_entries(loader, node, path, problems), line, path, problems)
    return Node(loader.construct_object(node), line, path, problems)


def _entries(loader: yaml.SafeLoader, node: yaml.MappingNode, path: str, problems: list[Problem]) -> dict[str, Node]:
    own: set[str] = set()
    for key_node, _ in node.value:
        key = str(key_node.value)
        if key in own:
            problems.append(Problem(key_node.start_mark.line + 1, f"{path}.{key}".lstrip("."), "is given twice."))
        own.add(key)
    loader.flatten_mapping(node)  # resolves `<<: *anchor`; merged keys come first, so that own keys win
    entries: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        child = _node(loader, value_node, f"{path}.{key}".lstrip("."), problems)
        child.line = key_node.start_mark.line + 1
        entries[key] = child
    return entries


def plain(node: Node) -> Any:
    """Return a node's value without positions."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value
