"""What stays and what goes: the default rule, every policy, their unions, and the reasons given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from model_checkpoint.checkpoint.retention import (
    KeepAny,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepTypes,
    KeepWithinBytes,
    KeepYoungerThan,
    Protection,
    RetentionPlan,
    RetentionPolicy,
    plan_by_count,
    plan_by_policy,
)
from model_checkpoint.database.models import CheckpointRecord
from model_checkpoint.errors import ConfigurationError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

quick = settings(deadline=None, max_examples=40)  # no deadline: the machine that runs this may be busy

NOW = 1_700_000_000.0  # Unix seconds
NOTHING = Protection(save_best=False, save_last=False)
ALL = Protection(save_best=True, save_last=True, protected_types=frozenset({"milestone"}))
YEAR = 365 * 86_400.0  # seconds


def history(*rows: dict[str, Any]) -> list[CheckpointRecord]:
    """Return checkpoints ``0``, ``1``, ... oldest first; the epoch is the place where a row says nothing else."""
    return [CheckpointRecord(**{"id": str(i), "experiment_id": "e", "epoch": i, **row}) for i, row in enumerate(rows)]


def epochs(*numbers: int) -> list[CheckpointRecord]:
    return history(*({"epoch": number} for number in numbers))


def kept(plan: RetentionPlan) -> str:
    """Return the ids that stay, in the plan's order."""
    return " ".join(plan.kept)


def by_policy(records: Sequence[CheckpointRecord], policy: RetentionPolicy) -> str:
    return kept(plan_by_policy(records, policy, NOTHING, NOW))


# The default rule


@pytest.mark.parametrize("count", range(6))
def test_nothing_goes_until_there_are_more_than_max_checkpoints(count: int) -> None:
    plan = plan_by_count(epochs(*range(count)), 5, 5, NOTHING)
    assert plan.removed == {}
    assert set(plan.kept.values()) <= {"within 5 checkpoints"}


def test_nothing_ever_goes_without_a_maximum() -> None:
    plan = plan_by_count(epochs(*range(50)), None, 5, NOTHING)
    assert len(plan.kept) == 50
    assert not any("None" in reason for reason in plan.kept.values())


def test_the_oldest_goes_first_and_no_more_than_the_excess() -> None:
    assert kept(plan_by_count(epochs(1, 2, 3, 4), 3, 5, NOTHING)) == "1 2 3"
    assert kept(plan_by_count(epochs(1, 2, 3, 4), 1, 5, NOTHING)) == "3"


def test_epochs_that_are_no_multiple_of_save_frequency_go_before_those_that_are() -> None:
    records = epochs(5, 6, 10, 11, 12, 15, 16)
    left = [kept(plan_by_count(records, most, 5, NOTHING)) for most in range(6, 0, -1)]
    assert left == ["0 2 3 4 5 6", "0 2 4 5 6", "0 2 5 6", "0 2 5", "2 5", "5"]


def test_oldest_means_first_committed_not_least_epoch() -> None:
    assert kept(plan_by_count(epochs(9, 8, 7, 6), 2, 100, NOTHING)) == "2 3"


def test_with_a_save_frequency_of_one_every_epoch_is_periodic() -> None:
    plan = plan_by_count(epochs(1, 2, 3), 2, 1, NOTHING)
    assert plan.removed == {"0": "more than 2 checkpoints; periodic, oldest first"}


def test_epoch_zero_is_periodic() -> None:
    assert kept(plan_by_count(epochs(0, 1, 2), 2, 5, NOTHING)) == "0 2"


