"""Loading into objects that exist: filled where they are, all or nothing, without a second copy of the state."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from helpers_storage import Store, exact, needs_numpy, needs_torch, needs_zstandard, np, torch

import model_checkpoint.integrity.sha256 as sha256
from model_checkpoint.arrays import HostArray, Layout
from model_checkpoint.checkpoint.places import place_of, shared
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, IntegrityError, StateMismatchError

ROOT = Path(__file__).parents[2]
needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory are reset by Linux's /proc/self/clear_refs"
)
FORMS = [
    ("safetensors", False),
    pytest.param("safetensors", True, marks=needs_zstandard),
    pytest.param("pytorch", False, marks=needs_torch),
    pytest.param("pytorch", True, marks=[needs_torch, needs_zstandard]),
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s", max_checkpoints=None, io_threads=3)
    yield store
    store.close()


def network(seed: int, width: int = 6) -> Any:
    torch.manual_seed(seed)
    tied = torch.nn.Linear(width, width)
    return torch.nn.Sequential(torch.nn.BatchNorm1d(width), tied, torch.nn.ReLU(), tied, torch.nn.Linear(width, 3))


def training(seed: int, steps: int, width: int = 6) -> tuple[Any, Any, Any]:
    """Return model, optimizer and scheduler after some steps."""
    model = network(seed, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, width)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def states(*objects: Any) -> Any:
    return exact([each.state_dict() for each in objects])


def addresses(state: Any) -> list[int]:
    if isinstance(state, (dict, list)):
        items = state.values() if isinstance(state, dict) else state
        return [address for item in items for address in addresses(item)]
    return [state.data_ptr()] if isinstance(state, torch.Tensor) else []


@needs_torch
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("backend", "compressed"), FORMS)
def test_training_goes_on_in_the_same_memory_as_if_it_had_never_stopped(
    backend: str, compressed: bool, verify: bool, tmp_path: Path
) -> None:
    store = Store(tmp_path / "s", backend, enable_compression=compressed)
    for width in (6,) if compressed or backend == "pytorch" else (6, 1100):  # in one chunk, and over several
        saved = training(1, 3, width)
        told = store.manager.load_into(*training(2, 1, width), checkpoint_id=store.save(*saved, epoch=3, loss=0.5))
        assert (told["epoch"], told["loss"]) == (3, 0.5)
        target = training(3, 2, width)
        before = addresses([each.state_dict() for each in target])
        store.manager.load_into(*target, verify_integrity=verify)
        assert states(*target) == states(*saved)
        assert addresses([each.state_dict() for each in target]) == before
        for model, optimizer, scheduler in (saved, target):
            torch.manual_seed(4)
            optimizer.zero_grad()
            model(torch.randn(4, width)).square().sum().backward()
            optimizer.step()
            scheduler.step()
        assert states(*target) == states(*saved)
    store.close()


@needs_torch
def test_a_new_optimizer_gets_its_moments_and_parts_can_be_left_out(store: Store) -> None:
    model, optimizer, scheduler = training(1, 3)
    store.save(model, optimizer, scheduler)
    fresh = training(2, 0)
    store.manager.load_into(fresh[0], fresh[1])
    assert states(*fresh[:2]) == states(model, optimizer)
    assert states(fresh[2]) != states(scheduler)
    only = training(3, 1)
    kept = states(*only[:2])
    store.manager.load_into(scheduler=only[2])
    assert (states(*only[:2]), states(only[2])) == (kept, states(scheduler))


def test_plain_objects_are_filled_where_they_are_and_values_replaced(store: Store) -> None:
    values = {
        "a": array("d", [1, 2]),
        "b": bytearray(b"abc"),
        "m": memoryview(bytearray(b"xy")),
        "list": [array("f", [3]), 4, "text"],
        "tuple": (array("f", [5]), 6),
        7: array("b", [8]),
        "n": None,
        "bytes": b"new",
        "empty": array("d"),
        "more": {"lr": 0.5},
    }
    store.save(values)
    target: dict[Any, Any] = {
        "a": array("d", [0, 0]),
        "b": bytearray(3),
        "m": memoryview(bytearray(2)),
        "list": [array("f", [0]), 0, ""],
        "tuple": (array("f", [0]), 0),
        7: array("b", [0]),
        "n": 1,
        "bytes": b"old",
        "empty": array("d"),
        "more": {},
    }
    inner = [target["a"], target["b"], target["list"], target["list"][0], target["tuple"][0], target[7]]
    store.manager.load_into(target)
    assert exact(target) == exact(values)
    now = [target["a"], target["b"], target["list"], target["list"][0], target["tuple"][0], target[7]]
    assert all(was is found for was, found in zip(inner, now))


@needs_numpy
@needs_torch
def test_targets_with_gaps_ties_and_views_are_filled_where_they_are(store: Store) -> None:
    base = torch.arange(10.0)
    values = {
        "numpy": np.arange(6.0).reshape(2, 3),
        "in a tuple": (np.arange(4.0),),
        "torch": torch.arange(6.0).reshape(2, 3),
        "conj": torch.tensor([1 + 2j]),
        "low": base[:6],
        "high": base[4:],
        "tied": [base[:6]],
        "scalar": torch.tensor(3.0),
        "flat": np.float32(2.5),
    }
    store.save(values)
    memory = {"numpy": np.zeros((3, 2)), "tuple": np.zeros(8), "torch": torch.zeros(3, 2), "base": torch.zeros(10)}
    conjugate = torch.zeros(1, dtype=torch.complex64)
    target = {
        "numpy": memory["numpy"].T,
        "in a tuple": (memory["tuple"][::2],),
        "torch": memory["torch"].t(),
        "conj": conjugate.conj(),
        "low": memory["base"][:6],
        "high": memory["base"][4:],
        "tied": [memory["base"][:6]],
        "scalar": torch.tensor(0.0),
        "flat": np.float32(0),
    }
    store.manager.load_into(target)
    assert exact(target) == exact(values)
    assert memory["numpy"].T.tolist() == values["numpy"].tolist()
    assert memory["tuple"].tolist() == [0, 0, 1, 0, 2, 0, 3, 0]
    assert torch.equal(memory["torch"].t(), values["torch"])
    assert torch.equal(memory["base"], base)
    assert conjugate.tolist() == [1 - 2j]


# What does not fit


@needs_torch
@pytest.mark.parametrize(
    "case",
    ["shape", "dtype", "missing", "unexpected", "kind", "nothing saved", "no parameters", "groups", "parameters"],
)
def test_what_does_not_fit_is_listed_and_nothing_is_changed(store: Store, case: str) -> None:
    model, optimizer, _ = training(1, 2)
    store.save(model, optimizer if case != "nothing saved" else None)
    target, moments, _ = training(2, 1)
    if case == "shape":
        target[4] = torch.nn.Linear(6, 5)
    elif case == "dtype":
        target[0].double()
    elif case == "missing":
        target[4].bias = None
    elif case == "unexpected":
        target.append(torch.nn.Linear(3, 3))
    elif case == "kind":
        target = {name: tensor.tolist() for name, tensor in target.state_dict().items()}
    elif case == "no parameters":
        target = torch.nn.ReLU()
    elif case == "groups":
        moments = torch.optim.AdamW([{"params": [each]} for each in target.parameters()])
    elif case == "parameters":
        moments = torch.optim.AdamW(list(target.parameters())[:-1])
    before = exact(target) if isinstance(target, dict) else states(target)
    before_moments = states(moments)
    with pytest.raises(StateMismatchError) as caught:
        store.manager.load_into(target, moments)
    assert caught.value.problems
    assert caught.value.problems[0] in str(caught.value)
    expected = {"shape": 2, "dtype": 4, "missing": 1, "unexpected": 2}
    assert len(caught.value.problems) == expected.get(case, len(caught.value.problems))
    assert (exact(target) if isinstance(target, dict) else states(target)) == before
    assert states(moments) == before_moments
    assert store.manager.list_checkpoints()[0]["status"] == "committed"


@needs_numpy
@needs_torch
def test_targets_that_cannot_take_the_values_are_refused_before_anything_is_changed(store: Store) -> None:
    store.save({"a": np.ones(3), "b": np.full(3, 2.0), "c": torch.ones(2), "d": torch.zeros(2)})
    shared = torch.full((2,), 9.0)
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    target = {"a": np.zeros(3), "b": frozen, "c": shared, "d": shared}
    with pytest.raises(StateMismatchError) as caught:
        store.manager.load_into(target)
    assert len(caught.value.problems) == 2
    assert "model.b" in caught.value.problems[0]
    assert "model.d" in caught.value.problems[1]
    assert (target["a"].tolist(), shared.tolist()) == ([0, 0, 0], [9, 9])


def test_what_cannot_be_asked_for_is_refused(store: Store) -> None:
    with pytest.raises(ConfigurationError, match="nothing to load into"):
        store.manager.load_into()
    with pytest.raises(CheckpointNotFoundError):
        store.manager.load_into({"w": array("d", [0])})


@pytest.mark.parametrize("libcrypto", [True, False])
@pytest.mark.parametrize("where", [0, 100, -1])
def test_a_corrupt_file_changes_nothing(
    store: Store, where: int, libcrypto: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not libcrypto:
        monkeypatch.setattr(sha256, "_libcrypto", lambda: None)
    saved = store.save({"a": array("d", [1]) * 700_000, "b": array("d", [2]) * 700_000})
    file = store.path(saved) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)
    target = {"a": array("d", bytes(5_600_000)), "b": array("d", bytes(5_600_000))}
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        store.manager.load_into(target)
    assert not any(target["a"].tobytes() + target["b"].tobytes())
    assert store.row(saved)["status"] == "corrupt"


def test_a_pending_save_is_waited_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", async_save=True)
    for epoch in range(5):
        state = {"w": array("d", [epoch]) * 100_000}
        store.save(state, epoch=epoch)
        state["w"][:] = array("d", [-1]) * 100_000
        assert store.manager.load_into(state)["epoch"] == epoch
        assert set(state["w"]) == {epoch}
    store.close()


PEAK = """
import sys
from array import array
from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker

