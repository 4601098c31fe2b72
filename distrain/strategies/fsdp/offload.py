"""Where a rank's part of what is sharded lies between uses: ``strategy.offload``.

Ren et al. 2021, "ZeRO-Offload" (arXiv 2101.06840), keeps it in the host's memory and updates it there; Rajbhandari et
al. 2021, "ZeRO-Infinity" (arXiv 2104.07857), keeps it on a disk.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.errors import ConfigError
from distrain.files import mapped_memory
from distrain.files.mapped_memory import MappedFile
from distrain.optim.optimizers import updates
from distrain.optim.uncompiled import without_compiler_hooks
from distrain.strategies.base import MakeOptimizer
from distrain.strategies.fsdp.options import FILE, FULL, HOST, FSDPConfig
from distrain.strategies.held_memory import expected_optimizer_bytes
from distrain.torch_internals import tensors_in

log = logging.getLogger(__name__)

#: Tensors of an optimizer's state for each parameter, at most; with more, the file grows when they are first there.
_MOST_STATES = 4
#: A rank's slices of the parameters of a block, by name.
BlockSlices = Mapping[str, nn.Parameter]


class Offload:
    """Leaves everything in the memory of the device, and says what another place needs.

    Attributes:
        goes_by_blocks: Whether the optimizer, and the loading of its state, go from block to block.
    """

    goes_by_blocks: ClassVar[bool] = False

    def new_part(self, size: int, like: Tensor) -> Tensor:
        """Memory for a rank's part of a block of which it keeps nothing else: zeros, ``[size]``.

        Args:
            size: Number of elements.
            like: Has the type and the device on which the block is gathered.
        """
        return like.new_zeros(size)

    def new_slice(self, part: Tensor, *, is_trained: bool) -> nn.Parameter:
        """What the optimizer updates in place of a slice of a parameter.

        Args:
            part: The slice, in the memory of the block's part.
            is_trained: Whether it needs a gradient.
        """
        return nn.Parameter(part, requires_grad=is_trained)

    def assign_gradient(self, piece: nn.Parameter, gradient: Tensor | None) -> None:
        """Gives what :meth:`new_slice` returned its gradient, which is a view of what the ranks reduce."""
        piece.grad = gradient

    def make_optimizer(self, make: MakeOptimizer, blocks: Sequence[BlockSlices]) -> torch.optim.Optimizer:
        """The optimizer of a rank's slices.

        Args:
            make: Makes an optimizer of slices.
            blocks: The slices of each block of which this rank has some.

        Raises:
            OSError: There is no room for its state.
        """
        return make([pair for block in blocks for pair in block.items()])

    def expected_bytes(self, make: MakeOptimizer, blocks: Sequence[BlockSlices]) -> int:
        """Bytes of the device's memory that the optimizer's state will take.

        Args:
            make: As for :meth:`make_optimizer`.
            blocks: Likewise.
        """
        return sum(expected_optimizer_bytes(make, block.items()) for block in blocks)

    def settle(self, optimizer: torch.optim.Optimizer, slices: BlockSlices) -> None:
        """Puts state that was read from a checkpoint where it lies between uses.

        Args:
            optimizer: What :meth:`make_optimizer` returned.
            slices: Those whose state was read.
        """

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor takes memory of the device while it is not used."""
        return True


class _OptimizerOfBlocks(torch.optim.Optimizer):
    """An optimizer for each block, so that one block after the other is updated.

    Args:
        optimizers: Those of the blocks.
        lent: Inside of its context a block's optimizer may take a step.

    Attributes:
        optimizers: As given.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        lent: Callable[[torch.optim.Optimizer], AbstractContextManager[None]],
    ) -> None:
        groups = [group for each in optimizers for group in each.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.optimizers, self._lent = optimizers, lent
        # The same dictionaries, so that whoever sets a learning rate sets it for the blocks.
        self.param_groups = groups
        self.state = cast(Any, _JoinedState(optimizers))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Raises:
            ValueError: A ``closure`` is given; it is not supported.
        """
        if closure is not None:
            raise ValueError("an optimizer of blocks takes no closure")
        updates.share(self.optimizers, updates.completed(self))
        for each in self.optimizers:
            with self._lent(each):
                each.step()


