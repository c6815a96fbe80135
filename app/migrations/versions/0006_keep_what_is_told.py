"""Keep what is told: the events that a submitter chose, how many were told, and each event's words.

Revision: 0006, after 0005.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from app.migrations import steps

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("task", sa.Column("webhook_events", postgresql.ARRAY(sa.Text()), nullable=True), if_not_exists=True)
    op.add_column(
        "task",
        sa.Column("event_sequence", sa.Integer(), server_default=sa.text("0"), nullable=False),
        if_not_exists=True,
    )
    op.add_column("webhook_delivery", sa.Column("facts", sa.Text(), nullable=True), if_not_exists=True)
    op.add_column("webhook_delivery", sa.Column("outcome", sa.Text(), nullable=True), if_not_exists=True)
    steps.add_check(
        "task",
        "task_webhook_events_known",
        "webhook_events <@ ARRAY['task.failed', 'task.retrying', 'task.revoked', 'task.started', 'task.succeeded']",
    )


def downgrade() -> None:
    op.drop_column("webhook_delivery", "outcome")
    op.drop_column("webhook_delivery", "facts")
    op.drop_constraint("task_webhook_events_known", "task")
    op.drop_column("task", "event_sequence")
    op.drop_column("task", "webhook_events")
