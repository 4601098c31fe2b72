"""The life of ranks together: one folder, one configuration, and failures that end all ranks and have names."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.config.schema import Config
from distrain.errors import ConfigError, Failed
from distrain.runtime.device import choose_backend, choose_device, generators
from distrain.runtime.runtime import Runtime, make_run_dir
from distrain.runtime.world import World
from tests.harness import RankFailed, run_ranks, run_ranks_to_the_end
from tests.runs import small, train_on_rank

HOST = World.from_environment().host


class Fragile(nn.Module):
    """A linear model that comes to grief on one rank, in its forward pass ``at`` (counted from 1)."""

    def __init__(
        self, in_channels: int, num_classes: int, image_size: tuple[int, int], how: str, rank: int, at: int
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels * image_size[0] * image_size[1], num_classes)
        self._how, self._rank, self._at = how, rank, at
        self._calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == self._at and int(os.environ.get("RANK", "0")) == self._rank:
            self._fail()
        result: Tensor = self.linear(images.flatten(1))
        return result

    def _fail(self) -> None:
        if self._how == "raise":
            raise ArithmeticError("planted\nwith a second line")
        os.kill(os.getpid(), getattr(signal, self._how))


def fragile(folder: Path, how: str, *options: str, rank: int = 1, at: int = 4) -> Config:
    """A run of 20 steps that breaks on one rank after ``at - 1`` of them."""
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
        message: The exception's.
        last_line: The last line of what the rank said on stderr.
        seconds: From start to end.
    """

    outcome: str
    message: str
    last_line: str
    seconds: float


def ending(configuration: Config | list[Config]) -> Ending:
    """Trains; a list holds one configuration a rank."""
    rank = int(os.environ.get("RANK", "0"))
    mine = configuration[rank] if isinstance(configuration, list) else configuration
    outcome, message, start = "finished", "", time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            train_on_rank(mine)
        except (Failed, ConfigError) as error:
            outcome, message = type(error).__name__, str(error)
    return Ending(outcome, message, (said.getvalue().splitlines() or [""])[-1], time.monotonic() - start)


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "failure.json").read_text())
    assert set(found) == {"rank", "host", "step", "samples", "error", "traceback", "time", "others"}
    return found


# --- place and device ------------------------------------------------------------------------------------------------


def test_world_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)


def test_without_a_launcher_there_is_one_rank() -> None:
    assert (World.from_environment().rank, World.from_environment().size) == (0, 1)


def test_broken_launcher_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE=two: "):
        World.from_environment()


def test_ranks_without_a_meeting_point_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"^MASTER_PORT=: WORLD_SIZE=2 needs the port"):
        Runtime(small("strategy=ddp", f"run_dir={tmp_path}"), World(0, 2, 0, 2, HOST)).__enter__()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(small(), World(1, 2, 1, 2, HOST)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"^runtime\.device=auto: 3 ranks on this host share 2 GPUs"):
        choose_device(small(), World(1, 3, 1, 3, HOST))


def test_backend_follows_the_device_unless_told() -> None:
    assert choose_backend(small(), torch.device("cpu")) == "gloo"
    assert choose_backend(small(), torch.device("cuda", 0)) == "nccl"
    assert choose_backend(small("runtime.backend=gloo"), torch.device("cuda", 0)) == "gloo"


