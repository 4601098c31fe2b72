"""Compares runs of ``strategy=auto`` with runs of ``strategy=ddp``, in the settings of ``benchmarks/plan.py``.

In each setting ``auto`` chooses once. If it chose ddp, both are the same run, whose ratio is 1. Otherwise its choice
and ddp are trained in turns (ddp, choice, choice, ddp), and the ratio of their mean steps is printed. The planning
before the first step is not part of it. Needs root for test networks.

    python -m benchmarks.auto [--models simple_cnn cifar_cnn resnet18] [--ranks 2 3] [--hosts 2 4]
        [--rates none 1gbit 100mbit] [--folder auto]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.plan import Setting, add_settings, settings_of
from distrain.tools.planning.trial_run import steps_of_trial

#: By how much a run of ``auto`` may be slower than one of ddp.
MOST = 0.03
#: Seconds of the steps of a run that is compared.
SECONDS = 6.0


def main() -> None:
    """Runs all settings and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--folder", type=Path, default=Path("auto"))
    arguments = parser.parse_args()
    ratios = []
    for setting in settings_of(arguments):
        folder = arguments.folder.resolve() / str(setting).replace(", ", "_").replace(" ", "_")
        ratios.append(compare(setting, folder))
    print(f"{len(ratios)} settings; the largest ratio is {max(ratios):.3f} (at most {1 + MOST:.2f})")


def compare(setting: Setting, folder: Path) -> float:
    """The mean step of what ``auto`` chooses in a setting, relative to ddp's."""
    train(setting, {"strategy": "auto"}, folder / "auto", 1)
    chosen = json.loads((folder / "auto" / "plan.json").read_text())["chosen"]
    keys: dict[str, str] = chosen["keys"]
    what = " ".join(f"{key}={value}" for key, value in keys.items())
    if keys == {"strategy": "ddp"}:
        print(f"1.000  {setting}: {what}, {chosen['why']}", flush=True)
        return 1.0
    times: dict[str, list[float]] = {"ddp": [], "choice": []}
    measured = {
        "ddp": ({"strategy": "ddp"}, predicted(folder / "auto", {"strategy": "ddp"})),
        "choice": (keys, predicted(folder / "auto", keys)),
    }
    for number, name in enumerate(["ddp", "choice", "choice", "ddp"]):
        own, expected = measured[name]
        warm_up, steps = steps_of_trial(expected, 1, SECONDS)
        run = folder / f"{number}_{name}"
        train(setting, own, run, warm_up + steps)
        summary = json.loads((run / "summary.json").read_text())
        times[name].append(summary["step_ms"]["mean"])
    ratio = statistics.mean(times["choice"]) / statistics.mean(times["ddp"])
    shown = {name: ", ".join(f"{one:.1f}" for one in of) for name, of in times.items()}
    print(f"{ratio:.3f}  {setting}: {what}: {shown['choice']} ms; ddp {shown['ddp']} ms", flush=True)
    return ratio


def predicted(run: Path, keys: dict[str, str]) -> float:
    """Seconds of a step of a configuration, as the plan of a run predicts them."""
    predictions: list[dict[str, Any]] = json.loads((run / "plan.json").read_text())["predictions"]
    return next(float(one["step_ms"]) for one in predictions if one["keys"] == keys) / 1000


def train(setting: Setting, keys: dict[str, str], folder: Path, steps: int) -> None:
    """Trains so many steps in a setting."""
    shutil.rmtree(folder, ignore_errors=True)
    own = [f"{key}={value}" for key, value in keys.items()]
    options = [f"run_dir={folder}", f"trainer.max_steps={steps}", "trainer.epochs=100", "logger=none", *own]
    command = setting.command("train", [*options, *setting.training])
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")


if __name__ == "__main__":
    main()
