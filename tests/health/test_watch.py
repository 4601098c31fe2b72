"""Real ranks that hang, stand still, die or crash: named in time, and no process is left."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrain.cli import app
from distrain.communication.collectives import _Started
from distrain.communication.types import DONE, Pending
from distrain.config.schema import Config
from distrain.data.loader import Loader
from distrain.data.sampler import batch_share
from distrain.errors import Failed
from distrain.health.judge import UNREPORTED_EXIT
from distrain.health.thread_stack import ThreadStack
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import run_ranks, run_ranks_to_the_end
from tests.runs import small, train_on_rank

HOST = World.from_environment().host
#: Seconds that a step may take here, and a rank may be silent.
LIMIT = 2.0
#: What the issue allows besides.
SPARE = 15.0


def hang() -> None:
    """As a data reader whose file system has gone away."""
    time.sleep(1000)


def crash() -> None:
    """As a fault in compiled code; without the core file."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


TROUBLE: dict[str, Callable[[], None]] = {"hang": hang, "crash": crash}


def troubled(configuration: Config, trouble: str, rank: int, batch: int) -> str:
    """Trains; one rank comes to grief while it reads a batch (counted from 0)."""
    reads = 0
    take = Loader._take

    def take_or_not(loader: Loader, rows: Any) -> Any:
        nonlocal reads
        # The first batch of all is looked at before training begins.
        if reads == batch + 1 and int(os.environ["RANK"]) == rank:
            Path(configuration.run_dir or "", "struck").write_text(str(time.time()))
            if trouble in TROUBLE:
                TROUBLE[trouble]()
            else:
                os.kill(os.getpid(), getattr(signal, trouble))
        reads += 1
        return take(loader, rows)

    Loader._take = take_or_not  # type: ignore[method-assign, assignment]
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
    found: dict[str, Any] = json.loads((folder / "failure.json").read_text())
    return found


def trouble_in(
    folder: Path, strategy: str, trouble: str, *options: str, ranks: int = 2, batch: int = 3
) -> tuple[list[Any], dict[str, Any]]:
    """What became of each rank, and the report; rank 1 fails in the batch."""
    configuration = configured(folder, strategy, *options)
    outcomes = run_ranks_to_the_end(troubled, ranks, configuration, trouble, 1, batch, timeout=60)
    assert time.time() - float((folder / "struck").read_text()) < LIMIT + SPARE
    assert not any("still running" in str(outcome) for outcome in outcomes)
    return outcomes, report(folder)


def expected_samples(configuration: Config, shard: tuple[int, int], batch: int = 3) -> list[int]:
    count = len(app.source(configuration).load().train)
    return batch_share(configuration.seed, count, 0, 10 * batch, 10, shard)


# --- what holds up a run ---------------------------------------------------------------------------------------------


def test_a_stuck_data_reader_is_found_and_its_stack_is_saved(tmp_path: Path) -> None:
    outcomes, found = trouble_in(tmp_path, "ddp", "hang", ranks=3)
    assert str(outcomes[1]) == "died with exit code 1"
    assert (found["rank"], found["host"], found["step"]) == (1, HOST, 3)
    assert found["error"] == "no progress within runtime.timeout_seconds=2 in training, and it waits for no other rank"
    assert found["samples"] == expected_samples(configured(tmp_path, "ddp"), (1, 3))
    assert found["traceback"].startswith("last known stack of its main thread:\n")
    assert found["traceback"].splitlines()[-1].endswith("in hang")
    assert [(other["rank"], other["step"], other["doing"], other["waiting"]) for other in found["others"]] == [
        (0, 3, "training", True),
        (2, 3, "training", True),
    ]
    assert all("in Peer._await" in other["stack"][-1] for other in found["others"])
    assert "in hang" in (tmp_path / "logs" / "rank_1.log").read_text()


