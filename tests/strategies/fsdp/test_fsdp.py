"""strategy=fsdp trains as one process does, with the memory and the bytes that it promises."""

from __future__ import annotations

import gc
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import safetensors_writer
from distrain.checkpoint import writer as checkpoint_writer
from distrain.checkpoint.format import checkpoint_path, checkpoints_folder
from distrain.communication.shared_memory.channel import Operation
from distrain.errors import ConfigError
from distrain.models.deferred import CannotDefer, DeferredTensors
from distrain.runtime.live_memory import LiveMemory
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.fsdp.strategy import FSDP
from tests.checkpoint.helpers import progress
from tests.harness import run_ranks
from tests.runs import check, compose, relative_difference, small, train_on_rank, trainer_for
from tests.strategies.fsdp import models

SHARDS = ("optimizer", "gradients", "full")
#: Many small blocks and buckets.
SMALL_BLOCKS = ("strategy.block_mb=1e-4", "strategy.first_bucket_mb=1e-3", "strategy.bucket_mb=1e-2")
TRANSFORMER = ("model=custom", "model._target_=tests.strategies.fsdp.models.Transformer")
#: With tensors that are large enough to be made later.
LARGE = ("model=cifar_cnn", "data.height=32", "data.width=32", "trainer.max_steps=2", "resume=never")
COMMON = ("optimizer=adam", "optimizer.eps=1e-3", "trainer.max_steps=10", "trainer.epochs=9", "resume=never")
#: Ways of training; the sizes of batches (10, 7 and 23, 1) don't divide by the numbers of ranks.
WAYS: dict[str, tuple[str, ...]] = {
    "transformer": (*TRANSFORMER, "trainer.precision=fp64", "trainer.grad_clip_norm=0.5"),
    "accumulated": (*TRANSFORMER, "trainer.precision=fp64", "trainer.micro_batch_size=2"),
    "batch norm": (
        *("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=batch"),
        *("trainer.precision=fp64", "data.batch_size=23"),
    ),
    # A slice is a vector, as the weight of a norm layer is.
    "float32": (
        *("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=group"),
        *("optimizer.weight_decay=0.1", "optimizer.no_decay=[norm]"),
    ),
    "CIFAR-10 CNN": ("model=cifar_cnn", "data.height=32", "data.width=32"),
    "ResNet-18": ("model=resnet18", "trainer.precision=fp64", "trainer.max_steps=3", "optimizer.lr=0.001"),
}
#: What each number of ranks trains.
CASES: dict[int, list[tuple[str, tuple[str, ...]]]] = {
    2: [
        ("transformer", ("strategy.shard=full",)),
        ("accumulated", ("strategy.shard=full", "strategy.reshard_after_forward=false")),
        ("float32", ("strategy.shard=full",)),
    ],
    3: [
        *(("accumulated", (f"strategy.shard={shard}",)) for shard in SHARDS),
        ("batch norm", ("strategy.shard=gradients",)),
    ],
    4: [
        *(("transformer", (f"strategy.shard={shard}", "strategy.shard_size=2")) for shard in SHARDS),
        ("batch norm", ("strategy.shard=full",)),
        ("batch norm", ("strategy.shard=full", "strategy.shard_size=2")),
    ],
}
EVERYTHING = {
    ranks: [
        (way, (f"strategy.shard={shard}", *size))
        for way, shard in itertools.product(WAYS, SHARDS)
        for size in (((), ("strategy.shard_size=2",)) if ranks == 4 else ((),))
    ]
    for ranks in CASES
}


def _not_ready(self: Operation) -> bool:
    return False


