"""``trainer.micro_batch_size=auto`` finds the largest pass that fits, and the training stays the same."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distrain.cli import app
from distrain.config.schema import Config
from distrain.errors import ConfigError, Failed
from distrain.runtime.world import World
from distrain.strategies.fsdp.strategy import FSDP
from distrain.training import micro_batch
from tests.harness import run_ranks
from tests.runs import check, small

PAIR = World(0, 2, 0, 2, "host")
NET = ("model=custom", "model._target_=tests.runs.NormNet")
RUN = ("data.height=32", "data.width=32", "data.batch_size=24", "trainer.epochs=9", "optimizer.eps=1e-3")


def trained(configuration: Config) -> dict[str, Any]:
    """What a rank of a run does, with all that comes before training."""
    with app.prepared(configuration) as trainer:
        summary = trainer.fit()
        model = {name: tensor.clone() for name, tensor in trainer.strategy.model_state().items()}
    return {"summary": summary, "model": model, "size": trainer.config.trainer.micro_batch_size}


def in_turn(configurations: list[Config]) -> list[dict[str, Any]]:
    return [trained(configuration) for configuration in configurations]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_size_is_found_that_fits_and_that_a_resumed_run_keeps(ranks: int, tmp_path: Path) -> None:
    strategy = ("strategy=ddp",) if ranks > 1 else ()
    # The formats need different memory, and a trial would choose one by its time.
    common = (*RUN, *NET, "+model.kwargs.norm=group", "trainer.memory_format=contiguous", *strategy)

    def run(name: str, steps: int, *more: str) -> Config:
        return small(*common, f"trainer.max_steps={steps}", f"run_dir={tmp_path / name}", *more)

    auto, limit = "trainer.micro_batch_size=auto", 0.7 if ranks == 1 else 0.4
    limited = (auto, f"runtime.memory_limit_mb={limit}")
    plain, whole, found, longer = zip(
        *run_ranks(
            in_turn,
            ranks,
            [run("plain", 2), run("whole", 2, auto), run("found", 2, *limited), run("found", 3, auto)],
        ),
        strict=True,
    )
    assert {each["size"] for each in whole} == {None}
    (size,) = {each["size"] for each in found}
    assert 1 < size < 24 // ranks
    assert {each["size"] for each in longer} == {size}
    assert yaml.safe_load((tmp_path / "found" / "config.yaml").read_text())["trainer"]["micro_batch_size"] == size
    needed = sum(found[0]["summary"]["memory_by_kind_mb"]["measured"].values())
    assert needed <= limit < sum(plain[0]["summary"]["memory_by_kind_mb"]["measured"].values())
    for name, tensor in found[0]["model"].items():
        torch.testing.assert_close(tensor, plain[0]["model"][name], rtol=1e-4, atol=1e-6)
        assert torch.equal(whole[0]["model"][name], plain[0]["model"][name])


def test_batchnorm_is_warned_of_and_too_little_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch_norm = (*RUN, *NET, "+model.kwargs.norm=batch", "trainer.micro_batch_size=auto", "trainer.max_steps=1")
    run = trained(small(*batch_norm, "runtime.memory_limit_mb=1.0", f"run_dir={tmp_path / 'one'}"))
    said = capsys.readouterr().err
    assert f"trainer.micro_batch_size=auto: {run['size']} of the 24 samples that a rank has of a batch fit" in said
    assert "BatchNorm takes statistics of the samples that run at once, and a batch is run in" in said
    with pytest.raises(Failed):
        trained(small(*batch_norm, "runtime.memory_limit_mb=0.01", f"run_dir={tmp_path / 'two'}"))
    assert "ConfigError: trainer.micro_batch_size=auto: rank 0 on " in capsys.readouterr().err


def test_it_is_refused_where_memory_is_not_known() -> None:
    for key in ("trainer.micro_batch_size=auto", "model.checkpoint_activations=auto"):
        for strategy in ("pipeline", "tensor_parallel"):
            with pytest.raises(ConfigError, match=f"^{key}: strategy={strategy} doesn't know a rank's memory"):
                check(small(key, f"strategy={strategy}"), PAIR)


WIDE = ("model=custom", "model._target_=tests.strategies.fsdp.test_fsdp.Wide", "trainer.max_steps=1")


@pytest.mark.parametrize("key", ["trainer.micro_batch_size", "model.checkpoint_activations"])
def test_copies_of_the_parameters_count(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Parameters, gradients and the optimizer's state take 4.5 MiB, and a copy of the parameters 1.1.
    options = (*WIDE, f"{key}=auto", "runtime.memory_limit_mb=5.3")
    trained(small(*options, f"run_dir={tmp_path / 'plain'}"))
    with pytest.raises(Failed):
        trained(small(*options, "trainer.ema.decay=0.9", f"run_dir={tmp_path / 'averaged'}"))
    assert f"ConfigError: {key}=auto: rank 0 on " in capsys.readouterr().err


def test_no_sample_is_left_alone_if_batchnorm_needs_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The memory is enough for three samples. The second batch has 23, of which passes of two would leave one.
    monkeypatch.setattr(micro_batch._Trial, "_peak", lambda _, size: 0.0 if size <= 3 else math.inf)
    keys = (*RUN, *NET, "+model.kwargs.norm=batch", "trainer.micro_batch_size=auto", "data.train_size=52")
    assert trained(small(*keys, "trainer.max_steps=2", f"run_dir={tmp_path / 'three'}"))["size"] == 3
    # Of a batch of two no smaller passes are possible. The first trial of them needs too much, the second doesn't.
    needs = itertools.chain([0.0, math.inf], itertools.repeat(0.0))
    monkeypatch.setattr(micro_batch._Trial, "_peak", lambda _, size: next(needs))
    two = small(*keys, "data.batch_size=2", "trainer.max_steps=1", f"run_dir={tmp_path / 'two'}")
    assert trained(two)["size"] is None


def test_passes_that_run_out_of_memory_are_not_said_to_need_an_infinite_amount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(micro_batch._Trial, "_peak", lambda *_: math.inf)
    options = (
        *RUN,
        *NET,
        "+model.kwargs.norm=group",
        "trainer.micro_batch_size=auto",
        "model.checkpoint_activations=all",
        "runtime.memory_limit_mb=5",
        f"run_dir={tmp_path}",
    )
    with pytest.raises(Failed):
        trained(small(*options))
    said = "runs out of memory with the fewest samples that a pass may have (1), and may take 5.0 MiB; "
    # Activations are computed again already.
    assert f"{said}to need less, type strategy=fsdp" in capsys.readouterr().err


def train_in_turn(configurations: list[Config]) -> None:
    for configuration in configurations:
        app.train(configuration)


def test_workers_hold_no_state_of_an_optimizer(tmp_path: Path) -> None:
    # Parameters and gradients take 2.3 MiB, and the state, which the server has, would take as much again.
    options = (*WIDE, "strategy=parameter_server", "runtime.memory_limit_mb=3.3")
    keys = ("trainer.micro_batch_size", "model.checkpoint_activations")
    run_ranks(train_in_turn, 3, [small(*options, f"{key}=auto", f"run_dir={tmp_path / key}") for key in keys])


def test_ranks_that_share_gradients_hold_all_of_them_between_passes() -> None:
    for shard, one, several in (("optimizer", 1.0, 1.0), ("gradients", 0.5, 1.5), ("full", 0.5, 1.5)):
        for size, share in (("null", one), (12, one), (6, several)):
            keys = (
                "strategy=fsdp",
                f"strategy.shard={shard}",
                f"trainer.micro_batch_size={size}",
                "data.batch_size=24",
            )
            assert FSDP.state_shares(small(*keys), 2).get("gradients", 1.0) == share, keys


@pytest.mark.parametrize(
    ("keys", "mb", "gathered"),
    [
        # Two blocks of a sixteenth, and the gradients of one.
        ((), 64, 3 * 4),
        (("strategy.block_mb=8",), 64, 3 * 8),
        (("strategy.block_mb=8", "strategy.reshard_after_forward=false"), 64, 64 + 8),
        # A block has at least 1 MiB, and no more than the model.
        ((), 8, 3 * 1),
        ((), 0.5, 2 * 0.5),
        (("strategy.shard=gradients",), 64, 0),
    ],
)
def test_what_fsdp_gathers_depends_on_the_size_of_its_blocks(keys: tuple[str, ...], mb: float, gathered: float) -> None:
    assert FSDP.gathered_bytes(small("strategy=fsdp", *keys), int(mb * 2**20)) == gathered * 2**20


def test_what_is_offloaded_takes_no_memory() -> None:
    keys = ("strategy=fsdp", "strategy.offload=file", "trainer.ema.decay=0.9")
    assert FSDP.state_shares(small(*keys), 2) == {"optimizer": 0.0, "gradients": 0.5, "parameters": 0.25}
    assert FSDP.state_shares(small(*keys, "strategy.shard=optimizer"), 2) == {"optimizer": 0.0}
