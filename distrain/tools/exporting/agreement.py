"""Whether an exported program gives what the run's own model gives, image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.errors import ConfigError, first_line
from distrain.tools.exporting.program_files import Runner

#: Largest difference that rounding explains: of a probability, or of outputs as a share of the largest one.
TOLERANCE = 1e-4
#: Images per call of the program; the first call has one image.
_BATCH = 64


@dataclass
class Agreement:
    """What a comparison found.

    Attributes:
        images: How many were compared.
        largest: Largest difference of an output, as a share of :attr:`scale`.
        scale: Largest output of the run's model, or 1 if that is larger.
        decided: Name of the output that holds whole numbers, such as the class of each image or pixel; empty: there is
            none.
        decisions: How many of them were compared.
        equal: How many of them are equal.
    """

    images: int = 0
    largest: float = 0.0
    scale: float = 1.0
    decided: str = ""
    decisions: int = 0
    equal: int = 0

    def add(self, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """Counts a batch.

        Raises:
            ValueError: The results have other names, types or shapes.
        """
        for name, reference in expected.items():
            other = found.get(name)
            if other is None or other.dtype != reference.dtype or other.shape != reference.shape:
                have = "is missing" if other is None else f"is {other.dtype} {list(other.shape)}"
                raise ValueError(f"{name} {have}, and the run's model gives {reference.dtype} {list(reference.shape)}")
            if reference.is_floating_point():
                self.scale = max(self.scale, float(reference.abs().max()))
                difference = (other.double() - reference.double()).abs().max()
                # NaN, which no comparison calls larger, is a difference.
                self.largest = max(self.largest, float(difference.nan_to_num(torch.inf)))
            else:
                self.decided = name
                self.decisions += reference.numel()
                self.equal += int((other == reference).sum())

    @property
    def holds(self) -> bool:
        """Whether all differences are rounding.

        Two classes whose probabilities are equal to rounding may then change places, in one pixel of a million, say.
        """
        return self.largest <= TOLERANCE * self.scale and self.equal >= self.decisions * (1 - TOLERANCE)

    def __str__(self) -> str:
        same = f"the same {self.decided} in {self.equal:,} of {self.decisions:,}, " if self.decided else ""
        return f"{same}largest difference of an output {self.largest:.1e}"


def compare(name: str, images: Tensor, reference: Callable[[Tensor], dict[str, Tensor]], program: Runner) -> Agreement:
    """Compares a program with the run's model.

    Args:
        name: The format, for messages.
        images: [N, …] as the reference takes them.
        reference: The run's own model, from images to results by name, on the CPU.
        program: The exported program behind what prepares the same images for it.

    Raises:
        ConfigError: They differ.
    """
    found = Agreement()
    for batch in (images[:1], *images[1:].split(_BATCH)):
        if len(batch):
            expected = reference(batch)
            try:
                found.add(expected, program(batch))
            except Exception as error:  # of the library that runs the program
                problem = f"the exported program fails for a batch of {len(batch)} ({first_line(error)})"
                raise ConfigError("format", name, f"{problem}; no file is left") from error
            found.images += len(batch)
    if not found.holds:
        problem = f"the exported program differs from the run's model on {found.images} images ({found})"
        raise ConfigError("format", name, f"{problem}; no file is left")
    return found
