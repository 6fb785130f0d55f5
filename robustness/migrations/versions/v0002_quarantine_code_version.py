"""The version of the code that a quarantined cell failed with."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002"
down_revision = "0001"


def upgrade(op: Operations) -> None:
    """Add the column; what is quarantined already is so for every version."""
    op.add_column("quarantine", sa.Column("code_version", sa.Text()))
