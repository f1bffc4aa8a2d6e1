"""Process a folder of slides: find them, map each to its output file, continue past failures, write the report and the
contact sheet.
"""

import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from utils.core.engine import Engine, Lost, Tell, threads
from utils.core.errors import BackboneError, ConfigError, DiskFullError, LiteMILError, NoTissueError, SlideError
from utils.core.files import check_distinct, check_writable, claim_on, clear_parts, clear_parts_of, is_free
from utils.core.recipe import Recipe
from utils.core.remarks import alike_once
from utils.core.report import update_report
from utils.core.runtime import log, progress_bar
from utils.slides.contact_sheet import SheetRow, write_contact_sheet
from utils.slides.contours import ContourFile
from utils.slides.find import look_for_slides, no_slide_words, one_per_series, slide_bytes
from utils.slides.folder_report import REPORT, latest_rows, reports_in, shard_words
from utils.slides.outline_folder import OutlineFolder
from utils.slides.settings import ExtractionFiles
from utils.slides.slide import Slide
from utils.slides.slide_mpps import SlideMpps
from utils.slides.status import CLAIMED, PLANNED, SlideStatus, unlike_scales
from utils.slides.tissue import TissueMask, detect_tissue

SHEET = "contact_sheet"
PREVIEWS, TISSUE = "previews", "tissue"  # folders beside the features
_SECONDS_BETWEEN_REPORTS = 10
_SECONDS_BETWEEN_LOOKS = 1


# Makes a slide's feature file, or raises a LiteMILError.
Work = Callable[[Path, Path], SlideStatus]
_Pair = tuple[Path, Path]  # a slide and its file


def slide_targets(files: ExtractionFiles, slides: Sequence[Path]) -> dict[Path, Path]:
    """Map each slide to its feature file; for a shard, every n-th slide by size, the largest first.

    Raises ConfigError where two slides would share a file.
    """
    assert files.input_dir is not None and files.output_dir is not None  # noqa: S101, PT018 - checked by the config
    targets = {}
    for slide in slides:
        place = slide.relative_to(files.input_dir) if files.keep_structure else Path(slide.name)
        targets[slide] = files.output_dir / place.with_suffix(f".{files.format or 'h5'}")
    in_place = Counter((slide.parent, slide.stem) for slide in slides)
    remedy = (
        "name the ending that is wanted with --extensions" if max(in_place.values()) > 1 else "give --keep_structure"
    )
    check_distinct(targets, f"rename one of them, or {remedy}")
    chosen = slides[: files.limit]
    index, count = files.part
    if count > 1:
        chosen = sorted(chosen, key=lambda slide: (-slide_bytes(slide), slide))[index - 1 :: count]
    return {slide: targets[slide] for slide in chosen}


def _slides_of(files: ExtractionFiles) -> list[Path]:
    """The slides of the folder, without the pictures of an extraction into it. Raises ConfigError if there are none."""
    assert files.input_dir is not None  # noqa: S101 - checked by the config
    looked = look_for_slides(files.input_dir, files.extensions)
    if not looked.slides:
        raise ConfigError(f"{files.input_dir}: {no_slide_words(files.input_dir, looked, files.extensions)}")
    looked.log(files.input_dir)
    slides = looked.slides
    if files.output_dir is not None:
        ours = files.output_dir.resolve()
        if ours == files.input_dir.resolve():
            ours /= PREVIEWS
        slides = [slide for slide in slides if not slide.resolve().is_relative_to(ours)]
    if not slides:
        raise ConfigError(f"{files.input_dir}: all its slides lie in --output_dir {files.output_dir}; check both paths")
    return one_per_series(slides)


def target_of_one(files: ExtractionFiles) -> Path:
    """Return the feature file of the single slide."""
    assert files.input is not None  # noqa: S101 - checked by the caller
    return files.output or (files.output_dir or files.input.parent) / f"{files.input.stem}.{files.format or 'h5'}"


def _check_slide(path: Path) -> None:
    if not path.is_file():
        raise SlideError(f"{path}: no such file; give a slide, or --input_dir for a folder")


def report_path(files: ExtractionFiles) -> Path:
    """Where the report goes; each shard has its own."""
    assert files.output_dir is not None  # noqa: S101 - for the type checker
    index, count = files.part
    return files.output_dir / (f"{REPORT}_{index}_of_{count}.csv" if count > 1 else f"{REPORT}.csv")


def sheet_path(files: ExtractionFiles) -> Path:
    """Where the contact sheet goes, beside the reports: one for all shards."""
    return report_path(files).with_name(f"{SHEET}.html")


