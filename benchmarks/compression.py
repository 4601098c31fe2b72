"""Measures gradient compression: every compressor on separate hosts, over links of several speeds.

ResNet-18 on CIFAR-10 images, 32 per host and step, float32, one thread per host. For each link and contender it
measures the time of a step, the bytes sent by distrain's count and by the network interface's counter, and the loss
over time.

=============  =======================================================================================================
``alone``      every host trains by itself at the same time and never communicates: the limit
``torch_*``    torch's DistributedDataParallel in a bare loop over the same batches, without and with its built-in hooks
others         ``strategy=ddp compression=NAME`` with its defaults
=============  =======================================================================================================

From the interface's count, the headers of TCP/IP and Ethernet are subtracted by the number of packets, because
distrain's count has no headers. BatchNorm is local, as under torch's DDP.

    python -m benchmarks.compression --root FOLDER_OF_CIFAR10 [--hosts 2] [--links 100mbit 1gbit none] [--seconds 90]
        [--steps 12] [--only none powersgd] [--json FILE] [--picture FILE]

On the first link each contender trains for ``--seconds``, for the figure of loss against time and bytes. On the other
links ``--steps`` steps are timed. Needs root (network namespaces) and an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from distrain.config.load import load_config
from distrain.data.base import data_source
from distrain.tools.testnet import network
from distrain.training.assembly import build_trainer
from distrain.training.run_plan import RunPlan

ROOT = Path(__file__).parent.parent
TORCH_HOOKS = ("none", "fp16", "bf16", "powersgd", "quantization")
OURS = ("none", "fp16", "bf16", "qsgd", "powersgd", "topk", "randomk", "signsgd", "auto")
#: Steps before the first timed one.
WARMUP = 3
#: Steps in which `auto` still measures.
AUTO_STEPS = 40
#: For SGD without momentum: with momentum, sparse compressors would need their momentum correction.
LEARNING_RATE = 0.01


def overrides(arguments: argparse.Namespace, contender: str, folder: Path, hosts: int) -> list[str]:
    """The configuration keys of distrain's contenders."""
    return [
        "strategy=single" if contender == "alone" else "strategy=ddp",
        *([] if contender == "alone" else ["strategy.batchnorm=local", f"compression={contender}"]),
        "model=resnet18",
        "data=cifar10",
        f"data.root={arguments.root}",
        f"data.batch_size={arguments.images * (1 if contender == 'alone' else hosts)}",
        "data.val_fraction=0",
        "optimizer=sgd",
        f"optimizer.lr={LEARNING_RATE}",
        "scheduler=constant",
        "logger=none",
        "trainer.progress=off",
        "trainer.log_every_steps=1000000",
        "runtime.threads=1",
        f"run_dir={folder}",
        *arguments.override,
    ]


# --- on a host -------------------------------------------------------------------------------------------------------


class StepRecord:
    """One host's steps: seconds since the first one, mean loss of its share, bytes by both counts."""

    def __init__(self, arguments: argparse.Namespace, extra_warmup: int) -> None:
        self._until = arguments.seconds
        self._steps = arguments.steps + extra_warmup
        self.rows: list[tuple[float, float, int, int]] = []
        self._start = time.perf_counter()

    def add(self, loss: float, counted: int, first: bool = False) -> None:
        """Records a completed step."""
        if first:
            self._start = time.perf_counter()
        self.rows.append((time.perf_counter() - self._start, loss, counted, network.payload_bytes_sent()))

    def done(self) -> bool:
        """Whether the measurement is complete. Host 0 decides for all hosts."""
        if self._until:
            return bool(self.rows[-1][0] >= self._until)
        return bool(len(self.rows) > self._steps + WARMUP)


class MeasurementDone(Exception):
    """Ends a training from inside a step."""


