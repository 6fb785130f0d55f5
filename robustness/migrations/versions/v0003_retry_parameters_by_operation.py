"""Retry parameters of each operation."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0003"
down_revision = "0002"


def upgrade(op: Operations) -> None:
    """Begin anew: what was learned before came from all operations together."""
    op.drop_table("retry_parameters")
    op.create_table(
        "retry_parameters",
        sa.Column("strategy", sa.Text(), primary_key=True),
        sa.Column("operation", sa.Text(), primary_key=True),
        sa.Column("base_delay", sa.Float(), nullable=False),
        sa.Column("multiplier", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
    )
