"""Find the slide that a feature file was made from, in a folder of slides."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from utils.bags.store import peek_bag
from utils.core.errors import SlideError, first_few
from utils.core.runtime import log, progress
from utils.slides.find import IMAGE_EXTENSIONS, SLIDE_EXTENSIONS, find_slides, look_for_slides, one_per_series
from utils.slides.open_slides import open_slide
from utils.slides.slide import data_hash_of, quick_hash_of


class SlideFolder:
    """The slides under a folder, to look up the one that a feature file was made from.

    If the feature file records the hash of its slide, the slide with this hash is taken, first among those of the
    file's name. Otherwise it is the slide of the file's name or, of several, the one of the recorded size.
    """

    def __init__(self, folder: Path, feat_type: str) -> None:
        self.folder, self._feat_type = folder, feat_type
        listing = look_for_slides(folder)
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for slide in one_per_series(listing.slides):
            self._by_name[slide.stem].append(slide)
        self._left_out: dict[str, list[Path]] = defaultdict(list)
        for path in chain(*listing.left_out.values()):
            self._left_out[path.stem].append(path)
        self._slide_of: dict[Path, Path] = {}

    def slide_of(self, source: Path) -> Path:
        """Return the slide that a feature file was made from. Raises SlideError, with all candidates, if it is
        ambiguous.
        """
        if source not in self._slide_of:
            self._slide_of[source] = self._look_up(source)
        return self._slide_of[source]

    def _look_up(self, source: Path) -> Path:
        of_name = self._by_name.get(source.stem, [])
        passport = peek_bag(source, self._feat_type).passport
        record = passport.slide if passport else {}
        has_hash = record.get("quick_hash") is not None
        if has_hash:
            same = _with_hash(of_name, record) or _with_hash(self._by_hash.get(record["quick_hash"], []), record)
        else:
            same = of_name if len(of_name) == 1 else _with_size(of_name, record)
        if not same and len(of_name) == 1:
            return of_name[0]  # `check_drawable` says how it differs from the record
        if not same:
            raise SlideError(self._refusal(source, of_name, has_hash))
        slide = same[0]  # those of one hash have the same pixels
        if of_name != [slide]:
            evidence = "hash" if has_hash else "size"
            log.info("%s: drawn on %s, by the slide's %s that the feature file records", source, slide, evidence)
        elif not has_hash and self._left_out[source.stem]:
            others = first_few(list(map(str, self._left_out[source.stem])))
            log.warning("%s: drawn on %s, not on %s; it records no hash of its slide", source, slide, others)
        return slide

    def _refusal(self, source: Path, of_name: Sequence[Path], has_hash: bool) -> str:
        """Return the error text for a feature file whose slide is ambiguous."""
        if not of_name:
            return f"{source}: --wsi {self.folder} holds no slide {source.stem} to draw it on"
        names = first_few([str(slide.relative_to(self.folder)) for slide in of_name])
        why = "none has the hash of the slide that it was made from" if has_hash else "it records no hash of its slide"
        return (
            f"{source}: --wsi {self.folder} holds {len(of_name)} slides {source.stem} ({names}), and {why}; "
            "keep only the right one under --wsi"
        )

    @cached_property
    def _by_hash(self) -> dict[str, list[Path]]:
        """All slides of the folder that can be read, also those left out by their names, by hash."""
        slides = one_per_series(find_slides(self.folder, SLIDE_EXTENSIONS | IMAGE_EXTENSIONS))
        by_hash: dict[str, list[Path]] = defaultdict(list)
        for slide in progress(slides, "Comparing slides by hash", unit="slide", leave=False):
            with suppress(SlideError):
                by_hash[quick_hash_of(slide)].append(slide)
        return by_hash


def _with_hash(slides: Sequence[Path], record: Mapping[str, Any]) -> list[Path]:
    """Return the slides with the content that a feature file records."""
    same = [slide for slide in slides if quick_hash_of(slide) == record["quick_hash"]]
    data_hash = record.get("data_hash")  # of MIRAX, whose pixels are in other files
    return same if data_hash is None else [slide for slide in same if data_hash_of(slide) == data_hash]


def _with_size(slides: Sequence[Path], record: Mapping[str, Any]) -> list[Path]:
    """Return the only slide of the recorded width and height, or none."""
    expected = record.get("width"), record.get("height")
    same = []
    for path in slides:
        with open_slide(path) as slide:
            if (slide.width, slide.height) == expected:
                same.append(path)
    return same if len(same) == 1 else []
