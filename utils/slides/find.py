"""Which files are slides, and the slides of a folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import openslide

from utils.core.errors import SlideError

SLIDE_EXTENSIONS = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi", ".dcm"}
)
TIFF_EXTENSIONS = frozenset({".tif", ".tiff"})
IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp"})


def is_slide_file(path: Path | str) -> bool:
    """Whether the name is that of a slide or an image we can read; the file itself is not looked at."""
    return Path(path).suffix.lower() in SLIDE_EXTENSIONS | IMAGE_EXTENSIONS


def find_slides(folder: Path | str, extensions: Iterable[str] | None = None) -> list[Path]:
    """All slide files under a folder, subfolders included, sorted by path; hidden files and folders are left out.

    Extensions may be written in any case, with or without the dot; None means every known one. The `.jpg` tiles that
    lie beside a Hamamatsu `.vms` or `.vmu` are parts of that slide and left out unless asked for.

    Raises:
        SlideError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SlideError(f"{folder}: not a folder; give the folder that holds the slides")
    wanted = (
        SLIDE_EXTENSIONS | IMAGE_EXTENSIONS
        if extensions is None
        else {"." + extension.strip().lower().lstrip(".") for extension in extensions}
    )
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in wanted
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if extensions is None:
        tiled = {path.parent for path in found if path.suffix.lower() in {".vms", ".vmu"}}
        found = [path for path in found if path.parent not in tiled or path.suffix.lower() not in IMAGE_EXTENSIONS]
    return sorted(found)


def one_per_series(slides: Sequence[Path]) -> list[Path]:
    """The slides without those DICOM files whose slide is there already: each of a series' files opens all of it."""
    kept, known = [], set()
    for slide in slides:
        series = (slide.parent, _series(slide)) if slide.suffix.lower() == ".dcm" else None
        if series is None or series[1] is None or series not in known:
            kept.append(slide)
        known.add(series)
    return kept


def slide_bytes(slide: Path) -> int:
    """The size of a slide's file, of a MIRAX slide with what its folder holds; 0 where that cannot be asked."""
    data = slide.with_suffix("")
    try:
        files = [slide, *(data.iterdir() if slide.suffix.lower() == ".mrxs" and data.is_dir() else ())]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _series(path: Path) -> str | None:
    """What names the series of a DICOM file, or None where OpenSlide does not open it."""
    try:
        with openslide.OpenSlide(path) as handle:
            return handle.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None
