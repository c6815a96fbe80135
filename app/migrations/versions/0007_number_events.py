"""Number events in the order in which they can be read.

Revision: 0007, after 0006.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("event_position")))
    op.add_column("webhook_delivery", sa.Column("position", sa.BigInteger(), nullable=True))
    with op.get_context().autocommit_block():
        op.create_index(
            "webhook_delivery_position",
            "webhook_delivery",
            ["position"],
            unique=False,
            postgresql_where=sa.text("position IS NOT NULL"),
            postgresql_concurrently=True,
            if_not_exists=True,
        )
        op.create_index(
            "webhook_delivery_unnumbered",
            "webhook_delivery",
            ["created_at", "sequence"],
            unique=False,
            postgresql_where=sa.text("position IS NULL"),
            postgresql_concurrently=True,
            if_not_exists=True,
        )


def downgrade() -> None:
    op.drop_index("webhook_delivery_unnumbered", table_name="webhook_delivery")
    op.drop_index("webhook_delivery_position", table_name="webhook_delivery")
    op.drop_column("webhook_delivery", "position")
    op.execute(sa.schema.DropSequence(sa.Sequence("event_position")))
