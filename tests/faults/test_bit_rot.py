"""Bits that flip, files that are truncated, swapped, zeroed or gone: all is told, and no wrong tensor is returned."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import sqlite3
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from common import FORMATS, Twins, flipped, points, state_of, tree
from helpers_storage import Store, exact, reopen_without_database

from model_checkpoint import EnhancedCheckpointManager
from model_checkpoint.errors import CheckpointNotFoundError, ModelCheckpointError

Effort = Callable[[int, int], int]
Tried = Callable[[int], None]
DEADLINE = 20.0  # seconds that a call may take before it counts as hung


@pytest.fixture
def twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Twins]:
    made = Twins(tmp_path, request.param, monkeypatch)
    yield made
    made.store.close()


EXPECTED = {  # by suffix, or by the backend where there is none
    "safetensors": ("header", "padding", "tensor data"),
    "pytorch": ("zip directory", "zip headers and padding", "tensor data", "pickle and the like"),
    "zst": ("frame header", "compressed data", "frame trailer"),
    "gz": ("frame header", "compressed data", "frame trailer"),
}


def regions(path: Path) -> dict[str, tuple[Sequence[int], bool]]:
    """Return what a file consists of: name -> (its bytes, whether every single one is to be tried)."""
    size, name = path.stat().st_size, path.name
    if name == "checkpoint.json":
        return {"manifest": (range(size), True)}
    if name.endswith(".safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        text = len(content[:start].rstrip(b" "))
        return {
            "header": (range(text), True),
            "padding": (range(text, start), True),
            "tensor data": (range(start, size), False),
        }
    if name.endswith(".pt"):
        with zipfile.ZipFile(path) as archive:
            members, directory = archive.infolist(), archive.start_dir
        spans = [(find_data(path, member), member) for member in members]
        contents = {begin: (range(begin, begin + m.file_size), "/data/" in m.filename) for begin, m in spans}
        inside = {at for places, _ in contents.values() for at in places}
        return {
            "zip directory": (range(directory, size), False),
            # Before each member lie its own header and what aligns it to 64 bytes.
            "zip headers and padding": ([at for at in range(directory) if at not in inside], False),
            "tensor data": ([at for places, is_data in contents.values() if is_data for at in places], False),
            "pickle and the like": (
                [at for places, is_data in contents.values() if not is_data for at in places],
                False,
            ),
        }
    if name.endswith((".zst", ".gz")):
        return {
            "frame header": (range(min(18, size)), True),
            "compressed data": (range(18, size - 8), False),
            "frame trailer": (range(max(18, size - 8), size), True),
        }
    return {"text": (range(size), False)}


def find_data(path: Path, member: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin: behind 30 bytes of local header, its name and its extra field."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        lengths = file.read(4)
    return member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


@pytest.mark.slow
@pytest.mark.parametrize("twins", FORMATS, indirect=True)
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_told_by_loading_and_verifying(
    twins: Twins, effort: Effort, chance: random.Random, tried: Tried
) -> None:
    assert twins.whole()
    pools: dict[str, list[tuple[Path, int]]] = {}
    every: set[str] = set()
    for path in sorted(twins.folder.iterdir()):
        for region, (places, all_of_them) in regions(path).items():
            pools.setdefault(region, []).extend((path, at) for at in places)
            every.update([region] if all_of_them else [])
    found: list[str] = []
    count = 0
    for region, pool in pools.items():
        chosen = pool if region in every else [pool[i] for i in points(len(pool), effort(256, 1024), chance)]
        for path, at in chosen:
            for bit in range(8) if region in every and effort(0, 1) else [chance.randrange(8)]:
                with flipped(path, at, bit):
                    found += twins.oversights(f"bit {bit} of byte {at} of {path.name} ({region})")
                count += 1
    tried(count)
    assert found == []
    assert twins.whole(), "every flip was taken back, so that it was the flips that were told"
    assert {"manifest", *EXPECTED[twins.form.rpartition(".")[2].partition(",")[0]]} <= pools.keys()


# Whole files


def truncate(path: Path, twin: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def extend(path: Path, twin: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.choice([b"\0", b" ", b"\n", bytes(4096), path.read_bytes()]))


def swap(path: Path, twin: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(twin.read_bytes())
    twin.write_bytes(content)


def zero(path: Path, twin: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = chance.randrange(0, len(content), 4096)
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    path.write_bytes(content)


def delete(path: Path, twin: Path, chance: random.Random) -> None:
    path.unlink()


HARM = {harm.__name__: harm for harm in (truncate, extend, swap, zero, delete)}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("twins", FORMATS, indirect=True)
def test_harm_to_any_file_is_told_by_loading_and_verifying(
    twins: Twins, harm: str, tmp_path: Path, effort: Effort, chance: random.Random, tried: Tried
) -> None:
    """A swap is with the same file of a checkpoint of the same shape: nothing but the digests can tell."""
    before, count, found = tree(twins.folder), 0, []
    shutil.copytree(twins.store.folder, tmp_path / "copy", symlinks=True)
    repeats = effort(2, 40) if harm in ("truncate", "extend", "zero") else 1
    for path in sorted(twins.folder.iterdir()):
        twin = twins.other_folder / path.name
        if harm == "swap" and path.read_bytes() == twin.read_bytes():
            continue  # the index of shards, which says nothing of their content
        for _ in range(repeats):
            HARM[harm](path, twin, chance)
            assert tree(twins.folder) != before, f"nothing was done to {path.name}"
            if harm == "swap":
                found += both_are_told(twins, path.name)
            else:
                found += twins.oversights(f"{harm} {path.name}")
            for folder in (twins.folder, twins.other_folder):
                shutil.rmtree(folder)
                shutil.copytree(tmp_path / "copy" / folder.relative_to(twins.store.folder), folder)
            count += 1
    tried(count)
    assert found == []
    assert twins.whole()


def both_are_told(twins: Twins, name: str) -> Iterator[str]:
    for checkpoint_id in twins.ids:
        try:
            twins.store.load(checkpoint_id)
            yield f"swapped {name}: loaded"
        except ModelCheckpointError:
            pass
    if twins.store.manager.verify_experiment_integrity()["failed"] != 2:
        yield f"swapped {name}: not told by the verification"


@pytest.mark.parametrize("twins", FORMATS, indirect=True)
def test_two_files_of_one_checkpoint_that_changed_places_are_told(twins: Twins, tried: Tried) -> None:
    paths = sorted(twins.folder.iterdir())
    pairs = [(one, other) for one in paths for other in paths if one < other]
    found = []
    for one, other in pairs:
        swap(one, other, random.Random())
        found += twins.oversights(f"{one.name} and {other.name} swapped")
        swap(one, other, random.Random())
    tried(len(pairs))
    assert found == []
    assert twins.whole()


# The database: its bytes have no digests of ours, so what it says is checked against the manifests


@contextmanager
def deadline() -> Iterator[None]:
    """Turn a block that goes on for ever into an error."""

    def hang(*_: object) -> None:
        raise TimeoutError(f"nothing came of it within {DEADLINE} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Rows:
    """Checkpoints whose database gets damaged: each point begins with a fresh copy of it."""

    def __init__(self, folder: Path) -> None:
        store = Store(folder, best_metrics={"f1": "max"})
        self.folder, self.url, self.experiment = folder, store.url, store.tracker.experiment_id
        self.saved: dict[str, dict[str, Any]] = {}
        for epoch in range(5, 9):
            given = {"epoch": epoch, "step": 77 * epoch, "loss": 1 / epoch, "metrics": {"f1": epoch / 7}}
            saved = store.save(state_of(epoch, 20), **given, config={"lr": epoch}, notes=f"note {epoch}")
            self.saved[saved] = {**given, "config": {"lr": epoch}}
        store.manager.delete_checkpoint(store.save(state_of(9, 20), epoch=9))  # there is something in the trash, too
        store.manager.verify_experiment_integrity()
        store.close()
        self.path = folder / "experiments.db"
        self.content = self.path.read_bytes()
        self.files = tree(store.folder)
        assert not Path(f"{self.path}-wal").exists(), "part of the database is elsewhere"

    def place(self, content: bytes | None) -> None:
        """Let ``content`` be the database, or let there be none."""
        for leftover in self.folder.glob("experiments.db*"):
            leftover.unlink()
        if content is not None:
            self.path.write_bytes(content)

    def flipped(self, at: int, bit: int) -> bytes:
        return self.content[:at] + bytes([self.content[at] ^ (1 << bit)]) + self.content[at + 1 :]

    def oversights(self, what: str) -> Iterator[tuple[str, str]]:
        """Yield (kind, text) of whatever is neither a typed error nor what was saved."""
        try:
            with EnhancedCheckpointManager(None, str(self.folder / "checkpoints"), database_url=self.url) as manager:
                for way in ("list_checkpoints", "verify_experiment_integrity", "list_trash"):
                    yield from self._errors(f"{what}, {way}", getattr(manager, way))
                for checkpoint_id in self.saved:
                    yield from self._load(manager, what, checkpoint_id=checkpoint_id)
                for kind in ("latest", "best_loss", "best_metric", "regular"):
                    yield from self._load(manager, what, checkpoint_type=kind, experiment_id=self.experiment)
        except ModelCheckpointError:
            pass
        except Exception as error:  # noqa: BLE001 - any other error is a finding, and the next points are still tried
            yield "error", f"{what}, opening: {error!r}"
        if tree(self.folder / "checkpoints") != self.files:
            yield "files", f"{what}: files were changed"

    def _errors(self, what: str, call: Callable[[], object]) -> Iterator[tuple[str, str]]:
        try:
            with deadline():
                call()
        except ModelCheckpointError:
            pass
        except Exception as error:  # noqa: BLE001
            yield "error", f"{what}: {error!r}"

    def _load(self, manager: EnhancedCheckpointManager, what: str, **asked: Any) -> Iterator[tuple[str, str]]:
        try:
            with deadline():
                loaded = manager.load_checkpoint(**asked)
        except ModelCheckpointError:
            return
        except Exception as error:  # noqa: BLE001
            yield "error", f"{what}, loading {asked}: {error!r}"
            return
        model = loaded["model_state_dict"]
        epoch = model["epoch"]
        by_epoch = {given["epoch"]: (checkpoint_id, given) for checkpoint_id, given in self.saved.items()}
        wanted, given = by_epoch[epoch]
        if exact(model) != exact(state_of(epoch, 20)) or asked.get("checkpoint_id", wanted) != wanted:
            yield "tensors", f"{what}, loading {asked}: wrong tensors"
        told = {name: loaded[name] for name in given}
        if told != given:
            yield "values", f"{what}, loading {asked}: {told} where {given} was saved"


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows(tmp_path)


def row_bytes(rows: Rows) -> list[int]:
    """Return where the database holds what the rows of the checkpoints say: some 250 bytes before and after an id."""
    places: set[int] = set()
    for checkpoint_id in rows.saved:
        at = rows.content.find(checkpoint_id.encode())
        while at >= 0:
            places.update(range(max(0, at - 60), min(len(rows.content), at + 450)))
            at = rows.content.find(checkpoint_id.encode(), at + 1)
    return sorted(places)


@pytest.mark.slow
def test_a_row_that_an_index_leads_to_by_mistake_is_an_error_by_type(rows: Rows) -> None:
    """An index has an id and the number of its row; with a wrong one of them, looking for an id finds another row."""
    ids = [match for id in rows.saved for match in re.finditer(id.encode(), rows.content)]
    assert len(ids) > 2 * len(rows.saved)  # in rows, and in indexes
    for at, bit in [(match.start(), 6) for match in ids] + [(match.end(), bit) for match in ids for bit in (0, 1, 2)]:
        rows.place(rows.flipped(at, bit))
        assert list(rows.oversights(f"bit {bit} of byte {at} of the database")) == []


TABLES = ("experiments", "stores", "checkpoints", "files", "best", "verifications", "tombstones", "scores")


def put_number(path: Path, table: str, column: str, row: int) -> bool:
    """Let a number stand where text was, as a flipped bit in the head of a row does; returns whether there was a row.

    SQLite makes text of what is written to such a column, so for a moment the column says nothing of its type.
    """

    def change(*statements: tuple[str, Sequence[object]]) -> None:
        with closing(sqlite3.connect(path)) as raw:  # anew: a schema is read once by each connection
            for statement in statements:
                raw.execute(*statement)
            raw.commit()

    with closing(sqlite3.connect(path)) as raw:
        (schema,) = raw.execute("SELECT sql FROM sqlite_master WHERE name = ?", [table]).fetchone()
        found = raw.execute(f"SELECT * FROM {table} LIMIT 1 OFFSET {row}")
        names, values = [name for name, *_ in found.description], found.fetchone()
    if values is None:
        return False
    opened = ("PRAGMA writable_schema = ON", ())
    typeless = re.sub(rf"\b{column} TEXT\b", column, schema)
    this_row = " AND ".join(f"{name} IS ?" for name in names)
    change(opened, ("UPDATE sqlite_master SET sql = ? WHERE name = ?", [typeless, table]))
    change((f"UPDATE {table} SET {column} = 5 WHERE {this_row}", values))
    change(opened, ("UPDATE sqlite_master SET sql = ? WHERE name = ?", [schema, table]))
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute(f"SELECT COUNT(*) FROM {table} WHERE TYPEOF({column}) = 'integer'").fetchone() == (1,)
    return True


@pytest.mark.parametrize("table", TABLES)
def test_a_number_where_text_was_is_an_error_by_type_or_changes_nothing_that_is_loaded(rows: Rows, table: str) -> None:
    with closing(sqlite3.connect(rows.path)) as raw:
        columns = [name for _, name, kind, *_ in raw.execute(f"PRAGMA table_info({table})") if kind == "TEXT"]
    tried, found = 0, []
    for column, row in itertools.product(columns, (0, 1)):
        rows.place(rows.content)
        if put_number(rows.path, table, column, row):
            tried += 1
            found += list(rows.oversights(f"{table}.{column} of row {row}"))
    assert tried >= len(columns)
    assert found == []


def flips(rows: Rows, region: str, effort: Effort, chance: random.Random, tried: Tried) -> list[tuple[str, str]]:
    places, count = {
        "a row": (row_bytes(rows), effort(256, 4096)),
        "used pages": ([at for at, byte in enumerate(rows.content) if byte], effort(256, 8192)),  # most are empty
        "any page": (range(len(rows.content)), effort(64, 2048)),
    }[region]
    chosen = chance.sample(places, min(len(places), count))
    found: list[tuple[str, str]] = []
    for at in chosen:
        bit = chance.randrange(8)
        rows.place(rows.flipped(at, bit))
        found += rows.oversights(f"bit {bit} of byte {at} of the database ({region})")
    tried(len(chosen))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("region", ["used pages", "a row", "any page"])
def test_a_flipped_bit_in_the_database_is_an_error_by_type_or_changes_nothing_that_is_loaded(
    rows: Rows, region: str, effort: Effort, chance: random.Random, tried: Tried
) -> None:
    """The manifest is sealed and the row is not; so whatever a load returns must be what the manifest says."""
    found = flips(rows, region, effort, chance, tried)
    kinds = {kind: [text for other, text in found if other == kind] for kind, _ in found}
    for kind, texts in kinds.items():
        print(f"{len(texts)} times wrong {kind}, such as", *texts[:8], sep="\n  ")
    assert sorted(kinds) == []


@pytest.mark.parametrize("harm", HARM)
def test_harm_to_the_database_file_is_an_error_by_type_or_changes_nothing_that_is_loaded(
    rows: Rows, harm: str, tmp_path: Path, effort: Effort, chance: random.Random, tried: Tried
) -> None:
    (tmp_path / "other").mkdir()
    other = Rows(tmp_path / "other")
    found, repeats = [], effort(20, 300) if harm in ("truncate", "extend", "zero") else 1
    for _ in range(repeats):
        rows.place(rows.content)
        other.place(other.content)
        HARM[harm](rows.path, other.path, chance)
        found += list(rows.oversights(harm))
    tried(repeats)
    assert found == []


def test_all_checkpoints_come_back_when_a_damaged_database_is_put_away(rows: Rows, tmp_path: Path) -> None:
    rows.place(b"\xff" * len(rows.content))
    with pytest.raises(ModelCheckpointError, match="found again by their manifests"):
        EnhancedCheckpointManager(None, str(tmp_path / "checkpoints"), database_url=rows.url)
    with reopen_without_database(tmp_path) as manager:
        assert [row["checkpoint_id"] for row in manager.list_checkpoints()] == list(rows.saved)
        for checkpoint_id, given in rows.saved.items():
            assert exact(manager.load_checkpoint(checkpoint_id)["model_state_dict"]) == exact(
                state_of(given["epoch"], 20)
            )
        with pytest.raises(CheckpointNotFoundError):
            manager.load_checkpoint("none")
