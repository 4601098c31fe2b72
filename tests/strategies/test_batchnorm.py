"""BatchNorm over shares of a batch is torch's BatchNorm over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.batchnorm import SyncBatchNorm, replacement, synchronise_batchnorm
from tests.harness import RankFailed, run_ranks
from tests.runs import compose, small


class WithActivation(nn.BatchNorm2d):
    """Does more than normalise, in a ``forward`` of its own, as timm's layers do."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0
        )
        return y.tanh()


#: How many samples each rank gets in each of two training steps and in evaluation.
SHARES: dict[int, list[tuple[int, ...]]] = {
    2: [(5, 3), (7, 0), (0, 4)],
    3: [(3, 3, 2), (4, 0, 3), (2, 1, 0)],
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2-D": (lambda: nn.BatchNorm2d(4), (4, 3, 5)),
    "2-D, cumulative average": (lambda: nn.BatchNorm2d(4, momentum=None), (4, 3, 5)),
    "2-D, not affine": (lambda: nn.BatchNorm2d(4, affine=False, momentum=0.5), (4, 2, 2)),
    "2-D, no running statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (4, 2, 2)),
    "2-D with an activation": (lambda: WithActivation(4), (4, 3, 5)),
    "1-D": (lambda: nn.BatchNorm1d(6, eps=1e-3), (6,)),
    "1-D sequences": (lambda: nn.BatchNorm1d(2), (2, 7)),
}


def data(name: str, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and the loss's derivatives by the outputs, for two training steps and one evaluation; whole batches."""
    generator = torch.Generator().manual_seed(len(name) * ranks)
    shape = LAYERS[name][1]
    drawn = []
    for shares in SHARES[ranks]:
        full = (sum(shares), *shape)
        inputs = torch.randn(full, generator=generator, dtype=torch.float64) * 3 + 2
        drawn.append((inputs, torch.randn(full, generator=generator, dtype=torch.float64)))
    return drawn


def make(name: str) -> nn.Module:
    layer = LAYERS[name][0]().double()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.linspace(0.5, 2 + number, len(parameter)))
    return layer


def run(layer: nn.Module, inputs: Tensor, derivatives: Tensor) -> dict[str, Tensor]:
    """One pass forward and backward."""
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    outputs = layer(inputs)
    (outputs * derivatives).sum().backward()
    assert inputs.grad is not None
    found = {"output": outputs.detach(), "input gradient": inputs.grad}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        found[f"{name} gradient"] = parameter.grad.clone()
    return found | {f"state {name}": tensor.clone() for name, tensor in layer.state_dict().items()}


def steps(layer: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    """Two training steps, then evaluation."""
    found = [run(layer, *batch) for batch in batches[:2]]
    layer.eval()
    return [*found, run(layer, *batches[2])]


def on_each_rank(folder: Path) -> dict[str, list[dict[str, Tensor]]]:
    with Runtime(small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        everyone = runtime.communicator()
        found = {}
        for name in LAYERS:
            model = nn.Sequential(make(name))
            assert synchronise_batchnorm(model, everyone) == 1
            batches = [
                (inputs.split(shares)[everyone.rank], derivatives.split(shares)[everyone.rank])
                for (inputs, derivatives), shares in zip(data(name, everyone.size), SHARES[everyone.size], strict=True)
            ]
            found[name] = steps(model, batches)
    return found


@pytest.fixture(scope="module", params=[2, 3])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_each_rank, request.param, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", LAYERS)
def test_shares_give_what_the_whole_batch_gives(shared: list[dict[str, Any]], name: str) -> None:
    whole = steps(nn.Sequential(make(name)), data(name, len(shared)))
    for step, expected in enumerate(whole):
        parts = [rank[name][step] for rank in shared]
        for key, tensor in expected.items():
            if key in ("output", "input gradient"):
                found = torch.cat([part[key] for part in parts])
            elif key.endswith("gradient"):
                found = torch.stack([part[key] for part in parts]).sum(0)
            else:
                # What is kept must be the same everywhere.
                assert all(torch.equal(part[key], parts[0][key]) for part in parts), (step, key)
                found = parts[0][key]
            torch.testing.assert_close(found, tensor, rtol=1e-12, atol=1e-12)
        assert all(part.keys() == expected.keys() for part in parts)


# --- one rank, where nothing need be sent ----------------------------------------------------------------------------


def alone(layer: nn.Module) -> nn.Module:
    model = nn.Sequential(layer)
    synchronise_batchnorm(model, Communicator())
    return model


def test_the_derivative_is_the_function_s() -> None:
    layer = alone(nn.BatchNorm1d(3).double())
    inputs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(layer, inputs)


def test_a_large_mean_costs_no_digits() -> None:
    inputs = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) + 3000
    expected = nn.BatchNorm1d(2).double()(inputs.double())
    torch.testing.assert_close(alone(nn.BatchNorm1d(2))(inputs).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_16_bit_values_are_of_32_bits(dtype: torch.dtype) -> None:
    inputs = (torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) + 8).to(dtype)
    layer, theirs = alone(nn.BatchNorm1d(2, momentum=1.0)), nn.BatchNorm1d(2, momentum=1.0)
    assert layer(inputs).dtype == dtype
    theirs(inputs.float())
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[f"0.{name}"], expected, rtol=1e-5, atol=0)


