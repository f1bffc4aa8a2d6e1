"""README's commands, run in its order in a copy of the repository: those that need a network, with local stand-ins."""

import glob
import json
import re
import shlex
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from MILS import list_mils
from tests.core.test_settings import FIELDS
from tests.drawing import drawn_coarsely
from tests.reference_litemil import KIDNEY, ReferenceLiteMIL, write_all_folds, write_fold
from tests.synthetic import stained_image, write_pyramid
from tests.web import zipped
from utils.core.files import write_text
from utils.core.settings import flag_of
from utils.features.backbones import list_backbones

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "datasets" / "README.md"]
FIRST = "uv run train.py --mil LiteMIL --dataset demo"
ELSEWHERE = {
    "git clone https://github.com/hkussaibi/LiteMIL.git && cd LiteMIL": "the copy is made of this repository",
    FIRST: "run once for all tests, in a process of its own",
    "uv run pytest -n 2": "is running",
    "uv run --with jupyterlab jupyter lab Tutorial.ipynb": "the notebook is run by its own test",
}
SHORT_RUN = ("--n_outer", "2", "--n_inner", "2", "--epochs", "2")
STAND_INS = {"--backbone uni": "--backbone stain-texture"}  # of what a command marked as "network" has to fetch


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    return [line for block in blocks(text, "bash") for line in block.splitlines() if line.strip()]


def typed(command: str) -> str:
    """A command without its remark."""
    return command.partition("  # ")[0]


PRINTED = [command for command in commands(README) if typed(command) not in ELSEWHERE]


@dataclass(frozen=True)
class Workspace:
    """A copy of the repository, and whether the commands are run in it as they are printed."""

    home: Path
    is_whole: bool


