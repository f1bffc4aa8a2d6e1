"""The status of each slide of a batch: a row of the report, the printed table, and remarks on um/px."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from utils.core.errors import first_few, plural
from utils.core.recipe import MPP_TOLERANCE

OUTLINES = "outlines"  # the source of a slide's tissue, if not the detector
STATUSES = ("done", "skipped", "no tissue", "failed")
PLANNED = "to extract"
CLAIMED = "claimed"  # another process is extracting it; never a final status
ANEW = "extracted anew: its outlines have changed"
KEPT_OUTLINES = "its tissue is that of earlier outlines"  # for which this run has no file
_NAMED = 3


@dataclass(frozen=True)
class SlideStatus:
    """The status of one slide: "done", "skipped" (its features exist), "no tissue" or "failed", and why.

    `patches`, their `mpp` and the `seconds` it took are None if unknown. `node` is the machine; `tries` is above 1 if
    workers died on the slide. `tissue` is "outlines" if the tissue is from outlines, not from the detector. In the
    report, `output` is the slide's feature file, relative to the report, and `last_error` is why a later run, which did
    not change that file, failed.
    """

    slide: Path
    status: str
    reason: str = ""
    patches: int | None = None
    mpp: float | None = None
    seconds: float | None = None
    node: str = ""
    tries: int = 1
    output: str = ""
    last_error: str = ""
    tissue: str = ""

    @property
    def source(self) -> Path:
        return self.slide

    @property
    def is_made(self) -> bool:
        return self.status in ("done", "skipped")

    def after(self, earlier: Self, is_there: bool) -> Self:
        """Return this row, updated from the earlier row of the same file: for a skipped slide the time and machine of
        its extraction, and why it was extracted anew; or the earlier row itself, if a run failed and did not change the
        file.
        """
        if not earlier.is_made:
            return self
        if self.status == "skipped":
            row = self
            if ANEW in earlier.reason and ANEW not in self.reason:
                row = replace(row, reason="; ".join(filter(None, [self.reason, ANEW])))
            return row if earlier.seconds is None else replace(row, seconds=earlier.seconds, node=earlier.node)
        if not self.is_made and is_there:
            return replace(earlier, output=self.output, last_error=self.reason)
        return self

    @property
    def why(self) -> str:
        """The reason without the file name at its beginning, so that slides can share it."""
        subject, colon, why = self.reason.partition(": ")
        return why if colon and Path(subject).name.startswith(self.slide.stem) else self.reason


def unlike_scales(mpps: Mapping[Path, float | None]) -> tuple[str, dict[Path, float]]:
    """Describe slides whose patches have different um/px, and return those that differ from the most common.

    Returns "" and none if all known um/px are alike.
    """
    mpp_of = {slide: mpp for slide, mpp in mpps.items() if mpp}
    common = max(mpp_of.values(), key=lambda mpp: sum(_are_alike(mpp, value) for value in mpp_of.values()), default=0.0)
    unlike = {slide: mpp for slide, mpp in mpp_of.items() if not _are_alike(mpp, common)}
    if not unlike:
        return "", {}
    least, most = min(unlike.values()), max(unlike.values())
    span = f"{least:.3g}" if _are_alike(least, most) else f"{least:.3g} to {most:.3g}"
    names = first_few([slide.name for slide in unlike], _NAMED)
    which = f"the patches of {plural(len(unlike), 'slide')} have {span} um/px ({names})"
    remainder = f"those of {len(mpp_of) - len(unlike)} {common:.3g}"
    return f"{which}, {remainder}: their features show different scales; --mpp cuts all at one", unlike


def _are_alike(first: float, second: float) -> bool:
    return max(first, second) <= min(first, second) * (1 + MPP_TOLERANCE)


def status_table(statuses: Sequence[SlideStatus]) -> str:
    """Return a line per slide; slides without patches that share a reason share a line."""
    groups: dict[tuple[str, ...], list[SlideStatus]] = {}
    for status in statuses:
        own = (status.slide.as_posix(),) if status.patches is not None else ()
        groups.setdefault((status.status, status.why, *own), []).append(status)
    names = [first_few([status.slide.name for status in group], _NAMED) for group in groups.values()]
    width = max(map(len, names))
    lines = [f"{'slide':{width}}  {'':10}  {'patches':>8}  {'um/px':>6}"]
    for name, group in zip(names, groups.values(), strict=True):
        patches = "" if group[0].patches is None else group[0].patches
        mpp = "" if group[0].mpp is None else f"{group[0].mpp:.4g}"
        lines.append(f"{name:{width}}  {group[0].status:10}  {patches:>8}  {mpp:>6}".rstrip())
    return "\n".join(lines)
