"""Restoring into objects: what fits is put there, what does not is told before anything is touched."""

from __future__ import annotations

import copy
import logging
import random
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers_storage import Store, exact, needs_numpy, needs_torch, np, torch

from model_checkpoint.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    IntegrityError,
    RestoreFailedError,
    StateMismatchError,
    UnsupportedValueError,
)

NOTHING = {"missing": [], "unexpected": [], "mismatched": [], "renamed": {}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s", max_checkpoints=None)
    yield store
    store.close()


def floats(*values: float) -> array[float]:
    return array("d", values)


class Counter:
    """An object with get_state and set_state, of a state that is no dict."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_state(self) -> Any:
        return ("count", self.count, floats(self.count))

    def set_state(self, state: Any) -> None:
        assert state[0] == "count"
        self.count = state[1]


class Moments(NamedTuple):
    count: Any
    mean: Any


# What comes back, and where


def test_what_was_given_is_filled_where_it_is_and_returned_with_the_values_of_the_save(store: Store) -> None:
    state = {"w": floats(1, 2), "steps": 3}
    saved = store.save(state, step=7, epoch=2, loss=0.5, metrics={"accuracy": 0.9}, config={"lr": 0.1})
    target = {"w": floats(0, 0), "steps": 0}
    inner = target["w"]
    restored = store.manager.restore(target)
    assert restored["model"] is target
    assert target["w"] is inner
    assert exact(target) == exact(state)
    assert (restored["step"], restored["epoch"], restored["loss"]) == (7, 2, 0.5)
    assert (restored["metrics"], restored["config"]) == ({"accuracy": 0.9}, {"lr": 0.1})
    assert restored["_checkpoint_metadata"]["checkpoint_id"] == saved
    assert restored["report"] == NOTHING
    assert (restored["optimizer"], restored["scheduler"], restored["extra_state"]) == (None, None, None)


def test_the_best_so_far_is_that_of_the_checkpoint_and_not_what_came_later(store: Store) -> None:
    state = {"w": floats(1)}
    for loss in (0.5, 0.25, 0.75, 0.125):
        store.save(state, loss=loss, metrics={"accuracy": 1 - loss})
    ids = [found["checkpoint_id"] for found in store.manager.list_checkpoints()]
    bests = [store.manager.restore(state, checkpoint_id=saved)["best"] for saved in ids]
    assert [best["loss"] for best in bests] == [0.5, 0.25, 0.25, 0.125]
    assert [best["accuracy"] for best in bests] == [0.5, 0.75, 0.75, 0.875]


def test_objects_of_any_kind_are_found_wherever_they_lie(store: Store) -> None:
    extra = {"loaders": [Counter(1), (Counter(2),)], "generator": random.Random(3), "name": "x", "none": None}
    store.save({"w": floats(1)}, extra_state=extra)
    expected = [random.Random(3).random() for _ in range(1)]
    target = {"loaders": [Counter(0), (Counter(0),)], "generator": random.Random(9), "name": "", "none": 5}
    kept = [target["loaders"][0], target["loaders"][1][0], target["generator"]]  # type: ignore[index]
    store.manager.restore(extra_state=target)
    assert [kept[0].count, kept[1].count] == [1, 2]
    assert [kept[2].random()] == expected
    assert (target["name"], target["none"]) == ("x", None)
    assert target["loaders"][0] is kept[0]  # type: ignore[index]


def test_named_tuples_come_back_as_themselves_with_a_template_and_as_tuples_without(store: Store) -> None:
    saved = store.save([Moments(1, {"w": floats(1)}), Moments(2, {"w": floats(2)})])
    assert store.load(saved)["model_state_dict"] == [(1, {"w": floats(1)}), (2, {"w": floats(2)})]
    assert store.load(saved, keys="model.1.mean.*")["model_state_dict"] == [None, (None, {"w": floats(2)})]
    target = [Moments(0, {"w": floats(0)}), Moments(0, {"w": floats(0)})]
    memory = target[0].mean["w"]
    store.manager.restore(target)
    assert target == [Moments(1, {"w": floats(1)}), Moments(2, {"w": floats(2)})]
    assert type(target[1]) is Moments
    assert target[0].mean["w"] is memory
    alone = Moments(0, {"w": floats(0)})
    restored = store.manager.restore(alone, checkpoint_id=store.save(Moments(5, {"w": floats(5)})))
    assert (restored["model"], type(restored["model"])) == (Moments(5, {"w": floats(5)}), Moments)


@needs_numpy
def test_numpys_generators_go_on_where_they_were(store: Store) -> None:
    kinds: list[Any] = [np.random.PCG64, np.random.Philox, np.random.SFC64, np.random.MT19937, np.random.PCG64DXSM]
    made = {kind.__name__: np.random.Generator(kind(1)) for kind in kinds}
    extra = {**made, "legacy": np.random.RandomState(2), "bits": np.random.PCG64(3)}
    for generator in made.values():
        generator.integers(10, dtype=np.uint32)  # some keep half of a word for the next
    extra["legacy"].normal()
    store.save({}, extra_state=extra)

    def draw(generators: Any) -> list[Any]:
        drawn = [generators[name].integers(1 << 20, dtype=np.uint32) for name in made]
        return [*drawn, generators["legacy"].normal(), generators["bits"].random_raw()]

    expected = draw(extra)
    fresh = {kind.__name__: np.random.Generator(kind(8)) for kind in kinds}
    target = {**fresh, "legacy": np.random.RandomState(8), "bits": np.random.PCG64(8)}
    store.manager.restore(extra_state=target)
    assert draw(target) == expected
    with pytest.raises(StateMismatchError, match=r"extra\.PCG64: a PCG64 was saved, there is a Philox"):
        store.manager.restore(extra_state={**target, "PCG64": np.random.Generator(np.random.Philox(1))})


# Random states


def draws() -> list[float]:
    drawn = [random.random(), random.gauss(0, 1)]
    drawn += [] if np is None else [float(np.random.rand()), float(np.random.normal())]
    return drawn + ([] if torch is None else torch.rand(3).tolist())


def test_random_states_go_on_where_they_were(store: Store) -> None:
    state = {"w": floats(1)}
    draws()  # of normal numbers there are two at a time: one is kept
    saved = store.save(state)
    expected = draws()
    assert draws() != expected
    store.manager.restore(state)
    assert draws() == expected
    store.manager.restore(state, checkpoint_id=saved, restore_rng=False)
    assert draws() != expected
    store.manager.load_into(state)
    assert draws() != expected


def test_random_states_that_were_not_saved_stay_as_they_are(store: Store) -> None:
    state = {"w": floats(1)}
    store.save(state, save_rng=False)
    random.seed(1)
    expected = draws()[0]
    random.seed(1)
    store.manager.restore(state)
    assert draws()[0] == expected


def test_a_background_save_has_the_random_states_of_its_call(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", async_save=True)
    state = {"w": floats(1)}
    store.save(state)
    expected = draws()
    store.manager.restore(state)
    assert draws() == expected
    store.close()


@needs_numpy
def test_another_global_generator_of_numpys_is_noticed_before_anything_is_changed(store: Store) -> None:
    state = {"w": floats(1)}
    store.save(state)
    state["w"][0] = 9
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(ConfigurationError, match="NumPy's global generator is PCG64, and was MT19937"):
            store.manager.restore(state)
        assert state["w"][0] == 9
        saved = store.save(state)
        expected = np.random.rand()
        store.manager.restore(state, checkpoint_id=saved)
        assert np.random.rand() == expected
    finally:
        np.random.set_bit_generator(before)


# What does not fit


def test_all_that_does_not_fit_is_told_with_both_shapes_and_nothing_is_changed(store: Store) -> None:
    store.save({"same": floats(1), "shape": floats(1, 2), "dtype": array("f", [1]), "gone": floats(1)})
    target = {"same": floats(0), "shape": floats(0), "dtype": floats(0), "new": floats(0)}
    before = copy.deepcopy(target)
    with pytest.raises(StateMismatchError) as caught:
        store.manager.restore(target)
    error = caught.value
    assert (error.missing, error.unexpected) == (["model.new"], ["model.gone"])
    assert error.mismatched == ["model.shape", "model.dtype"]
    assert "model.shape: float64[2] was saved, there is float64[1]" in str(error)
    assert "model.dtype: float32[1] was saved, there is float64[1]" in str(error)
    assert target == before


@pytest.mark.parametrize("strict", ["warn", "skip"])
def test_the_rest_is_restored_when_that_is_asked_for(
    store: Store, strict: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.save({"same": floats(1), "shape": floats(1, 2), "gone": floats(1), "in": {"a": floats(1), "b": floats(2, 2)}})
    target = {"same": floats(0), "shape": floats(0), "new": floats(0), "in": {"a": floats(0), "b": floats(0)}}
    with caplog.at_level(logging.WARNING):
        restored = store.manager.restore(target, strict=strict)
    expected = {"same": floats(1), "shape": floats(0), "new": floats(0), "in": {"a": floats(1), "b": floats(0)}}
    assert target == expected
    assert restored["report"] == {
        "missing": ["model.new"],
        "unexpected": ["model.gone"],
        "mismatched": [
            "model.shape: float64[2] was saved, there is float64[1]",
            "model.in.b: float64[2] was saved, there is float64[1]",
        ],
        "renamed": {},
    }
    assert ("model.shape: float64[2] was saved" in caplog.text) == (strict == "warn")


@needs_torch
def test_a_module_with_another_head_takes_the_rest_and_an_optimizer_is_whole_or_untouched(store: Store) -> None:
    def training(seed: int, classes: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, classes))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = training(1, 2)
    store.save(model, optimizer)
    target, moments = training(2, 7)
    head, before = target[2].weight.clone(), exact(moments.state_dict())
    report = store.manager.restore(target, moments, strict="skip")["report"]
    assert [line.partition(":")[0] for line in report["mismatched"][:2]] == ["model.2.weight", "model.2.bias"]
    assert exact(target[0].state_dict()) == exact(model[0].state_dict())
    assert exact(target[1].state_dict()) == exact(model[1].state_dict())
    assert torch.equal(target[2].weight, head)
    assert exact(moments.state_dict()) == before
    fresh = torch.optim.AdamW(target.parameters())
    store.manager.restore(optimizer=fresh, strict="skip")
    assert not fresh.state_dict()["state"] or exact(fresh.state_dict()["state"][0]) == exact(
        optimizer.state_dict()["state"][0]
    )


def test_a_component_that_was_not_saved_is_missing(store: Store) -> None:
    store.save({"w": floats(1)})
    with pytest.raises(StateMismatchError, match="optimizer: nothing of it was saved") as caught:
        store.manager.restore({"w": floats(0)}, {"m": floats(0)})
    assert caught.value.missing == ["optimizer"]
    target, moments = {"w": floats(0)}, {"m": floats(0)}
    restored = store.manager.restore(target, moments, strict="skip")
    assert (target["w"][0], moments["m"][0], restored["report"]["missing"]) == (1.0, 0.0, ["optimizer"])


# Names


NAMES = {"model.encoder.a": "x", "model.encoder.b": "y"}


@pytest.mark.parametrize(
    ("rename", "renamed"),
    [
        ({"model.old.a": "model.new.a", "model.old.b": "model.new.b"}, ["a", "b"]),
        ({"model.old.*": "model.new.*"}, ["a", "b"]),
        ({"*.old.*": "*.new.*"}, ["a", "b"]),
        ({re.compile(r"\bold\b"): "new"}, ["a", "b"]),
        ({re.compile(r"old\.(\w)"): r"new.\1"}, ["a", "b"]),
        ({"model.old.a": "model.new.a", "model.old.*": "model.new.*"}, ["a", "b"]),
    ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_keys_are_renamed_by_name_and_by_pattern(store: Store, rename: Any, renamed: list[str], flat: bool) -> None:
    def state(part: str, *values: float) -> Any:
        a, b, c = map(floats, values)
        nested = {part: {"a": a, "b": b}, "kept": c}
        return {f"{part}.a": a, f"{part}.b": b, "kept": c} if flat else nested

    saved = store.save(state("old", 1, 2, 3))
    target = state("new", 0, 0, 0)
    restored = store.manager.restore(target, rename=rename)
    assert exact(target) == exact(state("new", 1, 2, 3))
    assert restored["report"] == {**NOTHING, "renamed": {f"model.old.{key}": f"model.new.{key}" for key in renamed}}
    assert store.load(saved)["model_state_dict"].keys() == state("old", 1, 2, 3).keys()


def test_a_part_of_one_component_can_go_into_another(store: Store) -> None:
    store.save({"w": floats(1)}, extra_state={"average": {"w": floats(2)}, "n": 1})
    target = {"w": floats(0)}
    restored = store.manager.restore(target, rename={"extra.average.*": "model.*"})
    assert target == {"w": floats(2)}
    assert restored["report"] == {**NOTHING, "renamed": {"extra.average.w": "model.w"}}


def test_names_can_be_exchanged(store: Store) -> None:
    store.save({"a": floats(1), "b": floats(2)})
    target = {"a": floats(0), "b": floats(0)}
    store.manager.restore(target, rename={"model.a": "model.b", "model.b": "model.a"})
    assert target == {"a": floats(2), "b": floats(1)}


@pytest.mark.parametrize(
    ("rename", "problem"),
    [
        ({"model.x": "model.w"}, "nothing in this checkpoint is called 'model.x'; it has model.w, model.v"),
        ({"model.w": "model.x", "model.v": "model.x"}, "both model.w and model.v would be model.x"),
        ({"model.w": "gone.w"}, "would be 'gone.w'; names begin with model., optimizer., scheduler., extra."),
        ({"model.w": "model"}, "would be 'model'; names begin with"),
        ({"model.*": "model.x"}, "must have as many"),
        ({"model.w": 3}, "must be two names"),
        ({3: "model.w"}, "must be two names"),
        ({re.compile("(model)"): r"\2"}, "invalid group reference"),
        ("model.w", "rename must be a mapping"),
    ],
)
def test_renames_that_cannot_be_are_refused_and_nothing_is_changed(store: Store, rename: Any, problem: str) -> None:
    store.save({"w": floats(1), "v": floats(2)})
    target = {"w": floats(0), "v": floats(0)}
    with pytest.raises(ConfigurationError, match=problem):
        store.manager.restore(target, rename=rename)
    assert target == {"w": floats(0), "v": floats(0)}


def test_a_rename_that_would_cover_something_else_is_refused(store: Store) -> None:
    store.save({"a": floats(1), "b": {"c": floats(2)}})
    target = {"b": floats(0)}
    with pytest.raises(ConfigurationError, match=r"model\.a would be model\.b, and something lies around or within"):
        store.manager.restore(target, rename={"model.a": "model.b"})
    assert target == {"b": floats(0)}


@needs_torch
def test_compiled_and_wrapped_modules_are_saved_and_restored_by_their_plain_names(store: Store) -> None:
    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))

    plain = model(1)
    forms = {
        "plain": lambda made: made,
        "compiled": torch.compile,
        "wrapped": torch.nn.DataParallel,
        "both": lambda made: torch.compile(torch.nn.DataParallel(made)),
        "a part": lambda made: torch.nn.Sequential(torch.compile(made[0]), made[1]),
    }
    for name, form in forms.items():
        saved = store.save(form(model(1)))
        assert list(store.load(saved)["model_state_dict"]) == list(plain.state_dict()), name
        for other, target_form in forms.items():
            inner = model(2)
            restored = store.manager.restore(target_form(inner), checkpoint_id=saved)
            assert exact(inner.state_dict()) == exact(plain.state_dict()), (name, other)
            assert restored["report"] == NOTHING
    for form in (torch.compile, torch.nn.DataParallel):  # what others saved with the prefixes in the names
        saved = store.save(form(model(1)).state_dict())
        inner = model(2)
        renamed = store.manager.restore(inner, checkpoint_id=saved)["report"]["renamed"]
        assert exact(inner.state_dict()) == exact(plain.state_dict())
        assert set(renamed.values()) == {f"model.{name}" for name in plain.state_dict()}


# What cannot be asked for, and what goes wrong


def test_an_object_that_raises_is_named_and_others_may_have_changed(store: Store) -> None:
    class Bad(Keeps):
        def load_state_dict(self, state: Any) -> None:
            raise ArithmeticError("bad luck")

    store.save({"w": floats(1)}, extra_state={"it": Keeps()})
    with pytest.raises(
        RestoreFailedError, match=r"extra\.it: Bad did not take its state: ArithmeticError: bad luck"
    ) as caught:
        store.manager.restore({"w": floats(0)}, extra_state={"it": Bad()})
    assert caught.value.path == "extra.it"
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_what_cannot_be_asked_for_is_refused(store: Store) -> None:
    with pytest.raises(CheckpointNotFoundError):
        store.manager.restore({"w": floats(0)})
    store.save({"w": floats(1)})
    for arguments, problem in [
        ({}, "nothing to load into"),
        ({"model": {"w": floats(0)}, "strict": "no"}, "strict must be"),
        ({"model": {"w": floats(0)}, "restore_rng": 1}, "restore_rng"),
        ({"model": {"w": floats(0)}, "on_corruption": "ignore"}, "on_corruption"),
    ]:
        with pytest.raises(ConfigurationError, match=problem):
            store.manager.restore(**arguments)  # type: ignore[arg-type]


def test_damage_changes_nothing_and_the_sound_one_before_it_can_take_its_place(store: Store) -> None:
    sound = store.save({"w": floats(1)}, step=1)
    random.seed(1)
    expected = random.random()
    random.seed(1)
    damaged = store.save({"w": floats(2)}, step=2)
    file = store.path(damaged) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    target = {"w": floats(0)}
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        store.manager.restore(target)
    assert target == {"w": floats(0)}
    assert random.random() == expected
    restored = store.manager.restore(target, on_corruption="fallback")
    assert (target, restored["step"]) == ({"w": floats(1)}, 1)
    assert restored["_checkpoint_metadata"]["fallback_from"] == [damaged]
    assert restored["_checkpoint_metadata"]["checkpoint_id"] == sound


def test_an_object_whose_state_cannot_be_stored_is_named(store: Store) -> None:
    class Itself:
        def get_state(self) -> Any:
            return self

        def set_state(self, state: Any) -> None:
            """Takes anything."""

    with pytest.raises(UnsupportedValueError, match=r"extra\.it: cannot store a .*Itself; its get_state\(\) returns"):
        store.save({}, extra_state={"it": Itself()})


# What a reviewer found


class Keeps:
    """An object whose state is of another form after some time, as an early stopping's."""

    def __init__(self) -> None:
        self.best: Any = None
        self.history: Any = []

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "history": self.history}

    def load_state_dict(self, state: Any) -> None:
        self.best, self.history = state["best"], state["history"]


