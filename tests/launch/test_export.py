"""``launch/export.py`` as users start it, and its file as plain torch reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from distrain.cli.run_folder import RunFolder
from tests.harness import HANG_SECONDS
from tests.trained import Refusal, launch, save_test_images

#: Prints the class of each image of a folder, with plain torch and without distrain.
SCORE = """
import json, pathlib, sys
import numpy, torch
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F
with safe_open(sys.argv[1], "pt") as file:
    t = {name: file.get_tensor(name) for name in file.keys()}
    about = {name: json.loads(file.metadata()[name]) for name in ("classes", "mean", "std")}
files = sorted(pathlib.Path(sys.argv[2]).iterdir())
x = torch.stack([torch.from_numpy(numpy.array(Image.open(path))) for path in files]).permute(0, 3, 1, 2) / 255
x = (x - torch.tensor(about["mean"]).view(-1, 1, 1)) / torch.tensor(about["std"]).view(-1, 1, 1)
for block in ("block1", "block2"):
    x = F.max_pool2d(F.relu(F.conv2d(x, t[block + ".conv.weight"], t[block + ".conv.bias"], padding=1)), 2)
x = F.relu(F.linear(x.flatten(1), t["dense.linear.weight"], t["dense.linear.bias"]))
x = F.linear(x, t["output.weight"], t["output.bias"])
assert "distrain" not in sys.modules
print(json.dumps([about["classes"][i] for i in x.argmax(1).tolist()]))
"""


def test_exported_model_has_the_same_test_accuracy_in_plain_torch(run: Path, tmp_path: Path) -> None:
    launch("export", f"run={run}", "format=safetensors", f"output={tmp_path}/model.safetensors")
    labels = save_test_images(RunFolder.open(str(run)).config, tmp_path / "images")
    command = [sys.executable, "-I", "-c", SCORE, str(tmp_path / "model.safetensors"), str(tmp_path / "images")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=HANG_SECONDS)
    right = sum(name == str(label) for name, label in zip(json.loads(done.stdout), labels, strict=True))
    assert right == json.loads((run / "summary.json").read_text())["test_correct"]


def test_wrong_settings_are_one_line_and_exit_code_2(refusal: Refusal, run: Path) -> None:
    assert refusal("export", f"run={run}").startswith("output: ")
    assert refusal("export", f"run={run}", "output=m", "format=pickle").startswith(
        "format=pickle: unknown choice; choices:"
    )
    assert refusal("export", "run=nowhere", "output=m") == "run=nowhere: is not a folder"
