"""Measures bytes, step time and accuracy of each strategy on separate hosts.

Two hosts train; a parameter server has a host of its own. Speed is measured for ResNet-18 with 32 images per host and
step, on an unlimited link and on a slow one, as a share of the speed of two hosts that never communicate. Accuracy is
measured for the CIFAR-10 CNN after some epochs with the same global batch and learning rate, on an unlimited link.

    python -m benchmarks.strategies --root FOLDER_OF_CIFAR10 [--links none 100mbit] [--steps 100] [--epochs 10]
        [--only ddp "local_sgd sync_every=16"] [--json FILE] [--picture FILE]
    python -m benchmarks.strategies --redraw docs/strategies.md --picture docs/strategies.png

Needs root (network namespaces) and an otherwise idle machine. ``--steps 0`` skips the speed, ``--epochs 0`` the
accuracy. ``--redraw`` measures nothing: it draws the figures of the page's table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from distrain.tools.testnet import network

ROOT = Path(__file__).parent.parent
TRAINING_HOSTS = 2
#: Contenders and their keys. With ``fragments`` and ``overlap_steps``, parts are merged while training goes on.
CONTENDERS: dict[str, list[str]] = {
    "alone": ["strategy=single"],
    "ddp": ["strategy=ddp", "strategy.batchnorm=local"],
    "ddp compression=powersgd": ["strategy=ddp", "strategy.batchnorm=local", "compression=powersgd"],
    "local_sgd sync_every=16": ["strategy=local_sgd", "strategy.sync_every=16"],
    "DiLoCo sync_every=50": ["strategy=local_sgd", "strategy.sync_every=50", "strategy.outer_optimizer=nesterov"],
    "DiLoCo fragments=4 overlap_steps=5": [
        "strategy=local_sgd",
        "strategy.sync_every=50",
        "strategy.outer_optimizer=nesterov",
        "strategy.fragments=4",
        "strategy.overlap_steps=5",
    ],
    "parameter_server mode=sync": ["strategy=parameter_server", "strategy.mode=sync"],
    "parameter_server mode=async": ["strategy=parameter_server", "strategy.mode=async"],
    "parameter_server mode=ssp": ["strategy=parameter_server", "strategy.mode=ssp"],
}
#: Contenders whose steps wait for the link. On a slow link, fewer steps of them are measured.
LINK_BOUND = tuple(name for name in CONTENDERS if name.startswith(("ddp", "parameter_server")))
SPEED = [
    "model=resnet18",
    "data=synthetic",
    "data.channels=3",
    "data.height=32",
    "data.width=32",
    "data.classes=10",
    "data.train_size=12800",
    "data.test_size=64",
    "data.val_fraction=0",
    "optimizer=sgd",
    "optimizer.lr=0.02",
    "optimizer.momentum=0.9",
    "scheduler=constant",
    "trainer.epochs=1000",
]
QUIET = ["logger=none", "trainer.progress=off", "runtime.threads=1", "resume=never"]


def measure(net: network.VirtualNetwork, name: str, keys: list[str], patience: float) -> dict[str, Any]:
    """Runs a contender and returns its summary; the images per second of separate runs are added up."""
    has_server = "parameter_server" in CONTENDERS[name][0]
    alone = name == "alone"
    hosts = TRAINING_HOSTS + has_server
    with tempfile.TemporaryDirectory() as scratch:
        processes = []
        for host in range(hosts):
            folder = Path(scratch, f"run{host}" if alone else "run")
            command = [sys.executable, str(ROOT / "launch/train.py"), *CONTENDERS[name], *keys, f"run_dir={folder}"]
            variables = {
                "PYTHONPATH": str(ROOT),
                "RANK": "0" if alone else str(host),
                "WORLD_SIZE": "1" if alone else str(hosts),
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": net.address(host if alone else 0),
                "MASTER_PORT": "29512",
            }
            processes.append(net.start(host, command, variables, Path(scratch, f"log{host}")))
        deadline = time.monotonic() + patience
        try:
            for process in processes:
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            logs = "\n".join(Path(scratch, f"log{host}").read_text()[-2000:] for host in range(hosts))
            raise RuntimeError(f"{name} failed:\n{logs}")
        summaries = [json.loads(path.read_text()) for path in sorted(Path(scratch).glob("run*/summary.json"))]
    result: dict[str, Any] = summaries[0]
    result["images_per_second"] = sum(summary["images_per_second"] for summary in summaries)
    return result


def speed(net: network.VirtualNetwork, arguments: argparse.Namespace, link: str, name: str) -> dict[str, Any]:
    """Images per second, milliseconds per step, and bytes per step of all ranks."""
    steps = max(arguments.steps // 8, 12) if name in LINK_BOUND and link != "none" else arguments.steps
    if link == "none":
        steps = min(steps, 60)
    batch = 32 * (1 if name == "alone" else TRAINING_HOSTS)
    keys = [*SPEED, *QUIET, f"data.batch_size={batch}", f"trainer.max_steps={steps}"]
    results = measure(net, name, keys, arguments.patience)
    images = results["images_per_second"]
    return {
        "images_per_second": images,
        "step_ms": 1000 * 32 * TRAINING_HOSTS / images if images else None,
        "bytes_per_step": results["bytes_sent_per_step"],
    }


def accuracy(net: network.VirtualNetwork, arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Test accuracy after the last epoch, and bytes per step of all ranks."""
    keys = ["model=cifar_cnn", "data=cifar10", f"data.root={arguments.root}", f"data.batch_size={arguments.batch}"]
    keys += [f"trainer.epochs={arguments.epochs}", *QUIET, *arguments.override]
    results = measure(net, name, keys, arguments.patience)
    return {
        "test_accuracy": results["test_accuracy"],
        "test_loss": results["test_loss"],
        "steps": results["steps"],
        "bytes_per_step": results["bytes_sent_per_step"],
        "report": {key: results[key] for key in ("local_sgd", "parameter_server") if key in results},
    }


