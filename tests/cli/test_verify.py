"""``distrain verify``: what it refuses, and its command."""

from __future__ import annotations

import pytest

from distrain.cli.verify import check, training_config
from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.verification import engine
from tests.runs import SMALL


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("strategy=dpp",), "strategy=dpp: no such choice; .*did you mean ddp"),
        (("nproc=2", "strategy=ddp"), "nproc: is a key of verify itself; write it before --"),
        (("strategy=ddp", "optimizer.l=1"), "optimizer.l: no such key"),
        (("model=python_object",), "model=python_object"),
    ],
)
def test_wrong_keys_of_the_training_are_refused(keys: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        training_config(keys)


@pytest.mark.parametrize(
    ("keys", "ranks", "line"),
    [
        (("strategy=ddp",), 1, "nproc: the run of one process is what others are compared with"),
        (("strategy=single",), 2, "strategy=single: runs on 1 rank, but 2 were started"),
        (("strategy=ddp", "run_dir=x"), 2, "run_dir=x: is chosen by this command"),
        (("strategy=ddp", "resume=never"), 2, "resume=never: is chosen by this command"),
        (("strategy=ddp", "data.batch_size=1"), 2, "data.batch_size=1: the global batch is smaller"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_ranks_meet(keys: tuple[str, ...], ranks: int, line: str) -> None:
    world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, host="here")
    with pytest.raises(ConfigError, match=line):
        engine.check(training_config([*SMALL, *keys]), world)


def test_ranks_that_come_and_go_are_refused() -> None:
    for launch in (LaunchSettings(nproc=2, max_restarts=1), LaunchSettings(nnodes="1:2", rdzv_endpoint="a:1")):
        with pytest.raises(ConfigError, match="compares ranks that stay"):
            check(["strategy=ddp"], launch)
