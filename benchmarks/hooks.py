"""What does an event cost that nobody listens to, and one with ten listeners?

Microseconds a firing, each row in loops of their own that take turns, so that noise strikes all. Beside ours: a loop
of ten calls, which is the least that ten listeners cost, and pluggy, the plugin manager of pytest, with as many hooks.
Then what a timeout, a coroutine and the background cost: one listener each.

    python benchmarks/hooks.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pluggy
from report import Figure, Section, machine, progress, shuffled, tell

from model_checkpoint.hooks import HookContext, HookEvent, HookManager

EVENT = HookEvent.AFTER_FORWARD_PASS
DATA = {"epoch": 1, "step": 2, "loss": 0.5}


def listener(context: HookContext) -> None:
    """Do nothing."""


async def coroutine(context: HookContext) -> None:
    """Do nothing."""


def ten_hooks() -> HookManager:
    hooks = HookManager()
    for number in range(10):
        hooks.register_hook(f"hook {number}", listener, [EVENT])
    return hooks


def one_hook(handler: Callable[[HookContext], object] = listener, **options: object) -> HookManager:
    hooks = HookManager()
    hooks.register_hook("hook", handler, [EVENT], **options)  # type: ignore[arg-type]
    return hooks


def plugins(count: int) -> pluggy.PluginManager:
    spec, impl = pluggy.HookspecMarker("bench"), pluggy.HookimplMarker("bench")

    class Specification:
        @spec
        def saved(self, context: object) -> None: ...

    class Plugin:
        @impl
        def saved(self, context: object) -> None: ...

    manager = pluggy.PluginManager("bench")
    manager.add_hookspecs(Specification)
    for _ in range(count):
        manager.register(Plugin())
    return manager


def fire(hooks: HookManager) -> Callable[[], object]:
    return lambda: hooks.fire_hook(EVENT, data=DATA, checkpoint_id="c", experiment_id="e")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each row, after one to warm up")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    options = parser.parse_args()
    listening, background = ten_hooks(), one_hook(async_execution=True)
    nobody, ten = plugins(0).hook.saved, plugins(10).hook.saved
    context = HookContext(EVENT, dict(DATA))
    quick = {
        "ours: nobody listens": (fire(HookManager()), 100_000),
        "pluggy: nobody listens": (lambda: nobody(context=context), 100_000),
        "ours: ten listeners": (fire(listening), 10_000),
        "pluggy: ten listeners": (lambda: ten(context=context), 10_000),
        "limit: ten calls": (lambda: [listener(context) for _ in range(10)], 10_000),
    }
    slow = {
        "ours: one listener": (fire(one_hook()), 10_000),
        "one with a timeout": (fire(one_hook(timeout=5.0)), 1_000),
        "one coroutine": (fire(one_hook(coroutine)), 1_000),
        "one in the background": (fire(background), 500),
    }
    sections = []
    for title, rows in (("firing an event", quick), ("firing an event with one listener", slow)):
        section = Section(title, unit="us")
        for number in range(options.rounds + 1):
            progress(f"{title}: round {number} of {options.rounds}")
            for row in shuffled(list(rows), number):
                work, times = rows[row]
                gc.collect()
                start = time.perf_counter()
                for _ in range(times):
                    work()
                section.add(row, (time.perf_counter() - start) / times * 1e6)
                background.wait()
        section.rows = {row: section.rows[row] for row in rows}
        sections.append(section)
    figures = [
        Figure("an event that nobody listens to", sections[0].median("ours: nobody listens"), 1.0, "us"),
        Figure("an event with ten listeners", sections[0].median("ours: ten listeners"), 30.0, "us"),
    ]
    tell("hooks", machine(Path.cwd(), ("model-checkpoint", "pluggy")), sections, figures)
    return int(options.check and not all(figure.reached for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
