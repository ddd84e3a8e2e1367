"""The tensors of SafeTensors files as a model's state, with those that are tied as one."""

from __future__ import annotations

from collections.abc import Mapping

from model_checkpoint.arrays import HostArray, adapter_for, from_host
from model_checkpoint.checkpoint.storage.safetensors_backend import read_file
from model_checkpoint.errors import FormatError, MissingDependencyError

_KINDS = {"np": "numpy", "numpy": "numpy", "tf": "numpy", "mlx": "numpy", "flax": "jax", "jax": "jax"}


def model_of(contents: list[memoryview], path: str) -> tuple[dict[str, object], dict[str, str]]:
    """Return the tensors of files by name, and what else the files say of themselves.

    The tensors are arrays of the library that they are said to be of, which is torch where nothing is said; where that
    is not installed, of NumPy.

    Args:
        contents: whole files; the arrays share this memory.
        path: where they came from, for errors.

    Raises:
        FormatError: the content breaks the rules of the format, or a tensor is in two files.
        MissingDependencyError: no library that is installed has arrays of such a type.
    """
    model: dict[str, object] = {}
    told: dict[str, str] = {}
    for content in contents:
        try:
            arrays, metadata = read_file(content)
        except FormatError as error:
            raise FormatError(f"{path} is damaged: {error}") from None
        twice = model.keys() & arrays.keys()
        if twice:
            raise FormatError(f"{path} has {min(twice)!r} in two files")
        kind = _KINDS.get(metadata.pop("format", ""), "torch")
        model |= {key: _made(array._replace(kind=kind)) for key, array in arrays.items()}
        told |= metadata
    # As safetensors.torch.save_model does: of tensors that are one, the others' names are in the metadata.
    ties = {name: kept for name, kept in told.items() if kept in model and name not in model}
    rest = {name: value for name, value in told.items() if name not in ties}
    return model | {name: model[kept] for name, kept in ties.items()}, rest


def _made(array: HostArray) -> object:
    made = from_host(array)
    adapter = adapter_for(type(made))
    try:
        stored = None if adapter is None else adapter.to_host(made)
    except ValueError:
        stored = None
    if stored is None or (stored.dtype, stored.shape) != (array.dtype, array.shape):
        library = "torch" if array.kind == "torch" else "numpy"
        raise MissingDependencyError(library, library, f"importing a tensor of {array.dtype}{list(array.shape)}")
    return made


def library(tensors: Mapping[str, HostArray]) -> str:
    """Return what SafeTensors calls the library of the tensors; torch, unless all are of one other."""
    kinds = {array.kind.partition(".")[0] for array in tensors.values()}
    return {"numpy": "np", "jax": "flax"}.get(kinds.pop(), "pt") if len(kinds) == 1 else "pt"
