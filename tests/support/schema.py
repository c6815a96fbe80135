"""What a database looks like, and what a migration takes away from the release that still runs.

The rule is in docs/upgrading.md. What a machine can see of it is here: a change
is a breach if statements of the previous release may fail, or find less, after
it. A migration whose module says in `unused_since` which release stopped using
the thing may take it away all the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import asyncpg

_COLUMNS = """
SELECT c.relname AS of, a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS required,
       a.atthasdef OR a.attidentity <> '' AS filled
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
 WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
"""
_CONSTRAINTS = """
SELECT r.conname AS name, c.relname AS of, r.contype::text AS kind, pg_get_constraintdef(r.oid) AS definition,
       ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum = ANY (r.conkey)) AS columns
  FROM pg_constraint r JOIN pg_class c ON c.oid = r.conrelid
 WHERE c.relnamespace = 'public'::regnamespace AND r.contype IN ('c', 'f', 'p', 'u', 'x')
"""
_OTHERS = """
SELECT c.relname AS name, c.relkind::text AS kind, t.relname AS of, COALESCE(i.indisunique, false) AS is_unique,
       COALESCE(pg_get_indexdef(c.oid), '') AS definition
  FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid LEFT JOIN pg_class t ON t.oid = i.indrelid
 WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('i', 'S', 'r', 'p', 'v')
"""
_TRIGGERS = """
SELECT t.tgname AS name FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
 WHERE c.relnamespace = 'public'::regnamespace AND NOT t.tgisinternal
"""
_VALUE = re.compile(r"'([^']*)'::text")


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its type, whether NULL is refused, and whether there is a default."""

    type: str
    required: bool
    filled: bool


@dataclass(frozen=True, slots=True)
class Constraint:
    """One constraint of a table."""

    table: str
    kind: str
    definition: str
    columns: frozenset[str]

    def widens(self, before: "Constraint", known: frozenset[str]) -> bool:
        """Whether this is the same law with new words in its lists, such as one more status.

        A row that breaks it then has one of the new words, and the previous release, which has all that are
        `known`, does not write those.
        """
        alike = _VALUE.sub("", self.definition).replace(", ", "") == _VALUE.sub("", before.definition).replace(", ", "")
        return alike and before.words <= self.words and (self.words - before.words).isdisjoint(known)

    @property
    def words(self) -> frozenset[str]:
        """The texts that it names."""
        return frozenset(_VALUE.findall(self.definition))


@dataclass(frozen=True, slots=True)
class Index:
    """One index."""

    table: str
    unique: bool
    definition: str


@dataclass(frozen=True, slots=True)
class Schema:
    """Everything in a database that a statement may depend on."""

    tables: frozenset[str]
    sequences: frozenset[str]
    triggers: frozenset[str]
    columns: Mapping[tuple[str, str], Column] = field(default_factory=dict)
    constraints: Mapping[str, Constraint] = field(default_factory=dict)
    indexes: Mapping[str, Index] = field(default_factory=dict)


async def look(connection: "asyncpg.Connection[asyncpg.Record]") -> Schema:
    """What is there now."""
    others = await connection.fetch(_OTHERS)
    return Schema(
        tables=frozenset(one["name"] for one in others if one["kind"] in {"r", "p", "v"}),
        sequences=frozenset(one["name"] for one in others if one["kind"] == "S"),
        triggers=frozenset(one["name"] for one in await connection.fetch(_TRIGGERS)),
        columns={
            (one["of"], one["name"]): Column(one["type"], one["required"], one["filled"])
            for one in await connection.fetch(_COLUMNS)
        },
        constraints={
            one["name"]: Constraint(one["of"], one["kind"], one["definition"], frozenset(one["columns"]))
            for one in await connection.fetch(_CONSTRAINTS)
        },
        indexes={
            one["name"]: Index(one["of"], one["is_unique"], one["definition"]) for one in others if one["kind"] == "i"
        },
    )


def breaches(before: Schema, after: Schema) -> dict[str, str]:
    """What of `before` the previous release may miss in `after`: the thing's name, and what happened to it."""
    gone = dict.fromkeys(before.tables - after.tables, "is gone")
    gone |= dict.fromkeys(before.sequences - after.sequences, "is gone")
    gone |= dict.fromkeys(after.triggers - before.triggers, "is new: the previous release does not know what it does")
    return gone | _columns(before, after) | _constraints(before, after) | _indexes(before, after)


def _columns(before: Schema, after: Schema) -> dict[str, str]:
    found = {}
    for (table, name), was in before.columns.items():
        now = after.columns.get((table, name))
        if table not in after.tables:
            continue
        if now is None:
            found[f"{table}.{name}"] = "is gone"
        elif now.type != was.type:
            found[f"{table}.{name}"] = f"is {now.type}, and was {was.type}"
        elif now.required and not was.required:
            found[f"{table}.{name}"] = "may not be NULL any more"
        elif now.required and was.filled and not now.filled:
            found[f"{table}.{name}"] = "has no default any more"
    for (table, name), now in after.columns.items():
        new = table in before.tables and (table, name) not in before.columns
        if new and now.required and not now.filled:
            found[f"{table}.{name}"] = "is new, and must be given"
    return found


def _constraints(before: Schema, after: Schema) -> dict[str, str]:
    found = {}
    known = frozenset[str]().union(*(one.words for one in before.constraints.values()))
    for name, now in after.constraints.items():
        was = before.constraints.get(name)
        if now.table not in before.tables or now == was or (was is not None and now.widens(was, known)):
            continue
        # On new columns alone it says nothing about what the previous release writes: those have their defaults.
        if was is None and not any((now.table, column) in before.columns for column in now.columns):
            continue
        found[name] = "is new, or says something else"
    # A foreign key or a key that is gone may be what an ON CONFLICT or an ON DELETE relies on.
    for name, was in before.constraints.items():
        if was.kind != "c" and was.table in after.tables and name not in after.constraints:
            found[name] = "is gone"
    return found


def _indexes(before: Schema, after: Schema) -> dict[str, str]:
    found = {}
    for name, was in before.indexes.items():
        if was.table in after.tables and was != after.indexes.get(name) and name not in before.constraints:
            found[name] = "is gone, or is another: statements of the previous release may read whole tables"
    for name, now in after.indexes.items():
        new = name not in before.indexes and name not in after.constraints
        if new and now.unique and now.table in before.tables:
            found[name] = "is new and unique"
    return found
