"""Keys of a checkpoint that are called otherwise in what it is loaded into."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from model_checkpoint.checkpoint.selection import children, key_text
from model_checkpoint.errors import ConfigurationError

_SHOWN = 5  # keys that an error lists


class Rule(NamedTuple):
    """How some keys are renamed.

    Attributes:
        pattern: as the user gave it.
        new_name: returns what a whole key such as ``model.encoder.weight`` becomes, None where the rule is not for it.
    """

    pattern: str
    new_name: Callable[[str], str | None]


Rules = Sequence[Rule]


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
    except (re.error, IndexError) as error:
        raise ConfigurationError(f"rename: {pattern.pattern!r} cannot become {new!r}: {error}") from error
    return made if count else None


def _matched(pattern: re.Pattern[str], new: list[str], name: str) -> str | None:
    found = pattern.fullmatch(name)
    if found is None:
        return None
    return "".join(part for pair in zip(new, (*found.groups(), "")) for part in pair)


def rename(tree: dict[str, Any], rules: Rules) -> dict[str, str]:
    """Rename leaves of a state's tree, in place; of several rules for one the first counts.

    Returns:
        Old -> new name of those that were renamed.

    Raises:
        ConfigurationError: a rule is for no leaf, or two leaves would have one name.
    """
    if not rules:
        return {}
    leaves = [keys for name, part in tree.items() for keys in _leaves(part, (name,))]
    names = {keys: ".".join(map(key_text, keys)) for keys in leaves}
    unused = {rule.pattern for rule in rules}
    moves: dict[tuple[Any, ...], str] = {}
    for keys, name in names.items():
        for rule in rules:
            new = rule.new_name(name)
            if new is not None:
                unused.discard(rule.pattern)
                moves[keys] = new
                break
    if unused:
        shown = ", ".join(list(names.values())[:_SHOWN])
        raise ConfigurationError(f"rename: nothing in this checkpoint is called {min(unused)}; it has {shown}, ...")
    taken = {name: name for keys, name in names.items() if keys not in moves}
    for keys, new in moves.items():
        if new in taken:
            raise ConfigurationError(f"rename: both {taken[new]} and {names[keys]} would be {new}")
        taken[new] = names[keys]
    moved = [(new, _take(tree, keys)) for keys, new in moves.items() if names[keys] != new]
    for (new, node), keys in zip(moved, [keys for keys, new in moves.items() if names[keys] != new]):
        _place(tree, _keys_of(new, keys), node)
    return {names[keys]: new for keys, new in moves.items() if names[keys] != new}


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


def _leaves(tree: Any, keys: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the keys of each leaf that lies in dicts only: items of lists have no names."""
    pairs = children(tree) if isinstance(tree, dict) and "$tuple" not in tree else None
    if not pairs:
        yield keys
    for key, child in pairs or ():
        if isinstance(key, (str, int)):
            yield from _leaves(child, (*keys, key))


def _take(tree: Any, keys: tuple[Any, ...]) -> Any:
    """Remove a leaf and return it, and what holds nothing else any more."""
    key, *below = keys
    pairs = _pairs(tree)
    child = dict(children(tree) or ())[key]
    taken = _take(child, tuple(below)) if below else child
    if not below or not children(child):
        if pairs is None:
            del tree[key]
        else:
            pairs[:] = [pair for pair in pairs if pair[0] != key]
    return taken


def _keys_of(name: str, old: tuple[Any, ...]) -> list[Any]:
    """Return the keys that a new name stands for: those of the old one as far as they agree, then the rest.

    The rest is one key where it was one before, as in a module's flat ``state_dict()``; else it is split at its dots.
    """
    kept: list[Any] = []
    for key in old[:-1]:
        if not name.startswith(f"{key_text(key)}."):
            break
        kept.append(key)
        name = name[len(key_text(key)) + 1 :]
    return [*kept, name] if len(old) - len(kept) == 1 else [*kept, *name.split(".")]


def _place(tree: Any, keys: list[Any], node: Any) -> None:
    for key in keys[:-1]:
        found = dict(children(tree) or ()).get(key)
        if children(found) is None or isinstance(found, list):
            found = {}
            _place(tree, [key], found)
        tree = found
    pairs = _pairs(tree)
    if pairs is None:
        tree[keys[-1]] = node
    else:
        pairs[:] = [pair for pair in pairs if pair[0] != keys[-1]]
        pairs.append([keys[-1], node])