@dataclass(frozen=True)
class Told:
    """The user's input for one slide: um per level-0 px and tissue outlines; and the paths to write detected tissue and
    the preview to.
    """

    mpp: float | None = None
    tissue: ContourFile | None = None
    save_tissue: Path | None = None
    preview: Path | None = None

    def outlined(self, slide: Slide) -> TissueMask | None:
        """The tissue within the outlines; None without outlines, or if they are the detector's own."""
        if self.tissue is None or self.tissue.is_as_detected(slide):
            return None
        return self.tissue.mask(slide)

    def is_same_tissue(self, slide: Slide, recorded: str | None) -> bool:
        """Whether features were made from the tissue that is wanted now.

        `recorded` is the digest of the outlines they were made from, None for the detector's tissue. If only one side
        has outlines, the detector is run to compare them.
        """
        if self.tissue is None:
            return True
        outlined = self.outlined(slide)
        wanted = outlined and outlined.digest
        if (wanted is None) == (recorded is None):
            return wanted == recorded
        try:
            return (wanted or recorded) == detect_tissue(slide).digest
        except SlideError:  # the detector refuses the slide, so its outlines were drawn by hand
            return False


class SlideFiles:
    """The files that belong to each slide, by the flags of `extractFeatures.py`."""

    def __init__(self, files: ExtractionFiles) -> None:
        self.files = files
        self.mpps = SlideMpps.read(files.slides_csv, files.slide_mpp)
        self.outlines = OutlineFolder(files.tissue, files.tissue_strict) if files.tissue is not None else None

    def targets(self) -> dict[Path, Path]:
        """Map each slide to its feature file; log rows and outlines that match no slide."""
        files = self.files
        slides = self.slides()
        if self.mpps.rows:
            self.mpps.check(slides, files.input or Path(str(files.input_dir)))
        if self.outlines is not None and files.input is not None:
            self.outlines.log_missing(files.input)
        elif self.outlines is not None:
            self.outlines.log_unused((slide, self._place(slide)) for slide in slides)
        return {files.input: target_of_one(files)} if files.input is not None else slide_targets(files, slides)

    def slides(self) -> list[Path]:
        """Return the single slide, or all slides of the folder. Raises SlideError or ConfigError if there are none."""
        if self.files.input is None:
            return _slides_of(self.files)
        _check_slide(self.files.input)
        return [self.files.input]

    def told(self, slide: Path, target: Path) -> Told:
        """Collect the user's input for a slide. Raises SlideError if its outlines cannot be read."""
        drawn = self.outlines.file_of(slide, self._place(slide)) if self.outlines is not None else None
        saved = self._beside(self._root(target) / TISSUE, f"{slide.stem}.geojson", target)
        return Told(
            self.mpps.of(slide),
            None if drawn is None else ContourFile.read(drawn, self._tissue_classes),
            saved if self.files.save_tissue else None,
            self.preview(target),
        )

    def _place(self, slide: Path) -> Path:
        """The subfolder, within folders of files by slide, that holds this slide's file."""
        folder = self.files.input_dir
        return slide.parent.relative_to(folder) if folder is not None and self.files.keep_structure else Path()

    @property
    def _tissue_classes(self) -> list[str]:
        return [name for names in self.files.tissue_classes or () for name in names.split(",") if name.strip()]

    def preview(self, target: Path) -> Path | None:
        wanted = self.files.input is None if self.files.preview is None else self.files.preview
        # Named after the feature file, since a slide may have several, made with different recipes.
        return self._beside(self._root(target) / PREVIEWS, f"{target.stem}.jpg", target) if wanted else None

    def clear_parts(self, targets: Mapping[Path, Path]) -> None:
        """Remove half-written files of killed runs from every folder this run writes to."""
        files = [*targets.values(), *(self.preview(target) for target in targets.values())]
        files += [self._beside(self._root(target) / TISSUE, "", target) / "any" for target in targets.values()]
        for folder in {file.parent for file in files if file is not None} | {report_path(self.files).parent}:
            clear_parts(folder)

    def _root(self, target: Path) -> Path:
        return target.parent if self.files.input is not None else self.files.output_dir or target.parent

    def _beside(self, folder: Path, name: str, target: Path) -> Path:
        """A slide's file in `folder`, in the same subfolder as its feature file `target`."""
        return folder / target.parent.relative_to(self._root(target)) / name

    def write_sheet(self, recipe_of: Callable[[Sequence[Path]], Recipe | None]) -> None:
        """Write the contact sheet of all slides in the reports of all shards, again if a shard reports meanwhile.

        `recipe_of` takes the feature files and returns the recipe to show.
        """
        folder, reports = report_path(self.files).parent, None
        while reports != (reports := reports_in(folder)):
            statuses = latest_rows(reports)
            recipe = recipe_of([folder / row.output for row in statuses if row.is_made and row.output])
            scales, _ = unlike_scales({row.slide: row.mpp for row in statuses if row.is_made})
            notes = [f"Recipe of the latest features: {recipe}" if recipe else "", f"Note: {scales}" if scales else ""]
            about = [words for words in notes if words]
            write_contact_sheet(
                sheet_path(self.files), [self._sheet_row(row) for row in statuses], [*about, *shard_words(reports)]
            )

    def _sheet_row(self, status: SlideStatus) -> SheetRow:
        picture = self.preview(report_path(self.files).parent / (status.output or f"{status.slide.stem}.h5"))
        shown = picture if picture is not None and picture.is_file() else None
        reason = "; ".join(filter(None, [status.reason, status.last_error]))
        return SheetRow(status.slide.name, status.status, reason, status.patches, status.mpp, shown)


