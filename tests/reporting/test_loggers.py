"""What was logged can be read back from JSON lines, TensorBoard's events and lists."""

from __future__ import annotations

import csv
import errno
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.plugins.hparams import plugin_data_pb2  # type: ignore[import-untyped]

from distrain.cli.arguments import place_loggers
from distrain.cli.hydra_entry import to_config_error
from distrain.config.groups import LoggerConfig
from distrain.config.schema import Config
from distrain.errors import ConfigError
from distrain.reporting import figures
from distrain.reporting.loggers.base import InMemoryLogger, Logger, Scalars
from distrain.reporting.loggers.csv import CsvLogger
from distrain.reporting.loggers.metrics_file import MetricsFile
from distrain.reporting.loggers.several import Loggers, build
from distrain.reporting.loggers.tensorboard import TensorBoardConfig, TensorBoardLogger
from distrain.tools.chaos.disk import SmallDisk
from tests.runs import CONF, SMALL, small


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_each_row_is_a_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    before = time.time()
    file.scalars(1, {"train/loss": 0.5, "train/accuracy": 1})
    # Each line is written immediately, so that the file can be followed during the run.
    assert len(rows(path)) == 1
    file.scalars(2, {"epoch/train_loss": 0.25}, kind="epoch")
    file.close()
    first, second = rows(path)
    assert before - 1 < first.pop("time") <= second.pop("time") < time.time() + 1
    assert first == {"kind": "step", "step": 1, "train/loss": 0.5, "train/accuracy": 1}
    assert second == {"kind": "epoch", "step": 2, "epoch/train_loss": 0.25}


def test_a_resumed_run_appends_to_the_file(tmp_path: Path) -> None:
    for step in (1, 2):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.scalars(step, {})
        file.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_nan_and_infinities_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.scalars(1, {"loss": math.nan, "norm": math.inf, "rate": -math.inf, "fine": 1e300})
    file.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert [row[name] for name in ("loss", "norm", "rate", "fine")] == [None, None, None, 1e300]


# --- metrics.csv -----------------------------------------------------------------------------------------------------


def test_a_table_has_each_row_once_after_a_resume_and_a_column_for_each_number(tmp_path: Path) -> None:
    file = CsvLogger(LoggerConfig("csv"), tmp_path)
    file.rewind(0, mid_epoch=False)
    file.scalars(1, {"loss": 0.5})
    file.scalars(2, {"loss": 0.25, "norm": math.nan})
    file.scalars(2, {"epoch/val_loss": 4.0}, kind="epoch")
    file.scalars(3, {"loss": 0.125, "norm": 2.0})
    file.close()
    path = tmp_path / "metrics.csv"
    # A row that was cut off when the machine went down.
    path.write_bytes(path.read_bytes() + b"step,4,17")
    resumed = CsvLogger(LoggerConfig("csv"), tmp_path)
    resumed.rewind(2, mid_epoch=True)
    resumed.scalars(2, {"epoch/val_loss": 4.5}, kind="epoch")
    resumed.scalars(3, {"loss": 0.0625, "a, new one": 1})
    resumed.close()
    with path.open(newline="") as text:
        rows = list(csv.DictReader(text))
    for row in rows:
        assert float(row.pop("time")) > 1e9
    assert [list(row.values()) for row in rows] == [
        ["step", "1", "0.5", "", "", ""],
        ["step", "2", "0.25", "nan", "", ""],
        ["epoch", "2", "", "", "4.5", ""],
        ["step", "3", "0.0625", "", "", "1"],
    ]
    assert list(rows[0]) == ["kind", "step", "loss", "norm", "epoch/val_loss", "a, new one"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]


# --- TensorBoard -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    folder = tmp_path_factory.mktemp("run")
    logger = TensorBoardLogger(TensorBoardConfig(name="tensorboard", flush_seconds=10), folder)
    for step in (10, 20):
        logger.scalars(step, {"train/loss": 1 / step, "time/compute": 0.75})
    logger.scalars(20, {"epoch/val_accuracy": 0.5}, kind="epoch")
    logger.figure(20, "test/confusion_matrix", figures.confusion_matrix(torch.eye(2, dtype=torch.int64), ("a", "b")))
    parameters = {"optimizer.lr": 0.1, "seed": 3, "fused": True, "run_dir": None, "betas": [0.9, 0.999]}
    logger.hyperparameters(parameters, {"final/test_accuracy": 0.875})
    logger.close()
    assert [path.name for path in folder.iterdir()] == ["tensorboard"]
    (file,) = (folder / "tensorboard").iterdir()
    read = EventAccumulator(str(file))
    read.Reload()
    return read


