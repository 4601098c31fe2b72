"""What a rank finds out about its host without talking to anybody."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

import distrain
from distrain.runtime.device import available_cores
from distrain.runtime.world import World
from distrain.tools.doctor import interfaces

#: Packages whose version matters to a run.
_PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "omegaconf")


@dataclass(frozen=True)
class Facts:
    """One rank and its host; plain data, so that it travels as JSON.

    Attributes:
        rank: The rank.
        host: The host's name.
        machine: Tells machines apart that share a name.
        local_rank: Its number among the host's ranks.
        local_size: How many ranks the host has.
        versions: By package; ``distrain`` is its version and a hash of its code.
        interface: The interface that gloo uses.
        address: That interface's address; empty where there is none.
        why: Why gloo uses it.
        named: Whether ``GLOO_SOCKET_IFNAME`` says so.
        nccl_interfaces: What NCCL may take.
        interfaces: All interfaces' addresses by name.
        route: This host's address on the way to where ranks meet.
        own_name: What the host's own name leads to; empty where it doesn't resolve.
        cores: CPU cores that the process may use.
        quota: CPU time that its container may use, in cores; ``None`` for no limit.
        numa_nodes: How many parts the machine's memory has.
        threads: What ``OMP_NUM_THREADS`` asks for; ``None`` where it is not set.
        gpus: Each GPU's name.
        gpu_links: How GPUs are joined, one line a pair.
        backends: What torch can talk by.
    """

    rank: int
    host: str
    machine: str
    local_rank: int
    local_size: int
    versions: dict[str, str]
    interface: str
    address: str
    why: str
    named: bool
    nccl_interfaces: list[str]
    interfaces: dict[str, str]
    route: str
    own_name: str
    cores: int
    quota: float | None
    numa_nodes: int
    threads: int | None
    gpus: list[str]
    gpu_links: list[str]
    backends: list[str]

    @property
    def place(self) -> str:
        """How messages name it."""
        return f"rank {self.rank} on {self.host}"


def gather(world: World, meeting_place: str) -> Facts:
    """Examines this rank.

    Args:
        world: Its place.
        meeting_place: Name or address of the host where ranks meet; empty for none.
    """
    choice, here = interfaces.gloo_choice(), interfaces.addresses()
    met = interfaces.resolve(meeting_place).address if meeting_place else ""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return Facts(
        rank=world.rank,
        host=world.host,
        machine=_machine(),
        local_rank=world.local_rank,
        local_size=world.local_size,
        versions=versions(),
        interface=choice.interface,
        address=choice.address,
        why=choice.why,
        named=bool(os.environ.get("GLOO_SOCKET_IFNAME")),
        nccl_interfaces=interfaces.nccl_choices(here),
        interfaces=here,
        route=interfaces.towards(met) if met else interfaces.towards(),
        own_name=interfaces.resolve(socket.gethostname()).address,
        cores=available_cores(),
        quota=cpu_quota(),
        numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        threads=int(threads) if threads.isdigit() else None,
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        gpu_links=_gpu_links(),
        backends=[name for name in ("gloo", "nccl", "mpi") if dist.is_backend_available(name)],
    )


def versions() -> dict[str, str]:
    """What must not differ between hosts."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    found["distrain"] = f"{distrain.__version__} ({code_hash(Path(distrain.__file__).parent)})"
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["gpu driver"] = _driver()
    return found


def code_hash(folder: Path) -> str:
    """Eight digits that change with any Python file below a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:8]


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cores' worth of time that limits of control groups leave, a container's say; ``None`` without one."""
    limits = []
    lines = own.read_text().splitlines() if own.exists() else []
    inner = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    # A limit holds for all groups below it.
    for folder in {root / inner, *(root / inner).parents}:
        if (folder / "cpu.max").exists() and folder.is_relative_to(root):
            quota, period = (folder / "cpu.max").read_text().split()
            limits += [int(quota) / int(period)] if quota != "max" else []
    # Version 1 of control groups.
    if (root / "cpu/cpu.cfs_quota_us").exists():
        micros = int((root / "cpu/cpu.cfs_quota_us").read_text())
        limits += [micros / int((root / "cpu/cpu.cfs_period_us").read_text())] if micros > 0 else []
    return min(limits, default=None)


def _machine() -> str:
    parts = []
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    if boot.exists():
        parts.append(boot.read_text().strip())
    if network.exists():
        # Containers of one machine are hosts of their own.
        parts.append(str(network.stat().st_ino))
    return "/".join(parts) or platform.node()


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)*", path.read_text()) if path.exists() else None
    return found[0] if found else "unknown"


def _gpu_links() -> list[str]:
    """``GPU0 - GPU1: NV18`` and so on, by nvidia-smi; by what CUDA says of peer access without it."""
    count = torch.cuda.device_count()
    if count < 2:
        return []
    try:
        table = subprocess.run(["nvidia-smi", "topo", "-m"], check=True, capture_output=True, text=True, timeout=20)
        return parse_topology(table.stdout, count)
    except (OSError, subprocess.SubprocessError):
        pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
        return [
            f"GPU{first} - GPU{second}: "
            + ("peer access" if torch.cuda.can_device_access_peer(first, second) else "no peer access")
            for first, second in pairs
        ]


def parse_topology(table: str, count: int) -> list[str]:
    """The pairs of the first ``count`` GPUs in what ``nvidia-smi topo -m`` prints."""
    rows = {}
    for line in re.sub(r"\x1b\[[0-9;]*m", "", table).splitlines():
        name, *cells = line.split()[: count + 1] or [""]
        if re.fullmatch(r"GPU\d+", name) and len(cells) == count and "GPU" not in cells[0]:
            rows[int(name.removeprefix("GPU"))] = cells
    return [
        f"GPU{first} - GPU{second}: {rows[first][second]}"
        for first in sorted(rows)
        for second in range(first + 1, count)
    ]
