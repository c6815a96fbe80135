"""Keep API keys, and let each owner see their own: the removed tasks, the line of events, the webhooks by their time.

Revision: 0012, after 0011.
"""

import sqlalchemy as sa
from alembic import op

from app.migrations import steps

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

unused_since = {
    "webhook_delivery_created": "0.1.0: an API of the commits before it goes on without it, only slower",
    "webhook_delivery_position": "0.1.0: an API of the commits before it goes on without it, only slower",
}


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("master", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("scopes", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("name", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("octet_length(digest) = 32", name="api_key_digest_length"),
        sa.CheckConstraint("length(owner) <= 64", name="api_key_owner_length"),
        sa.CheckConstraint("length(name) <= 64", name="api_key_name_length"),
        sa.CheckConstraint(
            "cardinality(scopes) > 0 AND scopes <@ ARRAY['admin', 'tasks:read', 'tasks:write', 'webhooks']",
            name="api_key_scopes_known",
        ),
        sa.PrimaryKeyConstraint("id"),
        if_not_exists=True,
    )
    op.add_column(
        "task_tombstone",
        sa.Column("owner", sa.Text(), server_default=sa.text("''"), nullable=False),
        if_not_exists=True,
    )
    steps.create_index_concurrently("webhook_delivery_happened", "webhook_delivery", ["owner", "created_at", "id"])
    steps.create_index_concurrently(
        "webhook_delivery_line", "webhook_delivery", ["owner", "position"], where="position IS NOT NULL"
    )
    steps.drop_index_concurrently("webhook_delivery_created")
    steps.drop_index_concurrently("webhook_delivery_position")


def downgrade() -> None:
    op.create_index("webhook_delivery_created", "webhook_delivery", ["created_at", "id"], unique=False)
    op.create_index(
        "webhook_delivery_position",
        "webhook_delivery",
        ["position"],
        unique=False,
        postgresql_where=sa.text("position IS NOT NULL"),
    )
    op.drop_index("webhook_delivery_line", table_name="webhook_delivery")
    op.drop_index("webhook_delivery_happened", table_name="webhook_delivery")
    op.drop_column("task_tombstone", "owner")
    op.drop_table("api_key")
