"""Low-rank adapters: which layers have them, what is trained, and that merged weights compute the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint.format import DamagedCheckpoint
from distrain.config.schema import LoraConfig
from distrain.errors import ConfigError
from distrain.models import lora
from tests.runs import PointwiseNet


class Odd(nn.Module):
    """Layers that can't have LoRA, and one that can, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.padded = nn.Conv2d(4, 4, 1, padding=1)
        self.own = _Doubled(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.tied = nn.Linear(4, 4)
        self.embedding = nn.Embedding(4, 4)
        self.embedding.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.plain = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def net(seed: int = 0, **config: Any) -> tuple[LoraConfig, PointwiseNet]:
    """A network in double precision with LoRA whose B is not zero."""
    torch.manual_seed(seed)
    model = PointwiseNet(3, 4, "batch").double()
    settings = LoraConfig(**{"rank": 2, "alpha": 3.0, **config})
    lora.add(settings, model, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    return settings, model


def layers(model: nn.Module) -> list[str]:
    return [name.removesuffix(".lora_a") for name, _ in model.named_parameters() if name.endswith(".lora_a")]


def test_the_model_starts_as_it_was_and_the_first_values_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(0)
    model, images = PointwiseNet(3, 4, "group"), torch.randn(2, 3, 8, 8)
    before = model(images)
    tensors = dict(model.state_dict())
    lora.add(LoraConfig(rank=2), model, seed=1)
    assert torch.equal(model(images), before)
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in tensors.items())
    _, other = net(1, match=["hidden"])
    first, second = (each.get_parameter("hidden.lora_a") for each in (model, other))
    assert torch.equal(first, second.float())


@pytest.mark.parametrize("match", [None, ["w*", "hidden"], ["head"], ["*"]])
def test_merged_weights_compute_the_same_in_the_original_class(match: list[str] | None) -> None:
    config, model = net(match=match)
    model.eval()
    images = torch.randn(5, 3, 9, 7, dtype=torch.float64)
    original = PointwiseNet(3, 4, "batch").double().eval()
    original.load_state_dict(lora.merged(config, model.state_dict()))
    unmerged = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    assert float((original(images) - model(images)).detach().abs().max()) <= 1e-12
    original.load_state_dict(unmerged)
    assert float((original(images) - model(images)).detach().abs().max()) > 0.1


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (None, ["widen", "shortcut", "hidden"]),
        (["head"], ["head"]),
        (["*"], ["widen", "shortcut", "hidden", "head"]),
        (["h*"], ["hidden", "head"]),
        (["s*", "widen"], ["widen", "shortcut"]),
    ],
)
def test_patterns_choose_layers(match: list[str] | None, expected: list[str]) -> None:
    assert layers(net(match=match)[1]) == expected


@pytest.mark.parametrize(
    ("also_train", "expected"),
    [
        (["head"], ["head.weight", "head.bias"]),
        ([], []),
        (["norm.*", "hidden.*"], ["norm.weight", "norm.bias", "hidden.bias"]),
    ],
)
def test_all_else_is_frozen_and_the_weights_of_layers_with_lora_always(
    also_train: list[str], expected: list[str]
) -> None:
    config, model = net(also_train=also_train)
    frozen = lora.frozen(config, model)
    own = [name for name, _ in model.named_parameters() if ".lora_" not in name]
    assert [name for name in own if name not in frozen] == expected
    assert not any(".lora_" in name for name in frozen)


def test_layers_that_could_not_be_merged_have_none() -> None:
    model = Odd()
    lora.add(LoraConfig(rank=1), model, 0)
    assert layers(model) == ["plain"]


def test_a_layer_may_be_called_by_keyword_and_copied() -> None:
    _, model = net()
    features = torch.randn(3, 16, dtype=torch.float64)
    copied = copy.deepcopy(model)
    assert torch.equal(copied.hidden(input=features), model.hidden(features))
    nn.init.zeros_(model.hidden.lora_b)  # type: ignore[arg-type]
    assert not torch.equal(copied.hidden(features), model.hidden(features))


def test_the_log_says_what_is_trained() -> None:
    config, model = net()
    trained = [name for name, _ in model.named_parameters() if name not in lora.frozen(config, model)]
    said = lora.describe(config, model, trained)
    assert said == (
        "LoRA of rank 2, alpha / rank = 1.5, in widen, shortcut, hidden: 152 values; also trained: head.weight, "
        "head.bias (52 values); together 22.2 % of 920"
    )


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"match": ["blocks.*"]}, r"lora.match\[0\]=blocks.\*: matches no layer's name; they are widen"),
        ({"match": ["hiden"]}, r"lora.match\[0\]=hiden: .*did you mean hidden"),
        ({"match": ["hidden", "norm"]}, r"lora.match\[1\]=norm: names no linear .*: norm is a BatchNorm2d"),
        ({"match": ["stem"]}, r"lora.match\[0\]=stem: .*stem is a convolution with kernel \(3, 3\)"),
        ({"rank": 13}, "lora.rank=13: is above 12, the largest rank that a chosen layer's weight has"),
        ({"match": []}, r"lora.match=\[\]: names no layer"),
        ({"rank": None}, "lora.alpha=3.0: has no effect without lora.rank, such as lora.rank=8"),
        ({"rank": None, "alpha": None, "match": ["a"]}, r"lora.match=.*: has no effect without lora.rank"),
        ({"also_train": ["nrm.*"]}, r"lora.also_train\[0\]=nrm.\*: matches no parameter besides .*mean norm"),
        ({"also_train": ["hidden.weight"]}, r"lora.also_train\[0\]=hidden.weight: matches no parameter besides"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(config: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as refused:
        lora.frozen(*net(**config))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("blocks", [[nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 2)], [nn.Linear(3, 3)]])
def test_a_model_without_layers_for_it_is_refused(blocks: Sequence[nn.Module]) -> None:
    with pytest.raises(ConfigError, match=r"lora.match=null: finds no linear layer or 1×1 convolution before"):
        lora.add(LoraConfig(rank=1), nn.Sequential(*blocks), 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden.lora_a": torch.zeros(3, 16)},
        {"hidden.lora_b": torch.zeros(12)},
        {"hidden.weight": torch.zeros(12, 15)},
        {"widen.weight": torch.zeros(16, 8, 3, 3)},
    ],
)
def test_matrices_that_do_not_fit_are_damage(changed: dict[str, Tensor]) -> None:
    config, model = net()
    with pytest.raises(DamagedCheckpoint, match="don't fit its weight"):
        lora.merged(config, {**model.state_dict(), **changed})


def test_weights_of_a_run_with_lora_are_no_start_before_they_are_merged() -> None:
    config, model = net()
    for start in (model, PointwiseNet(3, 4, "batch")):
        with pytest.raises(
            ConfigError, match=r"init.weights=run: .* LoRA \(in widen, shortcut, hidden\).* distrain export"
        ):
            lora.refuse_unmerged(model.state_dict(), start, "run")
        lora.refuse_unmerged(lora.merged(config, model.state_dict()), start, "run")
