"""The same work as :mod:`medseg.io.workers`, done by the nodes of a Ray cluster."""

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import re
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep.fingerprint import versions
from medseg.errors import ConfigError, DatasetError
from medseg.io.workers import SINGLE_THREAD, Death, WorkerDied, died_twice, raised

Name = TypeVar("Name")
Task = tuple[Name, tuple[Any, ...]]

#: How often it is asked which nodes are left, and how long none may be.
_LOOK_S, _PATIENCE_S = 2.0, 30.0
#: How long a node may take to say that it sees the same files: it imports nothing heavy for it.
_PROBE_S = 120.0
_KNOCK_S = 10.0
#: How many nodes may be lost under a case, which may be what costs them their memory.
_NODES_PER_CASE = 3
_NO_MEMORY = "had not enough memory"


@dataclass(frozen=True)
class _Site:
    """What a node must see as the machine here does."""

    source: Path
    out: Path
    listing: str
    token: str
    versions: dict[str, str]

    def problem(self) -> str:
        """Why the node must not work on the cases; empty when it may."""
        here = versions()
        other = [f"{name} {here.get(name)}" for name, number in self.versions.items() if here.get(name) != number]
        if other:
            wanted = ", ".join(f"{name} {number}" for name, number in self.versions.items() if here.get(name) != number)
            return f"has {', '.join(other)}: expected {wanted} as here; install the same versions"
        if _listing(self.source) != self.listing:
            return f"does not see the same files in SOURCE {self.source}; share it under the same path"
        try:
            seen = (self.out / _token_name(self.token)).read_text(encoding="utf-8")
            probe = self.out / f"{_token_name(self.token)}-{secrets.token_hex(8)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            seen = f"{error.strerror}"
        if seen != self.token:
            return f"cannot write to the same OUT {self.out}; share it under the same path"
        return ""


