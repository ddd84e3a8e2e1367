"""Digests, verification and its records; every kind of damage is found when loading and when verifying."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers_storage import (
    Store,
    needs_torch,
    needs_zstandard,
    reopen_without_database,
    replace_file,
    reseal,
    torch,
    zstandard,
)

from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.errors import (
    CheckpointNotFoundError,
    DatabaseError,
    FormatError,
    FormatVersionError,
    IntegrityError,
)
from model_checkpoint.integrity import CheckpointVerifier, ChecksumCalculator
from model_checkpoint.integrity.verification import verify_folder

ROOT = Path(__file__).parents[1]
MODEL, OPTIMIZER = {"w": Random(1).randbytes(10_000)}, {"m": Random(2).randbytes(10_000)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store of the SafeTensors backend."""
    made = Store(tmp_path)
    yield made
    made.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "checkpoint.json").read_bytes())
    return found


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Return what lies in a folder, links as their targets."""
    return {p.name: os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes() for p in folder.iterdir()}


class TestChecksumCalculator:
    def test_the_digest_of_known_data_is_the_published_one(self, tmp_path: Path) -> None:
        abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
        path = tmp_path / "abc"
        path.write_bytes(b"abc")
        calculator = ChecksumCalculator()
        assert calculator.calculate_file_checksum(path) == abc
        assert calculator.calculate_file_checksum(str(path)) == abc
        for data in (b"abc", bytearray(b"abc"), memoryview(b"abc"), "abc"):
            assert calculator.calculate_data_checksum(data) == abc

    @pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1])
    def test_files_around_the_chunk_size_are_hashed_whole(self, tmp_path: Path, size: int) -> None:
        content = bytes(size)
        (tmp_path / "file").write_bytes(content)
        assert ChecksumCalculator().calculate_file_checksum(tmp_path / "file") == hashlib.sha256(content).hexdigest()

    def test_verifying_accepts_either_case_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"content")
        digest = sha256(path)
        verify = ChecksumCalculator().verify_file_checksum
        assert verify(path, digest)
        assert verify(path, digest.upper())
        assert not verify(path, digest[:-1])
        assert not verify(path, "")
        assert not verify(path, "0" * 64)

    def test_a_file_that_is_not_there_is_an_os_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            ChecksumCalculator().calculate_file_checksum(tmp_path / "none")


class TestRecords:
    def test_the_manifest_names_every_file_with_its_length_and_digest(self, store: Store) -> None:
        folder = store.path(store.save(MODEL, OPTIMIZER))
        files = {entry["name"]: entry for entry in manifest_of(folder)["files"]}
        assert set(files) == {path.name for path in folder.iterdir()} - {"checkpoint.json"}
        for name, entry in files.items():
            assert (entry["size"], entry["sha256"]) == ((folder / name).stat().st_size, sha256(folder / name))

    @pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
    @pytest.mark.parametrize("compressed", [False, True])
    def test_what_sha256sum_prints_is_what_the_manifest_says(self, tmp_path: Path, compressed: bool) -> None:
        store = Store(tmp_path, enable_compression=compressed)
        folder = store.path(store.save(MODEL, OPTIMIZER))
        entries = manifest_of(folder)["files"]
        names = [entry["name"] for entry in entries]
        printed = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout
        assert printed == "".join(f"{entry['sha256']}  {entry['name']}\n" for entry in entries)
        store.close()

    def test_a_verification_is_recorded_with_time_result_and_both_digests(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL)
        assert store.row(checkpoint_id)["verification"] is None
        before = time.time()
        result = store.manager.verify_experiment_integrity()["checkpoint_results"][checkpoint_id]
        recorded = store.row(checkpoint_id)["verification"]
        assert before <= recorded["verified_at"] <= time.time()
        assert recorded["verified_at"] == result["verified_at"]
        assert (recorded["verified"], recorded["error"]) == (True, None)
        digests = {file["name"]: (file["expected"], file["actual"]) for file in recorded["files"]}
        for entry in manifest_of(store.path(checkpoint_id))["files"]:
            assert digests[entry["name"]] == (entry["sha256"], entry["sha256"])
        assert "checkpoint.json" in digests

    def test_a_load_is_recorded_as_a_verification_and_one_without_is_not(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL)
        store.load(checkpoint_id, verify_integrity=False)
        assert store.row(checkpoint_id)["verification"] is None
        store.load(checkpoint_id)
        assert store.row(checkpoint_id)["verification"]["verified"] is True

    def test_a_failure_is_recorded_with_the_digest_that_was_found(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL)
        path = store.path(checkpoint_id) / "model.safetensors"
        good = sha256(path)
        flip(path)
        store.manager.verify_experiment_integrity()
        (bad,) = [file for file in store.row(checkpoint_id)["verification"]["files"] if not file["ok"]]
        assert (bad["name"], bad["expected"], bad["actual"]) == ("model.safetensors", good, sha256(path))

    def test_the_last_outcome_counts_and_all_processes_see_it(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL)
        other = EnhancedCheckpointManager(None, str(store.folder), database_url=store.url)
        assert other.list_checkpoints()[0]["status"] == "committed"
        flip(store.path(checkpoint_id) / "model.safetensors")
        store.manager.verify_experiment_integrity()
        assert other.list_checkpoints()[0]["status"] == "corrupt"
        assert other.list_checkpoints()[0]["verification"]["verified"] is False
        other.close()


class TestVerifyingManyCheckpoints:
    def test_counts_and_results_cover_every_checkpoint_of_the_experiment(self, store: Store) -> None:
        ids = [store.save({"w": bytes([i])}) for i in range(3)]
        flip(store.path(ids[1]) / "model.safetensors")
        found = store.manager.verify_experiment_integrity()
        assert (found["total_checkpoints"], found["verified"], found["failed"]) == (3, 2, 1)
        assert list(found["checkpoint_results"]) == ids
        assert [found["checkpoint_results"][i]["verified"] for i in ids] == [True, False, True]
        assert found["checkpoint_results"][ids[0]]["error"] is None
        assert str(store.path(ids[1]) / "model.safetensors") in found["checkpoint_results"][ids[1]]["error"]

    def test_another_experiments_checkpoints_are_left_out(self, tmp_path: Path) -> None:
        first, second = Store(tmp_path), Store(tmp_path)
        mine, other = first.save(MODEL), second.save(MODEL)
        assert list(first.manager.verify_experiment_integrity()["checkpoint_results"]) == [mine]
        found = first.manager.verify_experiment_integrity(second.tracker.experiment_id)
        assert list(found["checkpoint_results"]) == [other]
        with EnhancedCheckpointManager(None, str(first.folder), database_url=first.url) as manager:
            assert manager.verify_experiment_integrity()["total_checkpoints"] == 2
        first.close()
        second.close()

    def test_an_experiment_without_checkpoints_has_nothing_to_fail(self, store: Store) -> None:
        found = store.manager.verify_experiment_integrity()
        assert found == {"total_checkpoints": 0, "verified": 0, "failed": 0, "checkpoint_results": {}}

    def test_progress_adds_up_to_the_bytes_of_the_files(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL, OPTIMIZER)
        seen: list[int] = []
        store.manager.verify_experiment_integrity(on_bytes=seen.append)
        assert sum(seen) == sum(entry["size"] for entry in manifest_of(store.path(checkpoint_id))["files"])

    def test_the_verifier_works_on_the_database_alone(self, store: Store) -> None:
        ids = [store.save(MODEL), store.save(OPTIMIZER)]
        verifier = CheckpointVerifier(store.tracker.database)
        result = verifier.verify_checkpoint(ids[0])
        assert (result["checkpoint_id"], result["verified"], result["error"]) == (ids[0], True, None)
        assert result["size"] == store.row(ids[0])["size"]
        everything = verifier.verify_experiment_checkpoints(store.tracker.experiment_id)
        assert (everything["total_checkpoints"], everything["verified"]) == (2, 2)
        assert verifier.verify_experiment_checkpoints()["total_checkpoints"] == 2
        assert store.row(ids[1])["verification"]["verified"] is True

    def test_an_unknown_checkpoint_cannot_be_verified(self, store: Store) -> None:
        with pytest.raises(CheckpointNotFoundError, match=r"^Checkpoint not found"):
            CheckpointVerifier(store.tracker.database).verify_checkpoint("no such id")


def flip(path: Path, at: int = -1, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def zero_block(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(len(content[-4096:]))
    path.write_bytes(content)


def become_link(path: Path) -> None:
    elsewhere = path.parents[4] / "elsewhere"
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0),
    "byte in the middle": lambda path: flip(path, path.stat().st_size // 2, 3),
    "last byte": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "4 KiB of zeros": zero_block,
    "deleted": lambda path: path.unlink(),
    "a link to an exact copy": become_link,
    "a folder": become_folder,
}
FILES = ["model.safetensors", "state.json", "checkpoint.json"]


class TestDamage:
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_it_is_found_by_loading_and_by_verifying_and_can_be_repaired(
        self, store: Store, tmp_path: Path, name: str, damage: str
    ) -> None:
        checkpoint_id, untouched = store.save(MODEL, OPTIMIZER), store.save(MODEL, OPTIMIZER)
        folder = store.path(checkpoint_id)
        path = folder / name
        saved = sha256(path) if name != "checkpoint.json" else manifest_of(folder)["manifest_sha256"]
        shutil.copytree(folder, tmp_path / "copy")
        DAMAGE[damage](path)
        damaged = snapshot(folder)

        with pytest.raises(IntegrityError) as caught:
            store.load(checkpoint_id)
        assert str(path) in str(caught.value)
        same_length = path.stat().st_size == (tmp_path / "copy" / name).stat().st_size if path.exists() else False
        if name != "checkpoint.json" and same_length and not path.is_symlink():  # else there is nothing to hash
            assert (caught.value.expected, caught.value.actual) == (saved, sha256(path))
            assert saved in str(caught.value)
            assert sha256(path) in str(caught.value)
        assert store.row(checkpoint_id)["status"] == "corrupt"
        assert store.row(checkpoint_id)["verification"]["verified"] is False

        results = store.manager.verify_experiment_integrity()["checkpoint_results"]
        (bad,) = [file for file in results[checkpoint_id]["files"] if file["name"] == name]
        assert not results[checkpoint_id]["verified"]
        assert (bad["ok"], bad["expected"]) == (False, saved)
        assert name in results[checkpoint_id]["error"]
        if name != "checkpoint.json" and path.is_file() and not path.is_symlink():
            assert bad["actual"] == sha256(path)
        assert results[untouched]["verified"]
        assert store.row(checkpoint_id)["status"] == "corrupt"

        assert snapshot(folder) == damaged  # reported, never removed or mended behind the user's back
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
        assert store.manager.verify_experiment_integrity()["failed"] == 0
        assert store.row(checkpoint_id)["status"] == "committed"
        assert store.load(checkpoint_id)["model_state_dict"] == MODEL

    def test_two_files_that_changed_places_are_found(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL, OPTIMIZER)
        paths = [store.path(checkpoint_id) / f"{name}.safetensors" for name in ("model", "optimizer")]
        digests = [sha256(path) for path in paths]
        swap(*paths)
        with pytest.raises(IntegrityError) as caught:
            store.load(checkpoint_id)
        at = paths.index(Path(caught.value.path))
        assert (caught.value.expected, caught.value.actual) == (digests[at], digests[1 - at])
        result = store.manager.verify_experiment_integrity()["checkpoint_results"][checkpoint_id]
        bad = {file["name"]: (file["expected"], file["actual"]) for file in result["files"] if not file["ok"]}
        assert bad == {"model.safetensors": tuple(digests), "optimizer.safetensors": tuple(digests[::-1])}

    def test_every_changed_byte_of_every_file_is_found(self, store: Store) -> None:
        checkpoint_id = store.save({"w": b"weights"}, epoch=3, metrics={"accuracy": 0.5}, notes="a note")
        folder = store.path(checkpoint_id)
        digest = manifest_of(folder)["manifest_sha256"]
        assert verify_folder(str(folder), digest)["verified"]
        for path in folder.iterdir():
            content = path.read_bytes()
            for at in range(len(content)):
                path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
                result = verify_folder(str(folder), digest)
                assert not result["verified"], f"byte {at} of {path.name}"
                assert path.name in result["error"]
            path.write_bytes(content)
        assert verify_folder(str(folder), digest)["verified"]

    def test_a_changed_byte_anywhere_in_the_manifest_stops_a_load(self, store: Store) -> None:
        checkpoint_id = store.save({"w": b"weights"})
        path = store.path(checkpoint_id) / "checkpoint.json"
        content = path.read_bytes()
        for at in range(0, len(content), 29):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(IntegrityError, match=r"checkpoint\.json"):
                store.load(checkpoint_id)
        path.write_bytes(content)
        assert store.load(checkpoint_id)["model_state_dict"] == {"w": b"weights"}

    @pytest.mark.parametrize("reader", ["load", "verify"])
    def test_swapped_manifests_of_two_checkpoints_are_found(self, store: Store, reader: str) -> None:
        ids = [store.save({"w": bytes([i])}) for i in range(2)]
        swap(*[store.path(i) / "checkpoint.json" for i in ids])
        if reader == "verify":
            assert store.manager.verify_experiment_integrity()["failed"] == 2
        else:
            for i in ids:
                with pytest.raises(IntegrityError, match=r"checkpoint\.json"):
                    store.load(i)
        assert [store.row(i)["status"] for i in ids] == ["corrupt", "corrupt"]

    def test_swapped_folders_of_two_checkpoints_are_found_without_a_database(
        self, store: Store, tmp_path: Path
    ) -> None:
        first, second = (store.path(store.save({"w": bytes([i])})) for i in range(2))
        store.close()
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
        with reopen_without_database(tmp_path) as manager:
            assert manager.list_checkpoints() == []
        assert first.exists()
        assert second.exists()

    def test_a_manifest_with_a_digest_of_its_own_is_not_the_one_in_the_database(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL)
        reseal(store.path(checkpoint_id), lambda manifest: manifest["values"].update(epoch=99))
        with pytest.raises(IntegrityError, match="not the one in the database"):
            store.load(checkpoint_id)
        assert store.manager.verify_experiment_integrity()["failed"] == 1

    @pytest.mark.parametrize("damage", ["truncated", "deleted"])
    def test_opening_the_directory_marks_missing_and_resized_files(self, store: Store, damage: str) -> None:
        checkpoint_id = store.save(MODEL)
        folder = store.path(checkpoint_id)
        DAMAGE[damage](folder / "model.safetensors")
        with EnhancedCheckpointManager(None, str(store.folder), database_url=store.url) as manager:
            assert manager.list_checkpoints()[0]["status"] == "corrupt"
            assert manager.get_experiment_statistics(store.tracker.experiment_id)["corrupt"] == 1
        assert (folder / "checkpoint.json").exists()

    def test_retention_never_removes_a_corrupt_checkpoint(self, tmp_path: Path) -> None:
        store = Store(tmp_path, max_checkpoints=2)
        checkpoint_id = store.save(MODEL)
        folder = store.path(checkpoint_id)
        flip(folder / "model.safetensors")
        store.manager.verify_experiment_integrity()
        for epoch in range(4):
            store.save(MODEL, epoch=epoch)
        assert store.row(checkpoint_id)["status"] == "corrupt"
        assert folder.exists()
        store.close()

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
    def test_a_named_pipe_in_a_files_place_is_found_and_stops_nobody(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL)
        path = store.path(checkpoint_id) / "model.safetensors"
        path.unlink()
        os.mkfifo(path)
        program = """
