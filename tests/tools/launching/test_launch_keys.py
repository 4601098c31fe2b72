from __future__ import annotations

import pytest

from distrain.errors import ConfigError
from distrain.tools.launching import launch_keys
from distrain.tools.launching.launch_keys import LaunchSettings

HOSTS = "nnodes=2 rdzv_endpoint=head:29400"


def parse(line: str, environment: dict[str, str] | None = None) -> LaunchSettings | None:
    arguments = line.split()
    given = launch_keys.pop(arguments)
    return launch_keys.check(given, arguments, environment or {})


@pytest.mark.parametrize(
    ("line", "words"),
    {
        "nproc=0": "nproc=0: must be at least 1",
        "nproc=-2": "nproc=-2: must be at least 1",
        "nproc=5000": "nproc=5000: must be at most 1024",
        "nproc=two": "must be a whole number, or gpu",
        "nproc=2.5": "must be a whole number, or gpu",
        "nproc=": "must be a whole number, or gpu",
        "nproc=2,4": "must be a whole number, or gpu",
        "nproc=null": "nproc=null: must be",
        "nproc=${seed}": "can't refer to other keys",
        "nproc=2 nproc=3": "nproc=3: is given twice",
        "nproc=2 rdzv_endpoint=head:1": "rdzv_endpoint=head:1: is for jobs on several hosts",
        "nproc=2 node_rank=0": "node_rank=0: is for jobs on several hosts",
        "nnodes=2": "type rdzv_endpoint=HOST:PORT",
        "nnodes=none rdzv_endpoint=head:1": "nnodes=none: must be a whole number, or MIN:MAX",
        "nnodes=0:2 rdzv_endpoint=head:1": "nnodes=0:2: must be a whole number, or MIN:MAX",
        "nnodes=3:2 rdzv_endpoint=head:1": "the smallest number",
        "nnodes=2 rdzv_endpoint=head": "must be HOST:PORT",
        "nnodes=2 rdzv_endpoint=head:70000": "must be HOST:PORT",
        "nnodes=2 rdzv_endpoint=:29400": "must be HOST:PORT",
        f"{HOSTS} node_rank=2": "node_rank=2: must be less than 2",
        "nnodes=1:2 rdzv_endpoint=head:1 node_rank=0": "node_rank=0: hosts that may join and leave",
        "max_restarts=-1": "max_restarts=-1: must be at least 0",
        "max_restarts=often": "max_restarts=often: must be a whole number",
        "nproc=2 -m": "does not go with --multirun",
        "nproc=2 hydra.mode=MULTIRUN": "does not go with --multirun",
    }.items(),
)
def test_a_wrong_value_is_refused(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(line)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("strategy=ddp", None),
        ("nproc=1", None),
        ("nproc=2", LaunchSettings(nproc=2)),
        ("+nproc=2", LaunchSettings(nproc=2)),
        ("nproc=gpu", LaunchSettings(nproc="gpu")),
        ("max_restarts=1", LaunchSettings(max_restarts=1)),
        (HOSTS, LaunchSettings(nnodes=2, rdzv_endpoint="head:29400")),
        (f"{HOSTS} rdzv_id=007", LaunchSettings(nnodes=2, rdzv_endpoint="head:29400", rdzv_id="007")),
        ("nnodes=2:4 rdzv_endpoint=[::1]:5", LaunchSettings(nnodes="2:4", rdzv_endpoint="[::1]:5")),
    ],
)
def test_what_is_right_is_read(line: str, settings: LaunchSettings | None) -> None:
    assert parse(line) == settings


def test_the_check_is_for_the_fewest_ranks_that_may_start() -> None:
    world = LaunchSettings(nproc=3, nnodes="2:4").first_world()
    assert (world.size, world.local_size, world.rank) == (6, 3, 0)


def test_ranks_start_no_ranks() -> None:
    with pytest.raises(ConfigError, match="torchrun has started this process"):
        parse("nproc=2", {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="this process is one of 4 ranks already"):
        parse("nproc=2", {"WORLD_SIZE": "4"})
    assert parse("nproc=2", {"WORLD_SIZE": "1"}) is not None
    # Some operators of clusters set the variables for the only process of each host.
    assert parse(HOSTS, {"WORLD_SIZE": "2", "RANK": "1"}) is not None


def test_tasks_of_srun_start_ranks_only_as_hosts_of_one_job() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(ConfigError, match="srun has started 2 tasks"):
        parse("nproc=2", step)
    assert parse(f"nproc=2 {HOSTS}", step) is not None


def test_other_arguments_are_left_alone() -> None:
    arguments = ["a.nproc=1", "nproc=2", "--cfg", "job", "+x={nproc:1}", "nnodes=1"]
    assert launch_keys.pop(arguments) == ["nproc=2", "nnodes=1"]
    assert arguments == ["a.nproc=1", "--cfg", "job", "+x={nproc:1}"]
