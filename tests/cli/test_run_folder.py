"""A run's folder describes the model and its images; whoever wrote it, nothing in it runs code."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import writer as checkpoint_writer
from distrain.cli.run_folder import RunFolder, Weights
from distrain.config.load import to_container
from distrain.errors import ConfigError
from tests.trained import change_config, original, replace_section, run

__all__ = ["original", "run"]


def refused(run: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        RunFolder.open(str(run))
    return str(caught.value)


def newest(run: Path, allow: tuple[str, ...] = ()) -> torch.nn.Module:
    folder = RunFolder.open(str(run))
    return folder.model(folder.weights("newest"), allow)


def test_the_folder_describes_the_run(run: Path) -> None:
    folder = RunFolder.open(str(run))
    assert to_container(folder.config) == yaml.safe_load((run / "config.yaml").read_text())
    assert (folder.spec.channels, folder.spec.height, folder.spec.width) == (3, 8, 8)
    assert folder.spec.classes == ("0", "1", "2", "3")
    data = json.loads((run / "data.json").read_text())
    assert [list(folder.mean), list(folder.std)] == [data["mean"], data["std"]]


def test_a_run_of_an_older_release_without_some_keys_is_read(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    for key in (
        "runtime.shared_memory",
        "trainer.lowest_precision",
        "trainer.test_views",
        "data.augment.crop_border",
        "optimizer.groups",
        "optimizer.lookahead",
    ):
        *path, name = key.split(".")
        del functools.reduce(dict.__getitem__, path, content)[name]
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert newest(run).training is False


def test_the_model_has_the_weights_of_the_checkpoint(run: Path) -> None:
    model = newest(run)
    saved = checkpoint_reader.load_model(checkpoint_format.list_checkpoints(run / "checkpoints")[-1])
    assert model.state_dict().keys() == saved.keys()
    assert all(tensor.equal(saved[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- nothing in it runs code -----------------------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that an importable module creates when it is imported."""
    mark = tmp_path / "it_ran"
    (tmp_path / "planted.py").write_text(
        f"from pathlib import Path\nfrom distrain.models.cnn import SimpleCNN as Net\nPath({str(mark)!r}).touch()\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    return mark


@pytest.mark.parametrize(
    ("target", "kwargs"),
    [
        ("planted.Net", {}),
        ("os.system", {"command": "true"}),
        ("distrain.models.build.importlib", {}),
        ("distrain.models.build.locate", {"key": "", "path": "planted.Net"}),
        ("distrain.models.build.instantiate_model", {"config": {"_target_": "planted.Net"}}),
        ("distrain.models.build.inspect.importlib.import_module", {"name": "planted"}),
        ("distrain.models_planted.Net", {}),
        ("torch.nn.Linear", {"in_features": 1, "out_features": 1}),
    ],
)
def test_only_models_of_distrain_are_built(run: Path, planted: Path, target: str, kwargs: dict[str, Any]) -> None:
    change_config(run, model={"name": "custom", "_target_": target, "kwargs": kwargs})
    with pytest.raises(ConfigError, match=r"^model\.") as caught:
        newest(run)
    assert "\n" not in str(caught.value)
    assert not planted.exists()
    assert "planted" not in sys.modules


def test_a_named_choice_builds_no_other_class(run: Path, planted: Path) -> None:
    change_config(run, model={"_target_": "planted.Net"})
    with pytest.raises(ConfigError, match=r"model\._target_=planted\.Net: model=simple_cnn is distrain\.models\.cnn\."):
        newest(run)
    assert not planted.exists()


@pytest.mark.parametrize("candidate", ["kwargs", "other"])
def test_no_nested_choice_is_imported_from_elsewhere(run: Path, planted: Path, candidate: str) -> None:
    replace_section(run, "compression", "compression=auto")
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["compression"]["candidates"][candidate] = {"name": "planted.Net"}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert f"compression.candidates.{candidate}.name=planted.Net: is not below distrain.models" in refused(run)
    assert not planted.exists()


def test_an_allowed_model_is_built(run: Path, planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(run, model={"name": "custom", "_target_": "planted.Net", "kwargs": {}})
    # It is imported from the current folder, as in training, not from where the tests are.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(planted.parent)])
    monkeypatch.chdir(planted.parent)
    with pytest.raises(ConfigError, match="allow="):
        newest(run, ("other",))
    model = newest(run, ("planted", "distrain.models.cnn"))
    assert planted.exists()
    assert type(model).__name__ == "SimpleCNN"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run_dir: ${oc.env:HOME}", "config.yaml:run_dir=${oc.env:HOME}: is an interpolation"),
        ("seed: ${oc.decode:'1'}", "is an interpolation"),
        ("'${oc.env:HOME}': 1", "is an interpolation"),
        ("x: !!python/object/apply:os.system ['touch MARK']", "is not plain YAML"),
        ("x: !!python/name:os.system", "is not plain YAML"),
        ("x: !!binary aGVsbG8=", "is a bytes"),
        ("x: 2001-01-01", "is a date"),
        ("x: 2001-99-99", "is not plain YAML"),
        ("? [1]\n: 2", "is not plain YAML"),
        ("1: 2", "is not a valid key"),
        ("x: &many [a, a]\ny: [*many, *many]", "has YAML aliases"),
        ("x: " + "[" * 1500, "is nested more than 32 deep"),
        ("x:\n" + "".join(" " * level + "-\n" for level in range(1, 200)), "is nested more than 32 deep"),
        ("x: [", "is not plain YAML"),
        ("sed: 1", "sed: no such key"),
        ("seed: ???", "config.yaml says seed"),
        ("seed: one", "config.yaml says seed"),
        ("model: {name: [simple_cnn], _target_: a.b}", "unknown choice"),
        ("strategy: ddp", "config.yaml says strategy=ddp"),
    ],
)
def test_a_configuration_that_is_not_plain_data_is_refused_in_one_line(
    run: Path, tmp_path: Path, line: str, message: str
) -> None:
    mark = tmp_path / "it_ran"
    content = yaml.safe_load((run / "config.yaml").read_text())
    content.pop(line.partition(":")[0], None)
    (run / "config.yaml").write_text(yaml.safe_dump(content) + line.replace("MARK", str(mark)) + "\n")
    text = refused(run)
    assert text.startswith(f"run={run}: config.yaml")
    assert message in text
    assert "\n" not in text
    assert str(Path.home()) not in text.replace(str(run), "")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["config.yaml", "data.json"])
