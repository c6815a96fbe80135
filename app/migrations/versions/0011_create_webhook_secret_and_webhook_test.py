"""Create `webhook_secret`, what signs an owner's webhooks, and `webhook_test`, the test events that are asked for.

Revision: 0011, after 0010.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "webhook_secret",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("slot", sa.SmallInteger(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("public_key", sa.Text(), nullable=True),
        sa.Column("default_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("slot BETWEEN 1 AND 5", name="secret_slot_range"),
        sa.CheckConstraint("kind IN ('ed25519', 'hmac')", name="secret_kind_known"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("webhook_secret_owner", "webhook_secret", ["owner", "slot"], unique=True)
    op.create_index(
        "webhook_secret_expiring", "webhook_secret", ["expires_at"], postgresql_where=sa.text("expires_at IS NOT NULL")
    )
    op.create_table(
        "webhook_test",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("traceparent", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("token", sa.Uuid(), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("status_code", sa.SmallInteger(), nullable=True),
        sa.Column("retry_after_seconds", sa.Float(), nullable=True),
        sa.Column("duration_seconds", sa.Float(), nullable=True),
        sa.Column("excerpt", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("headers", sa.JSON(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.CheckConstraint("length(url) <= 2048", name="test_url_length"),
        sa.CheckConstraint("octet_length(excerpt) <= 4096", name="test_excerpt_length"),
        sa.CheckConstraint("(ended_at IS NOT NULL) = (outcome IS NOT NULL)", name="test_ended_with_an_outcome"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("webhook_test_created", "webhook_test", ["created_at"], unique=False)


def downgrade() -> None:
    op.drop_table("webhook_test")
    op.drop_table("webhook_secret")
