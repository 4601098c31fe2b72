"""Models with odd tensors and outputs are trained by each strategy as their ordinary twins are by one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.runs import relative_difference, small, train_on_rank


class _Weighted(nn.Module):
    """Features from a weight of any layout, and complex and whole-number constants."""

    mean: Tensor
    phase: Tensor
    order: Tensor

    def __init__(self, weight: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("mean", mean)
        self.register_buffer("phase", torch.full((8,), 1j), persistent=False)
        self.register_buffer("order", torch.arange(8))

    def forward(self, images: Tensor) -> Tensor:
        features = torch.einsum("bcij,cd->bd", images, self.weight) / 64 - self.mean
        return (features * self.phase).imag[:, self.order]


class _Shift(nn.Module):
    """Normalises the images that it is given in place, or a copy of them."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, images: Tensor) -> Tensor:
        return images.sub_(0.5).div_(2) if self.in_place else (images - 0.5) / 2


class _Outputs:
    """What the odd model returns in training."""

    def __init__(self, **outputs: Any) -> None:
        self.__dict__.update(outputs)


class _Heads(nn.Module):
    """Logits, and those of an auxiliary head, as a tuple or as an object with more."""

    def __init__(self, num_classes: int, odd: bool) -> None:
        super().__init__()
        self.odd = odd
        self.head = nn.Linear(8, num_classes)
        self.auxiliary = nn.Linear(8, num_classes)

    def forward(self, features: Tensor) -> Any:
        logits = self.head(features)
        if self.odd and not self.training:
            return logits
        auxiliary = self.auxiliary(features)
        return _Outputs(note="", a=auxiliary, features=features, logits=logits) if self.odd else (logits, auxiliary)


def network(in_channels: int, num_classes: int, odd: bool) -> nn.Sequential:
    """The same numbers with gaps in memory or without, of images that are changed in place or not."""
    generator = torch.Generator().manual_seed(0)
    weight, mean = torch.randn(in_channels, 16, generator=generator)[:, ::2], torch.rand(16, generator=generator)[::2]
    if not odd:
        weight, mean = weight.contiguous(), mean.contiguous()
    heads = _Heads(num_classes, odd)
    with torch.no_grad():
        for head in (heads.head, heads.auxiliary):
            head.weight.copy_(torch.randn(num_classes, 8, generator=generator))
    return nn.Sequential(_Shift(odd), _Weighted(weight, mean), nn.ReLU(), heads)


STRATEGIES: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "ddp": (2, ("strategy=ddp",)),
    "ddp, accumulating": (2, ("strategy=ddp", "trainer.micro_batch_size=2")),
    "fsdp": (2, ("strategy=fsdp", "strategy.block_mb=1e-4", "trainer.micro_batch_size=2")),
    "pipeline": (2, ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=2")),
    "local_sgd": (2, ("strategy=local_sgd", "strategy.sync_every=2")),
    "parameter_server": (2, ("strategy=parameter_server", "strategy.servers=1")),
}


def options(odd: bool, *more: str) -> tuple[str, ...]:
    return (
        "model=custom",
        "model._target_=tests.strategies.test_odd_models.network",
        f"+model.kwargs.odd={str(odd).lower()}",
        "model.auxiliary_weight=0.5",
        *("optimizer=adam", "optimizer.lr=0.01", "optimizer.eps=1e-3", "trainer.memory_format=contiguous"),
        *("trainer.max_steps=8", "trainer.epochs=9", "trainer.test_views=flip_translate", "checkpoint.every_steps=4"),
        "checkpoint.keep=9",
        *more,
    )


def run_folder(odd: bool, strategy: str, folder: Path) -> Path:
    return folder / f"{odd}_{strategy.replace(', ', '_')}"


@functools.cache
def trained(odd: bool, strategy: str, folder: Path) -> dict[str, Any]:
    ranks, more = STRATEGIES[strategy]
    run_dir = f"run_dir={run_folder(odd, strategy, folder)}"
    config = small(*options(odd, *more, run_dir))
    run: dict[str, Any] = run_ranks(train_on_rank, ranks, config)[0]
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_odd_model_is_trained_as_its_ordinary_twin(strategy: str, folder: Path) -> None:
    run = trained(True, strategy, folder)
    # Local SGD is not the training of one process, but the same with and without oddity.
    twin = trained(False, "local_sgd" if strategy == "local_sgd" else "single", folder)
    assert relative_difference(run["model"], twin["model"]) <= 1e-5
    assert run["summary"]["test_loss"] == pytest.approx(twin["summary"]["test_loss"], rel=1e-4)


def test_a_run_with_gaps_resumes_bit_for_bit(folder: Path) -> None:
    whole = trained(True, "ddp", folder)
    checkpoint = run_folder(True, "ddp", folder) / "checkpoints" / "step_00000004"
    again = ("strategy=ddp", f"run_dir={folder}/resumed", f"resume={checkpoint}")
    config = small(*options(True, *again))
    resumed = run_ranks(train_on_rank, 2, config)[0]
    assert all(torch.equal(resumed["model"][name], tensor) for name, tensor in whole["model"].items())