def test_a_file_with_other_content_is_refused(run: Path, name: str) -> None:
    for content, message in [
        (b"\xff\xfe\x00", f"{name} "),
        (b"- 1", f"{name} is not"),
        (b"", f"{name} is not"),
        (b"#" * ((1 << 24) + 1), "has more than"),
    ]:
        (run / name).write_bytes(content)
        assert message in refused(run)
    (run / name).unlink()
    assert f"has no {name}; is it a run's folder?" in refused(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, "needs channels, a whole number of at least 1"),
        ({"height": 8.0}, "needs height"),
        ({"width": True}, "needs width"),
        ({"width": None}, "needs width"),
        ({"classes": "cat"}, "needs classes"),
        ({"classes": ["a", 1]}, "needs classes"),
        ({"mean": [0.5]}, "needs mean, a list of 3 numbers"),
        ({"mean": [0.5, 0.5, float("nan")]}, "needs mean"),
        ({"std": [0.5, 0.5, "1"]}, "needs std"),
        ({"std": [0.5, 0.5, 0]}, "has a std that is not above 0"),
        ({"class_weights": [1, 1, 1]}, "needs class_weights, a list of 4 numbers of at least 0"),
        ({"class_weights": [1, 1, 1, -1]}, "needs class_weights"),
    ],
)
def test_invalid_data_is_refused(run: Path, changes: dict[str, Any], message: str) -> None:
    content = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**content, **changes}))
    assert f"data.json {message}" in refused(run)