class RayWorkers:
    """The CPUs of a Ray cluster, which work on cases; :class:`medseg.io.workers.Workers` for many machines.

    Args:
        address: of the cluster: ``auto``, ``ray://HOST:10001``, ``HOST:6379``, or ``local`` for a new one here.
        source: the folder with the raw data; every node sees it by this path.
        out: the dataset; every node can write to it by this path.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.

    Attributes:
        retried: what happened, by name of the case that was not done at the first try.
    """

    def __init__(self, address: str, source: Path, out: Path) -> None:
        self.address, self.source, self.out = address, source, out
        self.retried: dict[Any, str] = {}
        self._token = secrets.token_hex(16)
        _connect(address)

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()

    def start(self, tasks: int) -> None:
        """Ask every node whether it has the same versions and sees the same files.

        Raises:
            ConfigError: a node that must not work on the cases.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not tasks:
            return
        self._cpus()
        probe = ray.remote(_probe)
        site = pickle.dumps(self._site())
        with self._visible():
            asked = {
                probe.options(
                    num_cpus=0,
                    max_retries=0,
                    name="probe",
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                ).remote(site): node["NodeManagerAddress"]
                for node in _nodes()
            }
            done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE_S)
            for answer in done:
                try:
                    problem = ray.get(answer)
                except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
                    continue  # it has just gone away
                except ray.exceptions.RayError as error:
                    problem = f"cannot run medseg ({_first_line(error)}); install it there"
                if problem:
                    raise ConfigError(f"--ray {self.address}: the node {asked[answer]} {problem}")
        if silent:
            raise ConfigError(f"--ray {self.address}: the node {asked[silent[0]]} does not answer; end it")

    def each(
        self,
        function: Callable[..., Any],
        tasks: Iterable[Task[Name]],
        *,
        common: tuple[Any, ...] = (),
        ahead: int = 0,
    ) -> Generator[tuple[Name, Any]]:
        """Call ``function`` on every task, as :meth:`medseg.io.workers.Workers.each` does.

        No more tasks are under way than the cluster has CPUs. A task whose node was lost is done again on another. A
        task whose worker died alone is done again at the end, when no other is under way.

        Raises:
            DatasetError: no node is left, or one turned out to see other files or to have other versions.
        """
        suspects: list[tuple[Task[Name], Death]] = []
        with self._visible():
            for task, result in self._round(function, common, tasks, ahead, alone=False):
                if isinstance(result, Death):
                    suspects.append((task, result))
                else:
                    yield task[0], result
            for (name, arguments), first in suspects:
                ((_, result),) = self._round(function, common, [(name, arguments)], 0, alone=True)
                if isinstance(result, Death):
                    result = died_twice(first, result)
                else:
                    self.retried[name] = f"its worker process {first.what}; alone, it went well"
                yield name, result

    def _round(
        self,
        function: Callable[..., Any],
        common: tuple[Any, ...],
        tasks: Iterable[Task[Name]],
        ahead: int,
        *,
        alone: bool,
    ) -> Iterator[tuple[Task[Name], Any]]:
        """Do every task until it gave a result, its worker died, or it lost too many nodes."""
        import ray

        about = ray.put(pickle.dumps((self._site(), function, common)))
        work = ray.remote(_work).options(num_cpus=1, max_retries=0, name="case")
        source, given_back = iter(tasks), deque[Task[Name]]()
        running: dict[Any, Task[Name]] = {}
        lost: Counter[Any] = Counter()
        try:
            while True:
                room = 1 if alone else self._cpus() + ahead
                while len(running) < room:
                    task = given_back.popleft() if given_back else next(source, None)
                    if task is None:
                        break
                    running[work.remote(about, pickle.dumps(task[1]))] = task
                if not running:
                    return
                for answer in ray.wait(list(running), num_returns=1, timeout=_LOOK_S)[0]:
                    task = running.pop(answer)
                    result = _result_of(answer)
                    if isinstance(result, _NodeLost):
                        lost[task[0]] += 1
                        if lost[task[0]] < _NODES_PER_CASE:
                            self.retried[task[0]] = "its node of the Ray cluster was lost; on another, it went well"
                            given_back.append(task)
                            continue
                        self.retried.pop(task[0], None)
                        result = WorkerDied(f"{_NODES_PER_CASE} nodes of the Ray cluster were lost while they made it")
                    yield task, result
        except (ConnectionError, ray.exceptions.RaySystemError) as error:
            raise self._gone() from error
        finally:
            for answer in running:
                with contextlib.suppress(Exception):
                    ray.cancel(answer, force=True)

    def _cpus(self) -> int:
        """How many CPUs the living nodes have.

        Raises:
            DatasetError: none for a while.
        """
        patience = time.monotonic() + _PATIENCE_S
        while not (cpus := sum(int(node["Resources"].get("CPU", 0)) for node in _nodes())):
            if time.monotonic() > patience:
                raise self._gone()
            time.sleep(0.1)
        return cpus

    def _gone(self) -> DatasetError:
        return DatasetError(
            f"--ray {self.address}: no node with a CPU is left; start one and run the same command again to go on"
        )

    def _site(self) -> _Site:
        return _Site(self.source, self.out, _listing(self.source), self._token, versions())

    @contextlib.contextmanager
    def _visible(self) -> Iterator[None]:
        """While it lasts, a file in OUT by which a node tells that it is the same folder."""
        path = self.out / _token_name(self._token)
        path.write_text(self._token, encoding="utf-8")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class _NodeLost:
    """The result of a task whose node went away."""


def _connect(address: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray, which is not installed: pip install medseg[ray]") from None
    if address not in ("auto", "local"):
        _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, include_dashboard=None)
    except Exception as error:  # Ray raises many kinds
        raise ConfigError(f"--ray {address}: no Ray cluster answers ({_first_line(error)})") from None
    driver = ray._private.worker
    if hasattr(driver, "print_to_stdstream"):  # what Ray says of lost workers, on stdout, whatever it was told of logs
        driver.print_to_stdstream = _nowhere


def _knock(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself would try for many minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?(?P<host>[^/]+?)\]?:(?P<port>\d{1,5})", address)
    if match is None:
        raise ConfigError(f"--ray: {address!r} given, auto, local, HOST:PORT or ray://HOST:PORT expected")
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--ray {address}: no Ray cluster answers ({reason})") from None


def _nowhere(*message: Any, **how: Any) -> None:
    """Where Ray's own words go."""


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _result_of(answer: Any) -> Any:
    """What became of a task: its result, a :class:`Death`, or a :class:`_NodeLost`."""
    import ray

    try:
        went_well, result = pickle.loads(ray.get(answer))
    except (ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError, ray.exceptions.ObjectLostError):
        return _NodeLost()
    except ray.exceptions.OutOfMemoryError:
        return Death("was killed by Ray, for its node ran out of memory")
    except ray.exceptions.WorkerCrashedError:
        return Death("crashed, or was killed by the system for using too much memory")
    if not went_well:
        raise result
    return result


def _probe(site: bytes) -> str:
    problem: str = pickle.loads(site).problem()
    return problem


def _work(about: bytes, arguments: bytes) -> bytes:
    """What a node does with one task; it raises nothing, for Ray would write the traceback into its logs."""
    try:
        function, common, problem = _told(about)
        if problem:
            raise ConfigError(f"a node of the Ray cluster {problem}")
        return pickle.dumps((True, function(*common, *pickle.loads(arguments))))
    except MemoryError:
        return pickle.dumps((True, Death(_NO_MEMORY)))
    except Exception as error:
        return raised(error)


@functools.lru_cache(maxsize=1)
def _told(about: bytes) -> tuple[Callable[..., Any], tuple[Any, ...], str]:
    """Unpack what is the same for all tasks, once per process, and check its node."""
    # Before anything imports numpy or torch: they read these once.
    os.environ.update(dict.fromkeys(SINGLE_THREAD, "1"))
    # What libraries print may name a file; Ray would keep it in its logs.
    with Path(os.devnull).open("w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    site, function, common = pickle.loads(about)
    return function, common, site.problem()


def _listing(folder: Path) -> str:
    """A hash of the names in a folder."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        names = []
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()


def _token_name(token: str) -> str:
    return f".tmp-{token}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