@pytest.mark.parametrize(
    ("row", "switched_off", "reason"),
    [
        ({"best": frozenset({"loss"})}, Protection(save_best=False), "best loss"),
        ({"best": frozenset({"val_loss", "metrics.f1"})}, Protection(save_best=False), "best f1, val_loss"),
        ({"checkpoint_type": "milestone"}, Protection(), "type milestone is protected"),
    ],
)
def test_the_oldest_stays_when_a_rule_protects_it_and_goes_when_that_rule_is_off(
    row: dict[str, Any], switched_off: Protection, reason: str
) -> None:
    records = history({"epoch": 1, **row}, {"epoch": 2}, {"epoch": 3})
    assert plan_by_count(records, 1, 5, ALL).kept == {"0": reason, "2": "the newest"}
    assert plan_by_count(records, 2, 5, ALL).kept == {"0": reason, "2": "the newest"}
    assert kept(plan_by_count(records, 1, 5, switched_off)) == "2"


def test_a_pinned_checkpoint_stays_whatever_is_switched_off() -> None:
    records = history({"epoch": 1, "pinned": True}, {"epoch": 2}, {"epoch": 3})
    assert plan_by_count(records, 1, 5, NOTHING).kept == {"0": "pinned"}


def test_the_newest_stays_though_its_epoch_would_let_it_go_first() -> None:
    records = epochs(5, 10, 11)
    assert kept(plan_by_count(records, 1, 5, Protection(save_last=True))) == "2"
    assert kept(plan_by_count(records, 1, 5, NOTHING)) == "1"


def test_protected_checkpoints_count_towards_the_maximum() -> None:
    records = history({"pinned": True}, {}, {}, {"best": frozenset({"loss"})}, {}, {})
    assert kept(plan_by_count(records, 4, 100, ALL)) == "0 3 4 5"


def test_more_protected_ones_than_the_maximum_all_stay_and_all_others_go() -> None:
    records = history({"pinned": True}, {}, {"pinned": True}, {"pinned": True}, {}, {"pinned": True})
    assert kept(plan_by_count(records, 2, 5, ALL)) == "0 2 3 5"


def test_a_corrupt_checkpoint_neither_goes_nor_counts_nor_is_the_newest() -> None:
    corrupt = {"status": "corrupt", "epoch": 1}
    records = history(corrupt, {"epoch": 5}, {"epoch": 2}, {"epoch": 3}, corrupt)
    damaged = "corrupt: a copy of its files may bring it back"
    assert plan_by_count(records, 3, 5, ALL).removed == {}
    assert plan_by_count(records, 1, 5, ALL).kept == {"0": damaged, "3": "the newest", "4": damaged}
    plan = plan_by_policy(records, KeepLast(2), ALL, NOW)
    assert plan.kept == {"0": damaged, "2": "one of the last 2", "3": "the newest", "4": damaged}
    assert kept(plan_by_policy(history(corrupt, corrupt), KeepTypes(()), ALL, NOW)) == "0 1"


def test_the_reason_for_a_removal_names_the_rule() -> None:
    assert plan_by_count(epochs(5, 6, 7), 1, 5, NOTHING).removed == {
        "1": "more than 1 checkpoints; epoch is no multiple of 5, oldest first",
        "2": "more than 1 checkpoints; epoch is no multiple of 5, oldest first",
    }


@pytest.mark.parametrize("jump", [-20 * YEAR, 20 * YEAR, -NOW])
def test_a_clock_that_jumps_never_makes_the_newest_go(jump: float) -> None:
    records = history(*({"epoch": 1, "created_at": NOW + i + (jump if i >= 7 else 0)} for i in range(10)))
    assert kept(plan_by_count(records, 3, 5, ALL)) == "7 8 9"
    for now in (NOW, NOW + jump):
        assert kept(plan_by_policy(records, KeepLast(3), ALL, now)) == "7 8 9"
        plan = plan_by_policy(records, KeepLast(3) | KeepYoungerThan(1) | KeepEvery(minutes=1), ALL, now)
        assert {"7", "8", "9"} <= set(plan.kept)


# Policies


