"""Training objects behind one pair of verbs. A new library is a new module and one line in ``_ADAPTERS``.

Whatever has ``state_dict()`` and ``load_state_dict()``, or ``get_state()`` and ``set_state()``, needs no adapter.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


class Traits(NamedTuple):
    """What holds for an object and its state.

    Attributes:
        complete: its keys are always the same, as a module's are; an optimizer's come and go.
        together: its parts belong together, as an optimizer's: all of it is restored, or nothing.
        grows: it takes arrays of whatever shape, or none, where it has others, as an early stopping's best does.
        replaces: it can never change: ``put_back`` makes a new one in its place.
        opaque: its state is one block, which only the object can judge: it is not compared key by key.
        kind: what stands as ``class`` in an opaque state: an object of another class cannot take it.
        setter: the name of its method that ``put_back`` calls; None where that calls none.
        plain_name: returns what a key of its state is called without what wrappers of the object add to it.
    """

    complete: bool = True
    together: bool = False
    grows: bool = False
    replaces: bool = False
    opaque: bool = False
    kind: str | None = None
    setter: str | None = None
    plain_name: Callable[[str], str] = str


class ObjectAdapter(ABC):
    """The verbs, the same for the objects of every library; each adapter is one module of this folder."""

    @abstractmethod
    def owns(self, value: object) -> bool:
        """Whether ``value`` is an object that this adapter takes apart."""

    def traits(self, value: object) -> Traits:
        """Return what holds for ``value``."""
        return Traits()

    def objection(self, value: object, tree: Any) -> str | None:
        """Return why ``value`` cannot take what was saved, where keys and shapes do not tell; None where it can.

        Args:
            tree: the JSON tree of what was saved, as ``state.py`` tells; it is no opaque state.
        """
        return None

    def refusal(self, value: object, state: object) -> str | None:
        """Return why ``value`` cannot take an opaque state; None where it can. Nothing is changed."""
        return None

    @abstractmethod
    def state_of(self, value: object) -> object:
        """Return the state: nested dicts, lists and tuples of arrays, other objects and plain values; not copied.

        Raises:
            ValueError: it has no state that can be stored; the text says why and what to do.
        """

    @abstractmethod
    def put_back(self, value: object, state: object) -> object:
        """Give ``value`` a state of the form that ``state_of`` returns.

        Returns:
            ``value``, or where that can never change a new object in its place.

        Raises:
            ValueError: it cannot take it.
        """


# Top-level module of the object's class -> where its adapter is. Loaded when such an object is met.
_ADAPTERS = {
    "flax": "model_checkpoint.checkpoint.objects.flax:FlaxAdapter",
    "keras": "model_checkpoint.checkpoint.objects.keras:KerasAdapter",
    "numpy": "model_checkpoint.checkpoint.objects.generators:NumpyAdapter",
    "random": "model_checkpoint.checkpoint.objects.generators:RandomAdapter",
    "sklearn": "model_checkpoint.checkpoint.objects.sklearn:SklearnAdapter",
    "tensorflow": "model_checkpoint.checkpoint.objects.tensorflow:TensorflowAdapter",
    "torch": "model_checkpoint.checkpoint.objects.torch:TorchAdapter",
    "xgboost": "model_checkpoint.checkpoint.objects.xgboost:XgboostAdapter",
}
_STATE_DICT = "model_checkpoint.checkpoint.objects.methods:StateDictAdapter"
_GET_STATE = "model_checkpoint.checkpoint.objects.methods:GetStateAdapter"
_PYTREE = "model_checkpoint.checkpoint.objects.jax:PytreeAdapter"
_loaded: dict[str, ObjectAdapter] = {}


def find(value: object) -> ObjectAdapter | None:
    """Return the adapter that takes ``value`` apart, or None: it is no object with a state that is known here."""
    if isinstance(value, type):
        return None
    libraries = {base.__module__.partition(".")[0]: None for base in type(value).__mro__[:-1]}
    targets = [_ADAPTERS[library] for library in libraries if library in _ADAPTERS]
    targets += [_STATE_DICT, _GET_STATE]
    if "jax" in sys.modules:
        targets.append(_PYTREE)
    for target in targets:
        adapter = _load(target)
        if adapter.owns(value):
            return adapter
    return None


def _load(target: str) -> ObjectAdapter:
    if target not in _loaded:
        module, name = target.split(":")
        _loaded[target] = getattr(import_module(module), name)()
    return _loaded[target]