def test_running_statistics_that_were_switched_off_stay() -> None:
    layer, theirs = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model = alone(layer)
    layer.track_running_stats = theirs.track_running_stats = False
    inputs = torch.randn(5, 2)
    for each in (model, theirs):
        each(inputs)
        each.eval()
    assert layer.running_mean is not None
    assert layer.running_mean.tolist() == [0, 0]
    torch.testing.assert_close(model(inputs), theirs(inputs))


def test_one_value_a_channel_can_not_be_normalised() -> None:
    with pytest.raises(ValueError, match="more than one value a channel"):
        alone(nn.BatchNorm2d(2))(torch.ones(1, 2, 1, 1))
    with pytest.raises(ValueError, match="got 1-dimensional input"):
        alone(nn.BatchNorm1d(2))(torch.ones(2))


def one_value_among_two(folder: Path) -> None:
    with Runtime(small("strategy=ddp", f"run_dir={folder}"), World.from_environment()) as runtime:
        model = nn.Sequential(nn.BatchNorm1d(2))
        synchronise_batchnorm(model, runtime.communicator())
        # One sample each is enough; one in all is not.
        model(torch.ones(1, 2))
        model(torch.ones(1 - runtime.world.rank, 2))


def test_nor_can_one_value_among_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="more than one value a channel"):
        run_ranks(one_value_among_two, 2, tmp_path)


# --- replacing layers ------------------------------------------------------------------------------------------------


def test_all_layers_are_replaced_wherever_they_are_and_keep_names_and_tensors() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    model = nn.ModuleDict(
        {"first": inner, "second": nn.Sequential(nn.Sequential(nn.BatchNorm1d(5))), "third": nn.BatchNorm3d(2)}
    )
    before = model.state_dict(keep_vars=True)
    assert synchronise_batchnorm(model, Communicator()) == 3
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name}
    assert [name for name, kind in kinds.items() if kind == "SyncBatchNorm"] == ["first.1", "second.0.0", "third"]
    assert kinds["first.2"] == "GroupNorm"


def test_a_second_call_gives_the_layers_another_group() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    first, second = Communicator(), Communicator()
    assert synchronise_batchnorm(model, first) == 1
    assert synchronise_batchnorm(model, second) == 1
    assert isinstance(model[0], SyncBatchNorm)
    assert model[0].communicator is second


def test_a_model_without_such_layers_stays() -> None:
    assert synchronise_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), Communicator()) == 0


def test_advice_names_a_key_that_the_model_has() -> None:
    assert replacement(compose("model=resnet18").model) == "model.norm=group"
    own = compose("model=custom", "model._target_=torch.nn.BatchNorm2d").model
    assert replacement(own) == replacement(compose("model=airbench_cnn").model) == "GroupNorm in the model"
