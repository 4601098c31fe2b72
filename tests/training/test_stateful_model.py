"""A model's own state survives every stop: extra state, load hooks, and buffers that a forward pass replaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import distrain
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import checkpoint_path, checkpoints_folder
from distrain.cli import app
from distrain.cli.run_folder import RunFolder
from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.models.base import BlockSequence
from tests.harness import run_ranks
from tests.runs import check, small
from tests.strategies.helpers import ALONE
from tests.strategies.tensor_parallel.models import Halved


class Remembers(nn.Module):
    """What it computes depends on all that it has seen, which it keeps in every way that a module may.

    ``calls`` and ``longest`` are extra state of plain data; ``mean`` is a buffer that each forward pass replaces, and
    ``seen`` one that it changes.
    """

    mean: Tensor
    seen: Tensor

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.calls, self.least = 0, float("inf")

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.conv(input)
        if self.training:
            self.calls += 1
            self.least = min(self.least, float(out.detach().amin()))
            self.seen += len(input)
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean((0, 2, 3)).view_as(self.mean)
        return torch.relu((out - self.mean) * (1 + 0.01 * self.calls) + 0.001 * self.seen)

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "least": self.least}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls, self.least = state["calls"], state["least"]


class Scales(nn.Module):
    """Its extra state is a tensor that grows, and it saves its weight inverted and under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1) * 2)
        self.history = torch.zeros(0, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.history = torch.cat([self.history, input.detach().mean().double().view(1)])
        return input * self.weight * (1 + 0.01 * len(self.history)) + self.history.sum().to(input) * 0.001

    def get_extra_state(self) -> Tensor:
        return self.history

    def set_extra_state(self, state: Tensor) -> None:
        self.history = state.clone()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}negative"] = -destination.pop(f"{prefix}weight")

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state[f"{prefix}weight"] = -state.pop(f"{prefix}negative")
        super()._load_from_state_dict(state, prefix, *arguments)


class Stateful(BlockSequence):
    def __init__(self, in_channels: int, num_classes: int) -> None:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Halved(8, num_classes))
        blocks = {"first": Remembers(in_channels, 8), "scale": Scales(), "second": Remembers(8, 8), "head": head}
        super().__init__(blocks)


MODEL = ("model=custom", "model._target_=tests.training.test_stateful_model.Stateful")
#: Not chosen by timing.
FORMATS = ("trainer.precision=fp32", "trainer.memory_format=contiguous")
#: The last batch of an epoch, of 7 images, is not divided evenly.
DATA = ("data.train_size=47", "data.val_fraction=0", "scheduler=constant", "trainer.epochs=100", *FORMATS)
OPTIONS = (*MODEL, "optimizer=sgd", "optimizer.lr=0.05", "optimizer.momentum=0.9", *DATA)
PIPELINE = ("strategy=pipeline", "strategy.schedule=gpipe", "strategy.microbatches=2", "strategy.boundaries=[second]")
#: Ranks and keys of each strategy.
STRATEGIES: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "ddp": (2, ("strategy=ddp",)),
    "fsdp": (2, ("strategy=fsdp", "strategy.block_mb=1e-4")),
    "pipeline": (2, PIPELINE),
    "local_sgd": (2, ("strategy=local_sgd", "strategy.sync_every=3")),
    "parameter_server": (3, ("strategy=parameter_server",)),
}


def train_all(configurations: list[Config]) -> list[dict[str, Any]]:
    """Trains each in turn in the same processes, because processes are slow to start."""
    return [app.train(configuration) for configuration in configurations]


