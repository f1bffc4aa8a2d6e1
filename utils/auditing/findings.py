"""What an audit finds, and the slides it looks at."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from utils.bags.store import BagInfo
from utils.bags.table import Row
from utils.core.errors import first_few, plural

Level = Literal["error", "warning", "info", "ok"]
# What is each slide's own tells slides apart, not how they were made.
IDENTITY = ("name", "quick_hash")


@dataclass(frozen=True)
class Finding:
    """One answer. An "error" makes training refuse or its results invalid, a "warning" wants a decision; `topic` is
    the question's, `details` (JSON-able) hold what the one line of `message` leaves out.
    """

    level: Level
    topic: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditedSlide:
    row: Row
    label: int

    @property
    def wsi_id(self) -> str:
        return self.row["wsi_id"]

    @property
    def case_id(self) -> str:
        return self.row["case_id"]


@dataclass(frozen=True)
class AuditedBag(AuditedSlide):
    path: Path
    info: BagInfo


AnySlide = TypeVar("AnySlide", bound=AuditedSlide)


def by_class(slides: Sequence[AnySlide], classes: Sequence[str]) -> dict[str, list[AnySlide]]:
    return {name: [slide for slide in slides if slide.label == index] for index, name in enumerate(classes)}


def slides_text(slides_of: Mapping[str, list[str]]) -> str:
    """Each value with its slides; those of the commonest one are only counted."""
    first, *others = slides_of.items()
    told = [f"{short(value)} in {plural(len(slides), 'slide')} ({first_few(slides)})" for value, slides in others]
    return f"{short(first[0])} in {plural(len(first[1]), 'slide')}, {', '.join(told)}"


def short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:12]}..."


def fields(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({name for record in records for name in record})