def test_keep_last_keeps_the_newest_n_by_commit() -> None:
    records = history(*({"epoch": -i, "created_at": NOW - i} for i in range(5)))  # epochs and clock run backwards
    assert [by_policy(records, KeepLast(n)) for n in (1, 2, 5, 9)] == ["4", "3 4", "0 1 2 3 4", "0 1 2 3 4"]
    assert by_policy([], KeepLast(3)) == ""


def test_keep_best_goes_by_the_metrics_name_or_by_mode() -> None:
    rows = [(3.0, 0.1), (1.0, 0.9), (2.0, 0.5)]
    records = history(*({"loss": loss, "metrics": {"f1": f1, "wer": f1}} for loss, f1 in rows))
    assert by_policy(records, KeepBest(1, "loss")) == "1"
    assert by_policy(records, KeepBest(2, "loss", "max")) == "0 2"
    assert by_policy(records, KeepBest(2, "f1")) == "1 2"
    assert by_policy(records, KeepBest(1, "f1", "min")) == "0"
    assert by_policy(records, KeepBest(1, "wer")) == "0"


def test_keep_best_reads_val_loss_and_never_a_metric_of_that_name() -> None:
    records = history({"val_loss": 1.0, "metrics": {"val_loss": 9.0}}, {"val_loss": 2.0, "metrics": {"val_loss": 0.0}})
    assert by_policy(records, KeepBest(1, "val_loss")) == "0"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_keep_best_never_keeps_nan_or_what_has_no_value(mode: str) -> None:
    values = [math.nan, 1.0, None, math.nan, 2.0]
    records = history(*({"loss": value} for value in values), {"metrics": {"loss": 0.0}})
    assert by_policy(records, KeepBest(5, "loss", mode)) == "1 4"
    assert by_policy(history({"loss": math.nan}), KeepBest(1, "loss", mode)) == ""


@pytest.mark.parametrize("mode", ["min", "max"])
def test_keep_best_prefers_the_earlier_of_a_tie(mode: str) -> None:
    records = history(*({"loss": loss} for loss in (1.0, 1.0, 1.0, 1.0)))
    assert by_policy(records, KeepBest(2, "loss", mode)) == "0 1"


def test_keep_best_ranks_the_infinities_as_numbers() -> None:
    records = history(*({"loss": loss} for loss in (math.inf, -math.inf, 0.0)))
    assert [by_policy(records, KeepBest(k, "loss")) for k in (1, 2, 3)] == ["1", "1 2", "0 1 2"]
    assert by_policy(records, KeepBest(1, "loss", "max")) == "0"


def test_keep_every_keeps_the_multiples_of_epochs_or_steps() -> None:
    records = history(*({"epoch": i, "step": i * 50} for i in range(7)))
    assert by_policy(records, KeepEvery(epochs=3)) == "0 3 6"
    assert by_policy(records, KeepEvery(steps=100)) == "0 2 4 6"
    assert by_policy(records, KeepEvery(epochs=1)) == "0 1 2 3 4 5 6"


def test_keep_every_so_many_minutes_keeps_the_first_of_each() -> None:
    start = NOW - NOW % 600
    records = history(*({"created_at": start + minute * 60} for minute in (1, 4, 9.99, 10, 11, 35, 36)))
    assert by_policy(records, KeepEvery(minutes=10)) == "0 3 5"
    assert by_policy(records, KeepEvery(minutes=0.5)) == "0 1 2 3 4 5 6"


def test_keep_types_keeps_whole_names_only() -> None:
    kinds = ("regular", "milestone", "mile", "epoch")
    records = history(*({"checkpoint_type": kind} for kind in kinds))
    assert by_policy(records, KeepTypes({"milestone", "epoch"})) == "1 3"
    assert by_policy(records, KeepTypes(["mile"])) == "2"
    assert by_policy(records, KeepTypes(())) == ""


def test_keep_younger_than_takes_the_future_for_young() -> None:
    records = history(*({"created_at": NOW - age} for age in (20 * YEAR, 61, 60, 59, 0, -20 * YEAR)))
    assert by_policy(records, KeepYoungerThan(60)) == "3 4 5"
    assert by_policy(records, KeepYoungerThan(math.inf)) == "0 1 2 3 4 5"


