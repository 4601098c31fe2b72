"""``logger=tensorboard``: event files, which TensorBoard shows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from distrain.config.groups import LoggerConfig
from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.reporting import event_files
from distrain.reporting.loggers.base import Scalars
from distrain.reporting.loggers.file_logger import FileLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distrain.reporting.event_writer import EventWriter

#: Prefixes of TensorBoard tags that are written only at the end of a run, and so are removed when it is resumed.
_END_OF_RUN_TAGS = ("final/", "_hparams_/")


@dataclass
class TensorBoardConfig(LoggerConfig):
    """Keys of ``logger=tensorboard``."""

    flush_seconds: int = setting(
        "Seconds between two writes of logged values; a checkpoint writes them too.", at_least=1
    )


@register("logger", "tensorboard", TensorBoardConfig)
class TensorBoardLogger(FileLogger):
    """Writes TensorBoard event files to ``run_dir/tensorboard``; only one rank may use it.

    Args:
        config: The logger's keys.
        run_dir: The run's folder.
    """

    accepts_figures = True

    def __init__(self, config: TensorBoardConfig, run_dir: Path) -> None:
        super().__init__(config)
        self._folder = run_dir / "tensorboard"
        self._flush_seconds = config.flush_seconds
        self._last_flush = -math.inf
        self._opened: EventWriter | None = None
        self._purge_step: int | None = None

    @property
    def _writer(self) -> EventWriter:
        if self._opened is None:
            # Imported only when there is something to write, since the import is slow.
            from distrain.reporting.event_writer import EventWriter

            # A running TensorBoard still has the removed events in memory; a purge step makes it discard them.
            self._opened = EventWriter(self._folder, self._purge_step, self.may_create)
        return self._opened

    @override
    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        self.close()
        # Set at the first start too: TensorBoard recognises a restart only from the second such event on.
        self._purge_step = step + 1 if step else 0
        super().rewind(step, mid_epoch=mid_epoch)

    @override
    def remove_after(self, step: int, *, mid_epoch: bool) -> None:
        # Events are removed from the files. The usual way, a purge step in a new file, leaves that to the reader, and
        # TensorBoard's fast loader goes by each curve's own steps.
        def is_valid(event_step: int, value: Any) -> bool:
            if value.tag.startswith(_END_OF_RUN_TAGS) or event_step > step:
                return False
            if event_step < step:
                return True
            # Other pictures than those of epochs are drawn at the end of a run.
            is_of_epoch = value.tag.partition("/")[0] == "epoch"
            return not mid_epoch if is_of_epoch else not value.HasField("image")

        event_files.remove_events(self._folder, is_valid)

    @override
    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if time.monotonic() - self._last_flush >= self._flush_seconds:
            self.flush()

    @override
    def figure(self, step: int, name: str, figure: Figure) -> None:
        self._writer.add_figure(name, figure, step)
        self.flush()

    @override
    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        # TensorBoard draws what is known of a histogram: its bins. It asks for moments too, and shows none of them.
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=0.0,
            sum_squares=0.0,
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    @override
    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        # SummaryWriter.add_hparams would put them into an event file of a separate folder.
        from torch.utils.tensorboard.summary import hparams

        flat = {
            name: value if isinstance(value, bool | int | float) else str(value) for name, value in parameters.items()
        }
        for summary in hparams(flat, dict(metrics)):
            self._writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, 0)
        self.flush()

    @override
    def flush(self) -> None:
        # Until this succeeds, every call tries again.
        self._last_flush = -math.inf
        super().flush()
        self._last_flush = time.monotonic()

    @override
    def write_values(self) -> None:
        if self._opened is not None:
            self._opened.flush()

    @override
    def close_files(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()