import sys
from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.errors import IntegrityError
with EnhancedCheckpointManager(None, sys.argv[1], database_url=sys.argv[2]) as manager:
    print(manager.verify_experiment_integrity()["failed"])
    try:
        manager.load_checkpoint(sys.argv[3])
    except IntegrityError as error:
        print(error.path)
"""
        assert run(program, str(store.folder), store.url, checkpoint_id) == f"1\n{path}\n"


def run(program: str, *arguments: str, **environment: str) -> str:
    """Run a program in a process of its own and return what it prints; one that hangs is ended."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestWithoutDigests:
    @pytest.mark.parametrize("way", ["compute_checksum", "enable_integrity_checks"])
    def test_only_lengths_are_recorded_and_checked(self, tmp_path: Path, way: str) -> None:
        store = Store(tmp_path, enable_integrity_checks=way != "enable_integrity_checks")
        checkpoint_id = store.save(MODEL, compute_checksum=way != "compute_checksum")
        folder = store.path(checkpoint_id)
        assert [entry["sha256"] for entry in manifest_of(folder)["files"]] == [None, None]
        assert store.manager.verify_experiment_integrity()["verified"] == 1
        flip(folder / "model.safetensors")
        loaded = store.load(checkpoint_id)["model_state_dict"]["w"]
        assert loaded[:-1] == MODEL["w"][:-1]
        assert loaded != MODEL["w"]
        os.truncate(folder / "model.safetensors", 100)
        with pytest.raises(IntegrityError, match="length"):
            store.load(checkpoint_id)
        assert store.manager.verify_experiment_integrity()["failed"] == 1
        store.close()

    def test_the_manifest_is_sealed_all_the_same(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL, compute_checksum=False)
        flip(store.path(checkpoint_id) / "checkpoint.json", 100)
        with pytest.raises(IntegrityError, match=r"checkpoint\.json"):
            store.load(checkpoint_id)

    def test_a_manager_without_integrity_checks_does_not_compare_digests_when_loading(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        checkpoint_id = store.save(MODEL)
        flip(store.path(checkpoint_id) / "model.safetensors")
        lax = EnhancedCheckpointManager(store.tracker, str(store.folder), enable_integrity_checks=False)
        assert lax.load_checkpoint(checkpoint_id)["model_state_dict"]["w"][:-1] == MODEL["w"][:-1]
        assert lax.verify_experiment_integrity()["failed"] == 1  # asked for by name, it still verifies
        store.close()

    def test_a_load_without_verification_checks_lengths_only(self, store: Store) -> None:
        checkpoint_id = store.save(MODEL)
        path = store.path(checkpoint_id) / "model.safetensors"
        flip(path)
        assert store.load(checkpoint_id, verify_integrity=False)["model_state_dict"] != MODEL
        assert store.row(checkpoint_id)["status"] == "committed"
        os.truncate(path, 100)
        with pytest.raises(IntegrityError, match="length"):
            store.load(checkpoint_id, verify_integrity=False)


def zstd_of(content: bytes) -> bytes:
    return bytes(zstandard.ZstdCompressor().compress(content))


class TestDecompressionBombs:
    BOMB = 64 << 20  # bytes of zeros; as gzip 64 KiB, as zstd 6 KiB

    def saved(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> tuple[str, Path, str]:
        if codec == "gz":
            monkeypatch.setitem(sys.modules, "zstandard", None)
        store = Store(tmp_path, enable_compression=True)
        checkpoint_id = store.save({"w": b"0123456789"})
        folder = store.path(checkpoint_id)
        store.close()
        return checkpoint_id, folder, f"model.safetensors.{codec}"

    def refused(self, tmp_path: Path, checkpoint_id: str) -> tuple[str, int]:
        """Load with a database made from the manifests; returns the error's text and the peak of memory in bytes."""
        with reopen_without_database(tmp_path) as manager:
            assert len(manager.list_checkpoints()) == 1
            tracemalloc.start()
            try:
                with pytest.raises(IntegrityError) as caught:
                    manager.load_checkpoint(checkpoint_id)
                return str(caught.value), tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    @pytest.mark.parametrize("codec", ["gz", pytest.param("zst", marks=needs_zstandard)])
    def test_content_larger_than_the_manifest_says_is_not_unpacked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
    ) -> None:
        checkpoint_id, folder, name = self.saved(tmp_path, monkeypatch, codec)
        content = gzip.compress(bytes(self.BOMB), 1) if codec == "gz" else zstd_of(bytes(self.BOMB))
        replace_file(folder, name, content)
        text, peak = self.refused(tmp_path, checkpoint_id)
        assert name in text
        assert peak < self.BOMB // 4

    @pytest.mark.parametrize("codec", ["gz", pytest.param("zst", marks=needs_zstandard)])
    def test_a_size_that_no_machine_has_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
    ) -> None:
        checkpoint_id, folder, _ = self.saved(tmp_path, monkeypatch, codec)
        reseal(folder, lambda manifest: [entry.update(raw_size=2**62) for entry in manifest["files"]])
        text, peak = self.refused(tmp_path, checkpoint_id)
        assert str(2**62) in text
        assert peak < 1 << 20

    @pytest.mark.parametrize("codec", ["gz", pytest.param("zst", marks=needs_zstandard)])
    @pytest.mark.parametrize("harm", ["truncated", "damaged", "empty", "another format", "shorter"])
    def test_compressed_data_that_do_not_unpack_to_the_size_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, harm: str
    ) -> None:
        checkpoint_id, folder, name = self.saved(tmp_path, monkeypatch, codec)
        good = (folder / name).read_bytes()
        pack = gzip.compress if codec == "gz" else zstd_of
        content = {
            "truncated": good[:-5],
            "damaged": good[:20] + bytes([good[20] ^ 255]) + good[21:],
            "empty": b"",
            "another format": b"PK" + good[2:],
            "shorter": pack(b"short"),
        }[harm]
        replace_file(folder, name, content)
        text, _ = self.refused(tmp_path, checkpoint_id)
        assert str(folder) in text


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def torch_archive(pickled: bytes) -> bytes:
    """Return a file of torch's present format with ``pickled`` in the place of its data."""
    buffer = BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made := BytesIO(), "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()


