"""A fake training that logs, saves, fails and resumes like distrain within milliseconds, or misbehaves if asked to.

``python fake_training.py ranks=2 steps=40 [wrong=…] run_dir=…`` is the launcher; it starts itself once for each rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

STEP_SECONDS = 0.01
#: A rank that gets one of these saves and stops.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGINT)
SAVE_EVERY = 5
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def main() -> None:
    keys = dict(argument.split("=", 1) for argument in sys.argv[1:])
    run = Path(keys["run_dir"])
    if "RANK" not in os.environ:
        sys.exit(launch(int(keys.get("ranks", 2)), run, keys.get("wrong", "")))
    if os.environ["RANK"] != "0":
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: sys.exit(75))
        time.sleep(600)
    train(run, int(keys["steps"]), keys.get("wrong", ""))


# --- launcher and other ranks -----------------------------------------------------------------------------------------


def launch(ranks: int, run: Path, wrong: str) -> int:
    run.joinpath("logs").mkdir(parents=True, exist_ok=True)
    for name in ("failure.json", "stopped.json"):
        run.joinpath(name).unlink(missing_ok=True)
    command = [sys.executable, *sys.argv]
    children = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}, start_new_session=True)
        for rank in range(ranks)
    ]
    signal.signal(signal.SIGTERM, lambda *_: children[0].send_signal(signal.SIGUSR1))
    if wrong == "orphan":
        subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
    failed = None
    while children[0].poll() is None and failed is None:
        failed_ranks = [rank for rank, child in enumerate(children) if child.poll() or is_stopped(child.pid)]
        if failed_ranks and children[failed_ranks[0]].poll() == 75:
            # The rank that got SIGUSR1 passes it on to rank 0, which saves.
            children[0].send_signal(signal.SIGUSR1)
            break
        if failed_ranks:
            failed = failed_ranks[0]
        time.sleep(0.005)
    if failed is None:
        code = children[0].wait()
        failed = 0 if code not in (0, 75) else None
    if failed is not None and wrong != "silent":
        run.joinpath("failure.json").write_text(
            json.dumps({"rank": 1 - failed if wrong == "blame" else failed, "error": "lost"})
        )
    for child in children:
        child.kill()
        child.wait()
    return 1 if failed is not None else code


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


# --- rank 0 ----------------------------------------------------------------------------------------------------------


def train(run: Path, steps: int, wrong: str) -> None:
    stop: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: stop.append(received))
    step, value = resume(run, wrong)
    with run.joinpath("metrics.jsonl").open("ab", buffering=0) as metrics:
        while step < steps:
            step, value = step + 1, (value * 1103515245 + 12345) % 2**31
            try:
                metrics.write(json.dumps({"kind": "step", "step": step, "time": time.time()}).encode() + b"\n")
                if step % SAVE_EVERY == 0 or stop:
                    save(run / "checkpoints", step, value)
            except OSError as error:
                print(f"not saved: {error}", file=sys.stderr, flush=True)
            if stop:
                run.joinpath("stopped.json").write_text(json.dumps({"step": 0 if wrong == "stop" else step}))
                os._exit(75)
            time.sleep(STEP_SECONDS)
    if wrong == "chance":
        save(run / "checkpoints", steps, time.time_ns())
    # The final save is repeated until it succeeds: a full disk at the end is not under test.
    run.joinpath("checkpoints").mkdir(exist_ok=True)
    while not run.joinpath("checkpoints", f"step_{steps:08d}").is_dir():
        with contextlib.suppress(OSError):
            save(run / "checkpoints", steps, value)
    run.joinpath("summary.json").write_text(json.dumps({"steps": steps}))


def resume(run: Path, wrong: str) -> tuple[int, int]:
    newest = None
    for path in sorted(run.glob("checkpoints/step_*")):
        problem = damage(path)
        if wrong == "believes" or problem is None:
            newest = path
        else:
            log(run, f"WARNING checkpoint left out: {problem}")
    if newest is None or wrong == "forgets":
        cut(run / "metrics.jsonl", 0)
        return 0, 1
    step = int(newest.name[5:])
    # wrong=rows loses the row of the checkpoint's own step, which was logged whenever the fault struck.
    cut(run / "metrics.jsonl", step - 1 if wrong == "rows" else step)
    log(run, f"INFO resumed from {newest}: step {step}, epoch 0")
    try:
        value = int.from_bytes((newest / "model.safetensors").read_bytes()[-8:], "little")
    except OSError:
        value = 0
    return step, value + (1 if wrong == "sum" else 0)


def cut(path: Path, step: int) -> None:
    rows = path.read_text().splitlines() if path.exists() else []
    # Replaced at once: a fault may kill this process while it resumes, and no row may be lost then.
    shorter = path.with_suffix(".shorter")
    shorter.write_text("".join(f"{row}\n" for row in rows if step_of(row) <= step))
    shorter.replace(path)


def step_of(row: str) -> float:
    """The step of a row; infinite if the row was cut off by a full disk, perhaps with another one behind it."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def log(run: Path, line: str) -> None:
    with run.joinpath("logs", "rank_0.log").open("a") as file:
        file.write(line + "\n")


def damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in FILES:
            if manifest[name]["sha256"] != hashlib.sha256((path / name).read_bytes()).hexdigest():
                return f"{path / name} differs"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path} can't be read"
    return None


def save(folder: Path, step: int, value: int) -> None:
    temporary, final = folder / f".step_{step:08d}.0", folder / f"step_{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "model.safetensors").write_bytes(pack_tensor("w", value))
    (temporary / "optimizer.safetensors").write_bytes(pack_tensor("w/moment", value // 2))
    state = {
        "progress": {
            "step": step, "epoch": 0, "epoch_samples": step, "samples": step, "epoch_sums": [], "train_loss": None,
            "val_score": None, "best_score": None, "best_step": None,
        },
        "scalars": {"optimizer_name": "sgd", "optimizer": {}, "precision": {}},
        "layout": {"strategy": "single", "world_size": 1, "mesh": {}},
    }  # fmt: skip
    (temporary / "state.json").write_text(json.dumps(state))
    contents = {name: (temporary / name).read_bytes() for name in FILES}
    manifest = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest))
    time.sleep(STEP_SECONDS)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for path in sorted(folder.glob("step_*"))[:-3]:
        shutil.rmtree(path)


def pack_tensor(name: str, value: int) -> bytes:
    """A safetensors file with one integer, made without the slow import of the package."""
    header = json.dumps({name: {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<q", value)


if __name__ == "__main__":
    main()
