"""Find the slides in a folder, and say why other files are left out."""

import errno
import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import openslide

from utils.core.errors import SlideError, first_few
from utils.core.runtime import log
from utils.slides.mirax import data_files, data_folder, is_mirax
from utils.slides.picture_names import is_picture_name, words_of

SLIDE_EXTENSIONS = frozenset(
    {".svs", ".tif", ".tiff", ".btf", ".tf8", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi",
     ".dcm"}
)  # fmt: skip
TIFF_EXTENSIONS = frozenset({".tif", ".tiff", ".btf", ".tf8"})
IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp"})
# Slide formats that neither OpenSlide nor this tool reads.
FOREIGN_EXTENSIONS = frozenset(
    {".vsi", ".isyntax", ".i2syntax", ".kfb", ".kfbf", ".sdpc", ".tmap", ".mds", ".mdsx", ".qptiff", ".lif", ".nd2",
     ".zvi", ".oir", ".afi", ".jp2", ".ets", ".dyqx"}
)  # fmt: skip
_PACKED_EXTENSIONS = frozenset({".zip", ".gz", ".tgz", ".tar", ".7z", ".rar", ".bz2", ".xz", ".zst"})

# Files that often lie beside slides; they are left out without a message.
_NO_SLIDES = frozenset(
    {".csv", ".tsv", ".txt", ".md", ".json", ".geojson", ".xml", ".html", ".pdf", ".xls", ".xlsx", ".docx", ".yaml",
     ".yml", ".toml", ".ini", ".dat", ".db", ".log", ".py", ".ipynb", ".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz",
     ".ndpa", ".ndpis", ".opt", ".sha256", ".md5", ".part", ".qpdata", ".qpproj", ".svg"}
)  # fmt: skip
_OF_A_NAS = frozenset({"@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX"})
_NAMED = 4
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
# Why something was left out, in the order of the message; the suspect reasons may hide a slide.
_DANGLING, _CLOSED = "links that lead nowhere", "files and folders without read permission"
_PACKED, _FOREIGN = "packed files", "files of formats that are not read"
_BESIDE, _PICTURE = "files beside a slide of the same name", "masks and pictures by their name"
_UNKNOWN = "files with unknown endings"
_SUSPECT = frozenset({_DANGLING, _CLOSED, _PACKED, _FOREIGN, _BESIDE})
_TAKE = "--extensions takes all files with the endings it names, --input any file"
_REMEDIES = {
    _DANGLING: "repair them", _CLOSED: "ask for permission", _PACKED: "unpack those that hold slides",
    _FOREIGN: "convert them, to OME-TIFF for example", _BESIDE: _TAKE, _PICTURE: _TAKE,
    _UNKNOWN: _TAKE,
}  # fmt: skip


def is_slide_file(path: Path | str) -> bool:
    """Return whether a file is a slide or an image that can be read, by its ending alone."""
    return Path(path).suffix.lower() in SLIDE_EXTENSIONS | IMAGE_EXTENSIONS


@dataclass(frozen=True)
class FoundSlides:
    """The slides of a folder, sorted by path, and the files left out, by reason.

    `are_pictures` means that all of them are named like pictures, so that these have to be the slides.
    """

    slides: list[Path]
    left_out: Mapping[str, list[Path]]
    are_pictures: bool = False

    def log(self, folder: Path) -> None:
        """Log what was left out, in one line; as a warning if a slide may be among it."""
        if self.are_pictures:
            names = _names(self.slides)
            log.warning(
                "%s: all its images have names of masks or pictures (%s); they are taken as slides", folder, names
            )
        if self.left_out:
            level = logging.WARNING if self.left_out.keys() & _SUSPECT else logging.INFO
            log.log(level, "%s: left out %s", folder, self.left_out_words)

    @property
    def left_out_words(self) -> str:
        """What was left out and why, with the remedies."""
        groups: list[str] = []
        reasons = [reason for reason in _REMEDIES if reason in self.left_out]
        for reason, following in zip(reasons, [*reasons[1:], ""], strict=True):
            paths, remedy = self.left_out[reason], _REMEDIES[reason]
            groups.append(f"{reason} ({len(paths)}: {_names(paths)})")
            if remedy != _REMEDIES.get(following):
                groups[-1] += f": {remedy}"
            if reason == _FOREIGN and any(path.suffix.lower() == ".qptiff" for path in paths):
                groups[-1] += " (--extensions .qptiff tries those as they are)"
        return "; ".join(groups)


