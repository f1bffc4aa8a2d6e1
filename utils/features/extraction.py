"""Extract a slide or a folder of slides, or plan it in a dry run, and compose the closing lines."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from utils.bags.store import peek_bag
from utils.core.batch_report import update_report
from utils.core.engine import Threads, open_engine, worker_number
from utils.core.errors import ConfigError, FeatureFileError, SlideError, plural
from utils.core.files import claimed
from utils.core.ray_settings import Cluster
from utils.core.recipe import Recipe
from utils.core.repeated_log import log_repeats_once
from utils.core.runtime import duration, file_size, log, progress
from utils.features.extractor import WSIFeatureExtractor
from utils.features.one_slide import current_status, extract_one
from utils.slides.batch import SlideFiles, announced, attempt, report_path, sheet_path, target_of_one, work_through
from utils.slides.folder_report import scales_in
from utils.slides.settings import ExtractionFiles
from utils.slides.slide_status import (
    CLAIMED,
    KEPT_OUTLINES,
    OUTLINES,
    PLANNED,
    STATUSES,
    SlideStatus,
    status_table,
    unlike_scales,
)

_LOOKED_AT = 200  # most slides whose um/px are compared before an extraction by level


def _slide_files(extractor: WSIFeatureExtractor, files: ExtractionFiles) -> SlideFiles:
    if files.tissue is not None and extractor.config.tissue_threshold == 0:
        raise ConfigError(f"--tissue {files.tissue}: has no meaning with --tissue_threshold 0, which keeps every patch")
    return SlideFiles(files)


def extract_slides(
    extractor: WSIFeatureExtractor, files: ExtractionFiles, cluster: Cluster | None = None
) -> list[SlideStatus]:
    """Extract a slide or a folder of slides; skip finished ones and continue past failures.

    For a folder, also writes its report (see `utils.slides.batch`), previews and a contact sheet. Raises for a single
    slide that fails, ConfigError for slides that would share an output file.
    """
    slide_files, cluster = _slide_files(extractor, files), cluster or Cluster()
    targets = slide_files.targets()
    if files.input is not None:
        if cluster.is_asked_for:
            raise ConfigError("--ray distributes the slides of a folder; give --input_dir with it")
        (pair,) = targets.items()
        status = _Extraction.of((extractor,), slide_files, targets)(*pair)
        if status.status == CLAIMED:
            raise SlideError(f"{status.reason}; wait for that, or give another --output")
        return [status]
    local = Threads(len(extractor.devices), extractor.stop)
    with open_engine(cluster, local, extractor.config.device) as engine:
        extractors = [extractor]
        if not cluster.is_asked_for:
            extractors += [extractor.on(device) for device in extractor.devices[1:]]
            for each in extractors:
                _ = each.backbone  # one that cannot be loaded stops the batch before it starts
        slide_files.clear_parts(targets)
        work = _Extraction.of(extractors, slide_files, targets)
        with log_repeats_once():  # a doubtful um/px would be logged here and again at extraction
            _warn_of_scales(extractor, slide_files, targets)
            statuses = work_through(targets, engine, work, report_path(files))
    statuses = _with_scales(statuses, targets, report_path(files))
    if files.preview is not False:
        slide_files.write_sheet(_latest_recipe)
    return statuses


def _warn_of_scales(extractor: WSIFeatureExtractor, slide_files: SlideFiles, targets: Mapping[Path, Path]) -> None:
    """Warn if patches of these slides (of many, a sample) would differ in um/px, among each other or from features that
    are in the folder already.
    """
    mpps = scales_in(report_path(slide_files.files).parent, set(targets.values()))
    target_mpp = extractor.config.target_mpp
    if target_mpp is not None:
        mpps |= dict.fromkeys(targets, target_mpp)
    else:
        some = list(targets)[:: -(-len(targets) // _LOOKED_AT)]
        for slide in progress(some, "Looking at resolutions", unit="slide", leave=False):
            with suppress(SlideError):  # reported when the slide is extracted
                mpps[slide] = extractor.delivered_mpp(slide, slide_files.mpps.of(slide))
    text, _ = unlike_scales(mpps)
    if text:
        log.warning("%s: %s", slide_files.files.input_dir, text)


def _with_scales(statuses: Sequence[SlideStatus], targets: Mapping[Path, Path], report: Path) -> list[SlideStatus]:
    """Add a remark, in the report too, to slides whose um/px is not that of most in the folder."""
    _, outliers = unlike_scales(scales_in(report.parent))
    if not outliers.keys() & {status.slide for status in statuses}:
        return list(statuses)
    marked = [
        replace(status, reason="; ".join(filter(None, [status.reason, f"{status.mpp:.3g} um/px, unlike most"])))
        if status.slide in outliers
        else status
        for status in statuses
    ]
    update_report(report, {targets[status.slide]: status for status in marked}, SlideStatus)
    return marked


def _latest_recipe(features: Sequence[Path]) -> Recipe | None:
    """Return the recipe of the feature file that was written last, or None if there is none.

    Settings that every file refused leave no file, and so no recipe.
    """
    files = [path for path in features if path.is_file()]
    if not files:
        return None
    try:
        passport = peek_bag(max(files, key=lambda path: path.stat().st_mtime_ns)).passport
    except FeatureFileError:  # some other file, as its row in the report says
        return None
    return passport and passport.recipe


@dataclass(frozen=True)
class _Extraction:
    """Extracts one slide with the worker's own extractor, unless another process is extracting it.

    `times` are when each feature file had been written before the run began, None if it did not exist.
    """

    extractors: tuple[WSIFeatureExtractor, ...]
    slide_files: SlideFiles
    times: Mapping[Path, int | None]

    @classmethod
    def of(cls, extractors: Sequence[WSIFeatureExtractor], files: SlideFiles, targets: Mapping[Path, Path]) -> Self:
        return cls(tuple(extractors), files, {target: _write_time(target) for target in targets.values()})

    def __call__(self, slide: Path, target: Path) -> SlideStatus:
        extractor, notes = self.extractors[worker_number()], self.slide_files.notes(slide, target)
        with claimed(target) as owner:
            if owner:
                return SlideStatus(slide, CLAIMED, f"{target}: {owner} is extracting it")
            is_new = _write_time(target) not in (None, self.times[target])
            status = extract_one(extractor, slide, target, self.slide_files.files.overwrite and not is_new, notes)
        if is_new and status.status == "skipped":
            status = replace(status, reason=f"made by another process meanwhile; {status.reason}")
        return status


def _write_time(path: Path) -> int | None:
    """Return when a file was written, in ns, or None if it does not exist."""
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def dry_run(extractor: WSIFeatureExtractor, files: ExtractionFiles) -> tuple[list[SlideStatus], str]:
    """Return what `extract_slides` would do with each slide, and a text that says so with its cost.

    Patches are counted on thumbnails, and the time is estimated from a trial on some of them. Writes nothing. Raises as
    `extract_slides` does.
    """
    slide_files = _slide_files(extractor, files)
    targets = slide_files.targets()
    rates = []

    def plan_slide(slide: Path, target: Path) -> SlideStatus:
        notes = slide_files.notes(slide, target)
        current = None
        if target.exists() and not files.overwrite:
            current = current_status(extractor, slide, target, notes)
        if current is not None:
            return current
        with extractor.opened(slide, notes.mpp) as opened:
            plan = extractor.plan(opened, replace(notes, preview=None))
            if not rates:
                rates.append(extractor.encoder.rate(opened, plan))
        return SlideStatus(slide, PLANNED, "", len(plan), plan.mpp)

    _ = extractor.backbone  # if it cannot be loaded, that is not specific to one slide
    with log_repeats_once():
        if files.input_dir is not None:
            _warn_of_scales(extractor, slide_files, targets)
        bar = progress(targets.items(), "Looking at slides", unit="slide", leave=False)
        statuses = [announced(attempt(plan_slide, slide, target)) for slide, target in bar]
    return statuses, "\n".join([status_table(statuses), "", *_plan_words(extractor, files, statuses, rates)])


def _plan_words(
    extractor: WSIFeatureExtractor, files: ExtractionFiles, statuses: Sequence[SlideStatus], rates: Sequence[float]
) -> list[str]:
    """Return the lines below a dry run's table: the cost, from the patches per second of a trial, and the problems."""
    patches = sum(status.patches or 0 for status in statuses if status.status == PLANNED)
    size = patches * extractor.backbone.dim * np.dtype(extractor.config.dtype).itemsize
    cost = f"{patches} patches to extract, {file_size(size)} of features"
    for rate in rates:
        seconds = patches / rate / len(extractor.devices)
        cost += f", about {duration(seconds)} at {rate:.0f} patches/s, as just tried on {extractor.device}"
    failed = sum(status.status == "failed" for status in statuses)
    failures = [f"{failed} of {plural(len(statuses), 'slide')} would fail"] if failed else []
    notes = _scale_note(files, {status.slide: status.mpp for status in statuses})
    mend = "mend what fails, then " if failed else ""
    end = f"Nothing was extracted: a dry run. Next: {mend}the same command without --dry_run"
    return [cost, *failures, *notes, end]


