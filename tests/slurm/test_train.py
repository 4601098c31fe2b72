"""``launch/slurm/train.sbatch`` on a real SLURM of two nodes: whatever stops the job, it ends with the same parameters.

``DISTRAIN_CIFAR10=FOLDER`` trains CIFAR-10 from that folder; without it the data are digits.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import LAUNCH
from tests.slurm import cluster
from tests.slurm.cluster import Cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(cluster.missing()),
        reason=f"needs {', '.join(cluster.missing())}: apt-get install --no-install-recommends slurm-wlm munge",
    ),
]

CIFAR10 = os.environ.get("DISTRAIN_CIFAR10")
#: Seconds of training, in which a job can be disturbed.
STEPS = 240 if CIFAR10 else 800
SCRIPT = LAUNCH / "slurm" / "train.sbatch"
SETTINGS = (
    "strategy=ddp",
    "logger=none",
    "trainer.epochs=1000",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_steps=10",
    "checkpoint.every_steps=40",
    "scheduler=constant",
    "runtime.threads=1",
    # Runs that are compared bit for bit don't choose by their clocks.
    "trainer.memory_format=channels_last",
)


def data() -> tuple[str, ...]:
    if CIFAR10 is None:
        return ("data=digits",)
    return ("data=cifar10", f"data.root={CIFAR10}", "data.batch_size=32", "model=cifar_cnn")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster.running(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def submit(slurm: Cluster, folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> str:
    variables = f"--export=ALL,PYTHON={sys.executable},SCRIPT={LAUNCH / 'train.py'},PYTHONPATH={LAUNCH.parent}"
    said = slurm.command(
        "sbatch", "--parsable", "--output=job-%A-%a.out", variables, *options, str(SCRIPT), *arguments, folder=folder
    )
    return said.strip()


def until(true: Callable[[], object], what: Callable[[], str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def ended(slurm: Cluster, number: str, folder: Path) -> dict[str, str]:
    """Waits for a job's end; where it is back in the queue, starts it soon."""
    queued: list[float] = []

    def over() -> bool:
        state = slurm.job(number)["JobState"]
        if state != "PENDING":
            queued.clear()
        else:
            queued.append(time.monotonic())
            # It would wait for two minutes; but in the second in which its credential was revoked it would be refused.
            if queued[-1] - queued[0] > 2:
                subprocess.run(
                    ["scontrol", "update", f"jobid={number}", "StartTime=now"],
                    env=slurm.environment,
                    capture_output=True,
                    check=False,
                )
        return state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED")

    until(over, lambda: output(folder))
    return slurm.job(number)


def output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("job-*.out")))


def in_the_middle(run: Path, folder: Path) -> None:
    """Waits until a run has saved a checkpoint."""
    until(lambda: list(run.glob("checkpoints/step_*")), lambda: output(folder))
    assert not (run / "summary.json").exists(), "the run is too short to be disturbed"


def assert_same(run: Path, whole: Path) -> None:
    for part in ("model", "optimizer"):
        here, there = (
            load_file(path / "checkpoints" / f"step_{STEPS:08d}" / f"{part}.safetensors") for path in (run, whole)
        )
        assert here.keys() == there.keys()
        for name, tensor in there.items():
            assert torch.equal(here[name], tensor), name


@pytest.fixture(scope="module")
def whole(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a job that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    number = submit(slurm, folder, *SETTINGS, *data())
    job = ended(slurm, number, folder)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), output(folder)
    return folder / "outputs" / "slurm" / number


def test_two_nodes_train_as_two_ranks(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, STEPS)


