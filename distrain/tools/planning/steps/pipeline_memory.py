"""The memory that a rank of a pipeline holds while it works through its actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from distrain.strategies.pipeline.executor import RECEIVES_AHEAD
from distrain.strategies.pipeline.schedule import Action
from distrain.tools.planning.workload import BlockProfile, at, peak_bytes

#: What is held of a microbatch: what a stage gets, saves and hands over, and their gradients.
_Kind = Literal["input", "saved", "output", "output gradient", "input gradient"]
#: Kind of the BatchNorm layers.
_BATCHNORM = "deferred"


class PipelineMemory:
    """Follows what a rank holds, from one action to the next.

    A stage's input and output are counted apart from what else it saves of a microbatch, since messages are held for
    longer: received ones from the start of the receive on, and sent ones until the step ends.

    Args:
        stages: The blocks of each stage.
        rank_of_stage: The pipeline rank of each stage.
        samples: Of a microbatch.
        rank: The rank.
        image_bytes: Size of the model's input of a sample.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[BlockProfile]],
        rank_of_stage: Sequence[int],
        samples: int,
        rank: int,
        image_bytes: float,
    ) -> None:
        self._stages, self._rank_of_stage, self._samples, self._rank = stages, rank_of_stage, samples, rank
        self._image_bytes = image_bytes
        own = [stage for stage, owner in enumerate(rank_of_stage) if owner == rank]
        self._saved = {stage: self._saved_bytes(stage) for stage in own}
        self._passing = {stage: self._passing_bytes(stage) for stage in own}
        #: Bytes by kind, stage and microbatch; and their sum.
        self._held: dict[tuple[_Kind, int, int], float] = {}
        self._sum = 0.0

    def peak_bytes(self, actions: Sequence[Action]) -> float:
        """Most bytes that are held during these actions, besides the images of the batch."""
        peak = 0.0
        for position, action in enumerate(actions):
            for next_action in actions[position : position + RECEIVES_AHEAD]:
                self._start_receive(next_action)
            _, stage, microbatch = action
            kinds: tuple[_Kind, ...] = ("saved", "output", "output gradient")
            counted_by_pass = sum(self._held.get((kind, stage, microbatch), 0.0) for kind in kinds)
            peak = max(peak, self._sum - counted_by_pass + self._passing[stage])
            self._end(action)
        return peak

    def _start_receive(self, action: Action) -> None:
        """Holds what an action receives, if it does."""
        kind, stage, microbatch = action
        if kind == "forward" and self._is_remote(stage - 1):
            self._hold("input", stage, microbatch, self._input_bytes(stage))
        elif kind in ("backward", "input") and self._is_remote(stage + 1):
            self._hold("output gradient", stage, microbatch, self._output_bytes(stage))

    def _end(self, action: Action) -> None:
        """Holds what an action leaves, and frees what it was the last one to need."""
        kind, stage, microbatch = action
        if kind == "forward":
            self._hold("saved", stage, microbatch, self._saved[stage])
            self._hold("output", stage, microbatch, self._output_bytes(stage))
            return
        if kind != "weight" and self._is_remote(stage - 1):
            self._hold("input gradient", stage, microbatch, self._input_bytes(stage))
        if kind != "input":
            self._free("input", stage, microbatch)
            self._free("saved", stage, microbatch)
            self._free("output gradient", stage, microbatch)
            if not self._is_remote(stage + 1):
                self._free("output", stage, microbatch)

    def _hold(self, kind: _Kind, stage: int, microbatch: int, size: float) -> None:
        # A receive may have been started before.
        if (kind, stage, microbatch) not in self._held:
            self._held[kind, stage, microbatch] = size
            self._sum += size

    def _free(self, kind: _Kind, stage: int, microbatch: int) -> None:
        self._sum -= self._held.pop((kind, stage, microbatch), 0.0)

    def _is_remote(self, stage: int) -> bool:
        """Whether there is such a stage, on another rank."""
        return 0 <= stage < len(self._stages) and self._rank_of_stage[stage] != self._rank

    # --- a microbatch in a stage --------------------------------------------------------------------------------------

    def _input_bytes(self, stage: int) -> float:
        return self._output_bytes(stage - 1) if stage else self._samples * self._image_bytes

    def _output_bytes(self, stage: int) -> float:
        """Bytes that a stage hands over to the next one."""
        is_last = stage == len(self._stages) - 1
        return 0.0 if is_last else self._samples * self._stages[stage][-1].output_bytes

    def _saved_bytes(self, stage: int) -> float:
        """Bytes that a stage keeps for its backward pass, without its input and its output."""
        last = self._stages[stage][-1]
        saved = self._samples * sum(block.memory_of(_BATCHNORM).saved for block in self._stages[stage])
        saved -= self._output_bytes(stage) if last.saves_output else 0.0
        return max(saved - self._saved_input_bytes(stage), 0.0)

    def _saved_input_bytes(self, stage: int) -> float:
        """Bytes of a stage's input that are among what its blocks save."""
        return self._input_bytes(stage) if self._stages[stage][0].saves_input else 0.0

    def _passing_bytes(self, stage: int) -> float:
        """Most bytes that a stage holds in one of its passes, without its input."""
        blocks, output = self._stages[stage], self._output_bytes(stage)
        if not output:
            return peak_bytes(blocks, self._samples, _BATCHNORM) - self._saved_input_bytes(stage)
        last = blocks[-1].memory_of(_BATCHNORM)
        at_end = self._samples * sum(block.memory_of(_BATCHNORM).saved for block in blocks)
        at_end += at(last.extra_at_end or last.extra, self._samples)
        if not blocks[-1].saves_output:
            at_end += output
        # The output and its gradient are held until the blocks before have done their backward passes, too.
        before = peak_bytes(blocks[:-1], self._samples, _BATCHNORM) + 2 * output
        return max(at_end, before) - self._saved_input_bytes(stage)
