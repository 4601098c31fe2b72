"""The configurations among which a plan chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distrain.strategies.fsdp.options import FULL, GRADIENTS, SHARDS
from distrain.strategies.pipeline.schedule import SCHEDULES
from distrain.tools.planning.cluster import Cluster
from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.steps import ddp, fsdp, local_sgd, parameter_server, pipeline
from distrain.tools.planning.steps.common import Setting
from distrain.tools.planning.steps.shape import Shape

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
#: Of a mesh: ranks along the dimension of a pipeline, and its schedule, which holds least.
MESH_PIPELINES, MESH_SCHEDULE = (1, 2, 4, 8), "1f1b"
#: Number of microbatches for which a mesh's stages are cut before their layers are divided.
_USUAL_MICROBATCHES = 4


@dataclass(frozen=True)
class Candidate:
    """A configuration.

    Attributes:
        keys: Keys and values of the command line.
        predict: Predicts a step of it.
        better_than: A configuration than which this one must clearly be faster to be worth its cost; ``None``: none.
        same_as: A strategy that has the same configuration under other keys; empty: none.
    """

    keys: dict[str, str]
    predict: Callable[[Setting], Prediction]
    better_than: Candidate | None = None
    same_as: str = ""


def predictions(setting: Setting, strategies: Sequence[str], compressors: Sequence[str]) -> Iterator[Prediction]:
    """Predicts all configurations that the training and the number of ranks allow.

    Args:
        setting: Where.
        strategies: Names of the strategies to look at.
        compressors: Names of the compressors to look at.
    """
    for name in strategies:
        for candidate in of_strategy(name, setting, compressors):
            if candidate.same_as in strategies:
                continue
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
        "mesh": _mesh,
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
    full = {**keys, **_keys_of_full(setting)}
    for shard in SHARDS:
        yield _candidate(fsdp.predict, full if shard == FULL else {**keys, "strategy.shard": shard}, shard=shard)
    kept = {**full, "strategy.reshard_after_forward": "false"}
    yield _candidate(fsdp.predict, kept, shard=FULL, reshards=False)
    if 1 < per_host < ranks:
        # Hosts are replicas of each other.
        yield _candidate(fsdp.predict, {**full, "strategy.shard_size": str(per_host)}, shard=FULL, shard_size=per_host)


def _keys_of_full(setting: Setting) -> dict[str, str]:
    """Keys of ``shard=full``, with blocks as the training names them."""
    block_mb = setting.workload.block_mb
    return {"strategy.shard": FULL, **({} if block_mb is None else {"strategy.block_mb": str(block_mb)})}


def _tensor_parallel(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    ranks = setting.cluster.ranks
    # Among other ranks, layers would be divided in other ways.
    if setting.workload.divided_among(ranks) is not None:
        yield _candidate(ddp.predict, {"strategy": "tensor_parallel"}, tensor=ranks)


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
    ranks, workload, places = setting.cluster.ranks, setting.workload, _places(setting)
    for own in range(2, min(ranks, _MOST_PIPELINE_RANKS) + 1):
        if ranks % own or workload.batch_size < ranks // own:
            continue
        share = -(-workload.batch_size // (ranks // own))
        for schedule in SCHEDULES.values():
            per_rank = schedule.stages_per_rank or 2
            if own * per_rank > places:
                continue
            for microbatches in _microbatches(setting, share):
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


def _places(setting: Setting) -> int:
    """Most stages into which the model can be cut."""
    return 1 + sum(block.begins_stage for block in setting.workload.blocks[1:])


def _microbatches(setting: Setting, share: int) -> list[int]:
    """Numbers of microbatches to try for a replica's share of a batch."""
    limit = setting.workload.micro_batch_size
    least = 1 if limit is None else -(-share // limit)
    # A run makes more of them where they would be larger than a pass may be.
    return [number for number in sorted({max(number, least) for number in MICROBATCHES}) if number <= share]


def mesh_shapes(cluster: Cluster) -> Iterator[Shape]:
    """The meshes that are tried: two dimensions, or three.

    Layers are divided between two ranks, or among all of a host. What stages and divided layers leave of the ranks
    are replicas, which either copy each other or share what updates them.

    Args:
        cluster: Has the ranks.
    """
    ranks, per_host = cluster.ranks, cluster.ranks_per_host
    for tensor in sorted({1, 2, per_host}):
        if per_host % tensor and per_host > 1:
            # Some group would be on two hosts.
            continue
        for stages in MESH_PIPELINES:
            replicas, left = divmod(ranks, stages * tensor)
            if left or (replicas == 1 and 1 in (stages, tensor)):
                continue
            if stages * tensor == 1:
                if 1 < per_host < ranks:
                    yield Shape(data=ranks // per_host, shard=per_host)
                continue
            yield Shape(data=replicas, pipeline=stages, tensor=tensor)
            if replicas > 1:
                yield Shape(shard=replicas, pipeline=stages, tensor=tensor)


def divisions(setting: Setting, strategies: Sequence[str]) -> list[tuple[int, list[int]]]:
    """The ways of dividing layers that configurations have.

    Args:
        setting: Where; its training is that of whole layers.
        strategies: Names of the strategies to look at.

    Returns:
        Numbers of ranks that divide layers, each with the index of the first block of each stage.
    """
    shapes = [Shape(tensor=setting.cluster.ranks)] if "tensor_parallel" in strategies else []
    shapes += [shape for shape in mesh_shapes(setting.cluster) if "mesh" in strategies and _has_room(setting, shape)]
    found: dict[tuple[int, int], list[int]] = {}
    for shape in shapes:
        if shape.tensor > 1 and (shape.tensor, shape.pipeline) not in found:
            samples = -(-setting.workload.batch_size // (shape.replicas * _USUAL_MICROBATCHES))
            starts = pipeline.stage_starts(setting, shape.pipeline, samples, shape.tensor)
            found[shape.tensor, shape.pipeline] = starts
    return [(tensor, starts) for (tensor, _), starts in sorted(found.items())]


def _has_room(setting: Setting, shape: Shape) -> bool:
    """Whether a batch has a sample for each replica of a mesh, and the model a place for each stage to begin."""
    return shape.replicas <= setting.workload.batch_size and shape.pipeline <= _places(setting)


def _mesh(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    for shape in mesh_shapes(setting.cluster):
        is_known = shape.tensor == 1 or setting.workload.divided_among(shape.tensor, shape.pipeline) is not None
        if is_known and _has_room(setting, shape):
            yield from _of_shape(setting, shape)


def _of_shape(setting: Setting, shape: Shape) -> Iterator[Candidate]:
    sizes = {name: size for name, size in dataclasses.asdict(shape).items() if size > 1}
    keys = {"strategy": "mesh", **{f"strategy.mesh.{name}": str(size) for name, size in sizes.items()}}
    # Beside stages and divided layers, sharing parameters too is not planned.
    shard = FULL if shape.ranks_of_replica == 1 else GRADIENTS
    if shape.shard > 1:
        keys |= _keys_of_full(setting) if shard == FULL else {"strategy.shard": shard}
    if shape.pipeline > 1:
        share = -(-setting.workload.batch_size // shape.replicas)
        for microbatches in _microbatches(setting, share):
            yield _candidate(
                pipeline.predict,
                {**keys, "strategy.schedule": MESH_SCHEDULE, "strategy.microbatches": str(microbatches)},
                same_as="pipeline" if sizes.keys() <= {"data", "pipeline"} else "",
                ranks=shape.pipeline,
                schedule=MESH_SCHEDULE,
                microbatches=microbatches,
                shard=shape.shard,
                tensor=shape.tensor,
            )
    elif shape.shard > 1:
        same_as = "fsdp" if shard == FULL else ""
        options = {"shard": shard, "shard_size": shape.shard, "tensor": shape.tensor}
        yield _candidate(fsdp.predict, keys, same_as=same_as, **options)
    else:
        yield _candidate(ddp.predict, keys, tensor=shape.tensor)


def _parameter_server(setting: Setting, compressors: Sequence[str]) -> Iterator[Candidate]:
    ranks = setting.cluster.ranks
    for servers in sorted({1, ranks // 4}):
        if 0 < servers < ranks and setting.workload.batch_size >= ranks - servers:
            keys = {"strategy": "parameter_server", "strategy.servers": str(servers)}
            yield _candidate(parameter_server.predict, keys, servers=servers)


def _candidate(
    predict: Callable[..., Prediction], keys: dict[str, str], same_as: str = "", **options: Any
) -> Candidate:
    """A configuration with the arguments that its strategy's ``predict`` takes."""
    return Candidate(keys, lambda setting: predict(setting, keys, **options), same_as=same_as)
