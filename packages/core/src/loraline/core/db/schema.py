"""All tables of the platform, as SQLAlchemy Core describes them.

Times are seconds since the epoch (UTC) as doubles: they compare the same on SQLite and Postgres. Migrations under
`migrations/` create these tables; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite gives a rowid alias (and so autoincrement) to INTEGER keys only; its INTEGER holds 64 bits anyhow.
Serial = BigInteger().with_variant(Integer(), "sqlite")

# ---------------------------------------------------------------------------------------------------------- artifacts

artifact_names = Table(
    "artifact_names",
    metadata,
    Column("kind", Integer, nullable=False),
    Column("name", String(64), nullable=False),
    Column("last_version", BigInteger, nullable=False),  # highest ever allotted: a deleted number never comes back
    PrimaryKeyConstraint("kind", "name"),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),  # paging order
    Column("kind", Integer, nullable=False),
    Column("name", String(64), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),  # pending, ready, deleting
    Column("writer", String(64), nullable=False),  # token of the publish call that owns a pending row
    Column("job", String(128), nullable=False),
    Column("heartbeat_time", Double, nullable=False),  # last sign of life of a pending row's writer
    Column("digest", String(71), nullable=False),  # empty while pending
    Column("size_bytes", BigInteger, nullable=False),
    Column("create_time", Double, nullable=False),
    Column("details", Text, nullable=False),  # the manifest as JSON, without its files
    Column("files", Text, nullable=False),  # the manifest's file list as JSON
    UniqueConstraint("kind", "name", "version"),
    Index("ix_artifacts_state_heartbeat_time", "state", "heartbeat_time"),
    sqlite_autoincrement=True,
)

aliases = Table(
    "aliases",
    metadata,
    Column("kind", Integer, nullable=False),
    Column("name", String(64), nullable=False),
    Column("alias", String(64), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("update_time", Double, nullable=False),
    PrimaryKeyConstraint("kind", "name", "alias"),
)

alias_changes = Table(
    "alias_changes",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("kind", Integer, nullable=False),
    Column("name", String(64), nullable=False),
    Column("alias", String(64), nullable=False),
    Column("from_version", BigInteger, nullable=False),  # 0: the alias was new
    Column("to_version", BigInteger, nullable=False),  # 0: the alias was removed
    Column("time", Double, nullable=False),
    Column("actor", String(128), nullable=False),
    Index("ix_alias_changes_kind_name", "kind", "name", "id"),
    sqlite_autoincrement=True,
)

artifact_uses = Table(
    "artifact_uses",
    metadata,
    Column("holder", String(256), nullable=False),  # the server that serves it
    Column("kind", Integer, nullable=False),
    Column("name", String(64), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("expire_time", Double, nullable=False),  # renewed while the holder lives
    PrimaryKeyConstraint("holder", "kind", "name", "version"),
    Index("ix_artifact_uses_kind_name_version", "kind", "name", "version"),
)

# --------------------------------------------------------------------------------------------------------------- jobs

jobs = Table(
    "jobs",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),  # paging order
    Column("name", String(128), nullable=False, unique=True),
    Column("kind", String(64), nullable=False),
    Column("state", Integer, nullable=False),  # JobState
    Column("spec", LargeBinary, nullable=False),  # google.protobuf.Any, serialized
    Column("request_id", String(128), nullable=True),  # NULL when the caller gave none
    Column("fingerprint", String(64), nullable=False, server_default=""),
    Column("progress", LargeBinary, nullable=True),  # Progress
    Column("error", LargeBinary, nullable=True),  # google.rpc.Status
    Column("pause", LargeBinary, nullable=True),  # PauseInfo
    Column("result", LargeBinary, nullable=True),  # google.protobuf.Any
    Column("inputs", Text, nullable=False, server_default="[]"),  # JSON list of exact references
    Column("outputs", Text, nullable=False, server_default="[]"),
    Column("labels", Text, nullable=False, server_default="{}"),
    Column("trace", Text, nullable=False, server_default=""),  # headers of the caller's span as JSON; empty for none
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("lost_attempts", Integer, nullable=False, server_default="0"),  # starts whose process died without a word
    Column("epoch", BigInteger, nullable=False, server_default="0"),
    Column("lease_owner", String(128), nullable=False, server_default=""),
    Column("lease_expires", Double, nullable=False, server_default="0"),
    Column("requested_stop", String(16), nullable=False, server_default=""),
    Column("last_sequence", BigInteger, nullable=False, server_default="0"),
    Column("create_time", Double, nullable=False),
    Column("queue_time", Double, nullable=False, server_default="0"),  # when it last became QUEUED
    Column("start_time", Double, nullable=True),
    Column("end_time", Double, nullable=True),
    Column("update_time", Double, nullable=False),
    UniqueConstraint("kind", "request_id"),  # NULLs count as different on both databases
    Index("ix_jobs_state_kind", "state", "kind", "seq"),
    sqlite_autoincrement=True,
)

job_events = Table(
    "job_events",
    metadata,
    Column("job", String(128), nullable=False),
    Column("sequence", BigInteger, nullable=False),  # from 1 in each job, without gaps
    Column("time", Double, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),  # JobEvent, serialized
    PrimaryKeyConstraint("job", "sequence"),
    ForeignKeyConstraint(["job"], ["jobs.name"], ondelete="CASCADE"),
)

job_labels = Table(
    "job_labels",
    metadata,
    Column("job", String(128), nullable=False),
    Column("key", String(128), nullable=False),
    Column("value", String(256), nullable=False),
    PrimaryKeyConstraint("job", "key"),
    ForeignKeyConstraint(["job"], ["jobs.name"], ondelete="CASCADE"),
    Index("ix_job_labels_key_value", "key", "value"),
)

# ----------------------------------------------------------------------------------------------------------- sessions

sessions = Table(
    "sessions",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),  # paging order
    Column("name", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),  # id of the API key; empty where authentication is off
    Column("model", String(200), nullable=False),
    Column("category", String(64), nullable=False),
    Column("system_prompt", Text, nullable=False),
    Column("ttl_seconds", Double, nullable=False),
    Column("turns", Integer, nullable=False),  # turns kept so far
    Column("size_bytes", BigInteger, nullable=False),  # UTF-8 bytes of the history
    Column("claim", String(64), nullable=False),  # token of the turn that is being answered; empty for none
    Column("claim_expires", Double, nullable=False),  # renewed while the turn runs
    Column("create_time", Double, nullable=False),
    Column("expire_time", Double, nullable=False),  # last use and ttl_seconds
    Index("ix_sessions_owner_id", "owner", "id"),
    Index("ix_sessions_expire_time", "expire_time"),
    sqlite_autoincrement=True,
)

session_messages = Table(
    "session_messages",
    metadata,
    Column("session", String(64), nullable=False),
    Column("sequence", BigInteger, nullable=False),  # from 1 in each session
    Column("turn", Integer, nullable=False),  # from 1; a turn is what the user sent and the answer
    Column("role", String(16), nullable=False),
    Column("content", Text, nullable=False),
    PrimaryKeyConstraint("session", "sequence"),
    ForeignKeyConstraint(["session"], ["sessions.name"], ondelete="CASCADE"),
)

# -------------------------------------------------------------------------------------------------------- model calls

llm_calls = Table(
    "llm_calls",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),  # the order in which calls were recorded
    Column("job", String(128), nullable=False),
    Column("source", Integer, nullable=False),  # from 1: which of the job's sources
    Column("plan", String(64), nullable=False),  # digest of what decides the requests; equal ones share answers
    Column("call", BigInteger, nullable=False),  # number of the call in its plan
    Column("outcome", String(16), nullable=False),
    Column("answer_time", Double, nullable=False),  # when the answer came; 0 for none
    Column("record", LargeBinary, nullable=False),  # the whole call as JSON; its text may hold what TEXT cannot
    ForeignKeyConstraint(["job"], ["jobs.name"], ondelete="CASCADE"),
    Index("ix_llm_calls_job_source_id", "job", "source", "id"),
    Index("ix_llm_calls_plan_call_id", "plan", "call", "id"),
    sqlite_autoincrement=True,
)
