"""LRUCache, and that the manager's metadata cache never tells anything that is no longer true."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.errors import CheckpointNotFoundError, ConfigurationError, IntegrityError
from model_checkpoint.performance import LRUCache

ROOT = Path(__file__).parents[2]
DEADLINE = 20.0  # seconds that anything may take before it counts as hung


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- the cache --------------------------------------------------------------------------------------------------


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = LRUCache(3)
    for key in "abc":
        cache.set(key, key.upper())
    assert cache.get("a") == "A"  # used: b is the oldest now
    cache.set("d", "D")
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    cache.set("c", "new")  # so does writing
    cache.set("e", "E")
    assert [cache.get(key) for key in "acde"] == [None, "new", "D", "E"]


def test_setting_a_key_again_replaces_its_value_and_evicts_nothing() -> None:
    cache = LRUCache(2)
    cache.set("a", 1)
    cache.set("b", 2)
    cache.set("a", 3)
    assert (cache.get("a"), cache.get("b"), len(cache)) == (3, 2, 2)
    assert cache.stats()["evictions"] == 0


def test_a_cache_of_one_entry_works() -> None:
    cache = LRUCache(1)
    for number in range(5):
        cache.set(number, number)
        assert (cache.get(number), len(cache)) == (number, 1)
    assert cache.stats()["evictions"] == 4


def test_without_a_ttl_entries_live_for_ever() -> None:
    clock = Clock()
    cache = LRUCache(2, clock=clock)
    cache.set("a", 1)
    clock.now += 1e12
    assert cache.get("a") == 1


def test_an_entry_dies_when_its_default_ttl_is_over() -> None:
    clock = Clock()
    cache = LRUCache(2, default_ttl=10, clock=clock)
    cache.set("a", 1)
    clock.now += 9.999
    assert cache.get("a") == 1  # reading does not make it younger
    clock.now += 0.001
    assert cache.get("a") is None
    assert len(cache) == 0
    assert cache.stats()["expired"] == 1


def test_writing_an_entry_again_makes_it_young() -> None:
    clock = Clock()
    cache = LRUCache(2, default_ttl=10, clock=clock)
    cache.set("a", 1)
    clock.now += 8
    cache.set("a", 2)
    clock.now += 8
    assert cache.get("a") == 2


def test_an_entry_can_have_a_ttl_of_its_own() -> None:
    clock = Clock()
    cache = LRUCache(3, default_ttl=10, clock=clock)
    cache.set("short", 1, ttl=2)
    cache.set("long", 2, ttl=100)
    cache.set("default", 3)
    clock.now += 5
    assert [cache.get(key) for key in ("short", "long", "default")] == [None, 2, 3]
    clock.now += 50
    assert [cache.get(key) for key in ("short", "long", "default")] == [None, 2, None]


def test_stats_count_hits_misses_evictions_and_expiries() -> None:
    clock = Clock()
    cache = LRUCache(2, default_ttl=10, clock=clock)
    assert cache.stats() == {
        "size": 0,
        "max_size": 2,
        "hits": 0,
        "misses": 0,
        "evictions": 0,
        "expired": 0,
        "hit_rate": 0.0,
    }
    cache.set("a", 1)
    cache.set("b", 2)
    cache.set("c", 3)
    for key in "abcc":
        cache.get(key)
    clock.now += 10
    cache.get("c")
    assert cache.stats() == {
        "size": 1,  # b is dead, but nobody has asked for it
        "max_size": 2,
        "hits": 3,
        "misses": 2,
        "evictions": 1,
        "expired": 1,
        "hit_rate": 0.6,
    }


def test_none_and_false_are_values_like_others() -> None:
    cache = LRUCache(3)
    cache.set("none", None)
    cache.set("false", False)
    assert cache.get("none", "default") is None
    assert cache.get("false", "default") is False
    assert cache.get("absent", "default") == "default"
    assert (cache.stats()["hits"], cache.stats()["misses"]) == (2, 1)
    assert cache.delete("none")


def test_delete_says_whether_it_was_there_and_clear_keeps_the_counts() -> None:
    cache = LRUCache(3)
    cache.set("a", 1)
    cache.set("b", 2)
    cache.get("a")
    assert (cache.delete("a"), cache.delete("a"), cache.get("a")) == (True, False, None)
    cache.clear()
    assert (len(cache), cache.get("b"), cache.stats()["hits"]) == (0, None, 1)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ConfigurationError, match="max_size"):
        LRUCache(size)


@pytest.mark.parametrize("ttl", [0, -1.5])
def test_a_ttl_that_is_not_positive_is_refused(ttl: float) -> None:
    with pytest.raises(ConfigurationError, match="default_ttl"):
        LRUCache(1, default_ttl=ttl)


def test_a_manager_with_an_impossible_cache_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size"):
        EnhancedCheckpointManager(None, str(tmp_path / "c"), cache_size=0, database_url=f"sqlite:///{tmp_path}/r.db")


def test_many_threads_never_see_another_keys_value_nor_more_than_the_size() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    cache = LRUCache(8)
    start = threading.Barrier(6)
    wrong: list[object] = []

    def work(worker: int) -> None:
        start.wait(DEADLINE)
        for i in range(500):
            key = (worker * 7 + i) % 20
            cache.set(key, ("value of", key))
            found = cache.get((key + 3) % 20)
            if found is not None and found != ("value of", (key + 3) % 20):
                wrong.append(found)
            if i % 50 == 0:
                cache.delete(key)
            if len(cache) > 8:
                wrong.append(len(cache))

    try:
        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    stats = cache.stats()
    assert stats["hits"] + stats["misses"] == 3000
    assert stats["size"] <= 8


# --- the manager's cache is never stale -------------------------------------------------------------------------


class Bench:
    """A manager whose cache is warm, and another on the same directory and database to change things with."""

    def __init__(self, folder: Path, caching: bool) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder}/runs.db"
        self.tracker = ExperimentTracker("run", database_url=self.url)
        self.first = self.manager(caching)
        self.caching = caching

    def manager(
        self, caching: bool = True, directory: str = "checkpoints", **options: Any
    ) -> EnhancedCheckpointManager:
        made = EnhancedCheckpointManager(
            self.tracker, str(self.folder / directory), enable_caching=caching, max_checkpoints=None, **options
        )
        return made

    def warm(self, *kinds: str) -> None:
        for kind in kinds:
            for _ in range(3):  # from the second time on, from the cache
                self.first.load_checkpoint(checkpoint_type=kind)
        cache = self.first.get_performance_statistics()["cache"]
        assert (cache is not None) == self.caching
        assert not self.caching or cache["hits"] > 0

    def elsewhere(self, action: str, *arguments: str) -> str:
        """Do ``action`` with a manager of another process; returns what it printed."""
        script = (
            "import sys\n"
            "from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker\n"
            "url, folder, experiment, *arguments = sys.argv[1:]\n"
            "manager = EnhancedCheckpointManager(None, folder, database_url=url, max_checkpoints=None)\n"
            f"{action}\n"
        )
        where = [self.url, str(self.folder / "checkpoints"), self.tracker.experiment_id]
        done = subprocess.run(
            [sys.executable, "-c", script, *where, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(params=[True, False], ids=["caching", "no caching"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, request.param)
    yield made
    made.tracker.close()


def test_the_cache_answers_repeated_loads(tmp_path: Path) -> None:
    bench = Bench(tmp_path, True)
    bench.first.save_checkpoint({"w": b"1"}, loss=1.0)
    bench.warm("latest", "best_loss")
    stats = bench.first.get_performance_statistics()["cache"]
    assert stats["hit_rate"] > 0.5
    bench.tracker.close()


def test_a_save_by_another_process_is_the_latest_and_the_best_at_once(bench: Bench) -> None:
    bench.first.save_checkpoint({"w": b"1"}, loss=1.0)
    bench.warm("latest", "best_loss")
    saved = bench.elsewhere("print(manager.save_checkpoint({'w': b'2'}, loss=0.5, experiment_id=experiment))")
    for kind in ("latest", "best_loss"):
        loaded = bench.first.load_checkpoint(checkpoint_type=kind)
        assert loaded["_checkpoint_metadata"]["checkpoint_id"] == saved
        assert loaded["model_state_dict"] == {"w": b"2"}


def test_a_flag_that_moved_is_gone_from_the_metadata_of_the_old_holder(bench: Bench) -> None:
    old = bench.first.save_checkpoint({"w": b"1"}, loss=1.0)
    bench.warm("best_loss")
    assert bench.first.load_checkpoint(old)["_checkpoint_metadata"]["is_best_loss"] is True
    bench.elsewhere("manager.save_checkpoint({'w': b'2'}, loss=0.5, experiment_id=experiment)")
    assert bench.first.load_checkpoint(old)["_checkpoint_metadata"]["is_best_loss"] is False


def test_a_deletion_by_another_process_is_seen_at_once(bench: Bench) -> None:
    first = bench.first.save_checkpoint({"w": b"1"}, loss=0.5)
    second = bench.first.save_checkpoint({"w": b"2"}, loss=1.0)
    bench.first.load_checkpoint(first)
    bench.warm("latest", "best_loss")
    bench.elsewhere("manager.delete_checkpoint(arguments[0])", first)
    with pytest.raises(CheckpointNotFoundError, match=f"^Checkpoint not found: {first}"):
        bench.first.load_checkpoint(first)
    loaded = bench.first.load_checkpoint(checkpoint_type="best_loss")["_checkpoint_metadata"]
    assert (loaded["checkpoint_id"], loaded["is_best_loss"]) == (second, True)
    bench.elsewhere("manager.delete_checkpoint(arguments[0])", second)
    with pytest.raises(CheckpointNotFoundError):
        bench.first.load_checkpoint()


def test_a_pin_by_another_process_stops_a_deletion_at_once(bench: Bench) -> None:
    checkpoint = bench.first.save_checkpoint({"w": b"1"})
    bench.first.load_checkpoint(checkpoint)
    bench.elsewhere("manager.pin(arguments[0])", checkpoint)
    with pytest.raises(ConfigurationError, match="pinned"):
        bench.first.delete_checkpoint(checkpoint)
    bench.elsewhere("manager.unpin(arguments[0])", checkpoint)
    assert bench.first.delete_checkpoint(checkpoint)


def test_what_another_process_found_corrupt_is_told_at_once(bench: Bench) -> None:
    checkpoint = bench.first.save_checkpoint({"w": b"1"})
    bench.warm("latest")
    path = Path(bench.first.list_checkpoints()[0]["path"]) / "state.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"w", b"v", 1))
    assert bench.elsewhere("print(manager.verify_experiment_integrity(experiment)['failed'])") == "1"
    (told,) = bench.first.list_checkpoints()
    assert (told["status"], told["verification"]["verified"]) == ("corrupt", False)
    with pytest.raises(IntegrityError, match=r"state\.json"):
        bench.first.load_checkpoint(checkpoint)
    path.write_bytes(content)  # restored from a copy
    bench.elsewhere("manager.load_checkpoint(arguments[0])", checkpoint)
    (told,) = bench.first.list_checkpoints()
    assert (told["status"], told["verification"]["verified"]) == ("committed", True)
    assert bench.first.load_checkpoint(checkpoint)["model_state_dict"] == {"w": b"1"}


SECOND: dict[str, Callable[[EnhancedCheckpointManager, str], object]] = {
    "delete": lambda manager, checkpoint: manager.delete_checkpoint(checkpoint),
    "delete and empty": lambda manager, checkpoint: (manager.delete_checkpoint(checkpoint), manager.empty_trash()),
}


@pytest.mark.parametrize("action", SECOND)
def test_a_deletion_by_a_second_manager_is_seen_at_once(bench: Bench, action: str) -> None:
    checkpoint = bench.first.save_checkpoint({"w": b"1"}, metrics={"f1": 0.5})
    other = bench.first.save_checkpoint({"w": b"2"}, metrics={"f1": 0.4})
    bench.warm("latest", "best:f1", "best_metric")
    bench.first.load_checkpoint(checkpoint)
    SECOND[action](bench.manager(), checkpoint)
    with pytest.raises(CheckpointNotFoundError):
        bench.first.load_checkpoint(checkpoint)
    for kind in ("best:f1", "best_metric"):
        loaded = bench.first.load_checkpoint(checkpoint_type=kind)["_checkpoint_metadata"]
        assert (loaded["checkpoint_id"], loaded["is_best_metric"]) == (other, True)


def test_an_undeletion_by_a_second_manager_is_seen_at_once(bench: Bench) -> None:
    checkpoint = bench.first.save_checkpoint({"w": b"1"}, loss=0.5)
    bench.first.save_checkpoint({"w": b"2"}, loss=1.0)
    second = bench.manager()
    second.delete_checkpoint(checkpoint)
    bench.warm("best_loss")
    with pytest.raises(CheckpointNotFoundError):
        bench.first.load_checkpoint(checkpoint)
    second.undelete(checkpoint)
    assert bench.first.load_checkpoint(checkpoint)["model_state_dict"] == {"w": b"1"}
    assert bench.first.load_checkpoint(checkpoint_type="best_loss")["loss"] == 0.5


def test_a_type_that_a_second_manager_saved_first_is_found_at_once(bench: Bench) -> None:
    bench.first.save_checkpoint({"w": b"1"})
    for kind in ("milestone", "best:f1"):
        with pytest.raises(ValueError, match=kind):
            bench.first.load_checkpoint(checkpoint_type=kind)
    saved = bench.manager().save_checkpoint({"w": b"2"}, checkpoint_type="milestone", metrics={"f1": 0.5})
    for kind in ("milestone", "best:f1", "best_metric"):
        loaded = bench.first.load_checkpoint(checkpoint_type=kind)
        assert loaded["_checkpoint_metadata"]["checkpoint_id"] == saved


def test_retention_of_a_second_manager_is_seen_at_once(bench: Bench) -> None:
    first = bench.first.save_checkpoint({"w": b"1"}, epoch=1)
    bench.first.load_checkpoint(first)
    keeper = EnhancedCheckpointManager(bench.tracker, str(bench.folder / "checkpoints"), max_checkpoints=1)
    keeper.save_checkpoint({"w": b"2"}, epoch=2)
    with pytest.raises(CheckpointNotFoundError):
        bench.first.load_checkpoint(first)


def test_a_best_flag_that_moved_to_another_directory_is_seen_at_once(bench: Bench) -> None:
    """Flags belong to the experiment: with or without a cache, the answer must be the same."""
    old = bench.first.save_checkpoint({"w": b"1"}, loss=1.0)
    bench.warm("best_loss")
    bench.manager(directory="other").save_checkpoint({"w": b"2"}, loss=0.5)
    assert bench.first.load_checkpoint(old)["_checkpoint_metadata"]["is_best_loss"] is False
    with pytest.raises(CheckpointNotFoundError, match="other"):
        bench.first.load_checkpoint(checkpoint_type="best_loss")


def test_two_experiments_of_one_directory_do_not_share_answers(bench: Bench) -> None:
    bench.first.save_checkpoint({"w": b"1"}, loss=1.0)
    bench.warm("latest", "best_loss")
    with ExperimentTracker("another", database_url=bench.url) as another:
        mine = bench.first.save_checkpoint({"w": b"2"}, loss=0.1, experiment_id=another.experiment_id)
        for kind in ("latest", "best_loss"):
            assert bench.first.load_checkpoint(checkpoint_type=kind)["loss"] == 1.0
            loaded = bench.first.load_checkpoint(experiment_id=another.experiment_id, checkpoint_type=kind)
            assert loaded["_checkpoint_metadata"]["checkpoint_id"] == mine


def test_a_small_cache_that_evicts_answers_right(tmp_path: Path) -> None:
    bench = Bench(tmp_path, True)
    manager = bench.manager(cache_size=2)
    saved = [manager.save_checkpoint({"n": n}, epoch=n) for n in range(6)]
    for _ in range(2):
        for number, checkpoint in enumerate(saved):
            assert manager.load_checkpoint(checkpoint)["epoch"] == number
    assert manager.get_performance_statistics()["cache"]["evictions"] > 0
    bench.tracker.close()


def test_what_a_load_returned_can_be_changed_without_harm_to_the_next(bench: Bench) -> None:
    checkpoint = bench.first.save_checkpoint(
        {"w": bytearray(b"12")}, metrics={"f1": 0.5}, config={"betas": [0.9], "nested": {"a": 1}}
    )
    loaded = bench.first.load_checkpoint(checkpoint)
    loaded["metrics"]["f1"] = 99.0
    loaded["config"]["betas"].append("changed")
    loaded["config"]["nested"]["a"] = "changed"
    loaded["_checkpoint_metadata"]["epoch"] = "changed"
    loaded["model_state_dict"]["w"][0] = 0
    again = bench.first.load_checkpoint(checkpoint)
    assert again["metrics"] == {"f1": 0.5}
    assert again["config"] == {"betas": [0.9], "nested": {"a": 1}}
    assert again["_checkpoint_metadata"]["epoch"] == 0
    assert again["model_state_dict"] == {"w": bytearray(b"12")}


RACE = """
import sys
from model_checkpoint import EnhancedCheckpointManager
url, folder, experiment, count = sys.argv[1:]
manager = EnhancedCheckpointManager(None, folder, database_url=url, max_checkpoints=None)
for number in range(int(count)):
    manager.save_checkpoint({"n": number}, loss=1.0 / (number + 1), experiment_id=experiment)
"""


def test_while_another_process_saves_the_best_that_is_read_never_gets_worse(bench: Bench) -> None:
    bench.first.save_checkpoint({"n": -1}, loss=2.0)
    count = 10
    where = [bench.url, str(bench.folder / "checkpoints"), bench.tracker.experiment_id, str(count)]
    process = subprocess.Popen([sys.executable, "-c", RACE, *where], cwd=ROOT)
    seen = []
    while process.poll() is None:
        loaded = bench.first.load_checkpoint(checkpoint_type="best_loss")
        expected = -1 if loaded["loss"] == 2.0 else round(1 / loaded["loss"]) - 1
        assert loaded["model_state_dict"]["n"] == expected
        seen.append(loaded["loss"])
    assert process.returncode == 0
    assert seen == sorted(seen, reverse=True)
    assert bench.first.load_checkpoint(checkpoint_type="best_loss")["loss"] == 1.0 / count
