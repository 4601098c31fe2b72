"""``quantize=int8`` of ``distrain export``: a program in int8, checked on the whole test split beside float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrain.cli.evaluate import spread_evenly
from distrain.cli.run_folder import RunFolder
from distrain.data.base import Split, Splits
from distrain.data.batch import Targets
from distrain.data.loader import Loader
from distrain.tasks.base import Task
from distrain.tools.exporting import costs, program_files, quantized
from distrain.tools.exporting.costs import Cost
from distrain.tools.exporting.program import OUTSIDE, Program

#: Images in a call, but for those that are timed.
_BATCH = 64
_FP32, _INT8 = "fp32", "int8"


@dataclass(frozen=True)
class Int8Program:
    """What is known of a program in int8.

    Attributes:
        table: What it costs beside the one in float32, as cells with a heading.
        samples: Number of test samples on which that was measured.
        threads: Threads of the CPU that the calls may use.
    """

    table: list[list[str]]
    samples: int
    threads: int

    def lines(self) -> list[str]:
        """For the terminal."""
        return [f"{self._measured()}:", *costs.as_text(self.table)]

    def section(self, file: str) -> str:
        """For a model card.

        Args:
            file: Name of the file in int8.
        """
        return (
            f"## Int8\n\n`{file}` is this model for ONNX Runtime; its convolutions and linear layers compute in int8. "
            f"Beside the same program in float32, {self._measured()}:\n\n{costs.as_markdown(self.table)}\n"
        )

    def _measured(self) -> str:
        return f"on {self.samples:,} test images, calls on {self.threads} CPU thread{'s' if self.threads > 1 else ''}"


class Int8Maker:
    """Makes a program in int8 of one in float32, and compares the two.

    Args:
        folder: The run.
        program: Says how both take images.
        task: What the model was trained to do.
        splits: The run's data.
    """

    def __init__(self, folder: RunFolder, program: Program, task: Task, splits: Splits) -> None:
        self._folder, self._program, self._task, self._splits = folder, program, task, splits

    def write(self, plain: Path, images: int, description: Mapping[str, Any], path: Path) -> None:
        """Writes the program in int8.

        Args:
            plain: The program in float32 as an ONNX file.
            images: Training images, spread evenly, on which the ranges of numbers are measured.
            description: What both files say of themselves.
            path: The new file.

        Raises:
            ConfigError: The program can't be quantised.
        """
        train = self._splits.train
        calibration = (inputs for inputs, _ in self._batches(train.subset(spread_evenly(images, len(train)))))
        quantized.write_int8(plain, calibration, program_files.as_text({**description, "quantized": _INT8}), path)

    def compare(self, plain: Path, path: Path, max_drop: float) -> Int8Program:
        """Measures score, size and speed of both files.

        Args:
            plain: The program in float32.
            path: The program in int8.
            max_drop: As in ``distrain export``.

        Raises:
            ConfigError: The program in int8 is worse than that.
        """
        runtime, test = program_files.onnx_runtime(), self._splits.test
        files = {_FP32: plain, _INT8: path}
        runners = {name: program_files.onnx_runner(file, runtime) for name, file in files.items()}
        scores = {name: costs.score(self._task, runner, self._batches(test)) for name, runner in runners.items()}
        times = costs.latencies(runners, next(self._batches(test))[0])
        before, after = (Cost(name, scores[name], file.stat().st_size, times[name]) for name, file in files.items())
        costs.check_drop(self._task, before, after, max_drop)
        return Int8Program(costs.rows(self._task.score, [before, after]), len(test), torch.get_num_threads())

    def _batches(self, split: Split) -> Iterator[tuple[Tensor, Targets]]:
        """Images as the programs take them, cut and sized as in an evaluation, and their targets."""
        folder, dtype = self._folder, self._program.input_dtype
        outside, channels = self._program.preprocess == OUTSIDE, folder.spec.channels
        loader = Loader(
            split,
            batch_size=_BATCH,
            shard=(0, 1),
            # A program that normalises by itself gets the numbers as they are stored.
            mean=folder.mean if outside else [0.0] * channels,
            std=folder.std if outside else [1 / split.one] * channels,
            device=torch.device("cpu"),
            dtype=torch.float32,
            memory_format=torch.contiguous_format,
            spec=folder.spec,
            shown=folder.config.data.eval_crop,
        )
        for batch in loader.epoch(0):
            yield (batch.inputs if dtype == torch.float32 else batch.inputs.round().to(dtype)), batch.targets