class Reordered(NamedTuple):
    mean: Any
    count: Any


class Wider(NamedTuple):
    count: Any
    mean: Any
    extra: Any


def test_objects_take_arrays_of_any_shape_and_none_where_they_judge_themselves(store: Store) -> None:
    saved = Keeps()
    saved.best, saved.history = floats(1), [floats(1), floats(2, 3)]
    store.save({}, extra_state=saved)
    for target in (Keeps(), copy.deepcopy(saved)):
        store.manager.restore(extra_state=target)
        assert (target.best, target.history) == (floats(1), [floats(1), floats(2, 3)])


def test_fields_of_named_tuples_are_joined_by_their_names(store: Store) -> None:
    store.save({"s": Moments(1, floats(2))})
    target: Any = {"s": Reordered(floats(0), 0)}
    store.manager.restore(target)
    assert target == {"s": Reordered(floats(2), 1)}
    wider: Any = {"s": Wider(0, floats(0), 7)}
    report = store.manager.restore(wider, strict="skip")["report"]
    assert (wider, report["missing"]) == ({"s": Wider(1, floats(2), 7)}, ["model.s.extra"])
    store.save(wider)
    narrow: Any = {"s": Moments(0, floats(0))}
    report = store.manager.restore(narrow, strict="skip")["report"]
    assert (narrow, report["unexpected"]) == ({"s": Moments(1, floats(2))}, ["model.s.extra"])