def table(results: dict[str, dict[str, Any]], links: list[str]) -> str:
    """The figures of all contenders; bytes are summed over ranks."""
    width = max(map(len, results))
    lines = [f"{'':{width}}" + "".join(f"{link + ' ms':>14}{'of alone':>10}" for link in links)]
    lines[0] += f"{'ResNet MB/step':>16}{'CNN kB/step':>13}{'accuracy':>10}"
    for name, row in results.items():
        line = f"{name:{width}}"
        for link in links:
            figures, share = row.get(link), shares(results, link).get(name)
            line += f"{figures['step_ms']:14.0f}" if figures else f"{'–':>14}"
            line += f"{share:10.2f}" if share is not None else f"{'–':>10}"
        sent = next((row[link]["bytes_per_step"] for link in links if link in row), None)
        line += f"{sent / 1e6:16.2f}" if sent is not None else f"{'–':>16}"
        accuracies = row.get("accuracy")
        line += (
            f"{accuracies['bytes_per_step'] / 1e3:13.0f}{accuracies['test_accuracy']:10.4f}"
            if accuracies
            else f"{'–':>13}{'–':>10}"
        )
        lines.append(line)
    return "\n".join(lines)


def shares(results: dict[str, dict[str, Any]], link: str) -> dict[str, float]:
    """The speed of each contender as a share of the speed of hosts that never communicate."""
    alone = results.get("alone", {}).get(link)
    return {
        name: row[link]["images_per_second"] / alone["images_per_second"]
        for name, row in results.items()
        if alone and link in row
    }


