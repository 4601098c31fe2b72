"""How ``distrain serve`` does under load, beside no batching and beside LitServe, and what hostile clients do to it.

Makes a ResNet-18 for 32x32 images (two steps of training: speed does not depend on the weights), and

1. sends requests on 200 connections by wrk, which is a process of its own: to a server with batching, to one without
   (``max_batch_size=1``), to the latter also on so few connections that its p99 is not above that of the first, and,
   with ``--litserve FOLDER``, to LitServe with the same model, decoder, threads and batch size. Samples the memory.
   ``--format onnx`` or ``torch_export`` serves the exported file instead of the run.
2. sends 200 hostile requests at once, slow ones among them: each must get a 4xx status, and the server must go on.
3. stops a server by SIGTERM while 50 clients use it: each request that was sent must be answered, and the exit code 0.

    apt-get install wrk
    pip install --target LITSERVE --no-deps litserve pyzmq        # beside the packages of distrain[serve]
    python benchmarks/serve.py [--seconds 60] [--litserve LITSERVE] [--stem imagenet|cifar] [--threads 1]
        [--format onnx|torch_export]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import io
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
CONNECTIONS, HOSTILE, STOPPED_CLIENTS = 200, 200, 50
BATCH, WAIT_MS = 32, 2.0
#: Seconds that a server has to start, and to answer a hostile request.
PATIENCE = 120
SENT_BY_WRK = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = io.open("%s"):read("*a")
function done(summary, latency, requests)
  local e = summary.errors
  print(string.format('{"requests": %%d, "seconds": %%f, "errors": %%d, "p50": %%f, "p99": %%f}', summary.requests,
    summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3))
end
"""
LITSERVE = """
import base64, sys
import litserve, numpy, torch
from distrain.cli.run_folder import RunFolder
from distrain.cli.run_model import RunModel
from distrain.data.decode import decode_bytes
from distrain.runtime.world import World
from distrain.tasks import base as tasks
RUN, PORT, THREADS, BATCH, WAIT = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
class Api(litserve.LitAPI):
    def setup(self, device):
        torch.set_num_threads(THREADS)
        folder = RunFolder.open(RUN)
        self.task, self.spec = tasks.build(folder.config, folder.spec), folder.spec
        self.model = RunModel(folder, self.task, folder.weights("newest"), "cpu", (), World(0, 1, 0, 1, ""))
    def decode_request(self, request):
        data = base64.b64decode(request["images"][0], validate=True)
        return decode_bytes(data, "image", self.spec.height, self.spec.width, self.spec.channels)
    def batch(self, images):
        return numpy.stack(images)
    def predict(self, pixels):
        return self.task.predict(self.model.outputs(torch.from_numpy(pixels)), 5)
    def unbatch(self, rows):
        return rows
    def encode_response(self, row):
        return {"predictions": [row]}
if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=BATCH, batch_timeout=WAIT), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=PORT, num_api_servers=1, generate_client_file=False, log_level="error")
"""


def environment(*folders: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *folders])}


def distrain(command: str, *keys: str) -> list[str]:
    return [sys.executable, "-m", "distrain", command, *keys]


def make_run(folder: Path, stem: str) -> Path:
    keys = ["data=synthetic", "model=resnet18", f"model.stem={stem}", "trainer.max_steps=2"]
    command = distrain("train", *keys, "logger=none", f"run_dir={folder / 'run'}")
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return folder / "run"


def exported(run: Path, kind: str) -> Path:
    file = run.parent / {"onnx": "model.onnx", "torch_export": "model.pt2"}[kind]
    command = distrain("export", f"run={run}", f"format={kind}", f"output={file}", "check=0")
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return file


