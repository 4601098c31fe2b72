"""Stopping and saving: all ranks do it after the same step, nothing is lost, and the run goes on as if nothing was."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.cli import app
from distrain.config.schema import Config
from distrain.errors import EXIT_STOPPED, Stopped, Terminated
from distrain.health.failure_report import CLAIM, NO_CLAIM
from distrain.runtime import runtime as runtime_module
from distrain.runtime.consensus import AllReduceConsensus, Request, RunControl, SingleRankConsensus
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.parameter_server.stop_decision import Bulletin
from distrain.training.callbacks import Callback
from distrain.training.trainer import Trainer
from tests.harness import run_ranks
from tests.runs import compose, small
from tests.strategies.helpers import ALONE
from tests.training.test_trainer import DROPOUT, same

LONG = ("trainer.epochs=1000", "scheduler=constant", "trainer.log_every_steps=3", "checkpoint.keep=99")


class Sends(Callback):
    """Sends this process a signal after a step."""

    def __init__(self, after: int, number: signal.Signals) -> None:
        self._after = after
        self._number = number

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.progress.step == self._after:
            os.kill(os.getpid(), self._number)


def train(
    config: Config, who: int = 0, after: int = 0, number: signal.Signals = signal.SIGTERM, pause: float = 0.0
) -> dict[str, Any]:
    """A rank's run, in which rank ``who`` gets a signal after a step; what became of it.

    Args:
        config: The run's.
        who: The rank; every other one also pauses after each step.
        after: The step; 0 for none.
        number: The signal.
        pause: Seconds.
    """
    world = World.from_environment()
    strategy = None

    class Slow(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            time.sleep(pause if world.rank != who else 0.0)

    try:
        with Runtime(config, world) as runtime:
            trainer = app.build_trainer(config, runtime, app.source(config).load())
            trainer.callbacks += [Slow(), *([Sends(after, number)] if world.rank == who and after else [])]
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
    return checkpoint_reader.load_model(folder / "checkpoints" / f"step_{step:08d}")


# --- one rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    def config(folder: str, steps: int) -> Config:
        return small(*DROPOUT, *LONG, f"run_dir={tmp_path / folder}", f"trainer.max_steps={steps}")

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    assert train(config("run", 9), after=7, number=number) == {"stopped": number.name, "step": 7}
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert stopped_file(tmp_path / "run") == {"reason": number.name, "step": 7, "exit_code": EXIT_STOPPED}
    # No evaluation and no summary, but every checkpoint is there.
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "failure.json").exists()
    assert saved_model(tmp_path / "run", 7)
    gone_on = train(config("run", 9))
    assert (gone_on["stopped"], gone_on["step"]) == (None, 9)
    assert stopped_file(tmp_path / "run") is None
    assert same(gone_on["model"], train(config("whole", 9))["model"])


def test_a_stop_at_an_epoch_s_last_step_leaves_its_evaluation_to_the_run_that_goes_on(tmp_path: Path) -> None:
    options = (*LONG, f"run_dir={tmp_path}", "trainer.max_steps=6")
    assert train(small(*options), after=5)["step"] == 5
    _, progress = checkpoint_reader.load(tmp_path / "checkpoints" / "step_00000005")
    assert (progress["epoch"], progress["epoch_samples"]) == (0, 48)
    train(small(*options))
    epochs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in epochs if row["kind"] == "epoch"] == [5]


def test_time_is_up_counted_from_the_beginning_of_the_run(tmp_path: Path) -> None:
    found = train(small(*LONG, f"run_dir={tmp_path}", "trainer.max_minutes=1e-9"))
    assert found == {"stopped": "trainer.max_minutes", "step": 1}
    assert train(small(*LONG, f"run_dir={tmp_path}", "trainer.max_minutes=99", "trainer.max_steps=4"))["step"] == 4


def test_a_checkpoint_comes_so_many_minutes_after_the_last(tmp_path: Path) -> None:
    train(small(*LONG, f"run_dir={tmp_path / 'often'}", "checkpoint.every_minutes=1e-9", "trainer.max_steps=4"))
    train(small(*LONG, f"run_dir={tmp_path / 'seldom'}", "checkpoint.every_minutes=99", "trainer.max_steps=4"))
    steps = {
        folder: [int(path.name[5:]) for path in checkpoint_format.list_checkpoints(tmp_path / folder / "checkpoints")]
        for folder in ("often", "seldom")
    }
    assert steps == {"often": [1, 2, 3, 4], "seldom": [4]}


def test_a_save_starts_the_time_anew(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_most_urgent_reason_is_told() -> None:
    assert Request.NOTHING.reason is Request.SAVE.reason is (Request.SAVE | Request.REWIND).reason is None
    assert (Request.TIME_LIMIT | Request.SAVE).reason == "trainer.max_minutes"
    assert (Request.TIME_LIMIT | Request.SIGUSR1).reason == "SIGUSR1"
    assert (Request.SIGTERM | Request.SIGUSR1).reason == "SIGTERM"


def test_a_signal_is_a_request_only_where_ranks_can_agree(tmp_path: Path) -> None:
    with Runtime(small(f"run_dir={tmp_path}"), ALONE) as runtime:
        runtime.stoppable = True
        # A launcher may hand on what every process got already.
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert runtime.stop_requested == "SIGTERM"
        runtime.stoppable, runtime.stop_requested = False, None
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


# --- rounds ----------------------------------------------------------------------------------------------------------


def go_round(
    steps: int, who: int, when: int, all_pauses: list[list[float]], prompt: bool, every: int
) -> list[list[tuple[int, int]]]:
    """Takes steps of which each lasts a while; rank ``who`` wishes for something from a step on, until it is heard.

    Returns:
        For each choice of pauses, what was heard after which step.
    """
    world = World.from_environment()
    step = 0
    found = []

    def met() -> bool:
        return step % every == 0

    with Runtime(small("strategy=ddp", "data.batch_size=30"), world, keep_logs=False) as runtime:
        aside = runtime.control_group()
        for pauses in all_pauses:
            wish, heard = Request.NOTHING, []
            rounds = AllReduceConsensus(aside, met, wait_if_infrequent=prompt)
            for step in range(1, steps + 1):
                time.sleep(pauses[world.rank])
                if world.rank == who and step == when:
                    wish = Request.SIGUSR1 | Request.SAVE
                if now := rounds.agree(wish):
                    heard.append((step, int(now)))
                    wish = Request.NOTHING
            rounds.close()
            found.append(heard)
    return found


def test_three_ranks_hear_a_wish_after_the_same_step_and_once() -> None:
    pauses = [[0.0, 0.0, 0.0], [0.001, 0.004, 0.002], [0.01, 0.0, 0.0]]
    first, *others = run_ranks(go_round, 3, 150, 2, 9, pauses, True, 1)
    assert others == [first] * 2
    for ((step, wish),) in first:
        assert wish == Request.SIGUSR1 | Request.SAVE
        assert step > 9


def test_with_long_steps_the_answer_comes_after_the_same_one() -> None:
    found = run_ranks(go_round, 2, 3, 1, 3, [[0.0, 0.6]], True, 1)
    assert found == [[[(3, Request.SIGUSR1 | Request.SAVE)]]] * 2


def test_ranks_that_train_apart_agree_only_where_they_met() -> None:
    first, second = run_ranks(go_round, 2, 200, 1, 12, [[0.0, 0.002]], False, 10)
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


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_ranks_stop_after_the_same_step_whoever_is_asked(name: str, tmp_path: Path) -> None:
    ranks, options = STRATEGIES[name]

    def config(folder: str, *more: str) -> Config:
        return small(*options, *LONG, f"run_dir={tmp_path / folder}", *more)

    found = run_ranks(train, ranks, config("run"), 1, 6, signal.SIGUSR1, 0.002)
    told = stopped_file(tmp_path / "run")
    assert told is not None
    assert (told["reason"], told["exit_code"]) == ("SIGUSR1", 75)
    step = told["step"]
    assert {each["stopped"] for each in found} == {"SIGUSR1"}
    servers = {"sync": 1, "async": 2}.get(name, 0)
    assert {each["step"] for each in found[: ranks - servers]} == {step}
    assert step > 6
    assert name != "local_sgd" or step % 4 == 0
    _, progress = checkpoint_reader.load(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    assert (progress["step"], progress["samples"]) == (step, step // 5 * 48 + step % 5 * 10)
    if name != "local_sgd":
        return
    # Stopped and gone on with is never stopped, bit for bit.
    more = f"trainer.max_steps={step + 3}"
    run_ranks(train, ranks, config("run", more))
    assert stopped_file(tmp_path / "run") is None
    run_ranks(train, ranks, config("whole", more))
    for part in ("model", "optimizer"):
        ours, theirs = (
            checkpoint_reader.load(tmp_path / f / "checkpoints" / f"step_{step + 3:08d}")[0] for f in ("run", "whole")
        )
        assert same(ours[part], theirs[part])


def test_a_server_that_is_asked_asks_the_workers(tmp_path: Path) -> None:
    found = run_ranks(
        asked_server, 3, small("strategy=parameter_server", "strategy.mode=ssp", *LONG, f"run_dir={tmp_path}")
    )
    assert [each["stopped"] for each in found] == ["SIGTERM"] * 3


def asked_server(config: Config) -> dict[str, Any]:
    world = World.from_environment()
    try:
        with Runtime(config, world) as runtime:
            trainer = app.build_trainer(config, runtime, app.source(config).load())
            if world.rank == 2:
                # When it serves, and the workers have begun.
                threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            trainer.fit()
    except Stopped as stopped:
        return {"stopped": stopped.reason}
    return {"stopped": None}


def test_a_decision_is_for_a_step_that_no_worker_has_passed() -> None:
    draw = random.Random(0)
    for _ in range(300):
        in_flight, workers = draw.choice([0, 1]), draw.choice([1, 2, 4])
        board = Bulletin(in_flight)
        pushes = [0] * workers
        knows: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
        acted: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
        for _ in range(60):
            rank = draw.randrange(workers)
            # Waits for the others where something was decided, as trainers do when they save.
            if acted[rank] and acted[rank][-1][0] == pushes[rank] and min(pushes) < pushes[rank]:
                continue
            pushes[rank] += 1
            board.hear(draw.choice([0, 0, 0, 1, 8]), pushes[rank], pushes)
            knows[rank].append((board.step, board.wishes))
            # The answer to a push is there when the steps under way are over.
            answered = len(knows[rank]) - 1 - in_flight
            if answered >= 0 and knows[rank][answered][0] == pushes[rank]:
                acted[rank].append(knows[rank][answered])
        done = min(pushes)
        assert len({tuple(each for each in one if each[0] <= done) for one in acted}) == 1


# --- failures --------------------------------------------------------------------------------------------------------


def signalled_after_a_failure(config: Config) -> str:
    world = World.from_environment()
    try:
        with Runtime(config, world) as runtime:
            if world.rank == 0:
                raise ValueError("broken")
            assert runtime._store is not None
            while runtime._store.get(CLAIM) == NO_CLAIM.encode():
                time.sleep(0.01)
            runtime.stoppable = True
            os.kill(os.getpid(), signal.SIGTERM)
            RunControl(config, runtime, SingleRankConsensus()).agree()
    except Exception as error:
        return repr(error.__cause__)
    return "went on"


def test_a_signal_that_comes_because_another_rank_failed_is_no_request(tmp_path: Path) -> None:
    found = run_ranks(signalled_after_a_failure, 2, small("strategy=ddp", f"run_dir={tmp_path}"))
    assert "broken" in found[0]
    assert "Terminated" in found[1]
    assert json.loads((tmp_path / "failure.json").read_text())["rank"] == 0


def began(config: Config) -> list[float]:
    times = []
    for attempt in range(2):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        # As in a process that the launcher has started anew.
        runtime_module._BEGINNINGS = itertools.count()
        time.sleep(0.05)
        with Runtime(config, World.from_environment(), keep_logs=False) as runtime:
            times.append(runtime.start_time)
    return times


def test_a_restarted_run_began_when_its_first_attempt_did() -> None:
    found = run_ranks(began, 2, compose("strategy=ddp"))
    assert len({each for times in found for each in times}) == 1
    assert abs(found[0][0] - time.time()) < 60
