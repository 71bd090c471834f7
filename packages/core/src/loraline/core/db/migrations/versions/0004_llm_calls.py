"""What jobs asked language models and what came back, where replicas on several machines share one database."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "llm_calls",
        sa.Column("id", SERIAL, primary_key=True, autoincrement=True),
        sa.Column("job", sa.String(128), nullable=False),
        sa.Column("source", sa.Integer, nullable=False),
        sa.Column("plan", sa.String(64), nullable=False),
        sa.Column("call", sa.BigInteger, nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("answer_time", sa.Double, nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_llm_calls"),
        sa.ForeignKeyConstraint(["job"], ["jobs.name"], name="fk_llm_calls_job", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_llm_calls_job_source_id", "llm_calls", ["job", "source", "id"])
    op.create_index("ix_llm_calls_plan_call_id", "llm_calls", ["plan", "call", "id"])
