"""Create `task_tombstone`: which ids were pruned.

Revision: 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "task_tombstone",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("pruned_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("task_tombstone_pruned", "task_tombstone", ["pruned_at"], unique=False)


def downgrade() -> None:
    op.drop_table("task_tombstone")
