"""The same function on many cases, in worker processes of which one may die."""

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Name = TypeVar("Name")

SINGLE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
#: Status of a worker that ended itself because it was given no more memory.
_NO_MEMORY = 77
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}


class WorkerDied(Exception):
    """The process that worked on a case died twice: once among others and once alone."""


@dataclass(frozen=True)
class Death:
    """What became of a worker, as a half-sentence whose subject it is."""

    what: str


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection
    #: Names and arguments of what it was handed; it works on the first.
    tasks: deque[tuple[Any, tuple[Any, ...]]] = field(default_factory=deque)
    #: Whether it knows the function of this round.
    told: bool = False


class Workers:
    """Fresh processes, with one thread each, that work on cases; they are started when there is work for them.

    Args:
        jobs: how many; with 1 there is no worker at all, and the work is done here.
        imports: modules that a worker imports before its first task.

    Attributes:
        retried: what happened, by name of the case that was done at the second try only.
    """

    def __init__(self, jobs: int, imports: Sequence[str] = ()) -> None:
        self.jobs = jobs
        self.retried: dict[Any, str] = {}
        self._imports = tuple(imports)
        self._crew: list[_Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self._end(self._crew)

    def start(self, tasks: int) -> None:
        """Start workers for so many tasks now, so that they import while something else goes on here."""
        while self.jobs > 1 and len(self._crew) < min(self.jobs, tasks):
            self._crew.append(_start_worker(self._imports))

    def each(
        self,
        function: Callable[..., Any],
        tasks: Iterable[tuple[Name, tuple[Any, ...]]],
        *,
        common: tuple[Any, ...] = (),
        ahead: int = 0,
    ) -> Generator[tuple[Name, Any]]:
        """Call ``function`` with the arguments of every task, and give (name, result) as they come.

        No more tasks are taken than there are workers, so memory does not grow with their number. A task whose worker
        died (killed for its memory, crashed in a library), or was refused memory, is done once more at the end, when
        no other is at work.

        Args:
            function: importable by name; it returns errors rather than raising them. What it raises is raised here,
                but for ``MemoryError``.
            tasks: (name, arguments); they may be made one by one.
            common: arguments before those of the task, the same for all; a worker gets them once.
            ahead: how many more tasks wait for a worker to become free: for short ones.

        Yields:
            (name, result); the result is a :class:`WorkerDied` when the worker died again.
        """
        if self.jobs == 1:
            for name, arguments in tasks:
                try:
                    result = function(*common, *arguments)
                except MemoryError:
                    result = WorkerDied("not enough memory")
                yield name, result
            return
        suspects = []
        for task, result in self._round(function, common, tasks, self.jobs, 1 + -(-ahead // self.jobs)):
            if isinstance(result, Death):
                suspects.append((task, result))
            else:
                yield task[0], result
        for task, first in suspects:
            self._end(self._crew)  # alone: an idle worker holds memory too
            ((_, result),) = self._round(function, common, [task], 1, 1)
            if isinstance(result, Death):
                result = died_twice(first, result)
            else:
                self.retried[task[0]] = f"its worker process {first.what}; alone, it went well"
            yield task[0], result

    def _round(
        self,
        function: Callable[..., Any],
        common: tuple[Any, ...],
        tasks: Iterable[tuple[Name, tuple[Any, ...]]],
        jobs: int,
        depth: int,
    ) -> Iterator[tuple[tuple[Name, tuple[Any, ...]], Any]]:
        """Do every task once, by so many workers of which each holds at most ``depth`` tasks."""
        about = pickle.dumps((function, common))
        source, given_back = iter(tasks), deque[tuple[Name, tuple[Any, ...]]]()
        for worker in self._crew:
            worker.told = False
        try:
            while True:
                while (free := self._free(jobs, depth)) is not None:
                    following = given_back.popleft() if given_back else next(source, None)
                    if following is None:
                        break
                    _hand(free, about, following)
                busy = {worker.pipe: worker for worker in self._crew if worker.tasks}
                if not busy:
                    return
                for pipe in multiprocessing.connection.wait(list(busy)):
                    worker = busy[pipe]  # type: ignore[index]
                    try:
                        went_well, result = pickle.loads(worker.pipe.recv_bytes())
                    except (EOFError, OSError):
                        task = worker.tasks.popleft()
                        given_back.extend(worker.tasks)
                        worker.process.join()
                        result = Death(how_it_ended(worker.process.exitcode))
                        self._end([worker])
                    else:
                        if not went_well:
                            raise result
                        task = worker.tasks.popleft()
                    yield task, result
        finally:
            self._end([worker for worker in self._crew if worker.tasks])  # nobody waits for their results any more

    def _free(self, jobs: int, depth: int) -> _Worker | None:
        """The worker that shall have the next task; None when all have enough."""
        least = min(self._crew, key=lambda worker: len(worker.tasks), default=None)
        if (least is None or least.tasks) and len(self._crew) < jobs:
            least = _start_worker(self._imports)
            self._crew.append(least)
        return least if least is not None and len(least.tasks) < depth else None

    def _end(self, workers: Sequence[_Worker]) -> None:
        """A worker ends itself when its pipe is closed, whatever it is at."""
        workers = list(workers)
        for worker in workers:
            worker.pipe.close()
            self._crew.remove(worker)
        for worker in workers:
            worker.process.join(5)
            if worker.process.exitcode is None:  # a library does not let go
                worker.process.kill()
                worker.process.join()
            worker.process.close()


def how_it_ended(status: int | None) -> str:
    """What an exit status says of a worker.

    Example:
        >>> how_it_ended(-11)
        'crashed in a library (SIGSEGV)'
    """
    if status == _NO_MEMORY:
        return "had not enough memory"
    if status is None or status >= 0:
        return f"ended by itself (status {status})"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    if -status == signal.SIGKILL:
        return f"was killed by the system ({name}), most likely for using too much memory"
    return f"crashed in a library ({name})" if -status in _CRASHES else f"was killed ({name})"


def died_twice(first: Death, second: Death) -> WorkerDied:
    """The result of a task whose worker died among others and alone."""
    again = "again" if second == first else f"this time it {second.what}"
    return WorkerDied(f"its worker process {first.what}; retried once alone: {again}")


def _start_worker(imports: Sequence[str]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, imports))
    try:
        process.start()
    finally:
        there.close()  # else the end of the worker would not show
    return _Worker(process, here)


def _hand(worker: _Worker, about: bytes, task: tuple[Any, tuple[Any, ...]]) -> None:
    arguments = pickle.dumps(task[1])
    worker.tasks.append(task)
    with contextlib.suppress(OSError):  # it has just died, as the next look at its pipe will tell
        if not worker.told:
            worker.pipe.send_bytes(b"about" + about)
            worker.told = True
        worker.pipe.send_bytes(b"task:" + arguments)


def _serve(pipe: multiprocessing.connection.Connection, imports: Sequence[str]) -> None:
    """What a worker does as long as it lives."""
    # Before anything imports numpy or torch: they read these once.
    os.environ.update(dict.fromkeys(SINGLE_THREAD, "1"))
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox), daemon=True).start()
    for name in imports:
        importlib.import_module(name)
    function, common = _nothing, ()
    while True:
        message = inbox.get()
        try:
            if message.startswith(b"about"):
                function, common = pickle.loads(message[5:])
                continue
            answer = pickle.dumps((True, function(*common, *pickle.loads(message[5:]))))
        except MemoryError:
            os._exit(_NO_MEMORY)
        except Exception as error:
            answer = raised(error)
        pipe.send_bytes(answer)


def _receive(pipe: multiprocessing.connection.Connection, inbox: "queue.SimpleQueue[bytes]") -> None:
    """Take what comes at once, so that the parent never waits; a worker of a killed build must not go on writing."""
    try:
        while True:
            inbox.put(pipe.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


def _nothing(*arguments: Any) -> None:
    """The function of a worker that was told none."""


def raised(error: Exception) -> bytes:
    """The answer of a worker whose function raised what it should have returned."""
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:  # an exception that does not survive the way
        answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return answer
