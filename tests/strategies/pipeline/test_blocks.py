"""Ordinary blocks in a pipeline: what they hand over, change and leave frozen; each trains as in one process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.strategies.pipeline import split
from distrain.strategies.pipeline.blocks import flatten, named_blocks, trace_blocks
from distrain.strategies.precision import Precision
from tests.harness import run_ranks, soaked
from tests.runs import check, relative_difference, small, train_on_rank

#: Schedules with their stages per rank.
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "interleaved_zero_bubble": 2, "zbv_zero_bubble": 2}


class Two(nn.Module):
    """Hands over a tensor and one computed from it."""

    def __init__(self, channels: int, container: type = tuple) -> None:
        super().__init__()
        self.conv, self.container = nn.Conv2d(channels, 8, 3, padding=1), container

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.container((y, y.relu()))


class Between(nn.Module):
    """Takes two tensors and hands over two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, pair: Any) -> Any:
        return type(pair)((self.conv(pair[1]), pair[0]))


class WithMask(nn.Module):
    """Also hands over a mask, which has no gradient, and integers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, x > 0, torch.arange(len(x), device=x.device)


class Masked(nn.Module):
    def forward(self, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, mask, numbers = given
        return x * mask + 0 * numbers.view(-1, 1, 1, 1)


class UsesOne(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        first: Tensor = pair[0]
        return first


class Sum(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        total: Tensor = pair[0] + pair[1]
        return total


class WithLock(nn.Module):
    """Can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.conv = threading.Lock(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class OfMode(nn.Module):
    """Hands over a pair in training and a tensor in evaluation."""

    def forward(self, x: Tensor) -> Any:
        return (x, x) if self.training else x


class OfModeTaker(nn.Module):
    def forward(self, given: Any) -> Tensor:
        first: Tensor = given[0] if isinstance(given, tuple) else given
        return first


class ChangesImages(nn.Module):
    """Writes into a part of the images that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x[:, :1].mul_(0.5)
        return x


def head(classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)]


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def conv(inputs: int = 8) -> nn.Module:
    return nn.Conv2d(inputs, 8, 3, padding=1)


def model(in_channels: int, num_classes: int, kind: str) -> nn.Module:
    norm, shared = nn.utils.weight_norm, nn.ReLU()
    trunks: dict[str, list[nn.Module]] = {
        "in place": [conv(in_channels), nn.ReLU(inplace=True), conv(), nn.ReLU(inplace=True)],
        "in place after nothing": [conv(in_channels), nn.Identity(), nn.ReLU(inplace=True), conv(), nn.ReLU(True)],
        "frozen front": [frozen(conv(in_channels)), nn.ReLU(), frozen(conv()), nn.ReLU()],
        "frozen middle": [conv(in_channels), nn.ReLU(), frozen(conv()), nn.ReLU(), conv()],
        "frozen front with in place": [frozen(conv(in_channels)), nn.ReLU(True), frozen(conv()), nn.ReLU(True), conv()],
        "old weight norm": [norm(conv(in_channels)), nn.ReLU(), norm(conv())],
        "new weight norm": [nn.utils.parametrizations.weight_norm(conv(in_channels)), nn.Tanh(), conv()],
        "lock": [conv(in_channels), WithLock(), nn.Tanh()],
        "tuple": [Two(in_channels), Between(), Sum(), nn.Tanh()],
        "list": [Two(in_channels, list), Between(), Between(), Sum()],
        "mask": [conv(in_channels), WithMask(), Masked(), conv()],
        "other tensors in evaluation": [conv(in_channels), OfMode(), OfModeTaker(), conv()],
        "changed images": [ChangesImages(), conv(in_channels), nn.Tanh()],
        "unused tensor": [Two(in_channels), UsesOne(), conv()],
        "one activation used twice": [conv(in_channels), shared, conv(), shared, conv(), shared],
        "views": [conv(in_channels), nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2), nn.Identity(), conv()],
    }  # fmt: skip
    return nn.Sequential(*trunks[kind], *head(num_classes))


KINDS = (
    "in place", "in place after nothing", "frozen front", "frozen middle", "frozen front with in place",
    "old weight norm", "new weight norm", "lock", "tuple", "list", "mask", "unused tensor",
    "other tensors in evaluation", "changed images", "one activation used twice", "views",
)  # fmt: skip


#: Kinds that are trained with all schedules.
IN_ALL_SCHEDULES = ("in place", "frozen front", "mask")


def train_all(folder: str, kind: str) -> dict[str, Any]:
    """Trains the model in one process, or with each schedule under two."""
    own = ("model=custom", "model._target_=tests.strategies.pipeline.test_blocks.model", f"+model.kwargs.kind='{kind}'")
    common = ("trainer.precision=fp64", "trainer.max_steps=6", "trainer.epochs=2", "optimizer=sgd", "optimizer.lr=0.05")
    found = {}
    schedules = SCHEDULES if kind in IN_ALL_SCHEDULES else {"1f1b": 1}
    for schedule, per_rank in schedules.items() if World.from_environment().size > 1 else [("single", 0)]:
        pipeline: tuple[str, ...] = ()
        if per_rank:
            pipeline = ("strategy=pipeline", f"strategy.schedule={schedule}", f"strategy.stages={2 * per_rank}")
        found[schedule] = train_on_rank(small(*own, *common, *pipeline, f"run_dir={folder}/{schedule}"))["model"]
    return found


#: Kinds that every run of the tests trains.
ALWAYS = ("in place", "frozen middle", "new weight norm", "tuple", "one activation used twice")


@pytest.mark.parametrize("kind", soaked(KINDS, ALWAYS))
def test_a_pipeline_of_ordinary_blocks_equals_one_process(kind: str, tmp_path: Path) -> None:
    expected = run_ranks(train_all, 1, str(tmp_path / "one"), kind)[0]["single"]
    for schedule, trained in run_ranks(train_all, 2, str(tmp_path / "two"), kind)[0].items():
        assert relative_difference(trained, expected) <= 1e-12, schedule


def trace(*blocks: nn.Module) -> Any:
    return trace_blocks(nn.Sequential(*blocks), torch.zeros(4, 3, 8, 8), Precision("fp32", torch.device("cpu")))


class Returns(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return {"dict": {"x": x}, "None": None, "mean": x.mean(), "halves": x[::2], "nested": ((x, x), x)}[self.kind]


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("dict", "hands over a dict, which is neither a tensor nor a tuple or list of tensors"),
        ("None", "hands over a NoneType"),
        ("nested", "hands over a tuple"),
        ("mean", "hands over [] for two images; the first dimension must be the image"),
        ("halves", "hands over [1, 3, 8, 8] for two images"),
    ],
)
def test_a_block_whose_output_cant_be_sent_is_named_where_a_stage_would_end_with_it(kind: str, problem: str) -> None:
    traced = trace(nn.Conv2d(3, 3, 1), Returns(kind))
    assert [block.output is None for block in traced] == [False, True]
    assert traced[1].name == "1"
    assert traced[1].problem.startswith(problem)


class Takes(nn.Module):
    def forward(self, given: Any) -> Tensor:
        first: Tensor = given["x"] if isinstance(given, dict) else given
        return first


def refusable(in_channels: int, num_classes: int, kind: str) -> nn.Module:
    blocks = {
        "dict": [Returns("dict"), Takes(), conv(in_channels), *head(num_classes)],
        "dict last": [conv(in_channels), Returns("dict"), nn.Sequential(Takes(), *head(num_classes))],
    }
    return nn.Sequential(*blocks[kind])


@pytest.mark.parametrize(
    ("kind", "ranks", "options", "refusal"),
    [
        ("dict", 2, ("strategy.boundaries=['1']",), "strategy.boundaries=1: the block before it, 0, hands over a dict"),
        (
            "dict last",
            3,
            ("strategy.stages=3",),
            "strategy.stages=3: the model can be cut at 1 places only: 1 hands",
        ),
    ],
)
def test_blocks_that_cant_be_in_stages_are_refused_before_ranks_meet(
    kind: str, ranks: int, options: tuple[str, ...], refusal: str
) -> None:
    target = ("model=custom", f"model._target_={__name__}.refusable", f"+model.kwargs.kind='{kind}'")
    with pytest.raises(ConfigError) as refused:
        check(small(*target, "strategy=pipeline", *options), World(0, ranks, 0, ranks, "here"))
    assert str(refused.value).startswith(refusal)


def test_a_block_that_fails_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model=1: this block fails on two images \(RuntimeError"):
        trace(nn.Conv2d(3, 3, 1), nn.Conv2d(4, 4, 1))


def test_tracing_finds_changed_inputs_and_leaves_the_model_as_it_was() -> None:
    blocks = [nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(inplace=True), nn.BatchNorm2d(4), WithMask()]
    before = [{name: tensor.clone() for name, tensor in block.state_dict().items()} for block in blocks]
    generator = torch.random.get_rng_state()
    traced = trace(*blocks)
    assert [block.changes_input for block in traced] == [False, True, True, False, False]
    assert [spec.requires_grad for spec in traced[-1].output.tensors] == [True, False, False]
    for block, state in zip(blocks, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
        assert all(parameter.grad is None for parameter in block.parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_a_block_that_hands_over_other_tensors_in_evaluation_ends_no_stage() -> None:
    traced = trace(OfMode(), OfModeTaker())
    assert traced[0].problem == "hands over other tensors in evaluation than in training"
    assert traced[1].output is not None


def test_a_block_that_cant_be_copied_keeps_its_attributes() -> None:
    class Counts(WithLock):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    block = Counts()
    trace(nn.Conv2d(3, 8, 1), block)
    assert block.calls == 0
    assert block.training


class OwnState(nn.Sequential):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None:
        assert state == 1


def hooked(*blocks: nn.Module) -> nn.Module:
    model = nn.Sequential(*blocks)
    model.register_forward_hook(lambda _, __, output: 2 * output)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OwnState, "OwnState loads or saves its state in its own way, and a pipeline does so with each part of it"),
        (hooked, "Sequential has hooks, which a pipeline does not call; register them at a submodule"),
    ],
)
def test_what_a_model_does_besides_its_blocks_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split.check(make(nn.Linear(4, 4), nn.Linear(4, 2)), 2, [])


def test_a_block_that_is_used_twice_is_there_twice_and_its_parameters_stay_in_one_stage() -> None:
    activation, layer = nn.ReLU(), nn.Linear(4, 4)
    model = nn.Sequential(layer, activation, nn.Linear(4, 4), activation, layer, nn.Linear(4, 2))
    assert [block for _, block in named_blocks(model)] == list(model)
    assert split.allowed_cuts(model) == [5]


def test_only_tensors_and_flat_containers_of_tensors_are_handed_over() -> None:
    x = torch.zeros(2)
    assert flatten(x)[0] is x
    assert len(flatten((x, x))) == 2
    values: list[Any] = [(), [], {"x": x}, (x, 1), 3, None]
    for value in values:
        with pytest.raises(TypeError, match="which is neither a tensor nor a tuple or list of tensors"):
            flatten(value)
