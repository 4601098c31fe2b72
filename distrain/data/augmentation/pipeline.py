"""All augmentations of a run in their order: what is drawn for some samples, and what is done to their batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distrain.config.augment import AugmentConfig
from distrain.data.augmentation import erasing, mixing, operations, policies, resize
from distrain.data.augmentation.draws import Draws
from distrain.data.augmentation.shifts import Shifts
from distrain.data.augmentation.transforms import BatchTransform, batch_transform
from distrain.data.base import IGNORED, DataSpec
from distrain.data.batch import Batch, map_targets

#: Identifies the seeds of a user's transform among a sample's draws.
_SEED = 8
#: Samples for which numbers are drawn at once; drawing them for each batch would take longer.
_DRAWN_TOGETHER = 1024


@dataclass(frozen=True)
class Span:
    """A rank's share of a global batch, as places in the order of the epoch.

    Attributes:
        start: The batch's first sample.
        size: Samples of the batch.
        low: First sample of the share.
        high: The place after its last.
        first: First sample that is gathered; pairs that are mixed begin here.
        last: The place after the last sample that is gathered.
    """

    start: int
    size: int
    low: int
    high: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """What was drawn for some samples, on the CPU; the last dimension of each tensor is the sample.

    Attributes:
        crops: Boxes of :func:`distrain.data.augmentation.resize.random_boxes`.
        operations: Operations of each layer; see :mod:`distrain.data.augmentation.policies`.
        magnitudes: Their magnitudes.
        erased: Boxes of :func:`distrain.data.augmentation.erasing.boxes`.
        seeds: 64 random bits for a user's transform.
        pairs: Result of :func:`distrain.data.augmentation.mixing.drawn` for the pair of each sample.
        partners: How many places after a sample its partner lies.
    """

    crops: Tensor | None = None
    operations: Tensor | None = None
    magnitudes: Tensor | None = None
    erased: Tensor | None = None
    seeds: Tensor | None = None
    pairs: Tensor | None = None
    partners: Tensor | None = None

    def part(self, low: int, high: int) -> Plan:
        """That of some of the samples."""
        tensors = {name: getattr(self, name) for name in (each.name for each in fields(self))}
        return Plan(**{name: None if each is None else each[..., low:high] for name, each in tensors.items()})


class Augmentation:
    """Augments batches.

    Args:
        config: Which augmentations, and how strong they are.
        spec: Size of the result, kind of the targets, and number of classes.
        stored: Rows and columns of the images that are given.
        shown: Share of their sides that is shown where no random part is cut out.
        seed: The run's seed.
    """

    def __init__(self, config: AugmentConfig, spec: DataSpec, stored: tuple[int, int], shown: float, seed: int) -> None:
        self._config, self._spec, self._stored, self._shown, self._seed = config, spec, stored, shown, seed
        self.shifts = Shifts(config, spec.height, spec.width, seed)
        has_policy = config.auto_augment.policy != "none"
        self._policy = policies.Policy(config.auto_augment, spec.height, spec.width) if has_policy else None
        self._erasing = erasing.Erasing(config.random_erasing.value)
        self._erases = config.random_erasing.probability > 0
        self._transform: BatchTransform | None = None
        if config.batch_transform._target_ is not None:
            self._transform = batch_transform(config.batch_transform, spec)

    @property
    def active(self) -> bool:
        """Whether any augmentation is configured."""
        crops = self._config.random_resized_crop.scale is not None
        drawn = crops or self._config.color_jitter.active or self._policy is not None or self._erases
        return self.shifts.active or drawn or self._transform is not None or self._config.mixing.active

    def span(self, start: int, size: int, low: int, high: int) -> Span:
        """What must be gathered for a rank's share of a batch; see :class:`Span`."""
        if not self._config.mixing.active:
            return Span(start, size, low, high, low, high)
        first, last = mixing.with_partners(start, size, low, high, self._config.repeats)
        return Span(start, size, low, high, first, last)

    def plans(self, epoch: int, counters: Tensor, spans: Sequence[Span]) -> list[Plan]:
        """Draws for some batches.

        Args:
            epoch: Counted from 0.
            counters: For each sample of the epoch, in its order, the number that its draws depend on.
            spans: This rank's shares.
        """
        places = torch.cat([torch.arange(span.first, span.last) for span in spans])
        draws = Draws(self._seed, epoch, counters[places])
        c = self._config
        crops = None
        if c.random_resized_crop.scale is not None:
            crops = resize.random_boxes(draws, *self._stored, c.random_resized_crop.scale, c.random_resized_crop.ratio)
        layers = []
        if c.color_jitter.active:
            layers.append(policies.color_jitter(c.color_jitter, draws))
        if self._policy is not None:
            layers.append(self._policy.layers(draws))
        drawn = Plan(
            crops=crops,
            operations=torch.cat([each for each, _ in layers]) if layers else None,
            magnitudes=torch.cat([each for _, each in layers]) if layers else None,
            erased=erasing.boxes(c.random_erasing, draws, *self._size) if self._erases else None,
            seeds=draws.bits(_SEED, 1)[0] if self._transform is not None else None,
            **(self._pairs(epoch, counters, spans, places) if c.mixing.active else {}),
        )
        ends = torch.tensor([span.last - span.first for span in spans]).cumsum(0).tolist()
        return [drawn.part(low, high) for low, high in zip([0, *ends], ends, strict=False)]

    @property
    def _size(self) -> tuple[int, int]:
        return self._spec.height, self._spec.width

    def _pairs(self, epoch: int, counters: Tensor, spans: Sequence[Span], places: Tensor) -> dict[str, Tensor]:
        """:attr:`Plan.pairs` and :attr:`Plan.partners` of the samples at some places."""
        c = self._config
        own = places.split([span.last - span.first for span in spans])
        others = torch.cat(
            [mixing.partners(span.start, span.size, each, c.repeats) for span, each in zip(spans, own, strict=True)]
        )
        if c.mixing.mode == "pair":
            pair_counters = counters[torch.minimum(places, others)]
            drawn = mixing.drawn(c.mixing, Draws(self._seed, epoch, pair_counters), *self._size)
        else:
            starts = torch.tensor([span.start for span in spans])
            lengths = torch.tensor([len(each) for each in own])
            drawn = mixing.drawn(c.mixing, Draws(self._seed, epoch, starts), *self._size)
            drawn = drawn.repeat_interleave(lengths, dim=1)
        # What is mixed with itself stays as it is.
        drawn[0] = torch.where(others == places, 1.0, drawn[0])
        drawn[1:] = torch.where(others == places, -1, drawn[1:])
        return {"pairs": drawn, "partners": others - places}

    def change_pixels(
        self, images: Tensor, shifts: Tensor, plan: Plan, masks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is done before normalisation.

        Args:
            images: [n, C, H, W] as they are stored.
            shifts: Draws of :attr:`shifts`.
            plan: What was drawn besides.
            masks: uint8 [n, H, W], if the targets are a class for each pixel.

        Returns:
            The images of the model's size, and their masks.
        """
        images = self._cut(images, shifts, plan, self._config.random_resized_crop.interpolation)
        images = self.shifts.flip_and_crop(images, shifts, flipped=plan.crops is not None)
        if masks is not None:
            masks = self._cut(masks.unsqueeze(1), shifts, plan, "nearest").squeeze(1)
            masks = self.shifts.move_masks(masks, shifts, flipped=plan.crops is not None)
        if plan.operations is not None and plan.magnitudes is not None:
            for operation, magnitude in zip(plan.operations, plan.magnitudes, strict=True):
                images = operations.apply(images, operation, magnitude)
                if masks is not None:
                    masks = operations.move_masks(masks, operation, magnitude, IGNORED)
        if self._transform is not None and plan.seeds is not None and len(images):
            images = self._transform(images, plan.seeds.to(images.device))
        return images, masks

    def _cut(self, images: Tensor, shifts: Tensor, plan: Plan, interpolation: str) -> Tensor:
        """The part of each image that is shown, of the model's size; a random part is mirrored at once if it is."""
        if plan.crops is not None:
            mirrored = self.shifts.mirrored(shifts)
            return resize.resize(images, plan.crops.to(images.device), *self._size, interpolation, mirrored)
        return resize.resize_centre(images, self._shown, *self._size, interpolation)

    def change_normalised(self, images: Tensor, shifts: Tensor, plan: Plan) -> Tensor:
        """Hides parts of normalised images, which are changed in place."""
        images = self.shifts.cutout_(images, shifts)
        return images if plan.erased is None else self._erasing.erase_(images, plan.erased)

    def mix(self, batch: Batch, span: Span, plan: Plan) -> None:
        """Mixes the images and targets of a batch with their partners', and leaves this rank's share."""
        if plan.pairs is None or plan.partners is None:
            return
        low, high = span.low - span.first, span.high - span.first
        pairs = plan.pairs[:, low:high]
        partners = torch.arange(low, high) + plan.partners[low:high]
        images = batch.inputs
        own, others = images[low:high], images.index_select(0, partners.to(images.device))
        batch.inputs = mixing.mix(own, others, pairs)
        targets = batch.targets
        kind, classes = self._spec.target, len(self._spec.classes)
        chosen = map_targets(lambda tensor: tensor.index_select(0, partners.to(tensor.device)), targets)
        batch.targets = mixing.mix_targets(kind, classes, targets[low:high], chosen, pairs)


def batches_together(batch: int) -> int:
    """For how many batches of a size numbers are drawn at once."""
    return math.ceil(_DRAWN_TOGETHER / max(batch, 1))
