"""A whole campaign on a fake training: correct recoveries pass, and each kind of wrong behaviour is reported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import pytest

from distrain.tools.chaos import disturbed_run
from distrain.tools.chaos.campaign import Campaign, UnusableTraining
from distrain.tools.chaos.disturbed_run import Recovery, TrainingSpec
from distrain.tools.chaos.launchers import CommandLauncher
from distrain.tools.chaos.plan import FAULT_KINDS
from tests.harness import soaked

if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)

FAKE_TRAINING = Path(__file__).parent / "fake_training.py"
LOCAL_KINDS = [name for name, kind in FAULT_KINDS.items() if not kind.needs_network]


def no_network() -> NoReturn:
    raise AssertionError("no fault needs it")


class FakeCampaign:
    """A campaign on the fake training; records printed lines and recoveries."""

    def __init__(self, folder: Path, wrong: str = "", limit_seconds: float = 30) -> None:
        self.lines: list[str] = []
        self.recoveries: list[Recovery] = []
        keys = ("steps=100", "ranks=2", *([f"wrong={wrong}"] if wrong else []))
        training = TrainingSpec("fake", keys, 2, limit_seconds, limit_seconds)
        launcher = CommandLauncher(f"{{python}} {FAKE_TRAINING} {{keys}}", 2)
        self._campaign = Campaign(
            training,
            launcher,
            no_network,
            folder,
            patience_seconds=30,
            keep=False,
            print_line=self.lines.append,
            recoveries=self.recoveries,
        )

    def run(self, kinds: list[str], count: int, per_run: int = 3, seed: str = "0") -> list[Recovery]:
        self._campaign.run(kinds, count, per_run, seed)
        return self.recoveries


def test_every_kind_of_fault_on_one_host_is_survived(tmp_path: Path) -> None:
    campaign = FakeCampaign(tmp_path)
    recoveries = campaign.run(LOCAL_KINDS, len(LOCAL_KINDS), per_run=4)
    assert sorted(recovery.fault.kind for recovery in recoveries) == sorted(LOCAL_KINDS)
    for recovery in recoveries:
        assert recovery.recovered, recovery.line()
        assert recovery.identical, recovery.line()
    assert {path.name for path in tmp_path.glob("run_*") if path.is_dir()} == set(), (
        "folders of correct runs are removed"
    )


#: What is planted, the fault that makes it show, and what the report says.
WRONG = [
    ("blame", "kill_rank", "failure.json names rank "),
    ("silent", "stop_rank", "there is no failure.json"),
    ("believes", "flip_bit", "which was damaged"),
    ("forgets", "kill_all", "began with step 0, not with step_"),
    ("stop", "terminate", "stopped at step 0, but the newest checkpoint is step_"),
    ("rows", "kill_all", "metrics.jsonl has 1 rows too few, step "),
]


@pytest.mark.parametrize("case", soaked(WRONG, WRONG[:3]), ids=lambda case: case[0])
def test_wrong_behaviour_is_reported(case: tuple[str, str, str], tmp_path: Path) -> None:
    wrong, kind, problem = case
    (recovery,) = FakeCampaign(tmp_path, wrong).run([kind], 1)
    assert any(problem in line for line in recovery.problems), recovery.line()
    assert not recovery.recovered


def test_process_left_behind_is_reported_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbed_run, "_ALLOWANCE_SECONDS", 0.5)
    monkeypatch.setattr(disturbed_run, "_GRACE_SECONDS", 0.5)
    (recovery,) = FakeCampaign(tmp_path, "orphan", limit_seconds=3).run(["kill_rank"], 1)
    assert "1 processes were left behind 3.5 s after the fault" in recovery.problems
    assert recovery.notice_seconds is None


def test_resume_with_wrong_weights_is_a_mismatch(tmp_path: Path) -> None:
    campaign = FakeCampaign(tmp_path, "sum")
    (recovery,) = campaign.run(["terminate"], 1)
    assert recovery.recovered
    assert not recovery.identical
    assert "WRONG: 1 tensors of the model differ, w among them" in campaign.lines[-1]
    assert tmp_path.joinpath("run_001", "checkpoints").is_dir(), "folders of wrong runs are kept"


def test_training_that_is_not_repeatable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableTraining, match=r"two undisturbed runs differ \(1 tensors of the model differ"):
        FakeCampaign(tmp_path, "chance").run(["kill_all"], 1)


def test_training_that_fails_undisturbed_is_refused_with_its_last_message(tmp_path: Path) -> None:
    tmp_path.joinpath("undisturbed_1").write_text("in the way")
    with pytest.raises(UnusableTraining, match=r"the undisturbed run failed: .*undisturbed_1"):
        FakeCampaign(tmp_path).run(["kill_all"], 1)
