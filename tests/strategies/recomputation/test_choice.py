"""What blocks keep, and which are computed again to stay within a budget."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.runtime.live_memory import LiveMemory
from distrain.strategies.recomputation import choice
from distrain.strategies.recomputation.block import recompute
from distrain.strategies.recomputation.model_blocks import blocks_of, examine, examine_costs, peak_of
from tests.strategies.recomputation.networks import DropoutNet, LayersNet


def test_blocks_are_those_of_a_sequence_and_the_layers_of_other_models() -> None:
    assert list(blocks_of(DropoutNet(3, 4))) == ["first", "second", "third", "in place", "head"]
    assert list(blocks_of(LayersNet(3, 4))) == ["stem", "layers.0", "layers.1", "layers.2", "head"]


def test_blocks_that_save_nothing_or_write_to_their_input_are_left_out() -> None:
    images = torch.randn(2, 3, 8, 8)
    model = DropoutNet(3, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    passages = examine(model, images, nullcontext)
    assert choice.names_of(passages) == ["first", "second", "third"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert choice.every_nth(passages, 2) == ["second"]
    with pytest.raises(ConfigError, match=r"checkpoint_activations=4: only 3 of the model's blocks keep more"):
        choice.every_nth(passages, 4)
    assert choice.names_of(examine(LayersNet(3, 4), images, nullcontext)) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("share", [0.65, 0.85])
def test_the_predicted_peak_is_the_measured_one(share: float) -> None:
    model, images = LayersNet(3, 4), torch.randn(12, 3, 32, 32)
    passages = examine_costs(model, images[:2], images[:6], nullcontext, len(images))
    whole = peak_of(passages, frozenset())
    chosen = choice.fewest(passages, share * whole)
    assert chosen
    assert peak_of(passages, chosen) <= share * whole
    # None of them could be left out.
    assert all(peak_of(passages, chosen - {name}) > share * whole for name in chosen)
    for name in chosen:
        recompute(name, model.get_submodule(name))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveMemory(torch.device("cpu")) as live:
        nn.functional.cross_entropy(model(images), torch.zeros(12, dtype=torch.long)).backward()
    assert live.peak == pytest.approx(peak_of(passages, chosen), rel=0.1)


class Changing(LayersNet):
    """Leaves out a layer where it gets few samples."""

    def forward(self, images: Tensor) -> Tensor:
        """As the class does."""
        return super().forward(images) if len(images) > 2 else self.head(self.stem(images).mean((2, 3)))


def test_a_model_whose_passes_differ_is_refused() -> None:
    images = torch.randn(4, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"checkpoint_activations=auto: the model calls other blocks"):
        examine_costs(Changing(3, 4), images[:2], images, nullcontext, 8)
