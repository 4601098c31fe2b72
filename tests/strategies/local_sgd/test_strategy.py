"""strategy=local_sgd compared with a simulation of its ranks in one process, and its promises."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import writer as checkpoint_writer
from distrain.checkpoint.progress import Progress
from distrain.communication.collectives import ring_all_reduce_bytes
from distrain.data.batch import Batch
from distrain.data.sampler import shard_bounds
from distrain.errors import ConfigError
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.local_sgd.strategy import LocalSGD
from distrain.strategies.replicated import Replicated
from tests.harness import HANG_SECONDS, run_ranks, soaked
from tests.runs import check, relative_difference, small, train_on_rank
from tests.strategies.helpers import batch, drawn, parameters, set_up
from tests.strategies.local_sgd.simulation import (
    CASES,
    SIZES,
    Case,
    Simulation,
    batches,
    network,
)

# --- what each rank runs ---------------------------------------------------------------------------------------------

FP64 = "trainer.precision=fp64"
LATE = CASES["late fragments"].overrides()


def local_sgd(runtime: Runtime, model: nn.Module, *overrides: str) -> LocalSGD:
    return cast(LocalSGD, set_up(model, small("optimizer=sgd", "strategy=local_sgd", *overrides), runtime))


def share(whole: Batch, strategy: Replicated) -> Batch:
    return batch(whole.inputs, whole.targets, strategy.data_shard)


def train(strategy: Replicated, steps: slice = slice(None)) -> Tensor:
    """This rank's copy after some of the steps."""
    for whole in batches()[steps]:
        strategy.train_step(share(whole, strategy))
    return parameters(strategy.model)


def state_vector(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten().double() for name in sorted(tensors)])


def record_run(runtime: Runtime, case: Case) -> dict[str, Any]:
    """This rank's copy after each step, and the merged model at some of them."""
    strategy = local_sgd(runtime, network(), *case.overrides())
    found: dict[str, Any] = {"copies": [], "merged": {}, "metrics": []}
    for step, whole in enumerate(batches()):
        result = strategy.train_step(share(whole, strategy))
        assert result.count == len(share(whole, strategy))
        found["copies"].append(parameters(strategy.model))
        found["metrics"].append(strategy.metrics())
        if step % 5 == 4:
            strategy.model_state()
            found["merged"][step] = parameters(strategy.model)
    return found


def distance_to_ddp(runtime: Runtime) -> dict[str, Any]:
    """Relative difference between merging after every step and ddp, after many steps with uneven shares."""

    def distance(dtype: torch.dtype, *overrides: str, moments: bool = False) -> float:
        precision = "fp64" if dtype == torch.float64 else "fp32"
        options = ("optimizer.lr=0.05", "optimizer.weight_decay=0.01", f"trainer.precision={precision}", *overrides)
        own = ("strategy.sync_every=1", f"strategy.average_optimizer_state={str(moments).lower()}")
        ddp = set_up(network().to(dtype), small("strategy=ddp", "optimizer=sgd", *options), runtime)
        merging = local_sgd(runtime, network().to(dtype), *options, *own)
        for whole in batches():
            whole.inputs = whole.inputs.to(dtype)
            for strategy in (ddp, merging):
                strategy.train_step(share(whole, strategy))
        there, here = ({n: p.detach() for n, p in s.model.named_parameters()} for s in (ddp, merging))
        return relative_difference(here, there)

    return {
        "fp32": distance(torch.float32),
        "fp64": distance(torch.float64),
        "momentum": distance(torch.float64, "optimizer.momentum=0.9", moments=True),
    }


def distance_to_ddp_on_two_ranks(folder: Path) -> dict[str, Any]:
    with Runtime(small("strategy=local_sgd", f"run_dir={folder}"), World.from_environment()) as runtime:
        return distance_to_ddp(runtime)


def with_and_without_evaluation(runtime: Runtime) -> dict[str, Tensor]:
    """This rank's copy with and without evaluation and saving in between."""
    evaluating = local_sgd(runtime, network(), *LATE)
    for step, whole in enumerate(batches()):
        if step % 2:
            evaluating.eval_step(share(whole, evaluating))
        if step % 3:
            evaluating.state_dict()
        evaluating.train_step(share(whole, evaluating))
    return {"without": train(local_sgd(runtime, network(), *LATE)), "with": parameters(evaluating.model)}


