"""A temporary SLURM cluster of two nodes on this machine's loopback interface. Needs no root.

All its files are in one folder, its daemons run as the user who starts them, and the system chooses its ports.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: Required programs (Debian: apt-get install --no-install-recommends slurm-wlm munge).
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
NODES = ("n1", "n2")
_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
{parameters}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=2000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    # Daemons are in folders that only an administrator's PATH contains.
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        folder: Folder of all its files.
        environment: Environment variables with which SLURM's commands find it.
    """

    folder: Path
    environment: dict[str, str]

    def command(self, *words: str, folder: Path | None = None) -> str:
        """Runs one of SLURM's commands and returns its output."""
        done = subprocess.run(
            words, cwd=folder, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """SLURM's record of a job."""
        record = self.command("scontrol", "show", "job", "--oneliner", number)
        return dict(word.partition("=")[::2] for word in record.split() if "=" in word)


@contextlib.contextmanager
def running(folder: Path, *, warns: bool = True) -> Iterator[Cluster]:
    """Starts the daemons, waits for both nodes, and stops everything on leaving.

    Args:
        folder: An empty folder.
        warns: A preempted job gets the signal that it requested by ``--signal``; otherwise its ranks get SIGTERM.
    """
    controller, first, second = _free_ports(3)
    munge = folder / "munge"
    munge.mkdir(mode=0o755)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (munge / "key").write_bytes(secrets.token_bytes(128))
    (munge / "key").chmod(0o400)
    conf = folder / "slurm.conf"
    user = getpass.getuser()
    conf.write_text(
        _CONF.format(
            folder=folder,
            user=user,
            controller=controller,
            first=first,
            second=second,
            parameters="SlurmctldParameters=preempt_send_user_signal" if warns else "",
        )
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))},
        "PATH": _path(),
        "SLURM_CONF": str(conf),
    }
    files = {"socket": "munge.socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={munge / name}" for option, name in files.items()]
    # Without --force munged refuses a socket that other users can't reach, as in a test's folder.
    daemons = [["munged", "--foreground", "--force", *options]]
    daemons.append(["slurmctld", "-D", "-i"])
    daemons += [["slurmd", "-D", "-N", node] for node in NODES]
    cluster = Cluster(folder, environment)
    with contextlib.ExitStack() as stack:
        for words in daemons:
            stack.enter_context(_daemon(words, environment, folder / f"{'-'.join(words)[:20].replace('/', '_')}.out"))
            if words[0] == "munged":
                _wait_until((munge / "munge.socket").exists, "munged")
        _wait_until(lambda: _idle(cluster) == len(NODES), "the nodes")
        try:
            yield cluster
        finally:
            subprocess.run(["scancel", "--user", user], env=environment, check=False, timeout=30)
            _wait_until(lambda: not cluster.command("squeue", "--noheader").strip(), "the last jobs")


def _idle(cluster: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--states=idle", "--partition=low"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return len(done.stdout.splitlines())


def _wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def _daemon(words: list[str], environment: dict[str, str], output: Path) -> Iterator[None]:
    with output.open("wb") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
