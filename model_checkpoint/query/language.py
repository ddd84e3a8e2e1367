"""The text of a filter -> a tree. Python's own parser reads it, and a short list says what of Python it may be.

    metrics.val_loss.min < 0.3 and config.optimizer.lr >= 1e-3 and ('baseline' in tags or project == 'vision')

Nothing of it is ever run: names are looked up in a table, values become binds of a statement.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from model_checkpoint.errors import QueryError

Value = str | int | float | bool | None

MAX_LENGTH = 10_000  # characters of a filter
MAX_DEPTH = 50  # parentheses, and whatever else lies within one another
_UNITS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86_400, "weeks": 604_800}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "=",
    ast.NotEq: "<>",
}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "<>": "<>"}
_TEXT_TESTS = ("matches", "startswith", "endswith", "contains")


@dataclass(frozen=True)
class Field:
    """What is asked for: ``config.optimizer.lr`` is ``("config", "optimizer", "lr")``; its place is for errors."""

    parts: tuple[str, ...]
    column: int = 0

    def __str__(self) -> str:
        return ".".join(self.parts)


@dataclass(frozen=True)
class Compare:
    """``field operator value``; the operator is SQL's."""

    field: Field
    operator: str
    value: Value


@dataclass(frozen=True)
class Member:
    """``field in (values)``."""

    field: Field
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Holds:
    """``value in field``, where the field is a set, such as tags."""

    field: Field
    value: Value


@dataclass(frozen=True)
class Missing:
    """``field is None``."""

    field: Field


@dataclass(frozen=True)
class TextTest:
    """``field.matches(text)`` and the like."""

    field: Field
    test: str
    text: str


@dataclass(frozen=True)
class Flag:
    """A field that is itself true or false."""

    field: Field


@dataclass(frozen=True)
class Not:
    """``not node``."""

    node: Node


@dataclass(frozen=True)
class Every:
    """All of ``nodes``, or with ``any`` one of them."""

    nodes: tuple[Node, ...]
    any: bool = False


Node = Compare | Member | Holds | Missing | TextTest | Flag | Not | Every


def parse(text: str) -> Node:
    """Return the tree of a filter.

    Args:
        text: see the module.

    Raises:
        QueryError: it is no filter; the error points at the place.
    """
    return _Parser(text).parsed()


def parse_field(text: str) -> Field:
    """Return the field that ``text`` names, as in a filter.

    Raises:
        QueryError: it names none.
    """
    parser = _Parser(text)
    return parser.field(parser.tree())


