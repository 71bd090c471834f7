"""Artifacts, aliases, jobs and their events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "artifact_names",
        sa.Column("kind", sa.Integer, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("last_version", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name="pk_artifact_names"),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", SERIAL, autoincrement=True, nullable=False),
        sa.Column("kind", sa.Integer, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("writer", sa.String(64), nullable=False),
        sa.Column("job", sa.String(128), nullable=False),
        sa.Column("heartbeat_time", sa.Double, nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("files", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
        sa.UniqueConstraint("kind", "name", "version", name="uq_artifacts_kind_name_version"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_artifacts_state_heartbeat_time", "artifacts", ["state", "heartbeat_time"])
    op.create_table(
        "aliases",
        sa.Column("kind", sa.Integer, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("update_time", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", "alias", name="pk_aliases"),
    )
    op.create_table(
        "alias_changes",
        sa.Column("id", SERIAL, autoincrement=True, nullable=False),
        sa.Column("kind", sa.Integer, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("from_version", sa.BigInteger, nullable=False),
        sa.Column("to_version", sa.BigInteger, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_alias_changes"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_alias_changes_kind_name", "alias_changes", ["kind", "name", "id"])
    _create_job_tables()


def _create_job_tables() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", SERIAL, autoincrement=True, nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("state", sa.Integer, nullable=False),
        sa.Column("spec", sa.LargeBinary, nullable=False),
        sa.Column("request_id", sa.String(128), nullable=True),
        sa.Column("fingerprint", sa.String(64), nullable=False, server_default=""),
        sa.Column("progress", sa.LargeBinary, nullable=True),
        sa.Column("error", sa.LargeBinary, nullable=True),
        sa.Column("pause", sa.LargeBinary, nullable=True),
        sa.Column("result", sa.LargeBinary, nullable=True),
        sa.Column("inputs", sa.Text, nullable=False, server_default="[]"),
        sa.Column("outputs", sa.Text, nullable=False, server_default="[]"),
        sa.Column("labels", sa.Text, nullable=False, server_default="{}"),
        sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
        sa.Column("lost_attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("lease_owner", sa.String(128), nullable=False, server_default=""),
        sa.Column("lease_expires", sa.Double, nullable=False, server_default="0"),
        sa.Column("requested_stop", sa.String(16), nullable=False, server_default=""),
        sa.Column("last_sequence", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("queue_time", sa.Double, nullable=False, server_default="0"),
        sa.Column("start_time", sa.Double, nullable=True),
        sa.Column("end_time", sa.Double, nullable=True),
        sa.Column("update_time", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_jobs"),
        sa.UniqueConstraint("name", name="uq_jobs_name"),
        sa.UniqueConstraint("kind", "request_id", name="uq_jobs_kind_request_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_state_kind", "jobs", ["state", "kind", "seq"])
    op.create_table(
        "job_events",
        sa.Column("job", sa.String(128), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("job", "sequence", name="pk_job_events"),
        sa.ForeignKeyConstraint(["job"], ["jobs.name"], name="fk_job_events_job", ondelete="CASCADE"),
    )
    op.create_table(
        "job_labels",
        sa.Column("job", sa.String(128), nullable=False),
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("value", sa.String(256), nullable=False),
        sa.PrimaryKeyConstraint("job", "key", name="pk_job_labels"),
        sa.ForeignKeyConstraint(["job"], ["jobs.name"], name="fk_job_labels_job", ondelete="CASCADE"),
    )
    op.create_index("ix_job_labels_key_value", "job_labels", ["key", "value"])


def downgrade() -> None:
    for table in ("job_labels", "job_events", "jobs", "alias_changes", "aliases", "artifacts", "artifact_names"):
        op.drop_table(table)
