"""Training on an Apple GPU, ``runtime.device=mps``, on a machine that has none.

A stand-in for the device (see :mod:`tests.fake_mps`) shows what distrain puts on it. Nothing here shows that torch's
own kernels for Apple's GPUs are right: that was never tried.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distrain
from distrain.errors import ConfigError, Failed
from distrain.runtime.device import RandomState, choose_device, float64_device, generators
from distrain.runtime.world import World
from tests.fake_mps import FakeMps, pretend
from tests.runs import NormNet, check, small, train_on_rank

ALONE = World(0, 1, 0, 1, "host")
#: The layout that an Apple GPU gets, and an optimizer without the kernels that torch has for CPU and CUDA only.
SAME = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=batch", "optimizer.fused=false",
        "trainer.memory_format=contiguous", "trainer.log_every_steps=4")  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeMps:
    """The device, which torch finds available."""
    return pretend(monkeypatch)


def train(run_dir: Path, device: str, *overrides: str, fake: FakeMps) -> dict[str, Any]:
    """Trains on one rank; ``fake`` is used for ``device="mps"`` only."""
    configuration = small(*SAME, f"run_dir={run_dir}", f"runtime.device={device}", *overrides)
    if device != "mps":
        return train_on_rank(configuration)
    with fake:
        trained = train_on_rank(configuration)
        trained["model"] = {name: tensor.cpu() for name, tensor in trained["model"].items()}
    return trained


def measured(summary: dict[str, Any]) -> dict[str, Any]:
    """Losses, metrics and counts, without times."""
    kinds = ("loss", "accuracy", "count", "samples", "steps", "skipped")
    return {name: value for name, value in summary.items() if any(kind in name for kind in kinds)}


# --- the whole run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.epochs=2", "checkpoint.every_steps=4"),
        ("trainer.grad_clip_norm=0.5", "trainer.micro_batch_size=3", "data.augment.flip=true",
         "data.augment.crop_padding=1", "data.augment.cutout=2"),
        ("optimizer=muon", "trainer.on_nonfinite=skip", "checkpoint.background=false"),
        ("strategy=ddp", "loss=mean_squared_error", "optimizer=adamw", "optimizer.lookahead.every=2"),
        ("strategy=local_sgd", "strategy.sync_every=2", "strategy.warmup_steps=0", "loss=binary_cross_entropy"),
    ],
)  # fmt: skip
def test_training_makes_no_float64_on_the_device_and_gives_the_metrics_of_the_cpu(
    tmp_path: Path, fake: FakeMps, overrides: tuple[str, ...]
) -> None:
    apple = train(tmp_path / "mps", "mps", "trainer.epochs=1", *overrides, fake=fake)
    cpu = train(tmp_path / "cpu", "cpu", "trainer.epochs=1", *overrides, fake=fake)
    assert measured(apple["summary"]) == measured(cpu["summary"])
    assert all(torch.equal(apple["model"][name], tensor) for name, tensor in cpu["model"].items())
    # It did train there: forward, backward and update.
    assert {"aten.convolution.default", "aten.convolution_backward.default"} <= fake.operations.keys()
    assert fake.calls["synchronize"]
    assert apple["summary"]["peak_memory_mb"] == 3


@pytest.mark.parametrize("devices", [("mps", "cpu"), ("cpu", "mps")])
def test_a_run_goes_on_on_the_other_device_as_if_it_had_not_stopped(
    tmp_path: Path, fake: FakeMps, devices: tuple[str, str]
) -> None:
    keys = ("scheduler=constant", "trainer.epochs=2")
    whole = train(tmp_path / "whole", "cpu", *keys, "trainer.max_steps=8", fake=fake)
    train(tmp_path / "run", devices[0], *keys, "trainer.max_steps=3", fake=fake)
    resumed = train(tmp_path / "run", devices[1], *keys, "trainer.max_steps=8", fake=fake)
    assert resumed["summary"]["resumed_at_step"] == 3
    assert all(torch.equal(resumed["model"][name], tensor) for name, tensor in whole["model"].items())


def test_a_run_in_channels_last_goes_on_in_the_layout_that_is_right_there(tmp_path: Path, fake: FakeMps) -> None:
    """torch's BatchNorm has had wrong gradients in channels-last on Apple GPUs."""
    data = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    keys: dict[str, Any] = {"run_dir": str(tmp_path), "logger": "none", "trainer.progress": "off", "batch_size": 8}
    first: dict[str, Any] = {**keys, "trainer.memory_format": "channels_last", "trainer.max_steps": 1}
    second: dict[str, Any] = {**keys, "trainer.memory_format": "auto", "trainer.max_steps": 2, "device": "mps"}
    model = NormNet(3, 4, "batch")
    run = distrain.fit(model, data, **first)
    with fake:
        distrain.evaluate(run, data, device="mps")
        distrain.fit(model, data, **second)
    assert fake.layouts == {torch.contiguous_format}
    assert json.loads((tmp_path / "summary.json").read_text())["resumed_at_step"] == 1