def find_slides(folder: Path | str, extensions: Iterable[str] | None = None) -> list[Path]:
    """Return all slide files under a folder, as `look_for_slides` finds them.

    Raises:
        SlideError: the folder does not exist.
    """
    return look_for_slides(folder, extensions).slides


def look_for_slides(folder: Path | str, extensions: Iterable[str] | None = None) -> FoundSlides:
    """Find all slide files under a folder, including subfolders and links to folders, each folder once.

    Hidden files and folders, and a NAS's own folders, are left out. If no extensions are given, so are parts and
    pictures of slides: masks, thumbnails, previews, the `.jpg` tiles of a Hamamatsu `.vms`, and an image or a plain
    TIFF beside a slide of the same name. Extensions may be in any case, with or without the dot; None means every known
    one.

    Raises:
        SlideError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SlideError(f"{folder}: not a folder; give the folder that holds the slides")
    left_out: dict[str, list[Path]] = defaultdict(list)
    files = [path for path in _files_under(folder, left_out) if path.suffix.lower() not in _NO_SLIDES]
    are_pictures = False
    if extensions is None:
        slides, are_pictures = _known_slides(folder, _readable(files, left_out), left_out)
    else:
        endings = {"." + extension.strip().lower().lstrip(".") for extension in extensions}
        files = [path for path in files if path.suffix.lower() in endings or _may_be_a_folder(path)]
        slides = [path for path in _readable(files, left_out) if path.suffix.lower() in endings]
    by_reason = {reason: sorted(paths) for reason, paths in left_out.items() if paths}
    return FoundSlides(sorted(slides), by_reason, are_pictures)


def _known_slides(folder: Path, files: Sequence[Path], left_out: dict[str, list[Path]]) -> tuple[list[Path], bool]:
    """Return the slides among the files, by ending and name, and whether all of them are named like pictures."""
    slides = []
    for path in files:
        ending = path.suffix.lower()
        if ending in SLIDE_EXTENSIONS | IMAGE_EXTENSIONS:
            slides.append(path)
        elif ending in _PACKED_EXTENSIONS:
            if Path(path.stem).suffix.lower() not in _NO_SLIDES:
                left_out[_PACKED].append(path)
        elif ending in FOREIGN_EXTENSIONS:
            left_out[_FOREIGN].append(path)
        else:
            left_out[_UNKNOWN].append(path)
    return _without_pictures(folder, slides, left_out)


def _may_be_a_folder(path: Path) -> bool:
    """Return whether a path is a link whose ending is not that of a file."""
    file_endings = SLIDE_EXTENSIONS | IMAGE_EXTENSIONS | FOREIGN_EXTENSIONS | _PACKED_EXTENSIONS
    if path.suffix.lower() in file_endings:
        return False
    try:
        return path.is_symlink()
    except OSError:  # in a folder without permission
        return True


def _files_under(folder: Path, left_out: dict[str, list[Path]]) -> Iterator[Path]:
    """Yield all files that are not hidden. Links to folders are followed last, so that a folder keeps its own path."""
    visited: set[tuple[int, int]] = set()
    waiting, links = [folder], deque[Path]()
    while waiting or links:
        directory = waiting.pop() if waiting else links.popleft()
        try:
            status = directory.stat()
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError:
            left_out[_CLOSED].append(directory)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _OF_A_NAS:
                continue
            path = Path(entry.path)
            if entry.is_symlink() and _is_reachable(path) and path.is_dir():
                links.append(path)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            else:
                yield path


def _is_reachable(path: Path) -> bool:
    """Return whether the target of a link exists and may be read."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _readable(files: Iterable[Path], left_out: dict[str, list[Path]]) -> list[Path]:
    """Return the files that exist and may be read; add the others to `left_out`."""
    readable = []
    for path in files:
        try:
            path.stat()
        except OSError as error:
            left_out[_DANGLING if error.errno in _NOT_THERE else _CLOSED].append(path)
        else:
            readable.append(path)
    return readable


