"""The same function on many cases, in worker processes of which one may die."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Name = TypeVar("Name")

_SINGLE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


class WorkerDied(Exception):
    """The process that worked on a case was killed, twice: once among others and once alone."""


class Workers:
    """Fresh processes, with one thread each, that work on cases; they are started when there is work for them.

    Args:
        jobs: how many; with 1 there is no worker at all, and the work is done here.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def each(
        self, function: Callable[..., Any], tasks: Iterable[tuple[Name, tuple[Any, ...]]], *, ahead: int = 0
    ) -> Iterator[tuple[Name, Any]]:
        """Call ``function`` with the arguments of every task, and give (name, result) as they come.

        No more tasks are taken than there are workers, so memory does not grow with their number. When a worker
        dies (killed for its memory, crashed in a library), nobody knows whose fault it was: the tasks then at work are
        each done once more, alone.

        Args:
            function: importable by name; it returns errors rather than raising them.
            tasks: (name, arguments); they may be made one by one.
            ahead: how many more tasks wait for a worker to become free: for short ones.

        Yields:
            (name, result); the result is a :class:`WorkerDied` when the worker died again.
        """
        if self.jobs == 1:
            for name, arguments in tasks:
                yield name, function(*arguments)
            return
        source = iter(tasks)
        waiting = next(source, None)
        running: dict[Future[Any], tuple[Name, tuple[Any, ...]]] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs + ahead:
                try:
                    future = self._start().submit(function, *waiting[1])
                except BrokenProcessPool:  # one of those at work has just died
                    if not running:
                        self._stop()
                    break
                running[future] = waiting
                waiting = next(source, None)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            suspects = []
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                done, _ = wait(running)
                self._stop()
            for future in done:
                task = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    suspects.append(task)
                else:
                    yield task[0], future.result()
            for name, arguments in suspects:
                with _pool(1) as alone:
                    try:
                        result = alone.submit(function, *arguments).result()
                    except BrokenProcessPool:
                        result = WorkerDied("its worker process was killed twice, perhaps for using too much memory")
                yield name, result

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = _pool(self.jobs)
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _pool(n_workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(n_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    # Before anything imports numpy or torch: they read these once.
    os.environ.update(dict.fromkeys(_SINGLE_THREAD, "1"))
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker of a killed build must not go on writing into the folder of the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
