"""Divided attention is what the whole module computes; other modules are not taken for attention."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.strategies.tensor_parallel.attention import DividedMultiheadAttention, attend, why_no_attention
from distrain.strategies.tensor_parallel.layer_group import LayerGroup
from tests.strategies.tensor_parallel.models import Attention


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_attention_keeps_its_results_its_draws_and_its_layout(batch_first: bool) -> None:
    whole = nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=batch_first)
    divided = copy.deepcopy(whole)
    divided.__class__ = DividedMultiheadAttention
    divided.ranks = LayerGroup(Communicator())  # type: ignore[assignment]
    tokens = torch.randn(4, 5, 12)
    results = []
    for module in (whole, divided):
        torch.manual_seed(0)
        results.append(module(tokens, tokens, tokens, need_weights=False)[0])
    torch.testing.assert_close(*results)
    assert results[0].stride() == results[1].stride()
    with pytest.raises(ValueError, match="no masks"):
        divided(tokens, tokens, tokens)


@pytest.mark.parametrize("mask", ["none", "causal", "additive", "true"])
def test_dropout_of_some_heads_is_that_which_they_have_among_all(mask: str) -> None:
    query, key, value = (torch.randn(2, 4, 5, 3, dtype=torch.float64) for _ in range(3))
    masks = {"additive": torch.randn(2, 4, 5, 5, dtype=torch.float64), "true": torch.ones(5, 5).tril().bool()}
    options = {"mask": masks.get(mask), "is_causal": mask == "causal"}
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=masks.get(mask), dropout_p=0.3, is_causal=mask == "causal"
    )
    some = slice(1, 3)
    torch.manual_seed(0)
    found = attend(query[:, some], key[:, some], value[:, some], 0.3, 4, some, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected[:, some])


class Gated(Attention):
    def __init__(self, kind: str) -> None:
        super().__init__(12, 3, 0.1)
        self.kind = kind
        self.gate = nn.Parameter(torch.ones(12)) if kind == "parameter" else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens to tokens of the same shape."""
        x = super().forward(x)
        if self.gate is not None:
            x = x * self.gate
        return x + 1 if self.kind == "more" else x


def test_a_module_that_computes_more_is_no_attention() -> None:
    assert why_no_attention(Gated("nothing")) == ""
    assert why_no_attention(Gated("nothing").to("meta")) == ""
    assert why_no_attention(Gated("more")) == "is a Gated that computes more than attention"
    assert why_no_attention(Gated("parameter")) == "is a Gated that has gate"
    assert "with more than one weight" in why_no_attention(nn.MultiheadAttention(12, 3, add_bias_kv=True))
