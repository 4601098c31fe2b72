"""The lifetime of a rank: it meets the others, forms the process group, and reports how the run ended."""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from distrain.communication.collectives import Communicator
from distrain.communication.shared_memory.connect import channel_registry
from distrain.config.schema import Config
from distrain.errors import (
    LAUNCHER_ENDED,
    ConfigError,
    Failed,
    PeerLost,
    Stopped,
    TakenOver,
    Terminated,
    first_line,
    termination_behind,
)
from distrain.files.escaping import format_error
from distrain.files.terminal import FILE_ONLY, print_to_stderr
from distrain.health.activity import RankActivity
from distrain.health.crash_dump import CrashDump
from distrain.health.failure_report import Failure, FailureReporter
from distrain.health.judge import Limits
from distrain.health.members import WatchIdentity, register
from distrain.health.process import boot_id
from distrain.health.watch import Watch
from distrain.runtime import bind_address, launcher, rendezvous, resuming
from distrain.runtime.config_comparison import require_same_configuration
from distrain.runtime.device import choose_backend, choose_device, choose_threads, seed_everything
from distrain.runtime.malloc import retain_freed_memory
from distrain.runtime.rank_logging import RankLogging
from distrain.runtime.run_dir import agree_on_run_dir
from distrain.runtime.run_owner import RunOwner
from distrain.runtime.signals import SignalHandler
from distrain.runtime.status_file import StatusFile
from distrain.runtime.torch_version import warn_if_untested
from distrain.runtime.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

#: A week, which is added to a collective's time limit. The watch, which knows which rank is late, ends a run much
#: earlier. But torch counts the time in which the whole job is suspended, and the job must then go on.
_LONGEST_SUSPENSION = 7 * 24 * 3600.0

#: Whether this process was ever part of a process group; torch's threads then make its end delicate.
joined_group = False

#: Numbers the runs of this process; the same in every attempt of a restarted job.
_RUN_NUMBERS = itertools.count()


