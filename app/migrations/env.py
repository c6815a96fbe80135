"""What Alembic runs: the connection comes from `app.migrations.migrate`, nothing is read from an ini file."""

from alembic import context
from sqlmodel import SQLModel

from app import models  # noqa: F401  # registers the tables

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=SQLModel.metadata,
    compare_type=True,
    compare_server_default=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
