"""Know when the schedule of a webhook began, and find webhooks without an origin among any number that are due.

What waits for an open circuit is not kept for ever: what is there already counts from this migration on. Each claim
looked for webhooks that an earlier release has written, and stepped over all that were due to find that there are none.

Revision: 0010, after 0009.
"""

import sqlalchemy as sa
from alembic import op

from app.migrations import steps

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A default that is the same for every row is stored once, in the catalog: no row is written.
    op.add_column(
        "webhook_delivery",
        sa.Column("scheduled_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        if_not_exists=True,
    )
    steps.create_index_concurrently(
        "webhook_delivery_nameless", "webhook_delivery", ["next_at"], where="status = 'pending' AND origin IS NULL"
    )


def downgrade() -> None:
    op.drop_index("webhook_delivery_nameless", table_name="webhook_delivery")
    op.drop_column("webhook_delivery", "scheduled_at")