def distrain_worker(arguments: argparse.Namespace, contender: str, folder: Path, hosts: int) -> StepRecord:
    """Trains like ``launch/train.py`` and records every step."""
    from distrain.cli import hydra_entry as cli
    from distrain.runtime.runtime import Runtime
    from distrain.runtime.world import World

    configuration = load_config(cli.compose(ROOT / "conf", "config", overrides(arguments, contender, folder, hosts)))
    world = World.from_environment()
    splits = data_source(configuration.data).load()
    record = StepRecord(arguments, AUTO_STEPS if contender == "auto" else 0)
    with Runtime(configuration, world) as runtime:
        trainer = build_trainer(RunPlan.resolve(configuration, runtime.world), runtime, splits)
        strategy, everyone = trainer.strategy, runtime.communicator()
        step = strategy.train_step
        if contender != "auto":
            # Advice about the chosen compressor takes measurements in the first steps, which would disturb the timing.
            strategy.compressor.observer = None

        def recorded_step(batch: Any) -> Any:
            result = step(batch)
            record.add(float(result.loss_sum) / result.count, strategy.ledger.total(), first=not record.rows)
            if everyone.broadcast(torch.tensor(float(record.done()))) > 0:
                raise MeasurementDone
            return result

        strategy.train_step = recorded_step  # type: ignore[method-assign]
        try:
            trainer.fit()
        except MeasurementDone:
            if runtime.is_main:
                print("report", json.dumps(strategy.report()), flush=True)
            else:
                strategy.report()
    return record


def torch_worker(arguments: argparse.Namespace, hook: str, folder: Path, hosts: int) -> StepRecord:
    """A bare loop around torch's DistributedDataParallel, over the same model and batches."""
    from distrain.cli import hydra_entry as cli
    from distrain.data.loader import Loader
    from distrain.models.resnet import ResNet18

    configuration = load_config(cli.compose(ROOT / "conf", "config", overrides(arguments, "none", folder, hosts)))
    splits = data_source(configuration.data).load()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = ResNet18(in_channels=3, num_classes=10, stem="cifar", norm="batch")
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parallel = nn.parallel.DistributedDataParallel(model)
    if hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook == "quantization":
        from torch.distributed.algorithms.ddp_comm_hooks import quantization_hooks

        parallel.register_comm_hook(dist.group.WORLD, quantization_hooks.quantization_pertensor_hook)
    elif hook != "none":
        parallel.register_comm_hook(None, getattr(default_hooks, f"{hook}_compress_hook"))
    optimizer = torch.optim.SGD(parallel.parameters(), lr=LEARNING_RATE, fused=True)
    loader = Loader(
        splits.train,
        batch_size=configuration.data.batch_size,
        shard=(dist.get_rank(), hosts),
        mean=splits.mean,
        std=splits.std,
        device=torch.device("cpu"),
        dtype=torch.float32,
        memory_format=torch.channels_last,
        seed=0,
        shuffle=True,
        augment=configuration.data.augment,
        prefetch=0,
    )
    record = StepRecord(arguments, 0)
    for epoch in range(1000):
        for batch in loader.epoch(epoch):
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(parallel(batch.inputs), batch.targets)
            loss.backward()
            optimizer.step()
            record.add(float(loss.detach()), 0, first=not record.rows)
            enough = torch.tensor(float(record.done()))
            dist.broadcast(enough, 0)
            if enough > 0:
                dist.barrier()
                dist.destroy_process_group()
                return record
    raise AssertionError("the measurement takes more than 1000 epochs")


def work(arguments: argparse.Namespace) -> None:
    """Runs one contender on a host; prints its record as the last line."""
    contender, folder, hosts = arguments.worker, Path(arguments.folder), int(arguments.hosts[0])
    if contender.startswith("torch_"):
        record = torch_worker(arguments, contender.removeprefix("torch_"), folder, hosts)
    else:
        record = distrain_worker(arguments, contender, folder, hosts)
    print("record", json.dumps(record.rows), flush=True)
    os._exit(0)


# --- all hosts -------------------------------------------------------------------------------------------------------


