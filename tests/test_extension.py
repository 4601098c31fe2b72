"""Each kind of part can be added from outside the repository, as one Python file and one YAML file.

The parts below are written into a temporary package, which trains: a data set of points with two targets by name, a
model, a task that is no classification, a strategy and a compressor. Then every strategy of distrain trains the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader
from tests.harness import HANG_SECONDS, soaked
from tests.runs import LAUNCH

PARTS = {
    "data": (
        "Spots",
        """
        from dataclasses import dataclass

        import torch

        from distrain.config.registry import register
        from distrain.config.schema import DataConfig, setting
        from distrain.data.base import DataSource, DataSpec, Images, Splits, assemble


        @dataclass
        class SpotsConfig(DataConfig):
            train_size: int = setting("Images to train on.", at_least=2)


        @register("data", "spots", SpotsConfig)
        class Spots(DataSource):
            '''A bright pixel somewhere, of some brightness.'''

            def __init__(self, config: SpotsConfig) -> None:
                self.config = config

            def describe(self) -> DataSpec:
                return DataSpec(channels=1, height=6, width=6)

            def load(self) -> Splits:
                return assemble(self.config, self.describe(), self.draw(self.config.train_size, 0), self.draw(23, 1))

            def draw(self, count: int, seed: int) -> Images:
                generator = torch.Generator().manual_seed(seed)
                place = torch.randint(6, (count, 2), generator=generator)
                light = torch.randint(100, 256, (count,), generator=generator)
                images = torch.zeros(count, 1, 6, 6, dtype=torch.uint8)
                images[torch.arange(count), 0, place[:, 0], place[:, 1]] = light.to(torch.uint8)
                return Images(images, {"place": place / 5, "light": light / 255})
        """,
        """
        train_size: 47
        root: null
        batch_size: 10
        eval_batch_size: 7
        val_fraction: 0.2
        split_seed: 0
        limit: null
        mean: null
        std: null
        augment: {flip: false, crop_padding: 0, cutout: 0}
        memory_limit_mb: 64
        prefetch: null
        """,
    ),
    "model": (
        "Pair",
        """
        from torch import nn

        from distrain.config.registry import register
        from distrain.config.schema import ModelConfig
        from distrain.models.base import BlockSequence


        @register("model", "pair", ModelConfig)
        class Pair(BlockSequence):
            '''Two blocks.'''

            def __init__(self, num_classes: int) -> None:
                first = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh())
                super().__init__({"first": first, "second": nn.Linear(16, num_classes)})
        """,
        "_target_: lab.model.Pair",
    ),
    "task": (
        "Locate",
        """
        from distrain.config.registry import register
        from distrain.config.schema import TaskConfig
        from distrain.tasks.base import Task


        @register("task", "locate", TaskConfig)
        class Locate(Task):
            '''Regression: where the spot is and how bright.'''

            metrics = ("absolute_error",)
            higher_is_better = False
            output_size = 3

            def loss(self, outputs, targets):
                place = (outputs[:, :2].float() - targets["place"]).square().sum()
                return place + (outputs[:, 2].float() - targets["light"]).square().sum(), len(outputs)

            def measure(self, outputs, targets):
                return (outputs[:, :2] - targets["place"]).abs().sum().double().unsqueeze(0)

            def metric_state(self, device):
                import torch

                return {"error": torch.zeros(1, dtype=torch.float64, device=device)}

            def update_state(self, state, outputs, targets):
                state["error"] += self.measure(outputs, targets)

            def results(self, state, count):
                return {"absolute_error": float(state["error"]) / count}

            def predict(self, outputs, top):
                return [{"row": row, "column": column, "light": light} for row, column, light in outputs.tolist()]
        """,
        "",
    ),
    "strategy": (
        "Averaging",
        """
        from dataclasses import dataclass

        from distrain.communication.collectives import Communicator
        from distrain.config.registry import register
        from distrain.config.schema import StrategyConfig, setting
        from distrain.strategies.replicated import Replicated


        @dataclass
        class AveragingConfig(StrategyConfig):
            greeting: str = setting("A key of its own.")


        @register("strategy", "averaging", AveragingConfig)
        class Averaging(Replicated[AveragingConfig]):
            '''Data parallelism in one bucket.'''

            def __init__(self, config, runtime):
                super().__init__(config, runtime)
                assert self.options.greeting == "hello"
                self.mesh = runtime.mesh({"data": runtime.world.size})
                self.replicas = Communicator(self.mesh.get_group("data") if self.mesh else None, self.ledger)
                self.data_shard = (self.replicas.rank, self.replicas.size)

            def setup(self, model, task, make_optimizer, example):
                self.sync_initial_state(model, self.replicas)
                super().setup(model, task, make_optimizer, example)
        """,
        "greeting: hello",
    ),
    "compression": (
        "Doubled",
        """
        from distrain.compression.base import Compressor
        from distrain.config.registry import register
        from distrain.config.schema import CompressionConfig


        @register("compression", "doubled", CompressionConfig)
        class Doubled(Compressor):
            '''Sends gradients as float64.'''

            def aggregate(self, bucket, communicator):
                wide = bucket.flat.double()
                yield communicator.start_all_reduce(wide)
                bucket.flat.copy_(wide)
        """,
        "",
    ),
}

#: The same images as those of ``Spots``, read one at a time in worker processes.
ITEMS = """
from distrain.config.registry import register
from distrain.data.base import Splits, assemble
from distrain.data.items import Items
from distrain.data.reading import ItemReader
from distrain.data.workers import ItemWorkers
from lab.data import Spots, SpotsConfig


