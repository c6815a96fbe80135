"""Number events in the order in which they can be read.

Revision: 0007, after 0006.
"""

import sqlalchemy as sa
from alembic import op

from app.migrations import steps

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("event_position"), if_not_exists=True))
    op.add_column("webhook_delivery", sa.Column("position", sa.BigInteger(), nullable=True), if_not_exists=True)
    steps.create_index_concurrently(
        "webhook_delivery_position", "webhook_delivery", ["position"], where="position IS NOT NULL"
    )
    steps.create_index_concurrently(
        "webhook_delivery_unnumbered", "webhook_delivery", ["created_at", "sequence"], where="position IS NULL"
    )


def downgrade() -> None:
    op.drop_index("webhook_delivery_unnumbered", table_name="webhook_delivery")
    op.drop_index("webhook_delivery_position", table_name="webhook_delivery")
    op.drop_column("webhook_delivery", "position")
    op.execute(sa.schema.DropSequence(sa.Sequence("event_position")))
