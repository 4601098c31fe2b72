"""In sync mode a parameter server trains as one process does; in async and ssp mode a run survives a dead worker."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distrain.config.schema import Config
from distrain.data.batch import Batch
from distrain.data.sampler import shard_bounds
from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.strategies.parameter_server.strategy import ParameterServer
from tests.harness import RankFailed, run_ranks, run_ranks_to_the_end, soaked
from tests.runs import NormNet, check, relative_difference, small, train_on_rank
from tests.runtime.test_runtime import Ending, train_to_the_end

SERVER = "strategy=parameter_server"
NORM_NET = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=group")
#: 48 images in batches of 10: no batch is divisible by the number of workers.
COMMON = ("trainer.epochs=100", "trainer.max_steps=30", "resume=never", *NORM_NET)
#: Optimizers, each in one precision.
OPTIMIZERS = {
    "gradient descent": ("optimizer=sgd", "optimizer.lr=0.01", "trainer.precision=fp32"),
    "momentum": ("optimizer=sgd", "optimizer.lr=0.01", "optimizer.momentum=0.9", "trainer.precision=fp64"),
    "adam": ("optimizer=adam", "optimizer.eps=1e-3", "scheduler=cosine", "trainer.precision=fp32"),
    "clipped": ("optimizer=adamw", "optimizer.eps=1e-3", "trainer.grad_clip_norm=0.1", "trainer.precision=fp64"),
}
TOLERANCES = {"fp32": 1e-5, "fp64": 1e-12}


def train_all(configurations: list[Config]) -> list[dict[str, Any]]:
    """Trains each configuration in turn in the same processes, because processes are slow to start."""
    return [train_on_rank(configuration) for configuration in configurations]


def train_on(ranks: int, configurations: list[Config]) -> list[dict[str, Any]]:
    """Trains each configuration on so many ranks and returns the results of rank 0."""
    results: list[dict[str, Any]] = run_ranks(train_all, ranks, configurations)[0]
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parameter_server")


@functools.cache
def train_serially(folder: Path) -> list[dict[str, Any]]:
    """The results of one process with each optimizer."""
    return train_on(1, [small(*COMMON, *options, f"run_dir={folder}/serial") for options in OPTIMIZERS.values()])


@pytest.mark.parametrize("ranks", soaked([(1, 2), (3, 1), (2, 2)], [(3, 1), (2, 2)]), ids=str)
def test_sync_mode_trains_as_one_process_does(ranks: tuple[int, int], folder: Path) -> None:
    workers, servers = ranks
    # Buckets of a few tensors each, and accumulated gradients.
    common = (SERVER, f"strategy.servers={servers}", "strategy.bucket_mb=0.002", "trainer.micro_batch_size=3")
    configurations = [
        small(*COMMON, *options, *common, f"run_dir={folder}/{workers}{servers}") for options in OPTIMIZERS.values()
    ]
    results = train_on(workers + servers, configurations)
    for configuration, run, expected in zip(configurations, results, train_serially(folder), strict=True):
        tolerance = TOLERANCES[configuration.trainer.precision]
        assert relative_difference(run["model"], expected["model"]) <= tolerance
        for count in ("test_correct", "test_count", "samples", "steps"):
            assert run["summary"][count] == expected["summary"][count]
        assert run["summary"]["test_loss"] == pytest.approx(expected["summary"]["test_loss"], rel=1e-4)
        assert run["summary"]["mesh"] == {"server": servers, "worker": workers}


def test_a_step_sends_the_bytes_of_one_push_and_one_pull(folder: Path) -> None:
    configuration = small(*COMMON, SERVER, "trainer.precision=fp32", f"run_dir={folder}/bytes")
    run = train_on(3, [configuration])[0]
    parameters = sum(tensor.numel() for tensor in NormNet(3, 4, "group").parameters())
    summary = run["summary"]
    assert summary["bytes_uncompressed_per_step"] == 2 * 2 * 4 * parameters
    assert summary["bytes_sent_per_step"] == summary["bytes_uncompressed_per_step"]
    statistics = summary["parameter_server"]
    assert statistics["bytes_pushed"] == statistics["bytes_pulled"] == 30 * 2 * 4 * parameters
    assert statistics["updates"] == 30
    assert [worker["steps"] for worker in statistics["workers"]] == [30, 30]
    assert statistics["staleness"] == {"mean": 0.0, "max": 0, "histogram": {"0": 60}}
    assert [sorted(shard) for shard in statistics["shards"]] == [["bytes", "tensors"]]
    assert sum(shard["bytes"] for shard in statistics["shards"]) == 4 * parameters


# --- async and ssp ---------------------------------------------------------------------------------------------------


#: 4 epochs of 48 images; the workers wait for each other at the end of each epoch.
STEPS_OF_EPOCH = 5


def train_with_lead(runs: list[tuple[Config, int]]) -> list[dict[str, Any]]:
    """Trains each configuration; before a step, worker 1 waits until worker 0 is as many steps further in its epoch."""
    results = []
    for configuration, lead in runs:
        # An integer of eight bytes is written in one piece.
        begun = Path(f"{configuration.run_dir}.begun")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ParameterServer, "train_step", delayed(ParameterServer.train_step, begun, lead))
            results.append(train_on_rank(configuration))
    return results


def delayed(train_step: Callable[..., Any], begun: Path, lead: int) -> Callable[..., Any]:
    """A training step that tells how many steps worker 0 has begun, and that worker 1 begins when they are enough."""
    rank, step = int(os.environ["RANK"]), 0

    def wait_and_train(strategy: ParameterServer, batch: Batch) -> Any:
        nonlocal step
        enough = min(step + lead, step // STEPS_OF_EPOCH * STEPS_OF_EPOCH + STEPS_OF_EPOCH - 1) + 1
        step += 1
        if rank == 0:
            begun.write_bytes(step.to_bytes(8, "big"))
        if rank == 1:
            while not (begun.exists() and int.from_bytes(begun.read_bytes(), "big") >= enough):
                time.sleep(0.001)
            # Time for worker 0 to get further than it may.
            time.sleep(0.02)
        return train_step(strategy, batch)

    return wait_and_train


def test_the_staleness_bound_holds_and_without_it_a_fast_worker_runs_ahead(folder: Path) -> None:
    ends = (*NORM_NET, SERVER, "trainer.epochs=4")
    bounds: list[int | None] = [0, 2, None]
    configurations = [
        small(*ends, "strategy.mode=ssp", f"strategy.staleness={bound}", f"run_dir={folder}/{bound}")
        for bound in bounds[:-1]
    ]
    configurations.append(small(*ends, "strategy.mode=async", f"run_dir={folder}/free"))
    # Of the two steps that the bound allows one may be in flight.
    runs = list(zip(configurations, [0, 1, 3], strict=True))
    for bound, run in zip(bounds, run_ranks(train_with_lead, 3, runs)[0], strict=True):
        summary = run["summary"]
        statistics = summary["parameter_server"]
        assert (summary["steps"], statistics["samples"], statistics["updates"]) == (4 * STEPS_OF_EPOCH, 192, 40)
        ahead = max(worker["steps_ahead_max"] for worker in statistics["workers"])
        assert ahead == bound if bound is not None else ahead >= 3
        histogram = statistics["staleness"]["histogram"]
        assert sum(histogram.values()) == 40
        assert statistics["staleness"]["mean"] > 0
        assert summary["test_count"] == 31
        assert math.isfinite(summary["train_loss"])


def fragile(folder: Path, how: str, rank: int, *options: str) -> Config:
    """3 epochs, in which a rank fails in its 8th forward pass, which is in the second epoch."""
    return small(
        "model=custom",
        "model._target_=tests.runtime.test_runtime.Fragile",
        f"+model.kwargs={{how:{how},rank:{rank},at:8}}",
        SERVER,
        "trainer.epochs=3",
        f"run_dir={folder}",
        "strategy.worker_timeout_seconds=5",
        *options,
    )


def samples_seen(worker: int, workers: int, steps: int) -> int:
    """Number of samples in a worker's part of the first ``steps`` batches of an epoch."""
    sizes = [10, 10, 10, 10, 8][:steps]
    bounds = [shard_bounds(size, worker, workers) for size in sizes]
    return sum(end - start for start, end in bounds)


