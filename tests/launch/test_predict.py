"""``launch/predict.py`` as users start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.data.helpers import ROOT, write_image
from tests.harness import HANG_SECONDS
from tests.trained import Refusal, launch


def test_list_of_files_and_folder_give_the_same_rows(run: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        write_image(tmp_path / "in" / name, np.zeros((8, 8, 3), dtype=np.uint8))
    output = tmp_path / "result.json"
    for images in (f"[{tmp_path}/in/a.png,{tmp_path}/in/b.jpg]", f"{tmp_path}/in"):
        launch("predict", f"run={run}", f"input={images}", f"output={output}")
        rows = json.loads(output.read_text())
        assert [row["path"] for row in rows] == [f"{tmp_path}/in/a.png", f"{tmp_path}/in/b.jpg"]
        assert all(0.25 <= row["probability"] <= 1 for row in rows)


def test_wrong_settings_are_one_line_and_exit_code_2(refusal: Refusal, run: Path, tmp_path: Path) -> None:
    assert refusal("predict", f"run={run}").startswith("input: ")
    assert refusal("predict", f"run={run}", "input=x.png") == "input=x.png: is neither a file nor a folder"
    assert refusal("predict", "run=nowhere", "input=x.png") == "run=nowhere: is not a folder"
    (tmp_path / "bad.png").write_text("no image")
    bad = f"input={tmp_path}/bad.png"
    assert refusal("predict", f"run={run}", bad, "on_error=stop").startswith(f"{bad}: can't be")
    assert refusal("predict", f"run={run}", bad).startswith(f"{bad}: none of 1 images can be decoded (cannot identify")


def test_modules_in_the_current_folder_are_not_imported(run: Path, tmp_path: Path) -> None:
    """A run's folder may hold modules that Hydra (as plugins), torch or other packages would import."""
    mark = tmp_path / "imported"
    module = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    for name in ("hydra_plugins/evil/__init__.py", "triton.py", "tensorflow.py", "sitecustomize.py"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(module)
    write_image(run / "a.png", np.zeros((8, 8, 3), dtype=np.uint8))
    command = [sys.executable, str(ROOT / "launch" / "predict.py"), "run=.", "input=a.png"]
    done = subprocess.run(
        command, cwd=run, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=True, timeout=HANG_SECONDS
    )
    assert json.loads(done.stdout)[0]["path"] == "a.png"
    assert not mark.exists()