#: Small enough limits that the network's matrices are compressed.
TOPK = ("compression=topk", "compression.min_elements=1", "compression.density=0.3")
POWERSGD = (
    "compression=powersgd",
    "compression.min_elements=1",
    "compression.min_compression_rate=1",
    "compression.rank=1",
)
COMPRESSIONS = {
    "none": ("compression=none",),
    "all": (*TOPK, "compression.density=1", "compression.values=full"),
    "topk": TOPK,
    "powersgd": POWERSGD,
}


def merged_by_each_compressor(runtime: Runtime) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, overrides in COMPRESSIONS.items():
        strategy = local_sgd(runtime, network(), FP64, "strategy.sync_every=2", *overrides)
        found[name] = train(strategy)
        found[f"{name} steps"] = strategy.compressor.step
        found[f"{name} bytes"] = strategy.ledger.total()
    return found


def save_and_load(runtime: Runtime, saved: Replicated, into: Replicated) -> None:
    """Saves one strategy and loads the other from it."""
    everyone = runtime.communicator()
    state = {**saved.state_dict(), "layout": saved.layout}
    path = checkpoint_writer.save(runtime.run_dir / "checkpoints", state, asdict(Progress()), everyone, runtime.device)
    everyone.barrier()
    into.load_state_dict(checkpoint_reader.load(path)[0])
    everyone.barrier()


def resumed(runtime: Runtime) -> list[tuple[Tensor, Tensor]]:
    """A rank's whole state after an uninterrupted run, and after one that was interrupted at some step."""
    normed = functools.partial(network, norm=True)
    builds: list[tuple[Callable[[], LocalSGD], int]] = [
        *((lambda: local_sgd(runtime, network(), *LATE, *TOPK), step) for step in (4, 6)),
        (lambda: local_sgd(runtime, network(), *LATE, *POWERSGD), 4),
        (lambda: local_sgd(runtime, normed(), *CASES["moments"].overrides()), 3),
        (lambda: local_sgd(runtime, normed(), *CASES["warm-up"].overrides(), "strategy.warmup_steps=5"), 3),
    ]
    found = []
    for build, step in builds:
        whole, interrupted, again = build(), build(), build()
        train(whole)
        train(interrupted, slice(step))
        save_and_load(runtime, interrupted, again)
        train(again, slice(step, None))
        saved = [strategy.state_dict() for strategy in (whole, again)]
        first, second = (state_vector({**each["local"], **each["compressor"], **each["model"]}) for each in saved)
        found.append((first, second))
    return found


def resumed_elsewhere(runtime: Runtime) -> dict[str, Any]:
    """States after ddp and a run with another warm-up resumed from between two merges, and after the way back."""
    options = (FP64, "optimizer=sgd", "optimizer.momentum=0.9")
    own = ("strategy.sync_every=3", "strategy.outer_optimizer=nesterov")
    strategy, other, back = (
        local_sgd(runtime, network(norm=True), *options, *own, f"strategy.warmup_steps={steps}") for steps in (0, 2, 0)
    )
    ddp = set_up(network(norm=True), small("strategy=ddp", *options), runtime)
    # All ranks find samples, so that their counts of batches are the same.
    train(strategy, slice(6, 11))

    def moments(of: Replicated) -> Tensor:
        kept = [of.optimizer.state[parameter]["momentum_buffer"] for parameter in of.model.parameters()]
        return torch.cat([each.flatten() for each in kept])

    save_and_load(runtime, strategy, ddp)
    save_and_load(runtime, strategy, other)
    save_and_load(runtime, ddp, back)
    outer = [
        {name: tensor for name, tensor in each.state_dict()["local"].items() if name.startswith(("anchor/", "outer_"))}
        for each in (strategy, other, back)
    ]
    return {
        "merged": state_vector(strategy.model_state()),
        "ddp": state_vector(ddp.model_state()),
        "other": state_vector(other.model_state()),
        "back": state_vector(back.model_state()),
        "moments": moments(strategy),
        "ddp's moments": moments(ddp),
        "outer": [state_vector(each) for each in outer if each],
    }


