"""Training state <-> a JSON tree of plain values plus named arrays in host memory. No pickle, no framework imported.

The tree is ordinary JSON; what JSON cannot say is an object with a key that begins with ``$``:
``{"$tuple": [...]}``, ``{"$dict": [[key, value], ...]}``, ``{"$ordered": ...}``, ``{"$set": [...]}``,
``{"$int": "0x..."}``, ``{"$float": "nan"}``, ``{"$complex": [re, im]}``, ``{"$torch": "float32"}``,
``{"$key": "threefry2x32", "data": ...}`` (a typed key of JAX), ``{"$array": key, ...}``. A named tuple's fields stand
beside ``$tuple``.
"""

from __future__ import annotations

import json
import random
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from model_checkpoint.arrays import DTYPES, HostArray, Layout, adapter_for, settle
from model_checkpoint.checkpoint.objects import find
from model_checkpoint.checkpoint.ties import Placed, merge_overlaps
from model_checkpoint.errors import UnsupportedValueError

_ADVICE = (
    "pass arrays, numbers, strings, bytes, lists, tuples, dicts, or an object with state_dict() or get_state(); "
    "nothing is pickled, so convert it to one of these first"
)
MAX_DEPTH = 100  # containers within containers; decoding takes up to five frames a level of Python's 1,000
_ATOMS = (str, bool, type(None))


class EncodedState(NamedTuple):
    """A state as it is stored.

    Attributes:
        tree: component name (``model``, ``optimizer``, ...) -> its JSON tree.
        arrays: component name -> key -> the array; the memory is borrowed from the caller's objects.
    """

    tree: dict[str, Any]
    arrays: dict[str, dict[str, HostArray]]


to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode  # of trees: the text of ``state.json``


def encode(components: Mapping[str, object], random_too: bool = False) -> EncodedState:
    """Take training objects apart.

    Args:
        components: name -> object: anything with ``state_dict()``, or a nested dict, list or tuple of arrays, such
            objects and plain values; None for one that there is not. Nothing of it is changed.
        random_too: whether to note the random states of the process, as the component ``rng``.

    Raises:
        UnsupportedValueError: a value that has no safe form; it names the path, the type and what to do.
    """
    encoder = _Encoder()
    for name, value in components.items():
        if value is None:
            continue
        encoder.component = encoder.arrays.setdefault(name, {})
        encoder.tree[name] = encoder.node(value, (name,))
    placed = sorted(encoder.placed, key=_address)
    if placed and placed[-1][0].device != "cpu":  # layouts sort by device: "cuda:0" comes after "cpu"
        settle()
    end = 0
    for layout, span, _ in placed:
        if layout.address < end:
            merge_overlaps(encoder.arrays, placed, encoder.kept)
            break
        end = layout.address + span
    if random_too:
        encoder.tree["rng"] = random_states()
    return EncodedState(encoder.tree, encoder.arrays)


_address = itemgetter(0)  # a Layout sorts by device, then address


def path_text(path: tuple[object, ...]) -> str:
    """Return ``("config", "betas", 1)`` as ``config.betas[1]``, as errors print it."""
    text = str(path[0])
    for part in path[1:]:
        text += f".{part}" if isinstance(part, str) else f"[{part!r}]"
    return text


_TO_HOST: WeakKeyDictionary[type, Callable[[object], HostArray | None] | None] = WeakKeyDictionary()


