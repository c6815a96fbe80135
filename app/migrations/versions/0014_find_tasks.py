"""Find tasks and act on many; keep what became of each attempt; know which workers there are.

Revision: 0014, after 0013.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from app.migrations import steps

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_INDEXES = (
    ("task_listed", ["owner", "status", "created_at", "id"], None),
    ("task_ended", ["owner", "finished_at", "id"], "finished_at IS NOT NULL"),
    ("task_errors", ["owner", "error_type", "created_at", "id"], "error_type IS NOT NULL AND status <> 'SUCCESS'"),
)


def upgrade() -> None:
    op.create_table(
        "task_attempt",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("error_type", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_traceback", sa.Text(), nullable=True),
        sa.Column("log", sa.JSON(), nullable=True),
        sa.Column("log_dropped", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint("number >= 1", name="task_attempt_numbered"),
        sa.CheckConstraint(
            "outcome IN ('cancelled', 'crashed', 'failed', 'lost', 'refused', 'released', 'succeeded')",
            name="task_attempt_outcome_known",
        ),
        sa.CheckConstraint("octet_length(log::text) <= 32768", name="task_attempt_log_size"),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_id", "number"),
        postgresql_with={"autovacuum_vacuum_scale_factor": 0.02},
        if_not_exists=True,
    )
    op.create_table(
        "worker",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("queues", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("busy", sa.Integer(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        if_not_exists=True,
    )
    op.create_table(
        "job",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("filter", sa.JSON(), nullable=False),
        sa.Column("status", sa.Text(), server_default=sa.text("'running'"), nullable=False),
        sa.Column("acted", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("passed_over", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("mark_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("mark_id", sa.Uuid(), nullable=True),
        sa.Column("token", sa.Uuid(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("traceparent", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("stepped_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('cancel', 'rerun')", name="job_kind_known"),
        sa.CheckConstraint("status IN ('cancelled', 'done', 'running')", name="job_status_known"),
        sa.CheckConstraint("(status = 'running') = (finished_at IS NULL)", name="job_finished_iff_not_running"),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.create_index(
        "job_running",
        "job",
        ["stepped_at"],
        unique=False,
        postgresql_where=sa.text("status = 'running'"),
        if_not_exists=True,
    )
    op.create_index(
        "job_finished",
        "job",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL"),
        if_not_exists=True,
    )
    for name, columns, condition in _INDEXES:
        steps.create_index_concurrently(name, "task", columns, where=condition)


def downgrade() -> None:
    op.drop_table("job")
    op.drop_table("worker")
    op.drop_table("task_attempt")
    for name, _, _ in _INDEXES:
        op.drop_index(name, table_name="task")