def documented(page: Path) -> tuple[dict[str, dict[str, float]], dict[str, tuple[float, float]]]:
    """Reads the speeds and accuracies of the documentation's table, for :func:`draw`."""
    titles, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in page.read_text().replace("`", "").splitlines()
        if line.startswith("|")
    ]
    columns: dict[str, dict[str, float]] = {title: {} for title in titles[1:]}
    for name, *cells in rows:
        for column, cell in zip(columns.values(), cells, strict=True):
            if number := re.match(r"[\d.,]+", cell):
                column[name] = float(number[0].replace(",", ""))
    sent, accuracy, _, *speeds = columns.values()
    links = [title.removeprefix("speed ").removesuffix(" (share)") for title in titles[4:]]
    return dict(zip(links, speeds, strict=True)), {name: (sent[name], accuracy[name]) for name in accuracy}


def draw(speeds: dict[str, dict[str, float]], accuracies: dict[str, tuple[float, float]], path: Path) -> None:
    """Draws the speed on each link, and accuracy against bytes.

    Args:
        speeds: For each link: the speed of each contender as a share of the speed of hosts that never communicate.
        accuracies: For each contender: kB sent per step by all ranks, and test accuracy in percent.
        path: Where the picture is written.
    """
    from matplotlib.figure import Figure

    # Below each other, not side by side: a page of the site is about 700 pixels wide.
    figure = Figure(figsize=(7, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    names = list(dict.fromkeys(name for on_link in speeds.values() for name in on_link))
    for number, (link, on_link) in enumerate(speeds.items()):
        places = [place + 0.4 * number for place in range(len(names)) if names[place] in on_link]
        upper.barh(places, [on_link[name] for name in names if name in on_link], 0.38, label=link)
    upper.set_yticks([place + 0.2 for place in range(len(names))], names)
    upper.invert_yaxis()
    upper.axvline(1, color="0.4", linewidth=1)
    upper.set(xlabel="speed ÷ speed without communication (ResNet-18)")
    upper.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(speeds), frameon=False)
    for name, (sent, accuracy) in accuracies.items():
        lower.plot(sent, accuracy, "o", label=name)
    lower.set(xlabel="kB sent per step, all ranks", ylabel="test accuracy in % (CIFAR-10 CNN)", xscale="log")
    lower.legend(loc="lower right")
    for axes in (upper, lower):
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=200)


def main() -> None:
    """Measures every contender and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", help="folder of CIFAR-10")
    source.add_argument("--redraw", type=Path, metavar="PAGE", help="draw the figures of this page; measure nothing")
    parser.add_argument("--links", nargs="+", default=["none", "100mbit"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128, help="global batch of the accuracy part")
    parser.add_argument("--patience", type=float, default=900, help="seconds after which a contender counts as hung")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--override", nargs="*", default=[], help="more keys for the accuracy part")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="where the picture is written; with --redraw it must be given")
    arguments = parser.parse_args()
    if arguments.redraw:
        if not arguments.picture:
            parser.error("--redraw needs --picture FILE")
        draw(*documented(arguments.redraw), arguments.picture)
        return
    arguments.root = str(Path(arguments.root).resolve())
    results: dict[str, dict[str, Any]] = {name: {} for name in arguments.only}
    with network.VirtualNetwork(TRAINING_HOSTS + 1) as net:
        for link in arguments.links if arguments.steps else []:
            net.set_rate(None if link == "none" else link)
            for name in arguments.only:
                results[name][link] = speed(net, arguments, link, name)
                print(f"# {link}, {name}: {results[name][link]}", file=sys.stderr, flush=True)
        net.set_rate(None)
        for name in arguments.only if arguments.epochs else []:
            if name != "alone":
                results[name]["accuracy"] = accuracy(net, arguments, name)
                print(f"# {name}: {results[name]['accuracy']}", file=sys.stderr, flush=True)
    print(table(results, arguments.links))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.picture:
        speeds = {link: shares(results, link) for link in arguments.links if arguments.steps}
        for on_link in speeds.values():
            on_link.pop("alone", None)
        accuracies = {
            name: (row["accuracy"]["bytes_per_step"] / 1e3, 100 * row["accuracy"]["test_accuracy"])
            for name, row in results.items()
            if "accuracy" in row
        }
        draw(speeds, accuracies, arguments.picture)


if __name__ == "__main__":
    main()
