"""Let queues be paused and limited: their settings, rows that are held, and how loaded a queue is.

Revision: 0017, after 0016.
"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

# Whoever asks for this holds an advisory lock, and may have waited for it. A statement sees what was there when it
# began; a function that is VOLATILE sees what is there now, and so the task that the holder before it has started.
# Nothing is counted beyond `at_most`. A key of '' is the queue as a whole.
QUEUE_LOAD = """
CREATE FUNCTION queue_load(
    of_queue text, of_key text, at_most int,
    OUT running int, OUT let_go int, OUT others_held boolean, OUT next_at timestamptz
) LANGUAGE plpgsql VOLATILE STRICT AS $$
BEGIN
    running := (SELECT count(*) FROM (
        SELECT FROM task
         WHERE queue = of_queue AND status = 'STARTED' AND (of_key = '' OR concurrency_key = of_key)
         LIMIT at_most) AS found);
    IF of_key = '' THEN
        let_go := (SELECT count(*) FROM (
            SELECT FROM held_task WHERE queue = of_queue AND let_go_at IS NOT NULL LIMIT at_most) AS found);
    ELSE
        let_go := (SELECT count(*) FROM (
            SELECT FROM held_task WHERE queue = of_queue AND concurrency_key = of_key AND let_go_at IS NOT NULL
             LIMIT at_most) AS found);
    END IF;
    others_held := EXISTS (SELECT FROM held_task WHERE queue = of_queue AND line = of_key AND let_go_at IS NULL);
    next_at := (SELECT r.next_at FROM queue_rate r WHERE r.queue = of_queue AND r.key = of_key);
END $$
"""


def upgrade() -> None:
    op.create_table(
        "queue_setting",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("concurrency_limit", sa.Integer(), nullable=True),
        sa.Column("rate_count", sa.Integer(), nullable=True),
        sa.Column("rate_seconds", sa.Float(), nullable=True),
        sa.Column("key_concurrency_limit", sa.Integer(), nullable=True),
        sa.Column("key_rate_count", sa.Integer(), nullable=True),
        sa.Column("key_rate_seconds", sa.Float(), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("length(queue) BETWEEN 1 AND 64", name="queue_setting_queue_length"),
        sa.CheckConstraint("concurrency_limit > 0 AND key_concurrency_limit > 0", name="queue_setting_concurrency"),
        sa.CheckConstraint("rate_count > 0 AND rate_seconds > 0", name="queue_setting_rate"),
        sa.CheckConstraint("key_rate_count > 0 AND key_rate_seconds > 0", name="queue_setting_key_rate"),
        sa.CheckConstraint("(rate_count IS NULL) = (rate_seconds IS NULL)", name="queue_setting_rate_whole"),
        sa.CheckConstraint(
            "(key_rate_count IS NULL) = (key_rate_seconds IS NULL)", name="queue_setting_key_rate_whole"
        ),
        sa.PrimaryKeyConstraint("queue"),
    )
    op.create_table(
        "queue_rate",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("queue", "key"),
        postgresql_with={"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0.02},
    )
    op.create_table(
        "held_task",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("concurrency_key", sa.Text(), nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("run_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("let_go_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "reason IN ('concurrency', 'key_concurrency', 'key_rate', 'paused', 'rate')", name="held_task_reason_known"
        ),
        sa.PrimaryKeyConstraint("task_id"),
        postgresql_with={"autovacuum_vacuum_scale_factor": 0.02},
    )
    op.create_index(
        "held_task_line",
        "held_task",
        ["queue", "line", "run_at", "task_id"],
        unique=False,
        postgresql_where=sa.text("let_go_at IS NULL"),
    )
    op.create_index(
        "held_task_let_go",
        "held_task",
        ["queue", "concurrency_key"],
        unique=False,
        postgresql_where=sa.text("let_go_at IS NOT NULL"),
    )
    # No CHECK of its length: every statement on a task would have to read it.
    op.add_column("task", sa.Column("concurrency_key", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.execute(QUEUE_LOAD)


def downgrade() -> None:
    # What is held has no message, and would get none from a release that does not know of it.
    op.execute("UPDATE task SET published_at = NULL WHERE published_at = 'infinity'")
    op.execute("DROP FUNCTION queue_load")
    op.drop_column("task", "concurrency_key")
    for table in ("held_task", "queue_rate", "queue_setting"):
        op.drop_table(table)
