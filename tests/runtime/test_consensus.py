"""All ranks stop and save after the same step, and a continued run ends like one that was never stopped."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.config.schema import Config
from distrain.errors import EXIT_STOPPED, Stopped, Terminated
from distrain.health.failure_report import FIRST_FAILURE_KEY, NO_FAILURE
from distrain.runtime import runtime as runtime_module
from distrain.runtime.consensus import AllReduceConsensus, Request, RunControl, SingleRankConsensus
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training.callbacks import Callback
from tests.harness import HANG_SECONDS, run_ranks, soaked
from tests.runs import compose, small, trainer_for
from tests.strategies.helpers import ALONE
from tests.training.test_trainer import DROPOUT, same

LONG = ("trainer.epochs=1000", "scheduler=constant", "trainer.log_every_steps=3", "checkpoint.keep=99")


class SendSignal(Callback):
    """Sends this process a signal after a step."""

    def __init__(self, after: int, number: signal.Signals) -> None:
        self._after = after
        self._number = number

    def on_step_end(self, trainer: Any) -> None:
        if trainer.progress.step == self._after:
            os.kill(os.getpid(), self._number)


def train(
    config: Config, rank: int = 0, after: int = 0, number: signal.Signals = signal.SIGTERM, pause: float = 0.0
) -> dict[str, Any]:
    """Trains; one rank receives a signal after a step. Returns how the run ended.

    Args:
        config: The run's configuration.
        rank: The rank; every other one also pauses after each step.
        after: The step; 0 for none.
        number: The signal.
        pause: Length of the pause in seconds.
    """
    world = World.from_environment()
    strategy = None

    class Slow(Callback):
        def on_step_end(self, trainer: Any) -> None:
            time.sleep(pause if world.rank != rank else 0.0)

    try:
        with Runtime(config, world) as runtime:
            trainer = trainer_for(config, runtime)
            for callback in (Slow(), *([SendSignal(after, number)] if world.rank == rank and after else [])):
                trainer.callbacks.append(callback)
            strategy = trainer.strategy
            trainer.fit()
    except Stopped as stopped:
        return {"stopped": stopped.reason, "step": trainer.progress.step}
    assert strategy is not None
    return {"stopped": None, "step": trainer.progress.step, "model": dict(strategy.model_state())}


def stopped_file(folder: Path) -> dict[str, Any] | None:
    path = folder / "stopped.json"
    return json.loads(path.read_text()) if path.exists() else None


def saved_model(folder: Path, step: int) -> dict[str, Tensor]:
    return dict(checkpoint_reader.load_model(folder / "checkpoints" / f"step_{step:08d}"))


# --- one rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT], ids=lambda each: each.name
)
def test_a_signal_saves_and_stops_and_the_same_command_continues(number: signal.Signals, tmp_path: Path) -> None:
    def config(folder: str, steps: int) -> Config:
        return small(*DROPOUT, *LONG, f"run_dir={tmp_path / folder}", f"trainer.max_steps={steps}")

    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    assert train(config("run", 9), after=7, number=number) == {"stopped": number.name, "step": 7}
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert stopped_file(tmp_path / "run") == {"reason": number.name, "step": 7, "exit_code": EXIT_STOPPED}
    # No evaluation and no summary, but every checkpoint is there.
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "failure.json").exists()
    assert saved_model(tmp_path / "run", 7)
    continued = train(config("run", 9))
    assert (continued["stopped"], continued["step"]) == (None, 9)
    assert stopped_file(tmp_path / "run") is None
    assert same(continued["model"], train(config("whole", 9))["model"])


def test_a_stop_at_the_last_step_of_an_epoch_leaves_its_evaluation_to_the_continued_run(tmp_path: Path) -> None:
    options = (*LONG, f"run_dir={tmp_path}", "trainer.max_steps=6")
    assert train(small(*options), after=5)["step"] == 5
    _, progress = checkpoint_reader.load(tmp_path / "checkpoints" / "step_00000005")
    assert (progress["epoch"], progress["epoch_samples"]) == (0, 48)
    train(small(*options))
    epochs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in epochs if row["kind"] == "epoch"] == [5]


def test_the_time_limit_counts_from_the_start_of_the_run(tmp_path: Path) -> None:
    result = train(small(*LONG, f"run_dir={tmp_path}", "trainer.max_minutes=1e-9"))
    assert result == {"stopped": "trainer.max_minutes", "step": 1}
    assert train(small(*LONG, f"run_dir={tmp_path}", "trainer.max_minutes=99", "trainer.max_steps=4"))["step"] == 4


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_jump_of_the_wall_clock_changes_no_time_limit(hours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("trainer.max_minutes=30", "checkpoint.every_minutes=30")
    control = RunControl(config, Runtime(config, ALONE), SingleRankConsensus())
    wall, monotonic = time.time(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: wall + hours * 3600)
    assert control.agree() == Request.NOTHING
    monkeypatch.setattr(time, "monotonic", lambda: monotonic + 30 * 60 + 1)
    assert control.agree() == Request.TIME_LIMIT | Request.SAVE


def test_a_checkpoint_is_saved_so_many_minutes_after_the_last_one(tmp_path: Path) -> None:
    train(small(*LONG, f"run_dir={tmp_path / 'often'}", "checkpoint.every_minutes=1e-9", "trainer.max_steps=4"))
    train(small(*LONG, f"run_dir={tmp_path / 'rarely'}", "checkpoint.every_minutes=99", "trainer.max_steps=4"))
    steps = {
        folder: [int(path.name[5:]) for path in checkpoint_format.list_checkpoints(tmp_path / folder / "checkpoints")]
        for folder in ("often", "rarely")
    }
    assert steps == {"often": [1, 2, 3, 4], "rarely": [4]}


def test_a_checkpoint_restarts_the_time_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("checkpoint.every_minutes=1")
    control = RunControl(config, Runtime(config, ALONE), SingleRankConsensus())
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 59)
    assert control.agree() == Request.NOTHING
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert control.agree() == Request.SAVE
    control.note_save()
    assert control.agree() == Request.NOTHING
    assert control.agree(Request.REWIND) == Request.REWIND


def test_the_most_urgent_reason_is_given() -> None:
    assert Request.NOTHING.reason is Request.SAVE.reason is (Request.SAVE | Request.REWIND).reason is None
    assert (Request.TIME_LIMIT | Request.SAVE).reason == "trainer.max_minutes"
    assert (Request.TIME_LIMIT | Request.SIGUSR1).reason == "SIGUSR1"
    assert (Request.SIGTERM | Request.SIGUSR1).reason == "SIGTERM"
    assert (Request.LAUNCHER_ENDED | Request.SIGHUP).reason == "the end of its launcher"
    stops = set(Request) - {Request.NOTHING, Request.SAVE, Request.REWIND}
    assert all(request.reason for request in stops)


def test_a_signal_is_a_request_only_while_the_run_is_stoppable(tmp_path: Path) -> None:
    with Runtime(small(f"run_dir={tmp_path}"), ALONE) as runtime:
        runtime.stoppable = True
        # A launcher may forward a signal that every process has received already.
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert runtime.stop_requested == "SIGTERM"
        runtime.stoppable, runtime.stop_requested = False, None
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


# --- agreement by all-reduce -----------------------------------------------------------------------------------------


def agree_on_requests(
    steps: int, rank: int, first_step: int, all_pauses: list[list[float]], wait_if_infrequent: bool, every: int
) -> list[list[tuple[int, int]]]:
    """Takes steps of a given length; one rank makes a request from a step on, until it is part of a result.

    Returns:
        For each choice of pauses, the results that are not empty, each with its step.
    """
    world = World.from_environment()
    step = 0
    results = []

    def synchronised() -> bool:
        return step % every == 0

    with Runtime(small("strategy=ddp", "data.batch_size=30"), world, keep_logs=False) as runtime:
        group = runtime.control_group()
        for pauses in all_pauses:
            request, agreed = Request.NOTHING, []
            consensus = AllReduceConsensus(group, synchronised, wait_if_infrequent=wait_if_infrequent)
            for step in range(1, steps + 1):
                time.sleep(pauses[world.rank])
                if world.rank == rank and step == first_step:
                    request = Request.SIGUSR1 | Request.SAVE
                if result := consensus.agree(request):
                    agreed.append((step, int(result)))
                    request = Request.NOTHING
            consensus.close()
            results.append(agreed)
    return results


def test_three_ranks_agree_on_a_request_once_and_after_the_same_step() -> None:
    pauses = [[0.0, 0.0, 0.0], [0.001, 0.004, 0.002], [0.01, 0.0, 0.0]]
    first, *others = run_ranks(agree_on_requests, 3, 150, 2, 9, pauses, True, 1)
    assert others == [first] * 2
    for ((step, request),) in first:
        assert request == Request.SIGUSR1 | Request.SAVE
        assert step > 9


def test_with_long_steps_the_result_comes_after_the_step_of_the_request() -> None:
    results = run_ranks(agree_on_requests, 2, 3, 1, 3, [[0.0, 0.6]], True, 1)
    assert results == [[[(3, Request.SIGUSR1 | Request.SAVE)]]] * 2


def test_ranks_with_independent_steps_agree_only_when_they_synchronise() -> None:
    first, second = run_ranks(agree_on_requests, 2, 200, 1, 12, [[0.0, 0.002]], False, 10)
    assert first == second
    (((step, _),),) = first
    assert step % 10 == 0


# --- several ranks ---------------------------------------------------------------------------------------------------

STRATEGIES = {
    "ddp": (3, ("strategy=ddp",)),
    "pipeline": (2, ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=2")),
    "local_sgd": (2, ("strategy=local_sgd", "strategy.sync_every=4")),
    "sync": (3, ("strategy=parameter_server", "strategy.mode=sync")),
    "async": (4, ("strategy=parameter_server", "strategy.mode=async", "strategy.servers=2")),
}


@pytest.mark.parametrize("name", soaked(STRATEGIES, ("ddp", "async")))
def test_all_ranks_stop_after_the_same_step_whichever_gets_the_signal(name: str, tmp_path: Path) -> None:
    ranks, options = STRATEGIES[name]

    def config(folder: str, *more: str) -> Config:
        return small(*options, *LONG, f"run_dir={tmp_path / folder}", *more)

    results = run_ranks(train, ranks, config("run"), 1, 6, signal.SIGUSR1, 0.002)
    stop = stopped_file(tmp_path / "run")
    assert stop is not None
    assert (stop["reason"], stop["exit_code"]) == ("SIGUSR1", 75)
    step = stop["step"]
    assert {result["stopped"] for result in results} == {"SIGUSR1"}
    servers = {"sync": 1, "async": 2}.get(name, 0)
    assert {result["step"] for result in results[: ranks - servers]} == {step}
    assert step > 6
    # Ranks of local_sgd agree when they merge, and between the batches of an evaluation, after an epoch of 5 steps.
    assert name != "local_sgd" or step % 4 == 0 or step % 5 == 0
    _, progress = checkpoint_reader.load(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    assert (progress["step"], progress["samples"]) == (step, step // 5 * 48 + step % 5 * 10)
    if name != "local_sgd":
        return
    # A run that was stopped and continued equals one that was never stopped, bit for bit.
    more = f"trainer.max_steps={step + 3}"
    run_ranks(train, ranks, config("run", more))
    assert stopped_file(tmp_path / "run") is None
    run_ranks(train, ranks, config("whole", more))
    for part in ("model", "optimizer"):
        ours, theirs = (
            checkpoint_reader.load(tmp_path / f / "checkpoints" / f"step_{step + 3:08d}")[0] for f in ("run", "whole")
        )
        assert same(ours[part], theirs[part])


def test_a_server_that_gets_a_signal_passes_the_request_to_the_workers(tmp_path: Path) -> None:
    results = run_ranks(
        send_signal_to_server, 3, small("strategy=parameter_server", "strategy.mode=ssp", *LONG, f"run_dir={tmp_path}")
    )
    assert [result["stopped"] for result in results] == ["SIGTERM"] * 3


def send_signal_when_serving(runtime: Runtime) -> None:
    # Until then a signal is no request to stop, but the end of the process.
    while not (runtime.stoppable and runtime.activity.phase == "serving"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def send_signal_to_server(config: Config) -> dict[str, Any]:
    world = World.from_environment()
    try:
        with Runtime(config, world) as runtime:
            trainer = trainer_for(config, runtime)
            if world.rank == 2:
                threading.Thread(target=send_signal_when_serving, args=(runtime,)).start()
            trainer.fit()
    except Stopped as stopped:
        return {"stopped": stopped.reason}
    return {"stopped": None}


# --- failures --------------------------------------------------------------------------------------------------------


def get_signal_after_a_failure(config: Config) -> str:
    world = World.from_environment()
    try:
        with Runtime(config, world) as runtime:
            if world.rank == 0:
                raise ValueError("broken")
            assert runtime._store is not None
            while runtime._store.get(FIRST_FAILURE_KEY) == NO_FAILURE.encode():
                time.sleep(0.01)
            runtime.stoppable = True
            os.kill(os.getpid(), signal.SIGTERM)
            RunControl(config, runtime, SingleRankConsensus()).agree()
    except Exception as error:
        return repr(error.__cause__)
    return "continued"


def test_a_signal_caused_by_another_ranks_failure_is_no_request(tmp_path: Path) -> None:
    outcomes = run_ranks(get_signal_after_a_failure, 2, small("strategy=ddp", f"run_dir={tmp_path}"))
    assert "broken" in outcomes[0]
    assert "Terminated" in outcomes[1]
    assert json.loads((tmp_path / "failure.json").read_text())["rank"] == 0


def start_times(config: Config) -> list[float]:
    times = []
    for attempt in range(2):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        # As in a process that the launcher has restarted.
        runtime_module._RUN_NUMBERS = itertools.count()
        time.sleep(0.05)
        with Runtime(config, World.from_environment(), keep_logs=False) as runtime:
            times.append(runtime.start_time)
    return times


def test_a_restarted_run_counts_from_the_start_of_its_first_attempt() -> None:
    results = run_ranks(start_times, 2, compose("strategy=ddp"))
    assert len({each for times in results for each in times}) == 1
    assert 0 < time.monotonic() - results[0][0] < HANG_SECONDS
