"""Real ranks that hang, are stopped, are killed or crash: they are named in time, and no process is left."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrain.config.schema import Config
from distrain.data.base import data_source
from distrain.data.gather import InMemory
from distrain.data.sampler import Sampler
from distrain.errors import Failed
from distrain.health.failure_report import FailureReporter
from distrain.health.judge import UNREPORTED_EXIT
from distrain.health.thread_stack import ThreadStack
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import HANG_SECONDS, run_ranks, run_ranks_to_the_end, soaked
from tests.runs import small, train_on_rank, trainer_for

HOST = World.from_environment().host
#: Limit for the time of a step and for the time without a heartbeat, in seconds.
LIMIT = 3.0
#: Time for all ranks to end after that, in seconds.
GRACE = 15.0


def hang() -> None:
    """Blocks like a data reader whose file system no longer answers."""
    time.sleep(1000)


def crash() -> None:
    """Crashes like a fault in compiled code, without a core file."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def break_watch() -> None:
    """Lets every look at the main thread's stack fail, and hangs."""
    fail_to_look(1000)
    hang()


def break_report() -> None:
    """Like :func:`break_watch`, and the failure can't be reported either."""

    def fail(*_: object) -> None:
        raise LookupError("planted in the report")

    FailureReporter.report = fail  # type: ignore[method-assign, assignment]
    break_watch()


def disturb_watch() -> None:
    """Lets one look at the main thread's stack fail, and gives the watch thread time for a few heartbeats."""
    fail_to_look(1)
    time.sleep(LIMIT)


def fail_to_look(times: int) -> None:
    look, failures = ThreadStack.of_thread, iter(range(times))

    def look_or_fail(identifier: int) -> ThreadStack:
        if next(failures, None) is None:
            return look(identifier)
        raise ArithmeticError("planted")

    ThreadStack.of_thread = look_or_fail  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "hang": hang,
    "crash": crash,
    "break_watch": break_watch,
    "break_report": break_report,
    "disturb_watch": disturb_watch,
}


def train_with_fault(configuration: Config, fault: str, rank: int, batch: int) -> str:
    """Trains; one rank suffers a fault or a signal while it reads a batch (counted from 0)."""
    reads = 0
    take = InMemory._gather

    def take_or_fail(samples: InMemory, rows: Any) -> Any:
        nonlocal reads
        # One batch is read before training begins.
        if reads == batch + 1 and int(os.environ["RANK"]) == rank:
            Path(configuration.run_dir or "", "fault_time").write_text(str(time.time()))
            if fault in FAULTS:
                FAULTS[fault]()
            else:
                os.kill(os.getpid(), getattr(signal, fault))
        reads += 1
        return take(samples, rows)

    InMemory._gather = take_or_fail  # type: ignore[method-assign, assignment]
    try:
        train_on_rank(configuration)
    except Failed as failed:
        return f"failed: {failed.__cause__}"
    return "finished"


def configured(folder: Path, strategy: str, *options: str) -> Config:
    return small(
        f"strategy={strategy}",
        f"runtime.timeout_seconds={LIMIT}",
        f"runtime.heartbeat_timeout_seconds={LIMIT}",
        f"run_dir={folder}",
        *options,
    )


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "failure.json").read_text())
    return content


