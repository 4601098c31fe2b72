"""Measures the time from the command to the first step, for distrain and for a bare script.

=============  =======================================================================================================
``import``     ``python -c "import torch"``: the minimum for every program that uses torch
``one``        ``python launch/train.py`` with its defaults, on one process
``two``        ``torchrun --nproc-per-node 2 launch/train.py strategy=ddp``
``bare``       a hand-written script: imports torch, makes tensors, builds the CIFAR-10 CNN, takes one step
``bare two``   the same under torchrun on two ranks: joins a gloo group and wraps the model in DistributedDataParallel
``help``       ``python launch/train.py --help``
``mistake``    ``python launch/train.py trainer.epochs=many``, which is refused
``mistakes``   the median of ``distrain train nproc=2`` with each mistake of benchmarks/mistakes.py; no rank starts
=============  =======================================================================================================

distrain trains the same network on the same number of synthetic images of the same size; ``--overrides`` changes that.
The time of its first step is read from ``metrics.jsonl``: with ``trainer.log_every_steps=1`` the first row is written
right after the first update. The bare script records the time itself. Contenders take turns for several rounds, so that
a machine whose speed drifts affects all alike. The table shows medians.

In each round, ``one`` and ``two`` are started once more with a timer around each part of what ``launch/train.py`` does.
A second table shows the medians of the parts. ``python`` is the time before the interpreter runs this file, including
torchrun's own start.

    python benchmarks/startup.py [--rounds 5] [--only import one] [--overrides data=digits] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "launch" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
OVERRIDES = ["model=cifar_cnn", "data=synthetic", "data.train_size=1024", "data.test_size=256", "data.batch_size=64"]


# --- the contenders --------------------------------------------------------------------------------------------------


def bare() -> float:
    """Takes one step as a short script would; returns its time in seconds since the epoch."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from benchmarks.textbook import textbook_cnn

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    model: nn.Module = textbook_cnn()
    images, labels = torch.randn(1024, 3, 32, 32), torch.randint(10, (1024,))
    if ranks > 1:
        dist.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    picked = torch.randperm(len(images))[: 64 // ranks]
    nn.functional.cross_entropy(model(images[picked]), labels[picked]).backward()
    optimizer.step()
    stamp = time.time()
    if ranks > 1:
        dist.destroy_process_group()
    return stamp


def first_step(folder: Path) -> float:
    """Time of a run's first step, in seconds since the epoch."""
    with (folder / "metrics.jsonl").open() as rows:
        return float(json.loads(next(rows))["time"])


def measure(name: str, arguments: argparse.Namespace) -> float:
    """Seconds from a contender's command to its first step, or to its end if it takes no step."""
    if name == "mistakes":
        sys.path.append(str(ROOT))
        from benchmarks.mistakes import MISTAKES

        return statistics.median(map(time_of_mistake, MISTAKES))
    with tempfile.TemporaryDirectory() as folder:
        run, stamp = Path(folder, "run"), Path(folder, "stamp")
        train = [TRAIN, *arguments.overrides, "trainer.max_steps=1", "trainer.log_every_steps=1", f"run_dir={run}"]
        bare_script = [__file__, "--bare", str(stamp)]
        commands: dict[str, tuple[list[str], int]] = {
            "import": ([sys.executable, "-c", "import torch"], 0),
            "one": ([sys.executable, *train], 0),
            "two": ([*TORCHRUN, *train, "strategy=ddp"], 0),
            "bare": ([sys.executable, *bare_script], 0),
            "bare two": ([*TORCHRUN, *bare_script], 0),
            "help": ([sys.executable, TRAIN, "--help"], 0),
            "mistake": ([sys.executable, TRAIN, "trainer.epochs=many"], 2),
        }
        command, code = commands[name]
        began = time.time()
        run_command(command, code)
        ended = time.time()
        if name in ("one", "two"):
            return first_step(run) - began
        return (float(stamp.read_text()) if stamp.exists() else ended) - began


def time_of_mistake(arguments: str) -> float:
    """Seconds until ``distrain train nproc=2`` has refused these arguments."""
    words = arguments.split()
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in ("nproc=2", "strategy=ddp") if word.partition("=")[0] not in keys]
    began = time.time()
    run_command([sys.executable, "-m", "distrain", "train", *kept, *words], 2)
    return time.time() - began


