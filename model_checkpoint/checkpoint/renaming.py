"""Keys of a checkpoint that are called otherwise in what it is loaded into."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from model_checkpoint.checkpoint.objects import find
from model_checkpoint.checkpoint.selection import children
from model_checkpoint.errors import ConfigurationError

Keys = tuple[Any, ...]  # that lead to a part of a state, the component's name first

_SHOWN = 5  # keys that an error lists
_COMPONENTS = ("model", "optimizer", "scheduler", "extra")


class Rule(NamedTuple):
    """How some keys are renamed.

    Attributes:
        pattern: as the user gave it.
        new_name: returns what a whole name such as ``model.encoder.weight`` becomes, None where the rule is not for it.
    """

    pattern: str
    new_name: Callable[[str], str | None]


Rules = Sequence[Rule]


class Taken(NamedTuple):
    """A leaf that was taken out of a tree.

    Attributes:
        node: what the tree says of it.
        key: its key in the dict, list or tuple that it was in.
        metadata: what torch hangs on the state of the module that it is of; None where it is of none.
    """

    node: Any
    key: Any
    metadata: dict[str, Any] | None


def name_of(keys: Keys) -> str:
    """Return how messages and users call what ``keys`` lead to; the same as ``selection`` calls what was saved."""
    return ".".join(name_of(key) if isinstance(key, tuple) else str(key) for key in keys)


def check_rules(rename: object) -> Rules:
    """Return what a user gave as ``rename``.

    Args:
        rename: old name -> new name, both whole, such as ``model.encoder.weight``. Each ``*`` of an old name stands for
            any text, which takes the place of the ``*`` of the same number in the new one. A compiled regular
            expression is searched for in names, and replaced as by ``re.sub``.

    Raises:
        ConfigurationError: it is no such mapping; the text says what is wrong.
    """
    if rename is None:
        return ()
    if not isinstance(rename, Mapping):
        raise ConfigurationError(f"rename must be a mapping of old to new names, not {rename!r}")
    rules = []
    for old, new in rename.items():
        if not isinstance(new, str) or not new or not isinstance(old, (str, re.Pattern)):
            raise ConfigurationError(f"rename: {old!r}: {new!r} must be two names such as 'model.encoder.weight'")
        if isinstance(old, re.Pattern):
            rules.append(Rule(repr(old.pattern), partial(_searched, old, new)))
            continue
        if old.count("*") != new.count("*"):
            raise ConfigurationError(f"rename: {old!r} and {new!r} must have as many '*'")
        whole = re.compile("(.*)".join(map(re.escape, old.split("*"))), re.DOTALL)
        rules.append(Rule(repr(old), partial(_matched, whole, new.split("*"))))
    return rules


def _searched(pattern: re.Pattern[str], new: str, name: str) -> str | None:
    try:
        made, count = pattern.subn(new, name)
    except (re.error, IndexError, TypeError) as error:
        raise ConfigurationError(f"rename: {pattern.pattern!r} cannot become {new!r}: {error}") from error
    return made if count else None


def _matched(pattern: re.Pattern[str], new: list[str], name: str) -> str | None:
    found = pattern.fullmatch(name)
    if found is None:
        return None
    return "".join(part for pair in zip(new, (*found.groups(), "")) for part in pair)


def rename(tree: dict[str, Any], rules: Rules, targets: Mapping[str, object], decode: Any) -> dict[str, str]:
    """Rename leaves of a state's tree, in place; of several rules for one the first counts.

    A leaf goes where the targets have one of its new name, however their dicts, lists and objects are nested. It takes
    the place of a saved one that has that name and is not renamed itself.

    Args:
        tree: component -> its tree.
        rules, targets: what to rename, and what the checkpoint is for, by component.
        decode: makes an object of a node of the tree, such as a key.

    Returns:
        Old -> new name of those that were renamed.

    Raises:
        ConfigurationError: a rule is for no leaf, two leaves would have one name, or one would lie within another one.
    """
    if not rules:
        return {}
    names = {name_of(keys): keys for name, part in tree.items() for keys in _leaves(part, (name,), decode)}
    moves, unused = _moves(names, rules)
    if unused:
        shown = ", ".join([*names][:_SHOWN])
        raise ConfigurationError(f"rename: nothing in this checkpoint is called {min(unused)}; it has {shown}, ...")
    wanted = {name_of(keys): keys for name, target in targets.items() for keys in _leaves_of(target, (name,))}
    taken: dict[str, Taken] = {}
    replaced = [name for name in moves.values() if name in names and name not in moves]
    for old in [*moves, *replaced]:
        taken[old] = _take(tree, names[old], decode)
    for old, new in moves.items():
        keys = wanted.get(new) or _within(new, names[old], wanted) or _keys_of(new, names[old])
        if not _place(tree, keys, taken[old], decode):
            raise ConfigurationError(f"rename: {old} would be {new}, and something lies around or within that")
    return moves


def _moves(names: Mapping[str, Keys], rules: Rules) -> tuple[dict[str, str], set[str]]:
    """Return old -> new name, and the patterns that are for nothing."""
    unused = {rule.pattern for rule in rules}
    moves: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name in names:
        for rule in rules:
            new = rule.new_name(name)
            if new is None:
                continue
            unused.discard(rule.pattern)
            if new.partition(".")[0] not in _COMPONENTS or "." not in new:
                raise ConfigurationError(
                    f"rename: {name} would be {new!r}; names begin with {', '.join(part + '.' for part in _COMPONENTS)}"
                )
            if origin.setdefault(new, name) != name:
                raise ConfigurationError(f"rename: both {origin[new]} and {name} would be {new}")
            moves |= {} if new == name else {name: new}
            break
    return moves, unused


def rename_key(tree: dict[str, Any], old: str, new: str) -> None:
    """Rename a key of one dict of a state's tree, in place."""
    pairs = _pairs(tree)
    if pairs is not None:
        for pair in pairs:
            pair[0] = new if pair[0] == old else pair[0]
    else:
        tree[new] = tree.pop(old)


