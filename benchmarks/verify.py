"""Verifies strategies and lossless compressors on 2, 3 and 4 ranks with five models, two of which are not distrain's.

Each configuration is what ``distrain verify nproc=N -- KEYS`` verifies, but the ranks stay for several of them, since
starting them takes longest. What must equal one process must be certified as equal; what can't by design must get its
own statement; and where BatchNorm sees a part of the batch, the certificate must name it. Prints a row for each
configuration: how far parameters are from those of one process in float64 (if it was compared: otherwise in float32),
and what is allowed. The exit code is 1 if a certificate says something else than it must.

The models that are not distrain's are those of torchvision and timm where these are installed, and networks of
``benchmarks/networks.py`` otherwise. A certificate that is in the folder already is not made again.

    python benchmarks/verify.py [--sound] [--models simple_cnn resnet18] [--ways ddp "ddp topk"]
        [--ranks 2 3 4] [--minutes 14] [--folder certificates]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # after this folder, which has the networks

from distrain.cli.hydra_entry import skip_destructors_after_communication
from distrain.cli.training_keys import compose_training
from distrain.errors import EXIT_FAILED, EXIT_STOPPED, ConfigError, Failed, Stopped
from distrain.runtime.world import World
from distrain.tools.launching import elastic
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.verification import engine
from distrain.verification.certificate import BY_DESIGN, DIFFERENT, EQUAL, FILE

#: Few images in few steps, with everything that doesn't divide.
COMMON = (
    *("data=synthetic", "data.channels=3", "data.classes=4", "data.train_size=70", "data.test_size=31"),
    *("data.batch_size=12", "data.eval_batch_size=10", "optimizer=sgd", "optimizer.lr=0.02", "runtime.threads=1"),
)
STEPS = 3
#: Configurations for which the same ranks stay.
TOGETHER = 8
CAUSE = "BatchNorm"
REFUSED = "refused.txt"
#: Exit codes of ranks that were asked to end, by Ctrl-C for example.
_ON_REQUEST = (EXIT_STOPPED, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def size(pixels: int) -> tuple[str, str]:
    """Keys for square images."""
    return f"data.height={pixels}", f"data.width={pixels}"


@dataclass(frozen=True)
class Network:
    """A model, and the keys that choose it.

    Attributes:
        keys: They choose the model and its images.
        batchnorm: It has BatchNorm layers.
    """

    keys: tuple[str, ...]
    batchnorm: bool = False


@dataclass(frozen=True)
class Case:
    """A configuration, and what its certificate must say.

    Attributes:
        name: Of its folder.
        ranks: Number of ranks.
        keys: Of its training.
        expected: The verdict.
        steps: Updates of each run.
    """

    name: str
    ranks: int
    keys: tuple[str, ...]
    expected: str = EQUAL
    steps: int = STEPS

    @property
    def command(self) -> str:
        """What makes the certificate again, in a process of its own."""
        return shlex.join(["distrain", "verify", f"nproc={self.ranks}", f"steps={self.steps}", "--", *self.keys])


def networks() -> dict[str, Network]:
    """The five models."""
    own = {
        "simple_cnn": Network(("model=simple_cnn", *size(8))),
        "cifar_cnn": Network(("model=cifar_cnn", *size(18))),
    }
    custom, large = "model=custom", size(32)
    try:
        import timm
        import torchvision

        found = f"torchvision {torchvision.__version__}, timm {timm.__version__}"
        shufflenet = (custom, "model._target_=torchvision.models.shufflenet_v2_x0_5", *large)
        vit = (custom, "model._target_=timm.models.vit_tiny_patch16_224", "+model.kwargs.depth=3", *large)
        others = {"shufflenet_v2_x0_5": Network(shufflenet, batchnorm=True), "vit_tiny": Network(vit)}
    except ImportError as error:
        found = f"networks.py ({error})"
        separable, patches = (custom, "model._target_=networks.Separable"), (custom, "model._target_=networks.Patches")
        others = {
            "Separable": Network((*separable, *size(16)), batchnorm=True),
            "Patches": Network((*patches, *size(16))),
        }
    print(f"# models that are not distrain's: {found}", flush=True)
    # The largest last, so that the other rows come soon.
    return {**own, **others, "resnet18": Network(("model=resnet18", *size(16)), batchnorm=True)}


#: Compressors that lose nothing with these keys.
LOSSLESS = {
    "": (),
    " topk": ("compression=topk", "compression.density=1", "compression.values=full"),
    " randomk": ("compression=randomk", "compression.density=1"),
    " auto": ("compression=auto", "compression.most_lossy=none"),
}


#: Meshes of two dimensions of two ranks each.
MESHES = {
    "data tensor": ("strategy.mesh.data=2", "strategy.mesh.tensor=2"),
    "data pipeline": ("strategy.mesh.data=2", "strategy.mesh.pipeline=2"),
    "tensor pipeline": ("strategy.mesh.tensor=2", "strategy.mesh.pipeline=2"),
    "data shard": ("strategy.mesh.data=2", "strategy.mesh.shard=2"),
    "shard pipeline": ("strategy.mesh.shard=2", "strategy.mesh.pipeline=2", "strategy.shard=gradients"),
    "shard tensor": ("strategy.mesh.shard=2", "strategy.mesh.tensor=2", "strategy.shard=gradients"),
}


def ways(ranks: int, batchnorm: bool) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """The ways in which ranks train: name, keys, and what the certificate must say.

    Args:
        ranks: Number of ranks.
        batchnorm: The model has BatchNorm layers.
    """
    # Each rank, or microbatch, is normalised by itself.
    divided = DIFFERENT if batchnorm else EQUAL
    for name, keys in LOSSLESS.items():
        yield f"ddp{name}", ("strategy=ddp", *keys), EQUAL
    for shard in ("optimizer", "full"):
        yield f"fsdp {shard}", ("strategy=fsdp", f"strategy.shard={shard}"), EQUAL
    # Each rank has the whole batch.
    yield "tensor_parallel", ("strategy=tensor_parallel",), EQUAL
    if ranks == 4:
        for name, keys in MESHES.items():
            has_stages = "pipeline" in name
            more = ("strategy.microbatches=3",) if has_stages else ()
            yield f"mesh {name}", ("strategy=mesh", *keys, *more), divided if has_stages else EQUAL
    if batchnorm:
        yield "ddp local", ("strategy=ddp", "strategy.batchnorm=local"), DIFFERENT
    stages = 3 if ranks == 3 else 2
    pipeline = ("strategy=pipeline", f"strategy.stages={stages}", "strategy.microbatches=3")
    yield "pipeline", pipeline, divided
    if ranks > stages:
        yield "pipeline topk", (*pipeline, *LOSSLESS[" topk"]), divided
    # One worker has the whole batch.
    served = EQUAL if ranks == 2 else divided
    yield "server", ("strategy=parameter_server",), served
    yield "server topk", ("strategy=parameter_server", *LOSSLESS[" topk"]), served
    yield "server async", ("strategy=parameter_server", "strategy.mode=async"), BY_DESIGN
    merged = ("strategy=local_sgd", "strategy.sync_every=1", "optimizer.momentum=0")
    yield "local_sgd 1", merged, divided
    yield "local_sgd 2", ("strategy=local_sgd", "strategy.sync_every=2"), BY_DESIGN


def grid(models: list[str], chosen: list[str], ranks: list[int]) -> list[Case]:
    """All ways with all models, or those that were chosen."""
    return [
        Case(f"{model} {way} {count}", count, (*COMMON, *network.keys, *keys), expected)
        for model, network in networks().items()
        if not models or model in models
        for count in ranks
        for way, keys, expected in ways(count, network.batchnorm)
        if not chosen or way in chosen
    ]


def sound() -> list[Case]:
    """Twenty configurations of many kinds, in which nothing is wrong."""
    small, adam = ("model=simple_cnn", *size(8)), "optimizer=adam"
    separable = ("model=custom", "model._target_=networks.Separable", *size(16))
    ddp, group = ("strategy=ddp", *small), (*separable, "+model.kwargs.norm=group")
    pipeline = ("strategy=pipeline", "strategy.stages=2", "strategy.microbatches=4", *small)
    four_stages = ("strategy=pipeline", "strategy.stages=4", "strategy.microbatches=4", *small)
    server = "strategy=parameter_server"
    frozen = "freeze=[{match: head, epochs: 0}, {match: '*', epochs: 1}]"
    chosen: list[tuple[str, int, tuple[str, ...]]] = [
        ("accumulation, clipping", 3, (*ddp, "trainer.micro_batch_size=2", "trainer.grad_clip_norm=0.1")),
        ("bf16", 2, (*ddp, adam, "trainer.precision=bf16")),
        ("fp16", 3, (*ddp, "trainer.precision=fp16")),
        ("GroupNorm, momentum, cosine", 2, ("strategy=ddp", *group, "optimizer.momentum=0.9", "scheduler=cosine")),
        ("warm-up, steps", 2, (*ddp, "scheduler=step", "scheduler.warmup_epochs=1", "scheduler.milestones=[2.0]")),
        ("frozen at first", 2, (*ddp, frozen)),
        ("weights of classes", 3, (*ddp, "data.balance=loss")),
        ("balanced classes, three servers", 4, (server, "strategy.servers=3", *small, "data.balance=sampler")),
        ("dropout, one worker", 2, (server, *separable, "+model.kwargs.dropout=0.3")),
        ("ragged shares", 4, (*ddp, "data.batch_size=7")),
        ("one bucket for a parameter", 2, (*ddp, "strategy.bucket_mb=1e-4", "strategy.first_bucket_mb=1e-4")),
        ("BatchNorm of the whole batch", 3, ("strategy=ddp", *separable, adam)),
        (
            "tied layers",
            2,
            ("strategy=ddp", "model=custom", "model._target_=networks.Patches", "+model.kwargs.tied=true", *size(16)),
        ),
        ("GPipe", 2, (*pipeline, "strategy.schedule=gpipe", "trainer.grad_clip_norm=0.1")),
        ("interleaved", 2, (*four_stages, "strategy.schedule=interleaved_1f1b")),
        ("interleaved, zero bubble", 2, (*four_stages, "strategy.schedule=interleaved_zero_bubble", adam)),
        ("ZBV, zero bubble", 2, (*four_stages, "strategy.schedule=zbv_zero_bubble")),
        (
            "augmentation, smoothed labels, flipped views",
            2,
            (
                *ddp,
                "data.augment.flip=true",
                "data.augment.crop_padding=2",
                "loss.label_smoothing=0.1",
                "trainer.test_views=flip",
                "optimizer=adamw",
            ),
        ),
        (
            "several labels, Muon",
            2,
            (*ddp, "data.target=labels", "task=multilabel", "loss=binary_cross_entropy", "optimizer=muon"),
        ),
        (
            "replicas of a pipeline, no shared memory",
            4,
            (*pipeline, "runtime.shared_memory=off", "optimizer.lookahead.every=3"),
        ),
    ]
    return [Case(name, ranks, (*COMMON, *keys), steps=7) for name, ranks, keys in chosen]


# --- the ranks ---------------------------------------------------------------------------------------------------


def verify_on_rank(batch: Path) -> int:
    """Verifies some configurations as one rank; returns the exit code.

    Args:
        batch: File with the cases, each with its folder.
    """
    world = World.from_environment()
    for folder, plain in json.loads(batch.read_text()):
        case = Case(**{**plain, "keys": tuple(plain["keys"])})
        options = engine.Options(steps=case.steps, folder=Path(folder), command=case.command)
        try:
            engine.verify(compose_training(case.keys), world, options)
        except ConfigError as error:
            # Before ranks meet, so that all go on.
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, REFUSED).write_text(str(error))
        except Failed as failed:
            return EXIT_STOPPED if isinstance(failed.__cause__, Stopped) else EXIT_FAILED
    skip_destructors_after_communication()
    return 0


def made(folder: Path) -> bool:
    """Whether a configuration was verified, or refused."""
    return (folder / FILE).exists() or (folder / REFUSED).exists()


def verify(cases: list[Case], root: Path, deadline: float) -> dict[Case, str]:
    """Makes the certificates that are missing; returns why some could not be made.

    Args:
        cases: The configurations.
        root: Folder of the certificates.
        deadline: When no further ones are begun.
    """
    failed: dict[Case, str] = {}
    waiting = [case for case in cases if not (root / case.name / FILE).exists()]
    for case in waiting:
        shutil.rmtree(root / case.name, ignore_errors=True)
    while waiting and time.monotonic() < deadline:
        together = [case for case in waiting if case.ranks == waiting[0].ranks][:TOGETHER]
        batch = root / "batch.json"
        batch.write_text(json.dumps([(str(root / case.name), dataclasses.asdict(case)) for case in together]))
        launch = LaunchSettings(nproc=together[0].ranks)
        outcome = elastic.run_ranks(launch, sys.executable, [__file__, "--on-rank", str(batch)])
        if outcome.code in _ON_REQUEST:
            break
        for case in together:
            if made(root / case.name):
                waiting.remove(case)
            else:
                failed[case] = outcome.line
                waiting.remove(case)
                break
    return failed


# --- the table ---------------------------------------------------------------------------------------------------


def row(case: Case, folder: Path) -> tuple[str, ...]:
    """What was asked, what the certificate says, parameters' distance and limit, and whether that must be so."""
    if (folder / REFUSED).exists():
        return case.name, "refused", "", "", (folder / REFUSED).read_text()
    content = json.loads((folder / FILE).read_text())
    verdict: str = content["verdict"]
    phase = content["phases"][0]
    parameters = next(each for each in phase["verdicts"] if each["quantity"] == "parameters")
    largest = parameters["largest"]
    limit = "" if verdict == BY_DESIGN else f"{parameters['limit']:.1e}"
    remarks = [] if case.expected == verdict else [f"<- must be {case.expected}"]
    if verdict == DIFFERENT:
        parting = content["parting"] or {}
        cause = parting.get("cause") or "no cause"
        remarks.append(f"{cause}: {parting.get('module')} at step {parting.get('step')}")
        if case.expected == DIFFERENT and cause != CAUSE:
            remarks.append(f"<- must be {CAUSE}")
    remarks += [f"resumed: {again}" for again in resumed(content["phases"]) if again != "same bits"]
    shown = "-" if largest is None else f"{largest['value']:.1e} {phase['precision']}"
    return case.name, verdict, shown, limit, "; ".join(remarks)