# --- the run folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)])
def test_generators_seeded_one_by_one_draw_as_if_torch_had_seeded_them(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def draw() -> list[float]:
        return [*torch.rand(3).tolist(), *torch.rand(3, device=device).tolist()]

    torch.manual_seed(2**62 + 5)
    expected = draw()
    for generator in generators(device):
        generator.manual_seed(2**62 + 5)
    assert draw() == expected


def test_twenty_launches_in_one_second_get_twenty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(20) as pool:
        folders = list(pool.map(make_run_dir, [None] * 20))
    assert len(set(folders)) == 20
    assert all(folder.is_dir() and folder.is_relative_to(tmp_path / "outputs") for folder in folders)


def test_explicit_folder_is_made_with_its_parents_and_may_exist(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b"
    assert make_run_dir(str(wanted)) == make_run_dir(str(wanted)) == wanted


@pytest.mark.parametrize("place", ["file", "file/below", "run"])
def test_folder_that_cant_be_made_is_refused(place: str, tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("in the way")
    tmp_path.joinpath("run").mkdir()
    tmp_path.joinpath("run", "logs").write_text("in the way")
    with pytest.raises(ConfigError, match=rf"^run_dir={tmp_path}/{place}: can't be made: "):
        make_run_dir(str(tmp_path / place))


def test_all_ranks_hear_that_the_folder_cant_be_made(tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("in the way")
    endings = run_ranks(ending, 2, small("strategy=ddp", f"run_dir={tmp_path}/file"))
    assert endings[0].message.startswith(f"run_dir={tmp_path}/file: can't be made: ")
    assert endings[1].message == endings[0].message


def train_below(folder: Path, configuration: Config) -> str:
    os.chdir(folder)
    return str(train_on_rank(configuration)["run_dir"])


def test_ranks_share_one_folder_and_log_each_to_a_file_of_its_own(tmp_path: Path) -> None:
    folders = run_ranks(train_below, 3, tmp_path, small("strategy=ddp", "trainer.max_steps=1"))
    assert len(set(folders)) == 1
    assert [str(path) for path in tmp_path.glob("outputs/*/*")] == folders[:1]
    assert sorted(path.name for path in Path(folders[0], "logs").iterdir()) == [f"rank_{i}.log" for i in range(3)]
    assert not Path(folders[0], "failure.json").exists()


# --- agreement -------------------------------------------------------------------------------------------------------


def test_ranks_with_different_configurations_are_refused_with_the_key(tmp_path: Path) -> None:
    options = ("strategy=ddp", f"run_dir={tmp_path}/run")
    configurations = [small(*options, f"optimizer.lr={rate}") for rate in (0.1, 0.1, 0.2)]
    for each in run_ranks(ending, 3, configurations):
        assert each.outcome == "ConfigError"
        assert "differs between ranks" in each.message
        assert f"rank 2 on {HOST}" in each.message
        assert "optimizer.lr: 0.2 ≠ 0.1" in each.message
    assert not tmp_path.joinpath("run").exists()


def come_late(configuration: Config) -> Ending | None:
    return ending(configuration) if os.environ["RANK"] == "0" else None


def test_ranks_that_never_come_are_named(tmp_path: Path) -> None:
    configuration = small("strategy=ddp", "runtime.setup_timeout_seconds=1", f"run_dir={tmp_path}/run")
    alone = run_ranks(come_late, 3, configuration)[0]
    assert alone.outcome == "Failed"
    assert alone.last_line == (
        f"distrain: rank 0 on {HOST} failed at step 0: "
        "RuntimeError: ranks [1, 2] did not come within runtime.setup_timeout_seconds=1"
    )
    assert alone.seconds < 8


def train_twice(folder: Path) -> list[str]:
    return [
        train_on_rank(small("strategy=ddp", "trainer.max_steps=1", f"run_dir={folder}/{i}"))["run_dir"] for i in "ab"
    ]


def test_one_launch_may_run_several_times(tmp_path: Path) -> None:
    assert run_ranks(train_twice, 2, tmp_path) == [[f"{tmp_path}/a", f"{tmp_path}/b"]] * 2


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


def test_runtime_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    handler, handlers = signal.getsignal(signal.SIGTERM), list(logging.getLogger("distrain").handlers)
    with Runtime(small(f"run_dir={tmp_path}"), World.from_environment()):
        assert signal.getsignal(signal.SIGTERM) != handler
        assert len(logging.getLogger("distrain").handlers) > len(handlers)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert logging.getLogger("distrain").handlers == handlers


def test_command_that_only_reads_makes_no_folder(tmp_path: Path) -> None:
    with Runtime(small(f"run_dir={tmp_path}/run"), World.from_environment(), keep_logs=False) as runtime:
        assert runtime.run_dir == tmp_path / "run"
    assert list(tmp_path.iterdir()) == []


# --- failures --------------------------------------------------------------------------------------------------------


def test_rank_that_raises_is_named_by_all(tmp_path: Path) -> None:
    endings = run_ranks(ending, 3, fragile(tmp_path, "raise"))
    line = f"rank 1 on {HOST} failed at step 3: ArithmeticError: planted"
    assert [each.outcome for each in endings] == ["Failed"] * 3
    assert endings[1].last_line == f"distrain: {line}"
    for rank in (0, 2):
        assert endings[rank].last_line == f"distrain: rank {rank} stopped because {line}"
    found = report(tmp_path)
    assert (found["rank"], found["host"], found["step"]) == (1, HOST, 3)
    assert found["error"] == "ArithmeticError: planted"
    assert "in forward" in found["traceback"]
    assert "with a second line" in tmp_path.joinpath("logs", "rank_1.log").read_text()
    assert max(each.seconds for each in endings) < 20


def test_rank_that_is_killed_is_named_by_all_others(tmp_path: Path) -> None:
    endings = run_ranks_to_the_end(ending, 3, fragile(tmp_path, "SIGKILL"))
    assert isinstance(endings[1], RankFailed)
    assert str(endings[1]) == "died with exit code -9"
    line = f"rank 1 on {HOST} failed at step 3: the process exited without reporting an error (killed?)"
    for rank in (0, 2):
        assert endings[rank].last_line == f"distrain: rank {rank} stopped because {line}"
        assert endings[rank].seconds < 20
    assert (report(tmp_path)["rank"], report(tmp_path)["step"]) == (1, 3)


def asked_to_end_before_it_trains(configuration: Config) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(Failed):  # noqa: SIM117
        with Runtime(configuration, World.from_environment()) as runtime:
            if runtime.world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    return said.getvalue().splitlines()[-1]


def test_rank_that_is_asked_to_end_before_it_trains_is_named_by_all(tmp_path: Path) -> None:
    first, second = run_ranks(asked_to_end_before_it_trains, 2, small("strategy=ddp", f"run_dir={tmp_path}"))
    line = f"rank 1 on {HOST} failed at step 0: ended by SIGTERM"
    assert (first, second) == (f"distrain: rank 0 stopped because {line}", f"distrain: {line}")
    assert report(tmp_path)["rank"] == 1


def test_interrupt_from_the_keyboard_is_a_failure_with_a_name(tmp_path: Path) -> None:
    configuration = fragile(tmp_path, "SIGINT", "strategy=single", rank=0)
    alone = run_ranks(interruptible, 1, configuration)[0]
    assert alone.outcome == "Failed"
    assert alone.last_line == f"distrain: rank 0 on {HOST} failed at step 3: KeyboardInterrupt"


def interruptible(configuration: Config) -> Ending:
    # The harness ignores what is typed on its own terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return ending(configuration)


def test_rank_that_stands_still_ends_the_run_in_time(tmp_path: Path) -> None:
    configuration = fragile(tmp_path, "SIGSTOP", "runtime.timeout_seconds=2")
    endings = run_ranks_to_the_end(ending, 2, configuration, timeout=15)
    assert str(endings[1]) == "died with exit code -9"
    line = f"rank 1 on {HOST} failed at step 3: no sign of life for 2 s"
    assert endings[0].last_line.startswith(f"distrain: rank 0 stopped because {line}")
    assert (report(tmp_path)["rank"], report(tmp_path)["step"]) == (1, 3)


def test_failure_of_one_process_is_told_the_same_way(tmp_path: Path) -> None:
    alone = run_ranks(ending, 1, fragile(tmp_path, "raise", "strategy=single", rank=0, at=2))[0]
    assert alone.last_line == f"distrain: rank 0 on {HOST} failed at step 1: ArithmeticError: planted"
    assert report(tmp_path)["rank"] == 0


def fail_when_all_is_done(configuration: Config) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(Failed):  # noqa: SIM117
        with Runtime(configuration, World.from_environment()) as runtime:
            if runtime.is_main:
                raise OSError("no space left")
    return said.getvalue().splitlines()[-1]


def test_failure_after_the_last_step_is_named_too(tmp_path: Path) -> None:
    first, second = run_ranks(fail_when_all_is_done, 2, small("strategy=ddp", f"run_dir={tmp_path}"))
    line = f"rank 0 on {HOST} failed at step 0: OSError: no space left"
    assert first == f"distrain: {line}"
    assert second == f"distrain: rank 1 stopped because {line}"
