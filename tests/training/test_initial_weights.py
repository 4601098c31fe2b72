"""A run starts from other weights: what fits is loaded, the rest is new and said, and every strategy starts alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import distrain
from distrain.checkpoint import weight_files
from distrain.cli import app
from distrain.config.schema import Config, InitConfig
from distrain.errors import ConfigError
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.training import initial_weights
from tests.harness import run_ranks
from tests.runs import relative_difference, small, train_on_rank


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ten classes."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    app.train(small("data.classes=10", "trainer.epochs=2", f"run_dir={folder}"))
    return folder


def start(weights: object, *overrides: str, steps: int = 3) -> Config:
    """The configuration of a short run on four classes that starts from some weights."""
    return small(f"init.weights={weights}", f"trainer.max_steps={steps}", "scheduler=constant", *overrides)


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What the terminal showed of initial weights, line by line."""
    lines = capfd.readouterr().err.splitlines()
    return [line for line in lines if line.startswith(("initial weights", "  new ", "  left over"))]


def test_a_head_of_another_size_stays_new(pretrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    app.train(start(pretrained, f"run_dir={tmp_path}"))
    head, new, *_ = said(capfd)
    count = len(weight_files.read(pretrained))
    assert head.startswith(f"initial weights from {pretrained}: {count - 2} of the model's {count} tensors, ")
    assert new.startswith("  new ([4, ")
    assert "the file has [10, " in new


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [("ddp", 2), ("ddp", 3), ("pipeline", 2), ("local_sgd", 2), ("parameter_server", 3)],
)
def test_every_strategy_starts_from_the_same_weights(
    strategy: str, ranks: int, pretrained: Path, tmp_path: Path
) -> None:
    """Before the first update: the checkpoint of step 1 of a run whose learning rate is next to nothing."""
    options = ("optimizer=sgd", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "trainer.precision=fp64")
    single = run_ranks(train_on_rank, 1, start(pretrained, *options, f"run_dir={tmp_path}/single", steps=1))
    several = (f"strategy={strategy}", f"run_dir={tmp_path}/several")
    run_ranks(train_on_rank, ranks, start(pretrained, *options, *several, steps=1))
    found = weight_files.read(tmp_path / "several")
    expected = single[0]["model"]
    assert relative_difference(found, expected) <= 1e-12
    given = weight_files.read(pretrained)
    names = [name for name in expected if given[name].shape == expected[name].shape]
    assert len(names) > 4
    learned = {name: given[name] for name in names if not name.endswith(("running_mean", "running_var"))}
    assert relative_difference({name: found[name] for name in learned}, learned) <= 1e-12