def test_a_rank_that_stands_still_is_named_and_ended(tmp_path: Path) -> None:
    outcomes, found = trouble_in(tmp_path, "pipeline", "SIGSTOP")
    assert str(outcomes[1]) == "died with exit code -9"
    assert (found["rank"], found["step"]) == (1, 3)
    assert found["error"] == "no sign of life for 2 s (stopped, or its host or network is gone) in training"
    # Both stages work on the whole batch.
    assert found["samples"] == expected_samples(configured(tmp_path, "pipeline"), (0, 1))
    assert [(other["rank"], other["waiting"]) for other in found["others"]] == [(0, True)]


def test_a_rank_that_does_not_keep_step_is_named_too(tmp_path: Path) -> None:
    outcomes, found = trouble_in(tmp_path, "local_sgd", "SIGKILL")
    assert str(outcomes[1]) == "died with exit code -9"
    assert (found["rank"], found["error"]) == (1, UNREPORTED_EXIT)
    # Its last beat may be a second old.
    assert found["step"] <= 3


def test_a_killed_worker_of_a_parameter_server_is_named_with_its_samples(tmp_path: Path) -> None:
    _, found = trouble_in(tmp_path, "parameter_server", "SIGKILL", ranks=3)
    assert (found["rank"], found["step"], found["error"]) == (1, 3, UNREPORTED_EXIT)
    assert found["samples"] == expected_samples(configured(tmp_path, "ddp"), (1, 2))
    assert [other["doing"] for other in found["others"]] == ["training", "serving"]


def test_a_worker_that_the_others_can_do_without_gives_itself_up(tmp_path: Path) -> None:
    options = ("strategy.mode=async", "trainer.epochs=2", "strategy.worker_timeout_seconds=30")
    configuration = configured(tmp_path, "parameter_server", *options)
    outcomes = run_ranks_to_the_end(troubled, 3, configuration, "hang", 1, 3, timeout=60)
    assert [str(outcome) for outcome in outcomes] == ["finished", "died with exit code 1", "finished"]
    assert not (tmp_path / "failure.json").exists()
    assert "no progress within runtime.timeout_seconds=2 in training" in (tmp_path / "logs" / "rank_1.log").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["parameter_server"]["lost_workers"][0]["rank"] == 1


def elsewhere(configuration: Config, trouble: str, rank: int, batch: int) -> str:
    """As :func:`troubled`, with each rank on a host of its own, as far as it can tell."""
    socket.gethostname = lambda: f"host{os.environ['RANK']}"
    return troubled(configuration, trouble, rank, batch)


def test_a_rank_that_dies_on_another_host_is_missed(tmp_path: Path) -> None:
    limits = ("runtime.timeout_seconds=60", "runtime.heartbeat_timeout_seconds=60")
    outcomes = run_ranks_to_the_end(elsewhere, 2, configured(tmp_path, "ddp", *limits), "SIGKILL", 1, 3, timeout=60)
    assert "failed" in str(outcomes[0]) or str(outcomes[0]) == "died with exit code 1"
    found = report(tmp_path)
    assert (found["rank"], found["host"], found["step"]) == (1, "host1", 3)
    assert found["error"] == "its connections broke off and it gives no sign of life"


def served_by_rank_0(configuration: Config, trouble: str, port: int) -> str:
    """Trains without a launcher that serves the store; rank 0 comes to grief."""
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
    return troubled(configuration, trouble, 0, 3)