def test_a_list_that_is_longer_than_what_was_saved_keeps_its_rest(store: Store) -> None:
    store.save([floats(1)])
    target = [floats(0), floats(5)]
    assert store.manager.restore(target, strict="skip")["report"]["missing"] == ["model.1"]
    assert target == [floats(1), floats(5)]


@pytest.mark.parametrize("key", [("a", 1), 2**70, float("inf"), (1, (2, "x"))])
def test_keys_that_json_has_no_form_for_can_stay_out(store: Store, key: Any) -> None:
    store.save({key: floats(1, 1), "b": floats(1)})
    target = {key: floats(0), "b": floats(0)}
    assert len(store.manager.restore(target, strict="skip")["report"]["mismatched"]) == 1
    assert target == {key: floats(0), "b": floats(1)}


def test_names_with_dots_are_not_taken_for_parts_of_one_another(store: Store) -> None:
    store.save({"fc": floats(1, 1), "fc.bias": floats(2), "a.b": floats(1, 1), "a": {"b": floats(3)}})
    target = {"fc": floats(0), "fc.bias": floats(0), "a.b": floats(0), "a": {"b": floats(0)}}
    store.manager.restore(target, strict="skip")
    assert target == {"fc": floats(0), "fc.bias": floats(2), "a.b": floats(0), "a": {"b": floats(3)}}


