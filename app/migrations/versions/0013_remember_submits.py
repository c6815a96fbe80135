"""Remember submits by their Idempotency-Key, and tasks that are to be the only ones of their kind.

Revision: 0013, after 0012.
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotency_key",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("task_ids", sa.ARRAY(sa.Uuid()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("owner", "route", "key"),
        postgresql_with={"autovacuum_vacuum_scale_factor": 0.02},
    )
    op.create_index("idempotency_key_created", "idempotency_key", ["created_at"], unique=False)
    op.create_table(
        "unique_task",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=True),
        sa.CheckConstraint("task_id IS NOT NULL", name="unique_task_is_nobody_elses"),
        sa.PrimaryKeyConstraint("digest"),
        postgresql_with={"autovacuum_vacuum_scale_factor": 0.02},
    )
    op.create_index("unique_task_task", "unique_task", ["task_id"], unique=False)


def downgrade() -> None:
    op.drop_table("unique_task")
    op.drop_table("idempotency_key")
