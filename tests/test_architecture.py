"""The house: imports go down only, families do not know one another, names explain, files stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "textdiffusion"
FLOORS = [
    {"errors", "files", "distributed", "stopping", "noise", "schedules", "grids", "gaussian", "categorical"}
    | {"cross_entropy", "tokenizer", "worlds"}
    | {"automaton", "patterns"}
    | {"networks.shape", "networks.attention", "networks.candidates", "networks.clock", "networks.convolution"}
    | {"networks.ngrams", "networks.network", "networks.transformer", "networks.unet", "networks.bodies"}
    | {"networks.dit", "networks.pretrained"},
    {"process", "drafts", "conditioning", "guidance", "absorbing", "replacing", "coded"}
    | {"steps.unmasking", "steps.renewing", "steps.ordering", "steps.denoising"},
    {"families"},  # and every file in families/
    {"data", "windows", "shards", "preparing", "sharding"}
    | {"settings", "training", "sampling", "constraints", "particles", "steering", "editing"}
    | {"evaluation", "divergence", "ranking", "template", "deterministic_order", "pacing", "recommendation"},
    {"config", "checkpoints", "run", "presets", "card", "fit", "model", "loading", "report", "catalogue"}
    | {"verification", "frames", "plots", "replay", "watching"}  # and every file in replay/ and verification/
    | {"backbones", "fetching", "published", "hub", "harness", "tracking", "adaptation"},
    {"doctor", "terminal", "demo", "flags", "corpus", "describing", "cli", "__main__"}
    | {"compare", "ui"},  # and every file in compare/ and ui/
]


def rooms() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "networks", "steps"):
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def floor(room: str) -> int:
    if room.startswith("families."):
        return 2
    room = room.split(".")[0] if room.startswith(("replay.", "verification.", "compare.", "ui.")) else room
    matches = [i for i, names in enumerate(FLOORS) if room in names]
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


def test_no_import_circles():
    graph = {room: imports(tree, ROOMS) for room, tree in ROOMS.items()}

    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " -> ".join((*path, room))
        for other in graph.get(room, ()):
            visit(other, (*path, room))

    for room in graph:
        visit(room, ())


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
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in SOURCE.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            assert path.stem in readme, f"README's tree lacks {path.name}"
