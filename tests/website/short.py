"""Stands in the place of ``distrain``, ``torchrun`` and ``python``: the same command, with settings that end soon.

``short.py PROGRAM ARGUMENTS…`` adds to each training what keeps it short, unless the command itself says it: few
steps and few samples. CIFAR-10, which is not on every machine, becomes random images of its size. Everything else is as
typed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Added to trainings. Two lines of the same page may name one run, so the number of steps must be the same for all.
SETTINGS = ("data.limit=64", "trainer.max_steps=3", "trainer.progress=lines", "logger=none", "runtime.threads=1")
#: What becomes of ``data=cifar10``.
RANDOM_CIFAR = [
    *("data=synthetic", "data.channels=3", "data.height=32", "data.width=32"),
    *("data.train_size=80", "data.test_size=16"),
]
#: Keys that only CIFAR-10 has, or that would make a step long.
LEFT_OUT = (
    "data.root=datasets",
    "data.classes=[cat",
    "data.download=",
    "trainer.epochs=",
    "data.batch_size=",
    "sweep.minutes=",
)


def shortened(arguments: list[str]) -> list[str]:
    """A command line with short settings, behind the program's own options.

    Args:
        arguments: What is typed behind ``distrain``, or behind the script or module that torchrun or python runs.
    """
    command = arguments[0] if arguments else ""
    if command not in ("train", "sweep") or {"--help", "--cfg", "-sc"} & set(arguments):
        return arguments
    keys = {argument.partition("=")[0] for argument in arguments}
    added = [setting for setting in SETTINGS if setting.partition("=")[0] not in keys]
    if command == "sweep":
        # Its jobs are ranked by the validation at the end of an epoch.
        added[added.index("trainer.max_steps=3")] = "trainer.epochs=1"
    kept: list[str] = []
    for argument in arguments:
        if argument == "data=cifar10":
            kept += RANDOM_CIFAR
        elif not argument.startswith(LEFT_OUT):
            kept.append(argument)
    if any(argument.startswith("data=image_folder") for argument in kept):
        added.remove("data.limit=64")
    return [*kept, *added, "data.batch_size=16"]


def command(program: str, arguments: list[str]) -> list[str]:
    """The program and arguments to execute."""
    python = [sys.executable, "-W", "ignore"]
    if program == "distrain":
        return [*python, "-m", "distrain", *shortened(arguments)]
    if program == "torchrun":
        python += ["-m", "torch.distributed.run"]
    for place, argument in enumerate(arguments):
        behind = arguments[place + 1 :]
        if argument == "-m" and behind[:1] == ["distrain"]:
            return [*python, *arguments[: place + 2], *shortened(behind[1:])]
        if argument.startswith("launch/") and argument.endswith(".py"):
            name, *keys = shortened([Path(argument).stem, *behind])
            return [*python, *arguments[:place], str(ROOT / "launch" / f"{name}.py"), *keys]
        if argument.endswith(".py") or argument == "-m":
            break
    return [*python, *arguments]


if __name__ == "__main__":
    words = command(sys.argv[1], sys.argv[2:])
    os.execv(words[0], words)
