"""Give each owner a few places for jobs, and know when an owner's newest step was taken.

Revision: 0018, after 0017.
"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_place",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("slot", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "slot"),
    )
    op.create_index(
        "job_stepped",
        "job",
        ["owner", "stepped_at"],
        unique=False,
        postgresql_where=sa.text("stepped_at > created_at"),
    )


def downgrade() -> None:
    op.drop_index("job_stepped", table_name="job")
    op.drop_table("job_place")
