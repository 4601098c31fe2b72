"""The configurations among which a plan chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from distrain.strategies.pipeline.schedule import SCHEDULES
from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.steps import ddp, local_sgd, parameter_server, pipeline
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


def predictions(setting: Setting, strategies: Sequence[str], compressors: Sequence[str]) -> Iterator[Prediction]:
    """Predicts all configurations that the training and the number of ranks allow.

    Args:
        setting: Where.
        strategies: Names of the strategies to look at.
        compressors: Names of the compressors to look at.
    """
    of_strategy: dict[str, Callable[[Setting, Sequence[str]], Iterator[Prediction]]] = {
        "single": _single,
        "ddp": _ddp,
        "pipeline": _pipeline,
        "local_sgd": _local_sgd,
        "parameter_server": _parameter_server,
    }
    for name in strategies:
        yield from of_strategy[name](setting, compressors)


def _single(setting: Setting, compressors: Sequence[str]) -> Iterator[Prediction]:
    if setting.cluster.ranks == 1:
        yield ddp.predict(setting, {"strategy": "single"})


def _ddp(setting: Setting, compressors: Sequence[str]) -> Iterator[Prediction]:
    ranks = setting.cluster.ranks
    if ranks == 1 or setting.workload.batch_size < ranks:
        return
    keys = {"strategy": "ddp"}
    yield ddp.predict(setting, keys)
    if setting.workload.batchnorms:
        yield ddp.predict(setting, {**keys, "strategy.batchnorm": "local"}, synchronised=False)
    for name in compressors:
        if name in setting.workload.compressors:
            yield ddp.predict(setting, {**keys, "compression": name}, compressor=name)
    layouts = {ddp.layout(setting, (None, None, None))}
    for size in BUCKETS_MB:
        sizes = {f"strategy.{key}": f"{size:g}" for key in ("first_bucket_mb", "bucket_mb")}
        layout = ddp.layout(setting, (size, size, None))
        if layout not in layouts:
            layouts.add(layout)
            yield ddp.predict(setting, {**keys, **sizes}, sizes=(size, size, None))


def _local_sgd(setting: Setting, compressors: Sequence[str]) -> Iterator[Prediction]:
    ranks = setting.cluster.ranks
    if ranks == 1 or setting.workload.batch_size < ranks:
        return
    for steps in SYNC_EVERY:
        keys = {"strategy": "local_sgd", "strategy.sync_every": str(steps)}
        waiting = local_sgd.predict(setting, keys, sync_every=steps)
        yield waiting
        for overlap in OVERLAP_STEPS:
            # A merge ends before the next one begins.
            if overlap <= steps:
                hidden = {**keys, "strategy.overlap_steps": str(overlap)}
                prediction = local_sgd.predict(setting, hidden, sync_every=steps, overlap_steps=overlap)
                if prediction.seconds < _WORTH_HIDING * waiting.seconds:
                    yield prediction


def _pipeline(setting: Setting, compressors: Sequence[str]) -> Iterator[Prediction]:
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
                yield pipeline.predict(
                    setting,
                    keys,
                    ranks=own,
                    schedule=schedule.name,
                    microbatches=microbatches,
                    stages_per_rank=per_rank,
                )


def _parameter_server(setting: Setting, compressors: Sequence[str]) -> Iterator[Prediction]:
    ranks = setting.cluster.ranks
    for servers in sorted({1, ranks // 4}):
        if 0 < servers < ranks and setting.workload.batch_size >= ranks - servers:
            keys = {"strategy": "parameter_server", "strategy.servers": str(servers)}
            yield parameter_server.predict(setting, keys, servers=servers)
