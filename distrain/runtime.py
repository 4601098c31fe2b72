"""The life of a rank: where it is, its device and process group, the shared run folder, its log, and its failures."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import logging
import math
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from tqdm import tqdm

from distrain import config as configuration
from distrain.collectives import Communicator
from distrain.config import Config, ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

#: Whether this process was ever part of a process group; what is left of one makes ending delicate.
has_talked = False

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
#: A signal that comes again within this time is the same request.
_SAME_REQUEST_SECONDS = 5.0

#: Numbers the meetings of this process; all ranks count alike.
_MEETINGS = itertools.count()
_BEGINNINGS = itertools.count()


@dataclass(frozen=True)
class World:
    """This rank's place among all, as the launcher's environment says."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str

    @classmethod
    def from_environment(cls) -> World:
        """Reads torchrun's variables; without them this is the only rank.

        Raises:
            ConfigError: A variable is not a number.
        """

        def number(name: str, default: int) -> int:
            text = os.environ.get(name, str(default))
            if not text.isdigit():
                raise ConfigError(name, text, "the launcher's environment variable must be a whole number")
            return int(text)

        size = number("WORLD_SIZE", 1)
        return cls(
            rank=number("RANK", 0),
            size=size,
            local_rank=number("LOCAL_RANK", 0),
            local_size=number("LOCAL_WORLD_SIZE", size),
            host=socket.gethostname(),
        )


class Terminated(Exception):
    """The process was asked to end by a signal."""


class PeerLost(RuntimeError):
    """Another rank is gone, and the run can't go on without it.

    Attributes:
        rank: Which.
        host: Where it was.
        reason: Why, as far as anybody knows.
    """

    def __init__(self, rank: int, host: str, reason: str) -> None:
        super().__init__(f"rank {rank} on {host} is gone: {reason}")
        self.rank, self.host, self.reason = rank, host, reason


class Stopped(Exception):
    """All ranks ended at the same step because they were asked to; everything is saved.

    Attributes:
        reason: Who asked: a signal, or the key of a limit.
    """

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"stopped by {reason} at step {step}")
        self.reason = reason


class Failed(Exception):
    """The run failed and all was said; the process ends with a code that is not zero."""


@dataclass
class Failure:
    """What ``failure.json`` holds.

    Attributes:
        rank: The rank that failed first.
        host: Its host.
        step: The training step it was in.
        error: Kind and message in one line.
        traceback: Where, as Python prints it; empty for a process that vanished.
    """

    rank: int
    host: str
    step: int
    error: str
    traceback: str = ""

    def line(self) -> str:
        """The last line that a user reads."""
        return f"rank {self.rank} on {self.host} failed at step {self.step}: {self.error}"


