"""PyTorch's own format: one ``checkpoint.pt`` that ``torch.load(path, weights_only=True)`` reads.

The file holds ``model_state_dict``, ``optimizer_state_dict`` ... as torch users know them; beside them ``arrays`` names
the same tensors by component and key; torch stores shared memory once, so that costs names only.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any, ClassVar

from model_checkpoint.arrays import HostArray, adapter_for
from model_checkpoint.checkpoint.decoding import Decoder
from model_checkpoint.checkpoint.foreign import take_apart
from model_checkpoint.checkpoint.state import EncodedState, encode
from model_checkpoint.checkpoint.storage.base_backend import PlannedFile, Sink, StorageBackend
from model_checkpoint.errors import FormatError
from model_checkpoint.utils.optional import require

FILE_NAME = "checkpoint.pt"
FOREIGN_NAME = "foreign.pt"  # a file of torch.save that was imported as it is; it has no ``arrays``
_SHOWN = 1000  # characters of torch's message


class PyTorchBackend(StorageBackend):
    """One ``checkpoint.pt``. It is loaded with ``weights_only=True`` and never retried less safely."""

    name: ClassVar[str] = "pytorch"

    def plan(self, state: EncodedState, max_shard_size: int | None) -> list[PlannedFile]:
        require("torch", "torch", "the pytorch storage backend")
        state = EncodedState(state.tree, _own_storages(state.arrays))
        content = content_of(state, index=True)
        return [PlannedFile(FILE_NAME, None, None, lambda sink: save_content(content, sink))]

    def read(self, files: Mapping[str, memoryview]) -> dict[str, dict[str, HostArray]]:
        torch = require("torch", "torch", "the pytorch storage backend")
        name = FILE_NAME if FILE_NAME in files else FOREIGN_NAME
        file = io.BufferedReader(_MemoryFile(files[name]), 1 << 20)  # 1 MiB
        try:
            check_archive(file, files[name].nbytes)
            content = torch.load(file, weights_only=True, map_location="cpu")
            if name == FOREIGN_NAME:
                return encode(take_apart(content).components()).arrays
            return {
                component: {key: _host(tensor) for key, tensor in tensors.items()}
                for component, tensors in content["arrays"].items()
            }
        except Exception as error:  # noqa: BLE001 - torch and what it calls raise whatever they like
            raise FormatError(f"{name} does not load with weights_only=True: {reason_of(error)}") from None


def content_of(state: EncodedState, index: bool = False) -> dict[str, Any]:
    """Return a state as torch's users know it, of nothing but what ``weights_only=True`` reads.

    Args:
        state: what to store; all of its arrays become tensors that share its memory.
        index: whether to name the tensors by component and key, too.
    """
    decoder = _TorchDecoder(lambda component, key: state.arrays[component][key])
    content: dict[str, Any] = {"model_state_dict": None}
    content |= {
        f"{component}_state_dict": decoder.node(tree) for component, tree in state.tree.items() if component != "rng"
    }
    if index:
        content["arrays"] = {
            component: {key: decoder.array(component, key, array) for key, array in named.items()}
            for component, named in state.arrays.items()
        }
    return content


def save_content(content: Mapping[str, Any], sink: Sink) -> None:
    """Write what ``content_of`` made."""
    require("torch", "torch", "saving as torch does").save(content, _Stream(sink))


def check_archive(file: Any, size: int) -> None:
    """Refuse an archive that would unpack to more than it is: torch.save compresses nothing, torch.load would."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FormatError("a member of the archive is compressed")
    if sum(member.file_size for member in members) > size:
        raise FormatError("the members of the archive overlap")
    file.seek(0)


def reason_of(error: Exception) -> str:
    """Return why torch cannot load a file, without its advice to load it less safely, which is about something else."""
    advice = ("Weights only load failed", "Check the documentation")
    parts = [part.strip() for part in str(error).split("\n\n")]
    text = " ".join(part for part in parts if part and not part.startswith(advice))
    # torch quotes what it does not understand, however long that is
    return (repr(error) if isinstance(error, KeyError) or not text else text)[:_SHOWN]


def _own_storages(arrays: Mapping[str, Mapping[str, HostArray]]) -> dict[str, dict[str, HostArray]]:
    """Return the arrays with a copy of each tensor that does not have a storage to itself.

    torch.save writes whole storages: of a slice, all that it was cut from. It also refuses one storage as two dtypes.
    Arrays that are tied are one array by now, so that nothing that belongs together is separated.
    """
    made: dict[str, dict[str, HostArray]] = {}
    seen: set[int] = set()
    for component, named in arrays.items():
        made[component] = {}
        for key, array in named.items():
            tensor: Any = array.source
            if tensor is not None and array.data.nbytes:
                storage = tensor.untyped_storage()
                if storage.nbytes() != array.data.nbytes or storage.data_ptr() in seen:
                    tensor = tensor.clone()
                seen.add(storage.data_ptr())
            made[component][key] = array._replace(source=tensor)
    return made


def _host(tensor: object) -> HostArray:
    adapter = adapter_for(type(tensor))
    array = None if adapter is None else adapter.to_host(tensor)
    if array is None:
        raise FormatError(f"{FILE_NAME} holds a {type(tensor).__name__} where a tensor should be")
    return array


class _TorchDecoder(Decoder):
    """Builds what torch's own users read: nothing that ``weights_only=True`` refuses."""

    def _kind(self, kind: str) -> str:
        return "torch"

    def key(self, data: Any, name: str) -> object:
        return data  # torch has no keys; they come back from state.json

    def frozen(self, items: list[Any]) -> Any:
        return tuple(items)  # torch refuses frozensets; ours come back from state.json

    def large(self, number: int) -> Any:
        return number if number.bit_length() < 2000 else str(number)  # as it does pickle's LONG4, from 2,040 bits


class _Stream:
    """What ``torch.save`` writes to."""

    def __init__(self, sink: Sink) -> None:
        self.write = sink.write

    def flush(self) -> None:
        """Nothing is held back here; the file is made durable when it is complete."""


class _MemoryFile(io.RawIOBase):
    """A file over memory that is not copied, unlike BytesIO's."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._content.nbytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._content[self._position : self._position + len(buffer)]
        buffer[: part.nbytes] = part
        self._position += part.nbytes
        return part.nbytes
