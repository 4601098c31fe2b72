"""Where a rank is in the mesh of all ranks, as messages and files say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def sizes_of(mesh: DeviceMesh | None) -> dict[str, int]:
    """Numbers of ranks along the dimensions of a mesh, from the outermost one on; empty for one rank."""
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)) if mesh is not None else {}


def place_in(sizes: Mapping[str, int], rank: int) -> dict[str, int]:
    """A rank's number along each dimension with several ranks.

    Args:
        sizes: Of the dimensions, from :func:`sizes_of`.
        rank: Its number among all ranks.

    Returns:
        Numbers by dimension; empty if there are not two such dimensions, where the rank's own number says it all.
    """
    place = {}
    for name in reversed([*sizes]):
        rank, place[name] = divmod(rank, sizes[name])
    several = _with_several(sizes)
    return {name: place[name] for name in several} if len(several) > 1 else {}


def place_in_words(place: Mapping[str, int]) -> str:
    """A place from :func:`place_in` in words: ``data 1, tensor 0``."""
    return ", ".join(f"{name} {number}" for name, number in place.items())


def sizes_in_words(sizes: Mapping[str, int]) -> str:
    """A mesh in words: ``data 2 × tensor 2``; empty if it has not two dimensions with several ranks."""
    several = _with_several(sizes)
    return " × ".join(f"{name} {size}" for name, size in several.items()) if len(several) > 1 else ""


def _with_several(sizes: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size > 1}
