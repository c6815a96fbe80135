"""Claim webhooks by origin, so that none starves behind those of a dead receiver.

Revision: 0008, after 0007.
"""

import sqlalchemy as sa
from alembic import op

from app.migrations import steps

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("webhook_delivery", sa.Column("origin", sa.Text(), nullable=True), if_not_exists=True)
    steps.create_index_concurrently(
        "webhook_delivery_origin", "webhook_delivery", ["origin", "next_at"], where="status = 'pending'"
    )


def downgrade() -> None:
    op.drop_index("webhook_delivery_origin", table_name="webhook_delivery")
    op.drop_column("webhook_delivery", "origin")
