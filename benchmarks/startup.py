"""From the command to the first step: where distrain's start goes, beside a bare script's.

=============  =======================================================================================================
``import``     ``python -c "import torch"``: what every program that uses torch waits for
``one``        ``python launch/train.py`` with its defaults, on one process
``two``        ``torchrun --nproc-per-node 2 launch/train.py strategy=ddp``
``bare``       a hand-written script: imports torch, makes tensors, builds the seed's CIFAR-10 CNN, takes one step
``bare two``   the same under torchrun on two ranks: joins a gloo group and wraps the model in DistributedDataParallel
``help``       ``python launch/train.py --help``
``mistake``    ``python launch/train.py trainer.epochs=many``, which is refused
=============  =======================================================================================================

distrain trains the same network on as many made-up images of the same size; ``--overrides`` takes others. The moment of
its first step is what ``metrics.jsonl`` says, which a run writes anyway: with ``trainer.log_every_steps=1`` the first
row comes right after the first update. The bare script writes down the time. Contenders take turns, several rounds, so
that a machine whose speed drifts treats all alike; medians are shown.

Then a start more of ``one`` and ``two`` in each round does what ``launch/train.py`` does with a clock around each part,
and the parts' medians are shown too; ``python`` is all that comes before the interpreter runs this file, torchrun's own
start included.

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
    """Takes one step as a short script would, and says when that was, in seconds since the epoch."""
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
    """When a run took its first step, in seconds since the epoch."""
    with (folder / "metrics.jsonl").open() as rows:
        return float(json.loads(next(rows))["time"])


def measure(name: str, arguments: argparse.Namespace) -> float:
    """Seconds from a contender's command to its first step, or to its end where it takes none."""
    with tempfile.TemporaryDirectory() as folder:
        run, stamp = Path(folder, "run"), Path(folder, "stamp")
        train = [TRAIN, *arguments.overrides, "trainer.max_steps=1", "trainer.log_every_steps=1", f"run_dir={run}"]
        itself = [__file__, "--bare", str(stamp)]
        commands: dict[str, tuple[list[str], int]] = {
            "import": ([sys.executable, "-c", "import torch"], 0),
            "one": ([sys.executable, *train], 0),
            "two": ([*TORCHRUN, *train, "strategy=ddp"], 0),
            "bare": ([sys.executable, *itself], 0),
            "bare two": ([*TORCHRUN, *itself], 0),
            "help": ([sys.executable, TRAIN, "--help"], 0),
            "mistake": ([sys.executable, TRAIN, "trainer.epochs=many"], 2),
        }
        command, code = commands[name]
        began = time.time()
        called(command, code)
        ended = time.time()
        if name in ("one", "two"):
            return first_step(run) - began
        return (float(stamp.read_text()) if stamp.exists() else ended) - began


def called(command: list[str], code: int) -> str:
    """Runs a command that must end with an exit code; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


CONTENDERS = ("import", "one", "two", "bare", "bare two", "help", "mistake")


# --- the parts of distrain's start -----------------------------------------------------------------------------------


class Parts:
    """Seconds by part; a part that runs inside of another one is taken from that."""

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

    def around(self, owner: Any, attribute: str, name: str) -> None:
        """Times every call of a function or method."""
        plain: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return plain(*args, **kwargs)

        setattr(owner, attribute, timed)


def trace(began: float, overrides: list[str]) -> None:
    """Does what ``launch/train.py`` does up to its first step, each part timed, prints the parts and ends the process.

    Args:
        began: When the command was given, in seconds since the epoch.
        overrides: Of the configuration.
    """
    parts = Parts()
    parts.seconds["python"] = time.time() - began
    with parts.part("import hydra"):
        from distrain.cli import hydra_entry as cli
        from distrain.config.load import load_config
        from distrain.training.run_plan import data_source
    with parts.part("compose"):
        composed = cli.compose(ROOT / "conf", "config", overrides)
    with parts.part("import torch"), cli.gc_disabled():
        import torch  # noqa: F401
    with parts.part("import distrain"), cli.gc_disabled():
        checked = load_config(composed)
        from distrain.cli import app
        from distrain.runtime.runtime import Runtime
        from distrain.training.trainer import Trainer

    def end(*_: Any) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({name: 1000 * seconds for name, seconds in parts.seconds.items()}), flush=True)
        # The run would go on to its end, and here nobody waits for that.
        os._exit(0)

    parts.around(app, "check", "check")
    parts.around(type(data_source(checked)), "load", "data")
    parts.around(Runtime, "__enter__", "meet")
    parts.around(app, "settled", "try formats")
    parts.around(app, "build_trainer", "build")
    parts.around(Trainer, "_resume", "resume")
    parts.around(Trainer, "take_step", "first step")
    Trainer._agree = end  # type: ignore[assignment, method-assign]
    with parts.part("other"):
        app.train(checked)


def traced(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds by part of a start on one process or two; of two ranks, the first's."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*arguments.overrides, f"run_dir={folder}", *(["strategy=ddp"] if name == "two" else [])]
        command = [*(TORCHRUN if name == "two" else [sys.executable]), __file__, "--trace", str(time.time())]
        found: dict[str, float] = json.loads(called([*command, *overrides], 0))
        return found


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
        for name, found in parts.items():
            found.append(traced(name, arguments))
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
    for name, found in parts.items():
        medians = {part: statistics.median(each[part] for each in found) for part in found[0]}
        report["parts_ms"][name] = medians
        print(f"\n{name}: milliseconds of {sum(medians.values()):,.0f}")
        print("\n".join(f"  {part:24} {value:8,.0f}" for part, value in medians.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