def measure(
    net: network.VirtualNetwork, arguments: argparse.Namespace, contender: str, seconds: float
) -> dict[str, Any]:
    """Runs one contender on all hosts and summarises their records."""
    with tempfile.TemporaryDirectory() as scratch:
        processes = []
        for host in range(net.hosts):
            alone = contender == "alone"
            folder = Path(scratch, f"run{host}" if alone else "run")
            command = [sys.executable, "-m", "benchmarks.compression", "--worker", contender, "--folder", str(folder)]
            command += ["--hosts", str(net.hosts), "--seconds", str(seconds), "--steps", str(arguments.steps)]
            command += ["--root", arguments.root, "--images", str(arguments.images)]
            command += ["--override", *arguments.override]
            variables = {
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "RANK": "0" if alone else str(host),
                "WORLD_SIZE": "1" if alone else str(net.hosts),
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": net.address(host if alone else 0),
                "MASTER_PORT": "29511",
            }
            processes.append(net.start(host, command, variables, Path(scratch, f"log{host}")))
        deadline = time.monotonic() + arguments.patience + seconds
        try:
            for process in processes:
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except Exception:
            for process in processes:
                process.kill()
            return {"contender": contender, "failed": f"hung for more than {arguments.patience + seconds:g} s"}
        texts = [Path(scratch, f"log{host}").read_text() for host in range(net.hosts)]
    records = [_line(text, "record") for text in texts]
    if not all(records):
        tail = next(text for text, record in zip(texts, records, strict=True) if not record).strip().splitlines()[-1:]
        return {"contender": contender, "failed": "".join(tail)[:200]}
    return summarise(
        contender, records, _line(texts[0], "report"), extra_warmup=AUTO_STEPS if contender == "auto" else 0
    )


def _line(text: str, word: str) -> Any:
    lines = [line for line in text.splitlines() if line.startswith(word + " ")]
    return json.loads(lines[-1].removeprefix(word)) if lines else None


