"""The configurations among which a plan chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distrain.strategies.fsdp.options import FULL, SHARDS
from distrain.strategies.pipeline.schedule import SCHEDULES
from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.steps import ddp, fsdp, local_sgd, parameter_server, pipeline, tensor_parallel
from distrain.tools.planning.steps.common import Setting

#: Steps between merges of ``local_sgd``.
SYNC_EVERY = (4, 16, 64)
#: Steps of ``local_sgd`` that are taken while a merge is under way.
OVERLAP_STEPS = (1, 4)
#: A late merge costs accuracy, so it is a candidate only where a step then takes less than this share of its time.
_WORTH_HIDING = 0.98
#: Microbatches of a pipeline.
MICROBATCHES = (2, 4, 8, 16)
#: Sizes in MiB of ddp's buckets, besides those that a run chooses by itself: all gradients in one, and torch's default.
BUCKETS_MB = (1024.0, 25.0)
#: Most ranks of one pipeline.
_MOST_PIPELINE_RANKS = 8


@dataclass(frozen=True)
class Candidate:
    """A configuration.

    Attributes:
        keys: Keys and values of the command line.
        predict: Predicts a step of it.
        better_than: A configuration than which this one must clearly be faster to be worth its cost; ``None``: none.
    """

    keys: dict[str, str]
    predict: Callable[[Setting], Prediction]
    better_than: Candidate | None = None


def predictions(setting: Setting, strategies: Sequence[str], compressors: Sequence[str]) -> Iterator[Prediction]:
    """Predicts all configurations that the training and the number of ranks allow.

    Args:
        setting: Where.
        strategies: Names of the strategies to look at.
        compressors: Names of the compressors to look at.
    """
    for name in strategies:
        for candidate in of_strategy(name, setting, compressors):
            prediction = candidate.predict(setting)
            other = candidate.better_than
            if other is None or prediction.seconds < _WORTH_HIDING * other.predict(setting).seconds:
                yield prediction


def of_strategy(name: str, setting: Setting, compressors: Sequence[str] = ()) -> Iterator[Candidate]:
    """The configurations of a strategy, without predicting them.

    Args:
        name: Of the strategy.
        setting: Where.
        compressors: Names of the compressors to look at.
    """
    found: dict[str, Callable[[Setting, Sequence[str]], Iterator[Candidate]]] = {
        "single": _single,
        "ddp": _ddp,
        "fsdp": _fsdp,
        "tensor_parallel": _tensor_parallel,
        "pipeline": _pipeline,
        "local_sgd": _local_sgd,
        "parameter_server": _parameter_server,
    }
    return found[name](setting, compressors)


def _single(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    if setting.cluster.ranks == 1:
        yield _candidate(ddp.predict, {"strategy": "single"})


def _ddp(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    ranks = setting.cluster.ranks
    if ranks == 1 or setting.workload.batch_size < ranks:
        return
    keys = {"strategy": "ddp"}
    yield _candidate(ddp.predict, keys)
    if setting.workload.batchnorms:
        yield _candidate(ddp.predict, {**keys, "strategy.batchnorm": "local"}, synchronised=False)
    for name in compressors:
        if name in setting.workload.compressors:
            yield _candidate(ddp.predict, {**keys, "compression": name}, compressor=name)
    layouts = {ddp.layout(setting, (None, None, None))}
    for size in BUCKETS_MB:
        sizes = {f"strategy.{key}": f"{size:g}" for key in ("first_bucket_mb", "bucket_mb")}
        layout = ddp.layout(setting, (size, size, None))
        if layout not in layouts:
            layouts.add(layout)
            yield _candidate(ddp.predict, {**keys, **sizes}, sizes=(size, size, None))


def _fsdp(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    ranks, per_host = setting.cluster.ranks, setting.cluster.ranks_per_host
    if ranks == 1 or setting.workload.batch_size < ranks:
        return
    keys = {"strategy": "fsdp"}
    block_mb = setting.workload.block_mb
    full = {**keys, "strategy.shard": FULL, **({} if block_mb is None else {"strategy.block_mb": str(block_mb)})}
    for shard in SHARDS:
        yield _candidate(fsdp.predict, full if shard == FULL else {**keys, "strategy.shard": shard}, shard=shard)
    kept = {**full, "strategy.reshard_after_forward": "false"}
    yield _candidate(fsdp.predict, kept, shard=FULL, reshards=False)
    if 1 < per_host < ranks:
        # Hosts are replicas of each other.
        yield _candidate(fsdp.predict, {**full, "strategy.shard_size": str(per_host)}, shard=FULL, shard_size=per_host)


def _tensor_parallel(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    divided = setting.workload.divided
    # Among other ranks, layers would be divided in other ways.
    if divided is not None and divided.ranks == setting.cluster.ranks:
        yield _candidate(tensor_parallel.predict, {"strategy": "tensor_parallel"})


def _local_sgd(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    ranks = setting.cluster.ranks
    if ranks == 1 or setting.workload.batch_size < ranks:
        return
    for steps in SYNC_EVERY:
        keys = {"strategy": "local_sgd", "strategy.sync_every": str(steps)}
        waiting = _candidate(local_sgd.predict, keys, sync_every=steps)
        yield waiting
        for overlap in OVERLAP_STEPS:
            # A merge ends before the next one begins.
            if overlap <= steps:
                hidden = {**keys, "strategy.overlap_steps": str(overlap)}
                late = _candidate(local_sgd.predict, hidden, sync_every=steps, overlap_steps=overlap)
                yield dataclasses.replace(late, better_than=waiting)


def _pipeline(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    ranks, workload = setting.cluster.ranks, setting.workload
    places = 1 + sum(block.begins_stage for block in workload.blocks[1:])
    for own in range(2, min(ranks, _MOST_PIPELINE_RANKS) + 1):
        if ranks % own or workload.batch_size < ranks // own:
            continue
        share = -(-workload.batch_size // (ranks // own))
        for schedule in SCHEDULES.values():
            per_rank = schedule.stages_per_rank or 2
            if own * per_rank > places:
                continue
            least = 1 if workload.micro_batch_size is None else -(-share // workload.micro_batch_size)
            # A run makes more of them where they would be larger than a pass may be.
            for microbatches in sorted({max(number, least) for number in MICROBATCHES}):
                if microbatches > share:
                    continue
                keys = {
                    "strategy": "pipeline",
                    "strategy.stages": str(own * per_rank),
                    "strategy.schedule": schedule.name,
                    "strategy.microbatches": str(microbatches),
                }
                yield _candidate(
                    pipeline.predict,
                    keys,
                    ranks=own,
                    schedule=schedule.name,
                    microbatches=microbatches,
                    stages_per_rank=per_rank,
                )


def _parameter_server(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    ranks = setting.cluster.ranks
    for servers in sorted({1, ranks // 4}):
        if 0 < servers < ranks and setting.workload.batch_size >= ranks - servers:
            keys = {"strategy": "parameter_server", "strategy.servers": str(servers)}
            yield _candidate(parameter_server.predict, keys, servers=servers)


def _candidate(predict: Callable[..., Prediction], keys: dict[str, str], **options: Any) -> Candidate:
    """A configuration with the arguments that its strategy's ``predict`` takes."""
    return Candidate(keys, lambda setting: predict(setting, keys, **options))