class Reader(ItemReader):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], None


@register("data", "spot_items", SpotsConfig)
class SpotItems(Spots):
    def load(self) -> Splits:
        workers = ItemWorkers(1)
        parts = [self.draw(self.config.train_size, 0), self.draw(23, 1)]
        spec = self.describe()
        train, test = (Items.of(Reader(part.images), spec, workers, part.targets) for part in parts)
        return assemble(self.config, spec, train, test)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package ``lab`` and its configuration."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab").mkdir()
    (folder / "lab" / "__init__.py").touch()
    for group, (name, python, keys) in PARTS.items():
        (folder / "lab" / f"{group}.py").write_text(textwrap.dedent(python))
        (folder / "conf" / group).mkdir(parents=True)
        content = f"name: lab.{group}.{name}\n{textwrap.dedent(keys)}"
        (folder / "conf" / group / "mine.yaml").write_text(content)
    (folder / "lab" / "items.py").write_text(ITEMS)
    keys = textwrap.dedent(PARTS["data"][2])
    (folder / "conf" / "data" / "items.yaml").write_text(f"name: lab.items.SpotItems\n{keys}")
    return folder


def run(
    lab: Path, script: str, *arguments: str, ranks: int = 1, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a file of ``launch/`` in the folder above the package, which is then importable; or with it on ``path``."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, "-W", "ignore", *launcher, str(LAUNCH / f"{script}.py"), *arguments]
    paths = os.pathsep.join(map(str, [LAUNCH.parent, *([path] if path else [])]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=lab, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )


def train(lab: Path, name: str, *overrides: str, ranks: int = 1) -> Mapping[str, Tensor]:
    """Trains two epochs with the package's data, model and task; returns the last checkpoint's model."""
    mine = ("data=mine", "model=mine", "task=mine", f"run_dir={lab / name}", "--config-dir", str(lab / "conf"))
    fixed = ("trainer.epochs=2", "logger=none", "trainer.progress=off", "trainer.memory_format=contiguous")
    done = run(lab, "train", *overrides, *fixed, *mine, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return reader.load_model(checkpoint_format.list_checkpoints(checkpoint_format.checkpoints_folder(lab / name))[-1])


@pytest.fixture(scope="module")
def serial(lab: Path) -> Mapping[str, Tensor]:
    return train(lab, "serial", "optimizer=sgd", "optimizer.lr=0.05")


STRATEGIES = [
    ("strategy=mine", "compression=mine"),
    ("strategy=ddp",),
    ("strategy=pipeline", "strategy.microbatches=2"),
    ("strategy=local_sgd", "strategy.sync_every=1", "strategy.warmup_steps=0"),
    ("strategy=parameter_server",),
]


@pytest.mark.parametrize(
    "strategy",
    soaked(STRATEGIES, STRATEGIES[:3:2]),
    ids=lambda strategy: strategy[0].partition("=")[2],
)
def test_every_strategy_trains_a_task_with_named_targets_as_one_process_does(
    lab: Path, serial: dict[str, Tensor], strategy: tuple[str, ...]
) -> None:
    name = strategy[0].partition("=")[2]
    model = train(lab, name, *strategy, "optimizer=sgd", "optimizer.lr=0.05", ranks=2)
    assert model.keys() == serial.keys()
    for key, tensor in serial.items():
        torch.testing.assert_close(model[key], tensor, rtol=1e-4, atol=1e-6)
    summary = json.loads((lab / name / "summary.json").read_text())
    expected = json.loads((lab / "serial" / "summary.json").read_text())
    assert summary["test_count"] == 23
    for key in ("train_loss", "val_absolute_error", "test_absolute_error", "test_loss"):
        assert summary[key] == pytest.approx(expected[key], rel=1e-4)


@pytest.mark.parametrize("place", ["current folder", pytest.param("installed", marks=pytest.mark.soak)])
def test_a_data_set_of_a_package_is_read_by_worker_processes_and_trains_the_same(
    lab: Path, serial: dict[str, Tensor], tmp_path: Path, place: str
) -> None:
    mine = ("data=items", "model=mine", "task=mine", f"run_dir={tmp_path / 'run'}", "--config-dir", str(lab / "conf"))
    fixed = ("trainer.epochs=2", "logger=none", "trainer.progress=off", "trainer.memory_format=contiguous")
    keys = ("nproc=2", "strategy=ddp", "optimizer=sgd", "optimizer.lr=0.05", *fixed, *mine)
    folder, path = (lab, None) if place == "current folder" else (tmp_path, lab)
    done = run(folder, "train", *keys, path=path)
    assert done.returncode == 0, done.stderr
    newest = checkpoint_format.list_checkpoints(checkpoint_format.checkpoints_folder(tmp_path / "run"))[-1]
    for key, tensor in reader.load_model(newest).items():
        torch.testing.assert_close(tensor, serial[key], rtol=1e-4, atol=1e-6)


def test_commands_read_a_run_of_the_package_only_if_it_is_allowed(lab: Path, serial: dict[str, Tensor]) -> None:
    refused = run(lab, "evaluate", f"run={lab / 'serial'}")
    assert refused.returncode == 2
    assert "model.name=lab.model.Pair: is not below distrain.models" in refused.stderr
    evaluated = run(lab, "evaluate", f"run={lab / 'serial'}", "allow=[lab]")
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads((lab / "serial" / "evaluation_test.json").read_text())
    expected = json.loads((lab / "serial" / "summary.json").read_text())
    assert found["absolute_error"] == pytest.approx(expected["test_absolute_error"], rel=1e-6)
    exported = run(lab, "export", f"run={lab / 'serial'}", "allow=[lab]", f"output={lab / 'model.safetensors'}")
    assert exported.returncode == 0, exported.stderr


def test_a_path_that_is_no_choice_is_refused_in_one_line(lab: Path) -> None:
    for name, problem in (
        ("lab.task.Task", "is not a choice of task; decorate it with @register('task', NAME, SCHEMA)"),
        ("lab.task.Nothing", "module lab.task has no Nothing"),
        ("nowhere.Task", "can't be imported"),
    ):
        (lab / "conf" / "task" / "wrong.yaml").write_text(f"name: {name}\n")
        done = run(lab, "train", "task=wrong", "--config-dir", str(lab / "conf"))
        assert done.returncode == 2
        assert done.stderr.startswith(f"distrain: task.name={name}: ")
        assert problem in done.stderr
        assert done.stderr.count("\n") == 1
