"""Nothing that distrain reads can run code, leave its folder, or fill the memory with what it merely claims."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.cli import evaluate, hydra_entry, predict
from distrain.cli.run_folder import RunFolder
from distrain.communication.types import RankName
from distrain.config.load import load_settings
from distrain.data import cifar10, decode, image_cache
from distrain.data.decode import DecodeError
from distrain.data.digits import Digits
from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.strategies.parameter_server.collectives import CollectiveServer
from distrain.strategies.parameter_server.connect import CHANNELS, Address, Listener, connect_to_server
from distrain.strategies.parameter_server.optimizer_wire import receive_optimizer_state
from distrain.strategies.parameter_server.protocol import Frame, FrameKind, ProtocolError
from tests.data.helpers import ROOT, source, write_image
from tests.harness import run_ranks
from tests.runs import CONF, small, train_on_rank
from tests.strategies.parameter_server.helpers import connected_pair
from tests.trained import original, replace_section, run

__all__ = ["original", "run"]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def as_pickle(bomb: Bomb) -> bytes:
    return pickle.dumps(bomb)


def as_torch_file(bomb: Bomb) -> bytes:
    file = io.BytesIO()
    torch.save({"model": bomb}, file)
    return file.getvalue()


def as_array(bomb: Bomb) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([bomb], dtype=object), allow_pickle=True)
    return file.getvalue()


def as_compressed_pickle(bomb: Bomb) -> bytes:
    return gzip.compress(pickle.dumps(bomb))


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that a planted pickle would make; it must not be there in the end."""
    mark = tmp_path / "it_ran"
    yield mark
    assert not mark.exists(), "what was planted ran"


@pytest.fixture(params=[as_pickle, as_torch_file, as_array, as_compressed_pickle])
def planted(request: pytest.FixtureRequest, mark: Path) -> bytes:
    content: bytes = request.param(Bomb(mark))
    return content


def one_line(call: Callable[[], object], kind: type[Exception] = ConfigError) -> str:
    """What a call is refused with."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_planted_pickle_would_run(tmp_path: Path) -> None:
    pickle.loads(as_pickle(Bomb(tmp_path / "it_ran")))
    assert (tmp_path / "it_ran").exists()


# --- pickles in place of each file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "data.json"])
def test_a_pickle_in_a_run_folder_is_named(run: Path, planted: bytes, name: str) -> None:
    (run / name).write_bytes(planted)
    assert f"run={run}: {name} " in one_line(lambda: RunFolder.open(str(run)))


def test_a_pickle_in_place_of_any_file_of_a_checkpoint_is_named(run: Path, planted: bytes) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) >= 4
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(planted)
        assert str(file) in one_line(lambda: RunFolder.open(str(run)).weights(str(path)))
        file.write_bytes(whole)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's files, of ten images each."""
    monkeypatch.setattr(cifar10, "BATCH_IMAGES", 10)
    folder = tmp_path / "data" / cifar10.FOLDER
    folder.mkdir(parents=True)
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / f"{name}.bin").write_bytes(b"".join(bytes([label]) + bytes(3072) for label in range(10)))
    (folder / "batches.meta.txt").write_text("\n".join(cifar10.CLASSES))
    return folder


