"""Chooses the sizes of gradient buckets from the measured cost of an all-reduce, unless they are configured.

The cost of a layout follows from the latency per bucket and the time per byte (Li et al. 2020, arXiv 2006.15704,
§3.2.2: small buckets pay the latency often, large ones overlap little). All but the last bucket can overlap with the
backward pass. In simulated steps (:mod:`distrain.compression.autotune.simulation`) of CNNs of 0.1 to 11 million
parameters, on links from 100 Mbit/s to 160 Gbit/s, the rules of :func:`choose_sizes` were within 5 % of the best of 210
layouts, mostly within 1 %.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import nn

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.compression.autotune.link_model import LinkModel, measure_link
from distrain.files.terminal import FILE_ONLY
from distrain.gradients.trainable_parameters import trainable_parameters

log = logging.getLogger(__name__)

#: Bytes of a MiB.
MIB = 1024 * 1024
#: Seconds that Python spends on a bucket, in addition to the link.
_PYTHON_SECONDS = 50e-6
#: Several buckets are made only if the time that can be hidden exceeds so many latencies.
_MIN_HIDDEN_LATENCIES = 4
#: A bucket's transfer takes so many times its latency, which is then a small part of its cost,
_LATENCIES_PER_BUCKET = 50
#: but a bucket holds at most this part of the model, or nothing would overlap, and at most so many MiB.
_MIN_BUCKETS, _MAX_BUCKET_MB = 4, 25.0
#: MiB of the first bucket, which is small so that communication starts early.
_FIRST_BUCKET_MB = 1.0
#: MiB of the last bucket, which is small since nothing hides its exchange.
_LAST_BUCKET_MB = 0.25
#: Bytes of the largest message that is timed, and seconds of a message after which no larger one is timed.
_MAX_TIMED_BYTES, _LONG_ENOUGH = 4 * MIB, 0.008
#: Seconds after which a message is not repeated any more.
_MAX_SECONDS = 0.02


class BucketSizes(NamedTuple):
    """Limits of buckets, in MiB.

    Attributes:
        first: Limit of the first bucket.
        other: Limit of each other bucket.
        last: The last gradients that fit into this size form a bucket of their own; 0: none do.
    """

    first: float
    other: float
    last: float = 0.0


#: All gradients in one bucket.
ONE_BUCKET = BucketSizes(math.inf, math.inf)
#: Reasonable on most links.
DEFAULT_SIZES = BucketSizes(1.0, 25.0, 5.0)


@dataclass(frozen=True)
class AllReduceCost:
    """Cost of an all-reduce of the group, the same on all ranks.

    Attributes:
        latency: Seconds of a message of almost no bytes.
        seconds_per_byte: Additional seconds per byte to reduce.
        processor_share: Part of the bytes' time during which the ranks' own processors are busy with the transfer, from
            0 to 1. A concurrent backward pass takes longer by that time.
    """

    latency: float
    seconds_per_byte: float
    processor_share: float

    @classmethod
    def of(cls, link: LinkModel, ranks: int) -> AllReduceCost:
        """The cost among so many ranks, from the times of a link by the bytes that a rank sends."""
        sent = ring_all_reduce_bytes(_MAX_TIMED_BYTES, ranks)
        seconds = max(link.seconds("all_reduce", sent) - link.latency, 1e-12)
        processor = link.processor_seconds("all_reduce", sent) - link.processor_seconds("all_reduce", 0)
        return cls(link.latency, seconds / _MAX_TIMED_BYTES, min(max(processor / seconds, 0.0), 1.0))


def choose_sizes(cost: AllReduceCost, gradient_bytes: int) -> BucketSizes:
    """The layout for a model's gradients.

    One bucket, if what the backward pass could hide is not worth the latencies of several. Else buckets whose latency
    is a fiftieth of their time, but at most a quarter of the model; the first and the last one are small.

    Args:
        cost: Cost of an all-reduce.
        gradient_bytes: Size of all gradients.
    """
    latency = cost.latency + _PYTHON_SECONDS
    if (1 - cost.processor_share) * cost.seconds_per_byte * gradient_bytes <= _MIN_HIDDEN_LATENCIES * latency:
        return ONE_BUCKET
    # Rounded to a power of two, so that two runs seldom differ.
    by_latency = 2.0 ** round(math.log2(_LATENCIES_PER_BUCKET * latency / cost.seconds_per_byte / MIB))
    other = min(by_latency, gradient_bytes / MIB / _MIN_BUCKETS, _MAX_BUCKET_MB)
    return BucketSizes(min(other, _FIRST_BUCKET_MB), other, min(other, _LAST_BUCKET_MB))


class BucketSizing:
    """Chooses the bucket sizes of a run; all ranks create it together, at the same point.

    With more than two ranks the layout determines the order in which a ring adds up. A run that is resumed on the same
    ranks therefore takes the measurements of the first run instead of its own.

    Args:
        requested: Sizes in MiB of the first bucket, the others and the last; ``None``: chosen here.
        replicas: The ranks that reduce gradients.
        training_group: All ranks of groups that reduce gradients at the same time, which get the slowest group's cost.
        device: Where gradients are stored.
        gradient_bytes: Size of all gradients; no larger message is timed.
        deterministic: Nothing may depend on a measurement: sizes that are not requested are :data:`DEFAULT_SIZES`.

    Attributes:
        cost: The measured cost that determines the sizes; ``None`` where there is nothing to choose.
    """

    def __init__(
        self,
        requested: Sequence[float | None],
        replicas: Communicator,
        training_group: Communicator,
        device: torch.device,
        gradient_bytes: int,
        *,
        deterministic: bool = False,
    ) -> None:
        self._requested = [
            default if mb is None and deterministic else mb
            for mb, default in zip(requested, DEFAULT_SIZES, strict=True)
        ]
        self.cost: AllReduceCost | None = None
        if replicas.size > 1 and None in self._requested:
            self.cost = measure_cost(replicas, training_group, device, min(gradient_bytes, _MAX_TIMED_BYTES))

    def sizes(self, gradient_bytes: int) -> BucketSizes:
        """The sizes for so many bytes of gradients."""
        chosen = ONE_BUCKET if self.cost is None else choose_sizes(self.cost, gradient_bytes)
        return BucketSizes(*(own if mb is None else mb for mb, own in zip(self._requested, chosen, strict=True)))

    def log_choice(self, bucket_bytes: Sequence[int]) -> None:
        """Logs the measured cost and the resulting buckets, if anything was measured.

        Args:
            bucket_bytes: Size of each bucket of this rank.
        """
        if self.cost is not None and bucket_bytes:
            log.info("%s", describe_choice(self.cost, bucket_bytes), extra=FILE_ONLY)

    def state_dict(self) -> dict[str, float] | None:
        """The measured cost as plain data; ``None`` where nothing was measured."""
        if self.cost is None:
            return None
        return dict(zip(_SAVED_KEYS, astuple(self.cost), strict=True))

    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        """Restores what :meth:`state_dict` returned, on ranks that are arranged as they were."""
        if self.cost is not None and state is not None:
            self.cost = AllReduceCost(*(state[key] for key in _SAVED_KEYS))


#: Names of the fields of AllReduceCost in checkpoints.
_SAVED_KEYS = ("latency", "a_byte", "busy")


def gradient_bytes_of(model: nn.Module) -> int:
    """Size of all gradients of a model, in bytes."""
    return sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())


def measure_cost(
    replicas: Communicator, training_group: Communicator, device: torch.device, max_bytes: int
) -> AllReduceCost:
    """Times all-reduces for some hundredths of a second; all ranks call it together and get the same result.

    Args:
        replicas: The ranks that reduce gradients, more than one.
        training_group: All ranks of groups that do the same at the same time; the slowest group's cost is returned.
        device: Where gradients are stored.
        max_bytes: Size of the largest message.
    """
    link = measure_link(
        replicas, device, max_bytes, kinds=("all_reduce",), long_enough=_LONG_ENOUGH, max_seconds=_MAX_SECONDS
    )
    own = torch.tensor(astuple(AllReduceCost.of(link, replicas.size)), dtype=torch.float64, device=device)
    return AllReduceCost(*training_group.all_reduce(own, "max").tolist())


def describe_choice(cost: AllReduceCost, bucket_bytes: Sequence[int]) -> str:
    """One line for the log.

    Args:
        cost: The measured cost.
        bucket_bytes: Size of each bucket.
    """
    per_mib = 1000 * MIB * cost.seconds_per_byte
    measured = (
        f"an all-reduce has a latency of {1000 * cost.latency:.2g} ms and takes {per_mib:.2g} ms per MiB, "
        f"{cost.processor_share:.0%} of it processor time"
    )
    if len(bucket_bytes) == 1:
        return (
            f"{measured}: gradients are sent in one bucket of {bucket_bytes[0] / MIB:.2g} MiB, after the backward pass"
        )
    smallest, largest = min(bucket_bytes) / MIB, max(bucket_bytes) / MIB
    return f"{measured}: gradients are sent in {len(bucket_bytes)} buckets of {smallest:.2g} to {largest:.2g} MiB"
