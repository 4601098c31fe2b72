"""Starts a command's ranks on this host by torch's elastic agent, and ends as they end.

The agent is torchrun's: it lets hosts meet, sets the variables of each rank, and restarts ranks. What differs:

- The end. Of all that the ranks and the agent know of a failure, one line is printed, and the exit code is the ranks':
  0, 1, 2, 75, or 128 + n if signal n killed one.
- Signals. torch's agent gives ranks 30 s to end after one; here they may save as long as it takes. SIGUSR1 reaches the
  ranks too.
- Restarts. Ranks that refused their configuration (2) or stopped on request (75) are not started again.
- Hosts. On one host nobody needs to be met: the store for the ranks listens on the loopback interface only, and no
  pickle is read, as the c10d rendezvous does.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, cast

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from typing_extensions import override

from distrain.errors import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, first_line
from distrain.files.terminal import print_to_stderr
from distrain.health.last_line import LAUNCHER
from distrain.health.process import Process
from distrain.runtime.bind_address import serve_store
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.tools.launching.outcome import STOPPING, Outcome, outcome_of, signals

#: Seconds that hosts wait for each other at the beginning.
_MEETING_SECONDS = 900
#: A second Ctrl-C within this time comes from the same key stroke; other signals may be sent by several programs.
_SAME_INTERRUPT_SECONDS, _SAME_REQUEST_SECONDS = 0.3, 5.0
_LOOPBACK = "127.0.0.1"


#: What reaches the ranks.
_FORWARDED = (*STOPPING, *signals("SIGUSR1"))


def run_ranks(settings: LaunchSettings, entrypoint: str | Callable[..., Any], arguments: Sequence[Any]) -> Outcome:
    """Starts the ranks of this host and waits for their end.

    In the main thread, signals are forwarded to the ranks meanwhile.

    Args:
        settings: How many ranks, and where hosts meet.
        entrypoint: A program, or a function that processes started by ``spawn`` can import.
        arguments: Its arguments.

    Returns:
        How they ended. ``line`` is printed already.
    """
    least, most = settings.nodes
    with tempfile.TemporaryDirectory(prefix="distrain_") as folder, _variables_set(least != most), _quiet_agent():
        return _Launch(settings, entrypoint, arguments, folder).run()


class _Launch:
    """The agent in a thread, and signals in the main thread."""

    def __init__(
        self, settings: LaunchSettings, entrypoint: str | Callable[..., Any], arguments: Sequence[Any], folder: str
    ) -> None:
        self._settings = settings
        self._spec: dict[str, Any] = {
            "role": "default",
            "local_world_size": settings.ranks_per_host(),
            "entrypoint": entrypoint,
            # The agent puts the local rank for ${local_rank}, and one $ for two.
            "args": tuple(word.replace("$", "$$") if isinstance(word, str) else word for word in arguments),
            "max_restarts": settings.max_restarts,
            "monitor_interval": 0.1,
            "local_addr": settings.local_addr,
        }
        self._folder = folder
        self._agent: _Agent | None = None
        self._ended = threading.Event()
        self._outcome = Outcome(EXIT_FAILED)
        self._request: signal.Signals | None = None
        self._requested_at = 0.0

    def run(self) -> Outcome:
        thread = threading.Thread(target=self._run_agent, name="distrain-agent", daemon=True)
        with self._signals_forwarded():
            thread.start()
            # Python handles signals while it waits here.
            self._ended.wait()
        if self._outcome.line:
            print_to_stderr(self._outcome.line)
        return self._outcome

    def _run_agent(self) -> None:
        try:
            self._outcome = self._result()
        except BaseException as error:  # many types where hosts can't meet; SystemExit would end a thread in silence
            self._outcome = Outcome(EXIT_FAILED, f"distrain: {self._describe(error)}")
        finally:
            self._ended.set()

    def _result(self) -> Outcome:
        handler = _rendezvous(self._settings)
        agent = _Agent(WorkerSpec(rdzv_handler=handler, **self._spec), self._folder)
        self._agent = agent
        if self._stopped_before_start():
            return self._outcome
        result: RunResult | None
        try:
            result = cast("RunResult | None", agent.run())  # None where another host has closed the job
        except _NoRestart as end:
            result = end.result
        if self._request is None:
            # Hosts that wait for this one are told that the job has ended.
            handler.shutdown()
        if result is None:
            return Outcome(EXIT_FAILED, "distrain: the job was closed by another host")
        if result.failures:
            killed = all(failure.exitcode < 0 for failure in result.failures.values())
            return (
                self._ended_by_request("before its ranks could save")
                if killed and self._request is not None
                else outcome_of(result.failures)
            )
        if result.is_failed():
            return Outcome(EXIT_FAILED, "distrain: the agent lost its ranks, and doesn't know why")
        return Outcome(0, values=dict(result.return_values))

    def _stopped_before_start(self) -> bool:
        return self._request is not None

    def _ended_by_request(self, when: str) -> Outcome:
        assert self._request is not None
        return Outcome(128 + self._request, f"distrain: ended by {self._request.name} {when}")

    def _describe(self, error: BaseException) -> str:
        text = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
        if self._settings.nodes[1] == 1:
            return f"the ranks can't be started ({text})"
        if isinstance(error, RendezvousError | RuntimeError | TimeoutError):
            return f"the hosts can't meet at rdzv_endpoint={self._settings.rdzv_endpoint} ({text})"
        return f"the ranks of this host can't be started ({text})"

    # --- signals -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals_forwarded(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # An ignored one stays ignored: `nohup` ignores SIGHUP, a shell's `&` may ignore SIGINT.
        numbers = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                if handler is not None:
                    signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        request, now = signal.Signals(number), time.monotonic()
        agent = self._agent
        if request not in STOPPING:
            if agent is not None:
                agent.forward(request)
            return
        if self._request is None:
            self._request, self._requested_at = request, now
            if agent is None or not agent.stop(request):
                # Nothing runs that could be saved, and there may be hosts that would be waited for.
                self._outcome = self._ended_by_request("when no rank was running")
                self._ended.set()
        elif now - self._requested_at >= _same_request_seconds(self._request, request):
            self._requested_at = now
            if agent is not None:
                agent.hurry()


def _same_request_seconds(first: signal.Signals, second: signal.Signals) -> float:
    return _SAME_INTERRUPT_SECONDS if first == second == signal.SIGINT else _SAME_REQUEST_SECONDS


class _NoRestart(Exception):
    """The ranks have ended in a way that another start would not change.

    Attributes:
        result: How they ended.
    """

    def __init__(self, result: RunResult) -> None:
        super().__init__(result)
        self.result = result


class _Agent(LocalElasticAgent):
    """torch's agent for one host, which tells what ranks it has and does not start them again after a request to stop.

    It overrides methods that torch documents for this purpose.
    """

    def __init__(self, spec: WorkerSpec, folder: str) -> None:
        super().__init__(spec=spec, logs_specs=DefaultLogsSpecs(log_dir=folder))
        self._ranks: list[Process] = []
        self._starting = False
        self._request: signal.Signals | None = None
        self._hurried = 0
        self._failures: dict[int, ProcessFailure] = {}
        self._starts = 0

    def stop(self, request: signal.Signals) -> bool:
        """Forwards a request to stop, also to ranks that are being started; returns whether there are any."""
        self._request = request
        return self.forward(request) or self._starting

    def forward(self, number: signal.Signals) -> bool:
        """Sends a signal to all ranks; returns whether one is running."""
        running = [rank for rank in self._ranks if rank.is_alive]
        for rank in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)
        return bool(running)

    def hurry(self) -> None:
        """Ends ranks that are saving: at once with a report, and the next time without."""
        self._hurried += 1
        self.forward(signal.SIGTERM if self._hurried == 1 else getattr(signal, "SIGKILL", signal.SIGTERM))

    @override
    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._starting = True
        try:
            if self._request is not None:
                raise _NoRestart(RunResult(WorkerState.STOPPED))
            ids: dict[int, Any] = super()._start_workers(worker_group)
            self._ranks = [Process.of(pid) for pid in ids.values()]
        finally:
            self._starting = False
        self._pass_on_request()
        return ids

    def _pass_on_request(self) -> None:
        if self._request is not None:
            self.forward(self._request)

    @override
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        self._failures = result.failures
        if result.failures:
            ends = outcome_of(result.failures).code in (EXIT_REFUSED, EXIT_STOPPED)
            if ends or self._request is not None:
                raise _NoRestart(result)
        return result

    @override
    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self._starts += 1
        if self._failures:
            line = outcome_of(self._failures).line or "distrain: a rank failed"
            print_to_stderr(f"{line}; restart {self._starts} of at most {worker_group.spec.max_restarts}")
        else:
            print_to_stderr("distrain: a host has joined or left; all ranks save, and start again")
        super()._restart_workers(worker_group)


# --- how hosts meet ----------------------------------------------------------------------------------------------


def _rendezvous(settings: LaunchSettings) -> RendezvousHandler:
    least, most = settings.nodes
    if most == 1:
        return _OneHost()
    static = settings.node_rank is not None
    options: dict[str, Any] = {"rank": settings.node_rank} if static else {}
    if not static and _can_listen(str(settings.rdzv_endpoint)):
        # torch finds this out by comparing names, which need not resolve to the address that the other hosts use.
        options["is_host"] = True
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="static" if static else "c10d",
            endpoint=str(settings.rdzv_endpoint),
            run_id=settings.rdzv_id,
            min_nodes=least,
            max_nodes=most,
            local_addr=settings.local_addr,
            timeout=_MEETING_SECONDS,
            **options,
        )
    )


def _can_listen(endpoint: str) -> bool:
    """Whether the host of an endpoint is this one, and nobody listens at its port yet."""
    host, _, port = endpoint.rpartition(":")
    try:
        resolved = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, _, _, _, address in resolved:
        try:
            socket.create_server(address[:2], family=family).close()
        except OSError:
            continue
        return True
    return False


class _OneHost(RendezvousHandler):
    """The rendezvous of a job on one host: a store that only processes of this host can reach."""

    def __init__(self) -> None:
        # The system chooses a free port.
        listener = socket.create_server((_LOOPBACK, 0))
        self._port: int = listener.getsockname()[1]
        timeout = datetime.timedelta(seconds=_MEETING_SECONDS)
        self._store = serve_store(listener, _LOOPBACK, self._port, None, timeout)
        self._run_id = uuid.uuid4().hex

    @override
    def get_backend(self) -> str:
        return "distrain"

    @property
    @override
    def use_agent_store(self) -> bool:
        return True

    @override
    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(_LOOPBACK, self._port))

    @override
    def is_closed(self) -> bool:
        return False

    @override
    def set_closed(self) -> None:
        """Nobody else takes part."""

    @override
    def num_nodes_waiting(self) -> int:
        return 0

    @override
    def get_run_id(self) -> str:
        return self._run_id

    @override
    def shutdown(self) -> bool:
        return True


# --- the surroundings of the agent -------------------------------------------------------------------------------


@contextlib.contextmanager
def _variables_set(hosts_may_join: bool) -> Iterator[None]:
    """Lets the ranks know who started them, and print without delay; they inherit the environment."""
    wanted = {"PYTHONUNBUFFERED": "1"}
    if hosts_may_join:
        # Otherwise torch gives the ranks the agents' own store, and a host that joins later can't use it.
        wanted["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    added = {LAUNCHER: str(os.getpid()), **{key: value for key, value in wanted.items() if key not in os.environ}}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """Keeps the agent's log from the terminal, unless LOGLEVEL asks for it, as with torchrun."""
    if "LOGLEVEL" in os.environ:
        yield
        return
    log, silence = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    propagated = log.propagate
    log.propagate = False
    log.addHandler(silence)
    try:
        yield
    finally:
        log.propagate = propagated
        log.removeHandler(silence)


def own_command() -> tuple[str, list[str]]:
    """The program and arguments that start this process once more, for its ranks."""
    return sys.executable, sys.orig_argv[1:]
