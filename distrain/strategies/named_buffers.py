"""A model's buffers, found by name whenever they are used: a forward pass may replace one by a new tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from typing_extensions import override


class NamedBuffers(Mapping[str, Tensor]):
    """Some buffers of a model, by their names; a look-up returns the tensor that the module holds at that time.

    ``self.mean = 0.9 * self.mean + …`` makes a new tensor and leaves the old one behind, so no tensor may be kept.

    Args:
        model: The model.
        floating: Only those of a floating-point type.
        not_in: Types of modules whose buffers are left out.
    """

    def __init__(self, model: nn.Module, *, floating: bool = False, not_in: tuple[type[nn.Module], ...] = ()) -> None:
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            if isinstance(module, not_in):
                continue
            for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                # Each tensor once, as named_buffers() does.
                if id(buffer) in seen:
                    continue
                seen.add(id(buffer))
                if buffer.is_floating_point() or not floating:
                    self._owners[f"{prefix}.{key}" if prefix else key] = (module, key)

    @override
    def __getitem__(self, name: str) -> Tensor:
        module, key = self._owners[name]
        buffer: Tensor | None = getattr(module, key)
        if buffer is None:
            raise RuntimeError(f"the model's buffer {name} was a tensor, and a forward pass made it None")
        return buffer.detach()

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    @override
    def __len__(self) -> int:
        return len(self._owners)
