"""Vacuum `webhook_delivery` and `task_tombstone` as often as `task`.

What was sent lies before what is due, and what was forgotten before what is not,
until a vacuum takes it out of the index: the sweeps step over it each time.

Revision: 0003, after 0002.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = ("webhook_delivery", "task_tombstone")


def upgrade() -> None:
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} SET (autovacuum_vacuum_scale_factor = 0.02)")


def downgrade() -> None:
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} RESET (autovacuum_vacuum_scale_factor)")