def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith(field))

folder, verify = sys.argv[1], sys.argv[2] == "True"
tracker = ExperimentTracker("memory", database_url=f"sqlite:///{folder}/e.db")
manager = EnhancedCheckpointManager(tracker, folder + "/c", io_threads=2)
state = {f"w{i}": array("d", [i + 1]) * (1 << 20) for i in range(24)}  # 192 MiB
state["one"] = array("d", [99]) * (4 << 20)  # 32 MiB
manager.save_checkpoint(state)
for values in state.values():
    values[0] = -1
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = memory("VmHWM")
manager.load_into(state, verify_integrity=verify)
print(memory("VmHWM") - before)
assert all(values[0] == values[-1] > 0 for values in state.values())
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("verify", [True, False])
def test_a_state_of_224_mib_is_loaded_with_less_than_40_more(tmp_path: Path, verify: bool) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(verify)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40


@needs_torch
def test_an_object_whose_state_dict_is_a_copy_is_given_what_was_loaded(store: Store) -> None:
    class Half(torch.nn.Linear):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            return {name: tensor.half() for name, tensor in super().state_dict(*arguments, **options).items()}

    saved, filled = Half(2, 2), Half(2, 2)
    store.manager.load_into(filled, checkpoint_id=store.save(saved))
    assert torch.equal(filled.weight.half(), saved.weight.half())
    assert torch.equal(filled.bias.half(), saved.bias.half())


