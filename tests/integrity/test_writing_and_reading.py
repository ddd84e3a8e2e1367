"""The parallel writer and reader: digests, states between chunks, threads, memory, and disks that refuse."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers_storage import Store, needs_zstandard

import model_checkpoint.integrity.sha256 as sha256
from model_checkpoint import register_storage_backend
from model_checkpoint.checkpoint.storage import PlannedFile
from model_checkpoint.checkpoint.storage.safetensors_backend import SafeTensorsBackend
from model_checkpoint.errors import FormatError, IntegrityError, StorageError
from model_checkpoint.integrity.sha256 import CHUNK, Sha256

ROOT = Path(__file__).parents[2]
HEADER = 8 + len(b'{"w":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}') + 40  # about, and rounded up by the format
AROUND = [CHUNK // 2, CHUNK - HEADER, CHUNK, 2 * CHUNK - HEADER, 2 * CHUNK + 8, 3 * CHUNK + CHUNK // 2]
needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory are reset by Linux's /proc/self/clear_refs"
)
needs_libcrypto = pytest.mark.skipif(not sha256.can_resume(), reason="no libcrypto here: files are verified whole")


def words(nbytes: int, seed: int = 1) -> array[int]:
    """Return ``nbytes`` bytes of which no two parts are alike."""
    made = array("Q")
    made.frombytes(hashlib.shake_128(bytes([seed])).digest(nbytes // 8 * 8))
    return made


def manifest(folder: Path) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = json.loads((folder / "checkpoint.json").read_bytes())["files"]
    return files


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    made: list[Store] = []

    def make(*arguments: Any, **options: Any) -> Store:
        made.append(Store(tmp_path / str(len(made)), *arguments, max_checkpoints=None, **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


def check_files(folder: Path) -> None:
    """Compare every digest with sha256sum's, and every state with one that is computed from the start."""
    for entry in manifest(folder):
        content = (folder / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["size"] == len(content)
        if entry["chunk_size"] is None:
            assert entry["states"] == []
            continue
        running = Sha256()
        for number, state in enumerate(entry["states"]):
            part = memoryview(bytearray(content[number * CHUNK : (number + 1) * CHUNK]))
            running.update(part)
            assert running.state() == state
            rest = Sha256(state, (number + 1) * CHUNK)  # goes on from the state alone
            rest.update(memoryview(bytearray(content[(number + 1) * CHUNK :])))
            assert rest.hexdigest() == entry["sha256"]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_files_around_multiples_of_a_chunk_are_written_and_read_exactly(
    stores: Callable[..., Store], threads: int
) -> None:
    store = stores(io_threads=threads, max_shard_size=3 * CHUNK)
    for nbytes in AROUND:
        state = {"w": words(nbytes)}
        saved = store.save(state, {"small": words(800), "large": words(CHUNK + 64, 2)})
        check_files(store.path(saved))
        loaded = store.load(saved)
        assert loaded["model_state_dict"] == state
        assert loaded["optimizer_state_dict"]["large"] == words(CHUNK + 64, 2)


def test_every_length_at_the_edge_of_a_chunk_is_verified(stores: Callable[..., Store]) -> None:
    store = stores()
    probe = store.save({"w": words(CHUNK)})
    head = (store.path(probe) / "model.safetensors").stat().st_size - CHUNK
    for file_size in (CHUNK - 8, CHUNK, CHUNK + 8, 2 * CHUNK - 8, 2 * CHUNK, 2 * CHUNK + 8):
        state = {"w": words(file_size - head)}
        saved = store.save(state)
        file = store.path(saved) / "model.safetensors"
        assert file.stat().st_size == file_size
        check_files(store.path(saved))
        assert store.load(saved)["model_state_dict"] == state
        content = file.read_bytes()
        for at in (0, CHUNK - 1, CHUNK, file_size - 1):
            if at < file_size:
                file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
                with pytest.raises(IntegrityError) as caught:
                    store.load(saved)
                assert caught.value.expected == hashlib.sha256(content).hexdigest()
                assert caught.value.actual == hashlib.sha256(file.read_bytes()).hexdigest()
        file.write_bytes(content)


@pytest.mark.parametrize("where", ["saving", "loading"])
def test_with_and_without_libcrypto_files_are_the_same_and_loadable(
    stores: Callable[..., Store], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores(io_threads=2)
    state = {"w": words(2 * CHUNK + 800), "v": words(80)}
    plain = store.save(state)
    with monkeypatch.context() as patch:
        patch.setattr(sha256, "_libcrypto", lambda: None)
        bare = store.save(state)
        if where == "loading":
            assert store.load(plain)["model_state_dict"] == store.load(bare)["model_state_dict"] == state
    assert store.load(bare)["model_state_dict"] == state
    digests = [{entry["name"]: entry["sha256"] for entry in manifest(store.path(i))} for i in (plain, bare)]
    assert digests[0] == digests[1]
    assert all(entry["states"] == [] for entry in manifest(store.path(bare)))


@needs_libcrypto
@pytest.mark.parametrize("state", ["z" * 64, "00", "0" * 63, ""])
def test_what_is_no_state_is_refused(state: str) -> None:
    with pytest.raises(ValueError):
        Sha256(state, 64)


@needs_zstandard
@pytest.mark.parametrize("threads", [1, 8])
def test_compressed_shards_are_verified_too(stores: Callable[..., Store], threads: int) -> None:
    store = stores(enable_compression=True, io_threads=threads, max_shard_size=CHUNK)
    state = {f"w{i}": words(CHUNK + 8 * i, i) for i in range(4)}
    saved = store.save(state)
    check_files(store.path(saved))
    assert store.load(saved)["model_state_dict"] == state


def test_2000_tiny_arrays_and_large_ones_beside_them(stores: Callable[..., Store]) -> None:
    store = stores(io_threads=4)
    state: dict[str, Any] = {f"tiny {i}": array("d", [i] * (i % 7)) for i in range(2000)}
    state |= {f"large {i}": words(CHUNK // 2, i) for i in range(5)}
    saved = store.save(state)
    check_files(store.path(saved))
    assert store.load(saved)["model_state_dict"] == state


# What goes wrong


class Wrong(SafeTensorsBackend):
    """Plans a file of another size than it writes."""

    name: ClassVar[str] = "wrong"
    off: ClassVar[int] = 0

    def plan(self, *arguments: Any) -> list[PlannedFile]:
        return [file._replace(size=(file.size or 0) + self.off) for file in super().plan(*arguments)]


class Slow(SafeTensorsBackend):
    """Of which the first file fails while another one is being written."""

    name: ClassVar[str] = "slow"
    stopped: ClassVar[threading.Event] = threading.Event()

    def plan(self, *arguments: Any) -> list[PlannedFile]:
        begun = threading.Event()

        def fail(sink: Any) -> None:
            assert begun.wait(60)
            raise ZeroDivisionError

        def go_on(sink: Any) -> None:
            begun.set()
            try:
                for _ in range(512):
                    sink.write(bytes(1 << 20))
            except InterruptedError:
                self.stopped.set()
                raise

        first, second = super().plan(*arguments)
        return [first._replace(write=fail), second._replace(write=go_on)]


register_storage_backend("wrong", Wrong)
register_storage_backend("slow", Slow)


def assert_clean(store: Store) -> None:
    assert os.listdir(store.folder / ".engine" / "staging") == []
    assert store.manager.list_checkpoints() == []
    assert [t.name for t in threading.enumerate() if t.name.startswith("checkpoint")] == []


@pytest.mark.parametrize("off", [-8, 8, CHUNK])
@pytest.mark.parametrize("nbytes", [80, 3 * CHUNK])
def test_a_backend_that_writes_another_size_than_it_planned_is_refused(
    stores: Callable[..., Store], off: int, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores("wrong")
    monkeypatch.setattr(Wrong, "off", off)
    with pytest.raises(FormatError, match="planned"):
        store.save({"w": words(nbytes)})
    assert_clean(store)
    monkeypatch.setattr(Wrong, "off", 0)
    assert store.round_trip({"w": words(nbytes)}) == {"w": words(nbytes)}


def test_when_one_file_fails_the_others_are_called_off(stores: Callable[..., Store]) -> None:
    store = stores("slow", io_threads=2)
    Slow.stopped.clear()
    with pytest.raises(ZeroDivisionError):
        store.save({"w": words(3 * CHUNK)}, {"m": words(3 * CHUNK)})
    assert Slow.stopped.is_set()
    assert_clean(store)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("reserved", [True, False])
def test_a_full_disk_amid_several_files_is_told_by_path_and_leaves_nothing(
    stores: Callable[..., Store], threads: int, reserved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores(io_threads=threads, max_shard_size=2 * CHUNK)
    if not reserved:  # a file system that cannot: the write itself fails then
        monkeypatch.setattr("model_checkpoint.integrity.writing.reserve", lambda *_: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {f"w{i}": words(2 * CHUNK - 4096 if i != 2 else 2 * CHUNK + 4096, i) for i in range(4)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * CHUNK + 1000, before[1]))
    try:
        with pytest.raises(StorageError) as caught:
            store.save(state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Path(caught.value.filename).name == "model-00003-of-00004.safetensors"
    assert_clean(store)
    assert store.round_trip(state) == state


def test_threads_that_cannot_be_started_are_done_without(
    stores: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores(io_threads=8, max_shard_size=CHUNK)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    state = {f"w{i}": words(2 * CHUNK, i) for i in range(4)}
    monkeypatch.setattr(threading.Thread, "start", refuse)
    saved = store.save(state)
    assert store.load(saved)["model_state_dict"] == state
    assert store.save(state, blocking=False)
    assert store.manager.wait()
    monkeypatch.undo()
    assert len(store.manager.list_checkpoints()) == 2


MEMORY = """
import sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith(field))

def forget():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

folder = sys.argv[1]
tracker = ExperimentTracker("memory", database_url=f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(tracker, folder + "/c", io_threads=8, max_shard_size=50 << 20)
sizes = [64 << 20] * 4 + [8 << 20] * 14 + [60 << 10] * 400 + [100] * 3000  # 392 MiB
state = {str(i): array("b", bytes(size)) for i, size in enumerate(sizes)}
forget()
before = memory("VmHWM")
saved = manager.save_checkpoint(state)
saving = memory("VmHWM") - before
forget()
before = memory("VmHWM")
manager.verify_experiment_integrity()
verifying = memory("VmHWM") - before
print(saving, verifying)
"""


@pytest.mark.slow
@needs_proc
def test_a_save_of_392_mib_needs_less_than_64_more(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    saving, verifying = map(int, done.stdout.split())
    assert saving < 64
    assert verifying < 64