class _Parser:
    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise QueryError(f"a filter is text, not {type(text).__name__}", "", 0)
        if len(text) > MAX_LENGTH:
            raise QueryError(f"the filter has {len(text):,} characters; at most {MAX_LENGTH:,}", text[:60], 0)
        self._text = text

    def error(self, problem: str, column: int) -> QueryError:
        return QueryError(problem, self._text, column)

    def at(self, node: ast.expr) -> int:
        """Return the place of a node in the text, in characters; the parser counts bytes, within lines."""
        lines = f"({self._text}".split("\n")
        row = min(node.lineno, len(lines)) - 1
        before = [*lines[:row], lines[row].encode(errors="replace")[: node.col_offset].decode(errors="ignore")]
        return max(0, len("\n".join(before)) - 1)

    def tree(self) -> ast.expr:
        """Return what Python's parser makes of the text. Within parentheses a line break is no end."""
        try:
            found = ast.parse(f"({self._text}\n)", "filter", "eval").body
        except SyntaxError as error:
            before = self._text.split("\n")[: (error.lineno or 1) - 1]
            column = sum(len(line) + 1 for line in before) + (error.offset or 1) - (1 if before else 2)
            raise self.error(f"this is no filter: {error.msg}", max(0, min(column, len(self._text)))) from None
        except (ValueError, MemoryError, RecursionError) as error:
            raise self.error(f"this is no filter: {str(error) or 'it is nested too deep'}", 0) from None
        self._check_depth(found, 0)
        return found

    def _check_depth(self, node: ast.AST, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self.error(f"the filter is nested more than {MAX_DEPTH} levels deep", 0)
        for child in ast.iter_child_nodes(node):
            self._check_depth(child, depth + 1)

    def parsed(self) -> Node:
        return self.node(self.tree())

    def node(self, tree: ast.expr) -> Node:
        if isinstance(tree, ast.BoolOp):
            return Every(tuple(map(self.node, tree.values)), isinstance(tree.op, ast.Or))
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not):
            return Not(self.node(tree.operand))
        if isinstance(tree, ast.Compare):
            sides = [tree.left, *tree.comparators]
            made = [self._compared(*link) for link in zip(sides, tree.ops, sides[1:])]
            return made[0] if len(made) == 1 else Every(tuple(made))
        if isinstance(tree, ast.Call):
            return self._text_test(tree)
        if isinstance(tree, (ast.Name, ast.Attribute, ast.Subscript)):
            return Flag(self.field(tree))
        raise self.error("here a condition is needed, such as metrics.loss.min < 0.3", self.at(tree))

    def _compared(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Node:
        if isinstance(operator, (ast.Is, ast.IsNot)):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self.error("'is' goes with None only; use ==", self.at(right))
            node: Node = Missing(self.field(left))
            return Not(node) if isinstance(operator, ast.IsNot) else node
        if isinstance(operator, (ast.In, ast.NotIn)):
            node = self._contained(left, right)
            return Not(node) if isinstance(operator, ast.NotIn) else node
        sign = _COMPARISONS[type(operator)]
        if self._is_value(left):
            left, right, sign = right, left, _TURNED[sign]
        if self._is_value(left) or not self._is_value(right):
            raise self.error("a comparison has a name on one side and a value on the other", self.at(right))
        value = self.value(right)
        if value is None:
            raise self.error("nothing compares with None; use 'is None'", self.at(right))
        return Compare(self.field(left), sign, value)

    def _contained(self, left: ast.expr, right: ast.expr) -> Node:
        if isinstance(right, (ast.Tuple, ast.List, ast.Set)):
            return Member(self.field(left), tuple(map(self.value, right.elts)))
        return Holds(self.field(right), self.value(left))

    def _text_test(self, tree: ast.Call) -> Node:
        call = tree.func
        if not isinstance(call, ast.Attribute) or call.attr not in _TEXT_TESTS:
            raise self.error(f"there is no such function; there are .{'(), .'.join(_TEXT_TESTS)}()", self.at(tree))
        text = self._only_argument(tree)
        if not isinstance(text, str):
            raise self.error(f".{call.attr}() takes one text", self.at(tree))
        return TextTest(self.field(call.value), call.attr, text)

    def _only_argument(self, tree: ast.Call) -> Value:
        if len(tree.args) != 1 or tree.keywords or isinstance(tree.args[0], ast.Starred):
            raise self.error("here one argument is needed", self.at(tree))
        return self.value(tree.args[0])

    def field(self, tree: ast.expr) -> Field:
        """Return the field of ``a.b["c"].d``."""
        parts: list[str] = []
        place = tree
        while True:
            if isinstance(place, ast.Attribute):
                parts.append(self._written(place))
                place = place.value
            elif isinstance(place, ast.Subscript) and isinstance(place.slice, ast.Constant):
                parts.append(str(place.slice.value))
                place = place.value
            elif isinstance(place, ast.Name):
                return Field((self._written(place), *reversed(parts)), self.at(tree))
            else:
                raise self.error("here a name is needed, such as config.lr", self.at(place))

    def _written(self, tree: ast.Name | ast.Attribute) -> str:
        """Return a name as the text has it: Python's parser makes another one (NFKC) of ``µ`` and its like."""
        line = re.split("\r\n?|\n", f"({self._text}")[(tree.end_lineno or 1) - 1].encode()
        start = tree.col_offset if isinstance(tree, ast.Name) else 0
        return re.split(r"[\s.\\]", line[start : tree.end_col_offset].decode())[-1]

    @staticmethod
    def _is_value(tree: ast.expr) -> bool:
        return isinstance(tree, (ast.Constant, ast.UnaryOp, ast.Call))

    def value(self, tree: ast.expr) -> Value:
        """Return the value of a literal, or of days(7) and the like in seconds."""
        if isinstance(tree, ast.Constant) and isinstance(tree.value, (str, int, float, type(None))):
            if isinstance(tree.value, str) and ("\0" in tree.value or not _is_sound(tree.value)):
                raise self.error("this text has a character that no database stores", self.at(tree))
            return tree.value
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, (ast.USub, ast.UAdd)):
            number = self.value(tree.operand)
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                return -number if isinstance(tree.op, ast.USub) else number
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _UNITS:
            number = self._only_argument(tree)
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                if not abs(number) < 2**63 / _UNITS[tree.func.id]:
                    raise self.error("this many seconds do not fit into 64 bits", self.at(tree))
                return number * _UNITS[tree.func.id]
        allowed = f"a number, a text, True, False, None, or {', '.join(f'{unit}(1)' for unit in _UNITS)}"
        raise self.error(f"here a value is needed: {allowed}", self.at(tree))


def _is_sound(text: str) -> bool:
    return text.encode("utf-8", "ignore").decode() == text
