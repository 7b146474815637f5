"""The house as CONTRIBUTING draws it: arrows point down, no circle, and no import inside a function hides one."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# from the bottom up; a module imports from its own floor and those below it
FLOORS = [
    ("modeling", "dataset_scripts", "errors", "files", "machine", "processes", "version"),
    ("data", "training", "evaluation"),
    ("hub", "visualization", "benchmark"),
    ("pretrain", "finetun", "evaluate_", "compare", "demo", "check"),
    ("cli",),
]
LAZY = ("simipu_hf", "simipu_hf.cli")  # import when something is used: the public names, and commands when they run
TRAVELS_ALONE = ("simipu_hf.modeling", "simipu_hf.dataset_scripts")  # to the Hub


def modules() -> dict[str, Path]:
    """Our modules by the name under which they are imported."""
    found = {}
    for folder in ("modeling", "dataset_scripts", "simipu_hf"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "simipu_hf" else ("simipu_hf", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, inside_functions: bool = False) -> set[str]:
    """Our modules that a module imports; only those imported inside a function, on request."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    nodes = [node for function in functions for node in ast.walk(function)] if inside_functions else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {other for other in found if other in MODULES and other not in (name, "simipu_hf")}


def floor(name: str) -> int:
    room = name.split(".")[1]
    return next(level for level, rooms in enumerate(FLOORS) if room.startswith(rooms))


ROOMS = [name for name in MODULES if name != "simipu_hf"]


def test_arrows_point_down():
    up = [f"{name} -> {other}" for name in ROOMS for other in imports(name) if floor(other) > floor(name)]
    assert not up


def test_what_travels_to_the_hub_imports_nothing_else():
    for name in ROOMS:
        room = ".".join(name.split(".")[:2])
        if room in TRAVELS_ALONE:
            assert all(other.startswith(room) for other in imports(name)), name


def test_no_circle():
    TopologicalSorter({name: imports(name) for name in ROOMS}).prepare()  # a CycleError names the modules


def test_no_function_hides_an_arrow():
    # the sparse encoder's library takes seconds to import; no arrow is hidden, it stands on the same floor
    allowed = {"simipu_hf.modeling.sparse_encoder", "simipu_hf.modeling"}
    hidden = {name: imports(name, inside_functions=True) - allowed for name in MODULES if name not in LAZY}
    assert not {name: others for name, others in hidden.items() if others}


def test_contributing_draws_these_floors():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = next(block for block in re.findall(r"```.*?```", text, flags=re.S) if "cli" in block)
    order = [min(picture.index(room) for room in rooms if room in picture) for rooms in reversed(FLOORS)]
    assert order == sorted(order), "CONTRIBUTING's picture has the floors in another order"
    rooms = ("pretrain", "hub", "visualization", "benchmark", "data", "training", "evaluation", "modeling")
    for room in (*rooms, "files", "machine"):
        assert room in picture
