"""Functions run in processes of their own, which may be killed; the slow imports are made once for all of them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.frameworks.optuna_study", "tests.frameworks.transformers_training"])


def in_process(function: Callable[..., object], *arguments: Any, killed: bool = False, **options: Any) -> None:
    """Call ``function``; fail unless it returns, or with ``killed`` its process is killed with SIGKILL."""
    process = _PROCESSES.Process(target=function, args=arguments, kwargs=options)
    process.start()
    process.join(120)
    assert process.exitcode == (-signal.SIGKILL if killed else 0)
