"""Model and optimizer state is saved and loaded by parameter name, whatever the order of the parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import named_state

SHAPES = {"weight": (3, 2), "kernel": (4, 3, 2, 2), "scalar": ()}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
}

Named = dict[str, nn.Parameter]


def model(names: list[str], dtype: torch.dtype = torch.float32) -> Named:
    made = {}
    for name in names:
        tensor = torch.full(SHAPES[name], 1.0, dtype=dtype)
        if name == "kernel":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        made[name] = nn.Parameter(tensor)
    return made


def step(optimizer: torch.optim.Optimizer, named: Named, seed: int) -> None:
    for number, name in enumerate(sorted(named)):
        generator = torch.Generator().manual_seed(100 * seed + number)
        named[name].grad = torch.randn(SHAPES[name], generator=generator).to(named[name])
    optimizer.step()


def names_of(named: Named) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in named.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_continues_bit_for_bit_with_another_order_of_parameters(kind: str) -> None:
    here, there = model(["weight", "kernel", "scalar"]), model(["scalar", "kernel", "weight"])
    first, second = OPTIMIZERS[kind](list(here.values())), OPTIMIZERS[kind](list(there.values()))
    for seed in range(3):
        step(first, here, seed)
    tensors, scalars = named_state.optimizer_state(first, names_of(here))
    saved = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    with torch.no_grad():
        for name, parameter in there.items():
            parameter.copy_(here[name])
    named_state.load_optimizer(second, names_of(there), saved, scalars)
    for seed in range(3, 6):
        step(first, here, seed)
        step(second, there, seed)
    for name, parameter in here.items():
        assert torch.equal(there[name], parameter), name


def test_state_is_named_by_parameter_and_content() -> None:
    named = model(["weight", "scalar"])
    optimizer = OPTIMIZERS["Adam"](list(named.values()))
    step(optimizer, named, 0)
    tensors, scalars = named_state.optimizer_state(optimizer, names_of(named))
    assert sorted(tensors) == [
        f"{name}/{what}" for name in ("scalar", "weight") for what in ("exp_avg", "exp_avg_sq", "step")
    ]
    assert scalars == {}


def test_state_that_is_not_a_tensor_is_saved_and_loaded() -> None:
    named = model(["weight"])
    optimizer = OPTIMIZERS["SGD"](list(named.values()))
    optimizer.state[named["weight"]].update({"generation": 3, "nothing": None, "tensor": torch.ones(3, 2)})
    tensors, scalars = named_state.optimizer_state(optimizer, names_of(named))
    assert scalars == {"weight/generation": 3}
    assert list(tensors) == ["weight/tensor"]
    other = OPTIMIZERS["SGD"](list(named.values()))
    named_state.load_optimizer(other, names_of(named), tensors, scalars)
    assert other.state[named["weight"]]["generation"] == 3


def test_loaded_state_has_the_layout_and_dtype_of_its_parameter_and_own_memory() -> None:
    named = model(["kernel", "scalar"], torch.float64)
    optimizer = OPTIMIZERS["Adam"](list(named.values()))
    saved = {
        "kernel/exp_avg": torch.arange(48.0).view(4, 3, 2, 2),
        "kernel/step": torch.tensor(5.0),
        "scalar/exp_avg": torch.tensor(2.0),
        "scalar/step": torch.tensor(5.0),
    }
    named_state.load_optimizer(optimizer, names_of(named), saved, {})
    kernel, scalar = optimizer.state[named["kernel"]], optimizer.state[named["scalar"]]
    assert kernel["exp_avg"].stride() == named["kernel"].stride()
    assert torch.equal(kernel["exp_avg"], saved["kernel/exp_avg"].double())
    assert kernel["exp_avg"].dtype == scalar["exp_avg"].dtype == torch.float64
    # The step count keeps its own dtype.
    assert kernel["step"].dtype == scalar["step"].dtype == torch.float32
    saved["kernel/step"].zero_()
    assert kernel["step"] == 5


def test_state_of_parameters_on_other_ranks_is_ignored() -> None:
    named = model(["weight"])
    optimizer = OPTIMIZERS["momentum"](list(named.values()))
    saved = {"weight/momentum_buffer": torch.ones(3, 2), "kernel/momentum_buffer": torch.ones(4, 3, 2, 2)}
    named_state.load_optimizer(optimizer, names_of(named), saved, {})
    assert list(optimizer.state) == [named["weight"]]


def test_wrong_shape_is_refused_by_name() -> None:
    named = model(["weight"])
    optimizer = OPTIMIZERS["momentum"](list(named.values()))
    with pytest.raises(ValueError, match=r"weight/momentum_buffer is \(2, 3\), the parameter \(3, 2\)"):
        named_state.load_optimizer(optimizer, names_of(named), {"weight/momentum_buffer": torch.ones(2, 3)}, {})
