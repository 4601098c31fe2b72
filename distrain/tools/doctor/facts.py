"""What a rank can find out about its host without communicating with other ranks."""

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
from distrain.runtime.device import available_cores, choose_threads
from distrain.runtime.world import World
from distrain.tools.doctor import interfaces

#: Packages whose version may change or break a run.
_PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "omegaconf")


@dataclass(frozen=True)
class RankFacts:
    """One rank and its host; plain data that can be sent as JSON.

    Attributes:
        rank: The rank.
        host: The host's name.
        machine: Identifies the machine; differs between machines that share a name.
        local_rank: The rank's number among the ranks of its host.
        local_size: Number of ranks on the host.
        versions: Version of each package; that of ``distrain`` includes a hash of its code.
        interface: The network interface that gloo uses.
        address: That interface's address; empty if it has none.
        why: Why gloo uses this interface.
        named: Whether ``GLOO_SOCKET_IFNAME`` is set.
        nccl_interfaces: Interfaces that NCCL may use.
        interfaces: Address of each interface, by name.
        route: This host's address on the route to the rendezvous.
        own_name: The address to which the host's own name resolves; empty if it does not resolve.
        cores: Number of CPU cores that the process may use.
        quota: CPU limit of the process's container, in cores; ``None`` for no limit.
        numa_nodes: Number of NUMA nodes.
        threads: CPU threads that a training takes in this rank unless ``runtime.threads`` says otherwise.
        gpus: Name of each GPU.
        gpu_links: How GPUs are connected, one line per pair.
        backends: Backends that torch was built with.
        apple_gpu: Whether torch can use an Apple GPU here.
        load: Processes that ran or waited for a processor in the last minute, on average, per processor of the host; 0
            where the system doesn't say.
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
    threads: int
    gpus: list[str]
    gpu_links: list[str]
    backends: list[str]
    apple_gpu: bool = False
    load: float = 0.0

    @property
    def label(self) -> str:
        """The rank and its host, as messages name them."""
        return f"rank {self.rank} on {self.host}"


def gather_facts(world: World, rendezvous_host: str) -> RankFacts:
    """Examines this rank and its host.

    Args:
        world: This rank's place among all ranks.
        rendezvous_host: Name or address of the host where ranks meet; empty if there is none.
    """
    choice, here = interfaces.gloo_choice(), interfaces.addresses()
    rendezvous_address = interfaces.resolve(rendezvous_host).address if rendezvous_host else ""
    return RankFacts(
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
        route=interfaces.source_address(rendezvous_address) if rendezvous_address else interfaces.source_address(),
        own_name=interfaces.resolve(socket.gethostname()).address,
        cores=available_cores(),
        quota=cpu_quota(),
        numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        threads=choose_threads(None, world),
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        gpu_links=_gpu_links(),
        backends=[name for name in ("gloo", "nccl", "mpi") if dist.is_backend_available(name)],
        apple_gpu=torch.backends.mps.is_available(),
        load=_load(),
    )


def _load() -> float:
    # Windows lacks it, and some containers refuse it.
    if not hasattr(os, "getloadavg"):
        return 0.0
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return 0.0


def versions() -> dict[str, str]:
    """Returns the versions that should be the same on all hosts, by package."""
    by_package = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            by_package[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            by_package[package] = "none"
    by_package["distrain"] = f"{distrain.__version__} ({code_hash(Path(distrain.__file__).parent)})"
    if torch.cuda.is_available():
        by_package["cuda"] = str(torch.version.cuda)
        by_package["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        by_package["gpu driver"] = _driver()
    return by_package


def code_hash(folder: Path) -> str:
    """Returns eight hexadecimal digits that change with any Python file below a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:8]


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Returns the CPU limit of this process's control groups, such as a container's, in cores; ``None`` for no limit.

    Args:
        root: Where control groups are mounted.
        own: File that names this process's control group.
    """
    limits = []
    lines = own.read_text().splitlines() if own.exists() else []
    inner = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    # A group's limit holds for all groups below it.
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
        # Containers of one machine have their own network, so they count as different hosts.
        parts.append(str(network.stat().st_ino))
    return "/".join(parts) or platform.node()


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    version = re.search(r"\d+\.\d+(\.\d+)*", path.read_text()) if path.exists() else None
    return version[0] if version else "unknown"


def _gpu_links() -> list[str]:
    """Returns lines like ``GPU0 - GPU1: NV18`` from nvidia-smi, or CUDA's peer access where nvidia-smi is missing."""
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
    """Returns the link between each pair of the first ``count`` GPUs from the output of ``nvidia-smi topo -m``."""
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
