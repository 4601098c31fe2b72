"""Callbacks are called at the documented points, keep state in checkpoints, and an error in one stops all ranks."""

from __future__ import annotations

import http.server
import json
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distrain
from distrain.api import handover
from distrain.api.training import Training
from distrain.cli import app
from distrain.config.schema import Config
from distrain.errors import ConfigError, Failed, Stopped
from distrain.reporting import figures
from distrain.reporting.loggers.base import InMemoryLogger
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training import chosen_callbacks
from distrain.training.callback_list import CallbackList
from distrain.training.callbacks import Callback, RunEnd, RunView
from distrain.training.ready_callbacks.notify import Notify
from tests.harness import run_ranks
from tests.runs import check, launched, small, trainer_for

ME = __name__


class Recorder(Callback):
    """Writes down what happens, and counts steps in its state."""

    events: list[str] = []  # noqa: RUF012 - of all objects, since the run makes them

    def __init__(self, fail_in: str = "", at: int = 0) -> None:
        self.fail_in, self.at, self.steps, self.mean = fail_in, at, 0, torch.zeros(2)

    def _note(self, event: str, run: RunView) -> None:
        self.events.append(f"{event} {run.progress.step}")
        if self.fail_in == event and run.progress.step >= self.at:
            raise ValueError("no such thing")

    def on_fit_start(self, run: RunView) -> None:
        self._note("start", run)

    def on_step_end(self, run: RunView) -> None:
        self.steps += 1
        self.mean += 1.5
        self._note("step", run)

    def on_log(self, run: RunView, values: Mapping[str, float]) -> None:
        assert values["train/loss"] > 0
        self._note("log", run)

    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        assert values["epoch/train_loss"] > 0
        self._note("epoch", run)

    def on_fit_end(self, run: RunView) -> None:
        self._note("fit_end", run)

    def on_end(self, run: RunView, end: RunEnd) -> None:
        self._note(f"{end.status} {end.reason or len(end.summary) > 10}", run)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert isinstance(state["mean"], Tensor)
        self.events.append(f"load {state['steps']} {state['mean'].tolist()}")
        self.steps, self.mean = state["steps"], state["mean"]


def recorded(*arguments: str, run_dir: Path, kwargs: str = "{}") -> list[str]:
    Recorder.events.clear()
    chosen = f"callbacks=[{{_target_: {ME}.Recorder, kwargs: {kwargs}}}]"
    app.train(small(f"run_dir={run_dir}", "trainer.epochs=2", "trainer.log_every_steps=2", chosen, *arguments))
    return list(Recorder.events)


def test_events_come_in_order_and_state_goes_on_after_an_error_that_names_the_callback(tmp_path: Path) -> None:
    with pytest.raises(Failed):
        recorded(
            *("checkpoint.every_steps=2", "checkpoint.background=false"),
            run_dir=tmp_path,
            kwargs="{fail_in: step, at: 3}",
        )
    failure = json.loads((tmp_path / "failure.json").read_text())
    problem = f"CallbackFailed: callback Recorder failed in on_step_end (ValueError: no such thing) at {__file__}:"
    assert failure["error"].startswith(problem)
    *events, last = Recorder.events
    assert events == ["start 0", "step 1", "step 2", "log 2", "step 3", "fit_end 3"]
    assert last.startswith(f"failed {problem}")
    events = recorded(run_dir=tmp_path)
    steps = ["step 3", "step 4", "log 4", "step 5", "epoch 5"]
    steps += ["step 6", "log 6", "step 7", "step 8", "log 8", "step 9", "step 10", "log 10", "epoch 10"]
    assert events == ["load 2 [3.0, 3.0]", "start 2", *steps, "fit_end 10", "finished True 10"]


def test_what_fails_at_the_end_of_a_run_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    class AtTheEnd(Callback):
        def on_fit_end(self, run: RunView) -> None:
            raise KeyError("x")

        def on_end(self, run: RunView, end: RunEnd) -> None:
            raise KeyError("y")

    run: Any = None
    callbacks = CallbackList([], {"mine": AtTheEnd()})
    with pytest.raises(ZeroDivisionError), callbacks.ending(run), callbacks.fitting(run):
        raise ZeroDivisionError
    assert [message.split(" (")[0] for message in caplog.messages] == [
        "callback mine failed in on_fit_end",
        "callback mine failed in on_end",
    ]


def test_a_run_that_is_stopped_ends_with_the_reason() -> None:
    ends = []

    class AtTheEnd(Callback):
        def on_end(self, run: RunView, end: RunEnd) -> None:
            ends.append(end)

    run: Any = None
    with pytest.raises(Stopped), CallbackList([AtTheEnd()]).ending(run):
        raise Stopped("SIGTERM", 7)
    assert ends == [RunEnd("stopped", "SIGTERM")]


