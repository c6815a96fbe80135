"""Create `schedule` and `schedule_run`, and let a task say which of them submitted it, and for which time.

Revision: 0016, after 0014.
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "schedule",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("submit", sa.JSON(), nullable=False),
        sa.Column("cron", sa.Text(), nullable=True),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("every_seconds", sa.Float(), nullable=True),
        sa.Column("anchor", sa.DateTime(timezone=True), nullable=False),
        sa.Column("start_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("end_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("jitter_seconds", sa.Float(), nullable=False),
        sa.Column("catch_up", sa.Text(), nullable=False),
        sa.Column("overlap", sa.Text(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_run", sa.DateTime(timezone=True), nullable=True),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_run", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_task_id", sa.Uuid(), nullable=True),
        sa.Column("fired", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("skipped", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("failing_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.CheckConstraint("(cron IS NULL) <> (every_seconds IS NULL)", name="schedule_cron_or_interval"),
        sa.CheckConstraint("every_seconds >= 1", name="schedule_interval_range"),
        sa.CheckConstraint("jitter_seconds >= 0", name="schedule_jitter_range"),
        sa.CheckConstraint("catch_up IN ('all', 'none', 'one')", name="schedule_catch_up_known"),
        sa.CheckConstraint("overlap IN ('allow', 'skip')", name="schedule_overlap_known"),
        sa.CheckConstraint("(next_run IS NULL) = (due_at IS NULL)", name="schedule_due_iff_next"),
        sa.CheckConstraint("due_at >= next_run", name="schedule_due_after_next"),
        sa.CheckConstraint("NOT paused OR due_at IS NULL", name="schedule_not_due_while_paused"),
        sa.PrimaryKeyConstraint("owner", "name"),
        postgresql_with={"autovacuum_vacuum_scale_factor": 0.02},
    )
    op.create_index("schedule_due", "schedule", ["due_at"], postgresql_where=sa.text("due_at IS NOT NULL"))
    op.add_column("task", sa.Column("schedule", sa.Text(), nullable=True))
    op.add_column("task", sa.Column("scheduled_for", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "schedule_run",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("schedule", sa.Text(), nullable=False),
        sa.Column("scheduled_for", sa.DateTime(timezone=True), nullable=False),
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("fired_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "schedule", "scheduled_for"),
        postgresql_with={"autovacuum_vacuum_scale_factor": 0.02},
    )
    op.create_index("schedule_run_fired", "schedule_run", ["fired_at"])


def downgrade() -> None:
    op.drop_table("schedule_run")
    for column in ("scheduled_for", "schedule"):
        op.drop_column("task", column)
    op.drop_table("schedule")