def test_keep_within_bytes_keeps_the_newest_up_to_the_limit_and_leaves_no_gap() -> None:
    records = history(*({"size": size} for size in (1, 500, 100, 100)))
    left = [by_policy(records, KeepWithinBytes(limit)) for limit in (99, 100, 199, 200, 699, 700, 701)]
    assert left == ["", "3", "3", "2 3", "2 3", "1 2 3", "0 1 2 3"]


def test_protection_is_above_every_policy() -> None:
    records = history(
        {"pinned": True}, {"best": frozenset({"metrics.f1"})}, {"checkpoint_type": "milestone"}, {"loss": 0.0}, {}
    )
    plan = plan_by_policy(records, KeepBest(1, "loss"), ALL, NOW)
    assert plan.kept == {
        "0": "pinned",
        "1": "best f1",
        "2": "type milestone is protected",
        "3": "one of the best 1 by loss",
        "4": "the newest",
    }
    assert plan_by_policy(records, KeepTypes(()), NOTHING, NOW).kept == {"0": "pinned"}


def test_what_no_rule_keeps_goes_and_the_plan_says_so() -> None:
    assert plan_by_policy(epochs(1, 2), KeepLast(1), NOTHING, NOW).removed == {"0": "no rule keeps it"}


def test_unions_of_any_nesting_keep_what_any_of_them_keeps() -> None:
    records = history(*({"loss": abs(i - 2), "checkpoint_type": "a" if i == 4 else "b"} for i in range(8)))
    last, best, kind, every = KeepLast(1), KeepBest(1, "loss"), KeepTypes(["a"]), KeepEvery(epochs=6)
    for union in (last | best | kind | every, (last | best) | (kind | every), last | (best | (kind | every))):
        assert by_policy(records, union) == "0 2 4 6 7"
    assert by_policy(records, KeepAny(())) == ""


def test_the_reason_in_a_union_is_the_one_of_the_first_policy_that_keeps() -> None:
    records = epochs(0, 1)
    assert plan_by_policy(records, KeepEvery(epochs=1) | KeepLast(1), NOTHING, NOW).kept["1"] == "every 1 epochs"
    assert plan_by_policy(records, KeepLast(1) | KeepEvery(epochs=1), NOTHING, NOW).kept == {
        "0": "every 1 epochs",
        "1": "one of the last 1",
    }


def test_a_policy_of_ones_own_joins_a_union() -> None:
    class KeepEven:
        def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Mapping[str, str]:
            return {r.id: "even" for r in records if r.epoch % 2 == 0}

    assert by_policy(epochs(0, 1, 2, 3), KeepLast(1) | KeepEven()) == "0 2 3"