@pytest.mark.parametrize(
    ("value", "problem"), [({1, 2}, "a set"), (torch.zeros(1).to_sparse(), "sparse"), ((1, 2), "a tuple")]
)
def test_state_that_a_checkpoint_cannot_hold_is_refused(value: Any, problem: str) -> None:
    class Keeper(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"kept": value}

    with pytest.raises(RuntimeError, match=rf"callback mine failed in state_dict .*'kept', .*{problem}"):
        CallbackList([], {"mine": Keeper()}).add_state({"scalars": {}})


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("filtres", "callbacks=filtres: no such callback; .*did you mean filters"),
        ("{name: filters, kwargs: {size: 3}}", "unexpected keyword argument 'size'"),
        ("{name: filters, kwargs: {every_epochs: 0}}", "every_epochs=0 must be at least 1"),
        ("notify", "callbacks=notify: fails to build .*needs a url, a command or both"),
        ("{name: notify, kwargs: {url: ftp://x}}", "must begin with http"),
        ("{name: notify, kwargs: {command: ls, when: [ended]}}", "must be a list of some of finished, stopped, failed"),
        ("{_target_: torch.nn.Linear}", "is not a class of distrain.Callback"),
        ("{kwargs: {a: 1}}", "needs a name, or a _target_"),
        ("filters,filters", "is named twice"),
        ("3", "each is a name, or a mapping"),
    ],
)
def test_callbacks_that_cannot_be_used_are_refused_before_ranks_meet(chosen: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(small(f"callbacks=[{chosen}]"), World.from_environment())


# How ranks stop when one fails is tested for any error in tests/health.
@pytest.mark.soak
def test_a_failing_callback_of_one_rank_stops_all(tmp_path: Path) -> None:
    tmp_path.joinpath("mine.py").write_text(
        "import distrain\n\n\nclass Mine(distrain.Callback):\n"
        "    def on_step_end(self, run):\n"
        "        if run.runtime.world.rank == 1 and run.progress.step == 3:\n"
        "            raise ValueError('not mine')\n"
    )
    arguments = ["nproc=2", "strategy=ddp", "run_dir=run", "logger=none", "trainer.epochs=2", "runtime.device=cpu"]
    ended = launched(tmp_path, "train", *arguments, "callbacks=[{_target_: mine.Mine}]", timeout=120)
    assert ended.returncode == 1, ended.stderr
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert (failure["rank"], failure["step"]) == (1, 3)
    assert "callback Mine failed in on_step_end (ValueError: not mine)" in failure["error"]
    assert "callback Mine failed in on_step_end" in ended.stderr


# --- ready-made ones -------------------------------------------------------------------------------------------------


class Pictures(InMemoryLogger):
    """Also keeps histograms."""

    def __init__(self) -> None:
        super().__init__()
        self.histograms: dict[tuple[int, str], list[int]] = {}

    def histogram(self, step: int, name: str, counts: Any, edges: Any) -> None:
        assert len(edges) == len(counts) + 1
        assert -12 <= edges[0] < edges[-1] <= 1
        assert min(counts[0], counts[-1]) > 0
        self.histograms[step, name] = list(counts)


def pictures_of_rank(config: Config) -> Any:
    """The histograms and figures that rank 0 logs, and the number of values of each parameter."""
    with Runtime(config, World.from_environment()) as runtime:
        trainer = trainer_for(config, runtime)
        logger = trainer.report.logger = Pictures()
        trainer.fit()
        sizes = {name: tensor.numel() for name, tensor in trainer.strategy.model_state().items()}
        return logger.histograms, logger.figures, sizes


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_histograms_have_each_gradient_once_also_where_ranks_divide_the_model(ranks: int, tmp_path: Path) -> None:
    arguments = ["callbacks=[gradient_histograms,filters]", "trainer.epochs=1", "trainer.log_every_steps=2"]
    config = small(*arguments, f"run_dir={tmp_path}")
    if ranks == 1:
        histograms, drawn, sizes = pictures_of_rank(config)
    else:
        pipeline = small(*arguments, f"run_dir={tmp_path}", "strategy=pipeline", "strategy.stages=2")
        (histograms, drawn, sizes), *others = run_ranks(pictures_of_rank, 2, pipeline)
        assert [other[:2] for other in others] == [({}, [])]
    assert {step for step, _ in histograms} == {2, 4}
    assert {name for _, name in histograms} == {f"gradients_log10/{name}" for name in sizes}
    assert all(sum(counts) == sizes[name.removeprefix("gradients_log10/")] for (_, name), counts in histograms.items())
    assert [picture for picture in drawn if picture[1] == "epoch/filters"] == [
        (0, "epoch/filters"),
        (5, "epoch/filters"),
    ]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_filters_are_drawn_side_by_side(channels: int) -> None:
    weights = torch.randn(5, channels, 3, 3)
    (image,) = figures.filters(weights).axes[0].get_images()
    pixels = image.get_array()
    assert pixels is not None
    # Two rows of three, with a margin.
    assert pixels.shape == ((9, 13, 3) if channels == 3 else (9, 13))
    assert (pixels.min(), pixels.max()) == (0, 1)


def ended(callback: Notify, end: RunEnd) -> None:
    run: Any = type("Run", (), {})()
    run.runtime = type("Runtime", (), {"run_dir": Path("runs/a")})()
    run.progress = type("Progress", (), {"step": 7})()
    run.task = type("Task", (), {"score": "accuracy"})()
    callback.on_end(run, end)


def test_a_notification_reaches_an_address_and_a_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if received[-1]["status"] == "failed" else 204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    script = "import os, pathlib, sys; pathlib.Path('told').write_text(os.environ['DISTRAIN_TEXT'] + sys.stdin.read())"
    try:
        notify = Notify(
            f"http://127.0.0.1:{server.server_port}/hook",
            [sys.executable, "-c", script.replace("told", str(tmp_path / "told"))],
            when=["finished", "failed"],
        )
        ended(notify, RunEnd("finished", summary={"test_accuracy": 0.9, "bad": float("nan")}))
        ended(notify, RunEnd("stopped", "SIGTERM"))
        assert caplog.messages == []
        ended(notify, RunEnd("failed", "ValueError: x"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    text = f"distrain: {Path('runs/a').resolve()} finished at step 7: test_accuracy 0.9000"
    assert received[0]["text"] == text
    assert received[0]["summary"] == {"test_accuracy": 0.9, "bad": None}
    assert [content["status"] for content in received] == ["finished", "failed"]
    assert caplog.messages == ["callback notify: the address failed (HTTPError: HTTP Error 500: Internal Server Error)"]
    assert (tmp_path / "told").read_text().startswith("distrain: ")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ended(Notify(command="no-such-command"), RunEnd("finished"))
    assert caplog.messages[0].startswith("callback notify: the command no-such-command failed (FileNotFoundError")


def test_only_rank_0_has_what_draws() -> None:
    config = small("callbacks=[filters,gradient_histograms]")
    assert [*chosen_callbacks.build(config, is_main=False)] == ["gradient_histograms"]
    assert [*chosen_callbacks.build(config, is_main=True)] == ["filters", "gradient_histograms"]


class Count(distrain.Callback):
    """Counts steps and epochs."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, run: RunView) -> None:
        self.steps += 1


def test_a_program_gives_objects_names_and_mappings(tmp_path: Path) -> None:
    counts = Count(), Count()
    images, labels = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    filters = {"name": "filters", "kwargs": {"every_epochs": 2}}
    callbacks: list[Any] = [counts[0], "gradient_histograms", counts[1], filters]
    settings: dict[str, Any] = {"run_dir": tmp_path, "epochs": 2, "batch_size": 8, "logger": ["csv", "none"]}
    run = distrain.fit(model, (images, labels), callbacks=callbacks, keys={"trainer.progress": "off"}, **settings)
    assert [count.steps for count in counts] == [6, 6]
    assert [entry["name"] for entry in run.config["callbacks"]] == [
        "Count",
        "gradient_histograms",
        "Count_2",
        "filters",
    ]
    assert (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ("filters", "callbacks: must be a list of callbacks, not str"),
        ([3], "callbacks=int: is neither an object of a subclass of distrain.Callback, nor a name, nor a mapping"),
    ],
)
def test_what_is_no_list_of_callbacks_is_refused(callbacks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distrain.fit("simple_cnn", "digits", callbacks=callbacks)


def test_objects_reach_started_ranks_or_are_refused(tmp_path: Path) -> None:
    count = Count()
    count.steps = 5
    tmp_path.chmod(0o700)
    handover.write(Training(small(), None, None, {"Count": count}), tmp_path)
    sent = handover.read(tmp_path).callbacks["Count"]
    assert isinstance(sent, Count)
    assert sent.steps == 5
    vars(count)["file"] = threading.Lock()
    with pytest.raises(ConfigError, match=r"callbacks: Count can't be sent to other processes \(TypeError: "):
        handover.write(Training(small(), None, None, {"Count": count}), tmp_path)