def test_tensorboard_gets_each_curve(events: EventAccumulator) -> None:
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert points == {
        "train/loss": [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))],
        "time/compute": [(10, 0.75), (20, 0.75)],
        "epoch/val_accuracy": [(20, 0.5)],
        "final/test_accuracy": [(0, 0.875)],
    }


def test_tensorboard_gets_the_figures(events: EventAccumulator) -> None:
    assert events.Tags()["images"] == ["test/confusion_matrix"]
    (image,) = events.Images("test/confusion_matrix")
    assert image.step == 20
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert min(image.width, image.height) > 100


def test_tensorboard_gets_hyperparameters_with_final_metrics(events: EventAccumulator) -> None:
    plugins = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
        for tag, metadata in events.summary_metadata.items()
        if metadata.plugin_data.plugin_name == "hparams"
    }
    assert sorted(plugins) == ["_hparams_/experiment", "_hparams_/session_end_info", "_hparams_/session_start_info"]
    values = plugins["_hparams_/session_start_info"].session_start_info.hparams
    assert values["optimizer.lr"].number_value == 0.1
    assert values["seed"].number_value == 3
    assert values["fused"].number_value == 1
    assert values["run_dir"].string_value == "None"
    assert values["betas"].string_value == "[0.9, 0.999]"
    (metric,) = plugins["_hparams_/experiment"].experiment.metric_infos
    assert metric.name.tag == "final/test_accuracy"


# --- the others ------------------------------------------------------------------------------------------------------


def test_the_in_memory_logger_stores_everything() -> None:
    logger = InMemoryLogger()
    logger.scalars(1, {"loss": 2.0})
    logger.scalars(2, {"loss": 1.0}, kind="epoch")
    logger.figure(2, "grid", figures.confusion_matrix(torch.eye(2, dtype=torch.int64), ("a", "b")))
    logger.hyperparameters({"lr": 1}, {"accuracy": 0.5})
    logger.close()
    assert logger.rows == [{"kind": "step", "step": 1, "loss": 2.0}, {"kind": "epoch", "step": 2, "loss": 1.0}]
    assert logger.figures == [(2, "grid")]
    assert logger.final == {"accuracy": 0.5}


def test_several_loggers_get_the_same_calls() -> None:
    in_memory = [InMemoryLogger(), InMemoryLogger()]
    combined = Loggers(in_memory)
    combined.scalars(1, {"loss": 2.0}, kind="epoch")
    combined.figure(2, "grid", figures.confusion_matrix(torch.eye(2, dtype=torch.int64), ("a", "b")))
    combined.hyperparameters({}, {"accuracy": 0.5})
    combined.close()
    for logger in in_memory:
        assert logger.rows == [{"kind": "epoch", "step": 1, "loss": 2.0}]
        assert logger.figures == [(2, "grid")]
        assert logger.final == {"accuracy": 0.5}


