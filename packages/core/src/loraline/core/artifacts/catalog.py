"""The artifacts' rows in the database: versions, states and aliases. Functions run inside the caller's transaction."""

from __future__ import annotations

import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.core.artifacts.manifest import Manifest
from loraline.core.artifacts.refs import KIND_NAMES, format_ref
from loraline.core.db.schema import aliases, artifact_names, artifacts
from loraline.core.errors import LoralineError, data_loss, invalid_argument, not_found

PENDING, READY, DELETING = "pending", "ready", "deleting"


@dataclass(frozen=True)
class Version:
    """A row of the artifacts table."""

    id: int
    kind: int
    name: str
    version: int
    state: str
    digest: str
    manifest: Manifest | None
    """None until the version is ready."""

    @property
    def text(self) -> str:
        """The reference as people write it."""
        return f"{KIND_NAMES.get(self.kind)}/{self.name}:v{self.version}"


@dataclass(frozen=True)
class Unfinished:
    """A version that never became ready, or is being deleted, and the paths that may have been written for it."""

    kind: int
    name: str
    version: int
    paths: tuple[str, ...]


def _version(row: Any) -> Version:
    manifest = Manifest.from_json(json.loads(row.details), json.loads(row.files)) if row.details else None
    return Version(row.id, row.kind, row.name, row.version, row.state, row.digest, manifest)


def allot(connection: Connection, kind: int, name: str, *, job: str, writer: str, paths: Sequence[str]) -> int:
    """Give the writer the next version number of the name; nobody else gets the same, ever.

    The paths are what it is going to write: whoever cleans up after it could not find unfinished uploads otherwise.
    """
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    counted = insert(artifact_names).values(kind=kind, name=name, last_version=1)
    counted = counted.on_conflict_do_update(
        index_elements=["kind", "name"], set_={"last_version": artifact_names.c.last_version + 1}
    ).returning(artifact_names.c.last_version)
    version = int(connection.execute(counted).scalar_one())
    now = time.time()
    connection.execute(
        sa.insert(artifacts).values(
            kind=kind, name=name, version=version, state=PENDING, writer=writer, job=job, heartbeat_time=now,
            digest="", size_bytes=0, create_time=now, details="", files=json.dumps(paths),
        )
    )  # fmt: skip
    return version


def supersede(connection: Connection, kind: int, name: str, job: str) -> list[Unfinished]:
    """Take the unfinished versions of a job's earlier attempts from their writers.

    Their numbers are not used again: a writer that only seemed dead may still be sending files there.
    """
    if not job:
        return []
    chosen = sa.and_(
        artifacts.c.kind == kind, artifacts.c.name == name, artifacts.c.job == job, artifacts.c.state == PENDING
    )
    found = _unfinished(connection, chosen)
    if found:
        connection.execute(sa.update(artifacts).where(chosen).values(state=DELETING, heartbeat_time=time.time()))
    return found


def _unfinished(connection: Connection, chosen: sa.ColumnElement[bool]) -> list[Unfinished]:
    found = []
    for row in connection.execute(sa.select(artifacts).where(chosen)):
        items = json.loads(row.files or "[]")
        paths = tuple(item["path"] if isinstance(item, dict) else item for item in items)
        found.append(Unfinished(row.kind, row.name, row.version, paths))
    return found


def finish(connection: Connection, manifest: Manifest, writer: str) -> None:
    """Make the writer's pending version ready; ABORTED when it was taken from the writer meanwhile."""
    done = connection.execute(
        sa.update(artifacts)
        .where(_same(manifest.kind, manifest.name, manifest.version))
        .where(artifacts.c.state == PENDING, artifacts.c.writer == writer)
        .values(
            state=READY,
            digest=manifest.digest,
            size_bytes=manifest.size_bytes,
            create_time=manifest.create_time,
            details=json.dumps(manifest.details(), ensure_ascii=False),
            files=json.dumps(manifest.file_list(), ensure_ascii=False),
        )
    )
    if done.rowcount != 1:
        where = f"{KIND_NAMES.get(manifest.kind)}/{manifest.name}:v{manifest.version}"
        raise LoralineError(
            grpc.StatusCode.ABORTED,
            "PUBLISH_SUPERSEDED",
            f"{where} was given up: a later attempt or a clean-up took it over. Publish again.",
        )


