"""Experiments under experiments, and what they come to together. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Totals:
    """What experiments come to together.

    Attributes:
        experiments: how many there are.
        running, completed, failed, interrupted: how many of them are in each status.
        points: metric points.
        checkpoints, bytes: checkpoints that there are, and the bytes of their files.
    """

    experiments: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    interrupted: int = 0
    points: int = 0
    checkpoints: int = 0
    bytes: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values())))


@dataclass(frozen=True)
class Project:
    """A group of experiments.

    Attributes:
        name: None stands for the experiments that are in no project.
        tags, metadata: what ``ExperimentTracker.describe_project`` has given it.
        totals: of its experiments.
    """

    name: str | None
    tags: tuple[Any, ...]
    metadata: Mapping[str, Any]
    totals: Totals


@dataclass
class ExperimentNode:
    """One experiment in a tree.

    Attributes:
        id, name, project, parent_id, status, created_at: see ``ExperimentRecord``.
        own: its own totals.
        children: the experiments right below it, oldest first.
    """

    id: str
    name: str
    project: str | None
    parent_id: str | None
    status: str
    created_at: float
    own: Totals
    children: list[ExperimentNode] = field(default_factory=list)

    @property
    def totals(self) -> Totals:
        """Of itself and everything below it."""
        found, waiting = Totals(), [self]
        while waiting:
            node = waiting.pop()
            found += node.own
            waiting += node.children
        return found

    def lines(self, indent: str = "") -> list[str]:
        """Return the tree as text, a line an experiment."""
        placed: list[tuple[str, ExperimentNode]] = []
        waiting = [(indent, self)]
        while waiting:
            placed.append(waiting.pop())
            inner = f"{placed[-1][0]}  "
            waiting += [(inner, child) for child in reversed(placed[-1][1].children)]
        below: dict[str, int] = {}  # id -> checkpoints of it and everything below it
        for _, node in reversed(placed):
            below[node.id] = node.own.checkpoints + sum(below[child.id] for child in node.children)
        return [f"{at}{node.name} ({node.status}, {below[node.id]} checkpoints) {node.id}" for at, node in placed]


def build_tree(rows: Iterable[tuple[Any, ...]]) -> dict[str, ExperimentNode]:
    """Return id -> node of (id, name, project, parent id, status, created at, points, checkpoints, bytes)."""
    nodes: dict[str, ExperimentNode] = {}
    for experiment_id, name, project, parent_id, status, created_at, points, checkpoints, size in rows:
        own = Totals(1, points=points, checkpoints=checkpoints, bytes=int(size), **{status: 1})
        nodes[experiment_id] = ExperimentNode(experiment_id, name, project, parent_id, status, created_at, own)
    for node in nodes.values():
        if node.parent_id in nodes:
            nodes[node.parent_id].children.append(node)
    return nodes