class FullDisk(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.free = False

    def scalars(self, step: int, values: Scalars, *, kind: str = "step") -> None:
        if not self.free:
            raise OSError(errno.ENOSPC, "No space left on device")

    def hyperparameters(self, parameters: Mapping[str, Any], metrics: Scalars) -> None:
        self.scalars(0, metrics)

    def close(self) -> None:
        self.scalars(0, {})


def test_a_failing_logger_is_reported_once_and_the_run_continues(caplog: pytest.LogCaptureFixture) -> None:
    full, working = FullDisk(), InMemoryLogger()
    combined = Loggers([full, working])
    for full.free in (False, False, True, False):
        combined.scalars(1, {"loss": 0.5})
    message = "METRICS NOT WRITTEN: FullDisk can't write ([Errno 28] No space left on device). The run goes on"
    assert caplog.messages == [message, message], "one message each time that it starts to fail"
    assert len(working.rows) == 4
    combined.hyperparameters({}, {"accuracy": 0.5})
    combined.close()
    assert working.final == {"accuracy": 0.5}, "the end of a run is handled like any other call"
    assert caplog.messages == [message, message]


def test_buffered_rows_are_written_when_a_full_disk_has_space_again(tmp_path: Path) -> None:
    try:
        disk = SmallDisk(tmp_path / "disk", 1 << 20)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        combined = Loggers([MetricsFile(tmp_path / "disk" / "metrics.jsonl")])
        combined.scalars(1, {"loss": 0.5})
        disk.fill([])
        for step in range(2, 30):
            combined.scalars(step, {"loss": 0.5})
        disk.clear()
        combined.scalars(30, {"loss": 0.5})
        combined.close()
        assert [row["step"] for row in rows(tmp_path / "disk" / "metrics.jsonl")] == list(range(1, 31))
    finally:
        disk.remove(keep=False)


def test_figures_are_accepted_if_one_of_several_loggers_accepts_them(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert not Loggers([file, Logger()]).accepts_figures
    assert Loggers([file, InMemoryLogger()]).accepts_figures
    file.close()


class OwnLogger(InMemoryLogger):
    """A logger of a user's."""

    def __init__(self, run_dir: Path, size: int) -> None:
        super().__init__()
        run_dir.joinpath("own.txt").write_text(f"{size}")


OWN = [f"logger._target_={__name__}.OwnLogger", "logger.kwargs.size=3"]


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["logger=none"], []),
        (["logger=tensorboard", "logger.flush_seconds=5"], ["tensorboard"]),
        (["logger=csv"], ["metrics.csv"]),
        (["logger=[csv]"], ["metrics.csv"]),
        (["logger=[]"], []),
        (["logger=[tensorboard, csv]", "logger.loggers.tensorboard.flush_seconds=5"], ["metrics.csv", "tensorboard"]),
        (["logger=custom", *OWN], ["own.txt"]),
    ],
)
def test_the_writing_rank_has_metrics_jsonl_and_the_configured_loggers(
    arguments: list[str], files: list[str], tmp_path: Path
) -> None:
    config = small(*arguments)
    config.logger.check()
    logger = build(config, tmp_path)
    logger.scalars(1, {"loss": 1.0})
    logger.close()
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["metrics.jsonl", *files])
    assert logger.accepts_figures == bool({"tensorboard", "own.txt"} & {*files})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["logger=[tensorbord,csv]"], "logger=tensorbord: no such choice; .*did you mean tensorboard"),
        (["logger=[csv,several]"], "logger.loggers.several.name=several: can't be one of several"),
        (["logger=[csv,tensorboard]", "logger.loggers.csv.colour=red"], "logger.loggers.csv"),
        (["logger=custom", "logger._target_=torch.nn.Linear"], "is not a class of .*Logger"),
        (["logger=custom", *OWN, "logger.kwargs.colour=red"], "logger.kwargs=.*unexpected keyword argument 'colour'"),
    ],
)
def test_loggers_that_cannot_be_used_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config_of(arguments).logger.check()


def build_config_of(arguments: list[str]) -> Config:
    try:
        return small(*arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise to_config_error(error, CONF, "config", place_loggers([*SMALL, *arguments])) from error


def test_what_is_left_open_by_a_failure_is_closed_once_and_hides_no_error(tmp_path: Path) -> None:
    class Counting(InMemoryLogger):
        failed = 0

        def fail(self) -> None:
            self.failed += 1

    logger = Counting()
    combined = Loggers([logger])
    combined.fail()
    combined.fail()
    assert logger.failed == 1
    combined = Loggers([logger])
    combined.close()
    combined.fail()
    assert logger.failed == 1


def test_invalid_lines_are_removed_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = b'{"kind": "step", "step": 1}\n{"kind": "step", "step": 2}\n'
    file.write_bytes(rows + b"\x80\x04cos\nsystem\n" + b"[" * 50_000 + b"\n" + b'{"kind": "step", "st')
    logger = MetricsFile(file)
    logger.rewind(2, mid_epoch=False)
    logger.close()
    assert f"removed 4 lines from {file}" in caplog.text
    assert file.read_bytes() == rows