def train_each(way_of_each: list[tuple[str, tuple[str, ...]]], folder: str) -> list[dict[str, Any]]:
    """Trains each in turn in the same processes, because processes are slow to start.

    The third and the fourth rank never find anything done before they wait for it, as happens on a busy machine.
    """
    if World.from_environment().rank >= 2:
        Operation.ready = _not_ready  # type: ignore[method-assign]
    return [
        train_on_rank(small(*COMMON, *WAYS[way], *more, f"run_dir={folder}/{index}"))
        for index, (way, more) in enumerate(way_of_each)
    ]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        *(pytest.param(ranks, cases, id=f"{ranks} ranks") for ranks, cases in CASES.items()),
        *(
            pytest.param(ranks, cases, id=f"{ranks} ranks, everything", marks=pytest.mark.soak)
            for ranks, cases in EVERYTHING.items()
        ),
    ],
)
def test_fsdp_is_the_serial_run(
    ranks: int, cases: list[tuple[str, tuple[str, ...]]], serial: dict[str, Any], tmp_path: Path
) -> None:
    new = [way for way in dict.fromkeys(way for way, _ in cases) if way not in serial]
    if new:
        found = run_ranks(train_each, 1, [(way, ()) for way in new], str(tmp_path / "one"))[0]
        serial |= dict(zip(new, found, strict=True))
    sharded = [(way, ("strategy=fsdp", *SMALL_BLOCKS, *more)) for way, more in cases]
    runs_of_ranks = run_ranks(train_each, ranks, sharded, str(tmp_path / "many"), timeout=500)
    for (way, more), *runs in zip(cases, *runs_of_ranks, strict=True):
        expected = serial[way]
        for run in runs:
            bound = 1e-11 if "trainer.precision=fp64" in WAYS[way] else 1e-5
            assert relative_difference(run["model"], expected["model"]) <= bound, (way, more)
            for count in ("test_correct", "test_count", "samples", "steps"):
                assert run["summary"][count] == expected["summary"][count], (way, more)


# --- a strategy by itself --------------------------------------------------------------------------------------------