@needs_torch
class TestHostilePickles:
    PROGRAM = """
import os, sys
from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.errors import IntegrityError
trap, canary, *folders = sys.argv[1:]
for folder in folders:
    with EnhancedCheckpointManager(None, f"{folder}/checkpoints", database_url=f"sqlite:///{folder}/new.db") as manager:
        for row in manager.list_checkpoints():
            try:
                manager.load_checkpoint(row["checkpoint_id"])
            except IntegrityError:
                print("refused")
print(os.path.exists(canary))
import torch
torch.load(trap, weights_only=False)  # the trap is real: read without care, it springs
print(os.path.exists(canary))
"""

    @pytest.mark.slow
    def test_no_code_of_a_checkpoint_runs(self, tmp_path: Path) -> None:
        canary = tmp_path / "canary"
        evil = Canary(canary)
        files: list[Path] = []
        for form in ("archive", "old torch", "inside a dict", "bare pickle"):
            buffer = BytesIO()
            if form == "bare pickle":
                buffer.write(pickle.dumps(evil))
            else:
                content = {"arrays": {"model": {"w": evil}}} if form == "inside a dict" else evil
                torch.save(content, buffer, _use_new_zipfile_serialization=form != "old torch")
            store = Store(tmp_path / form.replace(" ", "_"), "pytorch")
            folder = store.path(store.save({"w": torch.ones(2)}))
            store.close()
            replace_file(folder, "checkpoint.pt", buffer.getvalue())
            files.append(folder / "checkpoint.pt")
        folders = [str(path.parents[3]) for path in files]
        environment = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # torch's own switch must not reach our loads
        printed = run(self.PROGRAM, str(files[0]), str(canary), *folders, **environment)
        assert printed == "refused\n" * 4 + "False\nTrue\n"

    def test_damaged_pickles_and_archives_are_format_errors(self, tmp_path: Path) -> None:
        from model_checkpoint.checkpoint.storage.pytorch_backend import PyTorchBackend

        store = Store(tmp_path, "pytorch")
        good = (store.path(store.save({"w": torch.ones(2)})) / "checkpoint.pt").read_bytes()
        store.close()
        random = Random(5)
        pickles = [
            b"",
            b".",
            b"]",
            b"(",
            b"}.",
            b"t.",
            b"0.",
            b"s.",
            b"K\x03.",
            b"N.",
            b"h\x07.",
            b"X\xff\xff\xff\xff.",
            b"b.",
        ]
        contents = [torch_archive(b"\x80\x02" + pickled) for pickled in pickles]
        for value in (3, None, [], {}, {"arrays": 3}, {"arrays": {"model": 3}}, {"arrays": {"model": {"w": 3}}}):
            buffer = BytesIO()
            torch.save(value, buffer)
            contents.append(buffer.getvalue())
        for _ in range(60):
            at = random.randrange(len(good))
            contents.append(good[:at] + random.randbytes(4) + good[at + 4 :])
            contents.append(good[:at])
        backend = PyTorchBackend()
        assert backend.read({"checkpoint.pt": memoryview(good)})["model"]["w"].shape == (2,)
        refused = 0
        for content in contents:
            try:
                backend.read({"checkpoint.pt": memoryview(content)})
            except FormatError:
                refused += 1
        assert refused > len(contents) // 2


