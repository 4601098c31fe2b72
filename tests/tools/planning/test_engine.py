"""Plans of small trainings that one process measures."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import nn

from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.tools.planning import engine, measurement, step_timer, trial_run
from distrain.tools.planning.engine import Options
from distrain.tools.planning.phases import PhaseClock
from distrain.tools.planning.plan import Plan
from tests.runs import small

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, host="here")
LINK = "{latency_us: 10, gbit_per_s: 10}"


@pytest.fixture(autouse=True)
def measured_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this file asks for a measured time, and a good one takes seconds."""
    monkeypatch.setattr(step_timer, "_STEP_SECONDS", 0.0)
    monkeypatch.setattr(measurement, "_BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(trial_run, "_SECONDS", 0.0)


def described(folder: Path, hosts: int, more: str = "") -> Path:
    path = folder / "cluster.yaml"
    path.write_text(f"hosts: {hosts}\nranks_per_host: 1\nwithin: {LINK}\nbetween: {LINK}\n{more}")
    return path


def planned(options: Options, *keys: str) -> Plan:
    def config_of(chosen: Mapping[str, str]) -> Config:
        return small(*keys, *(f"{key}={value}" for key, value in chosen.items()))

    with tempfile.TemporaryDirectory() as folder:
        checked = engine.check(small(*keys), ALONE, options)
        return engine.make_plan(checked, ALONE, options, config_of, Path(folder), PhaseClock())


def test_only_what_is_trained_is_sent() -> None:
    everything = planned(Options()).workload
    adapters = planned(Options(), "lora.rank=2").workload
    assert 0 < adapters.gradient_bytes < everything.gradient_bytes
    # The adapters come on top of what is frozen.
    assert adapters.held_bytes > everything.held_bytes == everything.gradient_bytes
    # Adam has two numbers for each that is trained, and counts its steps.
    assert adapters.optimizer_bytes == pytest.approx(2 * adapters.gradient_bytes, rel=0.2)


@pytest.mark.parametrize(
    ("batch_size", "key", "sizes"), [(40, "null", [2, 10]), (8, "null", [2, 4]), (40, "5", [2, 5])]
)
def test_a_step_of_a_described_cluster_is_measured_on_one_share(
    tmp_path: Path, batch_size: int, key: str, sizes: list[int]
) -> None:
    options = Options(described(tmp_path, 4), ("ddp",))
    made = planned(options, f"data.batch_size={batch_size}", f"trainer.micro_batch_size={key}")
    assert sorted(made.workload.outside) == sizes
    assert (made.workload.batch_size, made.cluster.ranks) == (batch_size, 4)


def test_a_batch_is_no_larger_than_the_data_and_what_depends_on_memory_is_left_out() -> None:
    by_memory = ("trainer.micro_batch_size=auto", "model.checkpoint_activations=2")
    made = planned(Options(strategies=("single",)), "data.batch_size=1000", *by_memory)
    # Of 53 samples, 5 validate.
    assert made.workload.batch_size == 48
    assert any(remark.startswith("trainer.micro_batch_size=auto is planned as one pass") for remark in made.remarks)


@pytest.mark.parametrize(
    ("key", "left", "remark"),
    [
        ("optimizer.lookahead.every=5", {"ddp", "fsdp"}, "no local_sgd: optimizer.lookahead.every=5: "),
        ("optimizer.sam_rho=0.05", {"ddp"}, "no fsdp: optimizer.sam_rho=0.05: "),
        ("optimizer=muon", {"ddp", "local_sgd"}, "no fsdp: optimizer.name=muon: "),
    ],
)
def test_strategies_that_refuse_the_training_are_left_out_with_the_reason(
    tmp_path: Path, key: str, left: set[str], remark: str
) -> None:
    options = Options(described(tmp_path, 2), ("ddp", "fsdp", "local_sgd"))
    made = planned(options, key)
    assert {prediction.keys["strategy"] for prediction in made.predictions} == left
    assert any(one.startswith(remark) for one in made.remarks), made.remarks
    # A step of two rounds is measured in one.
    assert (made.workload.rounds, made.workload.sharpness_seconds > 0) == ((2, True) if "sam" in key else (1, False))


def test_a_training_that_no_strategy_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lookahead\.every=5"):
        planned(Options(described(tmp_path, 2), ("local_sgd",)), "optimizer.lookahead.every=5")


class VectorNormNet(nn.Sequential):
    """Normalises vectors, so that it can't train on a single sample."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64 * in_channels, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))


def test_what_leaves_a_sample_alone_is_left_out_if_the_model_needs_several(tmp_path: Path) -> None:
    model = ("model=custom", f"model._target_={__name__}.VectorNormNet", "data.batch_size=4")
    made = planned(Options(described(tmp_path, 4), ("ddp", "local_sgd")), *model)
    # ddp takes the statistics of all four.
    assert [prediction.keys for prediction in made.predictions if "strategy.batchnorm" in prediction.keys] == []
    assert {prediction.keys["strategy"] for prediction in made.predictions} == {"ddp"}
    assert sorted(remark.partition(": ")[0] for remark in made.remarks) == ["no local_sgd", "not all of ddp"]


class Indivisible(nn.Sequential):
    """Its only layer makes the outputs, which every rank must have whole."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def test_layers_are_divided_to_see_what_a_rank_has_of_them(tmp_path: Path) -> None:
    options = Options(described(tmp_path, 2), ("ddp", "tensor_parallel"))
    workload = planned(options).workload
    (divided,) = workload.divided
    held = sum(block.held_bytes for block in divided.blocks)
    # The largest layers are divided, and their optimizer's state with them.
    assert 0.5 * workload.held_bytes < held < 0.6 * workload.held_bytes
    assert 0.5 * workload.optimizer_bytes < divided.optimizer_bytes < 0.6 * workload.optimizer_bytes
    assert sum(block.flops for block in divided.blocks) < 0.9 * sum(block.flops for block in workload.blocks)
    assert [block.name for block in divided.blocks] == [block.name for block in workload.blocks]
    assert any(block.forward_sums for block in divided.blocks)
    refused = planned(options, "model=custom", f"model._target_={__name__}.Indivisible")
    assert refused.workload.divided == ()
    problem = "no layers are divided among 2 ranks: strategy.plan: no layer of Indivisible was found that 2 ranks can"
    assert any(remark.startswith(problem) for remark in refused.remarks), refused.remarks


def test_layers_are_divided_for_each_cut_of_a_mesh_and_what_is_refused_is_left_out(tmp_path: Path) -> None:
    # It is no optimizer of parts of parameters.
    made = planned(Options(described(tmp_path, 4), ("mesh",)), "optimizer=muon")
    whole, staged = made.workload.divided
    assert (whole.ranks, whole.starts, staged.ranks) == (2, (0,), 2)
    assert len(staged.starts) == 2
    # Layers of one stage are not divided together with those of another one, so each stage ends with whole activations.
    assert sum(block.held_bytes for block in staged.blocks) >= sum(block.held_bytes for block in whole.blocks)
    assert {tuple(key for key in one.keys if ".mesh." in key) for one in made.predictions} == {
        ("strategy.mesh.data", "strategy.mesh.pipeline")
    }
    assert any(remark.startswith("not all of mesh: optimizer.name=muon: ") for remark in made.remarks), made.remarks


def test_a_described_device_has_times_by_its_operations(tmp_path: Path) -> None:
    device = "device: {tflops: 1.0e-6, gbyte_per_s: 1.0e+6, launch_us: 0}"
    made = planned(Options(described(tmp_path, 2, device), ("ddp",)))
    # 5 samples at 10^6 operations a second.
    flops = sum(block.flops for block in made.workload.blocks)
    assert made.workload.forward_seconds(5) == pytest.approx(5 * flops / 1e6)
