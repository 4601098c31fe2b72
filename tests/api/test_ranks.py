"""``distrain.fit(…, nproc=2)``: ranks that a script or a notebook starts train what one process trains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

import distrain
from distrain.api import handover
from distrain.api.fit import prepare
from distrain.api.result import Result
from distrain.api.settings import merge
from tests.api.models import SETTINGS, Skip, samples, skip_net
from tests.harness import run_ranks, soaked
from tests.runs import LAUNCH

#: What a user writes: a model with skip connections, arrays, and no `if __name__ == "__main__"`.
SCRIPT = """
import numpy as np, torch, distrain
from torch import nn
class Skip(nn.Module):
    def __init__(self, inner): super().__init__(); self.inner = inner
    def forward(self, x): return x + self.inner(x)
layer = lambda: Skip(nn.Linear(64, 64))
def net(): return nn.Sequential(nn.Flatten(), layer(), nn.ReLU(), layer(), nn.Linear(64, 3))
x = np.random.default_rng(0).normal(size=(120, 1, 8, 8)).astype("float32")
y = (x.mean((1, 2, 3)) * 20).round().clip(-1, 1).astype(int) + 1
runs = {s: distrain.fit(net, (x, y), strategy=s, nproc=n, epochs=2, batch_size=37) for s, n in STRATEGIES}
a, *others = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs.values())
print("difference", *(float((a - b).abs().max()) for b in others))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(LAUNCH.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def differences(printed: str) -> list[float]:
    line = next(line for line in printed.splitlines() if line.startswith("difference"))
    return [float(word) for word in line.split()[1:]]


def test_a_script_trains_on_two_ranks_what_one_process_trains(tmp_path: Path) -> None:
    strategies = [("single", 1), ("ddp", 2), ("pipeline", 2)]
    (tmp_path / "script.py").write_text(SCRIPT.replace("STRATEGIES", repr(strategies)))
    ended = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    # A rank doesn't run the script again.
    assert ended.stdout.count("difference") == 1
    assert max(differences(ended.stdout)) < 1e-5
    assert len(differences(ended.stdout)) == 2


#: Every rank leaves its own model.
UNDER_TORCHRUN = """
import os, pathlib, torch, distrain
from tests.api.models import SETTINGS, samples, skip_net
distrain.fit(model := skip_net(), samples(), strategy="ddp", **SETTINGS)
with distrain.Trainer(skip_net(1), samples(), strategy="pipeline", **SETTINGS) as trainer:
    list(trainer)
# A thread of torch's that outlives the training may abort the process at its end.
threads = [task.read_text().strip() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads
torch.save(model.state_dict(), "of_rank_" + os.environ["RANK"])
"""


@pytest.mark.soak
def test_a_script_under_torchrun_trains_on_every_rank_what_one_process_trains(tmp_path: Path) -> None:
    distrain.fit(one := skip_net(), samples(), **SETTINGS)
    (tmp_path / "script.py").write_text(UNDER_TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert not re.search("terminate called|destroy_process_group|Traceback", ended.stderr), ended.stderr
    for rank in (0, 1):
        of_rank = torch.load(tmp_path / f"of_rank_{rank}", weights_only=True)
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(of_rank[name], tensor, rtol=0, atol=1e-5)


def test_a_refusal_under_torchrun_is_named_at_the_end_of_the_screen(tmp_path: Path) -> None:
    lines = ["import distrain", "from tests.api.models import *", "fit = distrain.fit"]
    lines += ["try: fit(skip_net(), samples(), epochs=-1)", "except distrain.ConfigError: pass"]
    lines += ["fit(skip_net(), samples(), strategy='dpp')"]
    (tmp_path / "script.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "script.py"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "distrain: strategy=dpp: no such choice" in "".join(ended.stderr.splitlines()[-4:])


def test_a_process_group_of_the_program_is_refused_and_left_as_it_is() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(distrain.ConfigError, match=r"torch.distributed.destroy_process_group\(\)"):
            distrain.fit(skip_net(), samples(), **SETTINGS)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def _fit_in_own_folder(folder: Path, stepwise: bool) -> tuple[dict[str, Tensor], dict[str, Any], int, bool, str]:
    """Each rank has a folder of its own named ``run``, as hosts without a shared file system; rank 1's holds a run."""
    rank = os.environ["RANK"]
    os.chdir(folder / rank)
    model = skip_net()
    settings = {**SETTINGS, "run_dir": "run", "strategy": "ddp"}
    if stepwise:
        with distrain.Trainer(model, samples(), **settings) as trainer:
            list(trainer)
        run = trainer.run
    else:
        run = distrain.fit(model, samples(), **settings)
    correct = distrain.load_model(run.run_dir, skip_net)(torch.from_numpy(samples()[0])).argmax(1).sum().item()
    place = str(run.run_dir)
    result = model.state_dict(), run.summary, len(run.metrics), run.run_dir == Path("run").resolve(), place
    assert correct == run.model.eval()(run.normalise(samples()[0])).argmax(1).sum().item()
    return result


@pytest.mark.parametrize("stepwise", soaked([False, True], [True]))
def test_ranks_without_a_shared_folder_have_the_trained_model_too(tmp_path: Path, stepwise: bool) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
    # A folder of the same name on the other host is that of another run.
    distrain.fit(skip_net(5), samples(), **{**SETTINGS, "run_dir": str(tmp_path / "1" / "run")})
    first, second = run_ranks(_fit_in_own_folder, 2, tmp_path, stepwise)
    assert (first[3], second[3]) == (True, False)
    assert first[1:3] == second[1:3]
    assert first[1]["world_size"] == 2
    for name, tensor in first[0].items():
        assert torch.equal(tensor, second[0][name])
    assert not any(torch.equal(tensor, skip_net().state_dict()[name]) for name, tensor in second[0].items())


def test_a_rank_that_cannot_read_the_result_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = prepare(skip_net(), samples(), None, None, None, (), None, merge(SETTINGS))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(distrain.ConfigError, match=r"the training succeeded, but rank 1 .* all hosts share"):
        training.finish(Result(tmp_path))


def test_a_notebook_trains_on_two_ranks_what_one_process_trains(tmp_path: Path) -> None:
    strategies = [("single", 1), ("ddp", 2)]
    cell: dict[str, Any] = {
        "cell_type": "code",
        "id": "training",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": SCRIPT.replace("STRATEGIES", repr(strategies)),
    }
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}
    notebook = nbformat.from_dict(content)  # type: ignore[no-untyped-call]
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert differences(printed)[0] < 1e-5
    assert "epoch 2/2" in printed


def fit(model: Any, **changes: Any) -> distrain.Run:
    return distrain.fit(model, samples(), nproc=2, strategy="ddp", **{**SETTINGS, **changes})


def test_a_module_holds_what_two_ranks_trained_and_a_stopped_run_goes_on() -> None:
    expected = distrain.fit(whole := skip_net(), samples(), **SETTINGS)
    model = skip_net()
    with pytest.raises(distrain.Stopped, match="max_minutes") as stopped:
        fit(model, run_dir="run", **{"trainer.max_minutes": 1e-6})
    assert stopped.value.step < expected.summary["steps"]
    run = fit(model, run_dir="run")
    assert run.run_dir == Path("run").resolve()
    assert run.summary["steps"] == expected.summary["steps"]
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


class FailsOnRankOne(Skip):
    def forward(self, inputs: Tensor) -> Tensor:
        if os.environ.get("RANK") == "1" and "TORCHELASTIC_RUN_ID" in os.environ and self.training:
            raise ValueError("not on this rank")
        return super().forward(inputs)


def test_a_rank_that_fails_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), FailsOnRankOne(4), *list(skip_net())[-1:])
    with pytest.raises((distrain.Failed, distrain.ConfigError), match="not on this rank"):
        fit(model, run_dir="failed")


def test_an_object_that_no_other_process_can_have_is_refused() -> None:
    lock = threading.Lock()

    def make() -> nn.Module:
        if lock.locked():
            print(later)
        with lock:
            return skip_net()

    with pytest.raises(distrain.ConfigError, match=r"^model: its lock, a lock, can't be sent to other processes"):
        fit(make)
    later = 1


@pytest.mark.parametrize("nproc", [0, -1, 1.5, True, "two"])
def test_a_wrong_number_of_ranks_is_refused(nproc: Any) -> None:
    with pytest.raises(distrain.ConfigError, match=r"^nproc="):
        distrain.fit(skip_net(), samples(), nproc=nproc, **SETTINGS)


def test_ranks_of_a_launcher_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(distrain.ConfigError, match="has started 3 ranks on this machine; leave nproc out"):
        fit(skip_net())


def test_objects_that_another_user_could_have_written_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "training.pickle").write_bytes(b"")
    (tmp_path / "training.pickle").chmod(0o666)
    with pytest.raises(PermissionError, match="may have been written by another user"):
        handover.read(tmp_path)