def test_one_object_that_is_there_twice_and_was_saved_as_two_is_refused(store: Store) -> None:
    store.save({"a": {"w": floats(1)}, "b": {"w": floats(2)}})
    inner = {"w": floats(0)}
    with pytest.raises(StateMismatchError, match=r"model\.b: is the very object that is model\.a"):
        store.manager.restore({"a": inner, "b": inner})
    shared = {"w": floats(1)}
    store.save({"a": shared, "b": shared})
    store.manager.restore({"a": inner, "b": inner})
    assert inner == {"w": floats(1)}


@needs_torch
def test_a_value_or_nothing_where_an_object_with_a_state_is_is_refused(store: Store) -> None:
    for saved, there in ((None, "a value"), ({}, "nothing"), (floats(1), "a value")):
        store.save({"w": floats(1)}, extra_state={"it": saved})
        target, it = {"w": floats(0)}, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        with pytest.raises(StateMismatchError, match=rf"extra\.it: {there} was saved, there is a SGD"):
            store.manager.restore(target, extra_state={"it": it})
        assert target == {"w": floats(0)}


def test_a_state_that_an_object_cannot_take_changes_nothing(store: Store) -> None:
    store.save({"w": floats(1)}, extra_state={"it": {"class": "Random"}})
    target = {"w": floats(0)}
    with pytest.raises(StateMismatchError, match=r"extra\.it: what was saved is no state of it"):
        store.manager.restore(target, extra_state={"it": random.Random(1)})
    assert target == {"w": floats(0)}
    store.manager.restore(target, extra_state={"it": random.Random(1)}, strict="skip")
    assert target == {"w": floats(1)}


