"""Devices, backends and random number generators."""

from __future__ import annotations

import pytest
import torch

from distrain.errors import ConfigError
from distrain.runtime.device import choose_backend, choose_device, generators
from distrain.runtime.world import World
from tests.runs import small


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(small(), World(1, 2, 1, 2, "host")) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"^runtime\.device=auto: 3 ranks on this host share 2 GPUs"):
        choose_device(small(), World(1, 3, 1, 3, "host"))


def test_the_backend_follows_the_device_unless_configured() -> None:
    assert choose_backend(small(), torch.device("cpu")) == "gloo"
    assert choose_backend(small(), torch.device("cuda", 0)) == "nccl"
    assert choose_backend(small("runtime.backend=gloo"), torch.device("cuda", 0)) == "gloo"


@pytest.mark.parametrize("device", [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)])
def test_generators_seeded_one_by_one_draw_as_if_torch_had_seeded_them(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def draw() -> list[float]:
        return [*torch.rand(3).tolist(), *torch.rand(3, device=device).tolist()]

    torch.manual_seed(2**62 + 5)
    expected = draw()
    for generator in generators(device):
        generator.manual_seed(2**62 + 5)
    assert draw() == expected
