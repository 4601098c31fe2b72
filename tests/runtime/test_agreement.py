"""Ranks that end set-up together, whatever one of them raised."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest

from distrain.config.schema import Config
from distrain.errors import ConfigError, PeerLost, config_error
from distrain.models import deferred
from distrain.reporting.loggers import several
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.fsdp import strategy as fsdp
from distrain.strategies.mesh import divided_pipeline
from distrain.strategies.pipeline import hand_overs, split
from distrain.strategies.recomputation import set_up
from distrain.strategies.tensor_parallel import plan
from distrain.training import assembly, auto_format, micro_batch
from distrain.training.run_plan import RunPlan
from tests.harness import run_ranks
from tests.runs import small, trainer_for

RANKS = 4
DDP, LAST = ("strategy=ddp",), RANKS - 1
FSDP = ("strategy=fsdp", "strategy.shard=full")
PIPELINE = ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=2")
DIVIDED = ("model=custom", "model._target_=tests.strategies.tensor_parallel.models.ViT")


class Part(NamedTuple):
    """A part of set-up in which a rank fails.

    Attributes:
        options: Of the training.
        place: Has the function.
        name: Of the function that raises.
        rank: On which it does so.
    """

    options: tuple[str, ...]
    place: ModuleType | type
    name: str
    rank: int = LAST


PARTS = {
    "trial of formats": Part((*DDP, "trainer.precision=auto"), auto_format, "Trial"),
    "trial of sizes": Part((*DDP, "trainer.micro_batch_size=auto"), micro_batch, "_Trial"),
    "model": Part(DDP, assembly, "build_model"),
    "data": Part(DDP, assembly, "build_loader"),
    "optimizer": Part(DDP, assembly, "build_optimizer"),
    "logger": Part(DDP, several, "build", 0),
    "recomputation": Part((*DDP, "model.checkpoint_activations=all"), set_up, "examine"),
    "hollow tensors": Part(FSDP, deferred, "build"),
    "values": Part(FSDP, deferred.DeferredTensors, "fill"),
    "shards": Part(FSDP, fsdp, "ShardedUpdate"),
    "blocks": Part(PIPELINE, split, "as_sequence"),
    "times of blocks": Part(PIPELINE, split, "measure_blocks", 0),
    "epochs": Part(PIPELINE, hand_overs, "in_epochs"),
    "optimizer of stages": Part(PIPELINE, assembly, "build_optimizer"),
    "division": Part((*DIVIDED, "strategy=tensor_parallel"), plan, "find_divisions"),
    "trial of a stage": Part(
        (*DIVIDED, "strategy=mesh", "strategy.mesh={pipeline: 2, tensor: 2}"), divided_pipeline, "Trial"
    ),
    "server": Part(("strategy=parameter_server",), assembly, "build_optimizer"),
}
#: Before a strategy's own set-up, on rank 0 alone, and among ranks that have divided a model.
SOME = ["data", "times of blocks", "trial of a stage"]


def set_up_to_train(config: Config, runtime: Runtime) -> None:
    """What a training does before its first step, once its ranks have met."""
    plan = RunPlan.resolve(config, runtime.world)
    splits = plan.load()

    def make_model() -> Any:
        return assembly.build_model(plan, splits)

    resolved = auto_format.resolve_auto(config, runtime, splits, plan.task, make_model)
    tried = micro_batch.Tried(resolved, runtime, splits, plan.task, make_model, plan.strategy, plan.memory_format)
    trainer_for(micro_batch.resolve(tried), runtime, splits)


def failing(names: list[str], folder: str) -> list[str]:
    """What this rank raises where one of them fails in a part of set-up; at last, where one refuses such a part."""
    found = []
    with Runtime(small(f"run_dir={folder}"), World.from_environment()) as runtime:
        errors: list[Exception] = [OSError("broken")] * len(names)
        for name, error in zip([*names, names[0]], [*errors, config_error("data", "is refused")], strict=True):
            part = PARTS[name]
            config = small(*part.options, "resume=never", f"run_dir={folder}")
            with pytest.MonkeyPatch.context() as patched:
                if runtime.world.rank == part.rank:
                    patched.setattr(part.place, part.name, Mock(side_effect=error))
                with pytest.raises((OSError, ConfigError, PeerLost)) as raised:
                    set_up_to_train(config, runtime)
            found.append(f"{raised.type.__name__}: {raised.value}")
    return found


@pytest.mark.parametrize(
    "names", [pytest.param(SOME, id="some"), pytest.param(list(PARTS), id="all", marks=pytest.mark.soak)]
)
def test_a_rank_that_fails_in_a_part_of_set_up_ends_all_ranks_at_once_and_is_named(
    names: list[str], tmp_path: Path
) -> None:
    for rank, (*found, refused) in enumerate(run_ranks(failing, RANKS, names, str(tmp_path))):
        for name, failed in zip(names, found, strict=True):
            broken = PARTS[name].rank
            if rank == broken:
                assert failed == "OSError: broken", name
            else:
                assert failed.startswith(f"PeerLost: rank {broken} on "), name
                assert "is gone: its set-up failed (OSError: broken)" in failed, name
        assert refused.startswith(f"ConfigError: data: is refused (rank {PARTS[names[0]].rank} on "), names[0]