@needs_torch
def test_an_optimizer_that_was_saved_before_its_first_step_is_restored_to_that(store: Store) -> None:
    def stepped(optimizer: Any) -> Any:
        optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
        optimizer.step()
        return optimizer

    def new() -> Any:
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)

    store.save({}, new())
    for strict in ("error", "skip"):
        target = stepped(new())
        assert store.manager.restore(optimizer=target, strict=strict)["report"] == NOTHING
        assert not target.state_dict()["state"]


@needs_torch
def test_a_part_called_module_beside_a_compiled_one_keeps_its_name(store: Store) -> None:
    class Net(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.weight = torch.nn.Parameter(torch.rand(2))
            self.module = torch.nn.Linear(2, 2)
            self.part = torch.compile(torch.nn.Linear(1, 1))

    saved, target = Net(1), Net(2)
    names = list(store.load(store.save(saved))["model_state_dict"])
    assert names == ["weight", "module.weight", "module.bias", "part.weight", "part.bias"]
    store.manager.restore(target)
    assert exact(target.state_dict()) == exact(saved.state_dict())


@needs_torch
def test_a_default_device_does_not_matter(store: Store) -> None:
    model = torch.nn.Linear(1, 1)
    store.save(model)
    with torch.device("meta"):
        store.manager.restore(model)
    assert store.manager.list_checkpoints()[0]["status"] == "committed"


@needs_numpy
def test_every_global_generator_of_numpys_can_be_saved(store: Store) -> None:
    before = np.random.get_bit_generator()
    try:
        for kind in (np.random.Philox, np.random.SFC64, np.random.PCG64DXSM):
            np.random.set_bit_generator(kind(1))
            np.random.normal()
            saved = store.save({"w": floats(1)})
            expected = np.random.normal(size=3).tolist()
            store.manager.restore({"w": floats(0)}, checkpoint_id=saved)
            assert np.random.normal(size=3).tolist() == expected
    finally:
        np.random.set_bit_generator(before)


def test_a_dict_whose_items_are_attributes_is_a_dict(store: Store) -> None:
    class Attributes(dict[str, Any]):
        __getattr__ = dict.__getitem__

    assert store.load(store.save(Attributes(w=floats(1))))["model_state_dict"] == {"w": floats(1)}


@needs_torch
@pytest.mark.parametrize(
    ("rename", "wrap", "unwrap"),
    [
        ({"model.encoder.*": "model.*"}, True, False),  # of a dict of modules, one
        ({"model.*": "model.encoder.*"}, False, True),  # and back
    ],
)
def test_renames_follow_the_target_however_it_is_nested(store: Store, rename: Any, wrap: bool, unwrap: bool) -> None:
    def network(seed: int) -> Any:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))

    saved, target = network(1), network(2)
    store.save({"encoder": saved} if wrap else saved)
    report = store.manager.restore({"encoder": target} if unwrap else target, rename=rename)["report"]
    assert exact(target.state_dict()) == exact(saved.state_dict())
    assert (report["missing"], report["unexpected"]) == ([], [])