class Runtime:
    """A context in which the ranks of one run can talk.

    On entering: threads, device and seeds are set, the ranks meet, compare their configurations, agree on one run
    folder and form the process group. On leaving after an error every rank says who failed where, the first to know
    writes ``failure.json``, and :class:`Failed` is raised.

    Args:
        config: The checked configuration.
        world: This rank's place.
        keep_logs: Make the run folder and write ``logs/`` below it; a command that only reads a run does neither, and
            ``run_dir`` is then the configuration's.

    Attributes:
        device: Where this rank computes.
        run_dir: The folder that all ranks share; made by rank 0.
        step: The step in progress, kept up to date by the trainer for failure reports.
        farewell: Called by every rank at the end of a run that succeeded: nobody leaves while another still talks.
        expendable: The others go on if this rank fails.
        lost: Ranks that are gone and that the others did without; what ends the run later is not their failure.
        stoppable: The ranks are where they agree on stopping after each step, so a signal need not end this one.
        stop_requested: The signal that asks for it, if one came.
        began: When the run began, in seconds since the epoch; the first attempt's beginning where a launcher restarts.
    """

    def __init__(self, config: Config, world: World, *, keep_logs: bool = True) -> None:
        self.config = config
        self._keep_logs = keep_logs
        self.world = world
        self.device = choose_device(config, world)
        self.step = 0
        self.run_dir = Path()
        self.backend = choose_backend(config, self.device)
        self._store: Store | None = None
        self._handlers: list[logging.Handler] = []
        self._previous_signal: dict[signal.Signals, Any] = {}
        self._failing = False
        self.farewell: Callable[[], None] = lambda: self.communicator().barrier()
        self.expendable = False
        self.lost: set[int] = set()
        self.stoppable = False
        self.stop_requested: str | None = None
        self._asked_at = 0.0
        self.began = time.time()

    # --- set-up and tear-down ----------------------------------------------------------------------------------------

    def __enter__(self) -> Runtime:
        try:
            self._set_threads()
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            if self.world.size > 1:
                self._store = self._meet()
                self._compare_configurations(self._store)
            self.run_dir = self._agree_on_run_dir() if self._keep_logs else Path(self.config.run_dir or ".")
            self._start_logging()
            if self.world.size > 1 or self.backend == "nccl":
                self._form_group()
            self._set_determinism()
            if threading.current_thread() is threading.main_thread():
                self._previous_signal = {each: signal.signal(each, self._on_signal) for each in _SIGNALS}
        except ConfigError:
            self._close()
            raise
        except BaseException as error:
            self._fail(error)
            self._close()
            raise Failed from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, Stopped):
            self._fail(error)
            self._close()
            raise Failed from error
        # A store or a connection that vanishes early reads as a failure.
        try:
            self.farewell()
        except BaseException as broken:
            self._fail(broken)
            self._close()
            raise Failed from broken
        if dist.is_initialized():
            dist.destroy_process_group()
        self._close()

    def _close(self) -> None:
        for number, handler in self._previous_signal.items():
            signal.signal(number, handler)
        self._previous_signal.clear()
        root = logging.getLogger("distrain")
        for handler in self._handlers:
            root.removeHandler(handler)
            handler.close()
        if self._handlers:
            root.propagate = self._propagated
        self._handlers.clear()

    def _set_threads(self) -> None:
        threads = self.config.runtime.threads
        if threads is None:
            # torchrun sets OMP_NUM_THREADS=1 for every worker, which wastes most of a machine with more cores than
            # ranks, so the share is taken from the cores that this process may use.
            threads = max(1, available_cores() // self.world.local_size)
        torch.set_num_threads(threads)

    def _set_determinism(self) -> None:
        seed_everything(self.config.seed)
        if self.config.trainer.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        else:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = True
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    def _meet(self) -> Store:
        """The store that the launcher gave an address for, fresh for each restart of the job.

        A restarted job's default store still holds the addresses of dead ranks; a prefix by attempt leaves them behind.
        """
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "")
        if not port.isdigit():
            raise ConfigError("MASTER_PORT", port, f"WORLD_SIZE={self.world.size} needs the port at which ranks meet")
        agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        timeout = datetime.timedelta(seconds=self.config.runtime.setup_timeout_seconds)
        try:
            store = TCPStore(
                address,
                int(port),
                self.world.size,
                is_master=self.world.rank == 0 and not agent_serves,
                timeout=timeout,
                wait_for_workers=False,
            )
        except dist.DistError as error:
            raise RuntimeError(f"can't reach the store at {address}:{port}: {_first_line(error)}") from error
        # So do the earlier runs of this process (Hydra's --multirun).
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefixed = PrefixStore(f"distrain/{attempt}/{next(_MEETINGS)}", store)
        # The store of a launcher's agent outlives its attempts, which run the same runs (Hydra's --multirun).
        self.began = float(store.compare_set(f"distrain/began/{next(_BEGINNINGS)}", "", repr(self.began)))
        here = {"host": self.world.host, "pid": os.getpid()}
        prefixed.set(f"here/{self.world.rank}", json.dumps(here))
        missing = []
        deadline = time.monotonic() + timeout.total_seconds()
        for rank in range(self.world.size):
            left = max(deadline - time.monotonic(), 0.1)
            try:
                prefixed.wait([f"here/{rank}"], datetime.timedelta(seconds=left))
            except dist.DistError:
                missing.append(rank)
        if missing:
            raise RuntimeError(
                f"ranks {missing} did not come within runtime.setup_timeout_seconds={timeout.total_seconds():g}"
            )
        return prefixed

    def _compare_configurations(self, store: Store) -> None:
        mine = configuration.to_container(self.config)
        if self.world.rank == 0:
            store.set("config", json.dumps(mine))
        theirs = json.loads(store.get("config"))
        if configuration.fingerprint(mine) != configuration.fingerprint(theirs):
            found = configuration.difference(mine, theirs)
            store.set("config_differs", f"rank {self.world.rank} on {self.world.host} (≠ rank 0): {'; '.join(found)}")
        store.add("config_compared", 1)
        deadline = time.monotonic() + self.config.runtime.setup_timeout_seconds
        while int(store.add("config_compared", 0)) < self.world.size:
            if time.monotonic() > deadline:
                raise RuntimeError("not all ranks compared their configurations within runtime.setup_timeout_seconds")
            time.sleep(0.005)
        if store.check(["config_differs"]):
            raise configuration.missing(
                "configuration", f"differs between ranks: {store.get('config_differs').decode()}"
            )

    def _agree_on_run_dir(self) -> Path:
        if self._store is None:
            path = make_run_dir(self.config.run_dir)
        else:
            if self.world.rank == 0:
                # The others hear of a refusal too, or they would wait in vain.
                try:
                    answer = {"path": str(make_run_dir(self.config.run_dir))}
                except ConfigError as error:
                    answer = {"refused": str(error)}
                self._store.set("run_dir", json.dumps(answer))
            answer = json.loads(self._store.get("run_dir"))
            if "refused" in answer:
                raise configuration.refused(answer["refused"])
            path = Path(answer["path"])
        path.joinpath("logs").mkdir(parents=True, exist_ok=True)
        return path

    def _start_logging(self) -> None:
        root = logging.getLogger("distrain")
        root.setLevel(logging.INFO)
        self._propagated, root.propagate = root.propagate, False
        if self._keep_logs:
            to_file = logging.FileHandler(self.run_dir / "logs" / f"rank_{self.world.rank}.log")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            self._handlers.append(to_file)
        if self.world.rank == 0:
            to_terminal = _AboveTheBar()
            to_terminal.setFormatter(logging.Formatter("%(message)s"))
            self._handlers.append(to_terminal)
        for handler in self._handlers:
            root.addHandler(handler)

    def _form_group(self) -> None:
        global has_talked
        has_talked = True
        if self._store is None:
            self._store = HashStore()
        dist.init_process_group(
            self.backend,
            store=PrefixStore("group", self._store),
            rank=self.world.rank,
            world_size=self.world.size,
            timeout=datetime.timedelta(seconds=self.config.runtime.timeout_seconds),
            device_id=self.device if self.backend == "nccl" else None,
        )

    # --- what strategies and the trainer ask for ---------------------------------------------------------------------

    def communicator(self) -> Communicator:
        """All ranks; its bytes are counted for itself alone."""
        return Communicator(dist.group.WORLD if dist.is_initialized() else None)

    def mesh(self, shape: Mapping[str, int]) -> DeviceMesh | None:
        """The ranks as named dimensions, slowest first; ``None`` without a process group."""
        if not dist.is_initialized():
            return None
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))

    def twin_group(self, mesh: DeviceMesh, dimension: str) -> dist.ProcessGroup:
        """Another group of the ranks along a dimension, whose messages don't queue behind those of the mesh's own."""
        position = (mesh.mesh_dim_names or ()).index(dimension)
        rows = mesh.mesh.movedim(position, -1).reshape(-1, mesh.mesh.shape[position]).tolist()
        # Every rank makes every group, in the same order, as torch wants it.
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(row): dist.new_group(row) for row in rows}
        return next(group for row, group in groups.items() if self.world.rank in row)

    def aside(self) -> Communicator:
        """All ranks, over a group of its own for tensors on the CPU, whose messages pass those of training."""
        limit = datetime.timedelta(seconds=self.config.runtime.timeout_seconds)
        return Communicator(dist.new_group(backend="gloo", timeout=limit))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.world.rank == 0

    # --- failures ----------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # The launcher ends the others when one rank fails; that one's failure is being told already.
        if self._failing:
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGTERM and not self.stoppable:
            raise Terminated("ended by SIGTERM")
        # A launcher hands on what its whole group was sent, so the same request often comes twice.
        if self.stop_requested == name == "SIGTERM" and now - self._asked_at > _SAME_REQUEST_SECONDS:
            raise Terminated("ended by a second SIGTERM")
        if self.stop_requested != name:
            self.stop_requested, self._asked_at = name, now

    def end_if_another_failed(self) -> None:
        """After a signal: a launcher sends it to the others too when a rank fails, and then there is no agreeing.

        Raises:
            Terminated: So it is, as far as can be known at once.
        """
        ended = Terminated(f"ended by {self.stop_requested}")
        if self._store is None or self.world.size == 1:
            return
        if self._store.check(["failure"]) or self._vanished(ended):
            raise ended

    def _fail(self, error: BaseException) -> None:
        self._failing = True
        own = Failure(
            self.world.rank,
            self.world.host,
            self.step,
            _first_line(error)
            if isinstance(error, Terminated)
            else f"{type(error).__name__}: {_first_line(error)}".removesuffix(": "),
            "".join(traceback.format_exception(error)),
        )
        if self.expendable and not isinstance(error, PeerLost):
            log.error("%s\n%s", own.error, own.traceback)
            _say(f"distrain: {own.line()}" + ("" if isinstance(error, Terminated) else "; the others go on"))
            return
        failure = self._first_failure(own, error)
        if failure.rank == own.rank:
            log.error("%s\n%s", failure.error, failure.traceback)
            _say(f"distrain: {failure.line()}")
        else:
            log.error("stopped because %s\n%s", failure.line(), own.traceback)
            _say(f"distrain: rank {own.rank} stopped because {failure.line()}")

    def _first_failure(self, own: Failure, error: BaseException) -> Failure:
        """Who failed first: the first to claim it in the store writes ``failure.json``, the others read the claim."""
        if self._store is None or self.world.size == 1:
            self._write_failure(own)
            return own
        if isinstance(error, PeerLost):
            own = Failure(error.rank, error.host, self.step, error.reason)
        try:
            # A collective that breaks off is most often a peer's failure: give that peer the time to say so.
            if isinstance(error, dist.DistError | Terminated | PeerLost) or _broken_connection(error):
                deadline = time.monotonic() + 2
                while time.monotonic() < deadline and not self._store.check(["failure"]):
                    time.sleep(0.05)
                own = self._vanished(error) or own
            claim = json.dumps(asdict(own))
            winner: str = self._store.compare_set("failure", "", claim).decode()
        except RuntimeError:
            # The store went with its host; what this rank knows is all there is.
            winner = claim = json.dumps(asdict(own))
        if winner == claim:
            self._write_failure(own)
        return Failure(**json.loads(winner))

    def _vanished(self, error: BaseException) -> Failure | None:
        """A rank of this host whose process is gone, if nobody has claimed the failure."""
        assert self._store is not None
        if self._store.check(["failure"]):
            return None
        for rank in range(self.world.size):
            there = json.loads(self._store.get(f"here/{rank}"))
            # Where a launcher ends the others, the one that they did without is the reason after all.
            passed_over = rank in self.lost and not isinstance(error, Terminated)
            here = there["host"] == self.world.host and rank != self.world.rank
            if here and not passed_over and not _alive(there["pid"]):
                return Failure(rank, there["host"], self.step, "the process is gone without a word (killed?)")
        return None

    def _write_failure(self, failure: Failure) -> None:
        if self._keep_logs and self.run_dir != Path():
            write_json(self.run_dir / "failure.json", asdict(failure))


