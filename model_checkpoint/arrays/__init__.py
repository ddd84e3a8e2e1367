"""Array libraries behind one pair of verbs. A new library is a new module and one line in ``_ADAPTERS``."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from model_checkpoint.arrays.dtypes import CODES, DTYPES, DType
from model_checkpoint.arrays.host import ArrayAdapter, HostArray, Layout
from model_checkpoint.errors import ConfigurationError, MissingDependencyError

__all__ = [
    "CODES",
    "DTYPES",
    "FRAMEWORKS",
    "ArrayAdapter",
    "DType",
    "HostArray",
    "Layout",
    "adapter_for",
    "check_framework",
    "fill",
    "from_host",
    "kind_in",
    "settle",
    "touched",
    "view",
]

# Top-level module of the array's type -> where its adapter is. Loaded when such an array is met, so the library is
# imported already: we never import one to find out whether an object is its own.
_ADAPTERS = {
    "builtins": "model_checkpoint.arrays.plain:PlainAdapter",
    "array": "model_checkpoint.arrays.plain:PlainAdapter",
    "numpy": "model_checkpoint.arrays.numpy:NumpyAdapter",
    "ml_dtypes": "model_checkpoint.arrays.numpy:NumpyAdapter",
    "torch": "model_checkpoint.arrays.torch:TorchAdapter",
    "jax": "model_checkpoint.arrays.jax:JaxAdapter",
    "jaxlib": "model_checkpoint.arrays.jax:JaxAdapter",
    "tensorflow": "model_checkpoint.arrays.tensorflow:TensorflowAdapter",
}
FRAMEWORKS = ("numpy", "torch", "jax", "tensorflow")  # what arrays of the others can be loaded as
_loaded: dict[str, ArrayAdapter] = {}


def _adapter(library: str) -> ArrayAdapter:
    target = _ADAPTERS[library]
    if target not in _loaded:
        module, name = target.split(":")
        _loaded[target] = getattr(import_module(module), name)()
    return _loaded[target]


def adapter_for(kind: type) -> ArrayAdapter | None:
    """Return the adapter for values of type ``kind`` (its base classes count too), or None."""
    for base in kind.__mro__[:-1]:  # without object, which is in builtins too
        library = base.__module__.partition(".")[0]
        if library in _ADAPTERS:
            return _adapter(library)
    return None


def settle() -> None:
    """Wait until the ``data`` of every array that ``to_host`` returned to this thread is whole."""
    for adapter in list(_loaded.values()):  # another thread may load one meanwhile
        adapter.settle()


def fill(target: object, array: HostArray) -> None:
    """Copy the values of ``array`` into ``target``, an array of the same dtype and shape, wherever it is."""
    adapter = adapter_for(type(target))
    if adapter is None:
        raise TypeError(f"{type(target).__name__} is no array")
    adapter.fill(target, array)


def touched(target: object) -> None:
    """Tell the library of ``target`` that its memory was written without it."""
    adapter = adapter_for(type(target))
    if adapter is not None:
        adapter.touched(target)


def view(base: object, layout: Layout, offset: int) -> object:
    """Return the part of the 1-D array ``base`` that ``layout`` describes, ``offset`` elements in; memory is shared."""
    return _adapter(type(base).__module__.partition(".")[0]).view(base, layout, offset)


def from_host(array: HostArray, device: object = None) -> object:
    """Return the array as what wrote it where that library is installed, else as NumPy's, else as a memoryview."""
    library = array.kind.partition(".")[0].partition(":")[0]
    for candidate in (library if library in _ADAPTERS else "builtins", "numpy"):
        try:
            return _adapter(candidate).from_host(array, device)
        except MissingDependencyError:
            continue
    return _adapter("builtins").from_host(array._replace(kind="memoryview"))


def check_framework(name: object) -> None:
    """Raise ConfigurationError unless ``name`` is one of FRAMEWORKS, MissingDependencyError unless it is installed."""
    if name not in FRAMEWORKS:
        raise ConfigurationError(f"framework must be one of {', '.join(FRAMEWORKS)}, or None; not {name!r}")
    if find_spec(str(name)) is None:
        raise MissingDependencyError(str(name), str(name), f"loading with framework={name!r}")


def kind_in(framework: str, kind: str) -> str:
    """Return the kind that an array of ``kind`` has in another framework; strings of bytes are values, and stay."""
    stays = kind in ("bytes", "bytearray") or kind.partition(".")[0] == framework
    return kind if stays else framework
