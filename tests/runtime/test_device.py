"""Devices, backends and random number generators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distrain.errors import ConfigError
from distrain.runtime.device import choose_backend, choose_device, choose_threads, generators
from distrain.runtime.world import World
from tests.harness import HANG_SECONDS
from tests.runs import LAUNCH, small


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


#: What torchrun adds to the environment of two ranks for which the user set no number of threads.
BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        (None, {}, 8),
        (3, {"OMP_NUM_THREADS": "1"}, 3),
        (None, {"OMP_NUM_THREADS": "1"}, 1),
        (None, {"OMP_NUM_THREADS": "5,2"}, 5),
        (None, {"MKL_NUM_THREADS": "2"}, 2),
        (None, {"MKL_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"}, 2),
        (None, {"OMP_NUM_THREADS": ""}, 8),
        (None, {"OMP_NUM_THREADS": "0"}, 8),
        (None, {"OMP_NUM_THREADS": "many"}, 8),
        (None, {**BY_TORCHRUN, "LOCAL_WORLD_SIZE": "1"}, 1),
        (None, {**BY_TORCHRUN, "OMP_NUM_THREADS": "2"}, 2),
    ],
)
def test_threads_are_those_that_the_user_set(
    configured: int | None, environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrain.runtime.device.available_cores", lambda: 16)
    assert choose_threads(configured, World(0, 2, 0, 2, "host"), environment) == expected


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_torchruns_own_choice_is_not_the_users() -> None:
    """A process that stands for torchrun starts a rank, with or without the variable in its own environment."""
    rank = (
        "from distrain.runtime import device; from distrain.runtime.world import World; "
        "device.available_cores = lambda: 16; print(device.choose_threads(None, World(0, 2, 0, 2, 'host')))"
    )
    torchrun = (
        f"import os, subprocess, sys; os.environ.update({BY_TORCHRUN}); "
        f"subprocess.run([sys.executable, '-c', {rank!r}])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in (*BY_TORCHRUN, "MKL_NUM_THREADS")}
    environment["PYTHONPATH"] = str(LAUNCH.parent)
    # At the same time, since each imports torch.
    by_user, by_torchrun = (
        subprocess.Popen([sys.executable, "-c", torchrun], env=own, stdout=subprocess.PIPE, text=True)
        for own in (environment | {"OMP_NUM_THREADS": "1"}, environment)
    )
    assert [process.communicate(timeout=HANG_SECONDS)[0] for process in (by_user, by_torchrun)] == ["1\n", "8\n"]


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
