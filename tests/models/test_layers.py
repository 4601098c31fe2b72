"""A model's layers are its blocks in order, whatever containers they are in."""

from __future__ import annotations

import torch
from torch import nn

from distrain.models.layers import layer_depths, matches


def layers(model: nn.Module) -> list[list[str]]:
    """The names of each layer's parameters, in order."""
    found: dict[int, list[str]] = {}
    for name, depth in layer_depths(model).items():
        found.setdefault(depth, []).append(name)
    assert {name for names in found.values() for name in names} == {name for name, _ in model.named_parameters()}
    return [sorted(found[depth]) for depth in range(len(found))]


def test_children_are_layers_and_a_normalisation_belongs_to_the_one_before() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    assert layers(model) == [["0.weight", "1.bias", "1.weight"], ["3.weight"]]


def test_a_normalisation_at_the_beginning_belongs_to_the_first_layer() -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    assert layers(model) == [["0.bias", "0.weight", "1.weight"], ["2.weight"]]
    assert layers(nn.LayerNorm(2)) == [["bias", "weight"]]


class Transformer(nn.Module):
    """Blocks within an encoder, with a class token and positions beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 2))
        self.patches = nn.Linear(2, 2, bias=False)
        self.encoder = nn.Module()
        self.encoder.positions = nn.Parameter(torch.zeros(3, 2))
        self.encoder.blocks = nn.ModuleList(nn.Bilinear(2, 2, 2, bias=False) for _ in range(2))
        self.encoder.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 2, bias=False)


def test_blocks_are_found_inside_other_modules() -> None:
    assert layers(Transformer()) == [
        ["patches.weight", "token"],
        ["encoder.blocks.0.weight", "encoder.positions"],
        ["encoder.blocks.1.weight", "encoder.norm.bias", "encoder.norm.weight"],
        ["head.weight"],
    ]


def test_the_pattern_head_names_the_last_layer() -> None:
    depths = layer_depths(Transformer())
    assert [name for name in depths if matches("head", name, depths)] == ["head.weight"]
    assert matches("encoder.*", "encoder.norm.bias", depths)
    assert not matches("encoder", "encoder.norm.bias", depths)
