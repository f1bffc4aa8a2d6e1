"""What all tests share: a synthetic cohort of slides with its features, and scripts run in-process."""

import csv
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings

from tests.drawing import drawn_coarsely
from utils.core import cli
from utils.core.engine import Processes, open_engine, threads
from utils.core.ray_settings import Cluster
from utils.core.runtime import log

if TYPE_CHECKING:
    import torch

    from tests.web import Server

# The process that shares the tests out to others loads this file too, and they wait for it: PyTorch and timm, which
# take seconds, are imported where they are used.

# On one thread all runs give the same bytes, and none waits for its own threads on a busy machine; PyTorch reads the
# variable when it is imported. Ray would put its workers behind everything else that the machine does.
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}

# Begun in the background (`nohup ... &`), a process ignores Ctrl-C, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared and busy machines miss hypothesis' 200 ms now and then; the same examples every time make a failure repeatable.
settings.register_profile("litemil", deadline=None, derandomize=True)
settings.load_profile("litemil")

BACKBONE = "timm:test_vit"  # timm's own model for tests: 0.4 M weights, 64 features
PATCH = 64
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

# What takes minutes begins first: dealt out last, a long file would leave the other process of the two idle.
# Each process is given two at first, alternately: the first and the third share one Ray.
LONGEST = (
    "test_ray.py", "test_cross_validation.py", "test_engine.py", "test_prediction_pictures.py", "test_commands.py",
    "test_extractor.py", "test_backbones.py", "test_readme.py", "test_leakage.py", "test_tutorial.py",
    "test_training.py", "test_patching.py", "test_compare.py", "test_extraction_orchestration.py",
    "test_fitted_texts.py", "test_report_page.py", "test_faithfulness.py", "test_intervals.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@dataclass(frozen=True)
class SlideCohort:
    """Synthetic slides `slides/<case>_<n>.tif` of two stains, their labels and features, the backbone's weights."""

    slides: Path
    features: Path
    labels: Path
    weights: Path


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Files need not outlive a power failure; thousands of them are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _litemil_logger() -> Iterator[None]:
    """Scripts turn the logger's propagation off; the next test's caplog needs it."""
    state = log.propagate, log.level, list(log.handlers)
    yield
    log.propagate, log.handlers = state[0], state[2]
    log.setLevel(state[1])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> "torch.device":
    """The CPU in the daily suite; with `-m gpu` the card, where there is one."""
    import torch

    return on_card() if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def card() -> "torch.device":
    """The card, for tests marked `gpu`."""
    return on_card()


def on_card() -> "torch.device":
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, or a skip."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not there: {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """The folder of small inputs that failed once, or a skip."""
    cases = SHARED.parent / "cases"
    if not cases.is_dir():
        pytest.skip(f"cases not there: {cases}")
    return cases


@pytest.fixture(scope="session")
def slide_cohort(tmp_path_factory) -> SlideCohort:
    """Eight patients, ten slides: the first four patients' tissue is pink, the others' bluish; extracted at level 1."""
    import timm
    import torch

    from tests.synthetic import stained_image, write_pyramid
    from utils.features.extraction import extract_slides
    from utils.features.extractor import WSIFeatureExtractor
    from utils.slides.settings import ExtractionFiles

    home = tmp_path_factory.mktemp("slide_cohort")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", pretrained=False, num_classes=0).state_dict(), home / "vit.pth")
    (home / "slides" / "nested").mkdir(parents=True)
    rows = []
    for patient in range(8):
        for number in range(2 if patient in (0, 7) else 1):
            name, bluish = f"P{patient:02d}_{number}", patient >= 4
            image = stained_image(512, 448, seed=10 * patient + number)
            image = np.ascontiguousarray(image[..., ::-1]) if bluish else image
            folder = home / "slides" / ("nested" if patient % 2 else "")
            write_pyramid(folder / f"{name}.tif", image, mpp=0.5, downsamples=(1, 2), tile=128)
            rows.append((f"P{patient:02d}", name, "blue" if bluish else "pink"))
    with (home / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case_id", "wsi_id", "label"), *rows])
    extractor = WSIFeatureExtractor(
        BACKBONE, PATCH, level=1, tissue_threshold=0.3, weights=home / "vit.pth", device="cpu"
    )
    files = ExtractionFiles(input_dir=home / "slides", output_dir=home / "features")
    assert {status.status for status in extract_slides(extractor, files)} == {"done"}
    return SlideCohort(home / "slides", home / "features", home / "labels.csv", home / "vit.pth")


Newcomer = tuple[Path, subprocess.CompletedProcess[str]]  # the folder in which train.py was run, and what it printed
FIRST_COMMAND = ("--mil", "LiteMIL", "--dataset", "demo")
SMALL_RUN = ("--n_outer", "3", "--n_inner", "3", "--epochs", "6")
_SMALL_DEMO = f"""
import runpy, sys
from datasets import demo
demo.TRAINING, demo.HOLDOUT = demo.demo_slides(12, 1), demo.demo_slides(2, 1, first=demo.PATIENTS)
demo.processors = lambda: 1
sys.path.append({str(ROOT)!r})
from tests.drawing import drawn_coarsely
with drawn_coarsely():
    runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="session")