def test_requeued_job_ends_with_the_same_parameters(slurm: Cluster, whole: Path, tmp_path: Path) -> None:
    number = submit(slurm, tmp_path, *SETTINGS, *data())
    run = tmp_path / "outputs" / "slurm" / number
    in_the_middle(run, tmp_path)
    slurm.command("scontrol", "requeue", number)
    job = ended(slurm, number, tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert "resumed from" in output(tmp_path)
    assert_same(run, whole)


def test_job_that_is_warned_of_its_time_limit_saves_and_goes_on(slurm: Cluster, whole: Path, tmp_path: Path) -> None:
    number = submit(slurm, tmp_path, *SETTINGS, *data())
    run = tmp_path / "outputs" / "slurm" / number
    in_the_middle(run, tmp_path)
    # What SLURM itself sends by --signal=B:USR1@120.
    slurm.command("scancel", "--batch", "--signal=USR1", number)
    job = ended(slurm, number, tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert "SIGUSR1; asking the ranks to save and end" in output(tmp_path)
    assert_same(run, whole)


def preempt(slurm: Cluster, folder: Path) -> Path:
    """Pushes a job out by another one, waits for the end of both, and returns the run folder."""
    number = submit(slurm, folder, *SETTINGS, *data())
    run = folder / "outputs" / "slurm" / number
    in_the_middle(run, folder)
    options = ("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    other = slurm.command("sbatch", "--parsable", *options, folder=folder).strip()
    assert ended(slurm, other, folder)["JobState"] == "COMPLETED"
    assert not (run / "summary.json").exists()
    job = ended(slurm, number, folder)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(folder)
    return run


def test_preempted_job_makes_room_and_goes_on(slurm: Cluster, whole: Path, tmp_path: Path) -> None:
    assert_same(preempt(slurm, tmp_path), whole)
    assert "SIGUSR1; asking the ranks to save and end" in output(tmp_path)


def test_preempted_job_goes_on_where_slurm_sends_no_warning(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    with cluster.running(tmp_path / "slurm", warns=False) as slurm:
        assert_same(preempt(slurm, tmp_path), whole)
    assert "SIGUSR1" not in output(tmp_path)


def test_cancelled_job_does_not_come_back(slurm: Cluster, tmp_path: Path) -> None:
    number = submit(slurm, tmp_path, *SETTINGS, *data())
    in_the_middle(tmp_path / "outputs" / "slurm" / number, tmp_path)
    slurm.command("scancel", number)
    job = ended(slurm, number, tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), output(tmp_path)


def test_failing_job_is_not_put_back(slurm: Cluster, tmp_path: Path) -> None:
    number = submit(slurm, tmp_path, "strategy=ddp", "optimizer.lr=-1")
    job = ended(slurm, number, tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert "distrain: optimizer.lr=-1" in output(tmp_path)


def test_array_takes_a_line_of_a_sweep_a_task(slurm: Cluster, tmp_path: Path) -> None:
    made = subprocess.run(
        [
            *(sys.executable, str(LAUNCH / "sweep.py"), *SETTINGS, "data=digits", "optimizer.lr=0.1,0.01"),
            *("trainer.max_steps=5", "sweep.folder=a sweep", "sweep.jobs_file=jobs.txt"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(LAUNCH.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    folders = [shlex.split(line)[-1].partition("=")[2].strip("'") for line in (tmp_path / "jobs.txt").open()]
    with_jobs = ("--array=0-1", "--nodes=1")
    slurm_with_jobs = Cluster(slurm.folder, {**slurm.environment, "JOBS": "jobs.txt"})
    number = submit(slurm_with_jobs, tmp_path, "strategy=single", options=with_jobs)
    for task in (0, 1):
        assert ended(slurm, f"{number}_{task}", tmp_path)["JobState"] == "COMPLETED", output(tmp_path)
    rates = [(Path(folder) / "config.yaml").read_text().partition("lr: ")[2].split()[0] for folder in folders]
    assert rates == ["0.1", "0.01"]


def test_srun_alone_starts_ranks_too(slurm: Cluster, tmp_path: Path) -> None:
    """As Hydra's submitit launcher does."""
    slurm.command(
        *("srun", "--nodes=2", "--ntasks=2", sys.executable, str(LAUNCH / "train.py"), *SETTINGS, "data=digits"),
        *("trainer.max_steps=5", f"run_dir={tmp_path / 'run'}"),
        folder=LAUNCH.parent,
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
