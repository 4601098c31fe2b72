"""A service's record has every row once, whatever interrupted the run or the connection."""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distrain.errors import ConfigError
from distrain.reporting import figures
from distrain.reporting.loggers import remote
from distrain.reporting.loggers.base import Scalars
from distrain.reporting.loggers.metrics_file import MetricsFile
from distrain.reporting.loggers.mlflow import MlflowConfig, MlflowLogger
from distrain.reporting.loggers.remote import RemoteConfig, RemoteLogger, Row, Service
from distrain.reporting.loggers.several import Loggers
from distrain.reporting.loggers.wandb import WandbConfig, WandbLogger


class Store(Service):
    """A service in memory, which can be out of reach."""

    def __init__(self, record: dict[str, list[tuple[int, float]]]) -> None:
        self.record, self.is_down, self.opened, self.ended = record, False, list[bool](), list[bool]()
        self.pictures: list[tuple[int, str]] = []

    def open(self, *, new: bool) -> Mapping[str, int]:
        self.reach()
        self.opened.append(new)
        return {name: points[-1][0] for name, points in self.record.items()}

    def reach(self) -> None:
        if self.is_down:
            raise ConnectionError("no route to the host\nwith details")

    def send(self, rows: Sequence[Row]) -> None:
        self.reach()
        for row in rows:
            for name, value in row.values.items():
                self.record.setdefault(name, []).append((row.step, value))

    def parameters(self, values: Mapping[str, Any]) -> None:
        if "refused" in values:
            raise ValueError("too long")

    def figure(self, step: int, name: str, png: bytes) -> None:
        assert png.startswith(b"\x89PNG")
        self.pictures.append((step, name))

    def final(self, step: int, metrics: Scalars) -> None:
        self.send([Row(step, 0.0, metrics)])

    def end(self, *, finished: bool) -> None:
        self.ended.append(finished)

    def is_refusal(self, error: Exception) -> bool:
        return isinstance(error, ValueError)


class StoreLogger(RemoteLogger):
    def __init__(self, run_dir: Path, store: Store, wait_seconds: float = 60) -> None:
        self.store = store
        super().__init__(RemoteConfig(name="store", wait_seconds=wait_seconds), run_dir)

    def make_service(self, config: Any, run_dir: Path) -> Service:
        return self.store


def log(logger: Loggers, steps: Sequence[int]) -> None:
    for step in steps:
        logger.scalars(step, {"train/loss": 1 / step, "train/bad": float("nan")})
        if step % 20 == 0:
            logger.scalars(step, {"epoch/val_loss": 2 / step}, kind="epoch")


def one_run(run_dir: Path, make: Callable[[], RemoteLogger]) -> None:
    """Logs 50 steps of 60; dies with a checkpoint of step 30; goes on from there to the end."""
    both = Loggers([MetricsFile(run_dir / MetricsFile.NAME), make()])
    both.rewind(0, mid_epoch=False)
    both.begin({"optimizer.lr": 0.1, "seed": 3})
    log(both, range(10, 60, 10))
    both.close()
    both = Loggers([MetricsFile(run_dir / MetricsFile.NAME), make()])
    both.rewind(30, mid_epoch=False)
    both.begin({"optimizer.lr": 0.2, "seed": 3})
    log(both, range(40, 70, 10))
    both.figure(60, "test/confusion_matrix", figures.confusion_matrix(torch.eye(2, dtype=torch.int64), ("a", "b")))
    both.histogram(60, "gradients/weight", [1, 2], [-1.0, 0.0, 1.0])
    both.hyperparameters({}, {"final/test_accuracy": 0.5})
    both.close()


LOSSES = [(step, 1 / step) for step in range(10, 70, 10)]
VALIDATED = [(step, 2 / step) for step in (20, 40, 60)]


def test_a_resumed_run_goes_on_in_the_same_record(tmp_path: Path) -> None:
    record: dict[str, list[tuple[int, float]]] = {}
    stores: list[Store] = []

    def make() -> RemoteLogger:
        stores.append(Store(record))
        return StoreLogger(tmp_path, stores[-1])

    one_run(tmp_path, make)
    assert record == {"train/loss": LOSSES, "epoch/val_loss": VALIDATED, "final/test_accuracy": [(60, 0.5)]}
    assert [store.opened for store in stores] == [[True], [False]]
    assert [store.ended for store in stores] == [[False], [True]]
    assert stores[1].pictures == [(60, "test/confusion_matrix")]