def touch(connection: Connection, kind: int, name: str, version: int, writer: str) -> None:
    """Note that the writer of a pending version is alive."""
    mine = sa.and_(_same(kind, name, version), artifacts.c.writer == writer)
    connection.execute(sa.update(artifacts).where(mine).values(heartbeat_time=time.time()))


def drop(connection: Connection, kind: int, name: str, version: int, *, give_back: bool = False) -> None:
    """Remove a version's row. `give_back` frees its number if it is the last: for versions nobody ever saw."""
    connection.execute(sa.delete(artifacts).where(_same(kind, name, version)))
    if give_back:
        last = sa.and_(
            artifact_names.c.kind == kind, artifact_names.c.name == name, artifact_names.c.last_version == version
        )
        connection.execute(sa.update(artifact_names).where(last).values(last_version=version - 1))


def claim_garbage(connection: Connection, older_than_seconds: float) -> list[Unfinished]:
    """Take unfinished and half-deleted versions that show no sign of life."""
    stale = sa.and_(
        artifacts.c.state.in_([PENDING, DELETING]), artifacts.c.heartbeat_time <= time.time() - older_than_seconds
    )
    found = _unfinished(connection, stale)
    for item in found:
        chosen = _same(item.kind, item.name, item.version)
        connection.execute(sa.update(artifacts).where(chosen).values(state=DELETING))
    return found


def latest(connection: Connection, kind: int, name: str) -> Version | None:
    """Return the ready version with the highest number."""
    query = sa.select(artifacts).where(
        artifacts.c.kind == kind, artifacts.c.name == name, artifacts.c.state == READY
    )  # fmt: skip
    row = connection.execute(query.order_by(artifacts.c.version.desc()).limit(1)).first()
    return None if row is None else _version(row)


def find(connection: Connection, ref: ArtifactRef, *, lock: bool = False) -> Version:
    """Return the ready version that a reference means. NOT_FOUND names what exists; DATA_LOSS for another digest.

    `lock` lets those who delete versions and those who move aliases of one name take turns.
    """
    if lock and connection.dialect.name != "sqlite":  # SQLite's writers take turns anyway
        named = sa.and_(artifact_names.c.kind == ref.kind, artifact_names.c.name == ref.name)
        connection.execute(sa.select(artifact_names.c.kind).where(named).with_for_update())
    selector = ref.WhichOneof("selector")
    if selector is None:
        found = latest(connection, ref.kind, ref.name)
    else:
        number: Any = ref.version
        if selector == "alias":
            number = (
                sa.select(aliases.c.version)
                .where(aliases.c.kind == ref.kind, aliases.c.name == ref.name, aliases.c.alias == ref.alias)
                .scalar_subquery()
            )
        query = sa.select(artifacts).where(_same(ref.kind, ref.name, number), artifacts.c.state == READY)
        row = connection.execute(query).first()
        found = None if row is None else _version(row)
    if found is None:
        raise _missing(connection, ref)
    if ref.digest and ref.digest != found.digest:
        raise data_loss(
            "DIGEST_MISMATCH",
            f"{found.text} has digest {found.digest}, not {ref.digest}. Use a reference without the old digest.",
            artifact=found.text,
        )
    return found


