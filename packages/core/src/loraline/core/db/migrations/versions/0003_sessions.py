"""Conversations that inference keeps, and what was said in them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", SERIAL, primary_key=True, autoincrement=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("category", sa.String(64), nullable=False),
        sa.Column("system_prompt", sa.Text, nullable=False),
        sa.Column("ttl_seconds", sa.Double, nullable=False),
        sa.Column("turns", sa.Integer, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("claim", sa.String(64), nullable=False),
        sa.Column("claim_expires", sa.Double, nullable=False),
        sa.Column("create_time", sa.Double, nullable=False),
        sa.Column("expire_time", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
        sa.UniqueConstraint("name", name="uq_sessions_name"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_sessions_owner_id", "sessions", ["owner", "id"])
    op.create_index("ix_sessions_expire_time", "sessions", ["expire_time"])
    op.create_table(
        "session_messages",
        sa.Column("session", sa.String(64), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("turn", sa.Integer, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("session", "sequence", name="pk_session_messages"),
        sa.ForeignKeyConstraint(
            ["session"], ["sessions.name"], ondelete="CASCADE", name="fk_session_messages_session_sessions"
        ),
    )