def test_renames_lead_into_lists_and_keys_that_are_numbers(store: Store) -> None:
    store.save({"old": {0: {"w": floats(1)}, 1: {"w": floats(2)}}, "n": [1]})
    target: Any = {"new": {0: {"w": floats(0)}, 1: {"w": floats(0)}}, "n": [0]}
    store.manager.restore(target, rename={"model.old.*": "model.new.*"})
    assert target == {"new": {0: {"w": floats(1)}, 1: {"w": floats(2)}}, "n": [1]}


def test_items_of_lists_are_renamed_by_what_they_were_before(store: Store) -> None:
    store.save([floats(1), floats(2), floats(3), floats(4)])
    extra = {"a": floats(0), "b": floats(0)}
    restored = store.manager.restore(extra_state=extra, rename={"model.2": "extra.a", "model.3": "extra.b"})
    assert extra == {"a": floats(3), "b": floats(4)}
    assert restored["report"]["renamed"] == {"model.2": "extra.a", "model.3": "extra.b"}
    with pytest.raises(ConfigurationError, match="model is a list, and would lose an item that is not its last"):
        store.manager.restore(extra_state=extra, rename={"model.0": "extra.a", "model.3": "extra.b"})
    target = [floats(0), floats(0), floats(0), floats(0)]
    store.manager.restore(target, rename={"model.0": "model.1", "model.1": "model.0"})
    assert target == [floats(2), floats(1), floats(3), floats(4)]
    store.save({"layers": [{"w": floats(1)}, {"w": floats(2)}]})
    blocks = {"blocks": [{"kernel": floats(0)}, {"kernel": floats(0)}]}
    store.manager.restore(blocks, rename={"model.layers.*.w": "model.blocks.*.kernel"})
    assert blocks == {"blocks": [{"kernel": floats(1)}, {"kernel": floats(2)}]}


