"""Ranks share one run folder and one configuration, and a failure ends all of them and is named by each."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.config.schema import Config
from distrain.errors import ConfigError, Failed
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import RankFailed, run_ranks, run_ranks_to_the_end
from tests.runs import small, train_on_rank
from tests.runtime.test_bind_address import free_port

HOST = World.from_environment().host


class Fragile(nn.Module):
    """A linear model that fails on one rank, in its forward pass ``at`` (counted from 1) of more than two images.

    The model's trial, before ranks communicate, runs at most two.
    """

    def __init__(
        self, in_channels: int, num_classes: int, image_size: tuple[int, int], how: str, rank: int, at: int
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels * image_size[0] * image_size[1], num_classes)
        self._how, self._rank, self._at = how, rank, at
        self._calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self._calls += len(images) > 2
        if self._calls == self._at and len(images) > 2 and int(os.environ.get("RANK", "0")) == self._rank:
            self._fail()
        result: Tensor = self.linear(images.flatten(1))
        return result

    def _fail(self) -> None:
        if self._how == "raise":
            raise ArithmeticError("planted\nwith a second line")
        os.kill(os.getpid(), getattr(signal, self._how))


def fragile(folder: Path, how: str, *options: str, rank: int = 1, at: int = 4) -> Config:
    """A run of 20 steps that fails on one rank after ``at - 1`` of them."""
    return small(
        "model=custom",
        "model._target_=tests.runtime.test_runtime.Fragile",
        f"+model.kwargs={{how:{how},rank:{rank},at:{at}}}",
        "strategy=ddp",
        "trainer.max_steps=20",
        "trainer.epochs=100",
        f"run_dir={folder}",
        *options,
    )


@dataclass
class Ending:
    """How a rank's run ended.

    Attributes:
        outcome: The exception's name, or ``finished``.
        message: The exception's message.
        last_line: The last line that the rank wrote to stderr.
        seconds: From start to end.
    """

    outcome: str
    message: str
    last_line: str
    seconds: float


def train_to_the_end(configuration: Config | list[Config]) -> Ending:
    """Trains; a list holds one configuration a rank."""
    rank = int(os.environ.get("RANK", "0"))
    own = configuration[rank] if isinstance(configuration, list) else configuration
    outcome, message, start = "finished", "", time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            train_on_rank(own)
        except (Failed, ConfigError) as error:
            outcome, message = type(error).__name__, str(error)
    return Ending(outcome, message, (stderr.getvalue().splitlines() or [""])[-1], time.monotonic() - start)


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "failure.json").read_text())
    assert set(content) == {"rank", "place", "host", "step", "samples", "error", "traceback", "time", "others"}
    return content


# --- set-up ----------------------------------------------------------------------------------------------------------


def test_ranks_without_a_port_to_meet_at_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"^MASTER_PORT=: WORLD_SIZE=2 needs the port"):
        Runtime(small("strategy=ddp", f"run_dir={tmp_path}"), World(0, 2, 0, 2, HOST)).__enter__()


# --- the run folder --------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_refused_on_all_ranks(tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("in the way")
    endings = run_ranks(train_to_the_end, 2, small("strategy=ddp", f"run_dir={tmp_path}/file"))
    assert endings[0].message.startswith(f"run_dir={tmp_path}/file: can't be made: ")
    assert endings[1].message == endings[0].message


def train_in(folder: Path, configuration: Config) -> str:
    os.chdir(folder)
    return str(train_on_rank(configuration)["run_dir"])


def test_ranks_share_one_folder_and_each_logs_to_its_own_file(tmp_path: Path) -> None:
    folders = run_ranks(train_in, 3, tmp_path, small("strategy=ddp", "trainer.max_steps=1"))
    assert len(set(folders)) == 1
    assert [str(path) for path in tmp_path.glob("outputs/*/*")] == folders[:1]
    assert sorted(path.name for path in Path(folders[0], "logs").iterdir()) == [f"rank_{i}.log" for i in range(3)]
    assert not Path(folders[0], "failure.json").exists()


# --- agreement -------------------------------------------------------------------------------------------------------


def test_ranks_with_different_configurations_are_refused_with_the_key(tmp_path: Path) -> None:
    options = ("strategy=ddp", f"run_dir={tmp_path}/run")
    configurations = [small(*options, f"optimizer.lr={rate}") for rate in (0.1, 0.1, 0.2)]
    for ending in run_ranks(train_to_the_end, 3, configurations):
        assert ending.outcome == "ConfigError"
        assert "differs between ranks" in ending.message
        assert f"rank 2 on {HOST}" in ending.message
        assert "optimizer.lr: 0.2 ≠ 0.1" in ending.message
    assert not tmp_path.joinpath("run").exists()


def join_only_as_rank_0(configuration: Config) -> Ending | None:
    return train_to_the_end(configuration) if os.environ["RANK"] == "0" else None


def test_ranks_that_never_join_are_named(tmp_path: Path) -> None:
    configuration = small("strategy=ddp", "runtime.setup_timeout_seconds=2", f"run_dir={tmp_path}/run")
    ending = run_ranks(join_only_as_rank_0, 3, configuration)[0]
    assert ending.outcome == "Failed"
    assert ending.last_line == (
        f"distrain: rank 0 on {HOST} failed at step 0: "
        "RuntimeError: ranks [1, 2] did not join within runtime.setup_timeout_seconds=2"
    )
    # Not only when the job's other time limits run out.
    assert ending.seconds < 60


def train_twice(folder: Path, port: int | None) -> list[str]:
    if port is not None:
        # As where no launcher serves a store: variables set by hand, SLURM's tasks, mpirun.
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    return [
        train_on_rank(small("strategy=ddp", "trainer.max_steps=1", f"run_dir={folder}/{i}"))["run_dir"] for i in "ab"
    ]


def test_the_limit_of_a_collective_outlasts_a_suspension_of_days() -> None:
    seconds = Runtime(small("runtime.timeout_seconds=2"), World(0, 1, 0, 1, "here")).collective_timeout_seconds
    assert seconds > 5 * 24 * 3600
    # torch counts milliseconds in 32 bits at places.
    assert 1000 * seconds < 2**31


@pytest.mark.parametrize("rank_0_serves", [False, True])
def test_one_launch_may_train_several_times(rank_0_serves: bool, tmp_path: Path) -> None:
    port = free_port() if rank_0_serves else None
    assert run_ranks(train_twice, 2, tmp_path, port) == [[f"{tmp_path}/a", f"{tmp_path}/b"]] * 2


def draw_in_runtime(configuration: Config) -> tuple[float, int]:
    with Runtime(configuration, World.from_environment()):
        return float(torch.rand(())), torch.get_num_threads()


def test_ranks_start_with_the_same_seed_and_the_threads_they_were_given(tmp_path: Path) -> None:
    options = ("strategy=ddp", "runtime.threads=2", f"run_dir={tmp_path}")
    first = run_ranks(draw_in_runtime, 2, small(*options, "seed=1"))
    second = run_ranks(draw_in_runtime, 2, small(*options, "seed=2"))
    assert first[0] == first[1]
    assert first[0][0] != second[0][0]
    assert {threads for _, threads in first + second} == {2}


def test_a_runtime_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    handler, handlers = signal.getsignal(signal.SIGTERM), list(logging.getLogger("distrain").handlers)
    with Runtime(small(f"run_dir={tmp_path}"), World.from_environment()):
        assert signal.getsignal(signal.SIGTERM) != handler
        assert len(logging.getLogger("distrain").handlers) > len(handlers)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert logging.getLogger("distrain").handlers == handlers


def test_a_command_that_only_reads_makes_no_folder(tmp_path: Path) -> None:
    with Runtime(small(f"run_dir={tmp_path}/run"), World.from_environment(), keep_logs=False) as runtime:
        assert runtime.run_dir == tmp_path / "run"
    assert list(tmp_path.iterdir()) == []


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_is_named_by_all(tmp_path: Path) -> None:
    endings = run_ranks(train_to_the_end, 3, fragile(tmp_path, "raise"))
    line = f"rank 1 on {HOST} failed at step 3: ArithmeticError: planted"
    assert [each.outcome for each in endings] == ["Failed"] * 3
    assert endings[1].last_line == f"distrain: {line}"
    for rank in (0, 2):
        assert endings[rank].last_line == f"distrain: rank {rank} stopped because {line}"
    failure = report(tmp_path)
    assert (failure["rank"], failure["host"], failure["step"]) == (1, HOST, 3)
    assert failure["error"] == "ArithmeticError: planted"
    assert "in forward" in failure["traceback"]
    assert "with a second line" in tmp_path.joinpath("logs", "rank_1.log").read_text()
    assert max(each.seconds for each in endings) < 60


def test_a_rank_that_is_killed_is_named_by_all_others(tmp_path: Path) -> None:
    endings = run_ranks_to_the_end(train_to_the_end, 3, fragile(tmp_path, "SIGKILL"))
    assert isinstance(endings[1], RankFailed)
    assert str(endings[1]) == "died with exit code -9"
    line = f"rank 1 on {HOST} failed at step 3: the process exited without reporting an error (killed?)"
    for rank in (0, 2):
        assert endings[rank].last_line == f"distrain: rank {rank} stopped because {line}"
        assert endings[rank].seconds < 60
    assert (report(tmp_path)["rank"], report(tmp_path)["step"]) == (1, 3)


def end_before_training(configuration: Config) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.suppress(Failed):  # noqa: SIM117
        with Runtime(configuration, World.from_environment()) as runtime:
            if runtime.world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    return stderr.getvalue().splitlines()[-1]


def test_a_rank_that_receives_sigterm_before_training_is_named_by_all(tmp_path: Path) -> None:
    first, second = run_ranks(end_before_training, 2, small("strategy=ddp", f"run_dir={tmp_path}"))
    line = f"rank 1 on {HOST} failed at step 0: ended by SIGTERM"
    assert (first, second) == (f"distrain: rank 0 stopped because {line}", f"distrain: {line}")
    assert report(tmp_path)["rank"] == 1


def interrupt_in_set_up(configuration: Config) -> tuple[str, int]:
    # The harness ignores interrupts from its own terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            with Runtime(configuration, World.from_environment()):
                os.kill(os.getpid(), signal.SIGINT)
        except Failed as failed:
            code = failed.exit_code
    return stderr.getvalue(), code


def test_ctrl_c_before_training_prints_one_line_and_no_traceback(tmp_path: Path) -> None:
    configuration = small("strategy=single", f"run_dir={tmp_path}")
    line = f"distrain: rank 0 on {HOST} failed at step 0: ended by SIGINT\n"
    assert run_ranks(interrupt_in_set_up, 1, configuration) == [(line, 130)]
    assert "ended by SIGINT" in (tmp_path / "logs" / "rank_0.log").read_text()


def test_a_stopped_rank_ends_the_run_in_time(tmp_path: Path) -> None:
    configuration = fragile(tmp_path, "SIGSTOP", "runtime.timeout_seconds=3")
    endings = run_ranks_to_the_end(train_to_the_end, 2, configuration)
    assert str(endings[1]) == "died with exit code -9"
    line = f"rank 1 on {HOST} failed at step 3: no heartbeat for 3 s"
    assert endings[0].last_line.startswith(f"distrain: rank 0 stopped because {line}")
    assert (report(tmp_path)["rank"], report(tmp_path)["step"]) == (1, 3)


def test_a_failure_of_a_single_process_is_reported_likewise(tmp_path: Path) -> None:
    ending = run_ranks(train_to_the_end, 1, fragile(tmp_path, "raise", "strategy=single", rank=0, at=2))[0]
    assert ending.last_line == f"distrain: rank 0 on {HOST} failed at step 1: ArithmeticError: planted"
    assert report(tmp_path)["rank"] == 0


def fail_after_training(configuration: Config) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.suppress(Failed):  # noqa: SIM117
        with Runtime(configuration, World.from_environment()) as runtime:
            if runtime.is_main:
                raise OSError("no space left")
    return stderr.getvalue().splitlines()[-1]


def test_a_failure_after_the_last_step_is_named(tmp_path: Path) -> None:
    first, second = run_ranks(fail_after_training, 2, small("strategy=ddp", f"run_dir={tmp_path}"))
    line = f"rank 0 on {HOST} failed at step 0: OSError: no space left"
    assert first == f"distrain: {line}"
    assert second == f"distrain: rank 1 stopped because {line}"