class _JoinedState(MutableMapping[Tensor, Any]):
    """The state of several optimizers, by parameter."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._states = [each.state for each in optimizers]
        self._state_of = {
            parameter: each.state for each in optimizers for group in each.param_groups for parameter in group["params"]
        }

    @override
    def __getitem__(self, parameter: Tensor) -> Any:
        return self._state_of[parameter][parameter]

    @override
    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._state_of[parameter][parameter] = value

    @override
    def __delitem__(self, parameter: Tensor) -> None:
        del self._state_of[parameter][parameter]

    @override
    def __contains__(self, parameter: object) -> bool:
        return any(parameter in state for state in self._states)

    @override
    def __iter__(self) -> Iterator[Tensor]:
        for state in self._states:
            yield from state

    @override
    def __len__(self) -> int:
        return sum(map(len, self._states))


class HostOffload(Offload):
    """Keeps parts in the host's memory, where they are also updated; gradients are copied there for the update.

    Args:
        keeps_parts: Whether a block's part is all that a rank keeps of it. Else the device has whole parameters, and
            the optimizer updates copies of this rank's slices.
        copies: Whether the device has a memory of its own.
    """

    goes_by_blocks = True

    def __init__(self, *, keeps_parts: bool, copies: bool = True) -> None:
        self._keeps_parts, self._copies = keeps_parts, copies
        #: For each slice on the host the one on the device, where that is kept, and the gradient on the device.
        self._slices: dict[Tensor, Tensor] = {}
        self._gradients: dict[Tensor, Tensor] = {}

    @override
    def new_part(self, size: int, like: Tensor) -> Tensor:
        return _host_memory(size, like).zero_()

    @override
    def new_slice(self, part: Tensor, *, is_trained: bool) -> nn.Parameter:
        if self._keeps_parts or not self._copies:
            return super().new_slice(part, is_trained=is_trained)
        copy = nn.Parameter(_host_memory(part.numel(), part).copy_(part), requires_grad=is_trained)
        self._slices[copy] = part
        return copy

    @override
    def assign_gradient(self, piece: nn.Parameter, gradient: Tensor | None) -> None:
        self._gradients.pop(piece, None)
        if gradient is not None and self._copies:
            self._gradients[piece] = gradient
            gradient = _host_memory(gradient.numel(), gradient)
        super().assign_gradient(piece, gradient)

    @override
    def make_optimizer(self, make: MakeOptimizer, blocks: Sequence[BlockSlices]) -> torch.optim.Optimizer:
        # A rank may have no slice at all, and then an optimizer of nothing.
        optimizers = [make(block.items()) for block in blocks] or [make([])]
        return without_compiler_hooks(_OptimizerOfBlocks)(optimizers, self._lent)

    @override
    def expected_bytes(self, make: MakeOptimizer, blocks: Sequence[BlockSlices]) -> int:
        return 0

    @override
    def holds(self, tensor: Tensor) -> bool:
        return not self._copies or tensor.device.type != "cpu"

    @contextlib.contextmanager
    def _lent(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside of this context the optimizer of a block has all that it updates."""
        pieces = [piece for piece in _parameters(optimizer) if piece in self._gradients]
        for piece in pieces:
            assert piece.grad is not None
            _start_copy(piece.grad, self._gradients[piece])
            if piece in self._slices:
                # A checkpoint or an average may have been written to the device.
                _start_copy(piece, self._slices[piece])
        for piece in pieces[:1]:
            _wait_for_copies(self._gradients[piece])
        yield
        for piece in pieces:
            if piece in self._slices:
                _start_copy(self._slices[piece], piece)


def _host_memory(size: int, like: Tensor) -> Tensor:
    """Memory of the host, ``[size]``, that a GPU reads and writes by itself."""
    return torch.empty(size, dtype=like.dtype, pin_memory=like.is_cuda)


def _start_copy(to: Tensor, source: Tensor) -> None:
    # torch says of CUDA alone when such a copy is complete.
    to.copy_(source, non_blocking=to.is_cuda or source.is_cuda)


def _wait_for_copies(source: Tensor) -> None:
    """Waits until what was copied from the GPU of a tensor is there."""
    if source.is_cuda:
        torch.cuda.current_stream(source.device).synchronize()