# Arguments


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: KeepLast(0), "n"),
        (lambda: KeepLast(-1), "n"),
        (lambda: KeepLast(2.5), "n"),  # type: ignore[arg-type]
        (lambda: KeepLast("3"), "n"),  # type: ignore[arg-type]
        (lambda: KeepLast(math.inf), "n"),  # type: ignore[arg-type]
        (lambda: KeepBest(0, "f1"), "k"),
        (lambda: KeepBest(1.5, "f1"), "k"),  # type: ignore[arg-type]
        (lambda: KeepBest(1, "f1", "up"), "mode"),
        (lambda: KeepEvery(), "epochs, steps and minutes"),
        (lambda: KeepEvery(epochs=1, steps=1), "epochs, steps and minutes"),
        (lambda: KeepEvery(epochs=0), "epochs"),
        (lambda: KeepEvery(steps=-5), "steps"),
        (lambda: KeepEvery(minutes=0), "minutes"),
        (lambda: KeepEvery(minutes=math.nan), "minutes"),
        (lambda: KeepTypes("milestone"), "types"),
        (lambda: KeepYoungerThan(0), "seconds"),
        (lambda: KeepYoungerThan(math.nan), "seconds"),
        (lambda: KeepWithinBytes(0), "limit"),
        (lambda: KeepWithinBytes("1 GB"), "limit"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_argument_is_refused_by_name_when_the_policy_is_made(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"\b{name}\b"):
        make()


def test_a_union_with_something_that_is_no_policy_is_refused_when_it_is_made() -> None:
    with pytest.raises((TypeError, ConfigurationError)):
        KeepLast(1) | 3  # type: ignore[operator]


# The plan


def test_a_plan_reads_line_by_line_and_ends_in_the_sum() -> None:
    records = history(*({"epoch": epoch, "size": 1_500} for epoch in (3, 12)), {"epoch": 13, "size": 7})
    text = str(plan_by_count(records, 1, 5, Protection()))
    assert text.splitlines() == [
        "remove  0  epoch 3      more than 1 checkpoints; epoch is no multiple of 5, oldest first",
        "remove  1  epoch 12     more than 1 checkpoints; epoch is no multiple of 5, oldest first",
        "keep    2  epoch 13     the newest",
        "2 of 3 go, 3,000 bytes reclaimed",
    ]
    assert str(plan_by_count([], 1, 5, Protection())) == "0 of 0 go, 0 bytes reclaimed"


def test_the_bytes_reclaimed_are_those_of_what_goes() -> None:
    records = history({"size": 10}, {"size": 200, "pinned": True}, {"size": 3000}, {"size": 40_000})
    assert plan_by_policy(records, KeepLast(1), NOTHING, NOW).reclaimed == 3010


# Properties

SCORES = st.none() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 2.0])
ROWS = st.fixed_dictionaries(
    {
        "epoch": st.integers(-3, 30),
        "step": st.integers(0, 100),
        "loss": SCORES,
        "metrics": st.just({}) | st.fixed_dictionaries({"f1": SCORES.filter(lambda value: value is not None)}),
        "size": st.integers(0, 1000),
        "created_at": st.sampled_from([0.0, NOW - 3600, NOW - 10, NOW, NOW + YEAR]),
        "pinned": st.sampled_from([False, False, False, True]),
        "best": st.sampled_from([frozenset(), frozenset(), frozenset({"loss"}), frozenset({"metrics.f1"})]),
        "checkpoint_type": st.sampled_from(["regular", "regular", "milestone", "other"]),
        "status": st.sampled_from(["committed", "committed", "committed", "corrupt"]),
    }
)
HISTORIES = st.lists(ROWS, max_size=30).map(lambda rows: history(*rows))
PROTECTIONS = st.builds(
    Protection, st.booleans(), st.booleans(), st.sampled_from([(), ("milestone",), ("milestone", "other")])
)
SIMPLE = st.one_of(
    st.builds(KeepLast, st.integers(1, 10)),
    st.builds(KeepBest, st.integers(1, 5), st.sampled_from(["loss", "f1"]), st.sampled_from([None, "min", "max"])),
    st.builds(KeepEvery, epochs=st.integers(1, 10)),
    st.builds(KeepEvery, steps=st.integers(1, 50)),
    st.builds(KeepEvery, minutes=st.floats(0.1, 100)),
    st.builds(KeepTypes, st.sets(st.sampled_from(["milestone", "other"]))),
    st.builds(KeepYoungerThan, st.floats(1, 1e9)),
    st.builds(KeepWithinBytes, st.integers(1, 5000)),
)
POLICIES = st.recursive(SIMPLE, lambda inner: st.builds(lambda one, other: one | other, inner, inner), max_leaves=6)


def is_protected(records: Sequence[CheckpointRecord], place: int, protection: Protection) -> bool:
    """Say what the words of the contract say, without a look at the code under test."""
    one = records[place]
    later = [other for other in records[place + 1 :] if other.status != "corrupt"]
    return (
        one.status == "corrupt"
        or one.pinned
        or (protection.save_best and bool(one.best))
        or (protection.save_last and not later)
        or one.checkpoint_type in protection.protected_types
    )