def _without_pictures(folder: Path, files: Sequence[Path], left_out: dict[str, list[Path]]) -> tuple[list[Path], bool]:
    """Remove the files that are parts or pictures of slides; also return whether there were only pictures.

    If all files are named like pictures, and nothing was left out that may be their slide, they are the slides.
    """
    tiled = {path.parent for path in files if path.suffix.lower() in {".vms", ".vmu"}}
    best: dict[tuple[Path, str], int] = {}
    for path in files:
        best[_key(path)] = min(_rank(path), best.get(_key(path), 2))
    file_names = {words_of(_bare_name(path)) for path in files}
    slides, pictures, beside = [], [], []
    for path in files:
        rank = _rank(path)
        if rank == 2 and path.parent in tiled:
            continue  # the tiles that a .vms is made of
        names = [*path.relative_to(folder).parts[:-1], _bare_name(path)]
        if rank > best[_key(path)]:
            beside.append(path)
        elif rank > 0 and any(is_picture_name(name, file_names) for name in names):
            pictures.append(path)
        else:
            slides.append(path)
    left_out[_BESIDE] += beside
    if pictures and not slides and not any(left_out[reason] for reason in _SUSPECT):
        return pictures, True
    left_out[_PICTURE] += pictures
    return slides, False


def _key(path: Path) -> tuple[Path, str]:
    """Return a file's folder and its bare name in lower case; files with the same key belong together."""
    return path.parent, _bare_name(path).casefold()


def _bare_name(path: Path) -> str:
    """Return a file's name without the endings of slides and images: "x" for both "x.svs" and "x.svs.png"."""
    name = path.name
    while Path(name).suffix.lower() in SLIDE_EXTENSIONS | IMAGE_EXTENSIONS:
        name = Path(name).stem
    return name


def _rank(path: Path) -> int:
    """Return 0 for a scanner's format, 1 for a TIFF, 2 for an image: the lowest of files with one key is a slide."""
    ending = path.suffix.lower()
    return 2 if ending in IMAGE_EXTENSIONS else 1 if ending in TIFF_EXTENSIONS else 0


def no_slide_words(folder: Path, listing: FoundSlides, extensions: Sequence[str] | None = None) -> str:
    """Say why a folder has no slides, and what to do."""
    if extensions:
        all_slides = look_for_slides(folder)
        endings = " ".join(sorted({slide.suffix for slide in all_slides.slides}))
        advice = f"the slides there end in {endings}" if endings else no_slide_words(folder, all_slides)
        return f"no file with {' '.join(extensions)} in it; {advice}"
    if listing.left_out:
        return f"no slide in it; left out {listing.left_out_words}"
    return "no file with a slide's ending in it; check the path, or name the endings with --extensions"


def _names(paths: Sequence[Path]) -> str:
    return first_few([path.name for path in paths], _NAMED)


def one_per_series(slides: Sequence[Path]) -> list[Path]:
    """Return one file of each DICOM series, since any of its files opens the whole slide."""
    slides_kept, series_seen = [], set()
    for slide in slides:
        series = (slide.parent, _series(slide)) if slide.suffix.lower() == ".dcm" else None
        if series is None or series[1] is None or series not in series_seen:
            slides_kept.append(slide)
        series_seen.add(series)
    return slides_kept


def slide_bytes(slide: Path) -> int:
    """Return a slide's size on disk, including the data files of a MIRAX slide; 0 if it cannot be read."""
    try:
        files = [slide, *(data_files(slide) if is_mirax(slide) and data_folder(slide).is_dir() else ())]
        return sum(file.stat().st_size for file in files)
    except (OSError, SlideError):
        return 0


def _series(path: Path) -> str | None:
    """Return the series UID of a DICOM file, or None if OpenSlide does not open it."""
    try:
        with openslide.OpenSlide(path) as handle:
            return handle.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None
