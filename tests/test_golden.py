"""Golden files: what version 1 wrote is read, verified and loaded exactly, for ever. See golden/make_golden.py."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker, Queries
from model_checkpoint.database import EnhancedDatabaseConnection
from model_checkpoint.errors import CheckpointNotFoundError
from model_checkpoint.integrity import CheckpointVerifier

GOLDEN = Path(__file__).parent / "golden"
NOTES = [
    "plain",
    "plain gzip",
    "numpy",
    "torch safetensors",
    "torch safetensors gzip",
    "torch pytorch",
    "torch pytorch gzip",
    "sharded",
    "without digests",
]


class Golden:
    """A copy of the golden files, opened."""

    def __init__(self, folder: Path, with_database: bool = True) -> None:
        self.directory = folder / "checkpoints_v1"
        self.database = folder / "database_v1.db"
        shutil.copytree(GOLDEN / "checkpoints_v1", self.directory)
        if with_database:
            shutil.copy(GOLDEN / "database_v1.db", self.database)
        self.url = f"sqlite:///{self.database}"
        self.manager = EnhancedCheckpointManager(None, str(self.directory), database_url=self.url, max_checkpoints=None)

    def described(self, notes: str) -> dict[str, Any]:
        (found,) = [c for c in self.manager.list_checkpoints() if c["notes"] == notes]
        return found

    def load(self, notes: str, **options: Any) -> dict[str, Any]:
        return self.manager.load_checkpoint(self.described(notes)["checkpoint_id"], **options)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.database) as connection:
            found = connection.execute(sql).fetchall()
        connection.close()
        return found

    def id_of(self, name: str) -> str:
        ((found,),) = self.rows(f"SELECT id FROM experiments WHERE name = '{name}'")
        return str(found)


@pytest.fixture
def golden(tmp_path: Path) -> Iterator[Golden]:
    made = Golden(tmp_path)
    yield made
    made.manager.close()


@pytest.fixture
def rebuilt(tmp_path: Path) -> Iterator[Golden]:
    """The checkpoint directory alone: its database was lost."""
    made = Golden(tmp_path, with_database=False)
    yield made
    made.manager.close()


def check_plain(state: dict[Any, Any]) -> None:
    assert list(state) == [
        "weights",
        "steps",
        "raw",
        "buffer",
        "nothing",
        "plain",
        "nested",
        "ordered",
        "empty",
    ]
    assert (type(state["weights"]), state["weights"].typecode) == (array, "f")
    assert [math.copysign(1, x) * abs(x) for x in state["weights"]] == [0.5, -0.0, 1.5]
    assert math.copysign(1, state["weights"][1]) == -1
    assert state["steps"] == array("q", [-(2**63), 0, 2**63 - 1])
    assert (state["raw"], type(state["raw"])) == (b"\x00\xff\n", bytes)
    assert (state["buffer"], type(state["buffer"])) == (bytearray(b"ab"), bytearray)
    assert state["nothing"] == b""
    *plain, infinite, nan, number = state["plain"]
    assert plain == [1, 2.5, None, True, "größe 🎉", 2**80]
    assert [type(x) for x in plain] == [int, float, type(None), bool, str, int]
    assert (infinite, math.isnan(nan), number) == (-math.inf, True, 1 + 2j)
    assert state["nested"] == {
        "tuple": (1, (2, [3])),
        "set": {1, 2},
        "frozen": frozenset({"a"}),
        5: "integer key",
        "$odd": "$",
    }
    assert (type(state["nested"]["set"]), type(state["nested"]["frozen"])) == (set, frozenset)
    assert (type(state["ordered"]), list(state["ordered"].items())) == (OrderedDict, [("z", 1), ("a", 2)])
    assert state["empty"] == {}


def check_torch(loaded: dict[str, Any], backend: str) -> None:
    torch = pytest.importorskip("torch")
    model = loaded["model_state_dict"]
    expected = {
        "embedding.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "head.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "transposed": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "float8": torch.tensor([0.5, 448.0], dtype=torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
        "zero_d": torch.tensor(7),
        "no_elements": torch.zeros(0, 3),
    }
    assert list(model) == list(expected)
    for name, tensor in expected.items():
        found = model[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found.float() if name == "float8" else found, tensor.float() if name == "float8" else tensor)
    model["embedding.weight"][0, 1] = 99.0  # what was tied is tied
    assert model["head.weight"][0, 1] == 99.0
    assert model["transposed"][1, 0] == 99.0
    optimizer = loaded["optimizer_state_dict"]
    assert optimizer["param_groups"][0]["lr"] == 0.25
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)
    assert torch.equal(optimizer["state"][0]["exp_avg"], torch.tensor([0.5, -0.5]) * (1 - 0.9))
    assert optimizer["state"][0]["step"] == 1
    fresh = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    fresh.load_state_dict(optimizer)
    assert (loaded["scheduler_state_dict"]["step_size"], loaded["scheduler_state_dict"]["base_lrs"]) == (2, [0.25])
    assert loaded["extra_state"] == {"rng": b"\x01\x02"}


# --- the database -----------------------------------------------------------------------------------------------


def test_the_golden_database_holds_the_first_migration(golden: Golden) -> None:
    with sqlite3.connect(GOLDEN / "database_v1.db") as connection:  # the file itself, which nobody has opened
        rows = connection.execute("SELECT number, name FROM migrations").fetchall()
    connection.close()
    assert rows == [(1, "create_tables")]
    assert golden.rows("SELECT number FROM migrations WHERE number = 1") == [(1,)]


def test_the_golden_files_name_no_machine() -> None:
    content = (GOLDEN / "database_v1.db").read_bytes()
    for trace in (b"/tmp", b"/home", b"/root", b"/var", str(GOLDEN).encode()):
        assert trace not in content


def test_the_golden_experiment_comes_back_exactly(golden: Golden) -> None:
    with ExperimentTracker.resume(golden.id_of("golden run"), golden.url) as run:
        found = run.record
    assert (found.name, found.project, found.status) == ("golden run", "golden", "running")  # it was resumed
    assert found.parent_id == golden.id_of("golden sweep")
    assert found.tags == ("baseline", "größe", 50)
    config = dict(found.config)
    assert math.isnan(config.pop("gap"))
    assert config == {
        "lr": 0.001,
        "optimizer": {"name": "adam", "betas": [0.9, 0.999]},
        "limit": math.inf,
        "$float": "text",
        "seed": None,
    }
    assert found.metadata == {"host": "golden"}
    assert found.created_at > 0


def test_the_golden_statuses_come_back(golden: Golden) -> None:
    found = golden.rows("SELECT name, status, ended_at > created_at FROM experiments ORDER BY name")
    assert found == [("golden run", "interrupted", 1), ("golden sweep", "completed", 1)]


def test_the_golden_metrics_come_back_exactly_and_in_order(golden: Golden) -> None:
    with ExperimentTracker.resume(golden.id_of("golden run"), golden.url) as run:
        points = run.get_metrics()
        run.log_metric("loss", 2.0, step=6)
        assert run.get_metrics("loss")[-1]["metric_value"] == 2.0
    losses = ["0.5", "nan", "inf", "-inf", "-0.0", "1e-300"]
    expected = [point for i, loss in enumerate(losses) for point in (("loss", loss, i), ("accuracy", repr(i / 4), i))]
    found = [(p["metric_name"], repr(p["metric_value"]), p["step"]) for p in points]
    assert found == [*expected, ("no step", "1.0", None)]
    stamps = [p["timestamp"] for p in points]
    assert stamps == sorted(stamps)


def test_the_golden_checkpoints_are_listed_as_they_were_saved(golden: Golden) -> None:
    listed = golden.manager.list_checkpoints()
    assert [c["notes"] for c in listed] == NOTES
    assert [c["epoch"] for c in listed] == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [c["sequence"] for c in listed] == [1, 3, 4, 5, 6, 7, 8, 9, 10]  # 2 was deleted
    assert [c["checkpoint_type"] for c in listed] == ["regular"] * 3 + ["milestone"] * 4 + ["regular"] * 2
    assert [c["backend"] for c in listed] == ["safetensors"] * 5 + ["pytorch"] * 2 + ["safetensors"] * 2
    assert {c["status"] for c in listed} == {"committed"}
    assert [c["notes"] for c in listed if c["pinned"]] == ["sharded"]
    assert {c["notes"]: c["best"] for c in listed if c["best"]} == {
        "plain": ["metrics.odd"],
        "plain gzip": ["loss"],
        "numpy": ["metrics.accuracy", "val_loss"],
    }
    assert all(c["verification"]["verified"] for c in listed)
    first = listed[0]
    assert (first["step"], first["loss"], first["model_name"]) == (10, 0.5, "small")
    assert math.isnan(first["val_loss"])
    assert first["metrics"] == {"accuracy": 0.25, "odd": math.inf}
    assert first["config"] == {"betas": [0.9, math.inf]}
    for each in listed:
        files = [path for path in Path(each["path"]).iterdir() if path.name != "checkpoint.json"]
        assert sum(path.stat().st_size for path in files) == each["size"]


def test_the_golden_trash_can_be_brought_back(golden: Golden) -> None:
    (entry,) = golden.manager.list_trash()
    assert entry["reason"] == "deleted by the user"
    with pytest.raises(CheckpointNotFoundError):
        golden.manager.load_checkpoint(entry["checkpoint_id"])
    golden.manager.undelete(entry["checkpoint_id"])
    assert golden.load("deleted")["model_state_dict"] == {"w": b"deleted"}
    assert golden.described("deleted")["best"] == ["loss"]  # 0.125, less than all others


# --- the checkpoints --------------------------------------------------------------------------------------------


def test_the_golden_directory_has_the_files_of_version_1() -> None:
    layout: dict[str, list[str]] = {}
    for manifest in sorted((GOLDEN / "checkpoints_v1").glob("*/*/checkpoint.json")):
        content = json.loads(manifest.read_text(encoding="utf-8"))
        assert content["format_version"] == 1
        files = sorted(path.name for path in manifest.parent.iterdir())
        assert files == sorted([*(file["name"] for file in content["files"]), "checkpoint.json"])
        layout[content["values"]["notes"]] = [name for name in files if name != "checkpoint.json"]
    parts = ["extra.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert layout == {
        "plain": ["model.safetensors", "state.json"],
        "plain gzip": ["model.safetensors.gz", "state.json.gz"],
        "numpy": ["model.safetensors", "state.json"],
        "torch safetensors": parts,
        "torch safetensors gzip": [f"{name}.gz" for name in parts],
        "torch pytorch": ["checkpoint.pt", "state.json"],
        "torch pytorch gzip": ["checkpoint.pt.gz", "state.json.gz"],
        "sharded": [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "state.json",
        ],
        "without digests": ["model.safetensors", "state.json"],
    }
    version = json.loads((GOLDEN / "checkpoints_v1" / ".engine" / "format.json").read_text())
    assert version["format_version"] == 1


def test_every_golden_checkpoint_verifies(golden: Golden) -> None:
    result = golden.manager.verify_experiment_integrity()
    assert (result["total_checkpoints"], result["verified"], result["failed"]) == (9, 9, 0)


@pytest.mark.parametrize("notes", ["plain", "plain gzip"])
@pytest.mark.parametrize("verify", [True, False])
def test_plain_states_load_exactly_from_the_standard_library(golden: Golden, notes: str, verify: bool) -> None:
    check_plain(golden.load(notes, verify_integrity=verify)["model_state_dict"])


@pytest.mark.parametrize("verify", [True, False])
def test_numpy_states_load_exactly(golden: Golden, verify: bool) -> None:
    np = pytest.importorskip("numpy")
    state = golden.load("numpy", verify_integrity=verify)["model_state_dict"]
    expected = {
        "matrix": np.arange(6, dtype=np.float64).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.array([1.5, -2.0], dtype=np.float16),
        "bytes": np.array([[0, 255]], dtype=np.uint8),
        "flags": np.array([True, False]),
        "complex": np.array([1 + 2j], dtype=np.complex128),
        "zero_d": np.array(7, dtype=np.int32),
        "no_elements": np.zeros((0, 3), dtype=np.int64),
    }
    scalar = state.pop("scalar")
    assert (type(scalar), scalar) == (np.float32, np.float32(0.1))
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape)
        assert np.array_equal(state[name], value)


@pytest.mark.parametrize("notes", [notes for notes in NOTES if notes.startswith("torch")])
@pytest.mark.parametrize("verify", [True, False])
def test_torch_states_load_exactly_with_optimizer_scheduler_and_ties(golden: Golden, notes: str, verify: bool) -> None:
    pytest.importorskip("torch")
    check_torch(golden.load(notes, verify_integrity=verify), notes)


def test_torch_itself_reads_the_golden_pytorch_file(golden: Golden) -> None:
    torch = pytest.importorskip("torch")
    path = Path(golden.described("torch pytorch")["path"]) / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["model_state_dict"]["bfloat16"], torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    assert content["optimizer_state_dict"]["param_groups"][0]["lr"] == 0.25


def test_the_reference_library_reads_the_golden_safetensors_file(golden: Golden) -> None:
    np = pytest.importorskip("numpy")
    reference = pytest.importorskip("safetensors.numpy")
    path = Path(golden.described("numpy")["path"]) / "model.safetensors"
    assert np.array_equal(reference.load_file(path)["matrix"], np.arange(6, dtype=np.float64).reshape(2, 3))


def test_shards_and_checkpoints_without_digests_load_exactly(golden: Golden) -> None:
    state = golden.load("sharded")["model_state_dict"]
    assert state == {f"part{i}": array("d", [float(i), -float(i)]) for i in range(4)}
    assert golden.load("without digests")["model_state_dict"] == {"w": b"unhashed"}


@pytest.mark.parametrize(
    ("kind", "notes"),
    [
        ("latest", "without digests"),
        ("best_loss", "plain gzip"),
        ("best_val_loss", "numpy"),
        ("best_metric", "numpy"),
        ("best:accuracy", "numpy"),
        ("best:odd", "plain"),
        ("milestone", "torch pytorch gzip"),
    ],
)
def test_the_golden_checkpoints_are_found_by_type(golden: Golden, kind: str, notes: str) -> None:
    expected = golden.described(notes)
    listed = golden.manager.list_checkpoints(golden.id_of("golden run"), kind)
    assert expected["checkpoint_id"] in [c["checkpoint_id"] for c in listed]
    if notes.startswith("torch"):
        pytest.importorskip("torch")
    loaded = golden.manager.load_checkpoint(experiment_id=golden.id_of("golden run"), checkpoint_type=kind)
    assert loaded["_checkpoint_metadata"]["checkpoint_id"] == expected["checkpoint_id"]


def test_a_changed_byte_of_each_golden_file_is_found(golden: Golden) -> None:
    """The digests in the golden manifests are compared, not only there."""
    database = EnhancedDatabaseConnection(golden.url)
    verifier = CheckpointVerifier(database)
    changed = set()
    for each in golden.manager.list_checkpoints():
        for path in Path(each["path"]).iterdir():
            if each["notes"] == "without digests" and path.name != "checkpoint.json":
                continue
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            changed.add(each["checkpoint_id"])
            result = verifier.verify_checkpoint(each["checkpoint_id"])
            assert not result["verified"], path
            assert path.name in result["error"]
            path.write_bytes(content)
    database.close()
    assert len(changed) == 9


def test_saving_goes_on_where_version_1_stopped(golden: Golden) -> None:
    with ExperimentTracker.resume(golden.id_of("golden run"), golden.url) as run:
        manager = EnhancedCheckpointManager(run, str(golden.directory), max_checkpoints=None)
        saved = manager.save_checkpoint({"w": b"new"}, epoch=11, loss=0.0625)
        assert manager.load_checkpoint(checkpoint_type="best_loss")["model_state_dict"] == {"w": b"new"}
        listed = manager.list_checkpoints()
    assert (listed[-1]["checkpoint_id"], listed[-1]["sequence"], len(listed)) == (saved, 11, 10)


# --- the checkpoints without their database ---------------------------------------------------------------------


def test_the_golden_directory_alone_gives_everything_back(rebuilt: Golden) -> None:
    listed = rebuilt.manager.list_checkpoints()
    assert [c["notes"] for c in listed] == NOTES
    assert {c["notes"]: c["best"] for c in listed if c["best"]} == {
        "plain": ["metrics.odd"],
        "plain gzip": ["loss"],
        "numpy": ["metrics.accuracy", "val_loss"],
    }
    assert rebuilt.manager.verify_experiment_integrity()["verified"] == 9
    check_plain(rebuilt.load("plain")["model_state_dict"])
    check_plain(rebuilt.load("plain gzip")["model_state_dict"])
    first = rebuilt.described("plain")
    assert (first["step"], first["loss"], first["model_name"]) == (10, 0.5, "small")
    assert math.isnan(first["val_loss"])
    assert first["metrics"] == {"accuracy": 0.25, "odd": math.inf}
    assert first["config"] == {"betas": [0.9, math.inf]}


def test_the_golden_manifests_tell_of_their_experiment(rebuilt: Golden) -> None:
    with ExperimentTracker.resume(rebuilt.id_of("golden run"), rebuilt.url) as run:
        found = run.record
    assert (found.name, found.project, found.tags) == ("golden run", "golden", ("baseline", "größe", 50))
    assert found.config["optimizer"] == {"name": "adam", "betas": [0.9, 0.999]}
    assert (found.config["limit"], found.config["$float"], found.metadata) == (math.inf, "text", {"host": "golden"})


def test_torch_states_load_from_the_directory_alone(rebuilt: Golden) -> None:
    pytest.importorskip("torch")
    for notes in NOTES:
        if notes.startswith("torch"):
            check_torch(rebuilt.load(notes), notes)


# --- schema versions 3 to 5 ------------------------------------------------------------------------------------

MIGRATIONS = [
    "create_tables",
    "blocks_and_scores",
    "drop_rows_of_points",
    "captures_projects_and_attempts",
    "claims_of_grids",
]


def resumed(path: Path) -> ExperimentTracker:
    with Queries(f"sqlite:///{path}") as queries:
        (found,) = queries.search_experiments("name == 'golden run'")
    return ExperimentTracker.resume(found.id, f"sqlite:///{path}")


@pytest.fixture(params=[3, 4, 5])
def later(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ExperimentTracker]:
    """The run of a copy of a golden database."""
    shutil.copy(GOLDEN / f"database_v{request.param}.db", tmp_path / "runs.db")
    with resumed(tmp_path / "runs.db") as run:
        yield run


@pytest.mark.parametrize("version", [3, 4, 5])
def test_the_golden_databases_are_of_their_versions(version: int) -> None:
    path = GOLDEN / f"database_v{version}.db"
    with sqlite3.connect(path) as connection:  # the file itself, which nobody has opened
        rows = connection.execute("SELECT number, name FROM migrations").fetchall()
    connection.close()
    assert rows == list(enumerate(MIGRATIONS[:version], 1))
    content = path.read_bytes()
    for trace in (b"/tmp", b"/home", b"/root", b"/var", str(GOLDEN).encode()):
        assert trace not in content


def test_metrics_of_later_versions_come_back_to_the_bit(later: ExperimentTracker) -> None:
    points = later.get_metrics("odd")
    values = [0.5, -0.0, math.nan, math.inf, -math.inf, 5e-324, 1 / 3]
    assert [point["metric_value"].hex() for point in points] == [value.hex() for value in values]
    assert [point["step"] for point in points] == [None, 0, -1, 2**63 - 1, -(2**63), 5, 4]
    assert len(later.get_metrics("größe/♥")) == 7
    long = later.metric_history("long", max_points=None)
    assert list(long.values) == [*(i / 7 for i in range(10_000)), -1.0]
    assert long.steps == [*range(0, 20_000, 2), 20_000]
    assert {-1.0, 9999 / 7} <= set(later.metric_history("long", 50).values)
    found = later.metric_summaries()["long"]
    assert (found["points"], found["min"], found["min_step"], found["max_step"]) == (10_001, -1.0, 20_000, 19_998)


def test_the_rest_of_later_versions_comes_back(later: ExperimentTracker) -> None:
    record = later.record
    assert (record.project, record.tags, record.metadata) == ("golden", ("a", 5), {"m": 1})
    assert record.config == {"lr": 1e-3, "layers": [64, 32], "net": {"act": "gelu", "deep": True}, "nothing": None}
    (attempt,) = later.attempts
    assert (attempt.number, attempt.points) == (1, 100)
    assert list(later.metric_history("long", attempt=1).values) == [0.0] * 100
    first, second = later.queries.search_checkpoints("experiment.name == 'golden run'", order_by="loss desc")
    assert (first.metrics["acc"], first.epoch, second.pinned, second.best) == (math.inf, 1, True, {"loss"})
    assert math.isnan(first.metrics["f1"])
    assert later.queries.search_checkpoints("metrics.acc > 1e300")[0].id == first.id
    (tree,) = later.queries.tree(root=later.experiment_id)
    assert [(child.name, child.status) for child in tree.children] == [("golden child", "failed")]
    (fork,) = later.queries.search_experiments("name == 'golden fork'")
    assert fork.forked_from == first.id == attempt.checkpoint_id
    later.log_metric("odd", 1.0)
    assert len(later.get_metrics("odd")) == 8


def test_claims_of_grids_come_back_from_version_5(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "database_v5.db", tmp_path / "runs.db")
    database = EnhancedDatabaseConnection(f"sqlite:///{tmp_path}/runs.db")
    assert database.claims.counts("golden grid") == {"open": 1, "claimed": 1, "completed": 0, "failed": 0}
    assert database.claims.take("golden grid", "w", 1.5, 9.0, 3) == (1, '{"lr":0.01}', None, 1)
    assert database.claims.take("golden grid", "w", 2.5, 9.0, 3) == (0, '{"lr":0.1}', None, 2)
    assert not database.claims.end("golden grid", 0, "golden worker", "done")
    database.close()


@pytest.mark.parametrize("version", [4, 5])
def test_projects_and_what_was_captured_come_back_from_version_4(tmp_path: Path, version: int) -> None:
    shutil.copy(GOLDEN / f"database_v{version}.db", tmp_path / "runs.db")
    with resumed(tmp_path / "runs.db") as run:
        assert run.captured == {"captured_at": 1.5, "git": None}
        found = run.queries.projects()["golden"]
        assert (found.tags, found.metadata, found.totals.experiments) == (("p",), {"owner": "golden"}, 3)


def test_what_version_3_captured_leaves_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    shutil.copy(GOLDEN / "database_v3.db", path)
    theirs = {"m": 1, "captured": {"captured_at": 2.5, "host": {"$$name": "a"}}}
    mine = {"captured": "on tape", "captured_at": 7}
    with sqlite3.connect(path) as connection:
        for name, metadata in (("golden run", theirs), ("golden fork", mine)):
            connection.execute("UPDATE experiments SET metadata = ? WHERE name = ?", (json.dumps(metadata), name))
    connection.close()
    with resumed(path) as run:
        assert (run.record.metadata, run.captured) == ({"m": 1}, {"captured_at": 2.5, "host": {"$name": "a"}})
        (fork,) = run.queries.search_experiments("name == 'golden fork'")
        assert fork.metadata == mine
        assert run.database.experiments.captured(fork.id) is None


def test_a_checkpoint_of_version_3_brings_the_metrics_of_its_attempt_back(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "database_v3.db", tmp_path / "runs.db")
    with resumed(tmp_path / "runs.db") as run:
        (second,) = run.queries.search_checkpoints("epoch == 2")
    with ExperimentTracker.resume(run.experiment_id, f"sqlite:///{tmp_path}/runs.db", at_checkpoint=second.id) as run:
        assert list(run.metric_history("long", None).values) == [*(i / 7 for i in range(10_000)), *[0.0] * 100]
        assert list(run.metric_history("long", attempt=2).values) == [-1.0]
