"""Read the extraction reports in a folder of features, those of all shards together."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from utils.core.batch_report import read_report
from utils.slides.slide_status import SlideStatus

REPORT = "extraction_report"
_SHARD = re.compile(rf"{REPORT}(?:_(\d+)_of_(\d+))?\.csv")


def reports_in(folder: Path) -> dict[Path, int]:
    """Return the reports of the folder and of its shards, each with the time it was last written."""
    paths = [path for path in folder.glob(f"{REPORT}*.csv") if _SHARD.fullmatch(path.name)]
    return {path: path.stat().st_mtime_ns for path in paths}


def latest_rows(reports: Mapping[Path, int], *, only_look: bool = False) -> list[SlideStatus]:
    """Return the latest row of each slide, in the slides' order; see `read_report`."""
    rows: dict[str, SlideStatus] = {}
    for report in sorted(reports, key=reports.__getitem__):
        rows |= {row.output or str(row.slide): row for row in read_report(report, SlideStatus, only_look=only_look)}
    return sorted(rows.values(), key=lambda row: row.slide)


def scales_in(folder: Path, but: Collection[Path] = ()) -> dict[Path, float | None]:
    """Return the um/px of the patches in a folder's feature files by slide, except the files in `but`."""
    rows = [row for row in latest_rows(reports_in(folder), only_look=True) if row.is_made and row.output]
    existing = [row for row in rows if folder / row.output not in but and (folder / row.output).exists()]
    return {row.slide: row.mpp for row in existing}


def shard_words(reports: Collection[Path]) -> list[str]:
    """Say which shards have reported."""
    numbers: dict[int, list[int]] = {}
    for path in reports:
        shard = _SHARD.fullmatch(path.name)
        if shard and shard[1]:
            numbers.setdefault(int(shard[2]), []).append(int(shard[1]))
    names = {n: "all" if len(shards) == n else ", ".join(map(str, sorted(shards))) for n, shards in numbers.items()}
    return [f"Shards that have reported: {names[count]} of {count}" for count in sorted(names)]