@needs_torch
def test_an_expanded_tensor_is_refused_before_anything_is_changed(store: Store) -> None:
    saved = store.save({"a": torch.ones(3), "b": torch.ones(4, 2)})
    target = {"a": torch.zeros(3), "b": torch.zeros(2).expand(4, 2)}
    with pytest.raises(StateMismatchError, match=r"model\.b: several of its elements are one place in memory"):
        store.manager.load_into(target, checkpoint_id=saved)
    assert target["a"].tolist() == [0.0, 0.0, 0.0]


def test_values_in_a_tuple_that_differ_are_refused_and_those_that_do_not_are_fine(store: Store) -> None:
    saved = store.save((array("d", [1.0]), {"lr": 0.1}, 5, (array("d", [2.0]), "name")))
    first, last = array("d", [0.0]), array("d", [0.0])
    for other in [(first, {"lr": 0.2}, 6, (last, "name")), (first, {"lr": 0.2}, 5, (last, "eman"))]:
        with pytest.raises(StateMismatchError, match="lies in what cannot be changed, such as a tuple; use a list"):
            store.manager.load_into(other, checkpoint_id=saved)
    assert (first[0], last[0]) == (0.0, 0.0)
    target = (first, {"lr": 0.2}, 5, (last, "name"))
    store.manager.load_into(target, checkpoint_id=saved)
    assert target == (array("d", [1.0]), {"lr": 0.1}, 5, (array("d", [2.0]), "name"))


