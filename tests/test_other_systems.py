"""distrain on systems that lack what Linux has: what they lack is hidden from a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

#: Hides from Python what a system lacks. What is imported later finds it missing, as it would there.
HIDE = """
import builtins, io, os, pathlib, pkgutil, shutil, signal, subprocess, sys, tempfile

# Other packages know such systems by themselves, and look once, when they are imported.
import hydra, matplotlib.figure, multiprocessing.pool, numpy, omegaconf, PIL.Image, safetensors.torch, torch, tqdm, yaml
import torch.distributed.device_mesh, torch.distributed.run, torch.utils.tensorboard
import hydra._internal.utils, hydra._internal.hydra, hydra._internal.config_loader_impl, logging.handlers
import ctypes, selectors, select, socket, readline

def hide(module, *names):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

def hide_folder(prefix):
    # Whoever opens a file below it finds none.
    def refusing(function):
        def wrapped(path, *args, **keys):
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(prefix):
                raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
            return function(path, *args, **keys)
        return wrapped
    for owner, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (os, "lstat"), (os, "readlink"),
                        (os, "listdir"), (os, "scandir")):
        setattr(owner, name, refusing(getattr(owner, name)))
"""
MACOS = """
sys.platform = "darwin"
hide(os, "memfd_create", "MFD_CLOEXEC", "MFD_ALLOW_SEALING", "sched_getaffinity", "sched_setaffinity", "sched_yield",
     "posix_fallocate", "pidfd_open")
hide_folder("/proc")
"""
WINDOWS = """
sys.platform = "win32"
shutil._use_fd_functions = False
class NoModule:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoModule())
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
    sys.modules.pop(name, None)
hide(os, "memfd_create", "MFD_CLOEXEC", "MFD_ALLOW_SEALING", "sched_getaffinity", "sched_setaffinity", "sched_yield",
     "posix_fallocate", "pidfd_open", "getuid", "geteuid", "getgid", "getegid", "fork", "forkpty", "register_at_fork",
     "killpg", "getpgid", "getpgrp", "setsid", "setpgid", "sysconf", "statvfs", "uname", "getloadavg", "pread",
     "pwrite", "mkfifo", "chown", "fchmod", "fchown", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "WNOHANG")
hide(signal, "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGSTOP", "SIGCONT", "SIGPIPE", "pthread_sigmask",
     "pthread_kill", "setitimer", "alarm")
os.supports_dir_fd = set()
os.supports_follow_symlinks = set()
def no_folder(function):
    def wrapped(path, *args, **keys):
        if keys.get("dir_fd") is not None:
            raise NotImplementedError("dir_fd unavailable on this platform")
        if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return function(path, *args, **keys)
    return wrapped
os.open = no_folder(os.open)
real_kill = os.kill
def kill(pid, number):
    # Any signal but two console events ends the process there.
    raise RuntimeError(f"os.kill({pid}, {number}) would have ended that process")
os.kill = kill
hide_folder("/proc")
"""
SYSTEMS = {"macos": MACOS, "windows": WINDOWS}


def run_on(system: str, code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code where a system's lacks are hidden."""
    return subprocess.run(
        [sys.executable, "-c", f"{HIDE}{SYSTEMS[system]}{code}", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


IMPORT_ALL_AND_REFUSE = """
import importlib
import distrain
for module in pkgutil.walk_packages(distrain.__path__, "distrain."):
    # What serves needs packages that import what only the true system has.
    if not any(name in module.name for name in ("testnet", "chaos", "serv")):
        importlib.import_module(module.name)
for command in ("testnet", "chaos"):
    try:
        importlib.import_module(f"distrain.cli.commands.{command}").main(["--", "data=digits"])
    except SystemExit as end:
        print(command, end.code)
"""


@pytest.mark.parametrize("system", SYSTEMS)
def test_modules_can_be_imported_and_commands_that_need_linux_say_so(system: str, tmp_path: Path) -> None:
    done = run_on(system, IMPORT_ALL_AND_REFUSE, tmp_path)
    assert done.stdout == "testnet 2\nchaos 2\n", done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert done.stderr.count("needs Linux") == 2


TRAIN = """
from distrain.cli.commands.train import main
sys.argv[0] = "train"
main()
"""


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_rank_trains_evaluates_and_resumes(system: str, tmp_path: Path) -> None:
    keys = ["data=digits", "trainer.max_steps=4", "checkpoint.every_steps=2", "run_dir=run"]
    done = run_on(system, TRAIN, tmp_path, *keys)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
    resumed = run_on(system, TRAIN, tmp_path, *keys, "trainer.max_steps=6")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6
