"""Starts the command ``verify`` from a Python program, and reads its certificate."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.config.quoting import path_setting
from distrain.errors import EXIT_REFUSED, Failed, config_error, config_error_from_line
from distrain.runtime import program
from distrain.verification.certificate import FILE


@dataclass(frozen=True)
class Verification:
    """What a verification came to.

    Attributes:
        passed: The training is that of one process, or is not meant to be and keeps what it promises.
        verdict: ``equal``, ``different``, or ``different by design``.
        certificate: The content of ``certificate.json``.
        text: What the command printed.
    """

    passed: bool
    verdict: str
    certificate: dict[str, Any]
    text: str


def verify(
    *keys: str,
    nproc: int = 2,
    steps: int = 10,
    tolerance: float | None = None,
    float64: bool = True,
    folder: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
) -> Verification:
    """Compares a training on several ranks with that of one process, as the command ``verify`` does.

    The ranks are new processes; they find the modules that this process finds.

    Args:
        *keys: Settings of the training, as on the command line: ``"strategy=ddp"``, ``"model=resnet18"``, and options
            such as ``"--config-dir"``, ``"my_conf"``.
        nproc: Ranks to start on this machine.
        steps: Updates of each compared run.
        tolerance: Largest relative difference that counts as equal; by default it is measured.
        float64: Whether to compare in float64 first.
        folder: For ``certificate.json``; by default it is not kept.
        timeout: Seconds after which the command is ended.

    Returns:
        The certificate, whatever it says.

    Raises:
        ConfigError: A setting is refused.
        Failed: A run failed; the message says what was printed.
    """
    check_ranks(nproc, f"distrain.verify({', '.join(map(repr, keys))}, nproc=2)")
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="distrain_verify_"))
        own = [f"nproc={nproc}", f"steps={steps}", f"float64={str(float64).lower()}"]
        own.append(path_setting("folder", str(Path(folder).resolve())))
        if tolerance is not None:
            own.append(f"tolerance={tolerance!r}")
        ended = _run([*program.starting("verify"), *own, "--", *keys], timeout)
        text = ended.stdout.strip()
        last = next((line for line in reversed(text.splitlines()) if line.startswith("distrain: ")), text)
        if ended.returncode == EXIT_REFUSED:
            raise config_error_from_line(last.removeprefix("distrain: "))
        path = Path(folder, FILE)
        if not path.exists():
            raise Failed(f"no certificate was written (exit code {ended.returncode}):\n{text}")
        content = json.loads(path.read_text())
    return Verification(content["passed"], content["verdict"], content, text)


def check_ranks(nproc: object, example: str) -> None:
    """Refuses a number of ranks that is none, or too small.

    Args:
        nproc: The number.
        example: What to type instead.
    """
    if isinstance(nproc, bool) or not isinstance(nproc, int) or nproc < 2:
        problem = f"is {nproc!r}; ranks are compared with one process, so at least 2 are needed, as in"
        raise config_error("nproc", f"{problem}: {example}")


def _run(arguments: list[str], timeout: float | None) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments, and this process's import path."""
    # A rank of ours must not take this process's rank for its own.
    mine = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    environment = {name: value for name, value in os.environ.items() if name not in mine}
    environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return subprocess.run(  # noqa: S603 - this interpreter and our own program
        [sys.executable, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
