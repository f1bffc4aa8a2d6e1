"""The findings of an audit, and the slides that it checks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from utils.bags.label_table import Row
from utils.bags.store import BagInfo
from utils.core.errors import first_few, plural

Level = Literal["error", "warning", "info", "ok"]
# Fields that differ for each slide and do not say how it was made.
IDENTITY = ("name", "quick_hash")


@dataclass(frozen=True)
class Finding:
    """The result of a check. With an "error", training refuses or its results are invalid; a "warning" needs a
    decision. `message` is one line; `details` (JSON-able) list everything.
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
    """Return each value with its slides; those of the first value, the most common, are only counted."""
    first, *rarer = slides_of.items()
    texts = [f"{_short(value)} in {plural(len(slides), 'slide')} ({first_few(slides)})" for value, slides in rarer]
    return f"{_short(first[0])} in {plural(len(first[1]), 'slide')}, {', '.join(texts)}"


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:12]}..."


def field_names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({name for record in records for name in record})
