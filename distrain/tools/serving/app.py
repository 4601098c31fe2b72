"""The HTTP interface: predictions, health, metrics, a description of the model, and a page for people."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

import distrain
from distrain.tools.serving import content
from distrain.tools.serving.answering import Answering, ServingOptions
from distrain.tools.serving.limits import Refused
from distrain.tools.serving.metrics import CONTENT_TYPE, Metrics
from distrain.tools.serving.model import CurrentModel

log = logging.getLogger(__name__)

#: Ranked answers that an image gets unless the request says another number, and the largest number it may say.
_TOP, _LARGEST_TOP = 5, 1000
#: The page's files: their address and type.
_PAGE = {
    "index.html": ("/", "text/html"),
    "page.js": ("/page.js", "text/javascript"),
    "page.css": ("/page.css", "text/css"),
    "favicon.svg": ("/favicon.svg", "image/svg+xml"),
}
#: The page loads nothing from elsewhere, and no other page may show it in a frame.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


class ModelName(BaseModel):
    """Which model has answered."""

    name: str
    step: int


class Predictions(BaseModel):
    """A prediction for each image, in their order."""

    model: ModelName
    predictions: list[dict[str, Any]]


class ModelDescription(ModelName):
    """The model that answers now."""

    model: str
    task: str
    classes: list[str]


class Status(BaseModel):
    """Whether the server works."""

    status: str


class Problem(BaseModel):
    """Why a request is refused."""

    detail: str


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        400: "The body is not what its content type says.",
        408: "The request did not arrive in time.",
        413: "The request or an image is too large.",
        415: "The content type is not known.",
        422: "An image can't be decoded, or there is none.",
        500: "The model failed, or its output is not finite.",
        503: "Too many requests wait; try again later.",
        504: "The answer took too long.",
    }.items()
}


def _images(item: dict[str, str]) -> dict[str, Any]:
    """An object whose entry ``images`` is a list, in OpenAPI's terms."""
    entry = {"type": "array", "minItems": 1, "items": {"type": "string", **item}}
    return {"schema": {"type": "object", "required": [content.FIELD], "properties": {content.FIELD: entry}}}


#: What ``/predict`` reads, in OpenAPI's terms; FastAPI would read it without limits.
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            content.JSON: _images({"contentEncoding": "base64"}),
            content.FORM: _images({"format": "binary"}),
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def build(current: CurrentModel, options: ServingOptions, metrics: Metrics) -> FastAPI:
    """Makes the application. While ``state.is_stopping`` is set, it is not ready.

    Args:
        current: The model.
        options: How requests are answered.
        metrics: What is counted.
    """
    answering = Answering(current, options, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with answering.running():
            yield

    # The pages that show OpenAPI load scripts from other hosts.
    app = FastAPI(
        title="distrain serve", version=distrain.__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.is_stopping = False

    @app.exception_handler(Refused)
    async def refuse(_: Request, refused: Refused) -> Response:
        return JSONResponse({"detail": refused.detail}, refused.status, refused.headers)

    @app.post("/predict", response_model=Predictions, responses=_PROBLEMS, openapi_extra=_REQUEST_BODY)
    async def predict(request: Request, top: Annotated[int, Query(ge=1, le=_LARGEST_TOP)] = _TOP) -> Response:
        """Predicts for images: base64 in JSON, files of a form, or one image as the body."""
        begin, status = time.perf_counter(), 500
        try:
            answer = await answering.answer(request, top)
            status = 200
            return JSONResponse(answer)
        except Refused as refused:
            status = refused.status
            raise
        except ClientDisconnect:
            # Nobody reads this; nginx counts such requests by this number.
            status = 499
            return Response(status_code=400)
        except Exception as error:  # of the model, whose details are no client's business
            log.exception("the model failed")
            raise Refused(500, "the model failed; the server's log says why") from error
        finally:
            metrics.requests.labels(str(status)).inc()
            metrics.request_seconds.observe(time.perf_counter() - begin)

    @app.get("/model")
    async def model() -> ModelDescription:
        """Describes the model that answers now."""
        about = current.model.about
        return ModelDescription(
            name=about.name, step=about.step, model=about.model, task=about.task, classes=list(about.classes)
        )

    @app.get("/health")
    async def health() -> Status:
        """Says that the process works; if it doesn't answer, it should be started again."""
        return Status(status="ok")

    @app.get("/ready", responses={503: {"model": Problem}})
    async def ready() -> Status:
        """Says whether requests may be sent here; not while it stops."""
        if app.state.is_stopping:
            raise Refused(503, "the server stops")
        return Status(status="ready")

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    _add_page(app)
    return app


def _add_page(app: FastAPI) -> None:
    folder = resources.files("distrain.tools.serving") / "page"

    def add(name: str, address: str, kind: str) -> None:
        file = (folder / name).read_bytes()

        @app.get(address, include_in_schema=False)
        async def page() -> Response:
            return Response(file, media_type=kind, headers=_PAGE_HEADERS)

    for name, (address, kind) in _PAGE.items():
        add(name, address, kind)
