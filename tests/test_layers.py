"""The house's layering, read off the imports: no circle, no arrow back up, each library in its room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = ["tasks", "slides", "bags", "features", "evaluation", "pictures", "prediction", "learning", "auditing"]
# What each wing may import of the project besides core and itself; the doors come after all of them.
BEFORE = {
    "tasks": set(), "slides": set(), "bags": {"slides", "tasks"}, "features": {"slides", "bags"},
    "evaluation": {"tasks"},
    "pictures": {"slides", "bags"},
    "prediction": {"tasks", "slides", "bags", "features", "evaluation", "pictures", "MILS"},
    "learning": {"tasks", "slides", "bags", "evaluation", "prediction", "MILS"},
    "auditing": {"bags", "evaluation", "learning"},
}  # fmt: skip
DOORS = {path.stem for path in (ROOT / "utils").glob("*.py")} - {"__init__"}
LIBRARIES = {
    "openslide": {"utils/slides/open_slides.py", "utils/slides/find.py"},
    "tifffile": {
        "utils/slides/tiff.py", "utils/slides/tiff_images.py", "utils/slides/tiff_colours.py", "utils/slides/tiles.py",
        "datasets/synthetic.py",
    },
    "h5py": {"utils/bags"},
    "timm": {"utils/features/networks.py"},
    "huggingface_hub": {"utils/features/weights.py"},
    "matplotlib": {
        "utils/pictures", "utils/core/plots.py", "utils/evaluation/prediction_figures.py",
        "utils/evaluation/comparison_figures.py", "utils/learning/learning_curves.py", "utils/slides/preview.py",
    },
    "argparse": {"utils/core/cli.py"},
    "ray": set(),  # the engine imports it when it is asked for
}  # fmt: skip
FILES = sorted(path for part in ("MILS", "utils", "datasets") for path in (ROOT / part).rglob("*.py"))
SCRIPTS = [ROOT / name for name in ("extractFeatures.py", "train.py", "predict.py")]


def imports(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its room; write the whole name"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def rooms(path: Path) -> set[str]:
    """The project's rooms a file imports: MILS, core, a wing, or a door as utils/<door>."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in ("MILS", "datasets", "tests"):
            found.add(parts[0])
        elif parts[0] == "utils" and len(parts) > 1:
            found.add(f"utils/{parts[1]}" if parts[1] in DOORS else parts[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path):
    place = path.relative_to(ROOT).parts
    found = rooms(path)
    if place[0] == "MILS":
        allowed = {"MILS"}
    elif place[0] == "datasets":
        allowed = {"core", *WINGS, "MILS", "datasets", *(f"utils/{door}" for door in DOORS)}
    elif len(place) == 2:
        allowed = {"core", *WINGS, "MILS"}
    elif place[1] == "core":
        allowed = {"core"}
    else:
        allowed = {"core", place[1], *BEFORE[place[1]]}
    assert found <= allowed, f"{path} imports {found - allowed}"


def test_no_files_import_each_other_in_a_circle():
    """Not even late, within a function, or for types only."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    following = {module: {name for name in imports(path) if name in modules} for module, path in modules.items()}
    while ends := [module for module, names in following.items() if not names & following.keys()]:
        for module in ends:
            del following[module]
    assert not following, f"a circle among {', '.join(sorted(following))}"


def test_what_evaluates_predictions_needs_no_torch():
    modules = "utils.evaluation.closing_table, utils.evaluation.outputs, utils.evaluation.paired_tests"
    loaded = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, check=False).returncode == 0
    for path in (ROOT / "utils" / "evaluation").glob("*.py"):
        assert "torch" not in {name.split(".")[0] for name in imports(path)}, path


def test_a_worker_process_begins_without_torch():
    """Its import takes seconds, and comes with the work that needs it."""
    modules = "utils.core.engine, utils.core.processes, utils.core.ray_actor"
    loaded = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_library_is_imported_only_in_its_room(path):
    place = path.relative_to(ROOT).as_posix()
    for library in {name.split(".")[0] for name in imports(path)} & LIBRARIES.keys():
        assert any(place == room or place.startswith(f"{room}/") for room in LIBRARIES[library]), f"{place}: {library}"


def test_the_models_are_pure_torch():
    for path in (ROOT / "MILS").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {"MILS", "torch", "__future__"}
        assert outside <= {"collections", "contextlib", "difflib", "functools", "inspect", "math", "typing"}, path


def test_nothing_imports_the_scripts():
    for path in FILES:
        assert not imports(path) & {"train", "predict", "extractFeatures"}, path


def test_the_wings_are_imported_from_their_files():
    for wing in [*WINGS, "core"]:
        assert (ROOT / "utils" / wing / "__init__.py").read_text() == ""


@pytest.mark.parametrize("name", ["extractFeatures.py", "train.py", "predict.py"])
def test_a_script_stays_a_recipe(name):
    assert len((ROOT / name).read_text().splitlines()) < 120