def statistics(runtime: Runtime) -> dict[str, Any]:
    """This rank's running mean of BatchNorm without a merge, after a merge, and after a warm-up."""
    constants = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for name, override in {"own": "sync_every=3", "merged": "sync_every=2", "warm": "warmup_steps=2"}.items():
        model = network(norm=True)
        model.register_buffer("constants", constants.clone())
        strategy = local_sgd(runtime, model, FP64, f"strategy.{override}")
        train(strategy, slice(3, 5))
        found[name] = model.state_dict()["1.running_mean"].clone()
        found[f"{name}, shown"] = strategy.model_state()["1.running_mean"].clone()
        found[f"{name}, constants stay"] = torch.equal(cast(Tensor, model.constants), constants)
    return found


def error_after_divergence(runtime: Runtime, *overrides: str) -> str:
    """The error message after rank 1 changed its anchor; empty if there was no error."""
    strategy = local_sgd(runtime, network(), FP64, "strategy.sync_every=2", *overrides)
    if runtime.world.rank == 1:
        strategy._fragments[0].anchors[0][3] += 1e-9
    train(strategy, slice(2))
    try:
        train(strategy, slice(2, 3))
    except RuntimeError as error:
        return str(error)
    return ""


def overflowed(runtime: Runtime) -> dict[str, Any]:
    """One rank's overflow in fp16, saved and loaded."""

    def build() -> LocalSGD:
        torch.manual_seed(0)
        return local_sgd(runtime, nn.Linear(6, 4), "trainer.precision=fp16", "strategy.sync_every=2")

    strategy, again, first, second = build(), build(), drawn(9, 6), drawn(9, 6, seed=1)
    for each in (first, second):
        each.inputs.mul_(0.1)
    first.inputs[-1] = 1e30
    strategy.train_step(share(first, strategy))
    save_and_load(runtime, strategy, again)
    again.train_step(share(second, again))
    return {"scale": again.precision.state_dict(), "parameters": parameters(again.model)}


def on_three_ranks(folder: Path, names: Collection[str]) -> dict[str, Any]:
    with Runtime(small("strategy=local_sgd", f"run_dir={folder}"), World.from_environment()) as runtime:
        return {
            "recorded": {
                name: record_run(runtime, case) for name, case in CASES.items() if name in names and case.group is None
            },
            "distance to ddp": distance_to_ddp(runtime),
            "evaluated": with_and_without_evaluation(runtime),
            "compressed": merged_by_each_compressor(runtime),
            "resumed": resumed(runtime),
            "resumed elsewhere": resumed_elsewhere(runtime),
            "statistics": statistics(runtime),
            "diverged": error_after_divergence(runtime),
            "overflowed": overflowed(runtime),
        }


def on_four_ranks(folder: Path, names: Collection[str]) -> dict[str, Any]:
    with Runtime(small("strategy=local_sgd", f"run_dir={folder}"), World.from_environment()) as runtime:
        return {
            "recorded": {
                name: record_run(runtime, case) for name, case in CASES.items() if name in names and case.group
            },
            "diverged": error_after_divergence(runtime, "strategy.group_size=2", "strategy.global_every=2"),
        }


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> list[str]:
    """The cases that are simulated in this run of the tests."""
    here = (item for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    return [item.callspec.params["name"] for item in here if "name" in item.callspec.params]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, cases: list[str]) -> list[dict[str, Any]]:
    return run_ranks(on_three_ranks, 3, tmp_path_factory.mktemp("run"), cases, timeout=HANG_SECONDS)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, cases: list[str]) -> list[dict[str, Any]]:
    return run_ranks(on_four_ranks, 4, tmp_path_factory.mktemp("run"), cases, timeout=HANG_SECONDS)


# --- the simulated training ------------------------------------------------------------------------------------------


#: Cases that every run of the tests simulates: together they use every option.
ALWAYS = ("average", "outer SGD", "clipped, accumulated", "moments", "late fragments", "groups, DiLoCo, late fragments")