@quick
@given(HISTORIES, st.integers(1, 12), st.integers(1, 7), PROTECTIONS)
def test_the_default_rule_is_the_one_that_its_words_describe(
    records: list[CheckpointRecord], most: int, frequency: int, protection: Protection
) -> None:
    left = list(range(len(records)))
    while sum(records[place].status != "corrupt" for place in left) > most:  # one after the other, as a person would
        free = [place for place in left if not is_protected(records, place, protection)]
        passing = [place for place in free if records[place].epoch % frequency]
        if not free:
            break
        left.remove((passing or free)[0])
    plan = plan_by_count(records, most, frequency, protection)
    assert kept(plan) == " ".join(records[place].id for place in left)


@quick
@given(HISTORIES, st.integers(1, 12), st.integers(1, 7), PROTECTIONS)
def test_the_default_rule_leaves_the_maximum_or_the_protected_whichever_is_more(
    records: list[CheckpointRecord], most: int, frequency: int, protection: Protection
) -> None:
    sound = [place for place, one in enumerate(records) if one.status != "corrupt"]
    protected = sum(is_protected(records, place, protection) for place in sound)
    plan = plan_by_count(records, most, frequency, protection)
    assert len(plan.kept) == min(len(sound), max(most, protected)) + len(records) - len(sound)


@quick
@given(HISTORIES, st.integers(1, 12), st.integers(1, 7), POLICIES, PROTECTIONS)
def test_no_plan_removes_what_is_protected(
    records: list[CheckpointRecord], most: int, frequency: int, policy: RetentionPolicy, protection: Protection
) -> None:
    for plan in (
        plan_by_count(records, most, frequency, protection),
        plan_by_policy(records, policy, protection, NOW),
    ):
        for place, decision in enumerate(plan.decisions):
            assert decision.keep or not is_protected(records, place, protection)


@quick
@given(HISTORIES, st.integers(1, 12), st.integers(1, 7), POLICIES, PROTECTIONS)
def test_a_plan_has_one_decision_with_a_reason_for_each_record_in_order(
    records: list[CheckpointRecord], most: int, frequency: int, policy: RetentionPolicy, protection: Protection
) -> None:
    for plan in (
        plan_by_count(records, most, frequency, protection),
        plan_by_policy(records, policy, protection, NOW),
    ):
        assert [decision.record for decision in plan.decisions] == records
        assert all(decision.reason for decision in plan.decisions)
        assert len(plan.kept) + len(plan.removed) == len(records)
        assert len(str(plan).splitlines()) == len(records) + 1


@quick
@given(HISTORIES, st.lists(POLICIES, min_size=2, max_size=4))
def test_a_union_keeps_exactly_what_its_parts_keep(
    records: list[CheckpointRecord], policies: list[RetentionPolicy]
) -> None:
    union: Any = policies[0]
    for policy in policies[1:]:
        union = union | policy
    parts: set[str] = set()
    for policy in policies:
        parts |= policy.keeps(records, NOW).keys()
    assert set(union.keeps(records, NOW)) == parts
    assert set(KeepAny(tuple(reversed(policies))).keeps(records, NOW)) == parts


@quick
@given(HISTORIES.filter(bool), POLICIES, st.integers(1, 10))
def test_a_policy_keeps_only_what_there_is_and_does_not_depend_on_ids(
    records: list[CheckpointRecord], policy: RetentionPolicy, n: int
) -> None:
    renamed = [replace(one, id=f"z{len(records) - i:04}") for i, one in enumerate(records)]
    names = dict(zip((one.id for one in renamed), (one.id for one in records)))
    assert {names[key] for key in policy.keeps(renamed, NOW)} == set(policy.keeps(records, NOW))
    assert set(KeepLast(n).keeps(records, NOW)) == {one.id for one in records[-n:]}
