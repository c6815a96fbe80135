"""Let webhooks be sent again: where the schedule began anew, and an index to find them by their time.

Revision: 0005, after 0004.
"""

import sqlalchemy as sa
from alembic import op

from app.migrations import steps

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "webhook_delivery",
        sa.Column("earlier_attempts", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        if_not_exists=True,
    )
    steps.create_index_concurrently("webhook_delivery_created", "webhook_delivery", ["created_at", "id"])


def downgrade() -> None:
    op.drop_index("webhook_delivery_created", table_name="webhook_delivery")
    op.drop_column("webhook_delivery", "earlier_attempts")
