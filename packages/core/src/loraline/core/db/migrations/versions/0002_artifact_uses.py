"""Which artifacts are served, and by whom: they are not deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "artifact_uses",
        sa.Column("holder", sa.String(256), nullable=False),
        sa.Column("kind", sa.Integer, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("expire_time", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("holder", "kind", "name", "version", name="pk_artifact_uses"),
    )
    op.create_index("ix_artifact_uses_kind_name_version", "artifact_uses", ["kind", "name", "version"])