# --- which checkpoint ------------------------------------------------------------------------------------------------


def weights(run: Path, which: str = "newest") -> Weights:
    return RunFolder.open(str(run)).weights(which)


def set_progress(path: Path, **changes: Any) -> None:
    """Changes the progress in a checkpoint, with a valid manifest."""
    state, progress = checkpoint_reader.load(path)
    step = int(path.name[5:])
    saved = checkpoint_writer.save(
        path.parent / "again", {**state, "compressor": {}, "local": {}}, {**progress, "step": step, **changes}
    )
    shutil.rmtree(path)
    saved.rename(path)


def test_checkpoints_are_found_as_newest_as_best_and_by_path(run: Path) -> None:
    first, last = checkpoint_format.list_checkpoints(run / "checkpoints")
    set_progress(last, best_step=int(first.name[5:]))
    assert (weights(run).path, weights(run).step) == (last, int(last.name[5:]))
    assert (weights(run, "best").path, weights(run, "best").step) == (first, int(first.name[5:]))
    assert weights(run, str(first)).tensors.keys() == weights(run).tensors.keys()
    shutil.rmtree(first)
    with pytest.raises(ConfigError, match=rf"checkpoint=best: {first} was removed"):
        weights(run, "best")


def test_a_damaged_newest_checkpoint_is_skipped_and_a_damaged_chosen_one_refused(run: Path) -> None:
    first, last = checkpoint_format.list_checkpoints(run / "checkpoints")
    file = last / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert weights(run).path == first
    with pytest.raises(ConfigError, match=r"checkpoint=.*: .*model\.safetensors has \d+ bytes, not"):
        weights(run, str(last))


def test_a_missing_checkpoint_is_reported(run: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint=nowhere: is not a checkpoint's folder; choices: newest, best, "):
        weights(run, "nowhere")
    with pytest.raises(ConfigError, match=r"checkpoint=.*manifest\.json is missing|state\.json is missing"):
        weights(run, str(run))
    set_progress(checkpoint_format.list_checkpoints(run / "checkpoints")[-1], best_step=None)
    with pytest.raises(ConfigError, match="the run has no validation score to choose by"):
        weights(run, "best")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=r"run=.*: has no complete checkpoint yet"):
        weights(run)


def test_another_checkpoint_is_read_if_a_run_in_progress_removes_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = checkpoint_format.list_checkpoints(run / "checkpoints")
    load_model = checkpoint_reader.load_model

    def slow(path: Path, average: str | None = None) -> Any:
        if path == last:
            shutil.rmtree(last)
        return load_model(path, average)

    monkeypatch.setattr(checkpoint_reader, "load_model", slow)
    assert weights(run).path == first


@pytest.mark.parametrize("progress", [None, {}, {"step": "1", "best_step": None}, {"step": 1, "best_step": "../../x"}])
def test_invalid_progress_of_a_checkpoint_is_refused(run: Path, progress: object) -> None:
    last = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    state = json.loads((last / "state.json").read_text())
    (last / "state.json").write_text(json.dumps({**state, "progress": progress}))
    with pytest.raises(ConfigError, match=r"state\.json: (progress|scalars)\S* (is missing|must be)"):
        weights(run, str(last))


def test_weights_of_another_model_are_refused(run: Path) -> None:
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**data, "classes": ["a", "b", "c"]}))
    with pytest.raises(ConfigError, match=r"checkpoint=.*: the saved model is not this model: output\.weight is \(4, "):
        newest(run)


def test_data_without_classes_are_refused_by_the_classification_task(run: Path) -> None:
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**data, "classes": []}))
    with pytest.raises(ConfigError, match=r"task\.name: classification needs data that name their classes"):
        newest(run)
