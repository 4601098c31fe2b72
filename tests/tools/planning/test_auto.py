"""``strategy=auto``: what is chosen, and that a run keeps its choice."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from distrain.cli import app
from distrain.config.schema import Config
from distrain.errors import ConfigError, Stopped
from distrain.files.untrusted import read_json
from distrain.runtime.world import World
from distrain.strategies.auto import AutoConfig
from distrain.tools.planning import auto, calibration, engine
from distrain.tools.planning.plan import Plan, Trial
from distrain.tools.planning.plan_file import planned_part
from distrain.tools.planning.prediction import Memory, Prediction
from distrain.training.run_plan import RunPlan
from tests.harness import run_ranks
from tests.runs import small
from tests.tools.planning.workloads import cluster, workload

DDP = {"strategy": "ddp"}
PIPELINE = {
    "strategy": "pipeline",
    "strategy.stages": "2",
    "strategy.schedule": "gpipe",
    "strategy.microbatches": "2",
}
MERGING = {"strategy": "local_sgd", "strategy.sync_every": "4"}
SERVER = {"strategy": "parameter_server", "strategy.servers": "1"}
ASKED = AutoConfig("auto", ["ddp", "pipeline"], min_gain=0.03, trials=1, trial_seconds=1.0)


def predicted(keys: dict[str, str], seconds: float, *, memory: float = 0.0) -> Prediction:
    same = keys["strategy"] != "local_sgd"
    parts = {"compute": seconds, "compression": 0.0, "update": 0.0, "waiting": 0.0, "stragglers": 0.0}
    return Prediction(keys, parts, 0.0, Memory(memory, 0.0, 0.0, 0.0), same_as_single=same)


def plan(*predictions: Prediction, measured: tuple[float, ...] = (), memory: float | None = None) -> Plan:
    """A plan; the trials are of the order in which they are asked for."""
    ranked = sorted(predictions, key=lambda one: one.seconds)
    made = Plan(workload(), dataclasses.replace(cluster(1, 2), memory_bytes=memory), ranked, [])
    asked = auto.to_try(made, ASKED)[: len(measured)]
    return dataclasses.replace(made, trials=[Trial(*pair) for pair in zip(asked, measured, strict=True)])


@pytest.mark.parametrize(
    ("made", "keys", "why"),
    [
        (plan(predicted(DDP, 1.0), predicted(PIPELINE, 0.98)), DDP, "of 2 configurations of pipeline, ddp none is fas"),
        (plan(predicted(DDP, 1.0), predicted(MERGING, 0.5)), DDP, "of 1 configuration of ddp none is faster by 3%"),
        (plan(predicted(DDP, 1.0), predicted(PIPELINE, 0.9)), PIPELINE, "900 ms a step predicted, ddp 1,000 ms"),
        # Runs in the order ddp, pipeline, pipeline, ddp.
        (
            plan(predicted(DDP, 1.0), predicted(PIPELINE, 0.9), measured=(0.1, 0.09, 0.095, 0.11)),
            PIPELINE,
            "95 ms a step measured, ddp 100 ms; chosen among 2 configurations of pipeline, ddp",
        ),
        (
            plan(predicted(DDP, 1.0), predicted(PIPELINE, 0.9), measured=(0.1, 0.09, 0.098, 0.11)),
            DDP,
            "100 ms a step measured; strategy=pipeline .* but took 98 ms; chosen among",
        ),
        (
            plan(predicted(DDP, 1.0), predicted(PIPELINE, 0.9), measured=(0.2, 0.098, 0.1, 0.1)),
            DDP,
            "100 ms a step measured; strategy=pipeline strategy.stages=2 .* was predicted to take 900 ms instead of",
        ),
        (plan(predicted(PIPELINE, 0.9), predicted(SERVER, 0.8)), SERVER, "ddp is not among them"),
        (plan(predicted(MERGING, 0.9)), DDP, "nothing that was planned trains what one process trains"),
        (
            plan(predicted(DDP, 1.0), predicted(PIPELINE, 0.5, memory=100.0), predicted(SERVER, 0.7), memory=50.0),
            SERVER,
            "among 2 configurations",
        ),
    ],
)
def test_the_fastest_is_chosen_that_trains_the_same_fits_and_is_faster_than_ddp_by_enough(
    made: Plan, keys: dict[str, str], why: str
) -> None:
    # Where a test has no measured times, the prediction decides.
    asked = dataclasses.replace(ASKED, trials=len(made.trials) // 4)
    chosen, reason = auto.decide(made, asked)
    assert chosen == keys
    assert re.search(why, reason), reason


def test_what_may_be_faster_is_run_before_and_after_ddp_has_been() -> None:
    made = plan(*(predicted(keys, seconds) for keys, seconds in ((DDP, 1.0), (PIPELINE, 0.8), (SERVER, 0.9))))
    assert [one.keys for one in auto.to_try(made, ASKED)] == [DDP, PIPELINE, PIPELINE, DDP]
    more = dataclasses.replace(ASKED, trials=5)
    assert [one.keys for one in auto.to_try(made, more)] == [DDP, PIPELINE, SERVER, SERVER, PIPELINE, DDP]
    assert auto.to_try(made, dataclasses.replace(ASKED, trials=0)) == []
    assert auto.to_try(plan(predicted(DDP, 1.0), predicted(PIPELINE, 0.99)), ASKED) == []


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("compression=qsgd",), r"compression=qsgd: changes what is trained, and strategy=auto keeps"),
        (("optimizer.groups=[{match: nothing.here}]",), r"optimizer\.groups\[0\]\.match"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_no_strategy_can_train_is_refused_before_ranks_meet(keys: tuple[str, ...], line: str, ranks: int) -> None:
    with pytest.raises(ConfigError, match=line):
        app.check(small("strategy=auto", *keys), World(0, ranks, 0, ranks, "here"))


def test_two_ranks_both_train() -> None:
    config = small("strategy=auto")
    assert auto.options_for(config, 3).strategies == ("ddp", "fsdp", "pipeline", "parameter_server")
    assert auto.options_for(config, 2).strategies == ("ddp", "fsdp", "pipeline")
    served = small("strategy=auto", "strategy.strategies=[parameter_server]")
    assert auto.options_for(served, 2).strategies == ("parameter_server",)
    assert auto.options_for(small("strategy=auto", "strategy.strategies=[ddp,mesh]"), 4).strategies == ("ddp", "mesh")


def test_commands_that_choose_nothing_refuse_it() -> None:
    config = small("strategy=auto")
    with pytest.raises(ConfigError, match=r"strategy=auto: is chosen at the start of a training; here, name the str"):
        RunPlan.resolve(config, World(0, 2, 0, 2, "here"))


def kept(folder: Path, config: Config, ranks: int = 2) -> dict[str, Any]:
    return auto.earlier_choice(config, folder, auto.what_it_holds_for(config, [ranks], ["cpu of 2 processors"]))


def test_a_choice_is_kept_as_long_as_it_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = small("strategy=auto")
    holds_for = auto.what_it_holds_for(config, [2], ["cpu of 2 processors"])
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"chosen": {"keys": PIPELINE, "for": holds_for}}))
    # What doesn't change a step's time may change.
    longer = small("strategy=auto", "trainer.epochs=50", "optimizer.lr=0.5", "seed=3")
    assert kept(tmp_path, longer)["chosen"]["keys"] == PIPELINE
    # The folder of a run that goes on from a checkpoint of the first one.
    from_checkpoint = small("strategy=auto", f"resume={tmp_path}/checkpoints/step_00000003")
    assert kept(tmp_path / "new", from_checkpoint)["chosen"]["keys"] == PIPELINE
    assert caplog.text == ""
    for changed, why in (("data.batch_size=12", "data.batch_size was 10 and is 12"), ("strategy.trials=2", "was 1")):
        assert kept(tmp_path, small("strategy=auto", changed)) == {}
        assert why in caplog.text
    assert kept(tmp_path, config, ranks=3) == {}
    assert "chosen anew, since ranks_of_hosts was [2] and is [3]" in caplog.text
    assert kept(tmp_path, small("strategy=auto", "resume=never")) == {}
    wrong = [{"strategy": "../../etc"}, {"strategy": "ddp", "strategy.bucket_mb": "["}]
    for content in ("{", '{"chosen": 3}', *(json.dumps({"chosen": {"keys": keys, "for": {}}}) for keys in wrong)):
        file.write_text(content)
        caplog.clear()
        assert kept(tmp_path, config) == {}
        assert "plan.json is not used" in caplog.text


def runs_with_a_planted_measurement(folder: Path) -> tuple[dict[str, Any], auto.Choice]:
    """Trains with a plan in which a pipeline is faster, goes on where no plan can be made, and stops while it plans."""

    def config(steps: int) -> Config:
        return small("strategy=auto", f"run_dir={folder}", f"trainer.max_steps={steps}")

    def no_plan(*_: Any) -> Plan:
        raise AssertionError("the choice is known")

    with pytest.MonkeyPatch.context() as patch:
        made = plan(predicted(DDP, 0.2), predicted(PIPELINE, 0.15))
        made = dataclasses.replace(made, training=planned_part(config(3)))
        patch.setattr(engine, "make_plan", lambda *_: made)
        patch.setattr(
            calibration, "step_seconds", lambda run, *_: 0.1 if run.config.strategy.name == "pipeline" else 0.2
        )
        first = app.train(config(3))
        patch.setattr(engine, "make_plan", no_plan)
        second = auto.resolve(config(5), World.from_environment())

        def asked_to_stop(*_: Any) -> Plan:
            if World.from_environment().rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return plan(predicted(DDP, 0.2))

        patch.setattr(engine, "make_plan", asked_to_stop)
        with pytest.raises(Stopped, match="stopped by SIGTERM at step 0"):
            app.train(small("strategy=auto", f"run_dir={folder}_3"))
        return first, second


def test_a_run_trains_with_the_winner_says_so_and_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, second = run_ranks(runs_with_a_planted_measurement, 2, folder)[0]
    assert (first["strategy"], first["steps"]) == ("pipeline", 3)
    assert (first["predicted"]["step_ms"], first["predicted"]["trial_ms"]) == (150.0, 100.0)
    assert second.line.endswith("strategy.microbatches=2, as chosen when this run began (plan.json)")
    assert (second.config.strategy.name, second.config.run_dir) == ("pipeline", str(folder))
    written = yaml.safe_load((folder / "config.yaml").read_text())["strategy"]
    assert (written["name"], written["schedule"], written["microbatches"]) == ("pipeline", "gpipe", 2)
    log = (folder / "logs" / "rank_0.log").read_text()
    assert log.count("strategy=auto: measuring for some seconds") == 1
    assert "strategy.microbatches=2, 100 ms a step measured, ddp 200 ms; chosen among 2 configurations of pipel" in log
    assert not (folder / ".trials").exists()


def measured_run(folder: Path) -> list[dict[str, Any]]:
    # So much faster is nothing, so plain ddp is chosen.
    asked = ("strategy=auto", "strategy.strategies=[ddp]", "strategy.min_gain=0.95")
    # A layout by trial may be another one in each run, and rounds in another way.
    both = ("trainer.max_steps=5", "trainer.memory_format=contiguous")
    chosen = small(*asked, *both, f"run_dir={folder / 'auto'}")
    named = small("strategy=ddp", *both, f"run_dir={folder / 'ddp'}")
    return [app.train(chosen), app.train(named)]


def test_a_measured_choice_trains_what_the_strategy_trains_that_is_named(tmp_path: Path) -> None:
    auto_run, named = run_ranks(measured_run, 2, tmp_path)[0]
    for name in ("strategy", "train_loss", "test_loss", "test_accuracy", "samples", "bytes_sent_per_step"):
        assert auto_run[name] == named[name]
    assert "predicted" not in named
    assert auto_run["predicted"]["step_ms"] > 0
    memory = auto_run["memory_by_kind_mb"]
    assert memory["predicted"].keys() == memory["measured"].keys()
    assert memory["predicted"]["activations"] == pytest.approx(memory["measured"]["activations"], abs=0.2)
    assert sum(auto_run["predicted"]["time_share"].values()) == pytest.approx(1)
    chosen = read_json(tmp_path / "auto" / "plan.json", 1 << 24)["chosen"]
    assert chosen["keys"] == DDP
    assert chosen["for"]["ranks_of_hosts"] == [2]