def run_with_fault(
    folder: Path, strategy: str, fault: str, *options: str, ranks: int = 2, batch: int = 3
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the outcome of each rank, and the report; rank 1 fails in the batch."""
    configuration = configured(folder, strategy, *options)
    outcomes = run_ranks_to_the_end(train_with_fault, ranks, configuration, fault, 1, batch)
    assert time.time() - float((folder / "fault_time").read_text()) < LIMIT + GRACE
    assert not any("still running" in str(outcome) for outcome in outcomes)
    return outcomes, report(folder)


def expected_samples(configuration: Config, shard: tuple[int, int], batch: int = 3) -> list[int]:
    count = len(data_source(configuration.data).load().train)
    return Sampler(count, configuration.seed).share(0, 10 * batch, 10, shard)


# --- faults that end a run -------------------------------------------------------------------------------------------


def test_a_stuck_data_reader_is_named_and_its_stack_is_saved(tmp_path: Path) -> None:
    outcomes, failure = run_with_fault(tmp_path, "ddp", "hang", ranks=3)
    assert str(outcomes[1]) == "died with exit code 1"
    assert (failure["rank"], failure["host"], failure["step"]) == (1, HOST, 3)
    assert (
        failure["error"]
        == f"no progress within runtime.timeout_seconds={LIMIT:g} in training, and it waits for no other rank"
    )
    assert failure["samples"] == expected_samples(configured(tmp_path, "ddp"), (1, 3))
    assert failure["traceback"].startswith("last known stack of its main thread:\n")
    assert failure["traceback"].splitlines()[-1].endswith("in hang")
    assert [(other["rank"], other["step"], other["doing"], other["waiting"]) for other in failure["others"]] == [
        (0, 3, "training", True),
        (2, 3, "training", True),
    ]
    assert all("in Peer._await" in other["stack"][-1] for other in failure["others"])
    assert "in hang" in (tmp_path / "logs" / "rank_1.log").read_text()


def test_a_stopped_rank_is_named_and_killed(tmp_path: Path) -> None:
    outcomes, failure = run_with_fault(tmp_path, "pipeline", "SIGSTOP")
    assert str(outcomes[1]) == "died with exit code -9"
    assert (failure["rank"], failure["step"]) == (1, 3)
    assert (
        failure["error"]
        == f"no heartbeat for {LIMIT:g} s (its process is stopped, or its host or network is down) in training"
    )
    # Both stages process the whole batch.
    assert failure["samples"] == expected_samples(configured(tmp_path, "pipeline"), (0, 1))
    assert [(other["rank"], other["waiting"]) for other in failure["others"]] == [(0, True)]


def test_a_killed_rank_with_independent_steps_is_named(tmp_path: Path) -> None:
    outcomes, failure = run_with_fault(tmp_path, "local_sgd", "SIGKILL")
    assert str(outcomes[1]) == "died with exit code -9"
    assert (failure["rank"], failure["error"]) == (1, UNREPORTED_EXIT)
    # Its last heartbeat may be a second old.
    assert failure["step"] <= 3


def test_a_killed_worker_of_a_parameter_server_is_named_with_its_samples(tmp_path: Path) -> None:
    _, failure = run_with_fault(tmp_path, "parameter_server", "SIGKILL", ranks=3)
    assert (failure["rank"], failure["step"], failure["error"]) == (1, 3, UNREPORTED_EXIT)
    assert failure["samples"] == expected_samples(configured(tmp_path, "ddp"), (1, 2))
    assert [other["doing"] for other in failure["others"]] == ["training", "serving"]


def test_a_stuck_expendable_worker_ends_itself_and_the_others_continue(tmp_path: Path) -> None:
    options = ("strategy.mode=async", "trainer.epochs=2", "strategy.worker_timeout_seconds=30")
    configuration = configured(tmp_path, "parameter_server", *options)
    outcomes = run_ranks_to_the_end(train_with_fault, 3, configuration, "hang", 1, 3)
    assert [str(outcome) for outcome in outcomes] == ["finished", "died with exit code 1", "finished"]
    assert not (tmp_path / "failure.json").exists()
    line = f"no progress within runtime.timeout_seconds={LIMIT:g} in training"
    assert line in (tmp_path / "logs" / "rank_1.log").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["parameter_server"]["lost_workers"][0]["rank"] == 1


def train_on_separate_hosts(configuration: Config, fault: str, rank: int, batch: int) -> str:
    """Like :func:`train_with_fault`, but each rank believes that it runs on a host of its own."""
    socket.gethostname = lambda: f"host{os.environ['RANK']}"
    return train_with_fault(configuration, fault, rank, batch)


def test_a_rank_killed_on_another_host_is_named(tmp_path: Path) -> None:
    limits = ("runtime.timeout_seconds=60", "runtime.heartbeat_timeout_seconds=60")
    outcomes = run_ranks_to_the_end(
        train_on_separate_hosts, 2, configured(tmp_path, "ddp", *limits), "SIGKILL", 1, 3, timeout=HANG_SECONDS
    )
    assert "failed" in str(outcomes[0]) or str(outcomes[0]) == "died with exit code 1"
    failure = report(tmp_path)
    assert (failure["rank"], failure["host"], failure["step"]) == (1, "host1", 3)
    assert failure["error"] == "its connections broke off and it sends no heartbeats"


def train_with_store_on_rank_0(configuration: Config, fault: str, port: int) -> str:
    """Trains without a launcher that serves the store; the fault is on rank 0."""
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
    return train_with_fault(configuration, fault, 0, 3)


#: What happens to the rank that serves the store, and what is said of it.
STORE_FAULTS = {"SIGKILL": UNREPORTED_EXIT, "SIGSTOP": f"can't be reached: no answer for {LIMIT:g} s"}


@pytest.mark.parametrize("fault", soaked(STORE_FAULTS, ["SIGSTOP"]))
def test_a_failed_rank_that_served_the_store_is_named(fault: str, tmp_path: Path) -> None:
    error = STORE_FAULTS[fault]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configuration = configured(tmp_path, "ddp")
    outcomes = run_ranks_to_the_end(train_with_store_on_rank_0, 2, configuration, fault, port)
    assert str(outcomes[0]) == "died with exit code -9"
    assert "failed" in str(outcomes[1]) or str(outcomes[1]) == "died with exit code 1"
    failure = report(tmp_path)
    assert (failure["rank"], failure["step"]) == (0, 3)
    assert failure["error"].endswith(error)
    # Unknown if rank 0 ended before rank 1 had read a heartbeat of its training.
    assert failure["samples"] in (None, expected_samples(configuration, (0, 2)))


def train_with_stop_request(configuration: Config) -> tuple[str | None, str]:
    """Trains; rank 1 fails in the same batch in which rank 0 receives a request to stop."""
    reads = 0
    take = InMemory._gather
    world = World.from_environment()

    def take_or_fail(samples: InMemory, rows: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 4:
            if world.rank == 1:
                raise ArithmeticError("planted")
            os.kill(os.getpid(), signal.SIGTERM)
        return take(samples, rows)

    InMemory._gather = take_or_fail  # type: ignore[method-assign, assignment]
    requested: str | None = None
    try:
        with Runtime(configuration, world) as runtime:
            trainer = trainer_for(configuration, runtime)
            runtime.stoppable = True
            try:
                trainer.fit()
            finally:
                requested = runtime.stop_requested
    except Failed as failed:
        return requested, str(failed.__cause__)
    return requested, "finished"


def test_a_request_to_stop_does_not_hide_a_failure(tmp_path: Path) -> None:
    configuration = configured(tmp_path, "ddp")
    (requested, ended), other = run_ranks(train_with_stop_request, 2, configuration)
    assert requested == "SIGTERM"
    assert ended not in ("finished", "ended by SIGTERM")
    assert other == (None, "planted")
    failure = report(tmp_path)
    assert (failure["rank"], failure["error"]) == (1, "ArithmeticError: planted")
    # One batch is read before training begins.
    assert failure["samples"] == expected_samples(configuration, (1, 2), batch=2)


def test_a_crash_below_python_leaves_its_stack(tmp_path: Path) -> None:
    _, failure = run_with_fault(tmp_path, "ddp", "crash")
    assert (failure["rank"], failure["step"]) == (1, 3)
    assert failure["error"] == "the process crashed: Fatal Python error: Segmentation fault"
    assert "in crash" in failure["traceback"]
    assert [path.name for path in (tmp_path / "logs").glob("*.fault")] == ["rank_1.fault"]


def test_a_watch_thread_that_fails_again_and_again_ends_the_run(tmp_path: Path) -> None:
    limits = ("runtime.timeout_seconds=60", "runtime.heartbeat_timeout_seconds=60")
    outcomes, failure = run_with_fault(tmp_path, "ddp", "break_watch", *limits)
    assert str(outcomes[1]) == "died with exit code 1"
    assert (failure["rank"], failure["host"], failure["step"]) == (1, HOST, 3)
    error = "its watch thread, which sends the heartbeats, failed 3 times in a row: ArithmeticError: planted"
    assert failure["error"] == error
    assert failure["samples"] == expected_samples(configured(tmp_path, "ddp"), (1, 2))
    assert failure["traceback"].startswith("Traceback (most recent call last):\n")
    assert failure["traceback"].endswith("ArithmeticError: planted\n")
    assert [other["rank"] for other in failure["others"]] == [0]
    written = (tmp_path / "logs" / "rank_1.log").read_text()
    assert written.count("the watch thread failed, and tries again\nTraceback") == 1
    assert error in written


def test_a_watch_thread_that_cannot_report_its_failure_ends_the_process(tmp_path: Path) -> None:
    limits = ("runtime.timeout_seconds=60", "runtime.heartbeat_timeout_seconds=60")
    outcomes, failure = run_with_fault(tmp_path, "ddp", "break_report", *limits)
    assert str(outcomes[1]) == "died with exit code 1"
    assert (failure["rank"], failure["step"], failure["error"]) == (1, 3, UNREPORTED_EXIT)
    written = (tmp_path / "logs" / "rank_1.log").read_text()
    assert "the watch thread can't report a failure; this process ends\nTraceback" in written
    assert "LookupError: planted in the report" in written


# --- what does not end a run -----------------------------------------------------------------------------------------


def test_a_watch_thread_that_fails_once_continues_and_its_error_is_logged(tmp_path: Path) -> None:
    # The heartbeats are those of the limit for silence; reading the batch may take as long as it likes.
    configuration = configured(tmp_path, "ddp", "runtime.timeout_seconds=60")
    outcomes = run_ranks(train_with_fault, 2, configuration, "disturb_watch", 1, 3)
    assert outcomes == ["finished"] * 2
    assert not (tmp_path / "failure.json").exists()
    written = (tmp_path / "logs" / "rank_1.log").read_text()
    assert written.count("the watch thread failed, and tries again\nTraceback") == 1
    assert "ArithmeticError: planted" in written


def pause_and_train(configuration: Config) -> str:
    """Trains; all ranks are suspended at once while they train, for longer than every limit."""
    world, folder = World.from_environment(), Path(configuration.run_dir or "").parent
    folder.joinpath(f"pid_{world.rank}").write_text(str(os.getpid()))
    step, reads = InMemory._gather, 0
    suspending: list[subprocess.Popen[bytes]] = []

    def slow(samples: InMemory, rows: Any) -> Any:
        nonlocal reads
        reads += 1
        # Rank 0 waits for the others in a collective when it is suspended.
        if world.rank:
            time.sleep(0.1)
        # One batch is read before training begins, and by then every rank has written its file.
        elif reads == 3:
            pids = " ".join((folder / f"pid_{rank}").read_text() for rank in range(world.size))
            command = f"sleep 0.1; kill -STOP {pids}; sleep {2 * LIMIT}; kill -CONT {pids}"
            suspending.append(subprocess.Popen(["/bin/sh", "-c", command]))
        return step(samples, rows)

    InMemory._gather = slow  # type: ignore[method-assign, assignment]
    began = time.monotonic()
    train_on_rank(configuration)
    assert time.monotonic() - began > 2 * LIMIT, "this rank was not suspended"
    for process in suspending:
        process.wait()
    return "finished"


@pytest.mark.parametrize(
    ("ranks", "strategy", "options"),
    [
        (2, "ddp", ()),
        pytest.param(
            3,
            "parameter_server",
            ("strategy.mode=async", f"strategy.worker_timeout_seconds={LIMIT}"),
            marks=pytest.mark.soak,
        ),
    ],
    ids=["ddp", "async server"],
)
def test_a_job_that_is_suspended_as_a_whole_continues(
    ranks: int, strategy: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    configuration = configured(tmp_path / "run", strategy, "trainer.epochs=5", *options)
    assert run_ranks(pause_and_train, ranks, configuration) == ["finished"] * ranks
    assert not (tmp_path / "run" / "failure.json").exists()


def wakeups_per_second(configuration: Config) -> float:
    """How often the threads of an idle rank wake up, all together."""
    with Runtime(configuration, World.from_environment()) as runtime:
        runtime.communicator().barrier()
        began, count = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        time.sleep(1.5)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - count) / (time.monotonic() - began)


def test_an_idle_rank_is_watched_without_polling(tmp_path: Path) -> None:
    # Counted, because the time that a shared processor takes for the same work differs tenfold.
    wakeups = run_ranks(wakeups_per_second, 2, small("strategy=ddp", f"run_dir={tmp_path}"))
    # Up to 100 were seen. A thread that polls every 5 ms adds 200.
    assert max(wakeups) < 200
