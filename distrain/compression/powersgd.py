"""PowerSGD: each gradient matrix is sent as two thin factors, computed by one step of power iteration.

Vogels, Karimireddy and Jaggi 2019, "PowerSGD: Practical low-rank gradient compression for distributed optimization"
(arXiv 1905.13727), algorithms 1 and 2. Exchanging only one factor per step: Zhang et al. 2023, "Evaluation and
optimization of gradient compression for distributed deep learning" (arXiv 2306.08881).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain import rng
from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression.base import LossyConfig, MessageCompressor
from distrain.compression.bucket import Bucket
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.errors import ConfigError


@dataclass
class PowerSGDConfig(LossyConfig):
    """Keys of ``compression=powersgd``."""

    rank: int = setting("Rank of the approximation of each gradient matrix.", at_least=1)
    warm_start: bool = setting("Start from the last step's factor instead of a random one.")
    min_compression_rate: float = setting(
        "A tensor is sent uncompressed unless its factors are smaller by at least this factor.", at_least=0
    )
    start_step: int = setting("Number of steps at the start of the run that are sent uncompressed.", at_least=0)
    alternate: bool = setting("Send the two factors in alternate steps: one collective instead of two, half the bytes.")

    def __post_init__(self) -> None:
        """Refuses to send one factor per step without the other one of the step before.

        Raises:
            ConfigError: ``alternate`` without ``warm_start``.
        """
        if self.alternate and not self.warm_start:
            raise ConfigError(
                "compression.warm_start", self.warm_start, "must be true with compression.alternate=true", ("true",)
            )


@register("compression", "powersgd", PowerSGDConfig)
class PowerSGD(MessageCompressor):
    """Sends ``P Q`` for a gradient matrix ``M [rows, columns]``: ``P [rows, rank]`` and ``Q [rank, columns]``.

    A step computes ``P = M Qᵀ`` from the last step's ``Q``, sums ``P`` over the ranks and orthonormalises it, then
    computes ``Q = Pᵀ M`` and sums it. Each sum is one all-reduce for all matrices of a bucket. With ``alternate`` odd
    steps send ``P`` and even steps ``Q``; the other factor is the last step's, orthonormalised. That approximates the
    gradient of the current batch less well: after 400 steps of the CIFAR-10 CNN (means of three seeds) the training
    loss was 1.34 uncompressed, 1.36 with rank 4 in two phases, 1.45 alternating with the same bytes (rank 8) and 1.53
    alternating with half of them (rank 4). So ``alternate`` is for links where the number of collectives matters most.

    Every rank orthonormalises and multiplies the same sums itself. On equal processors the results are equal bit for
    bit; on processors of different kinds parameters may drift apart by rounding.
    """

    config: PowerSGDConfig
    phases = 2

    def __init__(self, config: PowerSGDConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.warmup_steps = config.start_step
        # The factor that each matrix's next step starts from, by `q/<name>` or `p/<name>`, equal on all ranks, and by
        # `own_q/<name>` for messages that this rank computes alone. Tensors are replaced, never changed in place.
        self._factors: dict[str, Tensor] = {}
        # Random columns, by size and dtype, that replace unusable ones before orthonormalisation.
        self._random_columns: dict[tuple[int, torch.dtype], Tensor] = {}

    @property
    def _in_warmup(self) -> bool:
        return max(self.step, 1) <= self.config.start_step

    @override
    def begin_step(self) -> None:
        super().begin_step()
        self.phases = 1 if self.config.alternate or self._in_warmup else 2

    @override
    def compresses(self, parameter: nn.Parameter) -> bool:
        if not super().compresses(parameter):
            return False
        rows, columns = parameter.shape[0], parameter.numel() // parameter.shape[0]
        rank = self._effective_rank(rows, columns)
        # A single factor of full rank would not send the matrix exactly.
        if self.config.alternate and rank == min(rows, columns):
            return False
        return rows * columns >= self.config.min_compression_rate * rank * (rows + columns)

    # --- all ranks together ------------------------------------------------------------------------------------------

    @override
    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        """Replaces the bucket's content by its sum over the group; the compressed part by the sum's approximation.

        A rank's residual is its own gradient minus the approximation by its own factors. Algorithm 2 instead subtracts
        the *mean* of the approximations from each rank's gradient. The sum of the residuals over the ranks, which is
        all that training depends on, is the same. But in algorithm 2 a rank's deviation from the mean is never sent and
        grows, and here the residual can be computed while the collective is running.
        """
        if self._in_warmup or bucket.uncompressed_numel == bucket.flat.numel():
            yield communicator.start_all_reduce(bucket.flat)
            return
        matrices = _matrices(self._add_residuals(bucket))
        exchange = self._exchange_one_factor if self.config.alternate else self._exchange_both_factors
        yield from exchange(bucket, matrices, communicator)

    def _exchange_both_factors(
        self, bucket: Bucket, matrices: Mapping[str, Tensor], communicator: Communicator
    ) -> Iterator[Pending]:
        message, lefts = self._new_message(bucket.uncompressed_part, matrices, left=True)
        for name, matrix in matrices.items():
            torch.mm(matrix, self._initial_factor("q", name, matrix).t(), out=lefts[name])
        yield communicator.start_all_reduce(message)

        bucket.uncompressed_part.copy_(message[: bucket.uncompressed_numel])
        bases = {name: self._orthonormal(left) for name, left in lefts.items()}
        message, rights = self._new_message(message[:0], matrices, left=False)
        for name, matrix in matrices.items():
            torch.mm(bases[name].t(), matrix, out=rights[name])
        total = message.clone()
        pending = communicator.start_all_reduce(total)
        self._subtract_sent(matrices, bases, rights)
        yield pending

        sums = _split(total, self._shapes(matrices, left=False))
        _write_products(bases, sums, bucket)
        for name, factor in sums.items():
            self._store_factor("q", name, factor)

    def _exchange_one_factor(
        self, bucket: Bucket, matrices: Mapping[str, Tensor], communicator: Communicator
    ) -> Iterator[Pending]:
        left = self.step % 2 == 1
        sent_kind, stored_kind = ("p", "q") if left else ("q", "p")
        message, own = self._new_message(bucket.uncompressed_part, matrices, left=left)
        bases = {}
        for name, matrix in matrices.items():
            stored = self._initial_factor(stored_kind, name, matrix)
            if left:
                bases[name] = self._orthonormal(stored.t()).t()
                torch.mm(matrix, bases[name].t(), out=own[name])
            else:
                bases[name] = self._orthonormal(stored)
                torch.mm(bases[name].t(), matrix, out=own[name])
        total = message.clone()
        pending = communicator.start_all_reduce(total)
        self._subtract_sent(matrices, *((own, bases) if left else (bases, own)))
        yield pending

        bucket.uncompressed_part.copy_(total[: bucket.uncompressed_numel])
        sums = _split(total[bucket.uncompressed_numel :], self._shapes(matrices, left=left))
        _write_products(*((sums, bases) if left else (bases, sums)), bucket)
        for name, factor in sums.items():
            self._factors.pop(f"{stored_kind}/{name}", None)
            self._store_factor(sent_kind, name, factor)

    def _subtract_sent(
        self, matrices: Mapping[str, Tensor], lefts: Mapping[str, Tensor], rights: Mapping[str, Tensor]
    ) -> None:
        """Subtracts what this rank sends from its residual; without error feedback there is none."""
        if self.residuals is not None:
            for name, matrix in matrices.items():
                matrix.addmm_(lefts[name], rights[name], alpha=-1)

    # --- one rank's own message --------------------------------------------------------------------------------------

    @override
    def compress(self, bucket: Bucket) -> list[Tensor]:
        if self._in_warmup:
            message = bucket.compressed_part.clone()
            bucket.compressed_part.zero_()
            return [message]
        matrices = _matrices(bucket)
        empty = bucket.flat[:0]
        all_lefts, lefts = self._new_message(empty, matrices, left=True)
        all_rights, rights = self._new_message(empty, matrices, left=False)
        for name, matrix in matrices.items():
            lefts[name].copy_(self._orthonormal(matrix @ self._initial_factor("own_q", name, matrix).t()))
            torch.mm(lefts[name].t(), matrix, out=rights[name])
            matrix.addmm_(lefts[name], rights[name], alpha=-1)
            self._store_factor("own_q", name, rights[name])
        return [all_lefts, all_rights]

    @override
    def message_layout(self, bucket: Bucket) -> list[tuple[torch.dtype, int]]:
        """All left factors, then all right factors; in uncompressed steps the gradients instead."""
        if self._in_warmup:
            return [(bucket.flat.dtype, bucket.compressed_part.numel())]
        matrices = _matrices(bucket)
        return [(bucket.flat.dtype, _numel(self._shapes(matrices, left=left))) for left in (True, False)]

    @override
    def add_decompressed(self, message: list[Tensor], bucket: Bucket) -> None:
        if self._in_warmup:
            bucket.compressed_part.add_(message[0])
            return
        matrices = _matrices(bucket)
        lefts = _split(message[0], self._shapes(matrices, left=True))
        rights = _split(message[1], self._shapes(matrices, left=False))
        for name, matrix in matrices.items():
            matrix.addmm_(lefts[name], rights[name])

    # --- factors -----------------------------------------------------------------------------------------------------

    def _effective_rank(self, rows: int, columns: int) -> int:
        return min(self.config.rank, rows, columns)

    def _shapes(self, matrices: Mapping[str, Tensor], *, left: bool) -> dict[str, tuple[int, int]]:
        """Shapes of the left factors ``[rows, rank]`` or the right factors ``[rank, columns]``, by name."""
        shapes = {}
        for name, matrix in matrices.items():
            rows, columns = matrix.shape
            rank = self._effective_rank(rows, columns)
            shapes[name] = (rows, rank) if left else (rank, columns)
        return shapes

    def _new_message(
        self, uncompressed: Tensor, matrices: Mapping[str, Tensor], *, left: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A message that starts with the uncompressed part, and views of its rest for all left or all right factors."""
        shapes = self._shapes(matrices, left=left)
        message = uncompressed.new_empty(uncompressed.numel() + _numel(shapes))
        message[: uncompressed.numel()] = uncompressed
        return message, _split(message[uncompressed.numel() :], shapes)

    def _initial_factor(self, kind: str, name: str, matrix: Tensor) -> Tensor:
        """The factor to start from: ``[rows, rank]`` for kind ``p``, else ``[rank, columns]``."""
        shape = self._shapes({name: matrix}, left=kind == "p")[name]
        stored = self._factors.get(f"{kind}/{name}") if self.config.warm_start else None
        # A factor loaded from a run with another rank has another shape.
        if stored is None or stored.shape != shape:
            return self._random_factor(shape, matrix, self.step, name)
        return stored.to(matrix)

    def _store_factor(self, kind: str, name: str, factor: Tensor) -> None:
        # Cloned to memory of its own, as it is after loading: the last bits of a product may depend on how its operands
        # are aligned in memory.
        self._factors[f"{kind}/{name}"] = factor.clone()

    def _random_factor(self, shape: tuple[int, int], like: Tensor, step: int = 0, name: str = "") -> Tensor:
        """Standard normal values that depend only on the seed, the step and the name."""
        name_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        generator = torch.Generator().manual_seed(rng.key(self.seed, step, name_key))
        return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)

    def _orthonormal(self, factor: Tensor) -> Tensor:
        """Orthonormal columns whose span contains the span of the columns of ``factor [size, rank]``.

        By Householder reflections, whose result is orthonormal for any input. If the gradient matrix has a lower rank
        than is sent, some columns are rounding errors, which the Gram-Schmidt process would not make orthogonal.
        """
        size, rank = factor.shape
        kind = (size, factor.dtype)
        if kind not in self._random_columns:
            self._random_columns[kind] = self._random_factor((size, self.config.rank), factor)
        largest = factor.abs().amax(0)
        # A zero column would stay zero in all later steps, and one that overflowed would stay non-finite.
        usable = (largest > 0) & (largest < torch.inf)
        basis: Tensor = torch.linalg.qr(torch.where(usable, factor, self._random_columns[kind][:, :rank])).Q
        return basis

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Tensor]:
        """Adds ``q/<parameter>`` ``[rank, columns]`` or, with ``alternate`` after odd steps, ``p/<parameter>``.

        ``own_q/<parameter>`` belongs to messages that this rank computed alone.
        """
        return super().state_dict() | self._factors

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned; a missing factor starts from random values."""
        super().load_state_dict(state)
        kinds = ("p/", "q/", "own_q/")
        self._factors = {key: tensor.clone() for key, tensor in state.items() if key.startswith(kinds)}


def _matrices(bucket: Bucket) -> dict[str, Tensor]:
    """The compressed tensors by name as views ``[first dimension, the rest]`` of their memory.

    In channels-last weights the columns are therefore permuted, which does not affect a low-rank approximation.
    """
    return {name: flat.view(bucket.tensors[name].shape[0], -1) for name, flat in bucket.compressed_tensors.items()}


def _numel(shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes.values())


def _split(flat: Tensor, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    parts = flat.split([rows * columns for rows, columns in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _write_products(lefts: Mapping[str, Tensor], rights: Mapping[str, Tensor], bucket: Bucket) -> None:
    """Overwrites a bucket's compressed part by the products of the factors."""
    for name, matrix in _matrices(bucket).items():
        torch.mm(lefts[name], rights[name], out=matrix)
