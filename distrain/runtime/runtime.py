"""The life of a rank: where it is, its device and process group, the shared run folder, its log, and its failures."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from tqdm import tqdm

from distrain.communication.collectives import Communicator
from distrain.communication.shared_memory.connect import channel_registry
from distrain.config.load import difference, fingerprint, to_container
from distrain.config.schema import Config
from distrain.errors import ConfigError, Failed, PeerLost, Stopped, Terminated, missing, refused
from distrain.health.activity import RankActivity
from distrain.health.crash_dump import CrashDump, crash_dump_path
from distrain.health.failure_report import Failure, FailureReporter, archive_previous_report, first_line, say
from distrain.health.judge import Limits
from distrain.health.members import join
from distrain.health.watch import Watch, WatchIdentity
from distrain.runtime import bind_address, rendezvous
from distrain.runtime.device import available_cores, choose_backend, choose_device, seed_everything
from distrain.runtime.malloc import retain_freed_memory
from distrain.runtime.signals import SignalHandler
from distrain.runtime.world import LONGEST_NUMBER, World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

#: How much longer a collective may take than a step, so that the watch, which knows who is late, speaks first.
_GRACE_SECONDS = 10.0

#: Whether this process was ever part of a process group; what is left of one makes ending delicate.
joined_group = False

#: Numbers the runs of this process that chose a folder by themselves; all attempts count alike.
_RUNS = itertools.count()
#: Numbers all runs of this process, likewise.
_BEGINNINGS = itertools.count()


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
        activity: Where this rank is in its work; kept up to date by whoever does it.
        stoppable: Whoever works looks at ``stop_requested`` from time to time.
        stop_requested: The signal that asked this rank to save and stop (:mod:`distrain.runtime.signals`).
        final_barrier: Called by every rank at the end of a run that succeeded: nobody leaves while another still talks.
        lost_ranks: Ranks that are gone and that the others did without; what ends the run later is not their failure.
        start_time: When the run began, in seconds since the epoch; of the first attempt after restarts.
    """

    def __init__(self, config: Config, world: World, *, keep_logs: bool = True) -> None:
        self.config = config
        self._keep_logs = keep_logs
        self.world = world
        self.device = choose_device(config, world)
        self.activity = RankActivity()
        self.stoppable = False
        self.stop_requested: str | None = None
        self.run_dir = Path()
        self.backend = choose_backend(config, self.device)
        self._store: Store | None = None
        self._handlers: list[logging.Handler] = []
        self._fault_file: CrashDump | None = None
        self._signals = SignalHandler(self)
        self._reporter = FailureReporter(world.rank)
        self._watch: Watch | None = None
        self.final_barrier: Callable[[], None] = lambda: self.communicator().barrier()
        self.lost_ranks: set[int] = set()
        self.start_time = time.time()

    # --- set-up and tear-down ----------------------------------------------------------------------------------------

    def __enter__(self) -> Runtime:
        try:
            self._set_threads()
            channel_registry.enabled = self.config.runtime.shared_memory == "auto"
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            chooses = self._keep_logs and self.config.run_dir is None
            launcher = None
            if self.world.size > 1 or (chooses and _launcher_serves()):
                launcher = self._connect(serves=self.world.rank == 0 and not _launcher_serves())
            if launcher is not None and self.world.size > 1:
                self._store = self._meet(launcher)
                self._compare_configurations(self._store)
            self.run_dir = self._agree_on_run_dir(launcher) if self._keep_logs else Path(self.config.run_dir or ".")
            self._start_logging()
            if chooses and "TORCHELASTIC_RUN_ID" in os.environ and not _launcher_serves():
                log.warning(
                    "torchrun keeps no store that outlives its workers, so a restart begins anew in another folder; "
                    "give run_dir=… for it to go on"
                )
            if self.world.size > 1 or self.backend == "nccl":
                self._form_group()
            self._set_determinism()
            self._signals.install()
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
            self.final_barrier()
        except BaseException as broken:
            self._fail(broken)
            self._close()
            raise Failed from broken
        # Before the groups go: of one that nobody holds any more it would not be known that it had memory.
        channel_registry.close_all()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._close()

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        channel_registry.close_all()
        self._signals.restore()
        if self._fault_file is not None:
            self._fault_file.close()
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
        if self.device.type == "cpu":
            retain_freed_memory()

    def _set_determinism(self) -> None:
        seed_everything(self.config.seed)
        if self.config.trainer.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        else:
            # Half a second, since torch imports its compiler to tell it; so not where there is nothing to change.
            if torch.are_deterministic_algorithms_enabled():
                torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = True
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    def _connect(self, *, serves: bool) -> Store:
        """A connection to the store that the launcher gave an address for."""
        address, port = _launcher_address(self.world.size)
        timeout = datetime.timedelta(seconds=self.config.runtime.setup_timeout_seconds)
        try:
            return bind_address.open_store(address, port, self.world, serves=serves, timeout=timeout)
        except dist.DistError as error:
            raise RuntimeError(f"can't reach the store at {address}:{port}: {first_line(error)}") from error

    def _meet(self, launcher: Store) -> Store:
        """The part of the store that is for this start of the job, once all are there, and watched from then on."""
        rank, size, host, limits = self.world.rank, self.world.size, self.world.host, self.config.runtime
        prefix = rendezvous.meet(
            launcher, rank, size, limits.setup_timeout_seconds, lambda mine: join(mine, rank, host)
        )
        address = "{}:{}".format(*_launcher_address(size))
        self._watch = Watch(
            WatchIdentity(rank, size, host, address, not _launcher_serves()),
            PrefixStore(prefix, self._connect(serves=False)),
            Limits(
                min(limits.heartbeat_timeout_seconds, limits.timeout_seconds),
                limits.timeout_seconds,
                limits.setup_timeout_seconds,
            ),
            self.activity,
            self._reporter,
            self._flush,
        )
        # A launcher's store outlives its attempts.
        began = launcher.compare_set(f"distrain/began/{next(_BEGINNINGS)}", "", repr(self.start_time))
        self.start_time = float(began)
        return PrefixStore(prefix, launcher)

    def _compare_configurations(self, store: Store) -> None:
        mine = to_container(self.config)
        if self.world.rank == 0:
            store.set("config", json.dumps(mine))
        theirs = json.loads(store.get("config"))
        if fingerprint(mine) != fingerprint(theirs):
            found = difference(mine, theirs)
            store.set("config_differs", f"rank {self.world.rank} on {self.world.host} (≠ rank 0): {'; '.join(found)}")
        store.add("config_compared", 1)
        deadline = time.monotonic() + self.config.runtime.setup_timeout_seconds
        while int(store.add("config_compared", 0)) < self.world.size:
            if time.monotonic() > deadline:
                raise RuntimeError("not all ranks compared their configurations within runtime.setup_timeout_seconds")
            time.sleep(0.005)
        if store.check(["config_differs"]):
            raise missing("configuration", f"differs between ranks: {store.get('config_differs').decode()}")

    def _agree_on_run_dir(self, launcher: Store | None) -> Path:
        if self._store is None:
            path = self._choose_run_dir(launcher)
        else:
            if self.world.rank == 0:
                # The others hear of a refusal too, or they would wait in vain.
                try:
                    answer = {"path": str(self._choose_run_dir(launcher))}
                except ConfigError as error:
                    answer = {"refused": str(error)}
                self._store.set("run_dir", json.dumps(answer))
            answer = json.loads(self._store.get("run_dir"))
            if "refused" in answer:
                raise refused(answer["refused"])
            path = Path(answer["path"])
        path.joinpath("logs").mkdir(parents=True, exist_ok=True)
        return path

    def _choose_run_dir(self, launcher: Store | None) -> Path:
        """The folder wanted, or else the one that this job's first attempt made, if the launcher's store knows it."""
        if self.config.run_dir is not None or launcher is None or not _launcher_serves():
            return make_run_dir(self.config.run_dir)
        # Several runs of one process (Hydra's --multirun) have each its own; a restart begins with the first.
        key = f"distrain/run_dir/{next(_RUNS)}"
        if launcher.check([key]):
            return make_run_dir(launcher.get(key).decode())
        path = make_run_dir(None)
        launcher.set(key, str(path))
        return path

    def _start_logging(self) -> None:
        root = logging.getLogger("distrain")
        root.setLevel(logging.INFO)
        self._propagated, root.propagate = root.propagate, False
        if self._keep_logs:
            self._reporter.folder = self.run_dir
            self._fault_file = CrashDump(crash_dump_path(self.run_dir, self.world.rank))
            to_file = logging.FileHandler(self.run_dir / "logs" / f"rank_{self.world.rank}.log")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            self._handlers.append(to_file)
        if self.world.rank == 0:
            to_terminal = _AboveTheBar()
            to_terminal.setFormatter(logging.Formatter("%(message)s"))
            self._handlers.append(to_terminal)
        for handler in self._handlers:
            root.addHandler(handler)

    def _flush(self) -> None:
        """Before the watch ends this process."""
        for handler in self._handlers:
            handler.flush()
        if self._fault_file is not None:
            self._fault_file.close()

    def _form_group(self) -> None:
        global joined_group
        joined_group = True
        bind_address.restrict_gloo_to_loopback(self.world)
        if self._store is None:
            self._store = HashStore()
        dist.init_process_group(
            self.backend,
            store=PrefixStore("group", self._store),
            rank=self.world.rank,
            world_size=self.world.size,
            timeout=datetime.timedelta(seconds=self.collective_timeout_seconds),
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

    def duplicate_group(self, mesh: DeviceMesh, dimension: str) -> dist.ProcessGroup:
        """Another group of the ranks along a dimension, whose messages don't queue behind those of the mesh's own."""
        position = (mesh.mesh_dim_names or ()).index(dimension)
        rows = mesh.mesh.movedim(position, -1).reshape(-1, mesh.mesh.shape[position]).tolist()
        # Every rank makes every group, in the same order, as torch wants it.
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(row): dist.new_group(row) for row in rows}
        return next(group for row, group in groups.items() if self.world.rank in row)

    def control_group(self) -> Communicator:
        """All ranks, over a group of its own for tensors on the CPU, whose messages pass those of training."""
        limit = datetime.timedelta(seconds=self.collective_timeout_seconds)
        return Communicator(dist.new_group(backend="gloo", timeout=limit))

    @property
    def collective_timeout_seconds(self) -> float:
        """How long a collective may take; the watch over progress, which knows who is late, is to speak first."""
        limits = self.config.runtime
        return max(limits.timeout_seconds, limits.setup_timeout_seconds) + _GRACE_SECONDS

    @property
    def step(self) -> int:
        """Updates done."""
        return self.activity.step

    @step.setter
    def step(self, step: int) -> None:
        self.activity.step = step

    @property
    def expendable(self) -> bool:
        """Whether the others go on if this rank fails; they know it when it is set."""
        return self.activity.expendable

    @expendable.setter
    def expendable(self, expendable: bool) -> None:
        changed = expendable != self.activity.expendable
        self.activity.expendable = expendable
        if changed:
            self.publish_activity()

    def publish_activity(self) -> None:
        """Lets all ranks know this one's position now, where that must not come a second late."""
        if self._watch is not None:
            self._watch.announce()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.world.rank == 0

    # --- failures ----------------------------------------------------------------------------------------------------

    def raise_if_another_rank_failed(self) -> None:
        """After a signal: a launcher sends it to the others too when a rank fails, and then there is no agreeing.

        Raises:
            Terminated: So it is, as far as can be known at once.
        """
        if self._watch is not None and self._store is not None and self._watch.knows_of_failure(self._store):
            raise Terminated(f"ended by {self.stop_requested}")

    def _fail(self, error: BaseException) -> None:
        self._signals.deaf = True
        text = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
        own = Failure(
            self.world.rank,
            self.world.host,
            self.step,
            first_line(error) if isinstance(error, Terminated) else text,
            traceback="".join(traceback.format_exception(error)),
        )
        if self.expendable and not isinstance(error, PeerLost):
            log.error("%s\n%s", own.error, own.traceback)
            say(f"distrain: {own.line()}" + ("" if isinstance(error, Terminated) else "; the others go on"))
            return
        if self._watch is None:
            self._reporter.tell(own, own.traceback, None, self._complete_alone)
            return
        store = self._store
        assert store is not None
        self._watch.freeze(error)
        reached: Store | None = store
        try:
            # A launcher that ends the run may do so because of a rank that the others did without.
            passed_over = set() if isinstance(error, Terminated) else self.lost_ranks
            failure = self._watch.culprit(error, store, passed_over) or own
        except RuntimeError as gone:
            failure, reached = self._watch.loss_of_store(first_line(gone)), None
        self._reporter.tell(failure, own.traceback, reached, self._watch.complete)

    def _complete_alone(self, failure: Failure, _: Store | None) -> None:
        failure.samples = self.activity.samples()


class _AboveTheBar(logging.Handler):
    """Prints log lines without tearing a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _launcher_address(world_size: int) -> tuple[str, int]:
    """Where the ranks meet.

    Raises:
        ConfigError: The launcher doesn't say.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "")
    if not port.isdecimal() or len(port) > LONGEST_NUMBER or not 0 < int(port) < 1 << 16:
        raise ConfigError("MASTER_PORT", port, f"WORLD_SIZE={world_size} needs the port at which ranks meet")
    return address, int(port)


def _launcher_serves() -> bool:
    """Whether the launcher has a store, which then outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


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
            archive_previous_report(base)
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
