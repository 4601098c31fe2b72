"""Masks of weights: which layers have them, which weights they leave out, and that merged weights compute the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint.format import DamagedCheckpoint
from distrain.config.schema import LoraConfig, PruneConfig
from distrain.errors import ConfigError
from distrain.models import pruning
from tests.runs import PointwiseNet


class Odd(nn.Module):
    """Layers that have no weight of their own, or use it in another way than by calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.tied, self.embedding = nn.Linear(4, 4), nn.Embedding(4, 4)
        self.embedding.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.upward = nn.ConvTranspose2d(4, 4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.upward(images).mean((2, 3))[:, None]
        attended: Tensor = self.attention(features, features, features, need_weights=False)[0]
        return self.head(self.tied(self.normed(attended[:, 0])))  # type: ignore[no-any-return]


def net(**config: Any) -> PointwiseNet:
    torch.manual_seed(0)
    model = PointwiseNet(3, 4, "group")
    pruning.add_masks(PruneConfig(**{"amount": 0.5, **config}), LoraConfig(), model)
    return model


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def masked(model: nn.Module) -> list[str]:
    return [name.removesuffix(".prune_mask") for name, _ in model.named_buffers() if name.endswith(".prune_mask")]


def prune(model: nn.Module, share: float) -> dict[str, Tensor]:
    masks = pruning.choose(model.state_dict(), share)
    model.load_state_dict(masks, strict=False)
    return masks


def test_the_smallest_weights_of_the_whole_model_are_left_out_and_stay_so() -> None:
    model = net(exclude=[])
    weights = {name: parameters(model)[f"{name}.weight"].detach().clone() for name in masked(model)}
    assert [*weights] == ["stem", "widen", "shortcut", "hidden", "head"]
    prune(model, 0.5)
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    limit = magnitudes.median()
    layers = dict(model.named_modules())
    assert all(torch.equal(layers[name].weight, weight * (weight.abs() > limit)) for name, weight in weights.items())
    first = {name: mask.clone() for name, mask in model.named_buffers()}
    nn.init.constant_(parameters(model)["hidden.weight"], 100.0)
    second = prune(model, 0.75)
    assert sum(int(mask.sum()) for mask in second.values()) == round(len(magnitudes) / 4)
    assert all(bool((mask <= first[name]).all()) for name, mask in second.items())


def test_pruned_weights_have_no_gradient_and_merged_ones_compute_the_same() -> None:
    model, images = net(), torch.randn(5, 3, 9, 7)
    prune(model, 0.6)
    assert masked(model) == ["stem", "widen", "shortcut", "hidden"]
    outputs = model(images)
    outputs.sum().backward()
    for name in masked(model):
        gradient, mask = parameters(model)[f"{name}.weight"].grad, model.get_buffer(f"{name}.prune_mask")
        assert gradient is not None
        assert not gradient[mask == 0].any()
        assert gradient[mask == 1].any()
    original = PointwiseNet(3, 4, "group")
    original.load_state_dict(pruning.merged(model.state_dict()))
    assert torch.equal(original(images), outputs)
    assert torch.equal(copy.deepcopy(model)(images), outputs)


@pytest.mark.soak
def test_a_masked_model_is_compiled_as_a_whole() -> None:
    model, images = net(), torch.randn(5, 3, 9, 7)
    prune(model, 0.6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), model(images))


def test_layers_keep_their_classes_and_parameters_their_names() -> None:
    model, plain = net(), PointwiseNet(3, 4, "group")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert type(model.stem) is not nn.Conv2d
    assert isinstance(model.stem, nn.Conv2d)
    assert repr(model) == repr(plain)


def test_weights_that_others_use_have_no_masks() -> None:
    model, images = Odd(), torch.randn(2, 4, 3, 3)
    pruning.add_masks(PruneConfig(amount=0.5), LoraConfig(), model)
    assert masked(model) == ["attention.out_proj", "upward"]
    prune(model, 0.9)
    outputs, plain = model(images), Odd()
    plain.load_state_dict(pruning.merged(model.state_dict()))
    torch.testing.assert_close(plain(images), outputs)


def test_a_mask_that_does_not_fit_is_damage() -> None:
    state = net().state_dict()
    state["stem.prune_mask"] = state["stem.prune_mask"][:1]
    with pytest.raises(DamagedCheckpoint, match=r"stem.prune_mask doesn't fit its weight"):
        pruning.merged(state)


@pytest.mark.parametrize(
    ("config", "lora", "line"),
    [
        ({"amount": None, "rise_epochs": 1}, None, "prune.rise_epochs=1: has no effect without prune.amount"),
        ({"exclude": ["steam.*"]}, None, r"prune.exclude\[0\]=steam.\*: matches no weight of .*did you mean stem"),
        ({"exclude": ["*"]}, None, "prune.amount=0.5: the model has no convolution or linear layer outside of"),
        ({}, 2, "prune.amount=0.5: makes zeros, and the matrices of lora.rank fill them"),
    ],
)
def test_what_can_not_be_pruned_is_refused_in_one_line(config: dict[str, Any], lora: int | None, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        pruning.add_masks(PruneConfig(**{"amount": 0.5, **config}), LoraConfig(rank=lora), PointwiseNet(3, 4, "group"))
