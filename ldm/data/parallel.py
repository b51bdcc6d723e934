"""A function over many tasks in processes, results in the tasks' order, with a progress bar on stderr."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None, label: str, unit: str = "shards"
) -> Iterator[Result]:
    """function(task) for each task. The function and what it is given and returns must be picklable.

    Args:
        workers: processes; 1: this one; None: one a core.
        label: of the bar, which shows how many `unit` are done.

    Raises:
        UserError: no worker is asked for, or one was killed (the machine ran out of memory).
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise UserError(f"workers={workers}; expected 1 or more")
    workers = min(workers, len(tasks))
    run = map(function, tasks) if workers <= 1 else _in_pool(function, tasks, workers)
    columns = *Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(run, total=len(tasks), description=label)


def _in_pool(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    pool = ProcessPoolExecutor(workers, get_context("fork"), _prepare)
    try:
        yield from pool.map(function, tasks)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run the command again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # those begun end well, also after Ctrl-C


def _prepare() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else the workers of a parent that was killed would wait forever, and hold its locks."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
