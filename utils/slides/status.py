"""The outcome of each slide of a batch: a row of the report, a table, and remarks on um/px."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from utils.core.errors import counted, named
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
    """The outcome of one slide: "done", "skipped" (its features exist), "no tissue" or "failed", and why.

    `patches`, their `mpp` and the `seconds` it took are None where they are not known. `node` is the machine, `tries`
    is above 1 where workers died over it. `tissue` is "outlines" where those told it, not the detector. In the
    report, `output` is the slide's file, seen from there, and `last_error` why a later run, which left that file as it
    was, failed.
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
        """Return this row with what the earlier one of the same file knew: where the slide was skipped, how long its
        file took, and where, and what it was made anew for; the earlier row itself where a run failed and left the
        file as it was.
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
        """The reason without the file it begins with: many slides may share it."""
        subject, colon, why = self.reason.partition(": ")
        return why if colon and Path(subject).name.startswith(self.slide.stem) else self.reason


def unlike_scales(mpps: Mapping[Path, float | None]) -> tuple[str, dict[Path, float]]:
    """Describe slides whose patches have different um/px, and return those that differ from the most common.

    Returns "" and none if all known um/px are alike.
    """
    known = {slide: mpp for slide, mpp in mpps.items() if mpp}
    common = max(known.values(), key=lambda mpp: sum(_are_alike(mpp, other) for other in known.values()), default=0.0)
    others = {slide: mpp for slide, mpp in known.items() if not _are_alike(mpp, common)}
    if not others:
        return "", {}
    least, most = min(others.values()), max(others.values())
    span = f"{least:.3g}" if _are_alike(least, most) else f"{least:.3g} to {most:.3g}"
    names = named([slide.name for slide in others], _NAMED)
    which = f"the patches of {counted(len(others), 'slide')} have {span} um/px ({names})"
    rest = f"those of {len(known) - len(others)} {common:.3g}"
    return f"{which}, {rest}: their features show different scales; --mpp cuts all at one", others


def _are_alike(one: float, other: float) -> bool:
    return max(one, other) <= min(one, other) * (1 + MPP_TOLERANCE)


def status_table(statuses: Sequence[SlideStatus]) -> str:
    """Return a line per slide, and one for all the slides without patches that share a reason."""
    groups: dict[tuple[str, ...], list[SlideStatus]] = {}
    for status in statuses:
        own = (status.slide.as_posix(),) if status.patches is not None else ()
        groups.setdefault((status.status, status.why, *own), []).append(status)
    names = [named([status.slide.name for status in group], _NAMED) for group in groups.values()]
    width = max(map(len, names))
    lines = [f"{'slide':{width}}  {'':10}  {'patches':>8}  {'um/px':>6}"]
    for name, group in zip(names, groups.values(), strict=True):
        patches = "" if group[0].patches is None else group[0].patches
        mpp = "" if group[0].mpp is None else f"{group[0].mpp:.4g}"
        lines.append(f"{name:{width}}  {group[0].status:10}  {patches:>8}  {mpp:>6}".rstrip())
    return "\n".join(lines)
