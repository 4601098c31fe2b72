"""Deep nesting, file names, links, pipes and modules beside the data do no harm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.cli import evaluate, hydra_entry
from distrain.cli.run_folder import RunFolder
from distrain.config.load import load_settings
from distrain.runtime.world import World
from tests.data.helpers import source
from tests.runs import CONF
from tests.security.helpers import (
    load_tree,
    one_line_error,
)
from tests.trained import replace_section


@pytest.mark.parametrize("depth", [60, 150, 300, 600, 5000])
def test_deep_nesting_is_refused_in_one_line(run: Path, depth: int) -> None:
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
        assert one_line_error(lambda: RunFolder.open(str(run))).startswith(f"run={run}: {name}")
        (run / name).write_text(whole)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_deep_nesting_in_a_checkpoint_counts_as_damage(run: Path, name: str) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    (path / name).write_text('{"a":' * 50_000)
    assert name in one_line_error(lambda: checkpoint_reader.verify(path), DamagedCheckpoint)
    assert name in one_line_error(lambda: RunFolder.open(str(run)).weights(str(path)))


@pytest.mark.parametrize("name", ["/etc/hostname", "../../config.yaml", "..", ".", "", "logs/../state.json", "a\0b"])
def test_manifest_that_names_a_file_elsewhere_is_refused(run: Path, name: str) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    manifest = (path / "manifest.json").read_text()
    first = next(iter(json.loads(manifest)))
    (path / "manifest.json").write_text(manifest.replace(json.dumps(first), json.dumps(name), 1))
    one_line_error(lambda: checkpoint_reader.verify(path), DamagedCheckpoint)


def test_link_out_of_a_checkpoint_is_not_followed(run: Path, tmp_path: Path) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    for file in sorted(path.iterdir()):
        elsewhere = tmp_path / "elsewhere"
        shutil.move(file, elsewhere)
        file.symlink_to(elsewhere)
        assert f"{file} is a link that leaves" in one_line_error(
            lambda: checkpoint_reader.verify(path), DamagedCheckpoint
        )
        file.unlink()
        shutil.move(elsewhere, file)
    checkpoint_reader.verify(path)


def test_pipe_in_a_run_folder_does_not_block(run: Path) -> None:
    path = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    for file in (path / "manifest.json", path / "state.json", run / "data.json", run / "config.yaml"):
        file.unlink()
        os.mkfifo(file)
        assert file.name in one_line_error(lambda: RunFolder.open(str(run)).weights(str(path)))


def test_untrusted_run_does_not_choose_where_to_write(run: Path, tree: Path, tmp_path: Path) -> None:
    replace_section(run, "data", "data=image_folder", f"data.root={tree}", f"data.cache={tmp_path}/home/of/user")
    composed = load_settings(evaluate.EvaluateSettings, hydra_entry.compose(CONF, "evaluate", [f"run={run}"]))
    folder = RunFolder.open(str(run))
    adapted = evaluate.config_for_evaluation(folder, composed, World.from_environment())
    assert adapted.data.cache is None  # type: ignore[attr-defined]
    # The folder is used if the user's own training has made a cache there.
    source("image_folder", root=str(tree), height=4, width=4, workers=1, cache=f"{tmp_path}/home/of/user").load()
    adapted = evaluate.config_for_evaluation(folder, composed, World.from_environment())
    assert adapted.data.cache == f"{tmp_path}/home/of/user"  # type: ignore[attr-defined]


def test_modules_beside_images_are_not_imported(tree: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "numpy", "PIL", "distrain", "sitecustomize"):
        (tree / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.chdir(tree)
    start: Any = subprocess.Popen

    def as_python_310(*command: Any, env: dict[str, str], **options: Any) -> Any:
        return start(*command, env={name: value for name, value in env.items() if name != "PYTHONSAFEPATH"}, **options)

    monkeypatch.setattr(subprocess, "Popen", as_python_310)
    assert len(load_tree(Path()).train) > 0
