"""What the HTTP interface answers, and what it refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import logging
import re
from importlib import resources
from typing import Any

import httpx
import pytest

from distrain.tools.serving.limits import Limits
from tests.tools.serving.helpers import LIMITS, OPTIONS, GreyModel, Running, encoded, png, running, until


def limited(**changes: Any) -> Any:
    limits: Limits = dataclasses.replace(LIMITS, **changes)
    return dataclasses.replace(OPTIONS, limits=limits)


def test_json_forms_and_plain_images_get_the_same_answers() -> None:
    async def ask() -> None:
        async with running() as served:
            by_json = (await served.post(51, 204)).json()
            files = [("images", ("a.png", io.BytesIO(png(51)))), ("images", ("b.png", io.BytesIO(png(204))))]
            by_form = await served.client.post("/predict?top=1", files=files, data={"other": "field"})
            plain = await served.client.post(
                "/predict?top=1", content=png(204), headers={"content-type": "image/whatever"}
            )
        assert by_json["model"] == {"name": "first", "step": 7}
        assert by_json["predictions"] == [
            {"class": "dark", "probability": pytest.approx(0.8)},
            {"class": "bright", "probability": pytest.approx(0.8)},
        ]
        assert by_form.json() == by_json
        assert plain.json()["predictions"] == by_json["predictions"][1:]

    asyncio.run(ask())


def test_each_request_of_a_batch_gets_as_many_answers_as_it_asked_for() -> None:
    async def ask() -> list[Any]:
        async with running() as served:
            served.model.may_go.clear()
            first = asyncio.create_task(served.post(1))
            await until(served.model.works.is_set)
            others = [asyncio.create_task(served.post(51, top=top)) for top in (1, 2, 1000)]
            await until(lambda: arrived(served) == 4)
            served.model.may_go.set()
            await first
            answers = [(await task).json()["predictions"][0] for task in others]
            assert served.model.batches == [1, 3]
            return answers

    one, two, most = asyncio.run(ask())
    assert one == {"class": "dark", "probability": pytest.approx(0.8)}
    assert two == most
    assert [entry["class"] for entry in two["top"]] == ["dark", "bright"]


def arrived(served: Running) -> float:
    """Images that the model has got, or that wait for it."""
    lines = served.metrics.text().decode().splitlines()
    waiting = next(float(line.split()[1]) for line in lines if line.startswith("distrain_queue_images "))
    return sum(served.model.batches) + waiting


JSON, FORM = "application/json", "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
REFUSED = {
    "no JSON": (JSON, b"{", 400, "is not JSON"),
    "deep JSON": (JSON, b"[" * 1000, 400, "is not JSON"),
    "JSON of many lists": (JSON, b'{"images": [' + b"[]," * 30_000 + b"1]}", 413, "more than 1008 parts"),
    "JSON of many keys": (JSON, b"{" + b'"a":1,' * 15_000 + b'"images": 1}', 413, "more than 1008 parts"),
    "JSON of another shape": (JSON, b'["a"]', 422, "must be"),
    "JSON without an image": (JSON, b'{"images": []}', 422, "at least one"),
    "an image that is a number": (JSON, b'{"images": [1]}', 422, "images[0] is no text"),
    "an image that is not base64": (JSON, b'{"images": ["%"]}', 422, "images[0] is not base64"),
    "too many images": (JSON, json.dumps({"images": [encoded(1)] * 9}).encode(), 413, "room for 8"),
    "a form without a boundary": ("multipart/form-data", b"x", 400, "needs a boundary"),
    "a form without files": (FORM, b"--x--\r\n", 422, "no file named images"),
    "a form of other files": (
        FORM,
        PART.replace(b"images", b"other") + png(1) + b"\r\n--x--\r\n",
        422,
        "no file named",
    ),
    "a form of many parts": (FORM, (PART + b"\r\n") * 1010 + b"--x--\r\n", 413, "more than 1008 parts"),
    "a form that is cut off": (FORM, PART + png(1), 422, "no file named images"),
    "no form": (FORM, b"hello", 400, "form can't be read"),
    "an image that is cut off": ("image/png", png(1, (90, 90))[:-30], 422, "image 0 can't be decoded"),
    "noise": ("image/png", bytes(range(256)), 422, "image 0 is neither JPEG nor PNG"),
    "too many pixels": ("image/png", png(1, (101, 100)), 413, "101x100 are more than 10000 pixels"),
    "an empty body": ("image/png", b"", 422, "image 0 is neither JPEG nor PNG"),
    "another type": ("text/html", png(1), 415, "must be application/json"),
    "too many bytes": ("image/png", bytes(100_001), 413, "more than 100000 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(case: str) -> None:
    kind, body, status, reason = REFUSED[case]

    async def ask() -> httpx.Response:
        async with running() as served:
            answer = await served.client.post("/predict", content=body, headers={"content-type": kind})
            assert (await served.post(1)).status_code == 200
            return answer

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert reason in answer.json()["detail"]


def test_beyond_the_queue_requests_are_refused_until_there_is_room() -> None:
    async def ask() -> None:
        async with running() as served:
            served.model.may_go.clear()
            tasks = [asyncio.create_task(served.post(1)) for _ in range(LIMITS.queue - 1)]
            await until(lambda: arrived(served) == LIMITS.queue - 1)
            two = await served.post(1, 2)
            served.model.may_go.set()
            assert two.status_code == 503
            assert two.headers["retry-after"] == "1"
            assert [(await task).status_code for task in tasks] == [200] * len(tasks)
            assert (await served.post(*range(LIMITS.queue))).status_code == 200

    asyncio.run(ask())


def test_the_bodies_of_all_requests_together_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrain.tools.serving.limits._MOST_BODIES", 1)

    async def ask() -> tuple[int, int]:
        async with running() as served:
            served.model.may_go.clear()
            body = json.dumps({"images": [encoded(1)], "filler": "x" * 90_000})
            headers = {"content-type": JSON}
            first = asyncio.create_task(served.client.post("/predict", content=body, headers=headers))
            await until(served.model.works.is_set)
            second = await served.client.post("/predict", content=body, headers=headers)
            served.model.may_go.set()
            return (await first).status_code, second.status_code

    assert asyncio.run(ask()) == (200, 503)


def test_a_late_answer_is_given_up() -> None:
    async def ask() -> httpx.Response:
        async with running(limited(answer_seconds=0.05)) as served:
            served.model.may_go.clear()
            return await served.post(1)

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["retry-after"]) == (504, "1")


def test_a_body_that_stops_is_given_up() -> None:
    async def stalls() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    async def ask() -> httpx.Response:
        async with running(limited(receive_seconds=0.1)) as served:
            return await served.client.post("/predict", content=stalls(), headers={"content-type": JSON})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["connection"]) == (408, "close")


def test_a_model_that_fails_is_the_servers_error_and_its_details_stay_there(caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        async with running() as served:
            not_finite = await served.post(1, 255)
            served.model.error = RuntimeError("secret")
            failed = await served.post(1)
            served.model.error = None
            served.model.forgets = 1
            short = await served.post(1)
            assert short.status_code == 500
            served.model.forgets = 0
            return not_finite, failed, await served.post(1)

    with caplog.at_level(logging.ERROR):
        not_finite, failed, after = asyncio.run(ask())
    assert [answer.status_code for answer in (not_finite, failed, after)] == [500, 500, 200]
    assert "image 1 is not finite" in not_finite.json()["detail"]
    assert "secret" not in failed.text
    assert "secret" in caplog.text


def test_a_newer_model_answers_new_requests_and_the_old_one_those_that_wait() -> None:
    async def ask() -> None:
        async with running(dataclasses.replace(OPTIONS, reload_seconds=0.01)) as served:
            served.model.may_go.clear()
            old = [asyncio.create_task(served.post(1)) for _ in range(2)]
            await until(lambda: arrived(served) == 2)
            # One that can't be used changes nothing, and is looked at again.
            served.shelf.error = ValueError("damaged")
            await until(lambda: b'reloads_total{result="failed"} 1.0' in served.metrics.text())
            assert (await served.client.get("/model")).json()["name"] == "first"
            served.shelf.error = None
            second = GreyModel("second")
            served.shelf.models.append(second)
            await until(lambda: b'reloads_total{result="loaded"} 1.0' in served.metrics.text())
            new = asyncio.create_task(served.post(1))
            served.model.may_go.set()
            names = [(await task).json()["model"]["name"] for task in [*old, new]]
            assert names == ["first", "first", "second"]
            assert sum(served.model.batches) == 2
            assert (await served.client.get("/model")).json()["name"] == "second"

    asyncio.run(ask())


def test_health_metrics_and_description_are_there() -> None:
    async def ask() -> dict[str, httpx.Response]:
        async with running() as served:
            await served.post(1, 2)
            await served.client.post("/predict", content=b"")
            paths = ("/health", "/ready", "/metrics", "/model", "/openapi.json", "/nothing", "/predict", "/")
            return {path: await served.client.get(path) for path in paths}

    found = asyncio.run(ask())
    assert found["/health"].json() == {"status": "ok"}
    assert found["/ready"].json() == {"status": "ready"}
    text = found["/metrics"].text
    assert 'distrain_requests_total{status="200"} 1.0' in text
    assert 'distrain_requests_total{status="415"} 1.0' in text
    assert "distrain_images_total 2.0" in text
    assert "distrain_model_step 7.0" in text
    assert found["/model"].json()["classes"] == ["dark", "bright"]
    described = found["/openapi.json"].json()["paths"]["/predict"]["post"]
    assert set(described["requestBody"]["content"]) == {"application/json", "multipart/form-data", "image/*"}
    assert {"200", "413", "503"} <= set(described["responses"])
    assert (found["/nothing"].status_code, found["/predict"].status_code) == (404, 405)
    assert "detail" in found["/nothing"].json()
    assert "frame-ancestors 'none'" in found["/"].headers["content-security-policy"]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    folder = resources.files("distrain.tools.serving") / "page"
    content = {file.name: file.read_text() for file in folder.iterdir()}
    assert set(content) == {"index.html", "page.js", "page.css", "favicon.svg"}
    # An address of another host; two slashes before a blank begin a comment, and a picture names its format so.
    assert not [name for name, text in content.items() if re.search(r"//(?! |www\.w3\.org/2000/svg)", text)]
