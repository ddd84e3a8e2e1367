"""Which checkpoint is best: directions, NaN, ties, and the election over a whole history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from model_checkpoint.checkpoint.best import check_overrides, direction, elect, flags_taken, scores_of
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import ConfigurationError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

quick = settings(deadline=None, max_examples=40)  # no deadline: the machine that runs this may be busy

NAN, INF = math.nan, math.inf


def record(name: str, **values: Any) -> CheckpointRecord:
    return CheckpointRecord(id=name, experiment_id="e", **values)


def history(*losses: float | None) -> list[CheckpointRecord]:
    """Return checkpoints ``0``, ``1``, ... with these losses."""
    return [record(str(i), loss=loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize("suffix", ["loss", "error", "perplexity", "mae", "mse", "rmse", "wer", "cer"])
def test_names_that_end_like_a_loss_are_minimised_in_any_case_and_with_any_prefix(suffix: str) -> None:
    spellings = (suffix, f"val_{suffix}", suffix.upper(), f"Test{suffix.title()}")
    for name in (*spellings, *(f"metrics.{spelling}" for spelling in spellings)):
        assert direction(name, {}) == "min", name


@pytest.mark.parametrize("name", ["accuracy", "f1", "auc", "bleu", "loss_scale", "error_free", "mse2", "reward", ""])
def test_every_other_name_is_maximised(name: str) -> None:
    assert direction(name, {}) == direction(f"metrics.{name}", {}) == "max"


def test_an_override_beats_the_name_both_ways_and_touches_no_other_metric() -> None:
    overrides = {"val_loss": "max", "accuracy": "min"}
    assert direction("val_loss", overrides) == direction("metrics.val_loss", overrides) == "max"
    assert direction("metrics.accuracy", overrides) == "min"
    assert (direction("loss", overrides), direction("metrics.accuracy2", overrides)) == ("min", "max")


def test_a_direction_that_is_none_is_refused_with_the_metrics_name() -> None:
    with pytest.raises(ConfigurationError, match=r"best_metrics\['f1'\] must be 'min' or 'max', not 'up'"):
        check_overrides({"wer": "max", "f1": "up"})


def test_checked_overrides_are_a_copy_of_the_callers() -> None:
    given_by_user = {"f1": "min"}
    checked = check_overrides(given_by_user)
    given_by_user["f1"] = "up"
    assert checked == {"f1": "min"}


def test_a_checkpoint_competes_in_every_number_it_has_but_nan() -> None:
    found = scores_of(record("a", loss=1.0, val_loss=NAN, metrics={"f1": 0.5, "loss": 2.0, "wer": NAN, "auc": -INF}))
    assert found == {"loss": 1.0, "metrics.f1": 0.5, "metrics.loss": 2.0, "metrics.auc": -INF}
    assert scores_of(record("b")) == {}


def test_update_best_false_competes_in_nothing() -> None:
    out = record("a", loss=-INF, val_loss=0.0, metrics={"f1": INF}, update_best=False)
    assert scores_of(out) == {}
    assert flags_taken(out, {}, overrides={}) == {}
    assert elect([record("b", loss=1.0), out], {}) == {"loss": ("b", 1.0)}


def test_a_flag_without_a_holder_is_taken_by_whatever_is_a_number() -> None:
    assert flags_taken(record("a", loss=INF, metrics={"f1": -INF}), {}, overrides={}) == {
        "loss": INF,
        "metrics.f1": -INF,
    }


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((NAN, NAN), None),
        ((NAN, 5.0), "1"),
        ((5.0, NAN), "0"),
        ((2.0, 2.0, 2.0), "0"),
        ((3.0, 2.0, 2.0, 3.0), "1"),
        ((0.0, -0.0), "0"),
        ((INF, INF), "0"),
        ((INF, 1e308), "1"),
        ((1.0, -INF, -INF, -1e308), "1"),
        ((None, 1.0, None), "1"),
        ((None, None), None),
    ],
)
def test_the_least_loss_is_best_nan_never_and_a_tie_keeps_the_earlier(
    losses: tuple[float | None, ...], best: str | None
) -> None:
    found = elect(history(*losses), {})
    assert (found["loss"][0] if found else None) == best


def test_with_the_direction_turned_the_greatest_is_best_nan_never_and_a_tie_keeps_the_earlier() -> None:
    assert elect(history(NAN, 1.0, 3.0, NAN, 3.0, 2.0), {"loss": "max"}) == {"loss": ("2", 3.0)}
    assert elect(history(-INF, INF, INF), {"loss": "max"}) == {"loss": ("1", INF)}


def test_criteria_are_elected_independently() -> None:
    records = [
        record("a", loss=1.0, val_loss=9.0, metrics={"f1": 0.1}),
        record("b", loss=2.0, val_loss=8.0, metrics={"f1": 0.9, "wer": 0.3}),
        record("c", loss=3.0, metrics={"wer": 0.2, "loss": 7.0}),
    ]
    assert elect(records, {}) == {
        "loss": ("a", 1.0),
        "val_loss": ("b", 8.0),
        "metrics.f1": ("b", 0.9),
        "metrics.wer": ("c", 0.2),
        "metrics.loss": ("c", 7.0),  # a metric that is called loss is another criterion
    }


def test_only_the_flags_that_move_are_returned_and_nothing_is_changed() -> None:
    holders = {"loss": 1.0, "metrics.f1": 0.5}
    newcomer = record("n", loss=1.0, metrics={"f1": 0.6, "auc": 0.1})
    assert flags_taken(newcomer, holders, overrides={}) == {"metrics.f1": 0.6, "metrics.auc": 0.1}
    assert holders == {"loss": 1.0, "metrics.f1": 0.5}


# Few values, so that ties are frequent.
SCORES = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0, -3.5, 1e308, 5e-324])
METRICS = st.dictionaries(st.sampled_from(["f1", "wer", "accuracy", "loss"]), SCORES, max_size=4)
VALUES = st.fixed_dictionaries(
    {"loss": st.none() | SCORES, "val_loss": st.none() | SCORES, "metrics": METRICS, "update_best": st.booleans()}
)
HISTORIES = st.lists(VALUES, max_size=25).map(lambda rows: [record(str(i), **row) for i, row in enumerate(rows)])
OVERRIDES = st.dictionaries(st.sampled_from(["f1", "wer", "loss", "val_loss"]), st.sampled_from(["min", "max"]))


def oracle(records: list[CheckpointRecord], overrides: Mapping[str, str]) -> dict[str, tuple[str, float]]:
    """Say who is best, criterion by criterion, by sorting; written without a look at the code under test."""
    lesser_is_better = {"loss": True, "val_loss": True, "f1": False, "wer": True, "accuracy": False}
    best = {}
    for criterion in ("loss", "val_loss", "metrics.f1", "metrics.wer", "metrics.accuracy", "metrics.loss"):
        plain = criterion.split(".")[-1]
        least = lesser_is_better[plain] if plain not in overrides else overrides[plain] == "min"
        candidates = []
        for place, one in enumerate(records):
            value = one.metrics.get(plain) if "." in criterion else getattr(one, criterion)
            if one.update_best and value is not None and not math.isnan(value):
                candidates.append((value if least else -value, place))
        if candidates:
            chosen = records[min(candidates)[1]]
            best[criterion] = (chosen.id, chosen.metrics[plain] if "." in criterion else getattr(chosen, criterion))
    return best


@quick
@given(HISTORIES, OVERRIDES)
def test_elect_agrees_with_an_oracle_on_any_history(records: list[CheckpointRecord], overrides: dict[str, str]) -> None:
    assert elect(records, overrides) == oracle(records, overrides)


@quick
@given(HISTORIES, OVERRIDES)
def test_elect_is_what_commits_one_after_the_other_decide(
    records: list[CheckpointRecord], overrides: dict[str, str]
) -> None:
    holders: dict[str, str] = {}
    values: dict[str, float] = {}
    for one in records:  # as the database does it: each newcomer against the holders' values
        for criterion, value in flags_taken(one, values, overrides=overrides).items():
            holders[criterion], values[criterion] = one.id, value
    assert elect(records, overrides) == {c: (holder, values[c]) for c, holder in holders.items()}


@quick
@given(HISTORIES, OVERRIDES)
def test_each_criterion_that_anyone_competes_in_has_one_holder_which_competes_in_it(
    records: list[CheckpointRecord], overrides: dict[str, str]
) -> None:
    found = elect(records, overrides)
    assert set(found) == {criterion for one in records for criterion in scores_of(one)}
    by_id = {one.id: one for one in records}
    for criterion, (holder, value) in found.items():
        assert scores_of(by_id[holder])[criterion] == value


def test_of_two_that_tie_the_one_whose_save_began_first_is_best_whichever_commits_first() -> None:
    one = record("a", loss=1.0)
    assert flags_taken(one, {"loss": 1.0}, overrides={}) == {}
    assert flags_taken(one, {"loss": 1.0}, {"loss"}, overrides={}) == {"loss": 1.0}
    assert flags_taken(one, {"loss": 0.5}, {"loss"}, overrides={}) == {}
