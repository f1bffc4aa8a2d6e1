"""Rewrite feature files of any layout as ours; the same command resumes an interrupted run.

uv run python -m utils.convert pt_files/ converted/
uv run python -m utils.convert slide.pt slide.h5 --dtype float16
uv run python -m utils.convert stamp/ converted/ --slides_dir slides/
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.core import cli
from utils.core.errors import ConfigError
from utils.core.settings import REQUIRED, Settings, option


@dataclass(frozen=True, kw_only=True)
class Conversion(Settings):
    """Which feature files `utils.convert` rewrites as ours, and how."""

    input: Path = option(REQUIRED, "a feature file, or a folder of them", metavar="IN", positional=True)
    output: Path = option(REQUIRED, "the output: a file for a file, or a folder", metavar="OUT", positional=True)
    format: Literal["h5", "pt"] | None = option(None, "feature file format (default: h5, or as OUT ends)")
    dtype: Literal["float16", "float32"] | None = option(None, "precision of the features (default: as stored)")
    feat_type: str = option("features", "name of the features inside each file")
    mpp: float | None = option(
        None, "um per level-0 pixel of all the slides; some layouts' patches are placed by it", least=0.05, most=40
    )
    slides_dir: Path | None = option(None, "folder of the slides, found by the files' names, to read their mpp from")
    overwrite: bool = option(False, "replace files of OUT that hold something else")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mpp is not None and self.slides_dir is not None:
            raise ConfigError("give one of --mpp (the same for all slides) and --slides_dir (read off each slide)")


_FLAGS = {"conversion": Conversion}
if __name__ == "__main__":
    cli.begin(str(__doc__), _FLAGS)

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from utils.bags.store import (
    FEATURE_EXTENSIONS,
    Bag,
    BagInfo,
    is_feature_file,
    peek_bag,
    peek_coords,
    read_bag,
    write_bag,
)
from utils.core.batch_report import update_report
from utils.core.differences import differences, first_differences
from utils.core.errors import FeatureFileError, LiteMILError, first_few
from utils.core.files import check_distinct
from utils.core.passport import Passport
from utils.core.runtime import log, progress
from utils.slides.find import find_slides
from utils.slides.open_slides import slide_mpp

REPORT = "conversion_report.csv"
# How many reasons the summary lists, and how many files it names for each.
_MAX_REASONS, _NAMED = 10, 3


@dataclass(frozen=True)
class FileStatus:
    """The status of one file: "done", "there already" or "failed". `coordinates` are "yes", "none" or "withheld";
    `reason` says why it failed, or why they are withheld. In the report, `output` is the converted file, and
    `last_error` says why a later run could not convert it again.
    """

    file: Path
    status: str
    reason: str = ""
    patches: int | None = None
    dim: int | None = None
    dtype: str | None = None
    coordinates: str | None = None
    output: str = ""
    last_error: str = ""

    @property
    def source(self) -> Path:
        return self.file

    @property
    def is_made(self) -> bool:
        return self.status != "failed"

    def after(self, earlier: Self, is_there: bool) -> Self:
        """Return this row or, if a run failed and did not change the file, the earlier one."""
        if self.is_made or not (earlier.is_made and is_there):
            return self
        return replace(earlier, output=self.output, last_error=self.reason)


def convert(conversion: Conversion) -> list[FileStatus]:
    """Convert a feature file or a folder of them; skip finished ones and continue past failures.

    For a folder, also writes `conversion_report.csv`. Raises for a single file that fails, and ConfigError for an input
    and an output that do not go together.
    """
    targets = _targets(conversion)
    slides = _slides_of(targets, conversion.slides_dir) if conversion.slides_dir else {}
    if not conversion.input.is_dir():
        return [convert_one(source, target, conversion, slides.get(source)) for source, target in targets.items()]
    statuses = [
        _guarded(source, target, conversion, slides.get(source))
        for source, target in progress(targets.items(), "Files", unit="file")
    ]
    by_target = dict(zip(targets.values(), statuses, strict=True))
    update_report(conversion.output / REPORT, by_target, FileStatus)
    return statuses


def _guarded(source: Path, target: Path, conversion: Conversion, slide: Path | None) -> FileStatus:
    try:
        return convert_one(source, target, conversion, slide)
    except LiteMILError as error:
        return FileStatus(source, "failed", str(error))


def convert_one(source: Path, target: Path, conversion: Conversion, slide: Path | None = None) -> FileStatus:
    """Make sure that `target` holds the bag of `source`: write it unless it exists.

    The mpp is the slide's if a slide is given, else `conversion.mpp`. Raises FeatureFileError for a bad source, for
    values that `conversion.dtype` cannot hold, and for a target that holds something else unless
    `conversion.overwrite`; SlideError for a bad slide.
    """
    mpp = slide_mpp(slide) if slide else conversion.mpp
    if target.exists() and not conversion.overwrite:
        return _there_already(source, target, conversion, mpp)
    bag = _cast(read_bag(source, conversion.feat_type, mpp), conversion.dtype, source)
    write_bag(target, bag)
    count, dim = bag.features.shape
    info = BagInfo(count, dim, bag.features.dtype, bag.passport)
    return _status(source, "done", info, bag.coords, bag.coords_withheld)


def _there_already(source: Path, target: Path, conversion: Conversion, mpp: float | None) -> FileStatus:
    """Return the status of a file that has been converted already.

    Raises FeatureFileError unless `target` is what converting `source` would give, as far as this shows without reading
    the features, and is not older.
    """
    info, coords = peek_bag(source, conversion.feat_type), peek_coords(source, conversion.feat_type, mpp)
    dtype = np.dtype(conversion.dtype or info.dtype)
    info = replace(info, dtype=dtype, passport=_with_dtype(info.passport, info.dtype, dtype))
    remedy = "move it, or convert with --overwrite"
    try:
        target_info, target_coords = peek_bag(target), peek_coords(target).coords
    except FeatureFileError as error:
        raise FeatureFileError(f"{error}; the output exists: {remedy}") from error
    expected, actual = _facts(info), _facts(target_info)
    unlike = differences(expected, actual, expected | actual, strict=True)
    if not np.array_equal(target_coords, coords.coords):
        unlike.append("other coordinates")
    if target.stat().st_mtime_ns < source.stat().st_mtime_ns:
        unlike.append("older than its source")
    if unlike:
        raise FeatureFileError(f"{target}: is there, from another conversion ({first_differences(unlike)}); {remedy}")
    return _status(source, "there already", info, coords.coords, coords.problem)


def _facts(info: BagInfo) -> dict[str, Any]:
    recipe = info.passport.recipe.as_dict() if info.passport else {}
    return {"features": f"({info.num_instances}, {info.dim}) {info.dtype}"} | recipe


def _status(source: Path, status: str, info: BagInfo, coords: np.ndarray | None, problem: str | None) -> FileStatus:
    coordinates = "yes" if coords is not None else "withheld" if problem else "none"
    return FileStatus(source, status, problem or "", info.num_instances, info.dim, str(info.dtype), coordinates)


def _cast(bag: Bag, dtype: str | None, path: Path) -> Bag:
    stored, new = bag.features.dtype, np.dtype(dtype or bag.features.dtype)
    with np.errstate(over="ignore"):  # an overflow raises our own error below
        features = bag.features.astype(new, copy=False)
    if not np.isfinite(features).all():
        largest = np.abs(bag.features).max()
        raise FeatureFileError(
            f"{path}: features of up to {largest:.4g}, and {new} ends at {np.finfo(new).max:.4g}; "
            "convert with --dtype float32"
        )
    return replace(bag, features=features, passport=_with_dtype(bag.passport, stored, new))


def _with_dtype(passport: Passport | None, stored: np.dtype, new: np.dtype) -> Passport | None:
    """Return the passport of features rounded to `new`; its `dtype` is the coarsest that the features ever had."""
    if passport is None or new.itemsize >= stored.itemsize:
        return passport
    return replace(passport, recipe=replace(passport.recipe, dtype=str(new)))


def _targets(conversion: Conversion) -> dict[Path, Path]:
    """Map each feature file of the input to its output; raise ConfigError if a source would be overwritten."""
    source, output = conversion.input, conversion.output
    if not source.exists():
        raise FeatureFileError(f"{source}: no such file or folder; give a feature file, or a folder of them")
    if not source.is_dir():
        targets = {source: _target_file(conversion)}
    elif is_feature_file(output) and not output.is_dir():
        raise ConfigError(f"{output}: the name of a file, where {source} is a folder; give a folder")
    elif output.resolve() == source.resolve():
        raise ConfigError(f"{output}: the folder of the files to convert; give another one")
    else:
        ending = conversion.format or "h5"
        targets = {file: output / f"{file.stem}.{ending}" for file in _feature_files(source)}
    check_distinct(targets)
    for file, target in targets.items():
        if target.exists() and target.samefile(file):
            raise ConfigError(f"{target}: the file to convert; give another output")
    return targets


def _target_file(conversion: Conversion) -> Path:
    source, output, ending = conversion.input, conversion.output, conversion.format
    if not is_feature_file(source):
        endings = " ".join(FEATURE_EXTENSIONS)
        raise FeatureFileError(f"{source}: ends in {source.suffix!r}; expected a feature file ({endings})")
    if output.is_dir() or not output.suffix:
        return output / f"{source.stem}.{ending or 'h5'}"
    if output.suffix not in (".h5", ".pt"):
        raise ConfigError(f"{output}: ends in {output.suffix!r}; end it in .h5 or .pt, or give a folder that is there")
    if ending not in (None, output.suffix[1:]):
        raise ConfigError(f"{output}: does not end in --format {ending}; leave --format out")
    return output


def _feature_files(folder: Path) -> list[Path]:
    files = [file for file in folder.glob("[!.]*") if is_feature_file(file) and not file.is_dir()]
    if files:
        return sorted(files)
    inner = sorted({file.parent.name for file in folder.glob("[!.]*/[!.]*") if is_feature_file(file)})
    remedy = f"give one of its folders: {', '.join(inner)}" if inner else "give the folder that holds them"
    raise FeatureFileError(f"{folder}: no feature file ({' '.join(FEATURE_EXTENSIONS)}) in it; {remedy}")


def _slides_of(sources: Iterable[Path], slides_dir: Path) -> dict[Path, Path]:
    """Map each feature file to the slide with its name, if there is one."""
    by_name: dict[str, list[Path]] = {}
    for slide in find_slides(slides_dir):
        by_name.setdefault(slide.stem, []).append(slide)
    slides, without = {}, []
    for source in sources:
        first, *more = by_name.get(source.stem, [None])
        if more:
            raise ConfigError(f"{source}: {first} and {more[0]} both have its name; keep one of them in --slides_dir")
        if first is None:
            without.append(source.name)
        else:
            slides[source] = first
    if not slides:
        raise ConfigError(f"{slides_dir}: no slide has a feature file's name, such as {without[0]}; check the folder")
    if without:
        log.warning("%s: no slide for %s; their um per pixel is not known", slides_dir, first_few(without, _NAMED))
    return slides


def summary(statuses: Sequence[FileStatus]) -> str:
    """Return the closing table: files and patches by status, and the reasons."""
    kinds: dict[tuple[str, str, str], list[FileStatus]] = {}
    for status in statuses:
        features = f"{status.dim} {status.dtype}" if status.dim else "-"
        kinds.setdefault((status.status, features, status.coordinates or "-"), []).append(status)
    rows = [("status", "features", "coordinates", "files", "patches")]
    rows += [
        (*kind, f"{len(files):,}", f"{sum(file.patches or 0 for file in files):,}")
        for kind, files in sorted(kinds.items())
    ]
    columns = [
        [f"{cell:{side}{max(map(len, column))}}" for cell in column]
        for side, column in zip("<<<>>", zip(*rows, strict=True), strict=True)
    ]
    lines = ["  ".join(row) for row in zip(*columns, strict=True)]
    no_coords = [status for status in statuses if status.coordinates == "withheld"]
    lines += _reasons("Coordinates withheld (where um per pixel is what lacks, give --mpp or --slides_dir):", no_coords)
    lines += _reasons("Failed:", [status for status in statuses if status.status == "failed"])
    return "\n".join(lines)


def _reasons(title: str, statuses: Sequence[FileStatus]) -> list[str]:
    """Return a line for each reason, the most frequent first, with its files."""
    files: dict[str, list[str]] = {}
    for status in statuses:
        files.setdefault(_reason(status), []).append(status.file.name)
    by_count = sorted(files.items(), key=lambda item: -len(item[1]))
    lines = [f"  {first_few(names, _NAMED)}: {reason}" for reason, names in by_count[:_MAX_REASONS]]
    if len(by_count) > _MAX_REASONS:
        lines.append(f"  and {len(by_count) - _MAX_REASONS} more reasons: see {REPORT}")
    return [title, *lines] if lines else []


def _reason(status: FileStatus) -> str:
    """Return the reason without the file it begins with, as many files may share it."""
    subject, separator, reason = status.reason.partition(": ")
    return reason if separator and Path(subject).stem == status.file.stem else status.reason


def main() -> None:
    (conversion,) = cli.parse(str(__doc__), _FLAGS)
    statuses = convert(conversion)
    print(f"{summary(statuses)}\nThey are in {conversion.output} (took {cli.took()}).")
    failed = sum(status.status == "failed" for status in statuses)
    if failed:
        report = conversion.output / REPORT
        raise LiteMILError(f"{conversion.input}: {failed} of {len(statuses)} files not converted; {report} says why")
    if conversion.input.is_dir():
        print(f"Next:\n\n  uv run python -m utils.audit --labels_csv LABELS.csv --features_dir {conversion.output}")


if __name__ == "__main__":
    cli.run(main)
