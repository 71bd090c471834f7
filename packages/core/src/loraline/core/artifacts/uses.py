"""Who needs a version: aliases, servers, unfinished jobs and what was made from it. Such a version is not deleted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_ADAPTER, ARTIFACT_KIND_MODEL, ArtifactKind, ArtifactRef
from loraline.api.job.v1 import job_pb2
from loraline.core.artifacts import catalog
from loraline.core.artifacts.refs import KIND_NAMES, check_kind
from loraline.core.db.database import Database
from loraline.core.db.schema import artifact_uses, artifacts, jobs
from loraline.core.errors import failed_precondition

HOLD_SECONDS = 120.0
"""How long a hold lasts after its last renewal: a server that died must not keep its artifacts for ever."""
_UNFINISHED = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_PAUSED)
_NAMED = 10


def hold(database: Database, holder: str, refs: Iterable[ArtifactRef], seconds: float = HOLD_SECONDS) -> None:
    """Say that the holder serves exactly these versions, for so long; what it held before is let go."""
    wanted = {(ref.kind, ref.name, ref.version) for ref in refs}
    with database.begin() as connection:
        connection.execute(sa.delete(artifact_uses).where(artifact_uses.c.holder == holder))
        expires = time.time() + seconds
        for kind, name, version in sorted(wanted):
            values = {"kind": kind, "name": name, "version": version}
            connection.execute(sa.insert(artifact_uses).values(holder=holder, expire_time=expires, **values))


def check_unused(connection: Connection, found: catalog.Version, *, force: bool = False) -> None:
    """Raise FAILED_PRECONDITION naming who needs a version; `force` lets only what was made from it go without it."""
    _check_aliases(connection, found)
    _check_served(connection, found)
    _check_jobs(connection, found)
    if not force:
        _check_descendants(connection, found)


def _check_aliases(connection: Connection, found: catalog.Version) -> None:
    pointing = catalog.aliases_at(connection, found.kind, found.name, found.version)
    if pointing:
        names = ", ".join(f"@{alias}" for alias in pointing)
        message = (
            f"{found.text} is what {names} points at. Point it at another version "
            f"(`loraline artifacts alias {KIND_NAMES[found.kind]}/{found.name}:vN {pointing[0]}`) or remove it "
            f"(`loraline artifacts alias {found.text} {pointing[0]} --delete`), then delete the version."
        )
        raise failed_precondition("ARTIFACT_ALIASED", message, aliases=", ".join(pointing))


def _check_served(connection: Connection, found: catalog.Version) -> None:
    chosen = sa.and_(
        artifact_uses.c.kind == found.kind,
        artifact_uses.c.name == found.name,
        artifact_uses.c.version == found.version,
        artifact_uses.c.expire_time > time.time(),
    )
    query = sa.select(artifact_uses.c.holder).where(chosen).order_by(artifact_uses.c.holder)
    holders = list(connection.execute(query).scalars())
    if not holders:
        return
    remedies = {
        ARTIFACT_KIND_ADAPTER: f"`loraline adapters unload {found.name}:v{found.version}` takes it out",
        ARTIFACT_KIND_MODEL: "`loraline models load model/NAME` serves another model in its place",
    }
    remedy = remedies.get(check_kind(found.kind), "Have it serve another version")
    message = (
        f"{found.text} is served by {_some(holders)}. {remedy}; then delete the version. "
        f"A server that died lets go after {HOLD_SECONDS:.0f} s."
    )
    raise failed_precondition("ARTIFACT_SERVED", message, artifact=found.text, holders=", ".join(holders))


def _check_jobs(connection: Connection, found: catalog.Version) -> None:
    query = sa.select(jobs.c.name, jobs.c.inputs).where(jobs.c.state.in_(_UNFINISHED)).order_by(jobs.c.seq)
    wanted = (ArtifactKind.Name(check_kind(found.kind)), found.name, str(found.version))
    using = [
        row.name
        for row in connection.execute(query)
        if any((ref.get("kind"), ref.get("name"), ref.get("version")) == wanted for ref in json.loads(row.inputs))
    ]
    if using:
        message = (
            f"{found.text} is an input of {_some(using)}, not finished yet. Let it end "
            f"(`loraline jobs watch {using[0]}`) or stop it (`loraline jobs cancel {using[0]}`), then delete it."
        )
        raise failed_precondition(
            "ARTIFACT_NEEDED_BY_JOB", message, artifact=found.text, jobs=", ".join(using[:_NAMED])
        )


def _check_descendants(connection: Connection, found: catalog.Version) -> None:
    # The reference's text narrows the rows down; `_` in a name is LIKE's wildcard, so the manifest decides.
    likely = sa.and_(artifacts.c.state == catalog.READY, artifacts.c.details.like(f'%"{found.text}"%'))
    query = sa.select(artifacts.c.kind, artifacts.c.name, artifacts.c.version, artifacts.c.details).where(likely)
    made = [
        f"{KIND_NAMES[row.kind]}/{row.name}:v{row.version}"
        for row in connection.execute(query.order_by(artifacts.c.id))
        if any(item["ref"] == found.text for item in json.loads(row.details)["inputs"])
    ]
    if made:
        message = (
            f"{_some(made)} {'was' if len(made) == 1 else 'were'} made from {found.text} and could not be proven or "
            f"made again without it. Delete what was made first, or accept that: "
            f"`loraline artifacts delete {found.text} --force`."
        )
        raise failed_precondition(
            "ARTIFACT_HAS_DESCENDANTS", message, artifact=found.text, descendants=", ".join(made[:_NAMED])
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
