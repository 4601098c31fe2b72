"""What every compressor promises: equal bits on all ranks, error feedback, exact limits, and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import writer as checkpoint_writer
from distrain.communication.collectives import digest
from distrain.compression import base
from distrain.config.registry import choices
from distrain.data.base import data_source
from distrain.gradients.buckets import Gradients
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import run_ranks, soaked
from tests.runs import relative_difference, small, train_on_rank, trainer_for

ALL = sorted(set(choices("compression")) - {"auto"})
#: Overrides per compressor, so that the tests' small tensors are compressed.
VARIANTS: dict[str, tuple[str, ...]] = {
    "none": ("compression=none",),
    "fp16": ("compression=fp16",),
    "bf16": ("compression=bf16",),
    "powersgd": ("compression=powersgd", "compression.rank=2", "compression.min_compression_rate=1"),
    "topk": ("compression=topk", "compression.density=0.1"),
    "randomk": ("compression=randomk", "compression.density=0.1"),
    "qsgd": ("compression=qsgd", "compression.bits=4"),
    "signsgd": ("compression=signsgd",),
}
#: Settings in which a compressor loses nothing.
LOSSLESS = {
    "powersgd": ("compression=powersgd", "compression.rank=1000", "compression.min_compression_rate=0.001"),
    "topk": ("compression=topk", "compression.density=1", "compression.values=full"),
    "randomk": ("compression=randomk", "compression.density=1"),
}

#: A model of three blocks, to be split into stages.
NET = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=group")


def overrides(name: str) -> tuple[str, ...]:
    """A variant with a threshold low enough for small models."""
    lossy = "min_elements" in base.build(small(*VARIANTS[name]).compression).config.__dict__
    return (*VARIANTS[name], *(("compression.min_elements=8",) if lossy else ()))


def test_every_compressor_is_tested() -> None:
    assert sorted(VARIANTS) == ALL


class Ragged(nn.Module):
    """Shapes that divide by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 7, 3)
        self.norm = nn.BatchNorm2d(7)
        self.wide = nn.Linear(13, 29)
        self.narrow = nn.Linear(29, 5)
        self.odd = nn.Parameter(torch.zeros(11, 1, 17))


def _exchange_on_rank(names: list[str], steps: int) -> dict[str, Any]:
    """Exchanges random gradients for some steps, with each compressor in turn."""
    found: dict[str, Any] = {}
    world = World.from_environment()
    with Runtime(small("strategy=ddp"), world, keep_logs=False) as runtime:
        everyone = runtime.communicator()
        for name in names:
            compressor = base.build(small(*overrides(name)).compression, seed=3)
            model = Ragged().double()
            gradients = Gradients(
                model.named_parameters(), everyone, compressor, Stopwatch(runtime.device), 0.0003, 0.0015
            )
            assert len(gradients.buckets) >= 3
            generator = torch.Generator().manual_seed(world.rank)
            contributed, aggregated = torch.zeros(()), torch.zeros(())
            for _ in range(steps):
                compressor.begin_step()
                gradients.begin_last_backward()
                for bucket in gradients.buckets:
                    bucket.flat.copy_(torch.randn(bucket.flat.shape, generator=generator, dtype=torch.float64))
                contributed = contributed + _by_name(gradients)
                gradients.finish()
                aggregated = aggregated + _by_name(gradients)
            state = compressor.state_dict()
            residual = torch.cat(
                [state.get(f"residual/{key}", torch.zeros_like(p)).flatten() for key, p in model.named_parameters()]
            )
            found[name] = {
                "digest": int(digest([aggregated])),
                "contributed": everyone.all_reduce(contributed),
                "aggregated": aggregated,
                "residual": everyone.all_reduce(residual.clone()),
                "residuals": compressor.residuals is not None,
                "sent": everyone.ledger.total(),
            }
    return found


def _by_name(gradients: Gradients) -> Tensor:
    tensors = {name: tensor for bucket in gradients.buckets for name, tensor in bucket.tensors.items()}
    return torch.cat([tensors[name].flatten().clone() for name, _ in Ragged().named_parameters()])


@pytest.mark.parametrize("case", soaked([(2, 60), (3, 50), (3, 200), (4, 20)], [(3, 50)]), ids=str)
def test_all_ranks_get_equal_sums_and_residuals_hold_the_rest(case: tuple[int, int]) -> None:
    ranks, steps = case
    everyone = run_ranks(_exchange_on_rank, ranks, ALL, steps)
    for name in ALL:
        assert len({found[name]["digest"] for found in everyone}) == 1, name
        first = everyone[0][name]
        if first["residuals"]:
            # Over all steps the aggregated sums and the residuals add up to what the ranks contributed.
            torch.testing.assert_close(
                first["aggregated"] + first["residual"], first["contributed"], rtol=1e-9, atol=1e-9, msg=name
            )
            assert first["residual"].abs().max() > 0, name


def _train(*more: str, strategy: str = "ddp") -> Any:
    return small(
        f"strategy={strategy}",
        "scheduler=constant",
        "optimizer=sgd",
        "optimizer.lr=0.05",
        "trainer.max_steps=12",
        *more,
    )


