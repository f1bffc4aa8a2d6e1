"""List the images of a TIFF and choose the one that is the slide.

A TIFF may hold several images: the slide, its label, a macro photograph, thumbnails. The structure decides which one is
the slide: a tiled pyramid before an untiled page, the largest before smaller ones. A name such as "label" rules an
image out only if another one can be the slide. If the structure does not decide, the file is refused with a list of its
images.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tifffile

from utils.core.errors import SlideError, first_few
from utils.slides.levels import Size, whole_downsample
from utils.slides.resolution import ome_images
from utils.slides.tiles import Page, keyframe

# Words for the images beside the slide. They may also occur in a slide's own name: "label-free", "macro dissection".
_WORDS = r"(?:label|macro|thumbnail|overview|slide ?preview|map ?image)"
_MENTIONED = re.compile(rf"\b{_WORDS}\b", re.IGNORECASE)
# A line with nothing else, as vendors write it: "macro 1280x431", "label image #2", "CMU-1 [thumbnail]".
_SAID_PLAINLY = re.compile(
    rf"(?:^|[\[(:|-]) *(?:slide )?{_WORDS}(?: ?(?:image|picture|photo|photograph))?"
    r"(?:[ ,:#]*\d+)?(?:[ ,:(]*\d+ *x *\d+)?[\])]* *$",
    re.IGNORECASE | re.MULTILINE,
)
_MOST_DESCRIPTION = 300  # characters; longer ones (OME-XML) describe the whole file
_SMALL_AREA = 2**24  # px; labels and macro photographs have fewer
# An image of more than this share of the largest one's area could be the slide as well.
_RIVAL = 0.25
_MOST_LISTED = 8
_FIRST_OFFSET, _FIRST_OFFSET_OF_BIG = 4, 8  # where a TIFF and a BigTIFF say where the first directory is
_MOST_TAGS = 4096  # in one directory; a larger count is damage
_SUBIFDS, _OFFSET_FORMATS = 330, {4: "I", 13: "I", 16: "Q", 18: "Q"}  # the tag, and its types
_INCOMPLETE = "the file is damaged or incomplete, get it again"


@dataclass(frozen=True, eq=False)
class TiffImage:
    """One image of a file: the pages of each of its levels (one page, or one per colour), level 0 first.

    Attributes:
        number: its index among the images that tifffile lists.
        ome_number: its index among the images of the file's OME-XML; None if there is none, or it is ambiguous.
        is_spread: whether other files hold a part of it, or a part is missing.
    """

    number: int
    ome_number: int | None
    name: str
    axes: str
    levels: Sequence[Sequence[Page]]
    is_spread: bool = False

    @property
    def page(self) -> tifffile.TiffPage:
        """The first page of level 0, which describes how the image is stored."""
        return keyframe(self.levels[0][0])

    @property
    def sizes(self) -> list[Size]:
        """(width, height) of each level."""
        first_pages = [keyframe(pages[0]) for pages in self.levels]
        return [(page.imagewidth, page.imagelength) for page in first_pages]

    @property
    def area(self) -> int:
        return self.sizes[0][0] * self.sizes[0][1]

    @property
    def is_pyramid(self) -> bool:
        return self.page.is_tiled or len(self.levels) > 1

    @property
    def is_reduced(self) -> bool:
        """Whether the file marks it as a smaller copy of another page."""
        return bool(self.page.subfiletype & 1)

    @property
    def _text(self) -> str:
        """Its name and short description, CamelCase and underscores split into words."""
        description = self.page.description
        lines = [self.name, description if len(description) <= _MOST_DESCRIPTION else ""]
        return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", "\n".join(lines).replace("\r", "\n"))

    @property
    def mentions_label(self) -> bool:
        """Whether its name or description contains a word for a label, a macro photograph or a thumbnail."""
        return _MENTIONED.search(self._text) is not None

    @property
    def says_label(self) -> bool:
        """Whether its name or a line of its description says that it is such an image, and nothing else."""
        return _SAID_PLAINLY.search(self._text) is not None

    @property
    def is_label(self) -> bool:
        """Whether it says that it is such an image, and is as small as one."""
        return self.says_label and self.area <= _SMALL_AREA and len(self.levels) == 1

    def __str__(self) -> str:
        width, height = self.sizes[0]
        kind = "tiled" if self.page.is_tiled else "not tiled"
        name = f" '{self.name}'" if self.name else ""
        return f"{self.number}{name} ({width} x {height}, {kind}, axes {self.axes})"


def tiff_images(path: Path, file: tifffile.TiffFile) -> list[TiffImage]:
    """Return the images of a file, as tifffile assembles them from its pages, SubIFDs and OME-XML.

    Images of an OME-TIFF that are in other files are left out. Raises SlideError if a page is missing or empty.
    """
    _check_directories(path, file)
    series_list = file.series
    elements = ome_images(file.ome_metadata or (file.pages.first.description if series_list else ""))
    is_ome = len(series_list) == len(elements) and all(series.kind == "ome" for series in series_list)
    images = []
    for number, series in enumerate(series_list):
        levels = [[page for page in level.pages if page is not None] for level in series.levels]
        own_pages = [page for page in levels[0] if page.parent is file]
        if not all(levels) or not own_pages:
            continue
        size = keyframe(levels[0][0]).imagewidth, keyframe(levels[0][0]).imagelength
        image = TiffImage(
            number,
            number if is_ome else _ome_number(file, elements, size),
            series.name if series.kind == "ome" else "",
            series.get_axes(squeeze=True),
            levels,
            len(own_pages) < len(series.levels[0].pages if series.kind == "ome" else levels[0]),
        )
        if min(min(size) for size in image.sizes) < 1:  # tags of a signed type can be negative
            raise SlideError(f"{path}: image {image} has no pixels; {_INCOMPLETE}")
        images.append(image)
    return images


def choose_image(path: Path, images: Sequence[TiffImage]) -> TiffImage:
    """Return the image that is the slide. Raises SlideError if there is none, or the structure does not decide."""
    if not images:
        raise SlideError(f"{path}: a TIFF without an image that can be read; {_INCOMPLETE}")
    candidates = _candidates(images)
    if not candidates:
        raise SlideError(f"{path}: holds no slide, but {_listed(images)}; give the slide's own file")
    chosen, rivals = _largest(candidates)
    if not chosen.is_pyramid:  # structure does not support it against a much larger image, whatever that is called
        larger = [image for image in images if image not in candidates and chosen.area < _RIVAL * image.area]
        rivals += [image for image in larger if image.is_pyramid or not image.says_label]
    rivals = [image for image in images if image in rivals and image is not chosen and not _is_copy(image, chosen)]
    if rivals:
        raise SlideError(
            f"{path}: cannot tell which of its images is the slide: {_listed([chosen, *rivals])}; save the right "
            "one as a separate file"
        )
    if chosen.is_spread:
        raise SlideError(
            f"{path}: parts of image {chosen} are in other files, which are not put together; save it as one file, as "
            "bfconvert of Bio-Formats does"
        )
    return chosen


def _candidates(images: Sequence[TiffImage]) -> list[TiffImage]:
    """Return the images that can be the slide by their names, or despite them."""
    unnamed = [image for image in images if not image.mentions_label]
    largest = max((image.area for image in unnamed), default=0)
    if unnamed:  # a word in a longer name does not rule out the largest pyramid by far
        return unnamed + [
            image
            for image in images
            if image.mentions_label and not image.says_label and image.is_pyramid and largest < _RIVAL * image.area
        ]
    if len(images) == 1:
        return [image for image in images if image.is_pyramid or not image.is_label]
    return [image for image in images if image.is_pyramid and not image.is_label]


def _largest(candidates: Sequence[TiffImage]) -> tuple[TiffImage, list[TiffImage]]:
    """Return the largest pyramid (or page, if there is no pyramid or a page is larger), and the images that could be
    the slide as well.
    """
    pyramids = _not_reduced([image for image in candidates if image.is_pyramid])
    pages = _not_reduced([image for image in candidates if not image.is_pyramid])
    if not pyramids:
        return max(pages, key=lambda image: image.area), pages
    chosen = max(pyramids, key=lambda image: image.area)
    larger_pages = [page for page in pages if page.area > chosen.area]
    rivals = [image for image in pyramids if image.area > _RIVAL * chosen.area]
    return max([chosen, *larger_pages], key=lambda image: image.area), [chosen, *rivals, *larger_pages]


def _not_reduced(images: list[TiffImage]) -> list[TiffImage]:
    """Return the images that are not marked as smaller copies, or all if every one is."""
    return [image for image in images if not image.is_reduced] or images


def _is_copy(image: TiffImage, chosen: TiffImage) -> bool:
    """Return whether the size of an image is that of a smaller copy of the chosen one."""
    return whole_downsample(chosen.sizes[0], image.sizes[0]) not in (None, 1.0)


def _listed(images: Sequence[TiffImage]) -> str:
    return first_few([str(image) for image in images], _MOST_LISTED)


def _ome_number(file: tifffile.TiffFile, elements: Sequence[str], size: Size) -> int | None:
    """Return the number of the OME-XML image of this size; of several, the one in this file; None if ambiguous."""
    numbers = list(range(len(elements)))
    for axis, side in zip("XY", size, strict=True):
        declared = [re.search(rf"\bSize{axis}\s*=\s*[\"'](\d+)", element) for element in elements]
        numbers = [number for number in numbers if (match := declared[number]) is None or int(match[1]) == side]
    if len(numbers) > 1:
        own_name = re.compile(rf"FileName\s*=\s*[\"']{re.escape(file.filename)}[\"']")
        numbers = [number for number in numbers if own_name.search(elements[number])]
    return numbers[0] if len(numbers) == 1 else None


def _check_directories(path: Path, file: tifffile.TiffFile) -> None:
    """Raise SlideError if the chain of directories breaks off, or a SubIFD is missing.

    tifffile only logs that and returns the pages before the break, which may be just the label or a thumbnail.
    """
    # Not by `file.pages`: counting them does not end if the chain loops back late.
    file.filehandle.seek(_FIRST_OFFSET_OF_BIG if file.is_bigtiff else _FIRST_OFFSET)
    (offset,) = struct.unpack(file.tiff.offsetformat, file.filehandle.read(file.tiff.offsetsize))
    visited: set[int] = set()
    while offset:
        directory = None if offset in visited else _directory(file, offset)
        if directory is None and not visited:
            raise SlideError(f"{path}: a TIFF without an image that can be read; {_INCOMPLETE}")
        if directory is None:
            raise SlideError(f"{path}: its list of pages breaks off after {len(visited)}; {_INCOMPLETE}")
        visited.add(offset)
        offset, subifds = directory
        if any(subifd and _directory(file, subifd) is None for subifd in subifds):
            raise SlideError(f"{path}: a page in a SubIFD of page {len(visited) - 1} is missing; {_INCOMPLETE}")


def _directory(file: tifffile.TiffFile, offset: int) -> tuple[int, Sequence[int]] | None:
    """Return the offset of the directory after the one at `offset`, 0 after the last, and the offsets of its SubIFDs;
    None if the directory is cut off.
    """
    tiff, handle = file.tiff, file.filehandle
    try:
        handle.seek(offset)
        (count,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
        if not 0 < count <= _MOST_TAGS:
            return None
        tags = handle.read(count * tiff.tagsize)
        (following,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
        for start in range(0, len(tags), tiff.tagsize):
            code, kind = struct.unpack(tiff.tagformat1, tags[start : start + 4])
            if code == _SUBIFDS and kind in _OFFSET_FORMATS:
                return following, _offsets(file, kind, tags[start + 4 : start + tiff.tagsize])
    except (struct.error, OSError, ValueError):
        return None
    return following, ()


def _offsets(file: tifffile.TiffFile, kind: int, field: bytes) -> Sequence[int]:
    """Return the offsets in a tag of this type, whose `field` has their number, and they themselves or their offset."""
    tiff, handle = file.tiff, file.filehandle
    count, values = struct.unpack(tiff.tagformat2, field)
    layout = f"{tiff.byteorder}{count}{_OFFSET_FORMATS[kind]}"
    size = struct.calcsize(layout)
    if size > len(values):
        handle.seek(*struct.unpack(tiff.offsetformat, values))
        values = handle.read(size)
    return struct.unpack(layout, values[:size])
