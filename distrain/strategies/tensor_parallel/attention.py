"""Self-attention, divided by heads.

Two kinds are known: torch's ``nn.MultiheadAttention``, and modules with layers ``qkv`` and ``proj`` and a number
``num_heads``, such as those of timm's vision transformers. Their code reshapes by numbers of the whole layer, so it is
replaced. Whether the replacement of the second kind computes what the module computes is tried first.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distrain import torch_internals
from distrain.communication.collectives import Communicator
from distrain.data.sampler import shard_bounds
from distrain.strategies.tensor_parallel.layer_group import LayerGroup

#: Layers that the replacement takes over.
_PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")
#: Samples and tokens of the trial, and differences that are rounding in float64.
_TRIAL, _ROUNDING = (2, 5), 1e-9


class DividedAttention(nn.Module):
    """Attention of this rank's heads; the results of all ranks are summed by ``proj``.

    Args:
        module: The attention, whose layers are used; the caller divides them.
        group: The ranks among which the heads are divided.
    """

    def __init__(self, module: nn.Module, group: LayerGroup) -> None:
        super().__init__()
        self.training, self.ranks = module.training, group
        self.all_heads = int(module.num_heads)  # type: ignore[arg-type]
        self._heads = heads_of(self.all_heads, group)
        parts = {name: getattr(module, name, None) or nn.Identity() for name in _PARTS}
        self.qkv, self.q_norm, self.k_norm, self.attn_drop, self.proj, self.proj_drop = parts.values()

    @override
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Maps tokens ``[N, T, C]`` to tokens ``[N, T, C']``."""
        samples, tokens, _ = x.shape
        heads = self._heads.stop - self._heads.start
        joined = self.qkv(self.ranks.enter(x)).reshape(samples, tokens, 3, heads, -1)
        query, key, value = joined.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self._normalised(self.q_norm, query), self._normalised(self.k_norm, key)
        rate = self.attn_drop.p if self.training and isinstance(self.attn_drop, nn.Dropout) else 0.0
        attended = attend(query, key, value, rate, self.all_heads, self._heads, attn_mask, is_causal=is_causal)
        output: Tensor = self.proj_drop(self.proj(attended.transpose(1, 2).reshape(samples, tokens, -1)))
        return output

    def _normalised(self, norm: nn.Module, of_heads: Tensor) -> Tensor:
        """All heads share the norm's parameters, so their gradients are summed over the ranks."""
        # Views, by which an observer of the calls sees that this one, and not the norm's, needs the parameters.
        views = {name: parameter.view_as(parameter) for name, parameter in norm.named_parameters()}
        parameters = {name: self.ranks.enter(view) for name, view in views.items()}
        if not parameters:
            return norm(of_heads)  # type: ignore[no-any-return]
        found: Tensor = torch.func.functional_call(norm, parameters, (of_heads,))
        return found