def test_images_that_do_not_fit_on_the_device_are_copied_batch_by_batch(
    tmp_path: Path, fake: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3 << 20)
    changed = ("trainer.epochs=1", "data.prefetch=0")
    apple = train(tmp_path / "mps", "mps", *changed, fake=fake)
    cpu = train(tmp_path / "cpu", "cpu", *changed, fake=fake)
    assert measured(apple["summary"]) == measured(cpu["summary"])


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(
    tmp_path: Path, fake: FakeMps, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Failed):
        train(tmp_path / "mps", "mps", "optimizer=sgd", "optimizer.lr=1e30", "trainer.epochs=2", fake=fake)
    assert "NonFinite: the loss is not finite in step 2" in capfd.readouterr().err


class _Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4, dtype=torch.float64))
        self.head = nn.Linear(12, 4, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1)) * self.scale  # type: ignore[no-any-return]


def test_the_api_fits_evaluates_and_predicts_there(tmp_path: Path, fake: FakeMps) -> None:
    """With a model in float64, which becomes float32 as on every device, and does so on its way to this one."""
    torch.manual_seed(1)
    images, labels = torch.randn(24, 3, 2, 2), torch.randint(4, (24,))
    keys: dict[str, Any] = {
        "logger": "none",
        "trainer.progress": "off",
        "run_dir": str(tmp_path / "run"),
        "runtime.device": "mps",
    }
    with fake:
        run = distrain.fit(_Double(), (images, labels), epochs=1, batch_size=8, **keys)
        there = distrain.evaluate(run, (images, labels), device="mps")
        rows = distrain.predict(run, images, device="mps")
    here = distrain.evaluate(run, (images, labels), device="cpu")
    assert there == here
    assert rows == distrain.predict(run, images, device="cpu")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_the_stand_in_refuses_what_an_apple_gpu_refuses(fake: FakeMps) -> None:
    """So that the tests above can fail."""
    with fake:
        there = torch.ones(3, device="mps", requires_grad=True)
        assert there.device.type == "mps"
        assert (there * 2).device.type == "mps"
        assert there.cpu().device.type == "cpu"
        (there * 2).sum().backward()
        assert there.grad is not None
        assert there.grad.device.type == "mps"
        for wrong in (
            lambda: torch.zeros(1, dtype=torch.float64, device="mps"),
            lambda: torch.zeros(1, dtype=torch.float64).to("mps"),
            there.double,
            lambda: there.new_zeros(1, dtype=torch.float64),
            lambda: there.detach().numpy(),
        ):
            with pytest.raises(TypeError, match=r"float64|numpy"):
                wrong()
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "torch_has", "ranks", "line"),
    [
        ((), {"built": False}, 1, "runtime.device=mps: this torch is built without MPS.*; choices: auto, cpu$"),
        ((), {"available": False}, 1, "runtime.device=mps: torch can't use it here: it needs an Apple GPU.*auto, cpu$"),
        (("strategy=ddp",), {}, 2, "runtime.device=mps: torch has no backend .* 2 ranks were started; start one"),
        (("trainer.precision=fp64",), {}, 1, r"trainer.precision=fp64: an Apple GPU \(device=mps\) has no float64"),
        (
            ("trainer.precision=bf16",),
            {"macos": 13},
            1,
            "trainer.precision=bf16: needs macOS 14 .*; fp32 does not$",
        ),
        (
            ("trainer.precision=auto", "trainer.lowest_precision=bf16"),
            {"macos": 13},
            1,
            "trainer.lowest_precision=bf16: needs macOS 14",
        ),
        (("trainer.compile=true",), {}, 1, "trainer.compile=true: torch compiles for an Apple GPU .*choices: false$"),
        (("trainer.memory_format=channels_last",), {}, 1, "trainer.memory_format=channels_last: torch's BatchNorm has"),
        (("runtime.backend=nccl",), {}, 1, "runtime.backend=nccl: needs runtime.device=cuda"),
    ],
)
def test_what_torch_lacks_is_refused_in_one_line(
    overrides: tuple[str, ...],
    torch_has: dict[str, Any],
    ranks: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, **torch_has)
    with pytest.raises(ConfigError, match=f"^{line}") as refused:
        check(small("runtime.device=mps", *overrides), World(0, ranks, 0, ranks, "host"))
    assert "\n" not in str(refused.value)