class _Encoder:
    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.arrays: dict[str, dict[str, HostArray]] = {}
        self.component: dict[str, HostArray] = {}
        self.kept: list[object] = []  # every array met, so that no address is used a second time while encoding
        self.placed: list[Placed] = []
        self._tied: dict[object, dict[str, Any]] = {}
        self._open: set[int] = set()

    def node(self, value: Any, path: tuple[object, ...]) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int:
            return value if value.bit_length() < 64 else {"$int": hex(value)}
        if kind is float:
            return value if value - value == 0 else {"$float": repr(value)}
        if kind in (dict, list, tuple, OrderedDict):
            return self._container(value, kind, path)
        if kind not in _TO_HOST:
            adapter = adapter_for(kind)
            _TO_HOST[kind] = None if adapter is None else adapter.to_host
        to_host = _TO_HOST[kind]
        if to_host is not None:
            try:
                array = to_host(value)
            except ValueError as error:
                raise UnsupportedValueError(path_text(path), value, str(error)) from error
            if array is not None:
                return self._array(value, array, path)
        return self._rare(value, kind, path)

    def _array(self, value: object, array: HostArray, path: tuple[object, ...]) -> dict[str, Any]:
        tie = (array.kind, array.identity)
        if array.identity is not None and tie in self._tied:
            return self._tied[tie]
        key = ".".join(map(str, path[1:])) or str(path[0])
        key = key.encode("utf-8", "backslashreplace").decode()
        base, copies = key, 1
        while key in self.component or key == "__metadata__":  # {"a.b": x, "a": {"b": y}}, or SafeTensors' own name
            copies += 1
            key = f"{base}#{copies}"
        self.component[key] = array
        self.kept.append(value)
        reference = {
            "$array": key,
            "of": str(path[0]),
            "kind": array.kind,
            "dtype": array.dtype,
            "shape": list(array.shape),
        }
        if array.identity is not None:
            self._tied[tie] = reference
            if isinstance(array.identity, Layout):
                reach = sum([(n - 1) * s for n, s in zip(array.shape, array.identity.strides)]) + 1
                self.placed.append((array.identity, reach * DTYPES[array.dtype].bits // 8, reference))
        return reference

    def _container(self, value: Any, kind: type, path: tuple[object, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise UnsupportedValueError(path_text(path[:4]), value, f"it is nested more than {MAX_DEPTH} levels deep")
        if id(value) in self._open:
            raise UnsupportedValueError(path_text(path), value, "it contains itself; break the cycle first")
        self._open.add(id(value))
        node = self.node
        made: Any
        if kind is dict or kind is OrderedDict:
            named = kind is dict
            for k in value:
                named = named and type(k) is str and not k.startswith("$")
            if named:
                made = {}
                for k, v in value.items():
                    made[k] = node(v, (*path, k))
            else:
                pairs = [[node(k, (*path, k)), node(v, (*path, k))] for k, v in value.items()]
                made = {"$dict" if kind is dict else "$ordered": pairs}
                if hasattr(value, "_metadata"):  # what torch hangs on a state_dict: versions of each module's layout
                    made["metadata"] = node(value._metadata, (*path, "_metadata"))
        else:
            fields = getattr(value, "_fields", None) if kind is tuple else None
            items = [node(v, (*path, i)) for i, v in zip(fields or range(len(value)), value)]
            made = items if kind is list else {"$tuple": items, "fields": list(fields)} if fields else {"$tuple": items}
        self._open.discard(id(value))
        return made

    def _key(self, value: Any, path: tuple[object, ...]) -> dict[str, Any]:
        from jax import random  # its own key is here, so it is loaded

        return {"$key": str(random.key_impl(value)), "data": self.node(random.key_data(value), path)}

    def _rare(self, value: Any, kind: type, path: tuple[object, ...]) -> Any:
        if kind.__name__ == "PRNGKeyArray" and kind.__module__.startswith("jax."):
            return self._key(value, path)
        adapter = find(value)
        if adapter is not None:
            try:
                state = adapter.state_of(value)
            except ValueError as error:
                raise UnsupportedValueError(path_text(path), value, str(error)) from error
            self.kept.append(state)
            return self.node(state, path)
        if kind is complex:
            return {"$complex": [self.node(value.real, path), self.node(value.imag, path)]}
        if kind in (set, frozenset):
            try:
                ordered = sorted(value)
            except TypeError:
                ordered = list(value)
            return {f"${kind.__name__}": self._container(ordered, list, path)}
        if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
            return {"$torch": str(value), "type": kind.__name__}
        for base in (OrderedDict, dict, list, tuple):  # subclasses, such as defaultdict, torch.Size and named tuples
            if isinstance(value, base):
                return self._container(value, base, path)
        if isinstance(value, str):  # an Enum or the like: what it is beneath, not what str() makes of it
            return str.__str__(value)
        for plain in (int, float):
            if isinstance(value, plain):
                return self.node(plain(value), path)
        raise UnsupportedValueError(path_text(path), value, _ADVICE)


def random_states() -> dict[str, Any]:
    """Return the random states of the process as JSON values: Python's, and those of libraries that are imported.

    ``rng.setters`` puts them back. JAX has none: its keys are part of the state that is saved. Of TensorFlow they are
    what operations draw their seeds from, and the global generator; of Keras, the global seed generator.
    """
    version, words, gauss = random.getstate()
    noted: dict[str, Any] = {"python": {"version": version, "words": array("I", words).tobytes().hex(), "gauss": gauss}}
    numpy: Any = sys.modules.get("numpy.random")
    if hasattr(numpy, "get_state"):  # another thread may be importing it
        noted["numpy"] = numpy.get_state(legacy=False)
        for parts in (noted["numpy"], noted["numpy"]["state"]):
            for name, part in parts.items():
                if hasattr(part, "tolist"):
                    parts[name] = part.tolist()
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "get_rng_state"):
        noted["torch"] = {"cpu": bytes(torch.get_rng_state().tolist()).hex(), "cuda": []}
        if torch.cuda.is_initialized():
            for state in torch.cuda.get_rng_state_all():
                noted["torch"]["cuda"].append(bytes(state.tolist()).hex())
    eager = sys.modules.get("tensorflow.python.eager.context")
    if eager is not None and hasattr(sys.modules.get("tensorflow"), "random"):
        context = eager.context_safe()
        seed, rng = getattr(context, "_seed", None), getattr(context, "_rng", None)
        _, words, gauss = (None, (), None) if rng is None else rng.getstate()
        made = sys.modules["tensorflow.python.ops.stateful_random_ops"].global_generator
        generator = None if made is None else {"alg": made.algorithm, "state": made.state.numpy().tolist()}
        noted["tensorflow"] = {"seed": seed, "words": list(words), "gauss": gauss, "generator": generator}
    keras = sys.modules.get("keras.src.backend.common.global_state")
    made = None if keras is None else keras.get_global_attribute("global_seed_generator")
    if made is not None:
        noted["keras"] = sys.modules["keras"].ops.convert_to_numpy(made.state.value).tolist()
    return noted
