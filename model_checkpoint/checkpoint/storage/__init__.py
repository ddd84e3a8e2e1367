"""Storage backends by name. Packages add theirs with the entry-point group ``model_checkpoint.storage_backends``."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from model_checkpoint.checkpoint.storage.base_backend import LinkedFile, PlannedFile, Sink, StorageBackend
from model_checkpoint.errors import ConfigurationError, UnknownBackendError

__all__ = ["LinkedFile", "PlannedFile", "Sink", "StorageBackend", "register_storage_backend", "storage_backend"]

ENTRY_POINT_GROUP = "model_checkpoint.storage_backends"

_BACKENDS: dict[str, str | type[StorageBackend]] = {
    "safetensors": "model_checkpoint.checkpoint.storage.safetensors_backend:SafeTensorsBackend",
    "pytorch": "model_checkpoint.checkpoint.storage.pytorch_backend:PyTorchBackend",
}


def register_storage_backend(name: str, backend: str | type[StorageBackend]) -> None:
    """Make ``storage_backend=name`` usable in this process.

    Args:
        name: what users write; it is stored in every manifest, so it must still be registered when loading.
        backend: the class, or ``"module:Class"``, imported on first use.

    Raises:
        ConfigurationError: the name is taken by another backend, or ``backend`` is neither.
    """
    if name in _BACKENDS and _BACKENDS[name] != backend:
        raise ConfigurationError(f"storage backend {name!r} is registered already; choose another name")
    if isinstance(backend, str) and backend.count(":") != 1:
        raise ConfigurationError(f"storage backend {name!r}: {backend!r} is not of the form 'module:Class'")
    if isinstance(backend, type):
        _check(name, backend)
    _BACKENDS[name] = backend


def storage_backend(name: str) -> StorageBackend:
    """Return the backend registered as ``name``.

    Raises:
        UnknownBackendError: no backend has that name; the text lists those that there are.
        ConfigurationError: what is registered is no ``StorageBackend``.
    """
    if not isinstance(name, str):
        raise UnknownBackendError(name, _BACKENDS)
    target = _BACKENDS.get(name)
    if target is None:
        found = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
        if name not in found:
            raise UnknownBackendError(name, {*_BACKENDS, *found})
        target = found[name]
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        try:
            target = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(f"storage backend {name!r}: cannot load {target}: {error}") from error
    return _check(name, target)()


def _check(name: str, backend: object) -> type[StorageBackend]:
    if not (isinstance(backend, type) and issubclass(backend, StorageBackend)):
        raise ConfigurationError(f"storage backend {name!r}: {backend!r} must be a subclass of StorageBackend")
    if getattr(backend, "name", None) != name:  # manifests carry the class's name, and are loaded by it
        raise ConfigurationError(f"storage backend {name!r}: {backend.__name__}.name must be {name!r}")
    missing = sorted(getattr(backend, "__abstractmethods__", ()))
    if missing:
        raise ConfigurationError(f"storage backend {name!r}: {backend.__name__} lacks {', '.join(missing)}")
    return backend