def summarise(contender: str, records: list[list[list[float]]], report: Any, extra_warmup: int) -> dict[str, Any]:
    """One contender's figures: median step time, mean bytes per host and step, and the loss curve."""
    steady = [record[WARMUP + min(extra_warmup, len(record) // 2) :] for record in records]
    times = [[after[0] - before[0] for before, after in itertools.pairwise(rows)] for rows in steady]

    def per_step(column: int) -> float:
        return statistics.mean((rows[-1][column] - rows[0][column]) / (len(rows) - 1) for rows in steady)

    curve = [
        (row[0][0], statistics.mean(each[1] for each in row), statistics.mean(each[3] for each in row))
        for row in zip(*records, strict=False)
    ]
    return {
        "contender": contender,
        "step_ms": 1000 * statistics.median(step for each in times for step in each),
        "steps": len(curve),
        "bytes_counted": per_step(2),
        "bytes_interface": per_step(3),
        "curve": [(seconds, loss, sent - curve[0][2]) for seconds, loss, sent in curve],
        "report": report,
    }


def smoothed(curve: list[Any], span: int = 8) -> Iterator[tuple[float, float, float]]:
    """Yields seconds, the mean loss of the last ``span`` steps, and bytes."""
    for index in range(len(curve)):
        last = [loss for _, loss, _ in curve[max(0, index - span + 1) : index + 1]]
        yield curve[index][0], statistics.mean(last), curve[index][2]


def seconds_to(curve: list[Any], loss: float) -> float | None:
    """Seconds until the smoothed loss first reached this value; ``None`` if it never did."""
    return next((seconds for seconds, reached, _ in smoothed(curve) if reached <= loss), None)


def table(link: str, rows: list[dict[str, Any]]) -> str:
    """The figures of one link as a table."""
    by_name = {row["contender"]: row for row in rows if "failed" not in row}
    alone, plain = by_name.get("alone"), by_name.get("none")
    goal = list(smoothed(plain["curve"]))[-1][1] if plain else None
    lines = [f"link {link}", f"{'':20}{'step ms':>9}{'÷ none':>8}{'÷ alone':>9}{'sent kB':>10}{'interface':>11}  "]
    lines[1] += f"{'off':>7}{'loss at end':>13}{'s to none’s':>13}{'sooner':>8}"
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['contender']:20}{row['failed']}")
            continue
        counted, interface = row["bytes_counted"], row["bytes_interface"]
        of_none = f"{row['step_ms'] / plain['step_ms']:8.3f}" if plain else " " * 8
        of_alone = f"{row['step_ms'] / alone['step_ms']:9.3f}" if alone else " " * 9
        off = f"{counted / interface - 1:+9.1%}" if counted and interface else " " * 9
        end = list(smoothed(row["curve"]))[-1][1]
        reached = seconds_to(row["curve"], goal) if goal is not None else None
        when = f"{reached:13.1f}" if reached is not None else f"{'–':>13}"
        own = seconds_to(plain["curve"], goal) if plain and goal is not None else None
        sooner = f"{own / reached:8.1f}" if reached and own else f"{'–':>8}"
        lines.append(
            f"{row['contender']:20}{row['step_ms']:9.0f}{of_none}{of_alone}{counted / 1e3:10.0f}{interface / 1e3:11.0f}"
            f"{off}{end:13.3f}{when}{sooner}"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], link: str, path: Path) -> None:
    """Plots the loss against seconds and against bytes."""
    from matplotlib.figure import Figure

    # Below each other, not side by side: a page of the site is about 700 pixels wide.
    figure = Figure(figsize=(7, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    for number, row in enumerate(row for row in rows if "failed" not in row and row["contender"] != "alone"):
        points = list(smoothed(row["curve"]))
        style = "--" if row["contender"].startswith("torch_") else "-"
        color = f"C{number % 10}"
        upper.plot([p[0] for p in points], [p[1] for p in points], style, color=color, label=row["contender"])
        lower.plot([p[2] / 1e6 for p in points[1:]], [p[1] for p in points[1:]], style, color=color)
    upper.set(xlabel=f"seconds of training, link: {link_name(link)}", ylabel="training loss (mean of 8 steps)")
    lower.set(xlabel="MB sent by each host", ylabel="training loss (mean of 8 steps)", xscale="log")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=200)


def link_name(rate: str) -> str:
    """The rate of a link for a reader: ``100 Mbit/s`` for ``100mbit``."""
    units = {"kbit": "kbit/s", "mbit": "Mbit/s", "gbit": "Gbit/s"}
    return "no limit" if rate == "none" else re.sub(r"[kmg]bit$", lambda unit: f" {units[unit[0]]}", rate)


def main() -> None:
    """Measures every contender on every link and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--hosts", nargs="+", type=int, default=[2])
    parser.add_argument("--links", nargs="+", default=["100mbit", "1gbit", "none"])
    parser.add_argument("--images", type=int, default=32, help="images per host and step")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--patience", type=float, default=180, help="seconds after which a contender counts as hung")
    contenders = ["alone", *(f"torch_{hook}" for hook in TORCH_HOOKS), *OURS]
    parser.add_argument("--only", nargs="+", default=contenders)
    parser.add_argument("--override", nargs="*", default=[], help="more keys for distrain")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
    arguments.root = str(Path(arguments.root).resolve())
    results: list[dict[str, Any]] = []
    for hosts in arguments.hosts:
        with network.VirtualNetwork(hosts) as net:
            for number, link in enumerate(arguments.links):
                net.set_rate(None if link == "none" else link)
                curve = number == 0 and hosts == arguments.hosts[0]
                rows = []
                for contender in arguments.only:
                    rows.append(measure(net, arguments, contender, arguments.seconds if curve else 0))
                    shown = rows[-1].get("failed") or f"{rows[-1]['step_ms']:.0f} ms a step"
                    print(f"# {hosts} hosts, {link}, {contender}: {shown}", file=sys.stderr, flush=True)
                print(f"{hosts} hosts, " + table(link, rows), flush=True)
                if curve and arguments.picture:
                    draw(rows, link, arguments.picture)
                results.append({"hosts": hosts, "link": link, "rows": rows})
                if arguments.json:
                    arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
