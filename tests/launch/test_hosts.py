"""``launch/hosts.py`` as users start it, with a replacement for ssh that runs commands on this host."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from distrain.cli.run_folder import RunFolder
from tests.harness import HANG_SECONDS
from tests.runs import SMALL, launched
from tests.tools.launching.helpers import SSH, program


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return launched(folder, "hosts", *arguments, timeout=HANG_SECONDS)


def test_two_hosts_train_one_model(tmp_path: Path) -> None:
    ssh = shlex.join(program(tmp_path / "ssh.py", SSH))
    run = tmp_path / "run"
    done = start(
        tmp_path,
        "hosts=[one,two]",
        # Both are this host; the one whose address sorts first has rank 0.
        "addresses=[127.0.0.1,127.0.0.2]",
        f"ssh={ssh}",
        "+env.OMP_NUM_THREADS=1",
        "--",
        *("strategy=ddp", *SMALL, f"run_dir={run}", "trainer.max_steps=3"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[one] run folder: " in done.stdout
    assert "[two] run folder: " not in done.stdout
    assert {path.name for path in (run / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    assert RunFolder.open(str(run)).weights("newest").step == 3


def test_wrong_settings_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments, message in {
        ("hosts=[a]", "prt=1"): "distrain: prt: no such key; choices: hosts, addresses,",
        ("hosts=[a]", "--", "strategy=dpp"): "distrain: strategy=dpp: no such choice; choices: auto, ddp",
    }.items():
        ended = start(tmp_path, *arguments)
        assert ended.returncode == 2
        assert ended.stderr.startswith(message), ended.stderr
        assert ended.stderr.count("\n") == 1