@pytest.mark.parametrize("padded", [False, True], ids=["as it is", "of the right size"])
def test_a_pickle_in_place_of_a_file_of_cifar10_is_named(cifar: Path, planted: bytes, padded: bool) -> None:
    for file in sorted(cifar.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(planted.ljust(len(whole), b"\xff") if padded else planted)
        if len(file.read_bytes()) > len(whole) and padded:
            file.write_bytes(planted[: len(whole)])
        assert file.name in one_line(lambda: source("cifar10", root=str(cifar)).load())
        file.write_bytes(whole)
    source("cifar10", root=str(cifar)).load()


def test_cifar10s_pickled_edition_is_not_taken(tmp_path: Path, planted: bytes) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(planted)
    for root in (tmp_path, folder):
        said = one_line(lambda root=root: source("cifar10", root=str(root)).load())  # type: ignore[misc]
        assert said.startswith(f"data.root={root}: lacks cifar-10-batches-bin")


def test_a_pickle_in_place_of_the_digits_is_named(
    tmp_path: Path, planted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "digits.csv.gz"
    file.write_bytes(planted)
    monkeypatch.setattr(Digits, "_path", lambda self: file)
    assert f"data: {file} can't be read" in one_line(lambda: source("digits").load())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of two images each, below ``photos``."""
    for kind in ("a", "b"):
        for number in range(2):
            write_image(tmp_path / "photos" / kind / f"{number}.png", np.full((4, 4, 3), number, dtype=np.uint8))
    return tmp_path / "photos"


def load_tree(tree: Path) -> Any:
    return source("image_folder", root=str(tree), height=4, width=4, workers=1).load()


def test_a_pickle_in_place_of_an_image_is_named(tmp_path: Path, planted: bytes) -> None:
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes(planted)
        said = one_line(lambda name=name: decode.decode(tmp_path / name, 4, 4, 3), DecodeError)  # type: ignore[misc]
        assert said.startswith(f"{tmp_path / name}: cannot identify")


def test_what_a_cache_cant_be_is_not_taken_for_one(tree: Path, planted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cache, asked = image_cache._open, []

    def watched(*arguments: Any) -> Any:
        asked.append(arguments)
        return open_cache(*arguments)

    monkeypatch.setattr(image_cache, "_open", watched)
    load_tree(tree)
    recipe, cache = asked[-1]
    assert open_cache(recipe, cache) is not None
    nonsense = ["[]", "3", '{"broken": 3}', '{"broken": {"x": 1}}', '{"broken": {"99": ""}}', '{"broken":' * 50_000]
    for name in ("meta.json", "images.u8", "moments.i64"):
        whole = (cache / name).read_bytes()
        for content in [planted, *(text.encode() for text in nonsense)]:
            (cache / name).write_bytes(content)
            assert open_cache(recipe, cache) is None
        (cache / name).write_bytes(whole)
    assert open_cache(recipe, cache) is not None


def test_hydras_pickled_reruns_are_refused(tmp_path: Path, planted: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.pickle").write_bytes(planted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", f"--experimental-rerun={tmp_path}/config.pickle"])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as ended:
            hydra_entry.main(lambda composed: None, CONF, "config")
    assert ended.value.code == 2
    assert "reads a pickle, which could run any code" in capfd.readouterr().err


# --- a whole training reads none -------------------------------------------------------------------------------------

_RUNS = (
    ("strategy=ddp", "compression=powersgd", "logger=tensorboard", "trainer.max_steps=2", "run_dir=ddp"),
    ("strategy=ddp", "compression=powersgd", "logger=tensorboard", "trainer.max_steps=3", "run_dir=ddp"),
    ("strategy=pipeline", "data.batch_size=12", "trainer.max_steps=2", "run_dir=pipeline"),
    ("strategy=local_sgd", "strategy.sync_every=2", "trainer.max_steps=2", "run_dir=local_sgd"),
    ("strategy=parameter_server", "trainer.max_steps=2", "run_dir=parameter_server"),
)


def train_and_watch(folder: str) -> list[str]:
    """Names that were looked up by an unpickler while every strategy trained and saved, and one went on."""
    seen: list[str] = []
    sys.addaudithook(
        lambda event, args: seen.append(".".join(map(str, args))) if event == "pickle.find_class" else None
    )
    os.chdir(folder)
    for options in _RUNS:
        train_on_rank(small(*options))
    pickle.loads(pickle.dumps(Path("watched")))
    return seen


def test_ranks_that_train_save_and_resume_unpickle_nothing(tmp_path: Path) -> None:
    for seen in run_ranks(train_and_watch, 2, str(tmp_path), timeout=110):
        assert seen == [f"{type(tmp_path).__module__}.{type(tmp_path).__name__}"]


# --- what the source may not use -------------------------------------------------------------------------------------

_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
_CALLS = {"eval", "exec", "compile", "__import__"}
#: Methods and functions of these names run code that they are given, or read what can.
_NAMES = {
    "load_module", "exec_module", "system", "popen", "run_path", "run_module", "execfile",
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list", "unsafe_load", "full_load", "load_all", "read_pickle",
    "dist_cp", "extractall", "unpack_archive",
}  # fmt: skip


def misuse(tree: ast.AST) -> Iterator[str]:
    """What a source file uses that could run code in data, as ``line: what``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            for name in names:
                if name.partition(".")[0] in _MODULES or name.startswith("torch.distributed.checkpoint"):
                    yield f"{node.lineno}: import of {name}"
        elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
            yield f"{node.lineno}: {node.attr}"
        elif isinstance(node, ast.Call):
            yield from _misused_call(node)


def _misused_call(node: ast.Call) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    said = ast.unparse(node.func)

    def is_true(name: str) -> bool:
        return isinstance(given.get(name), ast.Constant) and given[name].value is True  # type: ignore[attr-defined]

    if said in _CALLS:
        yield f"{node.lineno}: {said}"
    if said == "torch.load" and not is_true("weights_only"):
        yield f"{node.lineno}: torch.load without weights_only=True"
    if said == "yaml.load":
        yield f"{node.lineno}: yaml.load"
    if said.endswith(("np.load", "numpy.load")) and "allow_pickle" in given:
        yield f"{node.lineno}: allow_pickle"
    if "shell" in given:
        yield f"{node.lineno}: shell"


@pytest.mark.parametrize("folder", ["distrain", "launch"])
def test_the_source_uses_nothing_that_runs_what_it_reads(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [f"{file}:{line}" for file in files for line in misuse(ast.parse(file.read_text()))]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import torch.distributed.checkpoint as dcp",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader)",
        "np.load(path, allow_pickle=True)",
        "dist.all_gather_object(found, mine)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "archive.extractall(folder)",
        "os.system(text)",
    ],
)
def test_such_a_use_would_be_found(line: str) -> None:
    assert len(list(misuse(ast.parse(line)))) == 1


# --- nesting, paths, links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [60, 150, 300, 600, 5000])
def test_deep_nesting_is_one_line(run: Path, depth: int) -> None:
    content = (run / "config.yaml").read_text()
    for name, value in {
        "config.yaml": "[" * depth + "]" * depth,
        "data.json": '{"a":' * depth + "1" + "}" * depth,
    }.items():
        whole = (run / name).read_text()
        if name == "config.yaml":
            changed = yaml.safe_load(content)
            changed["experiment"] = None
            text = yaml.safe_dump(changed).replace("experiment: null", f"experiment: {value}")
        else:
            text = value
        (run / name).write_text(text)
        assert one_line(lambda: RunFolder.open(str(run))).startswith(f"run={run}: {name}")
        (run / name).write_text(whole)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_deep_nesting_in_a_checkpoint_is_damage(run: Path, name: str) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    (path / name).write_text('{"a":' * 50_000)
    assert name in one_line(lambda: checkpoint_reader.verify(path), DamagedCheckpoint)
    assert name in one_line(lambda: RunFolder.open(str(run)).weights(str(path)))


@pytest.mark.parametrize("name", ["/etc/hostname", "../../config.yaml", "..", ".", "", "logs/../state.json", "a\0b"])
def test_a_manifest_names_files_of_its_folder_alone(run: Path, name: str) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    manifest = (path / "manifest.json").read_text()
    first = next(iter(json.loads(manifest)))
    (path / "manifest.json").write_text(manifest.replace(json.dumps(first), json.dumps(name), 1))
    one_line(lambda: checkpoint_reader.verify(path), DamagedCheckpoint)


def test_a_link_that_leaves_a_checkpoint_is_not_followed(run: Path, tmp_path: Path) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    for file in sorted(path.iterdir()):
        elsewhere = tmp_path / "elsewhere"
        shutil.move(file, elsewhere)
        file.symlink_to(elsewhere)
        assert f"{file} is a link that leaves" in one_line(lambda: checkpoint_reader.verify(path), DamagedCheckpoint)
        file.unlink()
        shutil.move(elsewhere, file)
    checkpoint_reader.verify(path)


def test_a_pipe_in_a_run_folder_keeps_nobody_waiting(run: Path) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    for file in (path / "manifest.json", path / "state.json", run / "data.json", run / "config.yaml"):
        file.unlink()
        os.mkfifo(file)
        assert file.name in one_line(lambda: RunFolder.open(str(run)).weights(str(path)))


def test_a_strangers_run_doesnt_say_where_to_write(run: Path, tree: Path, tmp_path: Path) -> None:
    replace_section(run, "data", "data=image_folder", f"data.root={tree}", f"data.cache={tmp_path}/home/of/user")
    composed = load_settings(evaluate.EvaluateSettings, hydra_entry.compose(CONF, "evaluate", [f"run={run}"]))
    folder = RunFolder.open(str(run))
    adapted = evaluate._adapted(folder, composed, World.from_environment())
    assert adapted.data.cache is None  # type: ignore[attr-defined]
    # Unless it is the folder that the user's own training used.
    source("image_folder", root=str(tree), height=4, width=4, workers=1, cache=f"{tmp_path}/home/of/user").load()
    adapted = evaluate._adapted(folder, composed, World.from_environment())
    assert adapted.data.cache == f"{tmp_path}/home/of/user"  # type: ignore[attr-defined]


def test_modules_that_lie_beside_images_are_not_imported(
    tree: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "numpy", "PIL", "distrain", "sitecustomize"):
        (tree / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.chdir(tree)
    start: Any = subprocess.Popen

    def as_python_310(*command: Any, env: dict[str, str], **options: Any) -> Any:
        return start(*command, env={name: value for name, value in env.items() if name != "PYTHONSAFEPATH"}, **options)

    monkeypatch.setattr(subprocess, "Popen", as_python_310)
    assert len(load_tree(Path()).train) > 0


# --- what claims to be large -----------------------------------------------------------------------------------------


def with_header(header: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + bytes(64)


def tensor_at(*offsets: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def of_tensors(**tensors: dict[str, Any]) -> bytes:
    return with_header(json.dumps(tensors).encode())


@pytest.mark.parametrize(
    "content",
    [
        with_header(b"{}", 1 << 60),
        with_header(b"{}", (1 << 64) - 1),
        with_header(b"{" * 100_000),
        of_tensors(a=tensor_at(0, 16), b=tensor_at(8, 24)),
        of_tensors(a=tensor_at(0, 1 << 40, shape=(1 << 38,))),
        of_tensors(a=tensor_at(16, 0)),
        of_tensors(a=tensor_at(0, 16, shape=(1 << 62, 4))),
        of_tensors(a=tensor_at(0, 16, shape=(-4,))),
        of_tensors(a=tensor_at(0, 16, dtype="OBJECT")),
        b"",
        b"\x80",
    ],
)
def test_a_tensor_file_that_claims_what_it_has_not_is_damaged(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors is not a safetensors file"):
        checkpoint_reader._load_tensors(file)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: bytes = b"") -> bytes:
    """A PNG file of 8-bit grey that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def bomb(kind: str) -> bytes:
    if kind == "claims":
        return png(50_000, 50_000)
    if kind == "small file":
        return png(9_500, 9_500, rows=bytes(9_501 * 9_500))
    if kind == "truncated":
        return png(64, 64, rows=os.urandom(65 * 64))[:2000]
    if kind == "text":
        return png(4, 4, (b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000))), rows=bytes(20))
    whole = io.BytesIO()
    Image.new("RGB", (8, 8)).save(whole, format="GIF" if kind == "gif" else "TIFF")
    return whole.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("claims", "2500000000 pixels"),
        ("small file", "9500x9500 are more than 89478485 pixels"),
        ("text", "Decompressed data too large"),
        ("truncated", "image file"),
        ("gif", "cannot identify"),
        ("tiff", "cannot identify"),
    ],
)
def test_an_image_bomb_is_refused_by_name(tmp_path: Path, kind: str, said: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(bomb(kind))
    refused = one_line(lambda: decode.decode(file, 4, 4, 3), DecodeError)
    assert refused.startswith(f"{file}: ")
    assert said in refused


def test_a_file_larger_than_any_image_is_not_opened(tree: Path, run: Path) -> None:
    file = tree / "a" / "1.png"
    with file.open("r+b") as sparse:
        sparse.truncate(decode.LARGEST_FILE + 1)
    assert f"{file} can't be decoded (has more than 1073741824 bytes)" in one_line(lambda: load_tree(tree))
    assert f"input={file}: can't be decoded (has more than 1073741824" in one_line(lambda: predicted(run, file))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_exif_of_any_size_is_data(tmp_path: Path) -> None:
    entries = struct.pack(">H", 0xFFFF) + b"\x01\x12\x00\x03\x00\x00\x00\x01\xff\xff\x00\x00" * 5000
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + entries
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=exif[:65_000])
    (tmp_path / "b.png").write_bytes(png(4, 4, (b"eXIf", exif[6:] * 300), rows=bytes(20)))
    for name in ("a.jpg", "b.png"):
        assert decode.decode(tmp_path / name, 4, 4, 3).shape == (3, 4, 4)


def test_a_pipe_among_images_keeps_nobody_waiting(tree: Path, run: Path) -> None:
    os.mkfifo(tree / "a" / "9.png")
    assert predict.find_images(str(tree)) == [f"{tree}/{name}" for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png")]
    load_tree(tree)


def test_a_run_folder_cant_ask_for_images_of_any_size(run: Path) -> None:
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**data, "height": 10**6, "width": 10**6}))
    assert "data.json has images of more than" in one_line(lambda: RunFolder.open(str(run)))


def predicted(run: Path, file: Path) -> Any:
    composed = hydra_entry.compose(CONF, "predict", [f"run={run}", f"input={file}", f"output={run}/out.json"])
    return predict.run(load_settings(predict.PredictSettings, composed))


# --- what comes from the network and the environment -----------------------------------------------------------------

HEADER = struct.Struct("!4sBxxxIQ")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        os.urandom(4096),
        HEADER.pack(b"dst1", FrameKind.HELLO, (1 << 32) - 1, 0),
        HEADER.pack(b"dst1", FrameKind.HELLO, 0, (1 << 64) - 1),
        HEADER.pack(b"dst1", FrameKind.HELLO, 4000, 0) + b"[" * 4000,
        HEADER.pack(b"dst1", FrameKind.HELLO, 17, 0) + b'{"token":"\\ud800"}'[:17],
        HEADER.pack(b"dst1", FrameKind.HELLO, 18, 0) + b'{"token":"\\ud800"}',
        HEADER.pack(b"dst1", FrameKind.HELLO, 13, 0) + b'{"token":[1]}',
        HEADER.pack(b"dst1", FrameKind.LOAD, 0, 8) + bytes(8),
        b"",
    ],
    ids=["http", "noise", "long", "large", "deep", "no JSON", "no text", "no string", "another kind", "nothing"],
)
def test_a_client_without_the_token_is_refused(sent: bytes) -> None:
    listener = Listener(Address("127.0.0.1", "127.0.0.1", socket.AF_INET))
    answers: list[bytes] = []

    def come() -> None:
        with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
            try:
                stranger.sendall(sent)
                stranger.shutdown(socket.SHUT_WR)
                answers.append(stranger.recv(100))
            except OSError:
                # Disconnected before everything was sent.
                answers.append(b"")
        for connection in connect_to_server(
            RankName(1, "there"), "127.0.0.1", listener.port, listener.token, 0, 10
        ).values():
            connection.close()

    visitor = threading.Thread(target=come)
    visitor.start()
    connections = listener.accept_workers([RankName(0, "here")], 10)
    visitor.join()
    assert answers == [b""]
    assert sorted(channel for _, channel in connections) == sorted(CHANNELS)
    for connection in connections.values():
        connection.close()


def test_a_client_that_sends_a_pickle_is_refused(planted: bytes) -> None:
    test_a_client_without_the_token_is_refused(planted)


@pytest.mark.parametrize(
    "meta",
    [
        {"operation": "broadcast", "dtype": "float32", "source": [0]},
        {"operation": "broadcast", "dtype": "float32"},
        {"operation": "accumulate", "dtype": "int64", "name": {}, "wait": True},
        {"operation": ["sum"], "dtype": "float32"},
        {"operation": "sum", "dtype": "load"},
        {"operation": "sum", "dtype": {}},
    ],
)
def test_a_worker_that_sends_an_invalid_collective_is_named(meta: dict[str, Any]) -> None:
    server = CollectiveServer([0], threading.Condition(threading.RLock()), 100)
    frame = Frame(FrameKind.COLLECTIVE, meta, 0, "rank 0 on here")
    empty = torch.empty(0, dtype=torch.uint8)
    said = one_line(lambda: server.join(0, frame, empty, lambda done, awaited: None), ProtocolError)
    assert said.startswith("COLLECTIVE frame of rank 0 on here: ")


@pytest.mark.parametrize("entry", [[["a"], "float32", []], ["a/b", ["float32"], []], ["a/b", "float32", [1 << 60]], {}])
def test_state_of_the_wrong_kind_is_refused(entry: object) -> None:
    with connected_pair() as (server, worker):
        worker.send(FrameKind.STATE, {"tensors": [entry], "scalars": {}})
        parameters = {"a": torch.nn.Parameter(torch.zeros(2))}
        assert "STATE frame of the server" in one_line(
            lambda: receive_optimizer_state(server, parameters), ProtocolError
        )


@pytest.mark.parametrize("value", ["²", "-1", "1e3", "", " 1", "9" * 5000])
def test_a_launchers_variable_is_a_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert one_line(World.from_environment).startswith("WORLD_SIZE=")
