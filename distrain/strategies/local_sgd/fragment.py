"""A part of the model whose copies are merged together, and the step that the merged copy takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.config.schema import CompressionConfig
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import make_bucket, split_into_buckets
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch

_BUCKET = 25 * MIB


@dataclass(frozen=True)
class Outer:
    """The outer optimizer: SGD whose gradient is anchor - merged. The defaults make the merged copy the new anchor.

    Attributes:
        rate: Its learning rate.
        momentum: Share of the last direction that is kept.
        nesterov: Nesterov's variant, by the formula of torch.optim.SGD.
    """

    rate: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False


@dataclass
class Seen:
    """Samples since the last merge.

    Attributes:
        own: Those of this rank.
        total: Those of all ranks that merge.
    """

    own: int = 0
    total: int = 0

    def add(self, more: Seen) -> None:
        """Counts more of them."""
        self.own += more.own
        self.total += more.total

    def weight(self, ranks: int) -> float:
        """This rank's weight in a merge now; the weights of all add up to 1."""
        return self.own / self.total if self.total else 1 / ranks


class _Part:
    """Tensors of a fragment that travel in one bucket, and the same memory layout for all that is kept about them.

    Attributes:
        tensors: This rank's copies, which training changes.
        bucket: What travels: first this rank's share of the mean difference, then the mean difference.
        anchor: The result of the last merge, equal on all ranks.
        momentum: The outer optimizer's direction, equal on all ranks; ``None`` without momentum.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], compressor: Compressor, momentum: bool) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in named}
        self._named = named
        self._compressor = compressor
        self.bucket = self._blank()
        self.anchor = self.copies()
        self.momentum = self._blank() if momentum else None

    def _blank(self) -> Bucket:
        return make_bucket(self._named, self._compressor)

    def copies(self) -> Bucket:
        """What the tensors hold now."""
        made = self._blank()
        for name, view in made.tensors.items():
            view.copy_(self.tensors[name])
        return made

    def write(self, content: Bucket) -> None:
        """Makes the tensors what the bucket holds."""
        for name, view in content.tensors.items():
            self.tensors[name].copy_(view)


class Fragment:
    """A part of the model, and the merges of its copies.

    What travels is each rank's share, weight * (anchor - copy), of the mean difference. That is the gradient of the
    outer optimizer, which moves the anchor; copies then take the anchor's place.

    Args:
        tensors: This rank's copies by name, equal on all ranks now.
        communicator: The ranks that merge.
        compressor: How differences travel.
        stopwatch: Where the waiting is booked.
        outer: The outer optimizer.

    Attributes:
        names: Of the tensors, in order.
        seen: Samples since the last merge left.
        seen_in_group: Samples of this rank's group since it merged last, with the group's or all ranks.
        together: Whether all ranks' copies are known to be equal.
        due: The step at whose end the merge under way is applied; ``None`` where none is.
        drift: Of the last merge applied: squared distance of this rank's copies from the merged copy, and the anchor's
            squared length; scalars on the device.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        communicator: Communicator,
        compressor: Compressor,
        stopwatch: Stopwatch,
        outer: Outer,
    ) -> None:
        self.names = list(tensors)
        self.seen = Seen()
        self.seen_in_group = Seen()
        self.together = True
        self.due: int | None = None
        self.drift: tuple[Tensor, Tensor] | None = None
        self._communicator = communicator
        self._compressor = compressor
        self._exchanges = BucketExchanger(compressor, communicator, stopwatch)
        self._stopwatch = stopwatch
        self._outer = outer
        self._travels = False
        self._parts = [_Part(part, compressor, outer.momentum > 0) for part in _parts(tensors)]

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(part.bucket.bytes for part in self._parts)

    def adopt(self) -> None:
        """Takes the copies, equal on all ranks by other means than a merge, for the anchor."""
        for part in self._parts:
            part.anchor = part.copies()
        self.together = True

    def count(self, seen: Seen, seen_in_group: Seen) -> None:
        """Counts one step, in which the copies part."""
        self.together = False
        self.seen.add(seen)
        self.seen_in_group.add(seen_in_group)

    def reset(self) -> None:
        """Counts samples from here."""
        self.seen, self.seen_in_group = Seen(), Seen()

    def leave(self, due: int) -> None:
        """Starts a merge: sends off this rank's share of the mean difference.

        Args:
            due: See the attribute.
        """
        assert self.due is None, "a merge leaves before the last one was applied"
        self.due = due
        weight = self.seen.weight(self._communicator.size)
        self.reset()
        self._travels = self._communicator.size > 1
        if self._travels:
            self._exchanges.begin_last_backward()
        for part in self._parts:
            torch.sub(part.anchor.flat, part.copies().flat, out=part.bucket.flat).mul_(weight)
            if self._travels:
                self._exchanges.start(part.bucket)
            elif self._compressor.residuals is not None:
                self._compressor.residuals.fold_into_gradients(part.bucket)

    def wait(self) -> None:
        """Waits until the mean difference of the merge under way is here; all ranks call it together."""
        if self._travels:
            self._exchanges.finish()
            self._travels = False

    def apply(self, keep: float) -> None:
        """Ends a merge: the anchor takes the outer optimizer's step, and the copies follow.

        Args:
            keep: Share of its own copy that this rank keeps (alpha of Streaming DiLoCo); 0 makes the copies the anchor.
        """
        with self._stopwatch.communication():
            self.wait()
        self.due = None
        squares = torch.zeros(2, dtype=torch.float64, device=self._parts[0].bucket.flat.device)
        for part in self._parts:
            mean, anchor = part.bucket.flat, part.anchor.flat
            apart = part.copies().flat.sub_(anchor).add_(mean)
            squares += torch.stack([apart.dot(apart), anchor.dot(anchor)])
            if part.momentum is not None:
                direction = part.momentum.flat.mul_(self._outer.momentum).add_(mean)
                mean = mean.add(direction, alpha=self._outer.momentum) if self._outer.nesterov else direction
            anchor.sub_(mean, alpha=self._outer.rate)
            if keep:
                mixed = part.copies()
                mixed.flat.mul_(keep).add_(anchor, alpha=1 - keep)
                part.write(mixed)
            else:
                part.write(part.anchor)
        self.together = self.together or not keep
        self.drift = (squares[0], squares[1])

    def averaged(self, communicator: Communicator, weight: float) -> dict[str, Tensor]:
        """The weighted mean of a group's copies, in memory of its own; the merge under way doesn't notice.

        Args:
            communicator: The group.
            weight: This rank's; those of the group add up to 1.
        """
        found: dict[str, Tensor] = {}
        for part in self._parts:
            # By the difference, so that where all copies are the anchor their mean is too, to the bit.
            copies = part.copies()
            torch.sub(part.anchor.flat, copies.flat, out=copies.flat).mul_(weight)
            communicator.all_reduce(copies.flat)
            torch.sub(part.anchor.flat, copies.flat, out=copies.flat)
            found |= copies.tensors
        return found

    @property
    def anchors(self) -> list[Tensor]:
        """The anchor, as one 1-D tensor a bucket."""
        return [part.anchor.flat for part in self._parts]

    def shared_state(self) -> dict[str, Tensor]:
        """What is the same on all ranks: ``anchor/…``, ``outer_momentum/…`` and, of a merge under way, ``mean/…``.

        Call :meth:`wait` before.
        """
        found: dict[str, Tensor] = {}
        for part in self._parts:
            kept = {"anchor": part.anchor, "outer_momentum": part.momentum, "mean": part.bucket}
            for what, bucket in kept.items():
                if bucket is not None and (what != "mean" or self.due is not None):
                    found |= {f"{what}/{name}": view for name, view in bucket.tensors.items()}
        return found

    def load_shared_state(self, saved: Mapping[str, Tensor], due: int | None) -> None:
        """Takes back what :meth:`shared_state` gave, of any cut into fragments.

        Args:
            saved: Where it has no anchor, the copies are taken for it.
            due: When a merge under way would be applied; where it was not saved whole, it is dropped, which loses
                nothing: the anchor has not moved, so the next merge's difference holds it.
        """
        self.adopt()
        self.reset()
        whole = due is not None and all(f"mean/{name}" in saved for name in self.names)
        self.due = due if whole else None
        for part in self._parts:
            for what, bucket in {"anchor": part.anchor, "outer_momentum": part.momentum, "mean": part.bucket}.items():
                for name, view in bucket.tensors.items() if bucket is not None else ():
                    if f"{what}/{name}" in saved:
                        view.copy_(saved[f"{what}/{name}"])


def _parts(tensors: Mapping[str, Tensor]) -> list[list[tuple[str, nn.Parameter]]]:
    """Named tensors, in parts for a bucket each; buffers and moments are laid out like parameters."""
    named = [(name, nn.Parameter(tensor.detach(), requires_grad=False)) for name, tensor in tensors.items()]
    return split_into_buckets(named, _BUCKET, _BUCKET)


def weighted_mean(tensors: Mapping[str, Tensor], weight: float, communicator: Communicator) -> dict[str, Tensor]:
    """The weighted mean of named tensors over a group, in memory of its own.

    Args:
        tensors: The same names, shapes and dtypes on all ranks.
        weight: This rank's; those of the group add up to 1.
        communicator: The group.
    """
    found: dict[str, Tensor] = {}
    for part in _parts(tensors):
        bucket = make_bucket(part, NoCompression(CompressionConfig("none")))
        for name, view in bucket.tensors.items():
            torch.mul(tensors[name], weight, out=view)
        communicator.all_reduce(bucket.flat)
        found |= bucket.tensors
    return found
