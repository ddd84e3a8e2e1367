"""Where training stands in its data: a loader that can be resumed in the middle of an epoch, whatever it loads from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from model_checkpoint.checkpoint.rng import setters
from model_checkpoint.checkpoint.state import random_states
from model_checkpoint.errors import ConfigurationError

_PARTS = ("base_dataloader", "batch_sampler", "sampler")  # of a loader or sampler: what an order may hang on, too
_NUMBERS = ("iteration", "epoch", "initial_seed", "seed")


class ResumableLoader:
    """A data loader with ``state_dict`` and ``load_state_dict``; in all else it is the loader that it is made of.

    An epoch that was cut off is begun again with the random states and generators that it had begun with, and the
    batches that were seen are fetched again and dropped, so that worker processes and datasets with a state of their
    own come to where they were. That takes as long as fetching them took. A loader with ``load_state_dict`` of its own
    (``torchdata``'s StatefulDataLoader) goes to its place by that. What a sampler draws from the process's random
    states must be drawn before the first batch, as PyTorch's samplers do. Random numbers of worker processes go on
    exactly, but for ``persistent_workers=True``, whose random states no other process has.

    Args:
        loader: an iterable that begins a new epoch whenever it is iterated.

    Attributes:
        ahead: how many of the batches that it gave were not used yet when ``state_dict`` is called.
    """

    def __init__(self, loader: Any) -> None:
        if isinstance(loader, type) or not hasattr(loader, "__iter__"):
            raise ConfigurationError(f"ResumableLoader needs a data loader, or anything to iterate, not {loader!r}")
        self._loader = loader
        self._owns_state = hasattr(loader, "load_state_dict") and not hasattr(loader, "base_dataloader")
        self.ahead = 0
        self._resume: Mapping[str, Any] | None = None
        self._epoch: dict[str, Any] = {"delivered": 0}  # of the epoch that is under way; none delivered: of none

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing is drawn from the random states before the first batch is asked for.
        iterator = self._continued() if self._resume is not None else self._begun()
        while True:
            before = random_states()
            try:
                batch = next(iterator)
            except StopIteration:
                break
            self._epoch |= {"delivered": self._epoch["delivered"] + 1, "before": before}
            yield batch
        self.end_epoch()

    def _begun(self) -> Iterator[Any]:
        start, order = random_states(), _order_of(self._loader)
        self._epoch = {"delivered": 0, "start": start, "order": order, "batches": _length(self._loader)}
        iterator: Iterator[Any] = iter(self._loader)
        return iterator

    def _continued(self) -> Iterator[Any]:
        """Return an iterator that stands where the epoch was cut off; the random states stay what they are."""
        assert self._resume is not None
        self._epoch, self._resume = dict(self._resume), None
        now, seen = random_states(), self._epoch["delivered"]
        _put_back(self._epoch["start"])
        iterator: Iterator[Any] = iter(self._loader)
        if self._epoch.pop("own", None) is None:
            for i in range(seen):
                if i == seen - 1:
                    _put_back(self._epoch["before"])  # a loader may fetch ahead
                if next(iterator, self) is self:
                    raise ConfigurationError(
                        f"{seen} batches of this epoch were seen before, and the data loader ends after {i}; give it "
                        "the data and the batch size that the checkpoint was saved with"
                    )
        _put_back(now)
        return iterator

    def end_epoch(self) -> None:
        """Say that what was begun is over: the state is now that between two epochs."""
        self._epoch = {"delivered": 0}

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data: plain values and arrays, some 20 KB."""
        if self._resume is not None:
            return dict(self._resume)
        used = self._epoch["delivered"] - self.ahead
        if used <= 0:
            return {"delivered": 0, "order": _order_of(self._loader)}
        exact = not self.ahead
        own = self._loader.state_dict() if self._owns_state and exact else None
        return {**self._epoch, "delivered": used, "before": self._epoch["before"] if exact else None, "own": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to that place in the data when it is iterated next.

        Raises:
            ConfigurationError: it gives another number of batches than the one that was saved.
        """
        if state["delivered"] and state.get("batches") not in (None, _length(self._loader)):
            raise ConfigurationError(
                f"the loader that was saved within an epoch had {state['batches']} batches, and this one has "
                f"{_length(self._loader)}; give it the data and the batch size that the checkpoint was saved with"
            )
        _set_order(self._loader, state["order"])
        self._resume = state if state["delivered"] else None
        self.end_epoch()
        if state.get("own") is not None:
            self._loader.load_state_dict(state["own"])


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None  # a stream


def _put_back(states: Any) -> None:
    for put_back in setters(states):
        put_back()


def _nodes(loader: Any) -> list[Any]:
    """Return the loader, its samplers and theirs, each once."""
    found = [loader]
    for node in found:
        parts = [getattr(node, part, None) for part in _PARTS]
        found += [part for part in parts if part is not None and all(part is not other for other in found)]
    return found


def _order_of(loader: Any) -> list[dict[str, Any]]:
    noted = []
    for node in _nodes(loader):
        own = vars(node) if hasattr(node, "__dict__") else {}
        numbers = {name: own[name] for name in _NUMBERS if type(own.get(name)) is int}
        generator = own.get("generator")
        noted.append({"numbers": numbers, "generator": None if generator is None else generator.get_state()})
    return noted


def _set_order(loader: Any, noted: list[dict[str, Any]]) -> None:
    for node, order in zip(_nodes(loader), noted):
        if order["numbers"]:
            vars(node).update(order["numbers"])
        if order["generator"] is not None and node.generator is not None:
            node.generator.set_state(order["generator"])
