"""The source uses no function that could run the data that it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.data.helpers import ROOT

_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
_CALLS = {"eval", "exec", "compile", "__import__"}
#: Functions and methods with these names run code, or read formats that can contain code.
_NAMES = {
    "load_module", "exec_module", "system", "popen", "run_path", "run_module", "execfile",
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list", "unsafe_load", "full_load", "load_all", "read_pickle",
    "dist_cp", "extractall", "unpack_archive",
}  # fmt: skip

#: Reads what its own parent process wrote a moment before, in a folder that only its user can open.
_OWN_PICKLE = ("distrain/api/handover.py", "import of cloudpickle")


def dangerous_uses(tree: ast.AST) -> Iterator[str]:
    """What a source file uses that could run code in data, as ``line: what``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            for name in names:
                if name.partition(".")[0] in _MODULES or name.startswith("torch.distributed.checkpoint"):
                    yield f"{node.lineno}: import of {name}"
        elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
            yield f"{node.lineno}: {node.attr}"
        elif isinstance(node, ast.Call):
            yield from _dangerous_call(node)


def _dangerous_call(node: ast.Call) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    name = ast.unparse(node.func)

    def is_true(option: str) -> bool:
        return isinstance(given.get(option), ast.Constant) and given[option].value is True  # type: ignore[attr-defined]

    if name in _CALLS:
        yield f"{node.lineno}: {name}"
    if name == "torch.load" and not is_true("weights_only"):
        yield f"{node.lineno}: torch.load without weights_only=True"
    if name == "yaml.load":
        yield f"{node.lineno}: yaml.load"
    if name.endswith(("np.load", "numpy.load")) and "allow_pickle" in given:
        yield f"{node.lineno}: allow_pickle"
    if "shell" in given:
        yield f"{node.lineno}: shell"


@pytest.mark.parametrize("folder", ["distrain", "launch"])
def test_source_has_no_dangerous_call(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{name}:{line}"
        for file in files
        for line in dangerous_uses(ast.parse(file.read_text()))
        if ((name := file.relative_to(ROOT).as_posix()), line.partition(": ")[2]) != _OWN_PICKLE
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import torch.distributed.checkpoint as dcp",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader)",
        "np.load(path, allow_pickle=True)",
        "dist.all_gather_object(found, mine)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "archive.extractall(folder)",
        "os.system(text)",
    ],
)
def test_dangerous_call_is_found(line: str) -> None:
    assert len(list(dangerous_uses(ast.parse(line)))) == 1