@pytest.mark.parametrize("name", soaked(CASES, ALWAYS))
def test_each_rank_s_copy_equals_a_simulation_in_one_process(
    name: str, three: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    # Small tensors: more threads would only wait for each other.
    torch.set_num_threads(1)
    case = CASES[name]
    ranks = three if case.group is None else request.getfixturevalue("four")
    found = [each["recorded"][name] for each in ranks]
    simulated = Simulation(case, len(found))
    for step, whole in enumerate(batches()):
        simulated.step(whole)
        for rank, each in enumerate(found):
            expected = parameters(simulated.models[rank])
            torch.testing.assert_close(each["copies"][step], expected, rtol=1e-10, atol=1e-12)
            if step in each["merged"]:
                torch.testing.assert_close(each["merged"][step], simulated.merged(), rtol=1e-10, atol=1e-12)
                assert torch.equal(each["merged"][step], found[0]["merged"][step])
            if not case.overlap and len(case.fragments) == 1:
                drift = {} if simulated.drift is None else {"local_sgd/drift": pytest.approx(simulated.drift, rel=1e-9)}
                assert each["metrics"][step] == drift


# --- promises --------------------------------------------------------------------------------------------------------


def test_merging_after_each_step_of_sgd_equals_ddp(three: list[dict[str, Any]], tmp_path: Path) -> None:
    for found in (*(each["distance to ddp"] for each in three), *run_ranks(distance_to_ddp_on_two_ranks, 2, tmp_path)):
        assert found["fp32"] <= 1e-5
        assert found["fp64"] <= 1e-12
        assert found["momentum"] <= 1e-12


def test_evaluation_and_saving_do_not_change_the_training(three: list[dict[str, Any]]) -> None:
    for each in three:
        assert torch.equal(each["evaluated"]["with"], each["evaluated"]["without"])


def test_differences_are_compressed(three: list[dict[str, Any]]) -> None:
    for each in three:
        found = each["compressed"]
        torch.testing.assert_close(found["all"], found["none"], rtol=1e-12, atol=1e-14)
        for name in COMPRESSIONS:
            assert found[f"{name} steps"] == len(SIZES) // 2
            assert torch.equal(found[name], three[0]["compressed"][name])
        for name in ("topk", "powersgd"):
            assert found[f"{name} bytes"] < found["none bytes"] / 2
            difference = torch.linalg.vector_norm(found[name] - found["none"])
            assert 1e-6 < difference / torch.linalg.vector_norm(found["none"]) < 0.2


def test_resuming_on_the_same_ranks_is_bit_exact_at_any_step(three: list[dict[str, Any]]) -> None:
    for each in three:
        assert len(each["resumed"]) == 5
        for whole, interrupted in each["resumed"]:
            assert torch.equal(whole, interrupted)


def test_another_strategy_or_warm_up_resumes_from_the_mean(three: list[dict[str, Any]]) -> None:
    found = [each["resumed elsewhere"] for each in three]
    moments = torch.stack([each["moments"] for each in found]).mean(0)
    for each in found:
        for who in ("merged", "ddp", "other", "back"):
            assert torch.equal(each[who], found[0]["merged"])
        torch.testing.assert_close(each["ddp's moments"], moments, rtol=1e-12, atol=1e-15)
        assert not torch.allclose(each["moments"], moments, rtol=1e-3)
    # The first rank saves the state that is equal on all ranks.
    before, after, afresh = found[0]["outer"]
    assert torch.equal(before, after)
    assert not torch.equal(before, afresh)


def test_batch_norm_statistics_are_merged_by_samples_and_constant_buffers_stay(three: list[dict[str, Any]]) -> None:
    found = [each["statistics"] for each in three]
    sizes = [sum(len(range(*shard_bounds(size, rank, 3))) for size in SIZES[3:5]) for rank in range(3)]
    assert len(set(sizes)) > 1
    expected = torch.stack([n / sum(sizes) * each["own"] for n, each in zip(sizes, found, strict=True)]).sum(0)
    for each in found:
        assert not torch.allclose(each["own"], expected, rtol=1e-3)
        torch.testing.assert_close(each["own, shown"], expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(each["merged"], expected, rtol=1e-12, atol=1e-15)
        assert torch.equal(each["merged, shown"], each["merged"])
        assert torch.equal(each["warm"], found[0]["warm"])
        assert all(stay for name, stay in each.items() if name.endswith("constants stay"))


def test_a_rank_whose_parameters_differ_after_a_merge_is_named(
    three: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    line = "after the merge at step 2 the parameters of rank 1 differ from the others'"
    assert [each["diverged"] for each in three] == [line, line, line]
    # Only the ranks of its own group have merged with it.
    assert [each["diverged"] for each in four] == [line, line, "", ""]


def test_each_rank_has_its_own_loss_scale(three: list[dict[str, Any]]) -> None:
    scales = [(each["overflowed"]["scale"]["scale"], each["overflowed"]["scale"]["good_steps"]) for each in three]
    assert scales == [(65536, 2), (65536, 2), (32768, 1)]
    for each in three:
        assert torch.equal(each["overflowed"]["parameters"], three[0]["overflowed"]["parameters"])
        assert each["overflowed"]["parameters"].isfinite().all()


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_merging_every_sixteen_steps_sends_a_sixteenth_and_a_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    options = ("strategy=local_sgd", "strategy.sync_every=16", "trainer.epochs=100", "scheduler=constant")

    def run(ranks: int, name: str, steps: int, *more: str) -> list[dict[str, Any]]:
        config = small(*options, f"run_dir={tmp_path / name}", f"trainer.max_steps={steps}", *more)
        return run_ranks(train_on_rank, ranks, config)

    whole = run(2, "whole", 36)
    size = sum(4 * tensor.numel() for tensor in whole[0]["model"].values())
    summary = whole[0]["summary"]
    # Two merges, and an 8-byte hash after each. Without compression it is the same.
    assert summary["local_sgd"]["merges"] == 2
    assert summary["local_sgd"]["bytes_per_merge"] == 2 * (ring_all_reduce_bytes(size, 2) + 8)
    assert summary["bytes_sent_per_step"] == round(2 * 2 * (ring_all_reduce_bytes(size, 2) + 8) / 36)
    assert summary["bytes_uncompressed_per_step"] == 2 * round(ring_all_reduce_bytes(size, 2) / 16)
    assert 0 < summary["local_sgd"]["drift"] < 1
    run(2, "parts", 21)
    again = run(2, "parts", 36)
    for first, second in zip(whole, again, strict=True):
        assert relative_difference(second["model"], first["model"]) == 0
        assert second["summary"]["test_loss"] == first["summary"]["test_loss"]
    more = run(3, "more", 38, f"resume={tmp_path}/parts/checkpoints/step_00000036")
    assert more[0]["summary"]["steps"] == 38
    assert relative_difference(more[2]["model"], more[0]["model"]) == 0


# --- invalid options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("outer_optimizer=nesterov", "outer_momentum=0"),
            "strategy.outer_momentum=0.0: outer_optimizer=nesterov needs some",
        ),
        (("global_every=2",), "strategy.global_every=2: needs strategy.group_size"),
        (("group_size=2",), "strategy.global_every=1: with groups it must be above 1"),
        (
            ("group_size=4", "global_every=2"),
            "strategy.group_size=4: does not divide 6 ranks into groups; choices: null, 2, 3",
        ),
        (
            ("group_size=6", "global_every=2"),
            "strategy.group_size=6: does not divide 6 ranks into groups; choices: null, 2, 3",
        ),
        (("sync_every=4", "fragments=5"), "strategy.fragments=5: only 4 steps are available for their merges"),
        (
            ("fragments=9", "sync_every=20"),
            "strategy.fragments=9: the model has only 8 trainable parameter tensors to divide among them",
        ),
        (
            ("sync_every=7", "fragments=2", "overlap_steps=4"),
            "strategy.overlap_steps=4: a merge must be over when the next one begins, 3 steps later",
        ),
        (
            ("overlap_steps=1", "average_optimizer_state=true"),
            "strategy.average_optimizer_state=true: needs strategy.overlap_steps=0, since moments can't be applied "
            "late",
        ),
    ],
)
def test_invalid_options_are_refused_in_one_line(overrides: tuple[str, ...], line: str) -> None:
    world = World(rank=0, size=6, local_rank=0, local_size=6, host="here")
    with pytest.raises(ConfigError) as refused:
        check(small("strategy=local_sgd", *(f"strategy.{each}" for each in overrides)), world)
    assert str(refused.value) == line