def test_the_run_continues_without_a_killed_worker_and_sees_all_other_samples(tmp_path: Path) -> None:
    configuration = fragile(
        tmp_path, "SIGKILL", 1, "strategy.mode=async", "strategy.servers=2", "data.val_fraction=0.1"
    )
    endings = run_ranks_to_the_end(train_to_the_end, 5, configuration)
    assert isinstance(endings[1], RankFailed)
    assert "died with exit code -9" in str(endings[1])
    for rank in (0, 2, 3, 4):
        assert isinstance(endings[rank], Ending)
        assert endings[rank].outcome == "finished", endings[rank]
    assert not (tmp_path / "failure.json").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    statistics = summary["parameter_server"]
    (lost,) = statistics["lost_workers"]
    assert (lost["rank"], lost["reason"]) == (1, "the connection broke off")
    # Its last push may have been lost on the way.
    done = lost["after_steps"]
    # The evaluation after the first epoch is a forward pass too.
    assert done in (5, 6, 7)
    workers = {worker["rank"]: worker for worker in statistics["workers"]}
    assert workers[1]["samples"] == samples_seen(1, 3, 5) + samples_seen(1, 3, done - 5)
    for position, rank in enumerate((0, 2)):
        # Two epochs are divided among three workers; the third among the two that are left.
        assert workers[rank]["samples"] == 2 * samples_seen(rank, 3, 5) + samples_seen(position, 2, 5)
        assert workers[rank]["steps"] == 15
    assert summary["test_count"] == 31
    assert "WORKER LOST: rank 1" in (tmp_path / "logs" / "rank_0.log").read_text()
    assert "worker rank 1" in (tmp_path / "logs" / "rank_3.log").read_text()