def closing_text(files: ExtractionFiles, statuses: Sequence[SlideStatus], took: str) -> str:
    """Return the closing lines: the number of slides by status, the outputs, the time it took, and the next step."""
    extracted = [status for status in statuses if status.status == "done"]
    patches = sum(status.patches or 0 for status in extracted)
    counts = ", ".join(f"{sum(status.status == name for status in statuses)} {name}" for name in STATUSES[1:])
    lines = [f"{len(extracted)} extracted ({patches} patches), {counts} (took {took})"]
    lines += _scale_note(files, {status.slide: status.mpp for status in statuses if status.is_made})
    unknown = sum(status.mpp is None for status in extracted)
    if unknown:
        lines.append(
            f"{unknown} of the extracted slides have no known um/px; it is recorded as unknown "
            "(give it with --slide_mpp or --slides_csv)"
        )
    lines += _outline_words(files, statuses)
    if files.input_dir is not None:
        sheet = [] if files.preview is False else [f"pictures in {sheet_path(files)}"]
        lines.append("; ".join([f"Features are in {files.output_dir}", f"report in {report_path(files)}", *sheet]))
        command = f"python -m utils.audit {_cohort_flags(files.output_dir)}"
    else:
        target = target_of_one(files)
        lines.append(f"Features are in {target}")
        command = f"predict.py --checkpoint outputs/LiteMIL/NAME --input {target}"
    when = "Next"
    if any(status.status == "failed" for status in statuses):
        lines.append(
            f"Next: mend what failed, or the flags, as the reasons in {report_path(files)} say, and extract again; "
            "feature files that are there are left as they are"
        )
        when = "Then"
    if any(status.is_made for status in statuses):
        lines.append(f"{when}: uv run {command}")
    return "\n".join(lines)


