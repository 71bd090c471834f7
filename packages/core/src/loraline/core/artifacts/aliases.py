"""Aliases such as `production`: rows that are moved in one transaction with their history."""

from __future__ import annotations

import time

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from loraline.api.artifact.v1.artifact_pb2 import AliasChange
from loraline.core.artifacts import catalog
from loraline.core.db.schema import alias_changes, aliases, artifact_names
from loraline.core.errors import not_found


def move(connection: Connection, found: catalog.Version, alias: str, actor: str) -> AliasChange:
    """Point an alias at a version found with `lock`; pointing it where it points already records nothing."""
    before, now = _current(connection, found.kind, found.name, alias), time.time()
    if before == found.version:
        return _change(alias, before, found.version, now, actor)
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    values = {"version": found.version, "update_time": now}
    connection.execute(
        insert(aliases)
        .values(kind=found.kind, name=found.name, alias=alias, **values)
        .on_conflict_do_update(index_elements=["kind", "name", "alias"], set_=values)
    )
    return _record(connection, found.kind, found.name, _change(alias, before, found.version, now, actor))


def remove(connection: Connection, kind: int, name: str, alias: str, actor: str) -> AliasChange:
    """Remove an alias and keep its history; NOT_FOUND names the aliases there are."""
    _lock(connection, kind, name)
    before, now = _current(connection, kind, name, alias), time.time()
    if not before:
        mine = sa.select(aliases.c.alias).where(aliases.c.kind == kind, aliases.c.name == name)
        known = ", ".join(f"@{word}" for word in connection.execute(mine.order_by(aliases.c.alias)).scalars())
        message = f"{name} has no alias @{alias}. It has {known or 'none'}."
        raise not_found("ALIAS_NOT_FOUND", message, alias=alias)
    chosen = sa.and_(aliases.c.kind == kind, aliases.c.name == name, aliases.c.alias == alias)
    connection.execute(sa.delete(aliases).where(chosen))
    return _record(connection, kind, name, _change(alias, before, 0, now, actor))


def page(
    connection: Connection, kind: int, name: str, alias: str, page_size: int, page_token: str
) -> tuple[list[AliasChange], str]:
    """Return a page of the name's alias moves, newest first, and the token of the next."""
    query = sa.select(alias_changes).where(alias_changes.c.kind == kind, alias_changes.c.name == name)
    if alias:
        query = query.where(alias_changes.c.alias == alias)
    before = catalog.read_token(page_token, kind, name, alias)
    if before:
        query = query.where(alias_changes.c.id < before)
    rows = connection.execute(query.order_by(alias_changes.c.id.desc()).limit(page_size + 1)).all()
    token = catalog.write_token(rows[page_size - 1].id, kind, name, alias) if len(rows) > page_size else ""
    changes = [_change(r.alias, r.from_version, r.to_version, r.time, r.actor) for r in rows[:page_size]]
    return changes, token


def _lock(connection: Connection, kind: int, name: str) -> None:
    """Let movers of one name's aliases take turns; SQLite's writers do so anyway."""
    if connection.dialect.name != "sqlite":
        row = sa.select(artifact_names.c.kind).where(artifact_names.c.kind == kind, artifact_names.c.name == name)
        connection.execute(row.with_for_update())


def _current(connection: Connection, kind: int, name: str, alias: str) -> int:
    query = sa.select(aliases.c.version)
    query = query.where(aliases.c.kind == kind, aliases.c.name == name, aliases.c.alias == alias)
    return int(connection.execute(query).scalar() or 0)


def _change(alias: str, before: int, after: int, when: float, actor: str) -> AliasChange:
    change = AliasChange(alias=alias, from_version=before, to_version=after, actor=actor)
    change.time.FromMicroseconds(round(when * 1e6))
    return change


def _record(connection: Connection, kind: int, name: str, change: AliasChange) -> AliasChange:
    connection.execute(
        sa.insert(alias_changes).values(
            kind=kind,
            name=name,
            alias=change.alias,
            from_version=change.from_version,
            to_version=change.to_version,
            time=change.time.ToMicroseconds() / 1e6,
            actor=change.actor[:128],
        )
    )
    return change