def resumed(phases: list[dict[str, Any]]) -> Iterator[str]:
    """How the run that was resumed in the middle came out, in each number format."""
    for phase in phases:
        if phase["resumed_from"] is not None:
            yield "same bits" if phase["resumed_bitwise"] else f"other bits in {phase['precision']}"


def show(rows: list[tuple[str, ...]]) -> None:
    """Prints the table."""
    heads = ("configuration and ranks", "verdict", "parameters", "limit", "")
    widths = [max(len(each[column]) for each in (heads, *rows)) for column in range(4)]
    for each in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(each, (*widths, 0), strict=True)).rstrip())


def main() -> int:
    """Verifies all configurations, and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sound", action="store_true", help="20 sound configurations instead of the grid")
    parser.add_argument("--models", nargs="+", default=[], help="only these models")
    parser.add_argument("--ways", nargs="+", default=[], help="only these ways to train, such as 'ddp topk'")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further configurations after this time")
    parser.add_argument("--folder", type=Path, default=Path("certificates"))
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        return verify_on_rank(arguments.on_rank)
    deadline = time.monotonic() + 60 * arguments.minutes
    root: Path = arguments.folder.resolve()
    root.mkdir(parents=True, exist_ok=True)
    cases = sound() if arguments.sound else grid(arguments.models, arguments.ways, arguments.ranks)
    failed = verify(cases, root, deadline)
    rows = [row(case, root / case.name) for case in cases if made(root / case.name)]
    rows += [(case.name, "failed", "", "", f"{line} <-") for case, line in failed.items()]
    show(rows)
    wrong = sum("<-" in each[-1] for each in rows)
    counts = Counter(each[1] for each in rows)
    print(
        f"{len(rows)} of {len(cases)} configurations: "
        + ", ".join(f"{number} {name}" for name, number in counts.items())
    )
    print(f"{wrong} certificates say something else than they must")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