def test_a_resumed_run_needs_its_first_weights_no_more(
    pretrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = Path(shutil.copytree(pretrained, tmp_path / "weights"))
    whole = train(start(weights, f"run_dir={tmp_path}/whole", steps=4))
    train(start(weights, f"run_dir={tmp_path}/run", steps=2))
    shutil.rmtree(weights)
    capfd.readouterr()
    resumed = train(start(weights, "init.exclude=[x]", f"run_dir={tmp_path}/run", steps=4))
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    assert "init" not in capfd.readouterr().err.replace("initial_weights", "")


def test_a_run_whose_checkpoints_are_all_damaged_starts_from_its_weights_again(
    pretrained: Path, tmp_path: Path
) -> None:
    config = start(pretrained, "checkpoint.keep=1", f"run_dir={tmp_path}")
    whole = train(config)
    for file in tmp_path.glob("checkpoints/step_*/model.safetensors"):
        file.write_bytes(b"")
    again = train(config)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def train(config: Config) -> dict[str, Tensor]:
    """Trains in this process; returns the model at the end."""
    app.train(config)
    assert config.run_dir is not None
    # Copies, since the files are mapped into memory.
    return {name: tensor.clone() for name, tensor in weight_files.read(Path(config.run_dir)).items()}


def test_lora_keeps_the_weights_it_starts_from_and_is_evaluated_and_exported_merged(
    pretrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", tmp_path / "merged.safetensors"
    config = start(pretrained, "lora.rank=3", "lora.alpha=6", "optimizer.lr=0.1", f"run_dir={run}")
    app.train(config)
    said = capfd.readouterr().err
    assert "LoRA of rank 3, alpha / rank = 2, in dense.linear: " in said
    assert "  new (not in the file): dense.linear.lora_a, dense.linear.lora_b" in said
    given, trained = weight_files.read(pretrained), weight_files.read(run)
    kept = [name for name in given if not name.startswith("output.")]
    assert all(torch.equal(trained[name], given[name]) for name in kept)
    assert bool(trained["dense.linear.lora_b"].any())
    distrain.export(run, file)
    exported = safetensors.torch.load_file(file)
    assert exported.keys() == given.keys()
    update = 2 * trained["dense.linear.lora_b"] @ trained["dense.linear.lora_a"]
    assert torch.allclose(exported["dense.linear.weight"], given["dense.linear.weight"] + update, atol=1e-7)
    found = distrain.evaluate(run)
    summary = json.loads((run / "summary.json").read_text())
    assert found["accuracy"] == summary["test_accuracy"]
    assert found["loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    with pytest.raises(ConfigError, match="are those of a run with LoRA"):
        app.train(start(run, f"run_dir={tmp_path}/other"))
    with pytest.raises(ConfigError, match=r"another configuration: lora.alpha: 6.0 → 3.0; "):
        app.train(start(pretrained, "lora.rank=3", "lora.alpha=3", f"run_dir={run}"))
    app.train(start(file, f"run_dir={tmp_path}/next"))
    assert "initial weights from" in capfd.readouterr().err


class Tied(nn.Module):
    """Two names of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2)


SAVED = {"first.weight": torch.eye(3), "head.weight": torch.ones(2, 3), "head.bias": torch.zeros(2)}


def load(saved: dict[str, Tensor], folder: Path, model: nn.Module | None = None, **keys: Any) -> nn.Module:
    """A model with weights from a file; by default the one with tied tensors."""
    model = Tied() if model is None else model
    safetensors.torch.save_file(saved, folder / "saved.safetensors")
    config = InitConfig(weights=str(folder / "saved.safetensors"), **keys)
    initial_weights.check(config, model)
    with Runtime(small(f"run_dir={folder}/run"), World.from_environment()) as runtime:
        initial_weights.load(config, runtime, model)
    return model


def test_one_name_of_a_tied_tensor_is_enough(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load(SAVED, tmp_path)
    assert torch.equal(model.get_parameter("second.weight"), torch.eye(3))
    assert said(capfd)[0].endswith(": 3 of the model's 3 tensors, 17 values")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_removed(prefix: str, tmp_path: Path) -> None:
    model = load({prefix + name: value for name, value in SAVED.items()}, tmp_path)
    assert torch.equal(model.get_parameter("head.weight"), torch.ones(2, 3))


def test_names_are_replaced_one_after_the_other(tmp_path: Path) -> None:
    saved = {"net.layer1.weight": torch.eye(3), "net.fc.weight": torch.ones(2, 3)}
    model = load(saved, tmp_path, rename=[[r"^net\.", ""], [r"^layer1\b", "first"], [r"^fc\.(\w+)$", r"head.\1"]])
    assert torch.equal(model.get_parameter("first.weight"), torch.eye(3))
    assert torch.equal(model.get_parameter("head.weight"), torch.ones(2, 3))


def test_what_is_excluded_stays_new_and_what_is_left_over_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Tied()
    before = model.head.weight.detach().clone()
    load({**SAVED, "other": torch.ones(1)}, tmp_path, model, exclude=["head.*"])
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.first.weight, torch.eye(3))
    assert said(capfd)[1:] == ["  new (excluded): head.weight, head.bias", "  left over, not in the model: other"]


def test_values_take_the_models_number_format(tmp_path: Path) -> None:
    model = load({name: value.half() for name, value in SAVED.items()}, tmp_path, Tied().double())
    assert model.get_parameter("first.weight").dtype == torch.float64


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "other names": ({"a.b": torch.ones(1)}, {}, "has no tensor of the model: it has a.b; the model has first.weight"),
    "a prefix": (
        {f"backbone.{name}": value for name, value in SAVED.items()},
        {},
        'type \'init.rename=[["^backbone\\.",""]]\'',
    ),
    "other shapes": ({"head.weight": torch.ones(5, 3)}, {}, "head.weight is [2, 3], the file has [5, 3]"),
    "a counter alone": (
        {"0.weight": torch.ones(9), "0.num_batches_tracked": torch.tensor(3)},
        {"model": nn.Sequential(nn.BatchNorm2d(2))},
        "no tensor fits the model: 0.weight is [2], the file has [9]",
    ),
    "everything excluded": (SAVED, {"exclude": ["*"]}, "no tensor fits the model: first.weight is excluded"),
    "a pattern without a match": (SAVED, {"exclude": ["fc.*"]}, "init.exclude=fc.*: matches no name; the model has"),
    "no regular expression": (
        SAVED,
        {"rename": [["(", ""]]},
        "init.rename=['(', '']: is not a pair of a reg",
    ),
    "no pair": (SAVED, {"rename": [["a", "b", "c"]]}, "too many values to unpack"),
    "no such group": (SAVED, {"rename": [["head", r"\1"]]}, "invalid group reference 1"),
    "two of one name": (SAVED, {"rename": [["weight|bias", "x"]]}, "gives two tensors the name 'head.x'"),
    "NaN": ({**SAVED, "head.bias": torch.tensor([1.0, torch.nan])}, {}, "head.bias has values that are NaN or infin"),
}


@pytest.mark.parametrize(("saved", "keys", "problem"), REFUSED.values(), ids=REFUSED)
def test_weights_that_do_not_fit_are_refused_in_one_line(
    saved: dict[str, Tensor], keys: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(saved, tmp_path, **keys)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_that_is_suggested_for_a_prefix_works_on_the_command_line(tmp_path: Path) -> None:
    config = small('init.rename=[["^backbone\\.",""]]', "init.exclude=[head.*]")
    assert config.init.rename == [[r"^backbone\.", ""]]
    assert config.init.exclude == ["head.*"]


def other_weights_on_each_rank(folder: Path) -> str:
    world = World.from_environment()
    weights = folder / f"{world.rank}.safetensors"
    safetensors.torch.save_file({**SAVED, "head.bias": torch.full((2,), float(world.rank))}, weights)
    with Runtime(small("strategy=ddp", f"run_dir={folder}/run"), world) as runtime:
        try:
            initial_weights.load(InitConfig(weights=str(weights)), runtime, Tied())
        except ConfigError as error:
            return str(error)
    return ""


def test_ranks_with_different_files_are_named(tmp_path: Path) -> None:
    for found in run_ranks(other_weights_on_each_rank, 2, tmp_path):
        assert "rank 1 on " in found
        assert "has other weights under this name than rank 0 on " in found
