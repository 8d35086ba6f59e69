"""The house: imports go down only, families do not know one another, names explain, files stay readable."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "textdiffusion"
# Folders, and the files that stand in none.
FLOORS = [
    {"errors", "files", "progress", "tensors", "mathematics", "networks", "parallel", "text", "machine"},
    {"process", "diffusion"},
    {"families"},
    {"settings", "sampling", "evaluation"},
    {"backbones", "config", "run", "presets", "model", "loading", "report", "catalogue", "training"}
    | {"exchange", "display", "verification", "harness"},
    {"doctor", "commands", "compare", "ui", "__main__"},
]


def rooms() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def floor(room: str) -> int:
    matches = [i for i, names in enumerate(FLOORS) if room.split(".")[0] in names]
    assert matches, f"{room} has no floor: say in tests/test_architecture.py where it belongs"
    return matches[0]


def imports(tree: ast.Module, every: dict[str, ast.Module]) -> set[str]:
    """Rooms that a file imports, at its top or inside functions; for type checking only does not count."""
    found: set[str] = set()
    guarded = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for n in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            plain = (alias.name for alias in node.names)
            found |= {name.removeprefix("textdiffusion.") for name in plain if name.startswith("textdiffusion.")}
        assert not isinstance(node, ast.ImportFrom) or not node.level, "imports say where they come from"
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("textdiffusion")
            and id(node) not in guarded
        ):
            module = (node.module or "").removeprefix("textdiffusion").lstrip(".")
            for alias in node.names:
                deeper = f"{module}.{alias.name}".lstrip(".")
                found.add(deeper if deeper in every else module)
    return {f for f in found if f}


ROOMS = rooms()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room):
    for other in imports(ROOMS[room], ROOMS):
        assert floor(other) <= floor(room), f"{room} imports {other}, which stands above it"
        if room.startswith("families.") and other.startswith("families."):
            pytest.fail(f"{room} imports another family, {other}")
        if floor(other) == 2 and floor(room) == 3:
            pytest.fail(f"{room} knows a family; it may know Process only")


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way through the graph that comes back to where it has been; empty if there is none."""
    cleared: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path, node]
        if node in cleared:
            return []
        found = next((way for other in graph.get(node, ()) if (way := visit(other, [*path, node]))), [])
        cleared.add(node)
        return found

    return next((way for node in graph if (way := visit(node, []))), [])


def test_no_import_circles():
    graph = {room: imports(tree, ROOMS) for room, tree in ROOMS.items()}
    assert not circle(graph)
    folders: dict[str, set[str]] = {}
    for room, others in graph.items():
        own = room.split(".")[0]
        folders.setdefault(own, set()).update(other.split(".")[0] for other in others if other.split(".")[0] != own)
    assert not circle(folders), "folders that import one another are one folder"


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_room_has_a_purpose_and_a_size():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path.name == "__main__.py" or ast.get_docstring(ast.parse(text)), f"{path} does not say what it is for"
        assert len(text.splitlines()) <= 420, f"{path} is too long to read"
        assert not any(word in path.stem for word in ("util", "helper", "common", "misc"))


def test_public_functions_say_what_they_do():
    for name, tree in ROOMS.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


def test_nothing_is_unpickled():
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, path
        for call in text.split("torch.load(")[1:]:
            # Published checkpoints are pickled: of them only tensors are read.
            assert path.name == "published.py" and "weights_only=True" in call.split(")")[0], path


def test_the_readme_draws_the_tree_as_it_is():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("src/textdiffusion/   ", 1)[1].split("```")[0]
    drawn = set()
    for line in tree.splitlines()[1:]:
        names = re.split(r" {2,}", line.strip())
        folder = names.pop(0) if names[0].endswith("/") else ""
        drawn |= {folder + name + ".py" for name in names[0].split()} if names and folder != "shipped/" else set()
    there = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if not path.stem.startswith("__")}
    assert drawn == there