class _AboveTheBar(logging.Handler):
    """Prints log lines without tearing a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def choose_device(config: Config, world: World) -> torch.device:
    """The device the configuration asks for.

    Raises:
        ConfigError: There is no such device, or fewer of them than ranks on this host.
    """
    wanted = config.runtime.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device", wanted, "torch sees no GPU here", ["auto", "cpu"])
    if world.local_size > torch.cuda.device_count():
        raise ConfigError(
            "runtime.device",
            wanted,
            f"{world.local_size} ranks on this host share {torch.cuda.device_count()} GPUs; start fewer, or use cpu",
        )
    return torch.device("cuda", world.local_rank)


def choose_backend(config: Config, device: torch.device) -> str:
    """The process group backend for a device.

    Raises:
        ConfigError: The backend doesn't serve the device.
    """
    wanted = config.runtime.backend
    if wanted == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if wanted == "nccl" and device.type != "cuda":
        raise ConfigError("runtime.backend", wanted, "needs runtime.device=cuda", ["auto", "gloo"])
    return wanted


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code may draw from the global generator
    torch.manual_seed(seed)


def make_run_dir(wanted: str | None) -> Path:
    """Makes the run folder with ``logs`` in it: the one wanted, or a new ``outputs/<date>/<time>`` nobody else got.

    Raises:
        ConfigError: The folder can't be made.
    """
    now = datetime.datetime.now()
    base = Path(wanted) if wanted else Path("outputs", f"{now:%Y-%m-%d}", f"{now:%H-%M-%S}")
    try:
        if wanted:
            base.joinpath("logs").mkdir(parents=True, exist_ok=True)
            return base.resolve()
        base.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            path = base if attempt == 0 else base.with_name(f"{base.name}_{attempt}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                path.joinpath("logs").mkdir()
                return path.resolve()
    except OSError as error:
        raise ConfigError("run_dir", base, f"can't be made: {error.strerror}") from error
    raise ConfigError("run_dir", base, "a thousand runs have this name already")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes plain data as JSON that people can read too; a number that is not finite, which JSON lacks, is null."""
    path.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Writes plain data as YAML, keys in their order."""
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def _broken_connection(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection", "socket"))


def _alive(pid: int) -> bool:
    stat = Path("/proc", str(pid), "stat")
    if not Path("/proc/self").exists():
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            return True
        return False
    # A killed child stays as a zombie (state Z) until its launcher has read its exit code.
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
