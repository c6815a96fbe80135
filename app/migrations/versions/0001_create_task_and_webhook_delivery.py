"""Create `task`, `webhook_delivery` and the sequence of publish positions.

Revision: 0001, the first.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("task_position")))
    op.create_table(
        "task",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("args", sa.JSON(), nullable=False),
        sa.Column("kwargs", sa.JSON(), nullable=False),
        sa.Column("tags", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("webhook_url", sa.Text(), nullable=True),
        sa.Column("rerun_of", sa.Uuid(), nullable=True),
        sa.Column("traceparent", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), server_default=sa.text("'PENDING'"), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("token", sa.Uuid(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("max_retries", sa.SmallInteger(), server_default=sa.text("3"), nullable=False),
        sa.Column("failures", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("crashes", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("losses", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("refusals", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("time_limit", sa.Float(), nullable=True),
        sa.Column("position", sa.BigInteger(), nullable=True),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("run_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("progress", sa.Float(), nullable=True),
        sa.Column("progress_message", sa.Text(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error_type", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_traceback", sa.Text(), nullable=True),
        sa.CheckConstraint("(status = 'STARTED') = (lease_until IS NOT NULL)", name="task_leased_iff_started"),
        sa.CheckConstraint("(status = 'SUCCESS') = (result IS NOT NULL)", name="task_result_iff_success"),
        sa.CheckConstraint(
            "(status IN ('FAILURE', 'REVOKED', 'SUCCESS')) = (finished_at IS NOT NULL)",
            name="task_finished_iff_terminal",
        ),
        sa.CheckConstraint("status <> 'STARTED' OR token IS NOT NULL", name="task_fenced_while_started"),
        sa.CheckConstraint(
            "status IN ('FAILURE', 'PENDING', 'RETRY', 'REVOKED', 'STARTED', 'SUCCESS')",
            name="task_status_known",
        ),
        sa.CheckConstraint("status NOT IN ('FAILURE', 'REVOKED') OR error_type IS NOT NULL", name="task_error_named"),
        sa.CheckConstraint(
            "attempt >= 0 AND crashes >= 0 AND losses >= 0 AND refusals >= 0", name="task_counts_positive"
        ),
        sa.CheckConstraint("failures BETWEEN 0 AND max_retries + 1", name="task_failures_in_budget"),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 255", name="task_name_length"),
        sa.CheckConstraint("length(queue) BETWEEN 1 AND 64", name="task_queue_length"),
        sa.CheckConstraint("length(traceparent) <= 64", name="task_traceparent_length"),
        sa.CheckConstraint("length(webhook_url) <= 2048", name="task_webhook_url_length"),
        sa.CheckConstraint("max_retries BETWEEN 0 AND 100", name="task_max_retries_range"),
        sa.CheckConstraint("progress BETWEEN 0 AND 1", name="task_progress_fraction"),
        sa.PrimaryKeyConstraint("id"),
        postgresql_with={"fillfactor": 85, "autovacuum_vacuum_scale_factor": 0.02},
    )
    op.create_index(
        "task_expiring",
        "task",
        ["queue", "expires_at"],
        unique=False,
        postgresql_where=sa.text("status IN ('PENDING', 'RETRY') AND expires_at IS NOT NULL"),
    )
    op.create_index(
        "task_finished",
        "task",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "task_handed_back",
        "task",
        ["queue", "position"],
        unique=False,
        postgresql_where=sa.text("status IN ('PENDING', 'RETRY') AND published_at IS NULL AND position IS NOT NULL"),
    )
    op.create_index(
        "task_published",
        "task",
        ["queue", "position"],
        unique=False,
        postgresql_where=sa.text("status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL"),
    )
    op.create_index(
        "task_started", "task", ["queue", "id"], unique=False, postgresql_where=sa.text("status = 'STARTED'")
    )
    op.create_index(
        "task_unpublished",
        "task",
        ["queue", "run_at", "id"],
        unique=False,
        postgresql_where=sa.text("status IN ('PENDING', 'RETRY') AND published_at IS NULL"),
    )
    op.create_table(
        "webhook_delivery",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        sa.Column("attempt", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("token", sa.Uuid(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("next_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_status_code", sa.SmallInteger(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.CheckConstraint("(status = 'delivered') = (delivered_at IS NOT NULL)", name="delivery_dated"),
        sa.CheckConstraint(
            "(status = 'delivering') = (lease_until IS NOT NULL)", name="delivery_leased_iff_delivering"
        ),
        sa.CheckConstraint(
            "status IN ('delivered', 'delivering', 'exhausted', 'pending')", name="delivery_status_known"
        ),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "webhook_delivery_due",
        "webhook_delivery",
        ["next_at"],
        unique=False,
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index("webhook_delivery_event", "webhook_delivery", ["task_id", "sequence"], unique=True)
    op.create_index(
        "webhook_delivery_leased",
        "webhook_delivery",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("status = 'delivering'"),
    )


def downgrade() -> None:
    op.drop_index("webhook_delivery_leased", table_name="webhook_delivery")
    op.drop_index("webhook_delivery_event", table_name="webhook_delivery")
    op.drop_index("webhook_delivery_due", table_name="webhook_delivery")
    op.drop_table("webhook_delivery")
    op.drop_index("task_unpublished", table_name="task")
    op.drop_index("task_started", table_name="task")
    op.drop_index("task_published", table_name="task")
    op.drop_index("task_handed_back", table_name="task")
    op.drop_index("task_finished", table_name="task")
    op.drop_index("task_expiring", table_name="task")
    op.drop_table("task")
    op.execute(sa.schema.DropSequence(sa.Sequence("task_position")))
