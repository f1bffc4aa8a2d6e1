"""Which files are slides, and the slides of a folder."""

import logging
import os
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import openslide

from utils.core.errors import SlideError, named
from utils.core.runtime import log
from utils.slides.mirax import data_files, is_mirax

SLIDE_EXTENSIONS = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi", ".dcm"}
)
TIFF_EXTENSIONS = frozenset({".tif", ".tiff"})
IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp"})
# Of slides that neither OpenSlide nor we read.
FOREIGN_EXTENSIONS = frozenset(
    {".vsi", ".isyntax", ".i2syntax", ".kfb", ".kfbf", ".sdpc", ".tmap", ".mds", ".mdsx", ".qptiff", ".lif", ".nd2",
     ".zvi", ".oir", ".afi", ".jp2", ".ets", ".dyqx", ".btf", ".tf8"}
)  # fmt: skip

# Files that lie beside slides and are none, of which nothing needs to be said.
_NO_SLIDES = frozenset(
    {".csv", ".tsv", ".txt", ".md", ".json", ".geojson", ".xml", ".html", ".pdf", ".xls", ".xlsx", ".docx", ".yaml",
     ".yml", ".toml", ".ini", ".dat", ".db", ".log", ".py", ".ipynb", ".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz",
     ".zip", ".gz", ".tar", ".ndpa", ".ndpis", ".opt", ".sha256", ".md5", ".part", ".qpdata", ".qpproj", ".svg"}
)  # fmt: skip
# Files and folders that are named so are pictures of slides: masks, thumbnails, what we drew ourselves.
_PICTURES = re.compile(
    r"(^|[_\-. ])(masks?|thumb(nail)?s?|previews?|labels?|macros?|overview|segmentations?|annotations?|heatmap|detailed"
    r"|patch_grid|faithfulness|top_patches|tissue_mask)$",
    re.IGNORECASE,
)
_OF_A_NAS = frozenset({"@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX"})
_NAMED = 4
# Why something was left out; a slide may be among the suspect.
_FOREIGN, _UNKNOWN = "files of formats that are not read", "files whose endings tell nothing"
_DANGLING, _CLOSED = "links that lead nowhere", "what may not be read"
_PICTURE, _BESIDE = "masks and pictures by their name", "files beside a slide of the same name"
_SUSPECT = frozenset({_FOREIGN, _DANGLING, _CLOSED, _BESIDE})


def is_slide_file(path: Path | str) -> bool:
    """Whether the name is that of a slide or an image we can read; the file itself is not looked at."""
    return Path(path).suffix.lower() in SLIDE_EXTENSIONS | IMAGE_EXTENSIONS


@dataclass(frozen=True)
class FoundSlides:
    """The slides of a folder, sorted by path, and by reason the files and folders that are none or cannot be read."""

    slides: list[Path]
    left_out: Mapping[str, list[Path]]

    def log(self, folder: Path) -> None:
        """Log what was left out, in a line; as a warning where a slide may be among it."""
        if not self.left_out:
            return
        parts = [f"{reason} ({len(paths)}: {_names(paths)})" for reason, paths in self.left_out.items()]
        level = logging.WARNING if self.left_out.keys() & _SUSPECT else logging.INFO
        log.log(
            level, "%s: left out %s; --extensions takes all files with the endings it names", folder, "; ".join(parts)
        )


def find_slides(folder: Path | str, extensions: Iterable[str] | None = None) -> list[Path]:
    """All slide files under a folder, as `look_for_slides` finds them.

    Raises:
        SlideError: the folder does not exist.
    """
    return look_for_slides(folder, extensions).slides


