"""A part of the model whose copies are merged together, and the outer optimizer's step at each merge."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.config.groups import CompressionConfig
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import make_bucket, split_into_buckets
from distrain.gradients.exchange import BucketExchanger
from distrain.gradients.linear_partition import linear_partition
from distrain.optim.uncompiled import without_compiler_hooks
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.device import float64_device

_BUCKET_BYTES = 25 * MIB

MakeOuterOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def split_by_bytes(parameters: Mapping[str, nn.Parameter], count: int) -> list[dict[str, nn.Parameter]]:
    """Splits parameters, in order, into parts such that the largest has as few bytes as possible."""
    items = list(parameters.items())
    sizes = [float(parameter.numel() * parameter.element_size()) for _, parameter in items]
    starts = linear_partition(sizes, [0.0] * len(items), count, range(1, len(items)))
    return [dict(items[start:stop]) for start, stop in zip(starts, [*starts[1:], len(items)], strict=True)]


def outer_sgd(rate: float = 1.0, momentum: float = 0.0, *, nesterov: bool = False) -> MakeOuterOptimizer:
    """A constructor of the outer optimizer: SGD whose gradient is anchor - mean of the copies.

    With the default arguments a step replaces the anchor by the mean.

    Args:
        rate: Learning rate.
        momentum: Momentum.
        nesterov: Use Nesterov's momentum.
    """

    def make(anchors: list[Tensor]) -> torch.optim.Optimizer:
        sgd = without_compiler_hooks(torch.optim.SGD)
        return sgd(anchors, lr=rate, momentum=momentum, nesterov=nesterov, foreach=False)

    return make


@dataclass
class SampleCount:
    """Samples since the last merge.

    Attributes:
        local: Samples of this rank.
        total: Samples of all ranks that merge.
    """

    local: int = 0
    total: int = 0

    def add(self, other: SampleCount) -> None:
        """Adds another count to this one."""
        self.local += other.local
        self.total += other.total

    def weight(self, ranks: int) -> float:
        """This rank's weight in a merge of ``ranks`` copies; the weights of all ranks add up to 1."""
        return self.local / self.total if self.total else 1 / ranks


class _FragmentBucket:
    """Tensors of a fragment that are sent in one bucket; all buckets about them have the same memory layout.

    Args:
        named: The tensors' names, shapes and types.
        copies: This rank's copies by name, which training changes.
        compressor: As for :class:`Fragment`.

    Attributes:
        difference: What is sent: this rank's share of the mean difference, and after the exchange the whole of it.
        anchor: The result of the last merge, equal on all ranks; its memory stays the same.
        momentum: The outer optimizer's momentum, equal on all ranks; ``None`` if it has none.
    """

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], copies: Mapping[str, Tensor], compressor: Compressor
    ) -> None:
        self._named = named
        self._copies = copies
        self._compressor = compressor
        self.difference = self._zeros()
        self.anchor = self.copies()
        self.momentum: Bucket | None = None

    def _zeros(self) -> Bucket:
        return make_bucket(self._named, self._compressor)

    def add_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes this bucket's momentum, which is zero before the first merge, the optimizer's."""
        self.momentum = self._zeros()
        optimizer.state[self.anchor.flat]["momentum_buffer"] = self.momentum.flat

    def copies(self) -> Bucket:
        """A new bucket with the current values of this rank's copies."""
        bucket = self._zeros()
        for name, view in bucket.tensors.items():
            view.copy_(self._copies[name].detach())
        return bucket

    def set_copies(self, values: Bucket) -> None:
        """Overwrites this rank's copies."""
        for name, view in values.tensors.items():
            self._copies[name].detach().copy_(view)

    def state(self) -> dict[str, Bucket]:
        """Buckets that are equal on all ranks, by the prefix of their tensors' names in a checkpoint."""
        momentum = {} if self.momentum is None else {"outer_momentum": self.momentum}
        return {"anchor": self.anchor, **momentum, "mean": self.difference}