class Wide(nn.Sequential):
    """Eight equal layers, so that each is a block."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        width = 64 * in_channels
        layers = [nn.Linear(width, width, bias=False) for _ in range(8)]
        super().__init__(nn.Flatten(), *layers, nn.Linear(width, num_classes))


def float_storages() -> dict[int, int]:
    """Bytes of each storage of floating-point tensors that Python holds, by its address."""
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.is_floating_point()]
    storages = [each.untyped_storage() for each in tensors if each.device.type == "cpu"]
    return {each.data_ptr(): each.nbytes() for each in storages}


class Within:
    """A hook of a module that notes what memory there is at its call that there was not before the step."""

    def __init__(self, before: dict[int, int]) -> None:
        self.before, self.bytes = before, list[int]()

    def __call__(self, *_: Any) -> None:
        self.bytes.append(sum(size for key, size in float_storages().items() if key not in self.before))


def measured(shards: list[str], folder: str) -> dict[str, dict[str, Any]]:
    """The memory of parameters, gradients and optimizer state, and the bytes sent in a step."""
    found = {}
    for shard in shards:
        options = (f"strategy.shard={shard}", "strategy.block_mb=0.15", "strategy.bucket_mb=0.15")
        layers = ("model=custom", "model._target_=tests.strategies.fsdp.test_fsdp.Wide", "optimizer=adam")
        config = small("strategy=fsdp", *layers, *options, "strategy.first_bucket_mb=0.15", f"run_dir={folder}/{shard}")
        with Runtime(config, World.from_environment()) as runtime:
            trainer = trainer_for(config, runtime)
            strategy = trainer.strategy
            assert isinstance(strategy, FSDP)
            gc.collect()
            parameters = sum(parameter.numel() * 4 for parameter in Wide(3, 4).parameters())
            batches = list(itertools.islice(trainer.loaders["train"].epoch(0), 2))
            strategy.train_step(batches[0])
            before = dict(strategy.ledger.sent)
            within = Within(float_storages())
            layer = strategy.model.get_submodule("4")
            hook = layer.register_forward_hook(within)
            strategy.train_step(batches[1])
            hook.remove()
            gc.collect()
            sent = {kind: size - before.get(kind, 0) for kind, size in strategy.ledger.sent.items()}
            kept = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in _tensors_of(strategy)
            }
            found[shard] = {
                "parameters": parameters,
                "kept": sum(kept.values()),
                "gathered": max(within.bytes),
                "sent": sum(sent.values()),
                "predicted": strategy.uncompressed_bytes_per_step(),
            }
            if shard == "full":
                found[shard] |= memory_of_checkpoints(strategy, Path(folder))
    return found


def memory_of_checkpoints(strategy: FSDP, folder: Path) -> dict[str, int]:
    """The most bytes that a rank has, besides what it keeps, while it saves, loads and exports a model."""
    with LiveMemory(torch.device("cpu")) as saving:
        state = {**strategy.state_dict(), "layout": strategy.layout}
        path = checkpoint_writer.save(folder / "checkpoints", state, progress(2), strategy.runtime.communicator())
    with LiveMemory(torch.device("cpu")) as loading:
        strategy.load_state_dict(checkpoint_reader.load(path)[0])
    with LiveMemory(torch.device("cpu")) as exporting:
        name = folder / f"exported by {strategy.runtime.world.rank}"
        safetensors_writer.write_alone(name, checkpoint_reader.load_model(path), {})
    moments = sum(value.nbytes for each in strategy.optimizer.state.values() for value in each.values())
    return {"saving": saving.peak, "loading": loading.peak - moments, "exporting": exporting.peak}


def _tensors_of(strategy: FSDP) -> list[Tensor]:
    """What a rank keeps between two steps."""
    state = [value for each in strategy.optimizer.state.values() for value in each.values()]
    slices = [parameter for group in strategy.optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in [*slices, *strategy.model.parameters()]]
    found = [*state, *slices, *strategy.model.parameters(), *gradients]
    return [tensor.detach() for tensor in found if isinstance(tensor, Tensor) and tensor.dim()]


def test_memory_and_bytes_of_a_rank_are_those_of_the_formula(tmp_path: Path) -> None:
    for rank in run_ranks(measured, 4, list(SHARDS), str(tmp_path)):
        # Parameters, gradients and Adam's two moments, in units of the parameters' size.
        for shard, kept, moved in (("optimizer", 1 + 1 + 0.5, 3), ("gradients", 1 + 0.25 + 0.5, 2), ("full", 1, 3)):
            found = rank[shard]
            size = found["parameters"]
            assert found["kept"] == pytest.approx(kept * size, rel=0.1), shard
            # Of each byte that is gathered or scattered a rank sends three quarters. All-reduces count twice.
            assert found["sent"] == pytest.approx(0.75 * moved * size, rel=0.1), shard
            assert found["sent"] == pytest.approx(found["predicted"], rel=0.01), shard
        # One block in use, and one ahead; activations are small.
        layer = rank["full"]["parameters"] / 8
        assert rank["full"]["gathered"] <= 2.5 * layer
        for what in ("saving", "loading", "exporting"):
            assert rank["full"][what] <= 1.1 * layer, what


def skipping(folder: str) -> dict[str, Any]:
    """Trains a model of which rank 1 leaves two layers out."""
    rank = World.from_environment().rank
    models.SKIPS = rank == 1
    name = ("model=custom", "model._target_=tests.strategies.fsdp.models.SometimesSkipped", "optimizer=sgd")
    found = {}
    for strategy in ("ddp", "fsdp"):
        blocks = ("strategy.block_mb=1e-4",) if strategy == "fsdp" else ()
        options = (f"strategy={strategy}", *blocks, "trainer.max_steps=4", f"run_dir={folder}/{strategy}")
        found[strategy] = train_on_rank(small(*name, *options, "trainer.precision=fp64"))["model"]
    return found


def test_a_rank_that_leaves_layers_out_trains_with_the_others(tmp_path: Path) -> None:
    for found in run_ranks(skipping, 2, str(tmp_path)):
        assert relative_difference(found["fsdp"], found["ddp"]) <= 1e-11


def unable_to_defer(folder: str) -> dict[str, Tensor]:
    """Trains a model that rank 1 can't build without its large tensors."""
    unable = World.from_environment().rank == 1
    fails = mock.patch.object(DeferredTensors, "check", side_effect=CannotDefer("for a test"))
    with fails if unable else nullcontext():
        options = ("strategy=fsdp", "strategy.shard=full", "runtime.setup_timeout_seconds=60")
        return train_on_rank(small(*LARGE, *options, f"run_dir={folder}"))["model"]  # type: ignore[no-any-return]


def test_all_ranks_begin_with_the_whole_model_if_one_has_to(tmp_path: Path) -> None:
    usual = run_ranks(train_on_rank, 1, small(*LARGE, f"run_dir={tmp_path / 'one'}"))[0]
    for found in run_ranks(unable_to_defer, 2, str(tmp_path / "two")):
        assert relative_difference(found, usual["model"]) <= 1e-5