def _scale_note(files: ExtractionFiles, mpps: Mapping[Path, float | None]) -> list[str]:
    """Return a line if patches of these slides, or of others in the folder's reports, differ in um/px."""
    reported = scales_in(report_path(files).parent) if files.input_dir is not None else {}
    text, _ = unlike_scales(reported | dict(mpps))
    return [f"Note: {text}"] if text else []


def _outline_words(files: ExtractionFiles, statuses: Sequence[SlideStatus]) -> list[str]:
    """Return lines that count the slides whose tissue comes from outlines, of this run or of earlier ones."""
    outlined = sum(status.tissue == OUTLINES for status in statuses)
    earlier = sum(KEPT_OUTLINES in status.reason for status in statuses)
    count = f"{plural(earlier, 'slide')} {'keeps' if earlier == 1 else 'keep'} the tissue of earlier outlines"
    if files.tissue is None:
        compare = "--tissue DIR compares it with the files there, --overwrite has it detected"
        return [f"{count}; {compare}"] if earlier else []
    otherwise = "" if files.tissue_strict else ", else detected"
    lines = [f"Tissue by {files.tissue} in {outlined - earlier} of {plural(len(statuses), 'slide')}{otherwise}"]
    if earlier:
        lines.append(
            f"{count}, of which {files.tissue} has no file: put it back, or move the features away to have the "
            "tissue detected"
        )
    return lines


def _cohort_flags(features_dir: Path | None) -> str:
    """Return the flags that name the cohort of these features: its name alone if they are in its default folder."""
    folder = Path(str(features_dir))
    if folder.name == "features" and folder.parent.parent.resolve() == Path("datasets").resolve():
        return f"--dataset {folder.parent.name}"
    return f"--features_dir {folder} --labels_csv labels.csv"