def _missing(connection: Connection, ref: ArtifactRef) -> LoralineError:
    ready = sa.and_(artifacts.c.kind == ref.kind, artifacts.c.state == READY)
    mine = sa.and_(ready, artifacts.c.name == ref.name)
    numbers = sa.select(artifacts.c.version).where(mine).order_by(artifacts.c.version.desc()).limit(10)
    versions = [f"v{number}" for number in connection.execute(numbers).scalars()]
    if versions:
        words = sa.select(aliases.c.alias).where(aliases.c.kind == ref.kind, aliases.c.name == ref.name)
        known = [f"@{alias}" for alias in connection.execute(words.order_by(aliases.c.alias).limit(10)).scalars()]
        there = f"Of this name there are {', '.join(versions + known)}."
    else:
        query = sa.select(artifacts.c.name).where(ready).distinct().order_by(artifacts.c.name).limit(10)
        names = list(connection.execute(query).scalars())
        kind = KIND_NAMES.get(ref.kind, "this kind")
        there = f"Of kind {kind} there are: {', '.join(names)}." if names else f"There is no {kind} artifact yet."
    return not_found("ARTIFACT_NOT_FOUND", f"There is no {format_ref(ref)}. {there}", artifact=format_ref(ref))


def mark_deleting(connection: Connection, found: Version) -> None:
    """Hide a version before its files go."""
    connection.execute(
        sa.update(artifacts).where(artifacts.c.id == found.id).values(state=DELETING, heartbeat_time=time.time())
    )


def aliases_of(connection: Connection, versions: Sequence[Version]) -> dict[int, list[str]]:
    """Return row id -> the aliases that point at that version now."""
    names = {(version.kind, version.name) for version in versions}
    if not names:
        return {}
    query = sa.select(aliases).where(sa.tuple_(aliases.c.kind, aliases.c.name).in_(names)).order_by(aliases.c.alias)
    by_version: dict[tuple[int, str, int], list[str]] = {}
    for row in connection.execute(query):
        by_version.setdefault((row.kind, row.name, row.version), []).append(row.alias)
    return {v.id: by_version.get((v.kind, v.name, v.version), []) for v in versions}


def aliases_at(connection: Connection, kind: int, name: str, version: int) -> list[str]:
    """Return the aliases that point at a version now, sorted."""
    chosen = sa.and_(aliases.c.kind == kind, aliases.c.name == name, aliases.c.version == version)
    return list(connection.execute(sa.select(aliases.c.alias).where(chosen).order_by(aliases.c.alias)).scalars())


def page(connection: Connection, kind: int, name: str, page_size: int, page_token: str) -> tuple[list[Version], str]:
    """Return a page of ready versions, newest first, and the token of the next."""
    query = sa.select(artifacts).where(artifacts.c.state == READY)
    if kind:
        query = query.where(artifacts.c.kind == kind)
    if name:
        query = query.where(artifacts.c.name == name)
    before = read_token(page_token, kind, name)
    if before:
        query = query.where(artifacts.c.id < before)
    rows = connection.execute(query.order_by(artifacts.c.id.desc()).limit(page_size + 1)).all()
    token = write_token(rows[page_size - 1].id, kind, name) if len(rows) > page_size else ""
    return [_version(row) for row in rows[:page_size]], token


def write_token(last: int, *filters: object) -> str:
    """Return an opaque token for the page after the row `last` of a query with these filters."""
    return urlsafe_b64encode(json.dumps([last, *map(str, filters)]).encode()).decode()


def read_token(token: str, *filters: object) -> int:
    """Return the row a page token stands for, 0 for none; INVALID_ARGUMENT when it belongs to another query."""
    if not token:
        return 0
    try:
        last, *others = json.loads(urlsafe_b64decode(token.encode()))
        if isinstance(last, int) and others == list(map(str, filters)):
            return last
    except (ValueError, TypeError):
        pass
    message = "The page token belongs to another query. Start again without one."
    raise invalid_argument("PAGE_TOKEN_INVALID", message, page_token=message)


def check_page_size(page_size: int) -> int:
    """Return how many rows a page has: 50 for 0; INVALID_ARGUMENT outside 0 to 500."""
    if not 0 <= page_size <= 500:
        raise invalid_argument("PAGE_SIZE_INVALID", "A page has 1 to 500 entries.", page_size="0 to 500")
    return page_size or 50


def _same(kind: int, name: str, version: Any) -> sa.ColumnElement[bool]:
    return sa.and_(artifacts.c.kind == kind, artifacts.c.name == name, artifacts.c.version == version)
