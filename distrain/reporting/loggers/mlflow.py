"""``logger=mlflow``: a run of an MLflow server, or of its local store."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from typing_extensions import override

from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.reporting.loggers.base import Scalars
from distrain.reporting.loggers.remote import Note, RemoteConfig, RemoteLogger, Row, Service

log = logging.getLogger(__name__)

#: Most numbers, and most parameters, of one request.
_MOST_METRICS, _MOST_PARAMETERS = 1000, 100
#: Longest value of a parameter that MLflow takes.
_LONGEST_VALUE = 500
#: What MLflow needs its whole package for: its server's data base, used without the server.
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass
class MlflowConfig(RemoteConfig):
    """Keys of ``logger=mlflow``."""

    tracking_uri: str | None = setting(
        "Address of the server, such as http://localhost:5000; null: that of MLFLOW_TRACKING_URI, or MLflow's own "
        "default, a data base in the current folder."
    )
    experiment: str = setting("Name of the experiment that the run is in; it is made if there is none.")
    run_name: str | None = setting("Name of the run; null: the last parts of run_dir.")

    @override
    def check(self) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError("logger", "mlflow", "needs mlflow; run pip install 'distrain[mlflow]'")
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        kind = (uri or "sqlite:").partition(":")[0].partition("+")[0]
        if kind in _DATABASES and importlib.util.find_spec("sqlalchemy") is None:
            problem = "writes into a data base, for which all of MLflow is needed; run pip install mlflow, or name a"
            raise ConfigError("logger.tracking_uri", self.tracking_uri, f"{problem} server: http://HOST:PORT")


@register("logger", "mlflow", MlflowConfig)
class MlflowLogger(RemoteLogger):
    """A run of MLflow: curves, parameters, final metrics, and figures as artifacts.

    The file ``mlflow.json`` of the run's folder says which run it is.
    """

    @override
    def make_service(self, config: MlflowConfig, run_dir: Path) -> Service:
        return MlflowService(config, run_dir, self.note("mlflow.json"), _make_client)


def _make_client(tracking_uri: str | None) -> Any:
    # Printed on standard output in the middle of the run's own lines, one of which names the run.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Imported in the thread, since it takes seconds.
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri)


class MlflowService(Service):
    """MLflow's client.

    Args:
        config: The logger's keys.
        run_dir: The run's folder.
        note: Says which run of MLflow it is.
        make_client: Makes MLflow's client for a ``tracking_uri``.
    """

    def __init__(
        self, config: MlflowConfig, run_dir: Path, note: Note, make_client: Callable[[str | None], Any]
    ) -> None:
        super().__init__(note)
        self._config, self._make_client = config, make_client
        self._run_name = config.run_name or "/".join(run_dir.resolve().parts[-2:])
        self._client: Any = None
        self._run_id = ""

    @override
    def open(self, *, new: bool) -> Mapping[str, int]:
        if self._client is None:
            self._client = self._make_client(self._config.tracking_uri)
        run = None if new else self._earlier_run()
        if run is None:
            run = self._client.create_run(self._experiment_id(), run_name=self._run_name)
            self.note.write({"run_id": run.info.run_id})
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._run_id = run.info.run_id
        log.info("MLflow: run %s of experiment %s", self._run_id, self._config.experiment)
        # The entity's other view of its metrics leaves out their steps.
        return {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}

    def _earlier_run(self) -> Any:
        run_id = self.note.read().get("run_id")
        if not isinstance(run_id, str):
            return None
        try:
            run = self._client.get_run(run_id)
        except Exception as error:  # its class is only known where MLflow is installed
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            log.warning("MLflow has no run %s any more: a new one gets what this run has logged", run_id)
            return None
        return run

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._config.experiment)
        return str(found.experiment_id if found else self._client.create_experiment(self._config.experiment))

    @override
    def send(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        metrics = (
            Metric(name, float(value), int(1000 * row.time), row.step)
            for row in rows
            for name, value in row.values.items()
        )
        for batch in _batches(metrics, _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=batch)

    @override
    def parameters(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        texts = {name: str(value)[:_LONGEST_VALUE] for name, value in values.items()}
        known = self._client.get_run(self._run_id).data.params
        # A parameter can't be changed; what a resumed run has changed becomes a tag.
        tags = [RunTag(f"resumed.{name}", text) for name, text in texts.items() if known.get(name, text) != text]
        added = (Param(name, text) for name, text in texts.items() if name not in known)
        for batch in _batches(added, _MOST_PARAMETERS):
            self._client.log_batch(self._run_id, params=batch)
        for batch in _batches(iter(tags), _MOST_PARAMETERS):
            self._client.log_batch(self._run_id, tags=batch)

    @override
    def figure(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        self._client.log_image(self._run_id, Image.open(io.BytesIO(png)), f"{name}/step_{step:08d}.png")

    @override
    def final(self, step: int, metrics: Scalars) -> None:
        self.send([Row(step, time.time(), metrics)])

    @override
    def end(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run_id, status="FINISHED" if finished else "KILLED")

    @override
    def is_refusal(self, error: Exception) -> bool:
        if not self._run_id:
            return False
        code = getattr(error, "get_http_status_code", lambda: 0)()
        return 400 <= code < 500 and code not in (401, 403, 404, 408, 429)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch
