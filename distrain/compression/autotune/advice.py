"""Warns when the configured compressor makes steps slower than no compression would."""

from __future__ import annotations

import logging
import math
import statistics

import torch
from torch import Tensor
from typing_extensions import override

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.autotune.compressor_cost import uncompressed_cost
from distrain.compression.autotune.link_model import LinkModel, measure_link
from distrain.compression.autotune.simulation import predict_step
from distrain.compression.autotune.step_probe import Phase, StepProbe, slowest
from distrain.compression.autotune.step_trace import StepTrace, median_with_error
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression

log = logging.getLogger(__name__)

#: Steps before anything is timed: memory, caches, compilation.
WARMUP_STEPS = 4
#: Ordinary steps, then steps that hold their exchanges back.
ORDINARY_STEPS, HELD_STEPS = 5, 3
#: If a step without compression is predicted to take longer by this factor, it is not measured more precisely.
CLEARLY_FASTER = 1.5
#: Pairs of an ordinary and an emulated uncompressed step that count; one pair before them does not.
PAIRS = 7
#: A step may be slower than without compression by this fraction.
TOO_SLOW = 0.03

_COMPRESSED, _EMULATED = "compressed", "emulated"


def needs_advice(compressor: Compressor, communicator: Communicator) -> bool:
    """Whether something is compressed among several ranks, and no other observer measures it."""
    return communicator.size > 1 and compressor.observer is None and not isinstance(compressor, NoCompression)


class Advisor(StepProbe):
    """Measures the first steps of a run and logs whether compression pays. The training is not changed.

    The duration of a step without compression is predicted from the backward pass, as measured with exchanges held
    back, and the link's time for the uncompressed buckets. Where the prediction is not clear, uncompressed steps are
    emulated: each bucket's size is all-reduced, with zeros as content, as soon as the bucket is complete, and the real
    exchanges are held back until that is over.

    Args:
        compressor: The configured compressor; the caller sets its ``observer``.
    """

    def __init__(self, compressor: Compressor) -> None:
        super().__init__(compressor, ORDINARY_STEPS, HELD_STEPS)
        self._emulates = False
        self._under_way: list[Pending] = []
        # For each bucket, by the name of its first parameter, what is all-reduced in its place.
        self._zeros: dict[str, Tensor] = {}

    @override
    def buckets_change(self) -> None:
        super().buckets_change()
        self._emulates = False
        self._zeros.clear()

    @override
    def is_warm(self) -> bool:
        return len(self.traces) >= WARMUP_STEPS and self.compressor.step > self.compressor.warmup_steps

    @override
    def bucket_ready(self, bucket: Bucket) -> None:
        super().bucket_ready(bucket)
        if self._emulates:
            first = next(iter(bucket.tensors))
            if first not in self._zeros:
                self._zeros[first] = torch.zeros_like(bucket.flat)
            self._under_way.append(self.communicator.start_all_reduce(self._zeros[first]))

    @override
    def backward_ended(self) -> None:
        for pending in self._under_way:
            pending.wait()
        self._under_way.clear()
        super().backward_ended()

    @override
    def evaluate(self, ordinary: list[StepTrace], held: list[StepTrace]) -> Phase | None:
        bucket_bytes = held[-1].bucket_bytes
        link = measure_link(self.communicator, self.device, max(bucket_bytes))
        own = {
            "ordinary": [trace.exchange_span for trace in ordinary],
            "after_exchange": statistics.median(trace.after_exchange for trace in [*ordinary, *held]),
        }
        compute, gathered = self.gather_compute_times(held, own)
        compressed = median_with_error(slowest(gathered, "ordinary"))[0]
        compressed += max(each["after_exchange"] for each in gathered)
        costs = [uncompressed_cost(bucket_bytes, self.communicator.size)] * len(gathered)
        uncompressed = predict_step(compute, costs, link)
        if uncompressed < CLEARLY_FASTER * compressed:
            return self._emulation(link)
        self._log(compressed, uncompressed, 0.0, link)
        return None

    def _emulation(self, link: LinkModel) -> Phase:
        """Ordinary and emulated uncompressed steps alternate, so that both are measured under the same conditions."""

        def prepare(label: str) -> None:
            self._emulates = label == _EMULATED

        labels = [_COMPRESSED, _EMULATED] * (PAIRS + 1)
        return Phase(labels, lambda traces: self._end_emulation(traces, link), _EMULATED, prepare)

    def _end_emulation(self, traces: list[StepTrace], link: LinkModel) -> None:
        self._emulates = False
        self._zeros.clear()
        compressed = [trace for trace in traces if trace.label == _COMPRESSED]
        emulated = [trace for trace in traces if trace.label == _EMULATED]
        own = {
            "compressed": [trace.exchange_span for trace in compressed[1:]],
            "uncompressed": [trace.compute_seconds for trace in emulated[1:]],
            "after_exchange": statistics.median(trace.after_exchange for trace in compressed + emulated),
        }
        gathered = self.communicator.all_gather_json(own, self.device)
        after_exchange = max(each["after_exchange"] for each in gathered)
        with_compression, error = median_with_error(slowest(gathered, "compressed"))
        without, other_error = median_with_error(slowest(gathered, "uncompressed"))
        self._log(with_compression + after_exchange, without + after_exchange, math.hypot(error, other_error), link)

    def _log(self, compressed: float, uncompressed: float, error: float, link: LinkModel) -> None:
        slower, line = verdict(self.compressor.config.name, compressed, uncompressed, error, link)
        log.log(logging.WARNING if slower else logging.INFO, "%s", line)


def verdict(name: str, compressed: float, uncompressed: float, error: float, link: LinkModel) -> tuple[bool, str]:
    """Compares steps with and without compression.

    Args:
        name: The compressor.
        compressed: Seconds of a step with it.
        uncompressed: Seconds of a step without compression.
        error: Uncertainty of the difference, in seconds.
        link: Times of collectives.

    Returns:
        Whether compression makes steps too slow, and the line for the log.
    """
    slower = compressed - uncompressed > max(TOO_SLOW * uncompressed, error)
    line = (
        f"a step with compression={name} takes {1000 * compressed:.1f} ms; without compression it would take about "
        f"{1000 * uncompressed:.1f} ms on this link ({link})"
    )
    if slower:
        return True, f"{line}, so compression=none or compression=auto is faster"
    uncertain = compressed > (1 + TOO_SLOW) * uncompressed
    return False, f"{line}; step times vary too much to tell which is faster" if uncertain else line