@pytest.mark.parametrize(
    ("trouble", "error"), [("SIGKILL", UNREPORTED_EXIT), ("SIGSTOP", "can't be reached: no answer for 2 s")]
)
def test_the_rank_that_served_the_store_is_named_without_it(trouble: str, error: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configuration = configured(tmp_path, "ddp")
    outcomes = run_ranks_to_the_end(served_by_rank_0, 2, configuration, trouble, port, timeout=60)
    assert str(outcomes[0]) == "died with exit code -9"
    assert "failed" in str(outcomes[1]) or str(outcomes[1]) == "died with exit code 1"
    found = report(tmp_path)
    assert (found["rank"], found["step"]) == (0, 3)
    assert found["error"].endswith(error)
    # Unknown if rank 0 was gone before its first beat in training was read.
    assert found["samples"] in (None, expected_samples(configuration, (0, 2)))


def asked_to_stop(configuration: Config) -> tuple[str | None, str]:
    """Trains where somebody looks at requests to stop; rank 1 fails, and rank 0 has been asked to stop."""
    reads = 0
    take = Loader._take
    world = World.from_environment()

    def take_or_not(loader: Loader, rows: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 4:
            if world.rank == 1:
                raise ArithmeticError("planted")
            os.kill(os.getpid(), signal.SIGTERM)
        return take(loader, rows)

    Loader._take = take_or_not  # type: ignore[method-assign, assignment]
    requested: str | None = None
    try:
        with Runtime(configuration, world) as runtime:
            trainer = app.build_trainer(configuration, runtime, app.source(configuration).load())
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
    (requested, ended), other = run_ranks(asked_to_stop, 2, configuration)
    assert requested == "SIGTERM"
    assert ended not in ("finished", "ended by SIGTERM")
    assert other == (None, "planted")
    found = report(tmp_path)
    assert (found["rank"], found["error"]) == (1, "ArithmeticError: planted")
    # The first batch of all is looked at before training begins.
    assert found["samples"] == expected_samples(configuration, (1, 2), batch=2)


def test_a_crash_below_python_leaves_its_stack(tmp_path: Path) -> None:
    _, found = trouble_in(tmp_path, "ddp", "crash")
    assert (found["rank"], found["step"]) == (1, 3)
    assert found["error"] == "the process crashed: Fatal Python error: Segmentation fault"
    assert "in crash" in found["traceback"]
    assert [path.name for path in (tmp_path / "logs").glob("*.fault")] == ["rank_1.fault"]


# --- what does not ---------------------------------------------------------------------------------------------------


def pause_and_train(configuration: Config) -> str:
    """Trains; every rank is stopped for longer than a rank may be silent, all at about the same time."""
    command = f"sleep 1; kill -STOP {os.getpid()}; sleep {2 * LIMIT}; kill -CONT {os.getpid()}"
    step = Loader._take

    def slow(loader: Loader, rows: Any) -> Any:
        time.sleep(0.1)
        return step(loader, rows)

    Loader._take = slow  # type: ignore[method-assign, assignment]
    with subprocess.Popen(["/bin/sh", "-c", command]):
        began = time.monotonic()
        train_on_rank(configuration)
        assert time.monotonic() - began > 2 * LIMIT, "nobody was stopped"
    return "finished"


def test_a_job_that_is_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    configuration = configured(tmp_path, "ddp", "trainer.epochs=5")
    assert run_ranks(pause_and_train, 2, configuration) == ["finished"] * 2
    assert not (tmp_path / "failure.json").exists()


def cpu_share(configuration: Config) -> float:
    """Of a core, that a rank with nothing to do needs to be watched."""
    with Runtime(configuration, World.from_environment()) as runtime:
        runtime.communicator().barrier()
        began, used = time.monotonic(), time.process_time()
        time.sleep(1.5)
        return (time.process_time() - used) / (time.monotonic() - began)


def test_watching_costs_next_to_nothing(tmp_path: Path) -> None:
    shares = run_ranks(cpu_share, 2, small("strategy=ddp", f"run_dir={tmp_path}"))
    # Half a percent on two slow cores, and room for a bad moment of theirs; a thread that polls takes far more.
    assert max(shares) < 0.02


# --- parts -----------------------------------------------------------------------------------------------------------


class _Waiting:
    """Work that is over when somebody looks at where it is waited for."""

    def wait(self) -> object:
        return ThreadStack.of_frame(sys._getframe()).waiting


def test_who_waits_for_a_collective_is_known_by_the_calls_of_its_main_thread() -> None:
    pending: Pending = _Started(_Waiting())
    assert pending.wait() is True
    assert _Waiting().wait() is False
    DONE.wait()


def test_a_stack_is_told_outermost_first_and_not_endlessly() -> None:
    def deeper(depth: int) -> list[str]:
        return deeper(depth - 1) if depth else ThreadStack.of_frame(sys._getframe()).lines

    found = deeper(30)
    assert len(found) == 12
    assert found[-1].startswith(f'  File "{__file__}", line ')
    assert found[-1].endswith("deeper")
