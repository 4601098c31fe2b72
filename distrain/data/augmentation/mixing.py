"""Mixup and CutMix: mixes pairs of images of the global batch, and their targets.

A sample's partner is its neighbour in the order of the epoch, which is random. So a rank's share of the batch needs at
most a few more samples, those whose partners are its own, and a pair is mixed alike on any number of ranks. With
repeated augmentation, where copies of an image are neighbours, the partner lies one image further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distrain.config.augment import MixingConfig
from distrain.data.augmentation.draws import Draws, first_true, index_below, normal
from distrain.data.batch import Targets

#: Identify these draws among those of a pair.
_MIX, _BETA = 6, 7
#: Draws that are tried for a number of the gamma distribution; the chance that all are rejected is below 1e-10.
_ATTEMPTS = 8


def partners(start: int, size: int, places: Tensor, distance: int) -> Tensor:
    """The partners of some samples of a batch; a sample without one is its own.

    Args:
        start: Place of the batch's first sample in the order of the epoch.
        size: Samples of the batch, over all ranks.
        places: Places of the samples in that order, int64 [n].
        distance: Places between partners.

    Returns:
        Places in the order of the epoch, int64 [n].
    """
    offsets = places - start
    later = offsets % (2 * distance) < distance
    others = torch.where(later, offsets + distance, offsets - distance)
    return start + torch.where(others < size, others, offsets)


def with_partners(start: int, size: int, low: int, high: int, distance: int) -> tuple[int, int]:
    """The smallest range of places that begins at a pair and contains a range's samples and all their partners.

    Args:
        start: Place of the batch's first sample in the order of the epoch.
        size: Samples of the batch, over all ranks.
        low: First place of the range.
        high: The place after its last.
        distance: Places between partners.
    """
    block = 2 * distance
    first = start + (low - start) // block * block
    return first, min(start + -(-(high - start) // block) * block, start + size) if high > low else first


def drawn(config: MixingConfig, draws: Draws, height: int, width: int) -> Tensor:
    """Draws how pairs are mixed.

    Args:
        config: The keys.
        draws: Of the pairs.
        height: Rows of an image.
        width: Columns of an image.

    Returns:
        float64 [5, n]: the share of the sample itself; top, bottom, left and right of its partner's box, or -1 in all
        four for a pair that is not cut.
    """
    uniform = draws.uniform(_MIX, 4)
    if config.mixup_alpha > 0 and config.cutmix_alpha > 0:
        cut = uniform[0] < config.switch_probability
    else:
        cut = torch.full_like(uniform[0], config.cutmix_alpha, dtype=torch.bool)
    share = _beta(torch.where(cut, config.cutmix_alpha, config.mixup_alpha).double(), draws)
    # As in torchvision: the box is centred on any pixel, and cut off at the border.
    half = 0.5 * (1 - share).sqrt()
    sides = []
    for size, place in ((height, uniform[1]), (width, uniform[2])):
        middle, reach = index_below(size, place), (half * size).long()
        sides += [(middle - reach).clamp_min(0), (middle + reach).clamp_max(size)]
    top, bottom, left, right = sides
    share = torch.where(cut, 1 - ((bottom - top) * (right - left)).double() / (height * width), share)
    mixed = uniform[3] < config.probability
    box = [torch.where(cut & mixed, side, -1) for side in sides]
    return torch.stack([torch.where(mixed, share, 1.0), *box])


def _beta(alpha: Tensor, draws: Draws) -> Tensor:
    """Numbers of the distributions Beta(alpha, alpha), float64 [n]."""
    uniform = draws.uniform(_BETA, 2 * (3 * _ATTEMPTS + 1))
    first, second = (_log_gamma(alpha, part) for part in uniform.chunk(2))
    return torch.sigmoid(first - second)


def _log_gamma(alpha: Tensor, uniform: Tensor) -> Tensor:
    """Logarithms of numbers of the distributions Gamma(alpha), float64 [n] (Marsaglia and Tsang 2000)."""
    shape = alpha + 1 - 1 / 3
    candidates = normal(uniform[: 2 * _ATTEMPTS].view(2, _ATTEMPTS, -1))
    cubes = (1 + candidates / (9 * shape).sqrt()) ** 3
    logs = cubes.clamp_min(1e-300).log()
    bound = candidates.square() / 2 + shape * (1 - cubes + logs)
    allowed = (cubes > 0) & (torch.log1p(-uniform[2 * _ATTEMPTS : 3 * _ATTEMPTS]) < bound)
    accepted = logs.gather(0, first_true(allowed).unsqueeze(0))[0]
    # A number of Gamma(alpha) is one of Gamma(alpha + 1), times a uniform one to the power of 1 / alpha.
    return shape.log() + accepted + torch.log1p(-uniform[-1]) / alpha


def mix(images: Tensor, others: Tensor, drawn_pairs: Tensor) -> Tensor:
    """Mixes images with those of their partners.

    Args:
        images: Floating point [n, C, H, W]; changed in place.
        others: Those of the partners, in the same order; changed in place.
        drawn_pairs: Result of :func:`drawn` for each, on the CPU.

    Returns:
        The mixed images.
    """
    hidden = _boxes(drawn_pairs, *images.shape[2:])
    shares = drawn_pairs[0].float()
    if hidden is not None:
        shares = torch.where(_is_cut(drawn_pairs), 1.0, shares)
    if bool((shares < 1).any()):
        shares = shares.view(-1, 1, 1, 1).to(images.device, images.dtype)
        # The images of boxes are still needed as they are.
        part = others.mul_(1 - shares) if hidden is None else others * (1 - shares)
        images.mul_(shares).add_(part)
    if hidden is not None:
        torch.where(hidden.unsqueeze(1).to(images.device), others, images, out=images)
    return images


def _is_cut(drawn_pairs: Tensor) -> Tensor:
    """Which pairs have a box, bool [n]."""
    return drawn_pairs[1] >= 0


def _boxes(drawn_pairs: Tensor, height: int, width: int) -> Tensor | None:
    """The pixels that are the partners', bool [n, height, width] on the CPU; ``None`` if there are no boxes."""
    if not bool(_is_cut(drawn_pairs).any()):
        return None
    top, bottom, left, right = drawn_pairs[1:].long().unsqueeze(2)
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    hidden: Tensor = in_rows.unsqueeze(2) & in_columns.unsqueeze(1)
    return hidden


def mix_targets(kind: str, classes: int, targets: Targets, others: Targets, drawn_pairs: Tensor) -> Targets:
    """Targets of mixed images.

    Args:
        kind: ``class``, ``labels``, ``numbers`` or ``mask``.
        classes: Number of classes.
        targets: Of the images.
        others: Of their partners.
        drawn_pairs: As for :func:`mix`.

    Returns:
        The share of each class, float32 [n, classes]; or the mean of labels or numbers, weighted by the shares; or, for
        masks, that of the image whose pixel is shown.
    """
    if kind == "mask":
        hidden = _boxes(drawn_pairs, *targets.shape[1:])
        return targets if hidden is None else torch.where(hidden.to(targets.device), others, targets)
    share = drawn_pairs[0].float().to(targets.device).unsqueeze(1)
    if kind == "class":
        targets, others = (
            torch.zeros(len(each), classes, device=each.device).scatter_(1, each.unsqueeze(1), 1.0)
            for each in (targets, others)
        )
    return targets * share + others * (1 - share)
