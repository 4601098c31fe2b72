"""Weights are downloaded from a hub once; the library itself is tested against a hub on this machine."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distrain.checkpoint import hub_weights, weight_files
from distrain.checkpoint.format import DamagedCheckpoint

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    f"/user/safe/resolve/{revision}/model.safetensors": safetensors.torch.save({"weight": torch.full((2,), value)})
    for revision, value in {"main": 1.0, "old": 2.0}.items()
}
FILES["/user/other/resolve/main/part/weights.safetensors"] = safetensors.torch.save({"weight": torch.full((2,), 3.0)})


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, as far as its library asks for one file."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        name, _, file = self.path.partition("/resolve/")
        revision = file.partition("/")[0]
        error = ""
        if name not in ("/user/safe", "/user/other"):
            error = "RepoNotFound"
        elif revision not in ("main", "old"):
            error = "RevisionNotFound"
        elif self.path not in FILES:
            error = "EntryNotFound"
        content = FILES.get(self.path, b"")
        self.send_response(404 if error else 200)
        for header, value in {"X-Error-Code": error, "X-Repo-Commit": COMMIT, "ETag": f'"{hash(content)}"'}.items():
            if value:
                self.send_header(header, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "value"),
    [
        ("hf://user/safe", 1.0),
        ("hf://user/safe@old", 2.0),
        ("hf://user/safe/model.safetensors", 1.0),
        ("hf://user/other/part/weights.safetensors", 3.0),
    ],
)
def test_the_addressed_file_is_downloaded(address: str, value: float, served: object) -> None:
    assert weight_files.read(hub_weights.download(address))["weight"].tolist() == [value, value]


def test_what_was_downloaded_needs_no_network(
    served: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub_weights.download("hf://user/safe")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_weights.download("hf://user/safe") == path
    with pytest.raises(DamagedCheckpoint, match="was not downloaded before, and the hub can't be reached"):
        hub_weights.download("hf://user/other/part/weights.safetensors")


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("hf://safe", "is no address of weights: hf://USER/NAME"),
        ("hf://user/missing", "is not on the hub, or only for its members"),
        ("hf://user/safe@new", "has no revision new"),
        ("hf://user/other", "has no file model.safetensors or pytorch_model.bin; name one: hf://user/other/FILE"),
        ("hf://user/safe/model.bin", "has no file model.bin"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(address: str, problem: str, served: object) -> None:
    with pytest.raises(DamagedCheckpoint, match=problem) as caught:
        hub_weights.download(address)
    assert "\n" not in str(caught.value)
