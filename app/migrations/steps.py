"""Steps of a migration that take long and stop nobody, and that can be made again.

They can't run inside a transaction, so what a revision did before them is committed,
while its number is not yet written: when one fails, or its process is killed, the
revision begins again from its top, on tables that have some of it already. So each
statement of a revision that uses them must do nothing the second time
(docs/upgrading.md), as these do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op


@contextmanager
def unhurried() -> Iterator[None]:
    """Run statements outside a transaction, and without timeouts.

    For those that lock nobody's reads or writes out. They wait for every transaction that was there before, such as
    a backup's, and may take as long as the table is large: no second try would be quicker.
    """
    with op.get_context().autocommit_block():
        connection = op.get_bind()
        usual = {name: connection.scalar(sa.text(f"SHOW {name}")) for name in ("lock_timeout", "statement_timeout")}
        for name in usual:
            op.execute(f"SET {name} = 0")
        yield
        # What fails ends the migration, and its session with it.
        for name, value in usual.items():
            op.execute(f"SET {name} = '{value}'")


def create_index_concurrently(name: str, table: str, columns: Sequence[str], *, where: str | None = None) -> None:
    """Make an index, unless it is there and whole.

    One whose making was interrupted stays behind: no query uses it, but every write pays for it, and
    `IF NOT EXISTS` takes it for the index. It is made anew.

    Args:
        name: of the index.
        table: that it is of.
        columns: of the table, in the index's order.
        where: the condition of a partial index, in SQL.
    """
    broken = sa.text("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(CAST(:name AS text))")
    with unhurried():
        if op.get_bind().scalar(broken, {"name": name}):
            op.drop_index(name, postgresql_concurrently=True, if_exists=True)
        op.create_index(
            name,
            table,
            list(columns),
            unique=False,
            postgresql_where=None if where is None else sa.text(where),
            postgresql_concurrently=True,
            if_not_exists=True,
        )


def drop_index_concurrently(name: str) -> None:
    """Drop an index, unless it is gone, or only half of it is."""
    with unhurried():
        op.drop_index(name, postgresql_concurrently=True, if_exists=True)


def add_check(table: str, name: str, condition: str) -> None:
    """Add a CHECK, and then look at the rows that are there, without the lock that adding it takes.

    Args:
        table: that it is of.
        name: of the constraint.
        condition: in SQL.
    """
    op.execute(
        f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID"
    )
    with unhurried():
        op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")
