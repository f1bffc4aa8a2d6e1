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

from utils.core.batch_report import update_report
from utils.core.engine import Engine, threads
from utils.core.errors import BackboneError, ConfigError, DiskFullError, LiteMILError, NoTissueError, SlideError
from utils.core.files import check_distinct, check_writable, claim_on, clear_parts, clear_parts_of, is_free
from utils.core.processes import Send, WorkerDied
from utils.core.recipe import Recipe
from utils.core.repeated_log import log_repeats_once
from utils.core.runtime import log, progress_bar
from utils.slides.contact_sheet import SheetRow, write_contact_sheet
from utils.slides.contours import ContourFile
from utils.slides.find import look_for_slides, no_slide_words, one_per_series, slide_bytes
from utils.slides.folder_report import REPORT, latest_rows, reports_in, shard_words
from utils.slides.outline_folder import OutlineFolder
from utils.slides.settings import ExtractionFiles
from utils.slides.slide import Slide
from utils.slides.slide_mpps import SlideMpps
from utils.slides.slide_status import CLAIMED, PLANNED, SlideStatus, unlike_scales
from utils.slides.tissue import TissueMask, detect_tissue

SHEET = "contact_sheet"
PREVIEWS, TISSUE = "previews", "tissue"  # folders beside the features
_SECONDS_BETWEEN_REPORTS = 10
SECONDS_BETWEEN_LOOKS = 1


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
        relative = slide.relative_to(files.input_dir) if files.keep_structure else Path(slide.name)
        targets[slide] = files.output_dir / relative.with_suffix(f".{files.format or 'h5'}")
    in_place = Counter((slide.parent, slide.stem) for slide in slides)
    remedy = "name the right ending with --extensions" if max(in_place.values()) > 1 else "give --keep_structure"
    check_distinct(targets, f"rename one of them, or {remedy}")
    chosen = slides[: files.limit]
    index, count = files.shard_number
    if count > 1:
        chosen = sorted(chosen, key=lambda slide: (-slide_bytes(slide), slide))[index - 1 :: count]
    return {slide: targets[slide] for slide in chosen}


def _slides_of(files: ExtractionFiles) -> list[Path]:
    """Find the slides of the folder, without the previews of an extraction. Raises ConfigError if there are none."""
    assert files.input_dir is not None  # noqa: S101 - checked by the config
    listing = look_for_slides(files.input_dir, files.extensions)
    if not listing.slides:
        raise ConfigError(f"{files.input_dir}: {no_slide_words(files.input_dir, listing, files.extensions)}")
    listing.log(files.input_dir)
    slides = listing.slides
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
    """Return the path of the report; each shard has its own."""
    assert files.output_dir is not None  # noqa: S101 - for the type checker
    index, count = files.shard_number
    return files.output_dir / (f"{REPORT}_{index}_of_{count}.csv" if count > 1 else f"{REPORT}.csv")


def sheet_path(files: ExtractionFiles) -> Path:
    """Return the path of the contact sheet beside the reports, one for all shards."""
    return report_path(files).with_name(f"{SHEET}.html")


@dataclass(frozen=True)
class SlideNotes:
    """The user's input for one slide: um per level-0 px and tissue outlines; and the paths to write detected tissue and
    the preview to.
    """

    mpp: float | None = None
    tissue: ContourFile | None = None
    save_tissue: Path | None = None
    preview: Path | None = None

    def outlined(self, slide: Slide) -> TissueMask | None:
        """Return the tissue within the outlines; None without outlines, or if they are the detector's own."""
        if self.tissue is None or self.tissue.is_as_detected(slide):
            return None
        return self.tissue.mask(slide)

    def is_same_tissue(self, slide: Slide, recorded: str | None) -> bool:
        """Return whether features were made from the same tissue as these notes describe.

        `recorded` is the digest of the outlines they were made from, None for the detector's tissue. If only one of the
        two has outlines, the detector is run to compare them.
        """
        if self.tissue is None:
            return True
        outlined = self.outlined(slide)
        digest = outlined and outlined.digest
        if (digest is None) == (recorded is None):
            return digest == recorded
        try:
            return (digest or recorded) == detect_tissue(slide).digest
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
            self.outlines.log_unused((slide, self._subfolder(slide)) for slide in slides)
        return {files.input: target_of_one(files)} if files.input is not None else slide_targets(files, slides)

    def slides(self) -> list[Path]:
        """Return the single slide, or all slides of the folder. Raises SlideError or ConfigError if there are none."""
        if self.files.input is None:
            return _slides_of(self.files)
        _check_slide(self.files.input)
        return [self.files.input]

    def notes(self, slide: Path, target: Path) -> SlideNotes:
        """Collect the user's input for a slide. Raises SlideError if its outlines cannot be read."""
        outlines = self.outlines.file_of(slide, self._subfolder(slide)) if self.outlines is not None else None
        save_as = self._beside(self._root(target) / TISSUE, f"{slide.stem}.geojson", target)
        return SlideNotes(
            self.mpps.of(slide),
            None if outlines is None else ContourFile.read(outlines, self._tissue_classes),
            save_as if self.files.save_tissue else None,
            self.preview(target),
        )

    def _subfolder(self, slide: Path) -> Path:
        """Return the subfolder for this slide in a folder of outlines."""
        folder = self.files.input_dir
        return slide.parent.relative_to(folder) if folder is not None and self.files.keep_structure else Path()

    @property
    def _tissue_classes(self) -> list[str]:
        return [name for names in self.files.tissue_classes or () for name in names.split(",") if name.strip()]

    def preview(self, target: Path) -> Path | None:
        """Return the path of a slide's preview; None if there is to be none."""
        is_drawn = self.files.input is None if self.files.preview is None else self.files.preview
        # Named after the feature file, since a slide may have several, made with different recipes.
        return self._beside(self._root(target) / PREVIEWS, f"{target.stem}.jpg", target) if is_drawn else None

    def clear_parts(self, targets: Mapping[Path, Path]) -> None:
        """Remove half-written files of killed runs from every folder this run writes to."""
        files = [*targets.values(), *(self.preview(target) for target in targets.values())]
        files += [self._beside(self._root(target) / TISSUE, "", target) / "any" for target in targets.values()]
        for folder in {file.parent for file in files if file is not None} | {report_path(self.files).parent}:
            clear_parts(folder)

    def _root(self, target: Path) -> Path:
        return target.parent if self.files.input is not None else self.files.output_dir or target.parent

    def _beside(self, folder: Path, name: str, target: Path) -> Path:
        """Return the path of a slide's file in `folder`, in the same subfolder as its feature file `target`."""
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
            about = [*filter(None, notes), *shard_words(reports)]
            write_contact_sheet(sheet_path(self.files), [self._sheet_row(row) for row in statuses], about)

    def _sheet_row(self, status: SlideStatus) -> SheetRow:
        preview = self.preview(report_path(self.files).parent / (status.output or f"{status.slide.stem}.h5"))
        if preview is not None and not preview.is_file():
            preview = None
        reason = "; ".join(filter(None, [status.reason, status.last_error]))
        return SheetRow(status.slide.name, status.status, reason, status.patches, status.mpp, preview)


