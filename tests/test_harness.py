"""The harness that other tests trust: failures surface in the parent, and nothing stays behind."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distrain.runtime.world import World
from tests.harness import HANG_SECONDS, RankFailed, run_ranks, run_ranks_to_the_end


def own_rank() -> tuple[int, int]:
    world = World.from_environment()
    return world.rank, world.size


def pid_and_port() -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("MASTER_PORT")


def fail_on(rank: int) -> int:
    if own_rank()[0] == rank:
        raise ZeroDivisionError("planted")
    return os.getpid()


def die_on(rank: int) -> int:
    if own_rank()[0] == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def write_pid_and_hang_on(rank: int, folder: Path) -> str:
    folder.joinpath(str(own_rank()[0])).write_text(str(os.getpid()))
    if own_rank()[0] == rank:
        (folder / "hangs").touch()
        time.sleep(600)
    return "done"


def hang_deaf(folder: Path) -> None:
    """As a rank stuck in a native call: neither a signal nor a thread of its own ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=time.sleep, args=(600,)).start()
    folder.joinpath("0").write_text(str(os.getpid()))
    (folder / "hangs").touch()
    time.sleep(600)


def unpicklable() -> object:
    return lambda: None


def leave_group_behind() -> int:
    dist.init_process_group("gloo")
    # To form a group fails where a peer has ended already; nothing in it waits for all ranks.
    dist.barrier()
    return dist.get_world_size()


def change_environment() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")


def gone(pid: int) -> bool:
    """The process has ended and was reaped; waits for the fork server to do it."""
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def time_is_up_when_a_rank_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the harness's time limit run out as soon as only a rank is left that hangs, however busy the machine is."""

    def wait(ends: list[Connection], timeout: float) -> list[Any]:
        while not (ready := multiprocessing.connection.wait(ends, 0.05)):
            if len(ends) == 1 and (tmp_path / "hangs").exists():
                break
        return ready

    monkeypatch.setattr("tests.harness.wait", wait)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_results_come_in_order_of_rank(ranks: int) -> None:
    assert run_ranks(own_rank, ranks) == [(rank, ranks) for rank in range(ranks)]


def test_each_rank_is_a_process_and_ports_are_the_systems_choice() -> None:
    first, second = run_ranks(pid_and_port, 2), run_ranks(pid_and_port, 2)
    pids = {pid for pid, _ in first + second}
    assert len(pids) == 4
    assert os.getpid() not in pids
    assert len({port for _, port in first}) == 1
    assert first[0][1] != second[0][1]


def test_results_may_hold_tensors() -> None:
    assert torch.equal(run_ranks(torch.arange, 2, 3)[1], torch.arange(3))


def test_traceback_of_a_rank_is_raised_here() -> None:
    with pytest.raises(RankFailed, match="rank 1 of 2") as failed:
        run_ranks(fail_on, 2, 1)
    assert 'raise ZeroDivisionError("planted")' in str(failed.value)
    assert "in fail_on" in str(failed.value)


def test_other_ranks_results_survive_a_failure() -> None:
    outcomes = run_ranks_to_the_end(fail_on, 3, 0)
    assert isinstance(outcomes[0], RankFailed)
    assert all(isinstance(outcome, int) for outcome in outcomes[1:])


def test_killed_rank_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankFailed, match="rank 1 of 2: died with exit code -9"):
        run_ranks(die_on, 2, 1)


def test_result_that_cant_travel_is_a_failure_not_a_hang() -> None:
    with pytest.raises(RankFailed, match=r"rank 0 of 1:[\s\S]*pickle"):
        run_ranks(unpicklable, 1)


def test_time_limit_ends_the_ranks_and_names_each() -> None:
    outcomes = run_ranks_to_the_end(time.sleep, 2, 600, timeout=0.5)
    assert [str(outcome) for outcome in outcomes] == ["still running after 0.5 s"] * 2


@pytest.mark.usefixtures("time_is_up_when_a_rank_hangs")
def test_rank_that_hangs_is_ended_and_the_others_result_is_kept(tmp_path: Path) -> None:
    outcomes = run_ranks_to_the_end(write_pid_and_hang_on, 2, 1, tmp_path)
    assert outcomes[0] == "done"
    assert isinstance(outcomes[1], RankFailed)
    assert all(gone(int(tmp_path.joinpath(str(rank)).read_text())) for rank in range(2))


@pytest.mark.usefixtures("time_is_up_when_a_rank_hangs")
def test_rank_that_ignores_signals_is_ended_too(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="still running"):
        run_ranks(hang_deaf, 1, tmp_path)
    assert gone(int(tmp_path.joinpath("0").read_text()))


def test_nothing_runs_on_after_success_or_failure() -> None:
    pids = [pid for pid, _ in run_ranks(pid_and_port, 2)]
    pids += [outcome for outcome in run_ranks_to_the_end(fail_on, 2, 1) if isinstance(outcome, int)]
    assert len(pids) == 3
    assert all(gone(pid) for pid in pids)


def test_forgotten_process_group_ends_with_its_rank() -> None:
    assert run_ranks(leave_group_behind, 2) == [2, 2]


def test_parents_environment_is_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    before, folder, threads = dict(os.environ), Path.cwd(), torch.get_num_threads()
    run_ranks(change_environment, 2)
    assert (dict(os.environ), Path.cwd(), torch.get_num_threads()) == (before, folder, threads)
    assert not dist.is_initialized()


def test_one_rank_has_no_launchers_variables() -> None:
    assert run_ranks(pid_and_port, 1)[0][1] is None