def file_entry(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["files"][0].update(values)


def part(section: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest[section].update(values)


HOSTILE_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file above the folder": file_entry(name="../checkpoint.json"),
    "an absolute file": file_entry(name="/etc/passwd"),
    "a hidden file": file_entry(name=".x"),
    "the manifest as a file": file_entry(name="checkpoint.json"),
    "a file name that is a number": file_entry(name=5),
    "a size that is text": file_entry(size="abc"),
    "a negative size": file_entry(size=-1),
    "a size that is a flag": file_entry(size=True),
    "a digest that is a number": file_entry(sha256=5),
    "a compression that is a list": file_entry(compression=[5]),
    "a component that is a list": file_entry(component=[1]),
    "a negative raw size": file_entry(compression="zlib", raw_size=-1),
    "a file with more fields": file_entry(more=1),
    "the same file twice": lambda manifest: manifest["files"].append(manifest["files"][0]),
    "no files": lambda manifest: manifest.pop("files"),
    "files that are a number": lambda manifest: manifest.update(files=5),
    "files that are numbers": lambda manifest: manifest.update(files=[5]),
    "no experiment": lambda manifest: manifest.update(experiment={}),
    "an experiment that is a number": lambda manifest: manifest.update(experiment=5),
    "an experiment above the directory": part("experiment", id="../x"),
    "another experiment than the folder's": part("experiment", id="11111111-1111-4111-8111-111111111111"),
    "an experiment id that is a number": part("experiment", id=5),
    "tags that are a number": part("experiment", tags=5),
    "a config that is a list": part("experiment", config=[]),
    "no values": lambda manifest: manifest.update(values={}),
    "values that are a list": lambda manifest: manifest.update(values=[]),
    "metrics that are a number": part("values", metrics=5),
    "a loss that is text": part("values", loss="x"),
    "an epoch that is text": part("values", epoch="x"),
    "an epoch beyond 64 bits": part("values", epoch=2**70),
    "a backend that is a list": lambda manifest: manifest.update(backend=[1]),
    "a time that is text": lambda manifest: manifest.update(created_at="x"),
    "a step beyond 64 bits": part("values", step=-(2**63) - 1),
    "another checkpoint's id": lambda manifest: manifest.update(checkpoint_id="x"),
    "a config 600 levels deep": part("values", config=json.loads("[" * 600 + "]" * 600)),
    "an experiment's config 900 levels deep": part("experiment", config={"a": json.loads("[" * 900 + "]" * 900)}),
    "the last number of a save": lambda manifest: manifest.update(sequence=2**63 - 1),
    "a number of a save before the first": lambda manifest: manifest.update(sequence=-1),
    "a metric that is a flag": part("values", metrics={"acc": True}),
    "a metric that is nothing": part("values", metrics={"acc": None}),
    "a metric beyond 64 bits": part("values", metrics={"acc": 10**400}),
    "a newer format without files": lambda manifest: (manifest.pop("files"), manifest.update(format_version=99)),
    "a newer format": lambda manifest: manifest.update(format_version=99),
    "a format that is text": lambda manifest: manifest.update(format_version="x"),
    "no format": lambda manifest: manifest.pop("format_version"),
    "another field": lambda manifest: manifest.update(more=1),
    "a name with half a surrogate": part("experiment", name="\ud800"),
    "config with an unknown escape": part("values", config={"$float": "x"}),
}


class TestHostileManifests:
    @pytest.mark.parametrize("harm", HOSTILE_MANIFESTS)
    def test_one_with_a_fitting_seal_neither_stops_the_directory_nor_is_touched(
        self, store: Store, tmp_path: Path, harm: str
    ) -> None:
        bad, good = store.save({"w": b"1"}), store.save({"w": b"2"})
        folder = store.path(bad)
        store.close()
        reseal(folder, HOSTILE_MANIFESTS[harm])
        before = snapshot(folder)
        with reopen_without_database(tmp_path) as manager:
            assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == [good]
            assert manager.load_checkpoint(good)["model_state_dict"] == {"w": b"2"}
            with pytest.raises(CheckpointNotFoundError):
                manager.load_checkpoint(bad)
        assert snapshot(folder) == before

    def test_one_of_a_newer_version_is_called_that_whatever_else_it_holds(self, store: Store) -> None:
        saved = store.save({"w": b"1"})
        folder = store.path(saved)
        (folder / "checkpoint.json").write_text('{"format_version": 99, "chunks": []}')
        with pytest.raises(FormatVersionError, match="99"):
            store.load(saved)
        assert store.row(saved)["status"] == "committed"

    def test_one_with_the_highest_number_of_a_save_does_not_spoil_the_next_saves(
        self, store: Store, tmp_path: Path
    ) -> None:
        folder = store.path(store.save({"w": b"1"}))
        store.close()
        reseal(folder, lambda manifest: manifest.update(sequence=2**62 - 1))
        with reopen_without_database(tmp_path) as manager:
            (row,) = manager.list_checkpoints()
            with pytest.raises(DatabaseError, match="sequence"):
                manager.save_checkpoint({"w": b"2"}, experiment_id=row["experiment_id"])

    @pytest.mark.parametrize(
        "content", [b"", b"null", b"[]", b"{}", b"[" * 100_000, b'{"a": NaN}', b"\xff", b"5", b'{"a":1,"a":1}']
    )
    def test_one_that_is_no_manifest_neither_stops_the_directory_nor_is_touched(
        self, store: Store, tmp_path: Path, content: bytes
    ) -> None:
        folder = store.path(store.save({"w": b"1"}))
        store.close()
        (folder / "checkpoint.json").write_bytes(content)
        with reopen_without_database(tmp_path) as manager:
            assert manager.list_checkpoints() == []
        assert (folder / "checkpoint.json").read_bytes() == content