def test_an_object_whose_state_cannot_be_had_is_told_and_no_file_is_blamed(store: Store) -> None:
    class Broken(Keeps):
        def state_dict(self) -> Any:
            raise KeyError("k")

    saved = store.save({}, extra_state={"it": Keeps()})
    with pytest.raises(StateMismatchError, match=r"extra\.it: its state cannot be had: KeyError\('k'\)"):
        store.manager.restore(extra_state={"it": Broken()}, on_corruption="fallback")
    assert store.row(saved)["status"] == "committed"


def test_an_object_whose_state_cannot_be_had_is_told_with_a_rename_too(store: Store) -> None:
    class Broken(Keeps):
        def state_dict(self) -> Any:
            raise KeyError("k")

    saved = store.save({"w": floats(1)}, extra_state={"it": Keeps()})
    with pytest.raises(StateMismatchError, match=r"fit in 1 place; .*\n  extra\.it: its state cannot be had"):
        store.manager.restore({"v": floats(0)}, extra_state={"it": Broken()}, rename={"model.w": "model.v"})
    assert store.row(saved)["status"] == "committed"


@needs_torch
def test_a_renamed_module_keeps_the_version_of_its_layout(store: Store) -> None:
    versions: list[Any] = []

    class Versioned(torch.nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state: Any, prefix: Any, metadata: Any, *rest: Any) -> None:
            versions.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    store.save(torch.nn.ModuleDict({"old": Versioned(1, 1)}))
    store.manager.restore(torch.nn.ModuleDict({"new": Versioned(1, 1)}), rename={"model.old.*": "model.new.*"})
    assert versions == [3]


