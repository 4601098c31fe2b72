"""``launch/slurm/train.sbatch`` on a real SLURM of two nodes: a stopped job resumes and ends with the same parameters.

``DISTRAIN_CIFAR10=FOLDER`` trains CIFAR-10 from that folder; without it, digits are used.
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
#: Enough steps for some seconds of training, in which the job is disturbed: SLURM looks for jobs every two seconds.
STEPS, SAVE_EVERY = (240, 40) if CIFAR10 else (6000, 100)
SCRIPT = LAUNCH / "slurm" / "train.sbatch"
SETTINGS = (
    "strategy=ddp",
    "logger=none",
    "trainer.epochs=1000",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_steps=10",
    f"checkpoint.every_steps={SAVE_EVERY}",
    "scheduler=constant",
    "runtime.threads=1",
    # `auto` chooses by measured times, so two runs might choose differently.
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
    output_text = slurm.command(
        "sbatch", "--parsable", "--output=job-%A-%a.out", variables, *options, str(SCRIPT), *arguments, folder=folder
    )
    return output_text.strip()


def wait_until(condition: Callable[[], object], what: Callable[[], str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def wait_for_end(slurm: Cluster, number: str, folder: Path) -> dict[str, str]:
    """Waits for a job's end; if it is requeued, starts it soon."""
    queued: list[float] = []

    def over() -> bool:
        state = slurm.job(number)["JobState"]
        if state != "PENDING":
            queued.clear()
        else:
            queued.append(time.monotonic())
            # SLURM would wait two minutes. Within the first second, the revoked credential would be refused.
            if queued[-1] - queued[0] > 2:
                subprocess.run(
                    ["scontrol", "update", f"jobid={number}", "StartTime=now"],
                    env=slurm.environment,
                    capture_output=True,
                    check=False,
                )
        return state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED")

    wait_until(over, lambda: output(folder))
    return slurm.job(number)


def output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("job-*.out")))


def wait_for_checkpoint(run: Path, folder: Path) -> None:
    """Waits until a run has saved a checkpoint."""
    wait_until(lambda: list(run.glob("checkpoints/step_*")), lambda: output(folder))
    assert not (run / "summary.json").exists(), "the run is too short to be disturbed"


def assert_same_state(run: Path, undisturbed: Path) -> None:
    for part in ("model", "optimizer"):
        actual, expected = (
            load_file(path / "checkpoints" / f"step_{STEPS:08d}" / f"{part}.safetensors") for path in (run, undisturbed)
        )
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed job."""
    folder = tmp_path_factory.mktemp("undisturbed")
    number = submit(slurm, folder, *SETTINGS, *data())
    job = wait_for_end(slurm, number, folder)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), output(folder)
    return folder / "outputs" / "slurm" / number


def test_two_nodes_train_as_two_ranks(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, STEPS)


def test_requeued_job_ends_with_the_same_parameters(slurm: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    number = submit(slurm, tmp_path, *SETTINGS, *data())
    run = tmp_path / "outputs" / "slurm" / number
    wait_for_checkpoint(run, tmp_path)
    slurm.command("scontrol", "requeue", number)
    job = wait_for_end(slurm, number, tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert "resumed from" in output(tmp_path)
    assert_same_state(run, undisturbed)


def test_job_that_gets_a_signal_before_its_time_limit_saves_and_resumes(
    slurm: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    number = submit(slurm, tmp_path, *SETTINGS, *data())
    run = tmp_path / "outputs" / "slurm" / number
    wait_for_checkpoint(run, tmp_path)
    # The signal that SLURM sends by --signal=B:USR1@120.
    slurm.command("scancel", "--batch", "--signal=USR1", number)
    job = wait_for_end(slurm, number, tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert "SIGUSR1; asking the ranks to save and end" in output(tmp_path)
    assert_same_state(run, undisturbed)


def preempt(slurm: Cluster, folder: Path) -> Path:
    """Preempts a job by another one, waits for the end of both, and returns the run folder."""
    number = submit(slurm, folder, *SETTINGS, *data())
    run = folder / "outputs" / "slurm" / number
    wait_for_checkpoint(run, folder)
    options = ("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    other = slurm.command("sbatch", "--parsable", *options, folder=folder).strip()
    assert wait_for_end(slurm, other, folder)["JobState"] == "COMPLETED"
    assert not (run / "summary.json").exists()
    job = wait_for_end(slurm, number, folder)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(folder)
    return run


def test_preempted_job_is_requeued_and_resumes(slurm: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    assert_same_state(preempt(slurm, tmp_path), undisturbed)
    assert "SIGUSR1; asking the ranks to save and end" in output(tmp_path)


def test_preempted_job_resumes_if_slurm_sends_no_warning(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    with cluster.running(tmp_path / "slurm", warns=False) as slurm:
        assert_same_state(preempt(slurm, tmp_path), undisturbed)
    assert "SIGUSR1" not in output(tmp_path)


def test_cancelled_job_is_not_requeued(slurm: Cluster, tmp_path: Path) -> None:
    number = submit(slurm, tmp_path, *SETTINGS, *data())
    wait_for_checkpoint(tmp_path / "outputs" / "slurm" / number, tmp_path)
    slurm.command("scancel", number)
    job = wait_for_end(slurm, number, tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), output(tmp_path)


def test_failing_job_is_not_requeued(slurm: Cluster, tmp_path: Path) -> None:
    number = submit(slurm, tmp_path, "strategy=ddp", "optimizer.lr=-1")
    job = wait_for_end(slurm, number, tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert "distrain: optimizer.lr=-1" in output(tmp_path)


def test_array_task_runs_one_line_of_a_sweep(slurm: Cluster, tmp_path: Path) -> None:
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
        assert wait_for_end(slurm, f"{number}_{task}", tmp_path)["JobState"] == "COMPLETED", output(tmp_path)
    rates = [(Path(folder) / "config.yaml").read_text().partition("lr: ")[2].split()[0] for folder in folders]
    assert rates == ["0.1", "0.01"]


def test_srun_alone_starts_the_ranks(slurm: Cluster, tmp_path: Path) -> None:
    """This is how Hydra's submitit launcher starts ranks."""
    slurm.command(
        *("srun", "--nodes=2", "--ntasks=2", sys.executable, str(LAUNCH / "train.py"), *SETTINGS, "data=digits"),
        *("trainer.max_steps=5", f"run_dir={tmp_path / 'run'}"),
        folder=LAUNCH.parent,
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
