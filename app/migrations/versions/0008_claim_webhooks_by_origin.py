"""Claim webhooks by origin, so that none starves behind those of a dead receiver.

Revision: 0008, after 0007.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("webhook_delivery", sa.Column("origin", sa.Text(), nullable=True))
    with op.get_context().autocommit_block():
        op.create_index(
            "webhook_delivery_origin",
            "webhook_delivery",
            ["origin", "next_at"],
            unique=False,
            postgresql_where=sa.text("status = 'pending'"),
            postgresql_concurrently=True,
            if_not_exists=True,
        )


def downgrade() -> None:
    op.drop_index("webhook_delivery_origin", table_name="webhook_delivery")
    op.drop_column("webhook_delivery", "origin")
