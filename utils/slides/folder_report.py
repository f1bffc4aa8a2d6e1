"""What the reports in a folder of features say of its slides, those of all shards together."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from utils.core.report import read_report
from utils.slides.status import SlideStatus

REPORT = "extraction_report"
_SHARD = re.compile(rf"{REPORT}(?:_(\d+)_of_(\d+))?\.csv")


def reports_in(folder: Path) -> dict[Path, int]:
    """The reports that are there, of the folder and of its shards, with when each was last written."""
    paths = [path for path in folder.glob(f"{REPORT}*.csv") if _SHARD.fullmatch(path.name)]
    return {path: path.stat().st_mtime_ns for path in paths}


def latest_rows(reports: Mapping[Path, int], *, only_look: bool = False) -> list[SlideStatus]:
    """The latest row of each slide, in the slides' order; see `read_report`."""
    rows: dict[str, SlideStatus] = {}
    for report in sorted(reports, key=reports.__getitem__):
        rows |= {row.output or str(row.slide): row for row in read_report(report, SlideStatus, only_look=only_look)}
    return sorted(rows.values(), key=lambda row: row.slide)


def scales_in(folder: Path, but: Collection[Path] = ()) -> dict[Path, float | None]:
    """um/px of the patches in a folder's feature files, by slide, without the files of `but`."""
    rows = [row for row in latest_rows(reports_in(folder), only_look=True) if row.is_made and row.output]
    there = [row for row in rows if folder / row.output not in but and (folder / row.output).exists()]
    return {row.slide: row.mpp for row in there}


def shard_words(reports: Collection[Path]) -> list[str]:
    """Which of the shards have reported."""
    numbers: dict[int, list[int]] = {}
    for path in reports:
        shard = _SHARD.fullmatch(path.name)
        if shard and shard[1]:
            numbers.setdefault(int(shard[2]), []).append(int(shard[1]))
    return [
        f"Shards that have reported: {'all' if len(there) == count else ', '.join(map(str, sorted(there)))} of {count}"
        for count, there in sorted(numbers.items())
    ]
