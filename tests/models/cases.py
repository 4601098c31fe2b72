"""Small networks that can't be trained, or only with a word to the user: each differs from a sound one in one thing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.models.build import CustomConfig


class Net(nn.Module):
    """A convolution, a mean over the pixels, and a linear layer; subclasses change one thing."""

    head: Any
    mean: Any
    phase: Any
    cache: Any
    layer: Any
    more: Any
    scale: Any

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)
        self.prepare(num_classes)

    def prepare(self, num_classes: int) -> None:
        """Adds what the case needs."""

    def features(self, images: Tensor) -> Tensor:
        """Features [N, 8]."""
        features: Tensor = self.conv(images).relu().mean((2, 3))
        return features

    def forward(self, images: Tensor) -> Any:
        """Logits."""
        return self.head(self.features(images))


Prepare = Callable[[Net, int], None]
Forward = Callable[[Net, Tensor], Any]


def changed(prepare: Prepare | None = None, forward: Forward | None = None) -> type[Net]:
    """A network with another set-up or forward pass."""

    class Changed(Net):
        def prepare(self, num_classes: int) -> None:
            if prepare is not None:
                prepare(self, num_classes)

        def forward(self, images: Tensor) -> Any:
            return Net.forward(self, images) if forward is None else forward(self, images)

    return Changed


def _sound(net: Net, images: Tensor) -> Tensor:
    result: Tensor = net.head(net.features(images))
    return result


def _no_grad(net: Net, images: Tensor) -> Tensor:
    with torch.no_grad():
        return _sound(net, images)


def _replaces_parameter(net: Net, images: Tensor) -> Tensor:
    net.head.weight = nn.Parameter(net.head.weight.detach() * 1.0)
    return _sound(net, images)


def _adds_parameter(net: Net, images: Tensor) -> Tensor:
    if not hasattr(net, "scale"):
        net.scale = nn.Parameter(torch.ones(()))
    return _sound(net, images).mul(net.scale)


def _adds_module(net: Net, images: Tensor) -> Tensor:
    if not hasattr(net, "more"):
        net.more = nn.Linear(4, 4)
    result: Tensor = net.more(_sound(net, images))
    return result


def _adds_buffer(net: Net, images: Tensor) -> Tensor:
    if "seen" not in net._buffers:
        net.register_buffer("seen", torch.zeros(3))
    return _sound(net, images)


def _grows_buffer(net: Net, images: Tensor) -> Tensor:
    net.mean = torch.cat([net.mean, net.mean[:1]])
    return _sound(net, images)


def _keeps_graph(net: Net, images: Tensor) -> Tensor:
    logits = _sound(net, images)
    net.mean = 0.9 * net.mean + 0.1 * logits.mean(0)
    return logits


def _keeps_state(net: Net, images: Tensor) -> Tensor:
    logits: Tensor = _sound(net, images)
    logits = logits + getattr(net, "last", torch.zeros(())) * 0.1
    net.last = logits.mean()
    return logits


def _overwrites_activation(net: Net, images: Tensor) -> Tensor:
    hidden = net.features(images).exp()
    logits: Tensor = net.head(hidden)
    hidden.zero_()
    return logits


class _BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError("no gradient of this")


def _bad_backward(net: Net, images: Tensor) -> Tensor:
    result: Tensor = _BadBackward.apply(_sound(net, images))  # type: ignore[no-untyped-call]
    return result


def _normalised(net: Net, images: Tensor) -> Tensor:
    hidden = net.features(images)
    result: Tensor = net.head((hidden - hidden.mean(0)) / hidden.std(0))
    return result


def _buffer(name: str, value: Callable[[int], Tensor], *, persistent: bool = True) -> Prepare:
    return lambda net, classes: net.register_buffer(name, value(classes), persistent=persistent)


def _double(net: Net, classes: int) -> None:
    net.head.weight.data = net.head.weight.data.double()


def _odd_state(net: Net, classes: int) -> None:
    type(net).get_extra_state = lambda self: {1, 2}  # type: ignore[method-assign]


def _half(net: Net, classes: int) -> None:
    net.half()


def _unlearnable(net: Net, classes: int) -> None:
    net.requires_grad_(False)


#: Networks that can't be trained, with a part of the line that says so.
REFUSED: dict[str, tuple[type[Net], str]] = {
    "all frozen": (changed(_unlearnable), "nothing to train: no parameter of it has requires_grad=True"),
    "no_grad": (changed(forward=_no_grad), "nothing to train: its output depends on no trainable parameter"),
    "detached": (changed(forward=lambda n, x: _sound(n, x).detach()), "nothing to train: its output depends on no"),
    "decided": (changed(forward=lambda n, x: F.one_hot(_sound(n, x).argmax(1), 4).float()), "nothing to train"),
    "an empty tuple": (changed(forward=lambda n, x: ()), "returns a tuple without a tensor for images"),
    "the images first": (changed(forward=lambda n, x: (x, _sound(n, x))), "returns [2, 3, 8, 8] for images"),
    "a dictionary": (
        changed(forward=lambda n, x: {"images": x, "scores": _sound(n, x)}),
        "returns a dict with images, scores, none of them logits for images",
    ),
    "an object": (changed(forward=lambda n, x: object()), "returns a object for images"),
    "nothing": (changed(forward=lambda n, x: None), "returns a NoneType for images"),
    "nothing in evaluation": (
        changed(forward=lambda n, x: _sound(n, x) if n.training else None),
        "returns a NoneType for images [2, 3, 8, 8] in evaluation mode",
    ),
    "transposed": (changed(forward=lambda n, x: _sound(n, x).t()), "returns [4, 2] for images"),
    "a column too few": (changed(forward=lambda n, x: _sound(n, x)[:, 1:]), "returns [2, 3] for images"),
    "one number": (changed(forward=lambda n, x: _sound(n, x).mean()), "returns [] for images"),
    "complex logits": (changed(forward=lambda n, x: _sound(n, x) * 1j), "returns logits of torch.complex64"),
    "NaN": (changed(forward=lambda n, x: _sound(n, x) / 0 * 0), "returns NaN for images of normal noise"),
    "infinite": (changed(forward=lambda n, x: _sound(n, x) / 0), "for images of normal noise; look at"),
    "a parameter replaced": (changed(forward=_replaces_parameter), "makes or replaces the parameters head.weight"),
    "a parameter added": (changed(forward=_adds_parameter), "makes or replaces the parameters scale"),
    "a layer added": (changed(forward=_adds_module), "makes or replaces the parameters more.weight, more.bias"),
    "a buffer added": (changed(forward=_adds_buffer), "adds, removes or reshapes the state seen"),
    "a buffer that grows": (changed(_buffer("mean", torch.zeros), _grows_buffer), "or reshapes the state mean"),
    "a buffer with a graph": (
        changed(_buffer("mean", torch.zeros), _keeps_graph),
        "of the backward pass in the buffers mean",
    ),
    "a graph kept": (changed(forward=_keeps_state), "fails in the backward pass (RuntimeError: Trying to backward"),
    "overwritten": (changed(forward=_overwrites_activation), "fails in the backward pass (RuntimeError: one of the"),
    "a bad gradient": (changed(forward=_bad_backward), "fails in the backward pass (NotImplementedError: no gradient"),
    "double weights": (
        changed(_double, lambda n, x: F.linear(n.features(x).double(), n.head.weight)),
        "fails on images [2, 3, 8, 8] (RuntimeError",
    ),
    "complex weights": (
        changed(lambda n, c: setattr(n, "phase", nn.Parameter(torch.ones(c, dtype=torch.cfloat)))),
        "phase is a complex parameter",
    ),
    "expanded": (
        changed(lambda n, c: setattr(n, "shift", nn.Parameter(torch.zeros(1).expand(c)))),
        "elements of shift",
    ),
}


def _moves_mean(net: Net, images: Tensor) -> Tensor:
    logits = _sound(net, images)
    if net.training:
        net.mean = 0.9 * net.mean + 0.1 * logits.detach().mean(0)
    return logits


def _moves_mean_in_place(net: Net, images: Tensor) -> Tensor:
    logits = _sound(net, images)
    if net.training:
        net.mean.mul_(0.9).add_(logits.detach().mean(0), alpha=0.1)
    return logits


def _counts(net: Net, images: Tensor) -> Tensor:
    if net.training:
        net.mean += 1
    return _sound(net, images)


def _counts_images(net: Net, images: Tensor) -> Tensor:
    if net.training:
        net.mean += images.flatten(1).norm(dim=1).sum()
    return _sound(net, images)


def _spectral(net: Net, classes: int) -> None:
    net.head = nn.utils.parametrizations.spectral_norm(net.head)


def _old_spectral(net: Net, classes: int) -> None:
    net.head = nn.utils.spectral_norm(net.head)


def _with(layer: Callable[[], nn.Module]) -> type[Net]:
    def prepare(net: Net, classes: int) -> None:
        net.layer = layer()

    return changed(prepare, lambda net, images: net.head(net.layer(net.features(images))))


def _drops_by_python(net: Net, images: Tensor) -> Tensor:
    return _sound(net, images) * (random.random() if net.training else 1.0)


def _drops_by_numpy(net: Net, images: Tensor) -> Tensor:
    return _sound(net, images) * float(np.random.random() if net.training else 1.0)  # noqa: NPY002 - as users do


#: Networks that are trained, with what their trial must find out: attributes of ModelTrial that are not empty or false.
FOUND: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "sound": (Net, {}),
    "a constant": (changed(_buffer("mean", torch.ones), lambda n, x: _sound(n, x) * n.mean), {}),
    "complex constants": (
        changed(
            _buffer("phase", lambda c: torch.full((c,), 1j), persistent=False),
            lambda n, x: (_sound(n, x) * n.phase).imag,
        ),
        {},
    ),
    "changes its input": (changed(forward=lambda n, x: _sound(n, x.sub_(0.5).div_(2))), {}),
    "a cache": (
        changed(_buffer("cache", torch.zeros, persistent=False), lambda n, x: _sound(n, x) + n.cache.zero_()),
        {"buffers_of_passes": ["cache"]},
    ),
    "a mean replaced": (changed(_buffer("mean", torch.zeros), _moves_mean), {"buffers_of_samples": ["mean"]}),
    "a mean changed": (changed(_buffer("mean", torch.zeros), _moves_mean_in_place), {"buffers_of_samples": ["mean"]}),
    "a sum": (changed(_buffer("mean", lambda c: torch.zeros(())), _counts_images), {"buffers_of_samples": ["mean"]}),
    "a counter": (
        changed(_buffer("mean", lambda c: torch.zeros((), dtype=torch.long)), _counts),
        {"buffers_of_passes": ["mean"]},
    ),
    "spectral norm": (
        changed(_spectral),
        {"buffers_of_passes": ["head.parametrizations.weight.0._u", "head.parametrizations.weight.0._v"]},
    ),
    "old spectral norm": (changed(_old_spectral), {"buffers_of_passes": ["head.weight_u", "head.weight_v"]}),
    "batch norm": (_with(lambda: nn.BatchNorm1d(8)), {}),
    "batch norm without statistics": (_with(lambda: nn.BatchNorm1d(8, track_running_stats=False)), {}),
    "layer norm": (_with(lambda: nn.LayerNorm(8)), {}),
    "dropout": (_with(lambda: nn.Dropout(0.5)), {"draws_random": True}),
    "dropout of nothing": (_with(lambda: nn.Dropout(0.0)), {}),
    "functional dropout": (
        changed(forward=lambda n, x: F.dropout(_sound(n, x), 0.1, n.training)),
        {"draws_random": True},
    ),
    "noise": (changed(forward=lambda n, x: _sound(n, x + 0.1 * torch.randn_like(x))), {"draws_random": True}),
    "Python's numbers": (changed(forward=_drops_by_python), {"draws_random": True}),
    "numpy's numbers": (changed(forward=_drops_by_numpy), {"draws_random": True}),
    "own batch statistics": (changed(forward=_normalised), {"mixes_samples": True}),
    "attention among samples": (
        changed(forward=lambda n, x: torch.softmax(n.features(x) @ n.features(x).t(), 1) @ _sound(n, x)),
        {"mixes_samples": True},
    ),
    "an auxiliary head": (
        changed(
            lambda n, c: setattr(n, "more", nn.Linear(8, c)),
            lambda n, x: {"more": n.more(n.features(x)), "out": _sound(n, x), "images": x},
        ),
        {
            "unused": ["more.weight", "more.bias"],
            "ignored_outputs": ["more", "images"],
            "auxiliary_outputs": ["more"],
        },
    ),
    "unused": (
        changed(lambda n, c: setattr(n, "more", nn.Linear(2, 2))),
        {"unused": ["more.weight", "more.bias"]},
    ),
    "double": (changed(_double), {"cast": {"float64": ["head.weight"]}}),
    "half": (
        changed(_half),
        {"cast": {"float16": ["conv.weight", "conv.bias", "head.weight", "head.bias"]}},
    ),
    "whole numbers": (changed(_buffer("index", torch.arange)), {}),
}


def make(in_channels: int, num_classes: int, case: str) -> nn.Module:
    """The network of a case."""
    found = FOUND[case] if case in FOUND else REFUSED[case]
    return found[0](in_channels, num_classes)


def config(case: str) -> CustomConfig:
    """The configuration of a case."""
    return CustomConfig(name="custom", _target_="tests.models.cases.make", kwargs={"case": case})
