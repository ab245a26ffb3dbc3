"""The same function on many cases, in worker processes of which one may die."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_SINGLE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


class WorkerDied(Exception):
    """The process that worked on a case was killed, twice: once among others and once alone."""


def each(
    function: Callable[..., Any], tasks: Sequence[tuple[str, tuple[Any, ...]]], jobs: int
) -> Iterator[tuple[str, Any]]:
    """Call ``function`` with the arguments of every task, and give (name, result) as they come.

    Workers are fresh processes with one thread each, and no more tasks are handed out than there are workers, so memory
    does not grow with the number of tasks. When a worker dies (killed for its memory, crashed in a library), nobody
    knows whose fault it was: the tasks then at work are each done once more, alone.

    Args:
        function: importable by name; it returns errors rather than raising them.
        tasks: (name, arguments).
        jobs: how many workers; with 1 there is no worker at all, and the work is done here.

    Yields:
        (name, result); the result is a :class:`WorkerDied` when the worker died again.
    """
    if jobs == 1 or not tasks:
        for name, arguments in tasks:
            yield name, function(*arguments)
        return
    waiting = deque(tasks)
    while waiting:
        suspects: list[tuple[str, tuple[Any, ...]]] = []
        running: dict[Future[Any], tuple[str, tuple[Any, ...]]] = {}
        pool = _pool(min(jobs, len(waiting)))
        try:
            while (waiting or running) and not suspects:
                while waiting and len(running) < jobs:
                    try:
                        running[pool.submit(function, *waiting[0][1])] = waiting[0]
                    except BrokenProcessPool:
                        break
                    waiting.popleft()
                if not running:
                    suspects = [waiting.popleft()]
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                broken = False
                for future in done:
                    if isinstance(future.exception(), BrokenProcessPool):
                        broken = True
                    else:
                        yield running.pop(future)[0], future.result()
                if broken:
                    wait(running)
                    for future in [future for future in running if future.exception() is None]:
                        yield running.pop(future)[0], future.result()
                    suspects = list(running.values())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for name, arguments in suspects:
            with _pool(1) as alone:
                try:
                    result = alone.submit(function, *arguments).result()
                except BrokenProcessPool:
                    result = WorkerDied("its worker process was killed twice, perhaps for using too much memory")
            yield name, result


def _pool(n_workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(n_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    # Before anything imports numpy or torch: they read these once.
    os.environ.update(dict.fromkeys(_SINGLE_THREAD, "1"))
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A worker of a killed build must not go on writing into the folder of the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