def work_through(targets: Mapping[Path, Path], engine: Engine, work: Work, report: Path) -> list[SlideStatus]:
    """Process every slide, in parallel the largest first; return the statuses in the order of the slides.

    A slide that fails is logged and reported, and the batch continues. A slide claimed by another process is checked
    again at the end, after waiting for that process. Errors that are not specific to one slide, and Ctrl-C, stop the
    batch. The `report` is updated now and then, and always at the end (see `update_report`).

    Raises ConfigError if the report cannot be written.
    """
    check_writable(report.parent)
    pairs = list(targets.items())
    if engine.jobs > 1:
        pairs.sort(key=lambda pair: -slide_bytes(pair[0]))
    batch = _Batch(targets, report)
    try:
        with threads(engine.threads), progress_bar("Slides", len(targets), unit="slide") as bar, log_repeats_once():
            engine.run(partial(_send_status, work), pairs, partial(batch.on_message, bar.update))
            while batch.claimed:
                free = _wait_for_release(batch.claimed)
                for pair in free:
                    del batch.claimed[pair]
                engine.run(partial(_send_status, work), free, partial(batch.on_message, bar.update))
    finally:
        batch.write_report()
    return [batch.statuses[slide] for slide in targets]


class _Batch:
    """The statuses of the slides processed so far, and the slides `claimed` by other processes, with the reason."""

    def __init__(self, targets: Mapping[Path, Path], report: Path) -> None:
        self._targets, self._report = targets, report
        self.statuses: dict[Path, SlideStatus] = {}
        self.claimed: dict[_Pair, str] = {}
        self._tries: Counter[Path] = Counter()
        self._report_time = time.monotonic()

    def on_message(self, on_finished: Callable[[], object], pair: _Pair, message: SlideStatus | WorkerDied) -> None:
        """Take a slide's status, or the news that the worker on it has died."""
        slide, _ = pair
        if isinstance(message, SlideStatus) and message.status == CLAIMED:
            self.claimed[pair] = message.reason
            return
        self._tries[slide] += 1
        if isinstance(message, WorkerDied):
            clear_parts_of(message.node, message.process, self._report.parent)
            if not message.for_good:
                log.warning("%s", f"{slide}: {message}; trying it again")  # each time, not once for all slides
                return
            message = SlideStatus(slide, "failed", f"{slide}: {message}", node=message.node)
        self.statuses[slide] = announced(replace(message, tries=self._tries[slide]))
        on_finished()
        if time.monotonic() - self._report_time > _SECONDS_BETWEEN_REPORTS:
            self.write_report()
            self._report_time = time.monotonic()

    def write_report(self) -> None:
        update_report(self._report, {self._targets[slide]: row for slide, row in self.statuses.items()}, SlideStatus)


def _wait_for_release(claimed: Mapping[_Pair, str]) -> list[_Pair]:
    """Wait until another process releases at least one of its slides; return all released ones."""
    claims = {pair: claim_on(pair[1]) for pair in claimed}
    is_logged = False
    while not (free := [pair for pair, claim in claims.items() if is_free(claim)]):
        if not is_logged:
            for reason in sorted(set(claimed.values())):
                log.info("%s; waiting for it, Ctrl-C stops", reason)
            is_logged = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return free


def _send_status(work: Work, pair: _Pair, send: Send) -> None:
    send(attempt(work, *pair))


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