def test_what_cannot_be_changed_and_is_in_a_tuple_is_refused(store: Store) -> None:
    saved = store.save((b"new", array("d", [1.0])))
    target = (b"old", array("d", [0.0]))
    with pytest.raises(
        StateMismatchError, match="cannot be changed, and lies in what cannot be changed, such as a tuple"
    ):
        store.manager.load_into(target, checkpoint_id=saved)
    assert target[1][0] == 0.0
    inside = {"pair": target}
    saved = store.save({"pair": (b"new", array("d", [1.0]))})
    store.manager.load_into(inside, checkpoint_id=saved)
    assert inside == {"pair": (b"new", array("d", [1.0]))}
    assert inside["pair"][1] is target[1]


A, B = array("d", [1.0]), array("d", [2.0])


@pytest.mark.parametrize(
    ("saved", "target", "problem"),
    [
        ({"w": A, "hist": [1, 2]}, lambda w: {"w": w, "hist": [9, 9, 9, 9]}, "model.hist.2: is there, was not saved"),
        ({"w": A, "a": 1}, lambda w: {"w": w, "b": 2}, "model.b: is there, was not saved"),
        ({"w": A, "c": {"a": 1}}, lambda w: {"w": w, "c": ["x"]}, "model.c: a dict was saved, there is a list"),
        ({"w": A, "c": 1.0}, lambda w: {"w": w, "c": array("d", [9.0])}, "model.c: no array was saved"),
        ({"w": A, "c": None}, lambda w: {"w": w, "c": {"a": array("d", [9.0])}}, "model.c: no array was saved"),
        ((A, [B]), lambda w: (w, []), "model.1.0: was saved, there is no place for it"),
        ((A, (B,)), lambda w: (w, ()), "model.1.0: was saved, there is no place for it"),
        ({"w": A}, lambda w: [w], "model: a dict of arrays was saved, there is a list"),
        ({"w": 1}, lambda w: "abc", "model: a str cannot be filled"),
        ({"w": A}, lambda w: 5, "model: a int cannot be filled"),
    ],
)
def test_what_plain_objects_cannot_take_is_refused_and_nothing_is_changed(
    store: Store, saved: Any, target: Any, problem: str
) -> None:
    first = array("d", [9.0])
    made = target(first)
    with pytest.raises(StateMismatchError, match=problem):
        store.manager.load_into(made, checkpoint_id=store.save(saved))
    assert first[0] == 9.0
    assert made == target(first)


def test_values_inside_tuples_of_tuples_and_behind_mappings_are_filled(store: Store) -> None:
    inner = {"lr": 0.9, "w": array("d", [9.0])}
    store.manager.load_into(((inner,),), checkpoint_id=store.save((({"lr": 0.1, "w": A},),)))
    assert inner == {"lr": 0.1, "w": A}
    outer: dict[str, Any] = {"c": MappingProxyType({"lr": 0.9, "w": array("d", [9.0])})}
    store.manager.load_into(outer, checkpoint_id=store.save({"c": {"lr": 0.1, "w": A}}))
    assert dict(outer["c"]) == {"lr": 0.1, "w": A}


@needs_torch
def test_targets_that_overlap_and_did_not_when_saved_are_refused(store: Store) -> None:
    saved = store.save({"flat": torch.arange(6.0), "w": torch.zeros(2)})
    flat = torch.zeros(6)
    with pytest.raises(StateMismatchError, match=r"model\.w: shares its memory with model\.flat"):
        store.manager.load_into({"flat": flat, "w": flat[2:4]}, checkpoint_id=saved)
    saved = store.save({"w": torch.arange(6.0).reshape(3, 2)})
    with pytest.raises(StateMismatchError, match="several of its elements are one place"):
        store.manager.load_into({"w": flat[:4].as_strided((3, 2), (1, 1))}, checkpoint_id=saved)
    assert flat.tolist() == [0.0] * 6
    columns = store.save({"a": torch.arange(3.0), "b": torch.arange(10.0, 13.0)})
    matrix = torch.zeros(3, 2)
    store.manager.load_into({"a": matrix[:, 0], "b": matrix[:, 1]}, checkpoint_id=columns)
    assert matrix.tolist() == [[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]]


@needs_torch
def test_arrays_that_overlap_or_were_one_stay_the_objects_that_they_are(store: Store) -> None:
    flat = torch.arange(10.0)
    state = {"a": flat[:6], "b": flat[4:]}
    before, saved = dict(state), store.save(state)
    flat.zero_()
    store.manager.load_into(state, checkpoint_id=saved)
    assert flat.tolist() == list(range(10))
    assert all(state[name] is before[name] for name in state)
    for tied in ({"a": flat, "b": flat}, {"a": flat, "b": flat.view(2, 5)[0]}):
        saved = store.save(tied)
        apart = {name: torch.zeros_like(tensor) for name, tensor in tied.items()}
        before = dict(apart)
        store.manager.load_into(apart, checkpoint_id=saved)
        assert all(apart[name] is before[name] and torch.equal(apart[name], tied[name]) for name in apart)