def test_a_failing_worker_reports_its_error_and_the_others_continue(tmp_path: Path) -> None:
    endings = run_ranks_to_the_end(train_to_the_end, 3, fragile(tmp_path, "raise", 1, "strategy.mode=ssp"))
    assert [end.outcome for end in endings] == ["finished", "Failed", "finished"]
    assert endings[1].last_line.endswith("ArithmeticError: planted; the other ranks continue")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parameter_server"]["lost_workers"][0]["reason"] == "ArithmeticError: planted"
    assert not (tmp_path / "failure.json").exists()


@pytest.mark.parametrize(
    ("mode", "rank", "who"),
    [("sync", 1, "worker"), ("async", 2, "server"), ("async", 0, "worker")],
    ids=["sync worker", "async server", "async worker"],
)
def test_losing_a_required_rank_ends_the_run_with_its_name(mode: str, rank: int, who: str, tmp_path: Path) -> None:
    endless = ("trainer.epochs=100000",) if who == "server" else ()
    configuration = fragile(tmp_path, "SIGKILL", rank, f"strategy.mode={mode}", *endless)
    endings = run_ranks_to_the_end(ending_of_server if who == "server" else train_to_the_end, 3, configuration)
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["error"]) == (rank, "the process exited without reporting an error (killed?)")
    assert failure["step"] > 0
    for other in {0, 1, 2} - {rank}:
        assert endings[other].outcome == "Failed"
        assert f"rank {rank}" in endings[other].last_line
        assert endings[other].seconds < 60


def ending_of_server(configuration: Config) -> Ending:
    """As :func:`train_to_the_end`, but rank 2, a server, kills itself some time after the first checkpoint.

    The ranks know of each other's steps from heartbeats, one a second.
    """
    if os.environ["RANK"] == "2":
        import signal
        import threading

        def die() -> None:
            while not list(Path(str(configuration.run_dir)).glob("checkpoints/step_*")):
                time.sleep(0.01)
            time.sleep(2.5)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=die, daemon=True).start()
    return train_to_the_end(configuration)


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_run_resumes_with_another_strategy_and_other_servers(tmp_path: Path) -> None:
    def configure(steps: int, *strategy: str, where: str = "moved") -> Config:
        # Adam, because it has the most state; a constant rate, because a schedule would end with each part of the run.
        common = (*NORM_NET, "scheduler=constant", "optimizer.eps=1e-3", "trainer.precision=fp64")
        return small(
            *common, "trainer.epochs=100", f"trainer.max_steps={steps}", f"run_dir={tmp_path}/{where}", *strategy
        )

    expected = train_on(1, [configure(16, where="whole"), configure(3)])[0]
    # From one process to two servers in the middle of an epoch, then to one server, and on with the same one.
    train_on(4, [configure(6, SERVER, "strategy.servers=2"), configure(9, SERVER), configure(12, SERVER)])
    resumed = train_on(1, [configure(16)])[0]
    assert relative_difference(resumed["model"], expected["model"]) <= 1e-12
    assert resumed["summary"]["test_correct"] == expected["summary"]["test_correct"]


