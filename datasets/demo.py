"""The demo cohort and the test slide: synthetic H&E-like slides of two growth patterns, drawn offline.

    uv run train.py --mil LiteMIL --dataset demo    makes the missing files, and trains on the cohort
    uv run python -m datasets.demo                  makes the missing files only
    uv run python -m datasets.demo --test_slide     makes testSlides/testSlide.svs and its features

datasets/demo/ holds 48 slides of 24 patients from three sites (`wsi/`), masks of their lesions (`masks/`, white on
black, a pixel per 16 level-0 pixels), `labels.csv` (with times to a made-up event, which depend on the pattern), and
`stain-texture` features (`features/`); `holdout/` six slides of other patients, for prediction. The same versions of
the packages draw the same pixels.
"""

from dataclasses import dataclass

from utils.core import cli
from utils.core.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
    """What `datasets.demo` draws."""

    test_slide: bool = option(False, "make testSlides/testSlide.svs and its features instead of the demo cohort")


_FLAGS = {"demo": Demo}
if __name__ == "__main__":
    cli.begin(str(__doc__), _FLAGS)

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.synthetic import MPP, PATTERNS, SITES, Patient, draw_slide, write_slide
from utils.core.engine import Processes, threads
from utils.core.errors import SlideError
from utils.core.files import whole_file, write_records
from utils.core.processes import Send
from utils.core.runtime import keep_freed_memory, log, processors, progress_bar
from utils.features.settings import Extraction
from utils.slides.settings import ExtractionFiles

FOLDER, TEST_SLIDE = Path("datasets/demo"), Path("testSlides/testSlide.svs")
PATIENTS, SLIDES_EACH, HELD_OUT = 24, 2, 6  # a whole number of each pattern at each site
MEAN_MONTHS: dict[str, float] = {"glandular": 70, "solid": 20}  # until the event
_SHAPE = 8  # of the gamma distribution of these times
SIZE, TEST_SIZE = (1152, 960), (1536, 1280)  # level-0 px: of the cohort's slides, of the test slide
RECIPE = Extraction(backbone="stain-texture", patch_size=128, mpp=MPP)


@dataclass(frozen=True)
class DemoSlide:
    """A row of the cohort's `labels.csv`; `time` is in months until the `event` (1) or the end of follow-up (0)."""

    case_id: str
    wsi_id: str
    label: str
    site: str
    time: float
    event: int

    def wsi(self, folder: Path) -> Path:
        """Return the slide's path in the cohort's folder, or in that of the held-out slides."""
        return folder / "wsi" / f"{self.wsi_id}.tif"

    def mask(self, folder: Path) -> Path:
        """Return the path of the lesion's mask."""
        return folder / "masks" / f"{self.wsi_id}.png"

    def draw(self, target: Path, mask: Path | None = None, size: tuple[int, int] = SIZE) -> None:
        """Write the slide, `size` px across and down, and its lesion's mask if a path for it is given."""
        number, slide = map(int, self.wsi_id.split("-")[1:])
        patient = Patient.random(self.label, self.site, np.random.default_rng([number]))
        drawing = draw_slide(patient, *size, np.random.default_rng([number, slide]))
        if mask is not None:
            with whole_file(mask) as temporary:
                drawing.lesion_image().save(temporary, format="png")
        write_slide(target, drawing.image, self.site)


def demo_slides(patients: int, slides_each: int, first: int = 0) -> list[DemoSlide]:
    """Return the slides of `patients`, numbered from `first`, with equally many of each pattern at each site."""
    slides = []
    for number in range(first, first + patients):
        label, site = PATTERNS[number % 2], list(SITES)[number // 2 % len(SITES)]
        case = f"synthetic-{number + 1:02d}"
        follow_up = _follow_up(number, label)
        slides += [DemoSlide(case, f"{case}-{slide + 1}", label, site, *follow_up) for slide in range(slides_each)]
    return slides


def _follow_up(number: int, label: str) -> tuple[float, int]:
    """Return a patient's time in months and event, made up: one growth pattern is the worse one."""
    rng = np.random.default_rng([number, 7])
    until_event, until_end = MEAN_MONTHS[label] * rng.gamma(_SHAPE) / _SHAPE, rng.uniform(12, 96)
    return round(float(min(until_event, until_end)) + 0.1, 1), int(until_event <= until_end)


TRAINING, HOLDOUT = demo_slides(PATIENTS, SLIDES_EACH), demo_slides(HELD_OUT, 1, first=PATIENTS)


def make_demo(folder: Path = FOLDER) -> None:
    """Make the missing files of the demo cohort; existing ones are kept."""
    rows_in = {folder: TRAINING, folder / "holdout": HOLDOUT}
    missing = [
        (row, home)
        for home, rows in rows_in.items()
        for row in rows
        if not (row.wsi(home).exists() and row.mask(home).exists())
    ]
    if missing:
        log.info("Drawing %d synthetic slides into %s, once", len(missing), folder)
        with progress_bar("Drawing slides", len(missing), unit="slide") as bar, threads(1):

            def advance(*_: object) -> None:
                bar.update()

            Processes(min(processors(), len(missing))).run(_draw, missing, advance)
    for home, rows in rows_in.items():
        if not (home / "labels.csv").exists():
            write_records(home / "labels.csv", rows)
    if not all((folder / "features" / f"{row.wsi_id}.h5").exists() for row in TRAINING):
        _extract(ExtractionFiles(input_dir=folder / "wsi", output_dir=folder / "features", preview=False))


def next_command(checkpoint: Path, folder: Path = FOLDER) -> str:
    """Return the command to try after training on the cohort: predict a held-out slide, with its heatmap."""
    slide = HOLDOUT[0].wsi(folder / "holdout")
    return f"uv run predict.py --checkpoint {checkpoint} --input {slide} --visualize"


def make_test_slide(path: Path = TEST_SLIDE) -> None:
    """Draw the test slide, and extract its features beside it."""
    DemoSlide("synthetic-99", "synthetic-99-1", PATTERNS[0], "A", 0, 0).draw(path, size=TEST_SIZE)
    _extract(ExtractionFiles(input=path, overwrite=True))


def _draw(task: tuple[DemoSlide, Path], send: Send) -> None:
    row, home = task
    keep_freed_memory()
    row.draw(row.wsi(home), row.mask(home))
    send(row.wsi_id)


def _extract(files: ExtractionFiles) -> None:
    # Not above: the processes that draw would wait for PyTorch.
    from utils.features.extraction import extract_slides
    from utils.features.extractor import WSIFeatureExtractor

    for status in extract_slides(WSIFeatureExtractor.of_config(RECIPE), files):
        if status.status not in ("done", "skipped"):
            raise SlideError(f"{status.slide}: {status.reason or status.status}; remove it, and it is drawn again")


def main() -> None:
    """Make the cohort, or the test slide."""
    (demo,) = cli.parse(str(__doc__), _FLAGS)
    if demo.test_slide:
        make_test_slide()
    else:
        make_demo()
    path = TEST_SLIDE if demo.test_slide else FOLDER
    print(f"{path}: synthetic, drawn by rule; not tissue of anyone (took {cli.took()})")
    if not demo.test_slide:
        print("\nNext:\n\n  uv run train.py --mil LiteMIL --dataset demo")


if __name__ == "__main__":
    cli.run(main)