def with_steps(folder: Path, name: str, steps: int, *overrides: str) -> Config:
    options = ("checkpoint.every_steps=1", "checkpoint.keep=20", f"trainer.max_steps={steps}", *STRATEGIES[name][1])
    return small(*OPTIONS, *options, f"run_dir={folder}", *overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of 8 steps of each strategy: ``NAME_whole``, and ``NAME_parts``, which stopped after 6."""
    folder = tmp_path_factory.mktemp("stateful")
    for ranks in (1, 2, 3):
        names = [name for name, (needed, _) in STRATEGIES.items() if needed == ranks]
        configurations = [with_steps(folder / f"{name}_whole", name, 8) for name in names]
        configurations += [with_steps(folder / f"{name}_parts", name, steps) for name in names for steps in (6, 8)]
        run_ranks(train_all, ranks, configurations, timeout=300)
    return folder


def state_of(run: Path, step: int = 8) -> dict[str, Any]:
    return checkpoint_reader.load(checkpoint_path(checkpoints_folder(run), step))[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained: Path, name: str) -> None:
    whole, parts = state_of(trained / f"{name}_whole"), state_of(trained / f"{name}_parts")
    assert whole["model"].keys() == parts["model"].keys()
    for part in ("model", "optimizer"):
        for key, tensor in whole[part].items():
            assert torch.equal(tensor, parts[part][key]), key
    assert whole["scalars"]["module"] == parts["scalars"]["module"]
    for one, other in zip(whole["local"], parts["local"], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("name", STRATEGIES)
def test_extra_state_counts_this_run_s_forward_passes_alone(trained: Path, name: str) -> None:
    state = state_of(trained / f"{name}_whole")
    calls = 16 if name == "pipeline" else 8
    assert calls_of(state) == [calls, calls]
    assert len(state["model"]["scale._extra_state"]) == calls
    assert state["model"]["scale._extra_state"].dtype == torch.float64
    assert "scale.negative" in state["model"]
    assert state["model"]["first.mean"].any()


def test_ranks_whose_own_state_differs_save_it_and_equal_ranks_do_not(trained: Path) -> None:
    assert state_of(trained / "single_whole")["local"][0] == {}
    own = state_of(trained / "ddp_whole")["local"]
    assert int(own[0]["module/first.seen"]) > int(own[1]["module/first.seen"])


def test_replaced_buffers_are_the_mean_of_all_ranks_in_checkpoints(trained: Path) -> None:
    # One step on two ranks: the mean of the replaced buffers is a tenth of the mean output, weighted by rank.
    single, ddp = (state_of(trained / f"{name}_whole", 1)["model"]["first.mean"] for name in ("single", "ddp"))
    torch.testing.assert_close(single, ddp)


@pytest.mark.soak
def test_every_strategy_goes_on_from_the_state_of_every_other(trained: Path, tmp_path: Path) -> None:
    sources = {name: checkpoint_path(checkpoints_folder(trained / f"{name}_whole"), 6) for name in STRATEGIES}
    for ranks in (1, 2, 3):
        configurations = [
            with_steps(tmp_path / f"{before}_{name}", name, 7, f"resume={path}")
            for name, (needed, _) in STRATEGIES.items()
            for before, path in sources.items()
            if needed == ranks and before != name
        ]
        run_ranks(train_all, ranks, configurations, timeout=300)
    for name in STRATEGIES:
        for before, path in sources.items():
            if before != name:
                saved, resumed = checkpoint_reader.load(path)[0], state_of(tmp_path / f"{before}_{name}", 7)
                history, longer = (state["model"]["scale._extra_state"] for state in (saved, resumed))
                passes = 2 if name == "pipeline" else 1
                assert len(longer) == len(history) + passes, (before, name)
                assert torch.equal(longer[: len(history)], history), (before, name)
                assert calls_of(resumed) == [calls + passes for calls in calls_of(saved)], (before, name)


def calls_of(state: dict[str, Any]) -> list[int]:
    extra = state["scalars"]["module"]["extra_state"]
    return [json.loads(extra[f"{block}._extra_state"])["calls"] for block in ("first", "second")]


def test_commands_build_the_model_with_its_extra_state(trained: Path) -> None:
    for name in ("single", "pipeline"):
        folder = RunFolder.open(str(trained / f"{name}_whole"))
        model = folder.model(folder.weights("newest"), allow=["tests.training.test_stateful_model"])
        first, scale = model.get_submodule("first"), model.get_submodule("scale")
        assert isinstance(first, Remembers)
        assert isinstance(scale, Scales)
        assert first.calls == len(scale.history) == (16 if name == "pipeline" else 8)
        assert first.least < float("inf")
        assert scale.weight.item() == -state_of(trained / f"{name}_whole")["model"]["scale.negative"].item()


def test_the_exported_file_holds_the_extra_state(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    distrain.export(trained / "single_whole", target, allow=["tests.training.test_stateful_model"])
    with safe_open(target, "pt") as file:
        extra = json.loads(file.metadata()["extra_state"])
        assert file.get_tensor("scale._extra_state").dtype == torch.float64
    assert extra["first._extra_state"]["calls"] == 8


class Unsaveable(nn.Sequential):
    """Its extra state is the argument, which no checkpoint can hold."""

    def __init__(self, in_channels: int, num_classes: int, what: str) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
        self.what = what

    def get_extra_state(self) -> Any:
        return {
            "tuple": (1, 2),
            "set in a list": [{1}],
            "number as a key": {"a": {1: 2}},
            "module": nn.ReLU(),
            "bytes": b"",
            "nested tensor": {"amax": torch.zeros(1)},
            "complex tensor": torch.zeros(1, dtype=torch.complex64),
            "sparse tensor": torch.zeros(2, 2, device="cpu").to_sparse(),
            "long number": 10**5000,
        }[self.what]

    def set_extra_state(self, state: Any) -> None:
        pass


class NeverLoads(nn.Linear):
    """Saves extra state and can't load it."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels * 64, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))

    def get_extra_state(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        *[
            ((f"model._target_={__name__}.Unsaveable", f"+model.kwargs.what='{what}'"), problem)
            for what, problem in {
                "tuple": r"Unsaveable has the state _extra_state, a tuple; a checkpoint can hold a tensor or pl",
                "set in a list": r"a set at \[0\]",
                "number as a key": r"a dictionary\['a'\] with the key 1, which is no text",
                "module": "a ReLU",
                "bytes": "a bytes",
                "nested tensor": r"a Tensor at \['amax'\]",
                "complex tensor": r"a tensor of torch\.complex64",
                "sparse tensor": r"a tensor of layout torch\.sparse_coo",
                "long number": "a number of 16610 bits",
            }.items()
        ],
        (
            (f"model._target_={__name__}.NeverLoads",),
            r"NeverLoads can't load the state that it saves \(.*_extra_state is not in",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else value[-1].rpartition("=")[2],
)
def test_what_can_not_be_saved_is_refused_before_it_is_trained(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        check(small("model=custom", *overrides), ALONE)
    assert str(caught.value).startswith("model: ")
    assert "\n" not in str(caught.value)
