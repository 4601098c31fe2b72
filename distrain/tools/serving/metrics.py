"""What is counted for Prometheus; several workers of one server add up."""

from __future__ import annotations

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

#: Variable with the folder that workers of one server share; the library's own name. It must be set before this module
#: is imported.
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST

#: Upper limits of the histograms: from a fast model on a fast card to the longest that a client waits.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one worker.

    Attributes:
        requests: Requests to ``/predict`` that were answered, by HTTP status.
        request_seconds: From the header of a request to its answer.
        images: Images that the model has answered for.
        batch_size: Images per batch.
        inference_seconds: Time of a batch in the model.
        waiting: Images that wait for the model.
        model_step: Number of updates of the model that answers.
        reloads: Attempts to load a newer model, by result.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "distrain_requests", "Answered requests to /predict.", ["status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "distrain_request_duration_seconds",
            "From the header of a request to its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.images = Counter("distrain_images", "Images that the model has answered for.", registry=self.registry)
        self.batch_size = Histogram("distrain_batch_size", "Images per batch.", buckets=_SIZES, registry=self.registry)
        self.inference_seconds = Histogram(
            "distrain_inference_duration_seconds",
            "Time of a batch in the model.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "distrain_queue_images",
            "Images that wait for the model.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.model_step = Gauge(
            "distrain_model_step",
            "Number of updates of the model that answers; of several workers, the newest.",
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.reloads = Counter(
            "distrain_model_reloads", "Attempts to load a newer model.", ["result"], registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format; of all workers, if there are several."""
        if SHARED_FOLDER not in os.environ:
            return generate_latest(self.registry)
        shared = CollectorRegistry()
        MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(shared)
