"""The rooms of the package, in the order in which a reader walks through them, and what they may import."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "distrain"
#: From the top down: a room imports rooms that stand below it, and never one above.
LAYERS = (
    "__main__",
    "api",
    "cli",
    "tools",
    "verification",
    "training",
    "strategies",
    "gradients",
    "compression",
    "tasks",
    "optim",
    "models",
    "data",
    "checkpoint",
    "reporting",
    "runtime",
    "communication",
    "health",
    "config",
    "errors",
    "files",
    "rng",
    "torch_internals",
)
MOST_ROOMS, MOST_LOOSE_MODULES, MOST_LINES = 24, 6, 500
#: Longer files that hold one idea, which halves would not be easier to read.
ONE_IDEA = frozenset[str]()


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def annotations_only(module: str) -> set[int]:
    """Nodes below ``if TYPE_CHECKING:``, which run nothing."""
    blocks = [node for node in ast.walk(tree(module)) if isinstance(node, ast.If)]
    guarded = [node for node in blocks if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"]
    return {id(inner) for block in guarded for inner in ast.walk(block)}


def imports(module: str, *, with_annotations: bool = True) -> set[str]:
    """Modules of the package that a module imports, also inside functions."""
    skipped = set() if with_annotations else annotations_only(module)
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules()}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & modules().keys()
            found |= submodules or ({node.module} & modules().keys())
    return found - {module}


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Tarjan's strongly connected components of more than one node."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_rooms_are_few_and_each_has_a_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert len(folders | loose) <= MOST_ROOMS
    assert len(loose) <= MOST_LOOSE_MODULES
    assert folders | loose - {"__init__"} == set(LAYERS)


def test_nothing_is_imported_from_a_room_above() -> None:
    layer = {module: LAYERS.index(name) for module in modules() if (name := room(module)) is not None}
    above = [(a, b) for a in layer for b in imports(a) if b in layer and layer[b] < layer[a]]
    assert above == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: imports(module) for module in modules()}
    # A package's __init__ and what it imports to register it are one thing.
    graph = {
        module: {other for other in others if not module.startswith(f"{other}.")} for module, others in graph.items()
    }
    assert circles(graph) == []


def test_a_package_passes_no_names_on() -> None:
    """Its ``__init__`` holds a docstring, and imports of modules that register choices.

    The one exception is ``distrain/__init__.py``: its names are what users write, ``distrain.fit``.
    """
    other = []
    for module, path in modules().items():
        if module == "distrain":
            continue
        for node in tree(module).body if path.name == "__init__.py" else ():
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            registers = isinstance(node, ast.ImportFrom) and all(
                f"{node.module}.{alias.name}" in modules() for alias in node.names
            )
            if not (docstring or registers):
                other.append((module, ast.unparse(node)))
    assert other == []


def test_names_are_imported_from_where_they_are_defined() -> None:
    """A name that a module only imported is nobody else's to import from it."""
    wrong = []
    for module in modules():
        for node in ast.walk(tree(module)):
            if not isinstance(node, ast.ImportFrom) or node.module not in modules():
                continue
            held = {alias.asname or alias.name: other for other in (node.module,) for alias in imported(other)}
            wrong += [
                f"{module}: {alias.name} from {node.module}"
                for alias in node.names
                if alias.name in held and f"{node.module}.{alias.name}" not in modules()
            ]
    assert wrong == []


def imported(module: str) -> list[ast.alias]:
    """What a module imports at its top."""
    return [alias for node in tree(module).body if isinstance(node, ast.ImportFrom) for alias in node.names]


def test_files_are_short_enough_to_hold_in_the_head() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in modules().items()}
    assert {module: count for module, count in lines.items() if count > MOST_LINES and module not in ONE_IDEA} == {}


def test_the_loop_is_on_one_screen() -> None:
    assert len(modules()["distrain.training.trainer"].read_text().splitlines()) <= 250