def run_command(command: list[str], code: int) -> str:
    """Runs a command that must end with this exit code; returns its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


CONTENDERS = ("import", "one", "two", "bare", "bare two", "help", "mistake", "mistakes")


# --- the parts of distrain's start -----------------------------------------------------------------------------------


class PartTimer:
    """Seconds by part; the time of a nested part does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what runs inside."""
        self._inner.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner.pop()
            self._inner[-1] += whole

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Times every call of a function or method."""
        plain: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return plain(*args, **kwargs)

        setattr(owner, attribute, timed)


def trace(began: float, overrides: list[str]) -> None:
    """Times each part of what ``launch/train.py`` does up to its first step, prints the times and ends the process.

    Args:
        began: Time of the command, in seconds since the epoch.
        overrides: Configuration keys.
    """
    parts = PartTimer()
    parts.seconds["python"] = time.time() - began
    with parts.part("import hydra"):
        from distrain.cli import hydra_entry as cli
        from distrain.config.load import load_config
    with parts.part("compose"):
        composed = cli.compose(ROOT / "conf", "config", overrides)
    with parts.part("import torch"), cli.gc_disabled():
        import torch  # noqa: F401
    with parts.part("import distrain"), cli.gc_disabled():
        checked = load_config(composed)
        from distrain.cli import app
        from distrain.data.base import data_source
        from distrain.runtime.runtime import Runtime
        from distrain.training import auto_format
        from distrain.training.run_plan import RunPlan
        from distrain.training.trainer import Trainer

    def end(*_: Any) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({name: 1000 * seconds for name, seconds in parts.seconds.items()}), flush=True)
        # Ends the process at once, because the rest of the run is not measured.
        os._exit(0)

    parts.wrap(RunPlan, "check", "check")
    parts.wrap(type(data_source(checked.data)), "load", "data")
    parts.wrap(Runtime, "__enter__", "rendezvous")
    parts.wrap(auto_format, "resolve_auto", "try formats")
    parts.wrap(app, "build_trainer", "build")
    parts.wrap(Trainer, "_resume", "resume")
    parts.wrap(Trainer, "take_step", "first step")
    Trainer._agree = end  # type: ignore[assignment, method-assign]
    with parts.part("other"):
        app.train(checked)


def trace_parts(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds by part of a start with one process or two; for two, those of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*arguments.overrides, f"run_dir={folder}", *(["strategy=ddp"] if name == "two" else [])]
        command = [*(TORCHRUN if name == "two" else [sys.executable]), __file__, "--trace", str(time.time())]
        milliseconds: dict[str, float] = json.loads(run_command([*command, *overrides], 0))
        return milliseconds


# --- the report ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the contenders in turns and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--overrides", nargs="+", default=OVERRIDES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trace", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        stamp = bare()
        if os.environ.get("RANK", "0") == "0":
            arguments.bare.write_text(repr(stamp))
        return
    if arguments.trace:
        began, *overrides = arguments.trace
        trace(float(began), overrides)
    seconds: dict[str, list[float]] = {name: [] for name in arguments.only}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only if name in ("one", "two")}
    for _ in range(arguments.rounds):
        for name in arguments.only:
            seconds[name].append(measure(name, arguments))
        for name, rounds in parts.items():
            rounds.append(trace_parts(name, arguments))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report: dict[str, Any] = {"seconds": medians, "parts_ms": {}}
    print(f"{'seconds to the first step':26} {'median':>8} {'min':>8} {'max':>8} {'- import':>9}")
    for name, median in medians.items():
        beyond = f"{median - medians['import']:9.2f}" if "import" in medians else ""
        print(f"{name:26} {median:8.2f} {min(seconds[name]):8.2f} {max(seconds[name]):8.2f} {beyond}")
    for name, other in (("one", "bare"), ("two", "bare two")):
        if name in medians and other in medians:
            report[f"{name} / {other}"] = medians[name] / medians[other]
            print(f"{name} / {other}: {report[f'{name} / {other}']:.2f}")
    for name, rounds in parts.items():
        medians = {part: statistics.median(times[part] for times in rounds) for part in rounds[0]}
        report["parts_ms"][name] = medians
        print(f"\n{name}: parts of {sum(medians.values()):,.0f} ms")
        print("\n".join(f"  {part:24} {value:8,.0f}" for part, value in medians.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