def photo() -> bytes:
    """A JPEG of 32x32 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(command: list[str], port: int, *folders: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=environment(*folders), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(f"{command[:4]} has ended ({process.returncode})") from None
                time.sleep(0.2)
        else:
            raise RuntimeError(f"{command[:4]} does not answer")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        finally:
            # LitServe leaves processes behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def ours(model: Path, port: int, threads: int, *keys: str) -> list[str]:
    fixed = [f"run={model}", f"port={port}", f"threads={threads}", f"batch_timeout_ms={WAIT_MS}"]
    which = ["checkpoint=newest"] if model.is_dir() else ["trust_file=true"] if model.suffix == ".pt2" else []
    return distrain("serve", *fixed, *which, *keys)


# --- load ------------------------------------------------------------------------------------------------------------


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def load(port: int, seconds: int, folder: Path, connections: int) -> dict[str, float]:
    (folder / "body.json").write_text(json.dumps({"images": [base64.b64encode(photo()).decode()]}))
    (folder / "post.lua").write_text(SENT_BY_WRK % (folder / "body.json"))
    address = f"http://127.0.0.1:{port}/predict"
    options = ["-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "30s", "-s", str(folder / "post.lua")]
    printed = subprocess.run(["wrk", *options, address], check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    found["rate"] = found["requests"] / found["seconds"]
    return found


def under_load(
    name: str,
    command: list[str],
    port: int,
    seconds: int,
    folder: Path,
    *folders: str,
    connections: int = CONNECTIONS,
) -> dict[str, float]:
    with started(command, port, *folders) as process:
        load(port, 3, folder, connections)
        samples: list[float] = []
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(1):
                samples.append(memory_mb(process.pid))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            found = load(port, seconds, folder, connections)
        finally:
            ended.set()
            sampler.join()
    tenth = max(1, len(samples) // 10)
    print(
        f"{name:18} {found['rate']:8.1f} requests/s, p50 {found['p50']:6.1f} ms, p99 {found['p99']:6.1f} ms, "
        f"{found['errors']:.0f} errors in {found['requests']:.0f} requests, memory "
        f"{np.mean(samples[:tenth]):.0f} -> {np.mean(samples[-tenth:]):.0f} MB",
        flush=True,
    )
    return found


def compare_under_load(run: Path, options: argparse.Namespace, folder: Path) -> None:
    threads, seconds = options.threads, options.seconds
    model = run if options.format is None else exported(run, options.format)
    port = free_port()
    batched = under_load("batching", ours(model, port, threads), port, seconds, folder)
    port = free_port()
    unbatched = ours(model, port, threads, "max_batch_size=1")
    single = under_load("no batching", unbatched, port, seconds // 3, folder)
    # Requests of a full queue wait as long as there are connections.
    fewer = max(2, int(0.9 * CONNECTIONS * batched["p99"] / single["p99"]))
    name = f"no batching, {fewer}"
    limited = under_load(name, unbatched, port, seconds // 3, folder, connections=min(fewer, CONNECTIONS))
    print(
        f"batching: {batched['rate'] / single['rate']:.2f} x the throughput on {CONNECTIONS} connections, "
        f"{batched['rate'] / limited['rate']:.2f} x with the same limit of p99"
    )
    if options.litserve is not None:
        port = free_port()
        (folder / "litserve_server.py").write_text(LITSERVE)
        values = [str(run), str(port), str(threads), str(BATCH), str(WAIT_MS / 1000)]
        command = [sys.executable, str(folder / "litserve_server.py"), *values]
        peer = under_load("LitServe", command, port, seconds // 2, folder, options.litserve)
        print(f"distrain: {batched['rate'] / peer['rate']:.2f} x LitServe")


# --- hostile clients -------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 22), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def post(body: bytes, kind: str, length: int | None = None) -> bytes:
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def hostile_requests() -> dict[str, bytes]:
    sound = photo()
    form = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + sound
    many = json.dumps({"images": [base64.b64encode(sound).decode()] * 2000}).encode()
    return {
        "truncated image": post(sound[: len(sound) // 2], "image/jpeg"),
        "decompression bomb": post(bomb(), "image/png"),
        "noise": post(os.urandom(5000), "image/png"),
        "wrong type": post(sound, "application/x-shockwave-flash"),
        "broken JSON": post(b'{"images": [', "application/json"),
        "deep JSON": post(b"[" * 500_000, "application/json"),
        "JSON of many lists": post(b"[" + b"[]," * 3_000_000 + b"1]", "application/json"),
        "no base64": post(b'{"images": ["%%%"]}', "application/json"),
        "JSON of another shape": post(b'{"images": {"a": 1}}', "application/json"),
        "many images": post(many, "application/json"),
        "truncated form": post(form, "multipart/form-data; boundary=x"),
        "form without boundary": post(form, "multipart/form-data"),
        "form of many parts": post((form + b"\r\n") * 5000, "multipart/form-data; boundary=x"),
        "body too large": post(bytes(11_000_000), "image/png"),
        "announced too large": post(b"x", "image/png", 10**12),
        "body that stops": post(b"x" * 100, "image/png", 5000),
        "header that stops": b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-",
        "endless header": b"POST /predict HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200),
        "wrong method": b"DELETE /predict HTTP/1.1\r\nHost: x\r\n\r\n",
        "wrong path": b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        "wrong number": b"POST /predict?top=-1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    }


async def status_of(port: int, request: bytes) -> int:
    """The status that a request gets; its sender waits for the answer whatever happens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        line = await asyncio.wait_for(reader.readline(), PATIENCE)
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0
    except ConnectionError:
        return 0
    finally:
        writer.close()