def test_an_async_run_is_saved_with_all_steps_pushed(tmp_path: Path) -> None:
    def configure(steps: int, *strategy: str) -> Config:
        limits = ("trainer.epochs=100", f"trainer.max_steps={steps}", "scheduler=constant", "checkpoint.every_steps=3")
        return small(*NORM_NET, *limits, f"run_dir={tmp_path}/moved", *strategy)

    asynchronous = (SERVER, "strategy.mode=async", "strategy.servers=2", "strategy.overlap=true", "checkpoint.keep=9")
    first, second = train_on(4, [configure(7, *asynchronous), configure(10, *asynchronous)])
    saved = [int(path.name.removeprefix("step_")) for path in (tmp_path / "moved" / "checkpoints").iterdir()]
    assert sorted(saved) == [3, 5, 6, 7, 9, 10]
    assert first["summary"]["samples"] + second["summary"]["parameter_server"]["samples"] == 48 + 48
    for step in saved:
        optimizer = load_file(tmp_path / "moved" / "checkpoints" / f"step_{step:08d}" / "optimizer.safetensors")
        # Two workers; each push is an update.
        assert {int(tensor) for name, tensor in optimizer.items() if name.endswith("/step")} == {2 * step}
    assert train_on(1, [configure(12)])[0]["summary"]["steps"] == 12


def test_a_sync_run_with_residuals_resumes_bit_for_bit(tmp_path: Path) -> None:
    common = (*NORM_NET, SERVER, "compression=topk", "compression.density=0.1", "compression.min_elements=1")

    def configure(steps: int, where: str) -> Config:
        limits = ("trainer.epochs=100", f"trainer.max_steps={steps}", "scheduler=constant")
        return small(*common, *limits, f"run_dir={tmp_path}/{where}")

    whole, half, rest = train_on(3, [configure(12, "whole"), configure(7, "halves"), configure(12, "halves")])
    assert half["summary"]["steps"] == 7
    assert all(torch.equal(rest["model"][name], tensor) for name, tensor in whole["model"].items())
    assert 0 < whole["summary"]["bytes_sent_per_step"] < 0.8 * whole["summary"]["bytes_uncompressed_per_step"]


def test_compressed_pushes_give_the_results_of_ddp(tmp_path: Path) -> None:
    # These compressors choose values tensor by tensor, so it doesn't matter which server holds a tensor.
    names = ("topk", "randomk")
    common = (*COMMON, "optimizer=sgd", "optimizer.lr=0.01", "trainer.precision=fp64", "compression.min_elements=1")

    def configure(compression: str, *strategy: str) -> Config:
        return small(*common, f"compression={compression}", *strategy, f"run_dir={tmp_path}/{compression}")

    expected = train_on(2, [configure(name, "strategy=ddp") for name in names])
    results = train_on(4, [configure(name, SERVER, "strategy.servers=2") for name in names])
    for run, ddp_run in zip(results, expected, strict=True):
        assert relative_difference(run["model"], ddp_run["model"]) <= 1e-12
        assert run["summary"]["compression_ratio"] > 1.5
        assert run["summary"]["compression_report"]["residual_norm"] > 0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ((), 1, "strategy=parameter_server: needs a server and a worker, and 1 started"),
        (("strategy.servers=3",), 3, "strategy.servers=3: leaves no worker among 3 ranks; choices: 1, 2"),
        (("strategy.servers=9",), 12, "strategy.servers=9: the model has only 8 tensors to hold"),
        (("compression=auto",), 2, "compression=auto: needs collectives; gradients are sent to servers instead"),
        (("trainer.precision=fp16",), 2, "trainer.precision=fp16: would need a loss scale that all workers share"),
        (("data.batch_size=2",), 4, "data.batch_size=2: the global batch is smaller than the 3 ranks that share it"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(overrides: tuple[str, ...], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(small(SERVER, *overrides), World(0, ranks, 0, ranks, "here"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("strategy.staleness=1",), "strategy.staleness=1: is a bound for mode=ssp, not sync"),
        (("strategy.overlap=true",), "strategy.overlap=true: mode=sync computes each step with all earlier ones"),
        (
            ("strategy.mode=ssp", "strategy.staleness=0", "strategy.overlap=true"),
            "strategy.overlap=true: a step under way is one step of staleness; it needs 1",
        ),
        (("strategy.mode=hogwild",), "strategy.mode=hogwild: unknown choice; choices: sync, async, ssp"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(SERVER, *overrides)
    assert message in str(caught.value)


def test_a_batch_of_one_sample_per_worker_is_accepted() -> None:
    check(small(SERVER, "data.batch_size=2"), World(0, 3, 0, 3, "here"))