def buffers() -> tuple[Any, Any]:
    memory = bytearray(8)
    return memory, np.frombuffer(memory, dtype=np.uint8)


def arrays() -> tuple[Any, Any]:
    memory = array("d", [0.0] * 4)
    return memory, np.frombuffer(memory)


def views() -> tuple[Any, Any]:
    memory = array("d", [0.0] * 4)
    return memory, memoryview(memory)


SHARING: dict[str, Callable[[], tuple[Any, Any]]] = {
    "a matrix and columns of it": lambda: (w := torch.zeros(4, 4), w[:, 1:3]),
    "columns that overlap": lambda: ((w := torch.zeros(4, 4))[:, 0:2], w[:, 1:3]),
    "every second and every second of a part": lambda: ((x := torch.zeros(10))[::2], x[2:8:2]),
    "backwards": lambda: ((x := np.zeros(6))[::-1], x),
    "backwards in part": lambda: (x := np.zeros(6), x[3:0:-1]),
    "blocks of a cube with one row in common": lambda: ((w := torch.zeros(2, 4, 8))[:, :2, :4], w[:, 1:, :4]),
    "steps of two and of three": lambda: ((x := torch.zeros(20))[::2], x[1::3]),
    "conjugates": lambda: (w := torch.zeros(3, dtype=torch.complex64), w.conj()),
    "a buffer and its array": buffers,
    "an array of Python and NumPy's": arrays,
    "a memoryview of another": views,
}
APART: dict[str, Callable[[], tuple[Any, Any]]] = {
    "columns": lambda: ((w := torch.zeros(4, 4))[:, 0:2], w[:, 2:4]),
    "odd and even": lambda: ((x := torch.zeros(10))[::2], x[1::2]),
    "parts of three matrices in one": lambda: ((w := torch.zeros(3, 6, 2))[:, 0:2], w[:, 4:6]),
    "one element in a gap": lambda: ((x := torch.zeros(9))[::3], x[4:5]),
    "blocks of a cube": lambda: ((w := torch.zeros(2, 4, 8))[:, :2, :4], w[:, 2:, :4]),
    "steps of two and of four": lambda: ((x := torch.zeros(20))[::2], x[1::4]),
    "rows backwards": lambda: ((x := np.zeros((4, 2)))[1::-1], x[3:1:-1]),
}


@needs_numpy
@needs_torch
@pytest.mark.parametrize("case", SHARING)
def test_targets_that_share_memory_in_whatever_form_are_refused(store: Store, case: str) -> None:
    one, other = SHARING[case]()
    saved = store.save({"a": alone(one), "b": alone(other)})
    before = (exact(alone(one)), exact(alone(other)))
    with pytest.raises(StateMismatchError, match="shares its memory with"):
        store.manager.load_into({"a": one, "b": other}, checkpoint_id=saved)
    assert (exact(alone(one)), exact(alone(other))) == before


@needs_numpy
@needs_torch
@pytest.mark.parametrize("case", APART)
def test_targets_side_by_side_are_filled(store: Store, case: str) -> None:
    one, other = APART[case]()
    a, b = alone(one), alone(other)
    a[...], b[...] = 1.0, 2.0
    store.manager.load_into({"a": one, "b": other}, checkpoint_id=store.save({"a": a, "b": b}))
    assert exact([alone(one), alone(other)]) == exact([a, b])


@needs_torch
def test_parts_of_one_saved_array_are_filled_only_where_they_share_memory_as_they_did(store: Store) -> None:
    flat, other = torch.arange(10.0), torch.zeros(12)
    views = store.save({"a": flat[:6], "b": flat[4:]})
    with pytest.raises(StateMismatchError, match="saved otherwise"):
        store.manager.load_into({"a": other[:6], "b": other[5:11]}, checkpoint_id=views)
    tied = store.save({"a": flat[:4], "b": flat[:4]})
    with pytest.raises(StateMismatchError, match="saved otherwise"):
        store.manager.load_into({"a": other[:4], "b": other[1:5]}, checkpoint_id=tied)
    square = flat[:9].view(3, 3)
    turned = store.save({"a": square, "b": square.T})
    with pytest.raises(StateMismatchError, match="saved otherwise"):
        store.manager.load_into({"a": other[:9].view(3, 3), "b": other[:9].view(3, 3)}, checkpoint_id=turned)
    assert other.tolist() == [0.0] * 12
    store.manager.load_into({"a": other[1:7], "b": other[5:11]}, checkpoint_id=views)
    assert other.tolist() == [0.0, *range(10), 0.0]
    whole = other[:9].view(3, 3)
    store.manager.load_into({"a": whole, "b": whole.T}, checkpoint_id=turned)
    assert whole.tolist() == square.tolist()
    store.manager.load_into({"a": other[:4], "b": other[:4]}, checkpoint_id=tied)
    assert other[:4].tolist() == [0.0, 1.0, 2.0, 3.0]