@pytest.fixture(scope="module", params=["small", pytest.param("as printed", marks=pytest.mark.slow)])
def workspace(request, tmp_path_factory, local_server):
    """A copy of what git keeps here, after the first command; what is a user's own, made up; the network, local.

    In the small one there are fewer patients, and trainings end early.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: git does not say what belongs to it")
    is_whole = request.param == "as printed"
    demo_home = request.getfixturevalue("whole_demo" if is_whole else "small_demo")
    patients = 24 if is_whole else 12
    copy = tmp_path_factory.mktemp("copy")
    git("init", "-q", cwd=copy)
    for name in git("ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    git("add", "-A", cwd=copy)
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "copy", cwd=copy)
    for part in ("datasets/demo", "outputs/LiteMIL/demo"):
        shutil.copytree(demo_home[0] / part, copy / part)
    with pytest.MonkeyPatch.context() as monkeypatch:
        own_cohort(copy / "datasets" / "mine", patients)
        own_first_version(copy)
        rng = np.random.default_rng(0)
        cases = [f"TCGA-{patient:02d}-0001" for patient in range(patients)]
        packed = {f"{case}-01Z-00-DX1": torch.from_numpy(noise(rng)) for case in cases}
        rows = [f"{case},{case}-01Z-00-DX1.svs,{('IDC', 'ILC')[number % 2]}" for number, case in enumerate(cases)]
        table = "\n".join(["case_id,slide_id,oncotree_code", *rows, ""])
        local_server.publish(monkeypatch, "breast", table, zipped(packed, "BRCA"))
        write_pyramid(copy / "slide.tif", stained_image(768, 640), mpp=0.5, tile=128)
        local_server.publish_slide(monkeypatch, (copy / "slide.tif").read_bytes())
        (copy / "slide.tif").unlink()
        yield Workspace(copy, is_whole)


def git(*arguments: str, cwd: Path) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def noise(rng: np.random.Generator) -> np.ndarray:
    """Features of which there is nothing to learn: such trainings end early."""
    return rng.standard_normal((40, 1024), dtype=np.float32)


def own_cohort(folder: Path, patients: int) -> None:
    """A slide of each patient; their labels have nothing to do with them."""
    (folder / "slides").mkdir(parents=True)
    lines = ["case_id,wsi_id,label"]
    for patient in range(patients):
        image = stained_image(512, 512, seed=patient, coverage=0.9)
        write_pyramid(folder / "slides" / f"P{patient:02d}.tif", image, mpp=0.5, tile=128)
        lines.append(f"P{patient:02d},P{patient:02d},{('benign', 'malignant')[patient % 2]}")
    write_text(folder / "labels.csv", "\n".join(lines) + "\n")


def own_first_version(home: Path) -> None:
    torch.manual_seed(0)
    model, folder = ReferenceLiteMIL(1024, 256, 3, 4, 1).eval(), home / "outputs" / "LiteMIL" / "kidney"
    folder.mkdir(parents=True)
    write_all_folds(folder / "all_folds_best.pth", model, KIDNEY)
    write_fold(folder / "fold_1_best.pth", model)
    (home / "features").mkdir()
    with h5py.File(home / "features" / "slide.h5", "w") as file:
        file["features"] = noise(np.random.default_rng(1))


def spread(word: str) -> list[str]:
    """A word as a shell spreads it."""
    return sorted(glob.glob(word)) if "*" in word else [word]  # noqa: PTH207 - relative, as typed


@pytest.mark.parametrize("command", PRINTED, ids=typed)
def test_a_command_of_the_readme(command, workspace, script, monkeypatch):
    monkeypatch.chdir(workspace.home)
    line = typed(command)
    if "network" in command.partition("  # ")[2]:
        for one, other in STAND_INS.items():
            line = line.replace(one, other)
    words = [part for word in shlex.split(line) for part in spread(word)]
    assert words[:2] == ["uv", "run"], f"no rule for how to run {line!r}"
    name, arguments = (words[4], words[5:]) if words[2:4] == ["python", "-m"] else (words[2], words[3:])
    if name == "train.py" and not workspace.is_whole:
        arguments += SHORT_RUN
    # That they can be drawn is proven of each figure elsewhere.
    with nullcontext() if workspace.is_whole else drawn_coarsely(blank=("png",)):
        outcome = script(name.removesuffix(".py"), *arguments)
    assert outcome.code == 0, outcome.err


def test_what_the_readme_says_that_they_write_is_there(workspace):
    inference = [f"testSlide_{part}" for part in ("prediction.json", "heatmap.png", "report.html", "faithfulness.png")]
    expected = [
        "features/testSlide.h5", "features/holdout/previews", "features/holdout/contact_sheet.html",
        "features/holdout/extraction_report.csv", "datasets/mine/features/P00.h5", "outputs/ABMIL/mine/outputs.json",
        "outputs/LiteMIL/mine/all_folds_best.pth", "datasets/breast/labels.csv",
        "outputs/comparison/LiteMIL_mine_vs_ABMIL_mine/comparison.md",
        "outputs/LiteMIL/breast/predictions.csv", *(f"outputs/inference/LiteMIL_demo/{name}" for name in inference),
        "outputs/holdout/scores.json", "outputs/holdout/predictions.csv", "outputs/holdout/index.html",
        "outputs/inference/LiteMIL_demo_out_of_fold/index.html", "testSlides/CMU-1-Small-Region.svs",
        "outputs/from_features/testSlide_heatmap.png", "outputs/inference/LiteMIL_demo/CMU-1-Small-Region_report.html",
    ]  # fmt: skip
    home = workspace.home
    assert not [name for name in expected if not (home / name).exists()]
    held_out = pd.read_csv(home / "datasets" / "demo" / "holdout" / "labels.csv")
    predicted = pd.read_csv(home / "outputs" / "holdout" / "predictions.csv")
    assert list(predicted["wsi_id"]) == list(held_out["wsi_id"])
    scores = json.loads((home / "outputs" / "holdout" / "scores.json").read_text())
    if workspace.is_whole:
        assert len(predicted) == 6
        assert scores["pooled"]["auc"] > 0.85
    else:
        assert scores["n_slides"] == 2


def test_they_leave_the_work_tree_clean(workspace):
    assert git("status", "--porcelain", cwd=workspace.home) == ""


def test_what_is_run_elsewhere_is_printed():
    assert ELSEWHERE.keys() <= {typed(command) for command in commands(README)}


@pytest.mark.parametrize("demo_home", ["small_demo", pytest.param("whole_demo", marks=pytest.mark.slow)])
def test_the_printed_table_is_what_the_first_command_prints(demo_home, request):
    """Line by line, but for the figures, which depend on the machine a little, and on how much is trained. Patients of
    the small demo have one slide each, so that it prints no lines on patients.
    """
    printed = request.getfixturevalue(demo_home)[1].stdout
    mask = {"small_demo": masked_numbers, "whole_demo": masked}[demo_home]
    lines = {mask(line) for line in printed.splitlines()}
    shown = next(block for block in blocks(README, "text") if "accuracy" in block)
    if demo_home == "small_demo":
        shown = "\n".join(line for line in shown.splitlines() if "patients" not in line)
    assert not [line for line in shown.splitlines() if line.strip() != "..." and mask(line) not in lines]


def masked(line: str) -> str:
    return re.sub(r"\d\.\d{3}", "#", line).rstrip()


def masked_numbers(line: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "#", line)).rstrip()


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("https://", "http://")):
                continue
            name, _, anchor = target.partition("#")
            other = (page.parent / name).resolve() if name else page
            assert other.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_flags_that_are_named_exist(page):
    """Every `--flag` in the prose is one of a command's; those of other programs are few."""
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page.read_text()))
    ours = {"--help", "--version", "--no-preview", "--jobs"}
    ours |= {flag for _, field in FIELDS for flag in (flag_of(field), field.metadata["alias"])}
    others = {"--index-url", "--reinstall", "--no-sync", "--with", "--extra"}
    if page.name == "scaling.md":  # of Slurm and Ray
        others |= {"--array", "--gres", "--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--exclusive"}
        others |= {"--mem", "--head", "--port", "--address", "--min-nodes", "--num-cpus", "--num-gpus", "--generate"}
    assert named <= ours | others, named - ours - others


def test_every_model_and_backbone_is_in_the_tables():
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    for name in [*list_mils(), *list_backbones()]:
        assert any(f"`{name}`" in row for row in rows), name