@pytest.mark.parametrize("name", sorted(LOSSLESS))
def test_lossless_settings_train_like_no_compression(name: str, tmp_path: Path) -> None:
    found = {}
    for label, chosen in {"plain": VARIANTS["none"], "limit": (*LOSSLESS[name], "compression.min_elements=1")}.items():
        (first, second) = run_ranks(train_on_rank, 2, _train(*chosen, f"run_dir={tmp_path / label}"))
        assert all(torch.equal(first["model"][key], second["model"][key]) for key in first["model"])
        found[label] = first["model"]
    assert relative_difference(found["limit"], found["plain"]) < 1e-5


@pytest.mark.parametrize("name", soaked((name for name in ALL if name != "none"), ("powersgd", "topk", "qsgd")))
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    through = _train(
        *overrides(name), "checkpoint.every_steps=7", "checkpoint.keep=9", f"run_dir={tmp_path / 'through'}"
    )
    expected = run_ranks(train_on_rank, 2, through)[0]
    middle = tmp_path / "through" / "checkpoints" / "step_00000007"
    again = _train(*overrides(name), f"resume={middle}", f"run_dir={tmp_path / 'again'}")
    for found in run_ranks(train_on_rank, 2, again):
        assert all(torch.equal(found["model"][key], expected["model"][key]) for key in expected["model"])
    summary = expected["summary"]
    assert summary["compression"] == name
    assert summary["compression_ratio"] > 1
    assert summary["compression_report"]["ms_per_step"] > 0


def _residuals(path: Path) -> dict[str, Tensor]:
    """The sum of all ranks' residuals, by state key."""
    state, _ = checkpoint_reader.load(path)
    total: dict[str, Tensor] = {}
    for own in state["compressor"]:
        for key, tensor in own.items():
            if key.startswith("residual/"):
                total[key] = total[key] + tensor if key in total else tensor
    return total


@pytest.mark.parametrize(
    ("ranks", "strategy"), [(2, ("ddp",)), (4, ("pipeline", "strategy.stages=2"))], ids=["ddp", "pipeline"]
)
def test_resuming_on_other_ranks_preserves_the_sum_of_residuals(
    ranks: int, strategy: tuple[str, ...], tmp_path: Path
) -> None:
    chosen = (*overrides("topk"), *NET, "compression.density=0.01")
    saved = _train(*chosen, "trainer.max_steps=4", "checkpoint.keep=9", f"run_dir={tmp_path / 'saved'}")
    run_ranks(train_on_rank, 3, saved)
    before = tmp_path / "saved" / "checkpoints" / "step_00000004"
    # No further step: what is saved again is what the new ranks loaded.
    again = _train(
        *strategy[1:], *chosen, "trainer.max_steps=5", f"resume={before}", f"run_dir={tmp_path / 'again'}",
        strategy=strategy[0],
    )  # fmt: skip
    run_ranks(_resave_on_rank, ranks, again)
    residual, expected = _residuals(tmp_path / "again" / "resaved" / "step_00000004"), _residuals(before)
    assert residual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(residual[key], tensor, rtol=1e-5, atol=1e-7)
        assert tensor.abs().sum() > 0


def _resave_on_rank(configuration: Any) -> None:
    """Resumes and immediately saves what was loaded."""
    from dataclasses import asdict

    world = World.from_environment()
    splits = data_source(configuration.data).load()
    with Runtime(configuration, world) as runtime:
        trainer = trainer_for(configuration, runtime, splits)
        trainer._resume()
        state = {**trainer.strategy.state_dict(), "layout": trainer.strategy.layout}
        checkpoint_writer.save(runtime.run_dir / "resaved", state, asdict(trainer.progress), runtime.communicator())


@pytest.mark.parametrize("name", ["topk", "powersgd"])
def test_replicas_of_a_pipeline_stay_equal(name: str, tmp_path: Path) -> None:
    configuration = _train(*overrides(name), *NET, "strategy.stages=2", f"run_dir={tmp_path}", strategy="pipeline")
    everyone = run_ranks(train_on_rank, 4, configuration)
    first = everyone[0]
    for found in everyone:
        assert all(torch.equal(found["model"][key], first["model"][key]) for key in first["model"])
    assert first["summary"]["bytes_sent_per_step"] > 0


def test_one_process_adds_saved_residuals_to_its_first_step(tmp_path: Path) -> None:
    chosen = (*overrides("topk"), "compression.density=0.01")
    run_ranks(
        train_on_rank, 3, _train(*chosen, "trainer.max_steps=4", "checkpoint.keep=9", f"run_dir={tmp_path / 'saved'}")
    )
    before = tmp_path / "saved" / "checkpoints" / "step_00000004"
    resumed = ("trainer.max_steps=5", f"resume={before}")
    paying = _train(*chosen, *resumed, f"run_dir={tmp_path / 'paying'}", strategy="single")
    plain = _train(*resumed, f"run_dir={tmp_path / 'plain'}", strategy="single")
    (paid,), (unpaid,) = run_ranks(train_on_rank, 1, paying), run_ranks(train_on_rank, 1, plain)
    for key, residual in _residuals(before).items():
        name = key.removeprefix("residual/")
        # A step of plain SGD moves a parameter by the learning rate times the residual.
        moved = unpaid["model"][name] - paid["model"][name]
        torch.testing.assert_close(moved, plain.optimizer.lr * residual, rtol=1e-3, atol=1e-6)