def test_each_rank_saves_its_part_and_continues_bit_for_bit(tmp_path: Path) -> None:
    options = (
        "strategy=fsdp",
        *SMALL_BLOCKS,
        *TRANSFORMER,
        "optimizer=adam",
        "checkpoint.every_steps=3",
        "checkpoint.keep=9",
    )
    whole = run_ranks(train_on_rank, 3, small(*options, "trainer.max_steps=6", f"run_dir={tmp_path}/whole"))
    checkpoint = checkpoint_path(checkpoints_folder(tmp_path / "whole"), 3)
    for part in ("model", "optimizer"):
        sizes = [(checkpoint / f"{part}_{rank:05d}.safetensors").stat().st_size for rank in range(3)]
        assert max(sizes) < 1.5 * min(sizes)
    state = checkpoint_reader.load(checkpoint)[0]
    names = set(whole[0]["model"])
    assert set(state["model"]) == names
    moments = {f"{name}/exp_avg" for name in names if not name.startswith("frozen.")}
    assert moments == {key for key in state["optimizer"] if key.endswith("/exp_avg")}
    again = (f"run_dir={tmp_path}/again", f"resume={checkpoint}", "trainer.max_steps=6")
    for rank, before in zip(run_ranks(train_on_rank, 3, small(*options, *again)), whole, strict=True):
        assert all(torch.equal(tensor, before["model"][name]) for name, tensor in rank["model"].items())


def own_states(folder: str) -> None:
    """Trains four steps with shards of both kinds, and the last two of them again."""
    options = (
        *("strategy=fsdp", *SMALL_BLOCKS, "model=custom", "model._target_=tests.strategies.fsdp.models.OwnState"),
        *("trainer.ema.decay=0.5", "trainer.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep=9"),
    )
    for shard in SHARDS[1:]:
        begun = train_on_rank(small(*options, f"strategy.shard={shard}", f"run_dir={folder}/{shard}"))["run_dir"]
        resume = f"resume={checkpoint_path(checkpoints_folder(Path(begun)), 2)}"
        train_on_rank(small(*options, f"strategy.shard={shard}", f"run_dir={folder}/{shard}_again", resume))


def test_checkpoints_have_layers_with_two_names_and_averages_of_what_is_not_saved_as_it_is(tmp_path: Path) -> None:
    run_ranks(own_states, 3, str(tmp_path))
    names = (name for shard in SHARDS[1:] for name in (shard, f"{shard}_again"))
    first, *others = (
        checkpoint_reader.load(checkpoint_path(checkpoints_folder(tmp_path / name), 4))[0] for name in names
    )
    expected = {name: tensor.shape for name, tensor in models.OwnState(3, 4).state_dict().items()}
    assert {name: tensor.shape for name, tensor in first["model"].items()} == expected
    assert {name.removeprefix("ema/"): tensor.shape for name, tensor in first["average"].items()} == expected
    for other in others:
        assert relative_difference(other["model"], first["model"]) <= 1e-5
        assert relative_difference(other["average"], first["average"]) <= 1e-5


@pytest.mark.parametrize(
    ("overrides", "ranks", "line"),
    [
        (("strategy.shard_size=3",), 4, "strategy.shard_size=3: must divide 4 ranks; choices: 1, 2, 4"),
        (
            ("compression=powersgd",),
            2,
            "compression=powersgd: compresses all-reduces, and strategy.shard=full has none; strategy.shard=optimizer "
            "has; choices: none",
        ),
        (
            ("trainer.compile=true",),
            2,
            "trainer.compile=true: is not possible under strategy.shard=full, whose parameters come and go; "
            "choices: false",
        ),
        (
            ("optimizer=muon",),
            2,
            "optimizer.name=muon: updates a parameter as a whole, and this strategy divides it among ranks, element by "
            "element; strategy=ddp keeps it whole",
        ),
        (
            ("strategy.offload=host", "runtime.device=cpu"),
            2,
            "strategy.offload=host: this run computes on CPUs, whose memory is the host's; choices: none, file",
        ),
        (
            ("strategy.offload=file", "strategy.offload_folder=/nowhere"),
            2,
            "strategy.offload_folder=/nowhere: no file can be made in /nowhere (No such file or directory)",
        ),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line(overrides: tuple[str, ...], ranks: int, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(compose("data=synthetic", "strategy=fsdp", *overrides), World(0, ranks, 0, ranks, "here"))
    assert str(refused.value) == line


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_element_wise_optimizers_are_not_refused(optimizer: str) -> None:
    check(compose("data=synthetic", "strategy=fsdp", f"optimizer={optimizer}"), World(0, 2, 0, 2, "here"))