def whole_demo(tmp_path_factory) -> Newcomer:
    """A newcomer's first command, as it is typed: 48 slides, 20 trainings."""
    return _run_once(tmp_path_factory, "whole_demo", str(ROOT / "train.py"), *FIRST_COMMAND)


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory) -> Newcomer:
    """The same on a quarter of the slides, with nine short trainings and coarse figures."""
    return run_small_demo(tmp_path_factory, "small_demo", *FIRST_COMMAND, *SMALL_RUN)


def run_small_demo(tmp_path_factory, name: str, *flags: str) -> Newcomer:
    """Run train.py on a quarter of the demo's slides, in a folder of this name, once for all processes that test."""
    return _run_once(tmp_path_factory, name, "-c", _SMALL_DEMO, *flags)


def _run_once(tmp_path_factory, name: str, *arguments: str) -> Newcomer:
    """Run Python in a folder of its own, once for all processes that test."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    home, record = folder / name, folder / f"{name}.json"
    with FileLock(folder / f"{name}.lock"):
        if not record.exists():
            home.mkdir()
            done = subprocess.run([sys.executable, *arguments], cwd=home, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            record.write_text(json.dumps(vars(done)))
    return home, subprocess.CompletedProcess(**json.loads(record.read_text()))


@pytest.fixture(scope="module")
def blank_figures() -> Iterator[None]:
    """Nothing is drawn into PNG files: for the tests of a file that ask which figures there are and what they say."""
    with drawn_coarsely(blank=("png",)):
        yield


@pytest.fixture
def coarse_figures() -> Iterator[None]:
    """Figures are drawn, with few pixels: for tests that ask whether they can be, and whether two are equal."""
    with drawn_coarsely():
        yield


@pytest.fixture(scope="module")
def local_server() -> Iterator["Server"]:
    """A server on this machine."""
    from tests.web import Server

    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(local_server) -> "Server":
    """The server with nothing on it yet, and no fault to come."""
    local_server.files.clear()
    local_server.faults = []
    local_server.ranges.clear()
    return local_server


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The error lines among stderr's; a progress bar may stand before one."""
        return [line[line.index("error: ") :] for line in self.err.splitlines() if "error: " in line]


def needs_ray() -> None:
    """Skip where the extra is not installed; Ray is not imported before the engine does, which sets it up first."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is an extra: uv sync --extra ray")


@pytest.fixture(scope="session")
def ray():
    """A Ray of this machine that all tests share: two actors of one thread."""
    needs_ray()
    with threads(1), open_engine(Cluster(ray="local", actors=2), Processes()) as engine:
        assert (engine.jobs, engine.threads) == (2, 1)
        yield engine
    assert not engine.ray.is_initialized()


@pytest.fixture
def claimed_elsewhere() -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Let another process claim a file, until it is killed."""
    script = (
        "import sys, time; from pathlib import Path; from utils.core.files import claimed\n"
        "with claimed(Path(sys.argv[1])) as other: print(other, flush=True); time.sleep(600)"
    )
    holders = []

    def hold(path: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", script, str(path)]
        holders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]))
        assert holders[-1].stdout.readline() == "\n"
        return holders[-1]

    yield hold
    for holder in holders:
        holder.kill()
        holder.communicate()


@pytest.fixture
def script(monkeypatch, capsys) -> Callable[..., Outcome]:
    """Run a script as its `__main__` does, in this process: `script("train", "--mil", "LiteMIL", ...)`."""

    def run(name: str, *arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        # Handlers write to the stderr of their time; this one must write to the captured one.
        log.handlers = [handler for handler in log.handlers if isinstance(handler, logging.NullHandler)]
        capsys.readouterr()
        code = 0
        try:
            cli.run(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def is_running(pid: int) -> bool:
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False
    return subprocess.run(["ps", "-p", str(pid)], capture_output=True, check=False).returncode == 0
