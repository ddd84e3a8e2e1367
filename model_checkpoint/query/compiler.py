"""The tree of a filter -> SQL with binds, for experiments and for checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from model_checkpoint.errors import QueryError
from model_checkpoint.query.language import (
    Compare,
    Every,
    Field,
    Flag,
    Holds,
    Member,
    Missing,
    Node,
    Not,
    TextTest,
    Value,
    parse,
    parse_field,
)
from model_checkpoint.utils.jsonable import LARGEST, dumps, storable

# Of a series: what users call it -> its column.
_PARTS = {
    "last": "last",
    "min": "low",
    "max": "high",
    "mean": "CASE WHEN ABS(total) >= :largest THEN total ELSE total / NULLIF(numbers, 0) END",
    "points": "points",
}
_EXPERIMENT = {
    "id": "e.id",
    "name": "e.name",
    "project": "e.project",
    "status": "e.status",
    "parent": "e.parent_id",
    "forked_from": "e.forked_from",
    "created_at": "e.created_at",
    "ended_at": "e.ended_at",
    "age": "(:now - e.created_at)",
    "duration": "(COALESCE(e.ended_at, :now) - e.created_at)",
}
_CHECKPOINT = {
    "id": "c.id",
    "experiment_id": "c.experiment_id",
    "checkpoint_type": "c.checkpoint_type",
    "epoch": "c.epoch",
    "step": "c.step",
    "size": "c.size",
    "pinned": "c.pinned",
    "created_at": "c.created_at",
    "age": "(:now - c.created_at)",
}
_TEXTS = {"id", "name", "project", "status", "parent", "forked_from", "experiment_id", "checkpoint_type"}
_WHOLE = {"epoch", "step", "size", "pinned", "points"}  # columns of 64-bit integers; all other numbers are floats


# What the rows of a kind are read from, and what comes last in every order.
_TABLES = {
    "experiments": "experiments e",
    "checkpoints": "checkpoints c JOIN experiments e ON e.id = c.experiment_id",
}
_LAST = {"experiments": ["e.created_at DESC", "e.id"], "checkpoints": ["c.sequence DESC"]}
PROBED = 300  # rows that are tried one by one, 10 us each, before lists are made of all that meet a condition


class _Join(NamedTuple):
    """A table of one row or none for each row of a kind."""

    rows: str  # what it is, with the columns owner, number and text
    alias: str
    row: str  # the column that its owner is


@dataclass
class Compiled:
    """A piece of SQL.

    Attributes:
        kind: ``experiments`` or ``checkpoints``.
        probing: whether conditions are looked up row by row. Else each is a list that is made once, which costs less
            where many rows have to be tried.
        where: a condition.
        joins: tables that it needs.
        order: what goes behind ORDER BY.
        binds: the values, by name.
    """

    kind: str
    probing: bool = False
    where: str = "1 = 1"
    joins: list[_Join] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    binds: dict[str, Value] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """What goes behind FROM."""
        return f"{_TABLES[self.kind]}{self._left_joins(0)} WHERE {self.where}{self._order(0)}"

    def sources(self, rows: int) -> list[str]:
        """Return what to put behind FROM, one after the other, until ``rows`` rows were found.

        The last one has every row, but for probing, where there may be none.
        """
        if self.probing:
            return self._ranked() if rows <= PROBED else []
        return [*self._ranked(), self.source]

    def _ranked(self) -> list[str]:
        """Return what goes behind FROM for the rows that come first, those that have a number to sort by, if known.

        They are found in the order of the index that has the numbers, so that a short page needs no look at the others.
        When probing, no more than the first ``PROBED`` of them are tried, and none if there are no more.
        """
        if not (self.joins and self.order[0].startswith(f"{self.joins[0].alias}.")):
            return []
        rows, alias, row = self.joins[0]
        # SQLite takes the tables of a CROSS JOIN in the order in which they are named.
        tables = f"{rows} {alias} CROSS JOIN {_TABLES[self.kind]}{self._left_joins(1)}"
        where = f"{alias}.owner = {row} AND {alias}.number IS NOT NULL AND {self.where}"
        if self.probing:
            direction = self.order[1].rpartition(" ")[2]
            end = f"SELECT number FROM {rows} r WHERE number IS NOT NULL ORDER BY number {direction} LIMIT 1"
            where += f" AND {alias}.number {'<' if direction == 'ASC' else '>'} ({end} OFFSET {PROBED})"
        return [f"{tables} WHERE {where}{self._order(1)}"]

    def _left_joins(self, first: int) -> str:
        return "".join(f" LEFT JOIN {rows} {alias} ON {alias}.owner = {row}" for rows, alias, row in self.joins[first:])

    def _order(self, first: int) -> str:
        return f" ORDER BY {', '.join(self.order[first:])}" if self.order else ""


def compile_filter(
    text: str | None, kind: str, tests: Mapping[str, str], now: float, probing: bool = False
) -> Compiled:
    """Return the condition that a filter is.

    Args:
        text: the filter; None lets everything through.
        kind: ``experiments`` (table ``e``) or ``checkpoints`` (table ``c``, of the experiment ``e``).
        tests: how the database tests texts, with {column}, {text} and {length} in it.
        now: Unix seconds, for ages.
        probing: see ``Compiled``.

    Raises:
        QueryError: it cannot be understood, or names what there is not; it points at the place.
    """
    made = Compiled(kind, probing)
    if text is not None:
        made.where = _Compiler(text, tests, made, now).condition(parse(text))
    return made


def compile_order(text: str | None, made: Compiled, now: float) -> None:
    """Put an order into ``made``: fields with commas between them, each with ``desc`` or ``asc`` behind it or not.

    What has no value comes last, in either direction.

    Raises:
        QueryError: a part is no field.
    """
    parts = []
    for part in re.split(r",(?![^\[]*\])", text) if text else []:
        match = re.fullmatch(r"(.*?)(?:\s+(asc|desc))?", part.strip(), re.IGNORECASE | re.DOTALL)
        assert match is not None
        name, direction = match[1], (match[2] or "asc").upper()
        for key in compile_columns(name, made, now):
            parts += [f"{key} IS NULL", f"{key} {direction}"]
    made.order = [*parts, *_LAST[made.kind]]


def compile_columns(text: str, made: Compiled, now: float) -> list[str]:
    """Return the columns of a field, and put the joins that they need into ``made``; of a config name, number and text.

    Raises:
        QueryError: it is no field.
    """
    return _Compiler(text, {}, made, now).sort_keys(parse_field(text))


class _Column(Protocol):
    """A field in SQL; each method returns a condition that is true or false, never NULL."""

    is_whole: bool  # whether its numbers are 64-bit integers

    @property
    def sort_keys(self) -> list[str]:
        """What to sort by."""

    def meets(self, condition: str) -> str:
        """Return the condition that the field is there and ``condition``, with {number} and {text} in it, holds."""


@dataclass
class _Scalar:
    """A column of the row itself."""

    column: str
    is_text: bool
    is_whole: bool

    @property
    def sort_keys(self) -> list[str]:
        return [self.column]

    def meets(self, condition: str) -> str:
        number, text = ("NULL", self.column) if self.is_text else (self.column, "NULL")
        return f"COALESCE({condition.format(number=number, text=text)}, 1 = 0)"


@dataclass
class _Child:
    """A row of another table, which has one for each name or none."""

    owner: str
    rows: str  # SELECT owner FROM table WHERE name, and when probing, AND it is the owner
    number: str
    text: str
    sort_keys: list[str]
    is_whole: bool

    def meets(self, condition: str) -> str:
        inner = condition.format(number=self.number, text=self.text)
        return f"{self.owner} IN ({self.rows} AND {inner})"


def _joined(parts: list[str], word: str) -> str:
    if len(parts) > 100:  # SQLite takes a tree of 1,000 levels, and each word is one
        half = len(parts) // 2
        parts = [_joined(parts[:half], word), _joined(parts[half:], word)]
    return f"({word.join(parts)})"


class _Compiler:
    def __init__(self, text: str, tests: Mapping[str, str], made: Compiled, now: float) -> None:
        self._text = text
        self._kind = made.kind
        self._tests = tests
        self._made = made
        self._now = now

    def _bind(self, value: Value, is_whole: bool = False) -> str:
        if isinstance(value, (int, float)):  # an integer in a column of floats was rounded, too
            fits = is_whole and isinstance(value, int) and -(2**63) <= value < 2**63
            value = int(value) if fits else storable(value)
        name = f"q{len(self._made.binds)}"
        self._made.binds[name] = value
        return f":{name}"

    def condition(self, node: Node) -> str:
        if isinstance(node, Every):
            return _joined(list(map(self.condition, node.nodes)), " OR " if node.any else " AND ")
        if isinstance(node, Not):
            return f"(NOT {self.condition(node.node)})"
        if isinstance(node, Holds):
            return self._holds(node)
        column = self._column(node.field)
        if isinstance(node, Compare):
            return column.meets(self._comparison(node.operator, node.value, column.is_whole))
        if isinstance(node, Member):
            return self._member(node, column)
        if isinstance(node, Missing):
            return self._missing(column)
        if isinstance(node, Flag):
            return column.meets("({number} <> 0)")
        return self._text_test(node, column)

    def _missing(self, column: _Column) -> str:
        return f"(NOT {column.meets('({number} IS NOT NULL OR {text} IS NOT NULL)')})"

    def _member(self, node: Member, column: _Column) -> str:
        texts = ", ".join(self._bind(value) for value in node.values if isinstance(value, str))
        numbers = ", ".join(
            self._bind(value, column.is_whole) for value in node.values if isinstance(value, (int, float))
        )
        wanted = [column.meets(f"({{number}} IN ({numbers}))")] if numbers else []
        wanted += [column.meets(f"({{number}} IS NULL AND {{text}} IN ({texts}))")] if texts else []
        wanted += [self._missing(column)] * (None in node.values)
        return "(" + " OR ".join(wanted or ["1 = 0"]) + ")"

    def _comparison(self, operator: str, value: Value, is_whole: bool) -> str:
        place = self._bind(value, is_whole)
        if not isinstance(value, str):
            other = " OR ({number} IS NULL AND {text} IS NOT NULL)" if operator == "<>" else ""
            return f"({{number}} {operator} {place}{other})"
        other = " OR {number} IS NOT NULL" if operator == "<>" else ""
        return f"(({{number}} IS NULL AND {{text}} {operator} {place}){other})"

    def _text_test(self, node: TextTest, column: _Column) -> str:
        if node.test == "matches":
            try:
                re.compile(node.text)
            except (re.error, RecursionError, OverflowError) as error:
                raise self._error(f"{node.text!r} is no regular expression: {error}", node.field) from None
        places = {"column": "{text}", "text": self._bind(node.text), "length": str(len(node.text))}
        return column.meets("({number} IS NULL AND " + self._tests[node.test].format_map(places) + ")")

    def _holds(self, node: Holds) -> str:
        if node.field.parts not in (("tags",), ("experiment", "tags")):
            raise self._error(f"{node.field} is no set; 'in' goes with tags, or with a list of values", node.field)
        tag = self._bind(dumps(node.value))
        return f"e.id IN (SELECT experiment_id FROM tags WHERE tag = {tag}{self._of_row('tags.experiment_id', 'e.id')})"

    def _of_row(self, owner: str, row: str) -> str:
        return f" AND {owner} = {row}" if self._made.probing else ""

    def sort_keys(self, wanted: Field) -> list[str]:
        return self._column(wanted, join=True).sort_keys

    def _column(self, wanted: Field, join: bool = False) -> _Column:
        head, *rest = wanted.parts
        if head == "experiment" and rest and self._kind == "checkpoints":
            return self._of_experiment(Field(tuple(rest), wanted.column), join)
        if self._kind == "checkpoints":
            if not rest and head in _CHECKPOINT:
                return self._scalar(_CHECKPOINT[head], head)
            if (not rest and head in ("loss", "val_loss")) or (head == "metrics" and rest):
                return self._child("scores", "checkpoint_id", "c.id", str(wanted), "value", join)
        return self._of_experiment(wanted, join)

    def _of_experiment(self, wanted: Field, join: bool) -> _Column:
        head, *rest = wanted.parts
        if not rest and head in _EXPERIMENT:
            return self._scalar(_EXPERIMENT[head], head)
        if head == "config" and rest:
            return self._child("parameters", "experiment_id", "e.id", ".".join(rest), "number", join)
        if head == "metrics" and rest:
            part = rest.pop() if len(rest) > 1 and rest[-1] in _PARTS else "last"
            return self._child("series", "experiment_id", "e.id", ".".join(rest), _PARTS[part], join)
        if head == "tags":
            raise self._error("tags is a set; ask 'baseline' in tags", wanted)
        known = [*(_CHECKPOINT if self._kind == "checkpoints" else ()), *_EXPERIMENT]
        known += ["tags", "config.<name>", "metrics.<name>"]
        raise self._error(f"there is no {wanted}; there are {', '.join(dict.fromkeys(known))}", wanted)

    def _scalar(self, column: str, name: str) -> _Column:
        if ":now" in column:
            self._made.binds["now"] = self._now
        return _Scalar(column, name in _TEXTS, name in _WHOLE)

    def _child(self, table: str, owner: str, row: str, name: str, number: str, join: bool) -> _Column:
        place = self._bind(name)
        only = " AND attempt = 0" if table == "series" else ""
        text = "text" if table == "parameters" else "NULL"
        if ":largest" in number:
            self._made.binds["largest"] = LARGEST
        mine = self._of_row(f"{table}.{owner}", row)
        rows = f"SELECT {owner} FROM {table} WHERE {table}.name = {place}{only}{mine}"
        keys = []
        if join:
            alias = f"j{place[1:]}"
            columns = f"{owner} AS owner, {number} AS number, {text} AS text"
            self._made.joins.append(_Join(f"(SELECT {columns} FROM {table} WHERE name = {place}{only})", alias, row))
            keys = [f"{alias}.number", f"{alias}.text"] if table == "parameters" else [f"{alias}.number"]
        return _Child(row, rows, number, text, keys, number in _WHOLE)

    def _error(self, problem: str, wanted: Field) -> QueryError:
        return QueryError(problem, self._text, wanted.column)
