"""The layers of the code, read from its imports: no circle, no import of a later folder, each library in its place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["tasks", "slides", "bags", "features", "evaluation", "pictures", "prediction", "learning", "auditing"]
# What each folder of utils may import besides core and itself; the public modules of utils may import all of them.
IMPORTABLE = {
    "tasks": set(), "slides": set(), "bags": {"slides", "tasks"}, "features": {"slides", "bags"},
    "evaluation": {"tasks"},
    "pictures": {"tasks", "slides", "bags"},
    "prediction": {"tasks", "slides", "bags", "features", "evaluation", "pictures", "MILS"},
    "learning": {"tasks", "slides", "bags", "evaluation", "prediction", "MILS"},
    "auditing": {"bags", "evaluation", "learning", "tasks"},
}  # fmt: skip
PUBLIC = {path.stem for path in (ROOT / "utils").glob("*.py")} - {"__init__"}
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
        "utils/pictures", "utils/core/plots.py", "utils/core/fonts.py", "utils/evaluation/prediction_figures.py",
        "utils/evaluation/comparison_figures.py", "utils/evaluation/regression_figures.py",
        "utils/evaluation/survival_figures.py", "utils/learning/learning_curves.py",
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
            assert node.level == 0, f"{path}: a relative import hides its folder; write the whole name"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def folders(path: Path) -> set[str]:
    """The project's folders a file imports: MILS, core, a folder of utils, or a public module as utils/<module>."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in ("MILS", "datasets", "tests"):
            found.add(parts[0])
        elif parts[0] == "utils" and len(parts) > 1:
            found.add(f"utils/{parts[1]}" if parts[1] in PUBLIC else parts[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_folder_may(path):
    place = path.relative_to(ROOT).parts
    found = folders(path)
    if place[0] == "MILS":
        allowed = {"MILS"}
    elif place[0] == "datasets":
        allowed = {"core", *FOLDERS, "MILS", "datasets", *(f"utils/{module}" for module in PUBLIC)}
    elif len(place) == 2:
        allowed = {"core", *FOLDERS, "MILS"}
    elif place[1] == "core":
        allowed = {"core"}
    else:
        allowed = {"core", place[1], *IMPORTABLE[place[1]]}
    assert found <= allowed, f"{path} imports {found - allowed}"


def test_no_files_import_each_other_in_a_circle():
    """Not even late, within a function, or for types only."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    following = {module: {name for name in imports(path) if name in modules} for module, path in modules.items()}
    while ends := [module for module, names in following.items() if not names & following.keys()]:
        for module in ends:
            del following[module]
    assert not following, f"a circle among {', '.join(sorted(following))}"


def test_only_tasks_know_which_task_it_is():
    """Others ask the task of a dataset, a checkpoint or a record."""
    users = [path for path in [*FILES, *SCRIPTS] if "utils.tasks.classification" in imports(path)]
    others = {path.relative_to(ROOT).as_posix() for path in users if path.parent.name != "tasks"}
    assert others == set()


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
def test_a_library_is_imported_only_in_its_place(path):
    place = path.relative_to(ROOT).as_posix()
    for library in {name.split(".")[0] for name in imports(path)} & LIBRARIES.keys():
        assert any(place == allowed or place.startswith(f"{allowed}/") for allowed in LIBRARIES[library]), (
            f"{place}: {library}"
        )


def test_the_models_are_pure_torch():
    loads_code = {"dataclasses", "hashlib", "importlib", "pathlib", "sys", "traceback", "types"}
    for path in (ROOT / "MILS").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {"MILS", "torch", "__future__"}
        outside -= loads_code if path.name == "own_code.py" else set()
        assert outside <= {"collections", "contextlib", "difflib", "functools", "inspect", "math", "typing"}, path


def test_nothing_imports_the_scripts():
    for path in FILES:
        assert not imports(path) & {"train", "predict", "extractFeatures"}, path


def test_the_folders_are_imported_from_their_files():
    for folder in [*FOLDERS, "core"]:
        assert (ROOT / "utils" / folder / "__init__.py").read_text() == ""


@pytest.mark.parametrize("name", ["extractFeatures.py", "train.py", "predict.py"])
def test_a_script_stays_a_recipe(name):
    assert len((ROOT / name).read_text().splitlines()) < 120


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_runs_when_it_is_called(path):
    text = path.read_text()
    if "cli.begin(" in text and path.name != "cli.py":
        assert text.rstrip().endswith("cli.run(main)"), "it would answer --help and do nothing else"