@needs_numpy
def test_places_share_a_byte_exactly_when_numpy_says_so() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    memory = np.zeros((4, 6, 5))
    told = {True: 0, False: 0}
    for _ in range(500):
        one, other = (memory[tuple(cut(chance, length) for length in memory.shape)] for _ in range(2))
        places = [
            place_of(HostArray("float64", x.shape, EMPTY, "numpy", layout(x)), NODES[i], str(i))
            for i, x in enumerate((one, other))
        ]
        found = bool(shared([place for place in places if place is not None]))
        assert found == np.shares_memory(one, other), (one.__array_interface__, other.__array_interface__)
        told[found] += 1
    assert min(told.values()) > 20


EMPTY = memoryview(b"")
NODES: list[dict[str, Any]] = [{"$array": name, "of": "model"} for name in "ab"]


def cut(chance: random.Random, length: int) -> slice:
    begin = chance.randrange(length)
    return slice(begin, chance.randint(begin + 1, length), chance.choice([1, 1, 2, 3]))


def layout(view: Any) -> Layout:
    strides = tuple(step // view.itemsize for step in view.strides)
    return Layout("cpu", view.ctypes.data, "float64", view.shape, strides)


def alone(target: Any) -> Any:
    """Return a copy in memory of its own."""
    if isinstance(target, memoryview):
        return memoryview(bytearray(target)).cast(target.format)
    return target.clone().resolve_conj() if isinstance(target, torch.Tensor) else copy.copy(target)


def test_a_class_in_place_of_its_object_is_refused(store: Store) -> None:
    class Model:
        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(StateMismatchError, match="Model is a class"):
        store.manager.load_into(Model, checkpoint_id=store.save({}))


@needs_torch
def test_autograd_notices_that_a_tensor_was_filled(store: Store) -> None:
    saved = store.save({"w": torch.arange(3.0)})
    weight = torch.ones(3, requires_grad=True)
    result = (weight * weight).sum()
    store.manager.load_into({"w": weight}, checkpoint_id=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@needs_torch
def test_a_model_with_a_part_that_was_not_saved_is_refused_before_it_is_changed(store: Store) -> None:
    class Counting(torch.nn.Linear):
        def get_extra_state(self) -> Any:
            return {"count": 3}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError("never")

    plain, counting = torch.nn.Linear(2, 2), Counting(2, 2)
    before = counting.weight.clone()
    with pytest.raises(StateMismatchError, match=r"model\._extra_state: is there, was not saved"):
        store.manager.load_into(counting, checkpoint_id=store.save(plain))
    assert torch.equal(counting.weight, before)


def test_an_object_that_cannot_be_given_a_state_is_refused(store: Store) -> None:
    class OneWay:
        def state_dict(self) -> Any:
            return {"w": array("d", [9.0])}

    with pytest.raises(StateMismatchError, match="OneWay has state_dict\\(\\) and no load_state_dict"):
        store.manager.load_into(OneWay(), checkpoint_id=store.save({"w": A}))


@pytest.mark.parametrize("harm", ["missing", "head"])
def test_without_verification_a_bad_second_file_is_found_before_the_first_is_used(store: Store, harm: str) -> None:
    saved = store.save({"a": array("d", [1.0]) * 600}, {"b": array("d", [2.0]) * 600})
    (path,) = Path(store.manager.checkpoint_dir).glob(f"*/{saved}/optimizer.safetensors")
    content = path.read_bytes()
    path.unlink() if harm == "missing" else path.write_bytes(content[:8] + b"[" + content[9:])
    model, optimizer = {"a": array("d", [9.0]) * 600}, {"b": array("d", [9.0]) * 600}
    with pytest.raises(IntegrityError):
        store.manager.load_into(model, optimizer, checkpoint_id=saved, verify_integrity=False)
    assert set(model["a"]) == {9.0}