class DoublesInside(nn.Module):
    """Float64 that comes of the images (``wrong``), or that never meets them."""

    def __init__(self, in_channels: int, num_classes: int, wrong: str) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels * 64, num_classes)
        self.wrong = wrong

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, num_classes] of images [n, C, 8, 8]."""
        factor = (torch.ones(1, dtype=torch.float64) * 2).sum().item()
        logits: torch.Tensor = self.head(images.flatten(1)) * factor
        if self.wrong == "double":
            return logits.double().float()
        if self.wrong == "mul":
            return (logits * torch.ones(4, dtype=torch.float64)).float()
        return logits


@pytest.mark.parametrize("wrong", ["double", "mul", "nothing"])
def test_a_model_that_makes_float64_is_refused_before_training(wrong: str, fake: FakeMps) -> None:
    model = ("model=custom", "model._target_=tests.test_apple_gpu.DoublesInside", f"+model.kwargs.wrong={wrong}")
    check(small(*model, "runtime.device=cpu"), ALONE)
    if wrong == "nothing":
        check(small(*model, "runtime.device=mps"), ALONE)
        return
    line = rf"^model._target_=.*DoublesInside: makes a float64 tensor in its forward pass \({wrong}\), and an Apple GPU"
    with pytest.raises(ConfigError, match=line):
        check(small(*model, "runtime.device=mps"), ALONE)


@pytest.mark.parametrize("overrides", [("trainer.precision=bf16",), ("trainer.precision=fp16",), ("strategy=ddp",)])
def test_what_torch_has_is_accepted(overrides: tuple[str, ...], fake: FakeMps) -> None:
    check(small("runtime.device=mps", *overrides), ALONE)


def test_auto_leaves_the_apple_gpu_alone(fake: FakeMps) -> None:
    assert choose_device(small(), ALONE) == torch.device("cpu")
    assert choose_device(small("runtime.device=mps"), ALONE) == torch.device("mps")


# --- parts -----------------------------------------------------------------------------------------------------------


def test_float64_stays_where_the_device_has_it() -> None:
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert float64_device(torch.device("mps")) == torch.device("cpu")


def test_a_step_seeds_the_devices_generator_too(fake: FakeMps) -> None:
    for generator in generators(torch.device("mps")):
        generator.manual_seed(7)
    assert torch.initial_seed() == 7
    assert fake.state[0] == 7


def test_the_random_state_of_the_device_comes_back(fake: FakeMps) -> None:
    fake.state.fill_(5)
    before = RandomState.now()
    torch.mps.manual_seed(9)
    assert fake.state[0] == 9
    before.restore()
    assert fake.state[0] == 5