def work_through(targets: Mapping[Path, Path], engine: Engine, work: Work, report: Path) -> list[SlideStatus]:
    """Process every slide, in parallel the largest first; return the statuses in the order of the slides.

    A slide that fails is logged and reported, and the batch continues. A slide claimed by another process is checked
    again at the end, after waiting for that process. Errors that are not specific to one slide, and Ctrl-C, stop the
    batch. The `report` is updated now and then, and always at the end (see `update_report`).

    Raises ConfigError if the report cannot be written.
    """
    check_writable(report.parent)
    statuses: dict[Path, SlideStatus] = {}  # by slide
    tries: Counter[Path] = Counter()
    left: dict[_Pair, str] = {}  # to other processes, and to which
    written = time.monotonic()
    pairs = list(targets.items())
    if engine.jobs > 1:
        pairs.sort(key=lambda pair: -slide_bytes(pair[0]))

    def hear(pair: _Pair, told: SlideStatus | Lost) -> None:
        nonlocal written
        slide, _ = pair
        if isinstance(told, SlideStatus) and told.status == CLAIMED:
            left[pair] = told.reason
            return
        tries[slide] += 1
        if isinstance(told, Lost):
            clear_parts_of(told.node, told.process, report.parent)
            if not told.for_good:
                log.warning("%s", f"{slide}: {told}; it is tried again")  # each time, not once for all slides
                return
            told = SlideStatus(slide, "failed", f"{slide}: {told}", node=told.node)
        statuses[slide] = announced(replace(told, tries=tries[slide]))
        bar.update()
        if time.monotonic() - written > _SECONDS_BETWEEN_REPORTS:
            write()
            written = time.monotonic()

    def write() -> None:
        update_report(report, {targets[slide]: status for slide, status in statuses.items()}, SlideStatus)

    try:
        with threads(engine.threads), progress_bar("Slides", len(targets), unit="slide") as bar, alike_once():
            engine.run(partial(_do, work), pairs, hear)
            while left:
                free = _free_again(left)
                for pair in free:
                    del left[pair]
                engine.run(partial(_do, work), free, hear)
    finally:
        write()
    return [statuses[slide] for slide in targets]


def _free_again(left: Mapping[_Pair, str]) -> list[_Pair]:
    """Wait until another process releases at least one of its slides; return all released ones."""
    claims = {pair: claim_on(pair[1]) for pair in left}
    said = False
    while not (free := [pair for pair, claim in claims.items() if is_free(claim)]):
        if not said:
            for reason in sorted(set(left.values())):
                log.info("%s; waiting for that, Ctrl-C ends it", reason)
            said = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return free


def _do(work: Work, pair: _Pair, tell: Tell) -> None:
    tell(attempt(work, *pair))


def attempt(work: Work, slide: Path, target: Path) -> SlideStatus:
    """Run the work on a slide; an error of the slide becomes its status."""
    started = time.perf_counter()
    try:
        status = work(slide, target)
    except (BackboneError, DiskFullError):  # not specific to one slide
        raise
    except LiteMILError as error:
        seconds = round(time.perf_counter() - started, 2)
        kind = "no tissue" if isinstance(error, NoTissueError) else "failed"
        status = SlideStatus(slide, kind, str(error), seconds=seconds)
    return replace(status, node=platform.node())


def announced(status: SlideStatus) -> SlideStatus:
    """Log the status if the slide has no features, and return it."""
    if not status.is_made and status.status != PLANNED:
        level = logging.WARNING if status.status == "no tissue" else logging.ERROR
        subject = status.reason.removesuffix(status.why).removesuffix(": ") or status.slide
        log.log(level, "%s: %s", subject, status.why)
    return status