class Fragment:
    """A part of the model, and the merges of its copies.

    In a merge each rank sends its share, weight * (anchor - copy), of the mean difference. The sum of the shares is the
    gradient of the outer optimizer, which updates the anchor; the anchor then replaces the copies.

    Args:
        tensors: This rank's copies by name, looked up whenever they are used; at construction they are equal on all
            ranks.
        communicator: The ranks that merge.
        compressor: Compresses the differences.
        stopwatch: Records exposed communication.
        make_outer_optimizer: Constructs the outer optimizer of the anchors.

    Attributes:
        names: Names of the tensors that are merged, in order; without them a fragment must not start a merge.
        samples: Samples since the last merge started.
        group_samples: Samples of this rank's group since its last merge, within the group or among all ranks.
        copies_equal: Whether the copies of all ranks are known to be equal.
        apply_at: Step at whose end the merge under way is applied; ``None`` if no merge is under way.
        drift: Of the last merge applied: squared distance of this rank's copies from the mean, and the squared norm of
            the previous anchor; scalars on the device.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        communicator: Communicator,
        compressor: Compressor,
        stopwatch: Stopwatch,
        make_outer_optimizer: MakeOuterOptimizer,
    ) -> None:
        self.samples = SampleCount()
        self.group_samples = SampleCount()
        self.copies_equal = True
        self.apply_at: int | None = None
        self.drift: tuple[Tensor, Tensor] | None = None
        self._communicator = communicator
        self._compressor = compressor
        self._exchanger = BucketExchanger(compressor, communicator, stopwatch)
        self._stopwatch = stopwatch
        self._exchanging = False
        self._tensors = tensors
        self._make_outer_optimizer = make_outer_optimizer
        self._make_buckets(list(tensors))

    def _make_buckets(self, names: list[str]) -> None:
        """Lays out buckets for some of the fragment's tensors, whose copies are taken as the anchor."""
        self.names = names
        contents = _bucket_contents({name: self._tensors[name] for name in names})
        self._buckets = [_FragmentBucket(named, self._tensors, self._compressor) for named in contents]
        if not self._buckets:
            return
        self._outer_optimizer = self._make_outer_optimizer(self.anchors)
        if self._outer_optimizer.defaults["momentum"]:
            for bucket in self._buckets:
                bucket.add_momentum(self._outer_optimizer)

    def merge_only(self, names: Collection[str]) -> None:
        """From now on merges only those of the fragment's tensors; all ranks call it together, between steps.

        Tensors that were not merged until now start with their copies, equal on all ranks, as the anchor.
        """
        self.wait()
        state = {key: tensor.clone() for key, tensor in self.shared_state().items()}
        self._make_buckets([name for name in self._tensors if name in names])
        self._set_shared_state(state)

    @property
    def bytes(self) -> int:
        """Size of the tensors, in bytes."""
        return sum(bucket.difference.bytes for bucket in self._buckets)

    def reset_anchor(self) -> None:
        """Takes the copies, which are equal on all ranks without a merge, as the anchor."""
        for bucket in self._buckets:
            bucket.anchor.flat.copy_(bucket.copies().flat)
        self.copies_equal = True

    def count_step(self, samples: SampleCount, group_samples: SampleCount) -> None:
        """Counts the samples of a training step, after which the copies differ."""
        self.copies_equal = False
        self.samples.add(samples)
        self.group_samples.add(group_samples)

    def reset_counts(self) -> None:
        """Sets the counts of samples to zero."""
        self.samples, self.group_samples = SampleCount(), SampleCount()

    def start_merge(self, apply_at: int) -> None:
        """Starts sending this rank's share of the mean difference.

        Args:
            apply_at: Step at whose end :meth:`finish_merge` will be called.
        """
        assert self.apply_at is None, "a merge starts before the last one was applied"
        self.apply_at = apply_at
        weight = self.samples.weight(self._communicator.size)
        self.reset_counts()
        self._exchanging = self._communicator.size > 1
        if self._exchanging:
            self._exchanger.begin_last_backward()
        for bucket in self._buckets:
            torch.sub(bucket.anchor.flat, bucket.copies().flat, out=bucket.difference.flat).mul_(weight)
            if self._exchanging:
                self._exchanger.start(bucket.difference)
            elif self._compressor.residuals is not None:
                self._compressor.residuals.fold_into_gradients(bucket.difference)

    def wait(self) -> None:
        """Waits for the mean difference of the merge under way, if any; all ranks call it together."""
        if self._exchanging:
            self._exchanger.finish()
            self._exchanging = False

    def finish_merge(self, keep: float) -> None:
        """Updates the anchor by the outer optimizer, and the copies by the anchor.

        Args:
            keep: Share of its own copy that each rank keeps (alpha of Streaming DiLoCo); 0 replaces the copies.
        """
        with self._stopwatch.communication():
            self.wait()
        self.apply_at = None
        squares = torch.zeros(2, dtype=torch.float64, device=float64_device(self._buckets[0].anchor.flat.device))
        for bucket in self._buckets:
            anchor, mean_difference = bucket.anchor.flat, bucket.difference.flat
            copy_minus_mean = bucket.copies().flat.sub_(anchor).add_(mean_difference)
            squares += torch.stack([copy_minus_mean.dot(copy_minus_mean), anchor.dot(anchor)]).to(squares.device)
            anchor.grad = mean_difference
        self._outer_optimizer.step()
        for bucket in self._buckets:
            bucket.anchor.flat.grad = None
            if keep:
                mixed = bucket.copies()
                mixed.flat.mul_(keep).add_(bucket.anchor.flat, alpha=1 - keep)
                bucket.set_copies(mixed)
            else:
                bucket.set_copies(bucket.anchor)
        self.copies_equal = self.copies_equal or not keep
        self.drift = (squares[0], squares[1])

    def mean_of_copies(self, communicator: Communicator, weight: float) -> dict[str, Tensor]:
        """The weighted mean of a group's copies, in new memory; a merge under way is not affected.

        Args:
            communicator: The group.
            weight: This rank's weight; those of the group add up to 1.
        """
        means: dict[str, Tensor] = {}
        for bucket in self._buckets:
            # Averages differences from the anchor: if all copies equal the anchor, their mean does so bit for bit.
            mean = bucket.copies()
            torch.sub(bucket.anchor.flat, mean.flat, out=mean.flat).mul_(weight)
            communicator.all_reduce(mean.flat)
            torch.sub(bucket.anchor.flat, mean.flat, out=mean.flat)
            means |= mean.tensors
        return means

    @property
    def anchors(self) -> list[Tensor]:
        """The anchor, as one 1-D tensor per bucket."""
        return [bucket.anchor.flat for bucket in self._buckets]

    def shared_state(self) -> dict[str, Tensor]:
        """State that is equal on all ranks: ``anchor/…``, ``outer_momentum/…`` and, of a merge under way, ``mean/…``.

        Call :meth:`wait` before.
        """
        return {
            f"{prefix}/{name}": view
            for bucket in self._buckets
            for prefix, content in bucket.state().items()
            if prefix != "mean" or self.apply_at is not None
            for name, view in content.tensors.items()
        }

    def load_shared_state(self, saved: Mapping[str, Tensor], apply_at: int | None) -> None:
        """Loads what :meth:`shared_state` returned, whatever fragments the saved run had.

        Args:
            saved: Where it has no anchor, the copies are taken as the anchor.
            apply_at: Step at whose end a merge under way is to be applied. If its mean was not saved for all tensors,
                the merge is dropped. Nothing is lost: the anchor has not moved, so the next merge's difference
                includes this one's.
        """
        self.reset_anchor()
        self.reset_counts()
        complete = apply_at is not None and all(f"mean/{name}" in saved for name in self.names)
        self.apply_at = apply_at if complete else None
        self._set_shared_state(saved)

    def _set_shared_state(self, saved: Mapping[str, Tensor]) -> None:
        for bucket in self._buckets:
            for prefix, content in bucket.state().items():
                for name, view in content.tensors.items():
                    if f"{prefix}/{name}" in saved:
                        view.copy_(saved[f"{prefix}/{name}"])


def _bucket_contents(tensors: Mapping[str, Tensor]) -> list[list[tuple[str, nn.Parameter]]]:
    """Divides named tensors among buckets; buffers and moments are laid out like parameters."""
    named = [(name, nn.Parameter(tensor.detach(), requires_grad=False)) for name, tensor in tensors.items()]
    return split_into_buckets(named, _BUCKET_BYTES, _BUCKET_BYTES)


def weighted_mean(tensors: Mapping[str, Tensor], weight: float, communicator: Communicator) -> dict[str, Tensor]:
    """The weighted mean of named tensors over a group, in new memory.

    Args:
        tensors: The same names, shapes and dtypes on all ranks.
        weight: This rank's weight; those of the group add up to 1.
        communicator: The group.
    """
    means: dict[str, Tensor] = {}
    for named in _bucket_contents(tensors):
        bucket = make_bucket(named, NoCompression(CompressionConfig("none")))
        for name, view in bucket.tensors.items():
            torch.mul(tensors[name], weight, out=view)
        communicator.all_reduce(bucket.flat)
        means |= bucket.tensors
    return means
