"""The conditions under which a quarantined cell failed."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0004"
down_revision = "0003"


def upgrade(op: Operations) -> None:
    """Add the column; what is quarantined already stays so, whatever the conditions."""
    op.add_column("quarantine", sa.Column("conditions", sa.Text()))