def test_load_into_refuses_what_it_could_only_make_anew(store: Store) -> None:
    jax = pytest.importorskip("jax")
    for saved, target in (
        ((jax.numpy.ones(1),), (jax.numpy.zeros(1),)),
        ((jax.random.key(1),), (jax.random.key(0),)),
        (Moments(1, floats(1)), Moments(0, floats(0))),
    ):
        store.save(saved)
        with pytest.raises(StateMismatchError, match="lies in what cannot be changed, such as a tuple"):
            store.manager.load_into(target)
        assert store.manager.restore(target)["report"] == NOTHING


def test_arrays_that_were_one_come_back_as_what_each_target_is(store: Store) -> None:
    jax = pytest.importorskip("jax")
    numpy = pytest.importorskip("numpy")
    one = jax.numpy.ones(2)
    store.save({"a": one, "b": one, "c": one})
    target = {"a": numpy.zeros(2, "float32"), "b": jax.numpy.zeros(2), "c": numpy.zeros(2, "float32")}
    kept = target["a"], target["c"]
    store.manager.restore(target)
    assert target["a"] is kept[0]
    assert target["c"] is kept[1]
    assert isinstance(target["b"], jax.Array)
    assert [value.tolist() for value in target.values()] == [[1.0, 1.0]] * 3