class Runtime:
    """A context in which the ranks of one run can communicate.

    On entry, threads, device and seeds are set, the ranks meet, compare their configurations, agree on one run folder
    and form the process group. On exit after an error every rank reports which rank failed and where, the first one
    that detects it writes ``failure.json``, and :class:`~distrain.errors.Failed` is raised.

    Args:
        config: The checked configuration.
        world: This rank's place.
        keep_logs: Whether to make the run folder and write ``logs/`` in it. Commands that only read a run do neither;
            ``run_dir`` is then the configuration's.

    Attributes:
        config: As given.
        world: As given.
        device: Where this rank computes.
        backend: Backend of the process group: ``gloo`` or ``nccl``.
        run_dir: The folder that all ranks share; made by rank 0.
        owner: This start as the owner of that folder; ``None`` during set-up and without ``keep_logs``.
        status: Writes ``status.json`` of that folder; on rank 0, where there is an ``owner``.
        activity: What this rank is doing; updated by the code that does it.
        stoppable: Set by code that checks ``stop_requested`` at regular intervals.
        stop_requested: Name of the signal that asked this rank to save and stop; see :mod:`distrain.runtime.signals`.
        final_barrier: Called on every rank at the end of a run that succeeded, so that no rank leaves while another
            still communicates.
        lost_ranks: Ranks that ended while the others continued; a later failure of the run is not attributed to them.
        start_time: When the run began, by this host's monotonic clock in seconds; after a restart of the job, when its
            first attempt on this host began.
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
        self.owner: RunOwner | None = None
        self.status: StatusFile | None = None
        self.backend = choose_backend(config, self.device)
        self._store: Store | None = None
        self._logging = RankLogging()
        self._crash_dump: CrashDump | None = None
        self._signals = SignalHandler(self, (Runtime.__exit__.__code__, Runtime._fail.__code__))
        self._reporter = FailureReporter(world.rank, self.activity.place_of)
        self._watch: Watch | None = None
        self.final_barrier: Callable[[], None] = lambda: self.communicator().barrier()
        self.lost_ranks: set[int] = set()
        self.start_time = time.monotonic()
        # Now, since the launcher may have ended when it is needed.
        self._launcher_command = resuming.command_of(os.getppid()) if launcher.is_torchrun() else []

    # --- set-up and tear-down ----------------------------------------------------------------------------------------

    def __enter__(self) -> Runtime:
        self._logging.start(self.world.rank)
        try:
            self._signals.install()
            if self.is_main:
                warn_if_untested()
            self._set_threads()
            channel_registry.enabled = self.config.runtime.shared_memory == "auto"
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            chooses_run_dir = self._keep_logs and self.config.run_dir is None
            launcher_store = None
            if self.world.size > 1 or (chooses_run_dir and launcher.serves_store()):
                launcher_store = self._connect(serves=self.world.rank == 0 and not launcher.serves_store())
            if launcher_store is not None and self.world.size > 1:
                self._store = self._meet(launcher_store)
                require_same_configuration(self.config, self.world, self._store)
            if self._keep_logs:
                self.run_dir = agree_on_run_dir(self.config.run_dir, self.world.rank, self._store, launcher_store)
            else:
                self.run_dir = Path(self.config.run_dir or ".")
            if self._keep_logs:
                self._start_files()
            if chooses_run_dir and "TORCHELASTIC_RUN_ID" in os.environ and not launcher.serves_store():
                log.warning(
                    "torchrun keeps no store that outlives its workers, so a restart begins again in a new folder; "
                    "set run_dir=… to let a restart continue the run"
                )
            if self.world.size > 1 or self.backend == "nccl":
                self._form_group()
            self._set_determinism()
            if self._keep_logs:
                self.owner = self._take_run_dir()
                if self.is_main:
                    self.status = self._start_status(self.owner)
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
        # Everything is saved. The launcher may send SIGTERM to this rank because another one has exited already.
        self._signals.ignored = True
        # A store or a connection that closes early looks like a failure to the ranks that still use it.
        try:
            self.final_barrier()
        except BaseException as broken:
            self._fail(broken)
            self._close()
            raise Failed from broken
        if self.owner is not None and self.is_main:
            self.owner.release()
        # Shared memory is found through its process group, so it is released before the groups.
        channel_registry.close_all()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._close()

    def _close(self) -> None:
        """Releases everything. An error in that is logged; it must neither hide how the run ended nor stop the rest."""
        crash_dump, watch, status = self._crash_dump, self._watch, self.status
        steps: list[Callable[[], None]] = [channel_registry.close_all, self._signals.restore]
        if watch is not None:
            steps.insert(0, watch.close)
        if status is not None:
            steps.insert(0, status.close)
        if crash_dump is not None:
            steps.append(lambda: crash_dump.close(keep_file=self._reporter.is_taken()))
        for step in steps:
            try:
                step()
            except Exception as error:
                # Not on the terminal, whose last line says how the run ended.
                problem = f"{type(error).__name__}: {first_line(error)}"
                log.warning("an error while the run ends: %s", problem, extra=FILE_ONLY)
        self._logging.stop()

    def _set_threads(self) -> None:
        torch.set_num_threads(choose_threads(self.config.runtime.threads, self.world))
        if self.device.type == "cpu":
            retain_freed_memory()

    def _set_determinism(self) -> None:
        seed_everything(self.config.seed)
        if self.config.trainer.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        else:
            # Only if necessary: the call imports torch's compiler, which takes half a second.
            if torch.are_deterministic_algorithms_enabled():
                torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = True
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    def _connect(self, *, serves: bool) -> Store:
        """Connects to the store that the launcher gave an address for."""
        address, port = launcher.store_address(self.world.size)
        timeout = datetime.timedelta(seconds=self.config.runtime.setup_timeout_seconds)
        try:
            return bind_address.open_store(address, port, self.world, serves=serves, timeout=timeout)
        except (RuntimeError, TimeoutError) as error:  # DistError is a RuntimeError, which older releases raise itself
            hint = "" if serves else " (is this port another program's?)"
            raise RuntimeError(f"can't reach the store at {address}:{port}: {first_line(error)}{hint}") from error

    def _meet(self, launcher_store: Store) -> Store:
        """Waits for all ranks and starts the watch; returns the part of the store that belongs to this attempt."""
        rank, size, host, limits = self.world.rank, self.world.size, self.world.host, self.config.runtime
        prefix = rendezvous.gather_ranks(
            launcher_store, rank, size, limits.setup_timeout_seconds, lambda store: register(store, rank, host)
        )
        address = "{}:{}".format(*launcher.store_address(size))
        watch_store = self._connect(serves=False)
        # The watch itself notices a store that doesn't answer.
        watch_store.set_timeout(datetime.timedelta(seconds=_LONGEST_SUSPENSION))
        self._watch = Watch(
            WatchIdentity(rank, size, host, address, not launcher.serves_store()),
            PrefixStore(prefix, watch_store),
            Limits(
                min(limits.heartbeat_timeout_seconds, limits.timeout_seconds),
                limits.timeout_seconds,
                limits.setup_timeout_seconds,
            ),
            self.activity,
            self._reporter,
            self._signals.report_launcher_end,
            self._flush_logs,
        )
        # A launcher's store outlives the attempts of a job, so the first attempt's time is found there. Each host has a
        # clock of its own, which starts when the host does.
        key = f"distrain/start_time/{next(_RUN_NUMBERS)}/{boot_id()}"
        self.start_time = float(launcher_store.compare_set(key, "", repr(self.start_time)))
        return PrefixStore(prefix, launcher_store)

    def _start_files(self) -> None:
        """Starts the log file, the file for the stacks of a crash, and the failure report."""
        rank = self.world.rank
        self._reporter.run_dir = self.run_dir
        self._reporter.is_taken = lambda: self.owner is not None and self.owner.is_taken
        self._logging.add_file(self.run_dir, rank, lambda: self.owner)
        self._crash_dump = CrashDump(self.run_dir, rank)
        self._signals.dump_stacks_to(self.run_dir / "logs" / f"rank_{rank}.log")

    def _take_run_dir(self) -> RunOwner:
        """Makes this start of the run the owner of its folder; all ranks call it together."""
        if self._store is None or self.world.size == 1:
            return RunOwner.take(self.run_dir)
        if self.is_main:
            owner = RunOwner.take(self.run_dir)
            self._store.set("run_owner", owner.to_json())
            return owner
        return RunOwner.from_json(self._store.get("run_owner"))

    def _start_status(self, owner: RunOwner) -> StatusFile:
        """Starts to tell in the run's folder where each rank is."""
        limits = self.config.runtime
        return StatusFile(
            owner,
            self.world.host,
            self.activity,
            None if self._watch is None else self._watch.ranks,
            (limits.timeout_seconds, limits.setup_timeout_seconds),
        )

    def _flush_logs(self) -> None:
        """Called before the watch ends this process."""
        self._logging.flush()
        if self._crash_dump is not None:
            self._crash_dump.close(keep_file=self._reporter.is_taken())

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

    # --- for strategies and the trainer ------------------------------------------------------------------------------

    def communicator(self) -> Communicator:
        """A communicator of all ranks, with a byte count of its own."""
        return Communicator(dist.group.WORLD if dist.is_initialized() else None)

    def mesh(self, shape: Mapping[str, int]) -> DeviceMesh | None:
        """Arranges the ranks in named dimensions, slowest first; returns ``None`` without a process group."""
        if not dist.is_initialized():
            return None
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))

    def duplicate_group(self, mesh: DeviceMesh, dimension: str) -> dist.ProcessGroup:
        """Makes a second group of this rank's peers along a dimension; its messages don't queue behind the first's."""
        axis = (mesh.mesh_dim_names or ()).index(dimension)
        rows = mesh.mesh.movedim(axis, -1).reshape(-1, mesh.mesh.shape[axis]).tolist()
        # torch requires that every rank makes every group, in the same order.
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(row): dist.new_group(row) for row in rows}
        return next(group for row, group in groups.items() if self.world.rank in row)

    def control_group(self) -> Communicator:
        """Makes a communicator of all ranks for tensors on the CPU; its messages overtake those of training."""
        timeout = datetime.timedelta(seconds=self.collective_timeout_seconds)
        return Communicator(dist.new_group(backend="gloo", timeout=timeout))

    @property
    def collective_timeout_seconds(self) -> float:
        """Time limit of a collective, longer than the watch's, so that the watch can name the late rank first."""
        limits = self.config.runtime
        return max(limits.timeout_seconds, limits.setup_timeout_seconds) + _LONGEST_SUSPENSION

    @property
    def step(self) -> int:
        """Optimizer updates done."""
        return self.activity.step

    @step.setter
    def step(self, step: int) -> None:
        self.activity.step = step

    @property
    def expendable(self) -> bool:
        """Whether the other ranks continue if this one fails. Setting it returns when they can know of it."""
        return self.activity.expendable

    @expendable.setter
    def expendable(self, expendable: bool) -> None:
        changed = expendable != self.activity.expendable
        self.activity.expendable = expendable
        if changed:
            self.publish_activity()

    def publish_activity(self) -> None:
        """Publishes this rank's activity to all ranks at once, instead of with the next regular heartbeat."""
        if self._watch is not None:
            self._watch.publish_now()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files that exist once per run."""
        return self.world.rank == 0

    def how_to_resume(self) -> str:
        """What a user must type so that this run goes on, for a message."""
        own, arguments = resuming.own_command()
        return resuming.how_to_resume(self.run_dir, own, self._launcher_command, arguments, os.environ)

    # --- failures ----------------------------------------------------------------------------------------------------

    def raise_if_another_rank_failed(self) -> None:
        """To be called after a signal: launchers also send one to all other ranks when a rank has failed.

        In that case the ranks cannot agree on a step at which to stop.

        Raises:
            Terminated: A rank has reported a failure, or has ended without reporting one.
        """
        if self._watch is None:
            return
        try:
            known = self._watch.knows_of_failure(None if self.stop_requested == LAUNCHER_ENDED else self._store)
        except RuntimeError:
            # The store has ended, perhaps with the launcher. If it was rank 0's, the watch reports it.
            known = self._watch.knows_of_failure(None)
        if known:
            raise Terminated(self.stop_requested or "SIGTERM")

    def _fail(self, error: BaseException) -> None:
        """Reports the failure that ended this rank: its own, or that of another rank which caused it."""
        self._signals.ignored = True
        error = termination_behind(error) or error
        message, says_all = first_line(error), isinstance(error, Terminated | TakenOver)
        own = Failure(
            self.world.rank,
            self.world.host,
            self.step,
            message if says_all else f"{type(error).__name__}: {message}".removesuffix(": "),
            traceback=format_error(error),
        )
        # What a disk, a refusal or a signal says in its line needs no stack; the log and the report have it.
        on_terminal = not isinstance(error, OSError | ConfigError | TakenOver | Terminated)
        if self.expendable and not isinstance(error, PeerLost):
            log.error("%s\n%s", own.error, format_error(error))
            continues = "" if isinstance(error, Terminated) else "; the other ranks continue"
            print_to_stderr(f"distrain: {own.summary()}{continues}")
            return
        if self._watch is None or self._store is None:
            self._reporter.report(own, own.traceback, None, self._add_own_samples, stack_on_terminal=on_terminal)
            return
        self._watch.keep_stack_of(error)
        if isinstance(error, Terminated) and error.request in ("SIGINT", LAUNCHER_ENDED):
            # No launcher sends SIGINT because a rank has failed, so there is no cause to look for.
            store = None if error.request == LAUNCHER_ENDED else self._store
            add_details = self._watch.add_details
            self._reporter.report(own, own.traceback, store, add_details, stack_on_terminal=False)
            return
        reachable_store: Store | None = self._store
        try:
            # If a launcher ends the run, the reason may be a rank that the others could continue without.
            ignored_ranks = set() if isinstance(error, Terminated) else self.lost_ranks
            failure = self._watch.find_cause(error, self._store, ignored_ranks) or own
        except RuntimeError as problem:
            failure, reachable_store = self._watch.describe_store_failure(first_line(problem)), None
        # Where this rank was says nothing about another's failure, or about a store that is gone.
        on_terminal = on_terminal and failure is own
        add_details = self._watch.add_details
        self._reporter.report(failure, own.traceback, reachable_store, add_details, stack_on_terminal=on_terminal)

    def _add_own_samples(self, failure: Failure, _: Store | None) -> None:
        failure.samples = self.activity.samples()