def _pairs(tree: dict[str, Any]) -> list[list[Any]] | None:
    """Return the pairs of a dict that JSON's objects cannot hold, because of its keys or their order; else None."""
    return next((tree[tag] for tag in ("$dict", "$ordered") if tag in tree), None)


def _leaves(tree: Any, keys: Keys, decode: Any) -> Iterator[Keys]:
    pairs = children(tree)
    if not pairs:
        yield keys
    for key, child in pairs or ():
        yield from _leaves(child, (*keys, decode(key)), decode)


def _leaves_of(target: Any, keys: Keys) -> Iterator[Keys]:
    """Yield the keys of all leaves of an object, or of nested dicts, lists and tuples of objects."""
    adapter = None if type(target) in (dict, list, tuple) else find(target)
    if adapter is not None and not adapter.traits(target).opaque:
        try:
            target = adapter.state_of(target)
        except ValueError:
            return  # told when it is compared
    if isinstance(target, Mapping):
        pairs = list(target.items())
    elif isinstance(target, (list, tuple)):
        pairs = list(zip(getattr(target, "_fields", range(len(target))), target))
    else:
        yield keys
        return
    for key, child in pairs:
        yield from _leaves_of(child, (*keys, key))


def _take(tree: Any, keys: Keys, decode: Any) -> Taken:
    """Remove a leaf, and what holds nothing else any more."""
    key, *below = keys
    node, child = next(pair for pair in children(tree) or () if decode(pair[0]) == key)
    if below:
        taken = _take(child, tuple(below), decode)
        if children(child):
            return taken
    else:
        taken = Taken(child, key, tree.get("metadata") if isinstance(tree, dict) else None)
    if isinstance(tree, list) or "$tuple" in tree:
        items = tree if isinstance(tree, list) else tree["$tuple"]
        items[:] = [item for item in items if item is not child]
    elif _pairs(tree) is None:
        del tree[node]
    else:
        _pairs(tree)[:] = [pair for pair in _pairs(tree) or () if pair[0] != node]  # type: ignore[index]
    return taken


def _within(name: str, old: Keys, wanted: Mapping[str, Keys]) -> Keys | None:
    """Return keys for a name that lies within what a target has: an opaque object, or something that is empty yet."""
    for length in range(1, len(old)):
        around = wanted.get(name.removesuffix(f".{name_of(old[-length:])}"))
        if around is not None:
            return (*around, *old[-length:])
    return None


def _keys_of(name: str, old: Keys) -> Keys:
    """Return keys for a name that no target has: those of the old one as far as they agree, then the rest as one."""
    kept: list[Any] = []
    for key in old[:-1]:
        if not name.startswith(f"{name_of((key,))}."):
            break
        kept.append(key)
        name = name[len(name_of((key,))) + 1 :]
    return (*kept, name) if kept else tuple(name.split(".", 1))


def _place(tree: Any, keys: Keys, taken: Taken, decode: Any) -> bool:
    """Put a leaf into a tree; returns whether there was room for it."""
    metadata = taken.metadata
    for i, key in enumerate(keys[:-1]):
        pairs = {decode(known): child for known, child in children(tree) or ()}
        if key not in pairs:
            ordered = metadata is not None and i == len(keys) - 2
            plain = isinstance(keys[i + 1], str) and not keys[i + 1].startswith("$")
            made: Any = {"$ordered": [], "metadata": {"$ordered": []}} if ordered else {} if plain else {"$dict": []}
            if not _insert(tree, key, made):
                return False
            pairs[key] = made
        tree = pairs[key]
        if children(tree) is None:
            return False
    if keys[-1] in {decode(known) for known, _ in children(tree) or ()}:
        return False
    if metadata is not None and isinstance(tree, dict) and "metadata" in tree:
        own, of_old = tree["metadata"]["$ordered"], dict(metadata["$ordered"])
        for old, new in (
            (taken.key, keys[-1]),
            ("", ""),
        ):  # torch notes versions by the module's name, of the whole by ""
            old, new = str(old).rpartition(".")[0], str(new).rpartition(".")[0]
            if old in of_old and new not in dict(own):
                own.append([new, of_old[old]])
    return _insert(tree, keys[-1], taken.node)


def _insert(tree: Any, key: Any, node: Any) -> bool:
    pairs = None if isinstance(tree, list) else _pairs(tree)
    if pairs is not None:
        pairs.append([{"$tuple": list(key)} if isinstance(key, tuple) else key, node])
    elif isinstance(tree, list) or "$tuple" in tree:
        items = tree if isinstance(tree, list) else tree["$tuple"]
        if key != len(items):
            return False
        items.append(node)
    elif isinstance(key, str) and not key.startswith("$"):
        tree[key] = node
    else:
        return False
    return True