def test_what_a_service_out_of_reach_missed_is_sent_when_it_is_back_or_the_run_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    store = Store({})
    both = Loggers([MetricsFile(tmp_path / MetricsFile.NAME), StoreLogger(tmp_path, store)])
    both.rewind(0, mid_epoch=False)
    log(both, [10])
    store.is_down = True
    start = time.monotonic()
    log(both, [20, 30])
    assert time.monotonic() - start < 5, "training doesn't wait"
    while not caplog.messages:
        time.sleep(0.01)
    store.is_down = False
    both.close()
    assert store.record["train/loss"] == LOSSES[:3]
    problem = "METRICS NOT WRITTEN: StoreLogger can't send (ConnectionError: no route to the host). The run goes on"
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [message.startswith(problem) for message in errors] == [True]

    store.is_down = True
    both = Loggers([MetricsFile(tmp_path / MetricsFile.NAME), StoreLogger(tmp_path, store, wait_seconds=0.1)])
    both.rewind(30, mid_epoch=False)
    log(both, [40, 50])
    both.close()
    assert store.record["train/loss"] == LOSSES[:3]
    assert caplog.messages[-1].startswith("METRICS NOT WRITTEN: StoreLogger: not everything was sent")

    other = Store(store.record)
    both = Loggers([MetricsFile(tmp_path / MetricsFile.NAME), StoreLogger(tmp_path, other)])
    both.rewind(50, mid_epoch=False)
    both.begin({"refused": "x"})
    log(both, [60])
    both.close()
    assert "StoreLogger is refused by the service (ValueError: too long)" in caplog.messages[-1]
    assert other.record["train/loss"] == LOSSES, "and the call after one that is refused is made"


def test_mlflow_has_one_run_with_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    keys: dict[str, Any] = {"tracking_uri": uri, "experiment": "tests", "run_name": None, "wait_seconds": 60}
    run_dir = tmp_path / "runs" / "a"
    run_dir.mkdir(parents=True)
    one_run(run_dir, lambda: MlflowLogger(MlflowConfig(name="mlflow", **keys), run_dir))
    store = client(uri)
    (run,) = store.search_runs([store.get_experiment_by_name("tests").experiment_id])
    assert json.loads((run_dir / "mlflow.json").read_text()) == {"run_id": run.info.run_id}
    history = {
        name: [(metric.step, metric.value) for metric in store.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    assert history == {"train/loss": LOSSES, "epoch/val_loss": VALIDATED, "final/test_accuracy": [(60, 0.5)]}
    assert (run.info.run_name, run.info.status) == ("runs/a", "FINISHED")
    assert run.data.params == {"optimizer.lr": "0.1", "seed": "3"}
    assert run.data.tags["resumed.optimizer.lr"] == "0.2"
    assert [file.path for file in store.list_artifacts(run.info.run_id, "test/confusion_matrix")] == [
        "test/confusion_matrix/step_00000060.png"
    ]


def test_wandb_has_one_run_with_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    keys: dict[str, Any] = {"project": "tests", "entity": None, "run_name": None, "mode": "offline"}
    one_run(tmp_path, lambda: WandbLogger(WandbConfig(name="wandb", wait_seconds=120, **keys), tmp_path))
    note = json.loads((tmp_path / "wandb.json").read_text())
    parts = sorted((tmp_path / "wandb").glob(f"offline-run-*-{note['run_id']}/run-{note['run_id']}.wandb"))
    assert len(parts) == 2, "the command wandb sync puts the parts of one run together"
    rows = [row for part in parts for row in wandb_rows(part)]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == LOSSES
    assert [(row["step"], row["epoch/val_loss"]) for row in rows if "epoch/val_loss" in row] == VALIDATED
    for name in ("test/confusion_matrix", "gradients/weight"):
        assert any(key.startswith(name) for row in rows for key in row), name
    assert note["sent"]["train/loss"] == 60


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """What was logged into a file of W&B's, a log in LevelDB's format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, record, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        # A whole record, or the last part of one.
        if kind in (1, 4):
            found = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if found.WhichOneof("record_type") == "history":
                items = found.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MlflowConfig("mlflow", 1, None, "tests", None), "logger=mlflow: needs mlflow; run pip install"),
        (WandbConfig("wandb", 1, "tests", None, None, "offline"), "logger=wandb: needs wandb; run pip install"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_way_out(
    config: RemoteConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        config.check()
    if isinstance(config, MlflowConfig):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sqlalchemy" else name)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(ConfigError, match=r"tracking_uri=null: writes into a data base.* run pip install mlflow"):
            config.check()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
        config.check()
