"""Name the owners of tasks, and claim webhooks by owner and origin: one owner's dead receiver is not another's.

Revision: 0009, after 0008.
"""

import sqlalchemy as sa
from alembic import op

from app.migrations import steps

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

unused_since = {
    "webhook_delivery_origin": "0.1.0: a relay of the commits before it goes on without it, only slower",
}


def upgrade() -> None:
    for table in ("task", "webhook_delivery"):
        op.add_column(
            table, sa.Column("owner", sa.Text(), server_default=sa.text("''"), nullable=False), if_not_exists=True
        )
    steps.create_index_concurrently(
        "webhook_delivery_receiver",
        "webhook_delivery",
        ["owner", "origin", "next_at"],
        where="status = 'pending' AND origin IS NOT NULL",
    )
    steps.drop_index_concurrently("webhook_delivery_origin")


def downgrade() -> None:
    op.create_index(
        "webhook_delivery_origin",
        "webhook_delivery",
        ["origin", "next_at"],
        unique=False,
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.drop_index("webhook_delivery_receiver", table_name="webhook_delivery")
    for table in ("webhook_delivery", "task"):
        op.drop_column(table, "owner")