def look_for_slides(folder: Path | str, extensions: Iterable[str] | None = None) -> FoundSlides:
    """All slide files under a folder, subfolders and links to folders included, each folder once.

    Hidden files and folders are left out, and what a NAS keeps of its own. So are, where no extensions are named, files
    that are parts or pictures of a slide: masks, thumbnails, previews, the `.jpg` tiles of a Hamamatsu `.vms`, and an
    image or a plain TIFF beside a slide of the same name. Extensions may be written in any case, with or without the
    dot; None means every known one.

    Raises:
        SlideError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SlideError(f"{folder}: not a folder; give the folder that holds the slides")
    left_out: dict[str, list[Path]] = defaultdict(list)
    files = list(_files_under(folder, left_out))
    if extensions is not None:
        wanted = {"." + extension.strip().lower().lstrip(".") for extension in extensions}
        slides = [path for path in files if path.suffix.lower() in wanted]
        return FoundSlides(sorted(_readable(slides, left_out)), dict(left_out))
    slides = [path for path in files if path.suffix.lower() in SLIDE_EXTENSIONS | IMAGE_EXTENSIONS]
    left_out[_FOREIGN] += [path for path in files if path.suffix.lower() in FOREIGN_EXTENSIONS]
    known = SLIDE_EXTENSIONS | IMAGE_EXTENSIONS | FOREIGN_EXTENSIONS | _NO_SLIDES
    left_out[_UNKNOWN] += [path for path in files if path.suffix.lower() not in known]
    slides = _without_pictures(folder, _readable(slides, left_out), left_out)
    return FoundSlides(sorted(slides), {reason: sorted(paths) for reason, paths in left_out.items() if paths})


def _files_under(folder: Path, left_out: dict[str, list[Path]]) -> Iterator[Path]:
    """All files that are not hidden, links to folders followed last, so that a folder is known by its own name."""
    seen: set[tuple[int, int]] = set()
    waiting, links = [folder], deque[Path]()
    while waiting or links:
        place = waiting.pop() if waiting else links.popleft()
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError:
            left_out[_CLOSED].append(place)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _OF_A_NAS:
                continue
            path = Path(entry.path)
            if entry.is_symlink() and _can_be_asked(path) and path.is_dir():
                links.append(path)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            else:
                yield path


def _can_be_asked(path: Path) -> bool:
    """Whether what a link leads to may be looked at."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _readable(slides: Iterable[Path], left_out: dict[str, list[Path]]) -> list[Path]:
    """The slides without links that lead nowhere, or where nobody may look."""
    found = []
    for path in slides:
        try:
            path.stat()
        except FileNotFoundError:
            left_out[_DANGLING].append(path)
        except OSError:
            left_out[_CLOSED].append(path)
        else:
            found.append(path)
    return found


def _without_pictures(folder: Path, slides: Sequence[Path], left_out: dict[str, list[Path]]) -> list[Path]:
    """The slides without what is a part or a picture of one."""
    tiled = {path.parent for path in slides if path.suffix.lower() in {".vms", ".vmu"}}
    ranks = {path: _rank(path) for path in slides}
    best: dict[tuple[Path, str], int] = {}
    for path, rank in ranks.items():
        key = path.parent, path.stem
        best[key] = min(rank, best.get(key, rank))
    found = []
    for path, rank in ranks.items():
        is_image, is_scan = path.suffix.lower() in IMAGE_EXTENSIONS, rank == 0
        words = [*path.relative_to(folder).parts[:-1], path.stem]
        if is_image and path.parent in tiled:
            continue  # the tiles that a .vms is made of
        if not is_scan and any(_PICTURES.search(word) for word in words):
            left_out[_PICTURE].append(path)
        elif rank > best[path.parent, path.stem]:
            left_out[_BESIDE].append(path)
        else:
            found.append(path)
    return found


def _rank(path: Path) -> int:
    """0 for a scanner's own format, 1 for a TIFF, 2 for an image: of files of one name the slide is the lowest."""
    ending = path.suffix.lower()
    return 2 if ending in IMAGE_EXTENSIONS else 1 if ending in TIFF_EXTENSIONS else 0


def _names(paths: Sequence[Path]) -> str:
    return named([path.name for path in paths], _NAMED)


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
    try:
        return sum(file.stat().st_size for file in [slide, *(data_files(slide) if is_mirax(slide) else ())])
    except (OSError, SlideError):
        return 0


def _series(path: Path) -> str | None:
    """What names the series of a DICOM file, or None where OpenSlide does not open it."""
    try:
        with openslide.OpenSlide(path) as handle:
            return handle.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None