def hostile(run: Path, threads: int) -> bool:
    port = free_port()
    requests = hostile_requests()
    names = list(itertools.islice(itertools.cycle(requests), HOSTILE))

    async def send() -> list[int]:
        return await asyncio.gather(*(status_of(port, requests[name]) for name in names))

    with started(ours(run, port, threads, "receive_timeout=5"), port) as process:
        statuses = asyncio.run(send())
        good = asyncio.run(status_of(port, post(photo(), "image/jpeg")))
        alive = process.poll() is None
        memory = memory_mb(process.pid)
    by_name: dict[str, set[int]] = collections.defaultdict(set)
    for name, status in zip(names, statuses, strict=True):
        by_name[name].add(status)
    refused = sum(400 <= status < 500 for status in statuses)
    print(f"{refused} of {len(statuses)} hostile requests got 4xx; then a sound one got {good}; memory {memory:.0f} MB")
    for name, found in by_name.items():
        print(f"  {name:22} {', '.join(map(str, sorted(found)))}")
    return refused == len(statuses) and alive and good == 200


# --- SIGTERM ---------------------------------------------------------------------------------------------------------


async def use(port: int, counts: collections.Counter[str], connections: bool) -> None:
    """Sends requests one after the other on one connection, or each on its own, until the server accepts no more."""
    request = post(photo(), "image/jpeg")
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionError:
            return
        again = True
        while again:
            try:
                writer.write(request)
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                counts["answered" if head.startswith(b"HTTP/1.1 200") else "other status"] += 1
                again = connections and b"connection: close" not in head.lower()
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                counts[f"lost ({type(error).__name__})"] += 1
                again = False
        writer.close()


def stopped(run: Path, threads: int) -> bool:
    port, counts = free_port(), collections.Counter[str]()

    async def clients(process: subprocess.Popen[bytes]) -> None:
        tasks = [asyncio.create_task(use(port, counts, place % 2 == 0)) for place in range(STOPPED_CLIENTS)]
        await asyncio.sleep(3)
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)

    with started(ours(run, port, threads), port) as process:
        asyncio.run(clients(process))
        code = process.wait(PATIENCE)
    print(f"SIGTERM under {STOPPED_CLIENTS} clients: exit code {code}; requests: {dict(counts)}")
    return code == 0 and set(counts) == {"answered"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--format", choices=("onnx", "torch_export"))
    parser.add_argument("--litserve", metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", choices=("load", "hostile", "stop"), default=["load", "hostile", "stop"])
    options = parser.parse_args()
    # As an error, so that the servers are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    holds = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder, options.stem)
        if "load" in options.parts:
            compare_under_load(run, options, folder)
        if "hostile" in options.parts:
            holds &= hostile(run, options.threads)
        if "stop" in options.parts:
            holds &= stopped(run, options.threads)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
