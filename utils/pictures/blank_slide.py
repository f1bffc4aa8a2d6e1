"""Stand in for a slide that is not at hand, so that maps are drawn by the patches' coordinates alone."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from utils.bags.store import Bag, StoredBag


@dataclass(frozen=True)
class BlankSlide:
    """A slide's name, size in level-0 px, scanned area (x, y, width, height) or None, and um per level-0 px or None."""

    name: str
    width: int
    height: int
    bounds: tuple[int, int, int, int] | None
    mpp: float | None

    @classmethod
    def of(cls, name: str, bag: Bag | StoredBag, edge: int) -> Self:
        """Return what a bag records of its slide; else an area that just holds its patches of `edge` px."""
        assert bag.coords is not None  # noqa: S101 - for the type checker: checked before
        record = bag.passport.slide if bag.passport else {}
        right, bottom = (bag.coords.max(axis=0) + edge).tolist()
        bounds = record.get("bounds")
        return cls(
            record.get("name") or name,
            record.get("width") or right,
            record.get("height") or bottom,
            tuple(bounds) if bounds else None,
            record.get("mpp"),
        )

    @property
    def scanned(self) -> tuple[int, int, int, int]:
        return self.bounds or (0, 0, self.width, self.height)

    def thumbnail(self, max_side: int, area: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """Return white pixels (h, w, 3) of the shape of an area, at most `max_side` px."""
        width, height = area[2:]
        scale = min(1, max_side / max(width, height))
        return np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 255, dtype=np.uint8)
