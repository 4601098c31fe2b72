"""Which operations an image gets, and how strong: colour jitter, RandAugment, TrivialAugment and AutoAugment.

Ranges, numbers of steps and probabilities are torchvision's. A policy is drawn as layers, which are applied one after
the other: an operation and its magnitude for each sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distrain.config.augment import AutoAugmentConfig, ColorJitterConfig
from distrain.data.augmentation import autoaugment
from distrain.data.augmentation.draws import Draws, between, index_below
from distrain.data.augmentation.operations import Operation

#: Identify these draws among those of a sample.
_JITTER, _POLICY = 2, 3
#: Operations and magnitudes of some layers, int64 and float64 [layers, n].
Layers = tuple[Tensor, Tensor]

#: Steps of magnitude of RandAugment and TrivialAugment, and of AutoAugment.
_STEPS, _AUTO_STEPS = 31, 10
#: The widest translation of RandAugment and AutoAugment, as a share of a side.
_WIDEST_TRANSLATION = 150.0 / 331.0
#: Operations whose magnitude is negated with probability 1/2.
_SIGNED = frozenset(
    {
        Operation.SHEAR_X,
        Operation.SHEAR_Y,
        Operation.TRANSLATE_X,
        Operation.TRANSLATE_Y,
        Operation.ROTATE,
        Operation.BRIGHTNESS,
        Operation.COLOR,
        Operation.CONTRAST,
        Operation.SHARPNESS,
    }
)
#: The operations of RandAugment and TrivialAugment.
RANDOM_OPERATIONS = tuple(operation for operation in Operation if operation not in (Operation.INVERT, Operation.HUE))


def color_jitter(config: ColorJitterConfig, draws: Draws) -> Layers:
    """Brightness, contrast, saturation and hue by random amounts, for each sample in a random order of the four."""
    uniform = draws.uniform(_JITTER, 9)
    strengths = (config.brightness, config.contrast, config.saturation)
    changes = [between(-min(strength, 1.0), strength, uniform[row]) for row, strength in enumerate(strengths)]
    changes.append(between(-config.hue, config.hue, uniform[3]))
    kinds = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR, Operation.HUE)
    used = [
        kind if strength else Operation.IDENTITY for kind, strength in zip(kinds, (*strengths, config.hue), strict=True)
    ]
    order = uniform[4:8].argsort(dim=0)
    operations = torch.where(uniform[8] < config.probability, torch.tensor(used)[order], Operation.IDENTITY)
    return operations, torch.stack(changes).gather(0, order)


class Policy:
    """The policy that ``data.augment.auto_augment`` chooses, for images of one size.

    Args:
        config: The keys.
        height: Rows of an image.
        width: Columns of an image.
    """

    def __init__(self, config: AutoAugmentConfig, height: int, width: int) -> None:
        self._config = config
        translations = (height * _WIDEST_TRANSLATION, width * _WIDEST_TRANSLATION)
        if config.policy == "trivialaugment":
            self._magnitudes = _magnitudes(_STEPS, 0.99, (32.0, 32.0), 135.0, 0.99, 6)
        elif config.policy == "randaugment":
            self._magnitudes = _magnitudes(_STEPS, 0.3, translations, 30.0, 0.9, 4)
        else:
            self._magnitudes = _magnitudes(_AUTO_STEPS, 0.3, translations, 30.0, 0.9, 4)
            cifar10 = config.policy == "autoaugment_cifar10"
            self._pairs, self._probabilities = _parse(autoaugment.CIFAR10 if cifar10 else autoaugment.IMAGENET)
        self._signed = torch.tensor([operation in _SIGNED for operation in Operation])

    def layers(self, draws: Draws) -> Layers:
        """Draws operations and magnitudes."""
        if self._config.policy == "trivialaugment":
            uniform = draws.uniform(_POLICY, 3)
            operations = self._any_operation(uniform[:1])
            return operations, self._sized(operations, index_below(_STEPS, uniform[1:2]), uniform[2:])
        if self._config.policy == "randaugment":
            count = self._config.num_ops
            uniform = draws.uniform(_POLICY, 2 * count)
            operations = self._any_operation(uniform[:count])
            steps = torch.full_like(operations, self._config.magnitude)
            return operations, self._sized(operations, steps, uniform[count:])
        uniform = draws.uniform(_POLICY, 5)
        pairs = index_below(self._pairs.shape[2], uniform[0])
        operations, steps = self._pairs[:, :, pairs].unbind(0)
        operations = torch.where(uniform[1:3] < self._probabilities[:, pairs], operations, Operation.IDENTITY)
        return operations, self._sized(operations, steps, uniform[3:])

    def _any_operation(self, uniform: Tensor) -> Tensor:
        return torch.tensor(RANDOM_OPERATIONS)[index_below(len(RANDOM_OPERATIONS), uniform)]

    def _sized(self, operations: Tensor, steps: Tensor, uniform: Tensor) -> Tensor:
        """The magnitudes at some steps, negated for a half of those that have a sign."""
        values = self._magnitudes[operations, steps]
        return torch.where(self._signed[operations] & (uniform < 0.5), -values, values)


def _magnitudes(
    steps: int, shear: float, translations: Sequence[float], rotation: float, factor: float, lost_bits: int
) -> Tensor:
    """The magnitude of each operation at each step, float64 [operations, steps].

    Args:
        steps: Their number.
        shear: The largest shear.
        translations: The largest translations down and to the right, in pixels.
        rotation: The largest angle in degrees.
        factor: The largest change of brightness, colour, contrast and sharpness.
        lost_bits: The most bits that posterize drops.
    """
    down, right = translations
    largest: Mapping[Operation, float] = {
        Operation.SHEAR_X: shear,
        Operation.SHEAR_Y: shear,
        Operation.TRANSLATE_X: right,
        Operation.TRANSLATE_Y: down,
        Operation.ROTATE: rotation,
        Operation.BRIGHTNESS: factor,
        Operation.COLOR: factor,
        Operation.CONTRAST: factor,
        Operation.SHARPNESS: factor,
    }
    # In float32, as torchvision's.
    table = torch.stack([torch.linspace(0.0, largest.get(operation, 0.0), steps) for operation in Operation])
    table[Operation.POSTERIZE] = 8 - (torch.arange(steps) / ((steps - 1) / lost_bits)).round()
    table[Operation.SOLARIZE] = torch.linspace(255.0, 0.0, steps)
    return table.double()


def _parse(text: str) -> tuple[Tensor, Tensor]:
    """Operations and steps, int64 [2, 2, pairs], and probabilities, float64 [2, pairs], of a policy's text."""
    pairs = [[operation.split() for operation in line.split(", ")] for line in text.strip().splitlines()]
    layers = list(zip(*pairs, strict=True))
    operations = [[Operation[name.upper()] for name, _, _ in layer] for layer in layers]
    steps = [[0 if step == "-" else int(step) for _, _, step in layer] for layer in layers]
    probabilities = [[float(probability) for _, probability, _ in layer] for layer in layers]
    return torch.tensor([operations, steps]), torch.tensor(probabilities, dtype=torch.float64)
