"""`loraline keys`: makes, lists and revokes the API keys of the server on this machine.

typer is imported by this module only: servers do not need it, whoever loads this command brings it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.serving.auth import ROLES, KeyRing

Result = TypeVar("Result")
_Format = Annotated[str, typer.Option("--format", help="auto, text or json; auto is text on a terminal.")]


def register(app: typer.Typer) -> None:
    """Add the `keys` commands to the command line."""
    keys = typer.Typer(help="API keys of the server on this machine.", no_args_is_help=True)
    keys.command("create")(create)
    keys.command("list")(list_keys)
    keys.command("revoke")(revoke)
    app.add_typer(keys, name="keys")


def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, such as a person, a team or a program.")],
    role: Annotated[str, typer.Option(help="`chat` asks models, `operate` may do everything.")] = "operate",
    requests_per_minute: Annotated[int, typer.Option(min=0, help="Questions to models in a minute; 0: any.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Tokens of questions and answers; 0: any.")] = 0,
    output: _Format = "auto",
) -> None:
    """Make a key and print it: this is the only time it is shown."""
    ring = _ring()
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    key = _or_exit(lambda: ring.create(name, [role], **limits))
    if _as_json(output):
        print(json.dumps({"name": name, "role": role, "key": key}, ensure_ascii=False))
        return
    print(key)
    print(f"Keep it safe; only its hash is kept, in {ring.path}.", file=sys.stderr)


def list_keys(output: _Format = "auto") -> None:
    """List the keys: id, name, roles, and when each was made."""
    ring = _ring()
    rows = [
        {name: list(value) if name == "roles" else value for name, value in vars(record).items() if name != "sha256"}
        for record in _or_exit(ring.list)
    ]
    if _as_json(output):
        print(json.dumps(rows, ensure_ascii=False))
        return
    if not rows:
        print(f"No keys in {ring.path}. Make one with `loraline keys create NAME` (roles: {', '.join(ROLES)}).")
    width = max((len(str(row["name"])) for row in rows), default=0)
    for row in rows:
        print(f"{row['id']}  {row['name']!s:<{width}}  {','.join(row['roles']):<8} {row['created']}{_limits(row)}")


def revoke(name: Annotated[str, typer.Argument(help="Name or id of the key.")]) -> None:
    """Revoke a key: running servers refuse it within a second or two."""
    ring = _ring()
    record = _or_exit(lambda: ring.revoke(name))
    print(f"Revoked {record.name} ({record.id}).")


def _limits(row: dict[str, Any]) -> str:
    names = {"requests_per_minute": "requests/min", "tokens_per_minute": "tokens/min"}
    return "".join(f"  {row[name]} {shown}" for name, shown in names.items() if row[name])


def _ring() -> KeyRing:
    path = CoreSettings().keys_file
    assert path is not None  # noqa: S101 - the settings fill it in
    return _or_exit(lambda: KeyRing(path))


def _or_exit(action: Callable[[], Result]) -> Result:
    problem: Any
    try:
        return action()
    except LoralineError as error:
        problem = error.message
    except OSError as error:
        problem = f"the key file cannot be written: {error}"
    print(f"loraline keys: {problem}", file=sys.stderr)
    raise typer.Exit(1)


def _as_json(output: str) -> bool:
    if output not in ("auto", "text", "json"):
        print(f"loraline keys: --format is auto, text or json, not {output!r}", file=sys.stderr)
        raise typer.Exit(2)
    return output == "json"