class DividedMultiheadAttention(nn.MultiheadAttention):
    """Attention of this rank's heads; a module of torch's class becomes one."""

    ranks: LayerGroup

    @override
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, need_weights: bool = True, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Maps tokens ``[N, T, C]`` (or ``[T, N, C]``, as the module says) to tokens of the same shape.

        Raises:
            ValueError: It is asked for more than self-attention without a mask.
        """
        is_masked = bool(args) or kwargs.get("attn_mask") is not None or kwargs.get("key_padding_mask") is not None
        if not (query is key is value) or query.dim() != 3 or need_weights or is_masked or kwargs.get("is_causal"):
            raise ValueError("a divided MultiheadAttention has no masks and no weights to return; leave it whole")
        x = query if self.batch_first else query.transpose(0, 1)
        samples, tokens, _ = x.shape
        heads = heads_of(self.num_heads, self.ranks)
        joined = F.linear(self.ranks.enter(x), self.in_proj_weight, self.in_proj_bias)
        joined = joined.reshape(samples, tokens, 3, heads.stop - heads.start, self.head_dim)
        rate = self.dropout if self.training else 0.0
        own_query, own_key, own_value = joined.permute(2, 0, 3, 1, 4).unbind(0)
        attended = attend(own_query, own_key, own_value, rate, self.num_heads, heads)
        # Laid out with tokens first, as torch's is: dropout draws in the order of memory.
        tokens_first = attended.permute(2, 0, 1, 3).reshape(tokens, samples, -1)
        output = self.ranks.leave(F.linear(tokens_first, self.out_proj.weight))
        if self.out_proj.bias is not None:
            output = output + self.out_proj.bias.to(output.dtype)
        return output.transpose(0, 1) if self.batch_first else output, None


def heads_of(heads: int, group: LayerGroup) -> slice:
    """The heads that this rank has."""
    return slice(*shard_bounds(heads, group.rank, group.size))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rate: float,
    all_heads: int,
    heads: slice,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Attention of some heads, ``[N, heads, T, C]``, with the dropout that they have among all heads.

    Args:
        query: Of these heads.
        key: Likewise.
        value: Likewise.
        rate: Of dropout; 0 in evaluation.
        all_heads: Number of heads on all ranks.
        heads: Which of them these are.
        mask: As for ``scaled_dot_product_attention``; of all heads, if it differs between heads.
        is_causal: Likewise.
    """
    if mask is not None and mask.dim() == 4 and mask.shape[1] == all_heads:
        mask = mask[:, heads]
    if not rate:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    tokens = query.shape[2]
    if is_causal:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    # Draws for all heads, as one process has them.
    ones = weights.new_ones(len(weights), all_heads, tokens, tokens)
    attended: Tensor = (weights * F.dropout(ones, rate)[:, heads]) @ value
    return attended


def why_no_attention(module: nn.Module) -> str:
    """Why a module is no attention that can be divided; empty if it is one."""
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        joined, more = getattr(module, "in_proj_weight", None), module.bias_k is not None or module.add_zero_attn
        plain = joined is not None and not more and not torch_internals.has_hooks(module)
        plain = plain and type(module) is nn.MultiheadAttention
        return "" if plain else f"is a {kind} with more than one weight for queries, keys and values, or with hooks"
    qkv, projection, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
    if type(qkv) is not nn.Linear or type(projection) is not nn.Linear or type(heads) is not int:
        return f"is a {kind} without linear layers qkv and proj and a number num_heads"
    if qkv.out_features != 3 * projection.in_features or projection.in_features % heads:
        return f"is a {kind} whose qkv, proj and num_heads don't fit to each other"
    if torch_internals.has_hooks(module) or not torch_internals.has_plain_state(module):
        return f"is a {kind} with hooks, or with a state of its own"
    known = {f"{part}.{key}" for part in _PARTS for key in ("weight", "bias")}
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    if unknown := [name for name in state if name not in known]:
        return f"is a {kind} that has {unknown[0]}"
    return "" if _computes_attention(module) else f"is a {kind} that computes more than attention"


def _computes_attention(module: nn.Module) -> bool:
    """Whether :class:`DividedAttention` gives what the module gives, in training and in evaluation."""
    generator = torch.Generator().manual_seed(0)
    try:
        trial = copy.deepcopy(module).to_empty(device="cpu").double()
        with torch.no_grad():
            for parameter in trial.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
        tokens = torch.randn(*_TRIAL, module.qkv.in_features, generator=generator, dtype=torch.float64)  # type: ignore[union-attr,arg-type]
        divided = DividedAttention(trial, LayerGroup(Communicator()))
        for mode in (True, False):
            results: list[Tensor] = []
            for each in (trial, divided):
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    torch.manual_seed(0)
                    results.append(each.train(mode)(tokens))
            own, other = results
            if own.shape != other.shape or not torch.allclose(own, other, rtol=_ROUNDING, atol=_ROUNDING):
                return False
    except Exception:  # a user's module may raise anything
        return False
    return True