class FileOffload(HostOffload):
    """Keeps parts, and the optimizer's state, in a file that is mapped into the host's memory.

    Args:
        options: Name the folder of the file.
        copies: As for :class:`HostOffload`.

    Raises:
        OSError: No file can be made there.
    """

    def __init__(self, options: FSDPConfig, *, copies: bool) -> None:
        super().__init__(keeps_parts=options.shard == FULL, copies=copies)
        folder = options.folder_of_file
        self._file = MappedFile(folder)
        if mapped_memory.is_in_memory(folder):
            log.warning("%s is in memory, so that strategy.offload saves none: let offload_folder name a disk", folder)
        #: Where each tensor of the optimizer's state is in the file, by parameter and name.
        self._places: dict[tuple[Tensor, str], Tensor] = {}

    @override
    def new_part(self, size: int, like: Tensor) -> Tensor:
        (part,) = self._file.allocate([size], [like.dtype])
        return part

    @override
    def make_optimizer(self, make: MakeOptimizer, blocks: Sequence[BlockSlices]) -> torch.optim.Optimizer:
        self._file.reserve(sum(_room_for_state(make, block) for block in blocks))
        return super().make_optimizer(make, blocks)

    @override
    def expected_bytes(self, make: MakeOptimizer, blocks: Sequence[BlockSlices]) -> int:
        return max((expected_optimizer_bytes(make, block.items()) for block in blocks), default=0)

    @override
    def settle(self, optimizer: torch.optim.Optimizer, slices: BlockSlices) -> None:
        self._move_state(optimizer, slices.values())

    @override
    def holds(self, tensor: Tensor) -> bool:
        return super().holds(tensor) and not mapped_memory.is_mapped(tensor)

    @contextlib.contextmanager
    @override
    def _lent(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        with super()._lent(optimizer):
            yield
        self._move_state(optimizer, _parameters(optimizer))

    def _move_state(self, optimizer: torch.optim.Optimizer, slices: Iterable[Tensor]) -> None:
        """Moves a block's state into the file where it is not there yet, and lets the block's memory go."""
        states = {piece: optimizer.state[piece] for piece in slices if piece in optimizer.state}
        new: list[tuple[Tensor, str, Tensor]] = []
        for parameter, entries in states.items():
            for name, value in entries.items():
                # Single numbers, such as a count of steps, stay where they are.
                if not isinstance(value, Tensor) or not value.dim():
                    continue
                place = self._places.get((parameter, name))
                if place is None:
                    new.append((parameter, name, value))
                elif place is not value:
                    entries[name] = place.copy_(value)
        if new:
            places = self._file.allocate([value.numel() for *_, value in new], [value.dtype for *_, value in new])
            for (parameter, name, value), place in zip(new, places, strict=True):
                states[parameter][name] = self._places[parameter, name] = place.view(value.shape).copy_(value)
        for tensor in (*slices, *tensors_in([*states.values()])):
            mapped_memory.release(tensor)


def choose(options: FSDPConfig, device: torch.device) -> Offload:
    """What ``strategy.offload`` names.

    Args:
        options: The strategy's keys.
        device: On which the model is computed.

    Raises:
        OSError: No file can be made.
    """
    if options.offload == HOST:
        return HostOffload(keeps_parts=options.shard == FULL)
    if options.offload == FILE:
        return FileOffload(options, copies=device.type != "cpu")
    return Offload()


@contextlib.contextmanager
def room(options: FSDPConfig) -> Iterator[None]:
    """Inside this block files may be made and enlarged.

    Args:
        options: The strategy's keys.

    Raises:
        ConfigError: That is not possible.
    """
    try:
        yield
    except OSError as error:
        if options.offload != FILE:
            raise
        problem = f"{error.filename}: {error.strerror}"
        raise ConfigError("strategy.offload_folder", options.offload_folder, problem) from error


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _room_for_state(make: MakeOptimizer, block: BlockSlices) -> int:
    """Bytes of a file that the optimizer's state of a block takes, or a little more."""
    each = mapped_memory.bytes_in_map(1)
    return expected_optimizer_bytes(make, block.items()) + _MOST_STATES * len(block) * each + mmap.ALLOCATIONGRANULARITY
