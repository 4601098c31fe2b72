"""Descriptions of clusters: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.errors import ConfigError
from distrain.tools.planning import cluster_file

FILE = """
hosts: 64
ranks_per_host: 8
within: {latency_us: 10, gbit_per_s: 2400}
between: {latency_us: 20, gbit_per_s: 400}
memory_gb: 80
device: {tflops: 120, gbyte_per_s: 2400}
"""


def test_a_file_is_read_in_its_units(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(FILE)
    cluster = cluster_file.read(path)
    assert (cluster.ranks, cluster.memory_bytes) == (512, 80e9)
    assert cluster.between.seconds(50e9) == pytest.approx(1 + 20e-6)
    assert cluster.within.latency == pytest.approx(10e-6)
    assert cluster.accelerator is not None
    assert cluster.accelerator.seconds(120e12, 1.0) == pytest.approx(1.0)
    assert cluster.slowdown_of(8) == 1.0


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("hosts: 64\n", "", "hosts"),
        ("hosts: 64", "hosts: 0", r"hosts=0"),
        ("hosts: 64", "host: 64", "did you mean hosts"),
        ("gbit_per_s: 400", "gbit_per_s: -1", r"between\.gbit_per_s=-1"),
        ("tflops: 120", "tflops: fast", r"device\.tflops: Value 'fast'"),
        (", gbyte_per_s: 2400", "", r"device\.gbyte_per_s"),
        ("memory_gb: 80", "relative_speeds: [1, 0.5]", "relative_speeds has 2 numbers for 64 hosts"),
        (FILE, "- 1", "has no keys"),
        (FILE, "hosts: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(tmp_path: Path, old: str, new: str, problem: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError, match=problem) as refused:
        cluster_file.read(path)
    assert str(refused.value).startswith(f"cluster={path}: ")
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: can't be read \(No such file"):
        cluster_file.read(tmp_path / "none.yaml")
