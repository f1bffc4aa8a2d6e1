"""Find the slides of a folder, and say why other files are left out."""

import errno
import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import openslide

from utils.core.errors import SlideError, named
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
    _DANGLING: "mend them", _CLOSED: "ask for permission", _PACKED: "unpack those that hold slides",
    _FOREIGN: "convert them, to OME-TIFF for example", _BESIDE: _TAKE, _PICTURE: _TAKE,
    _UNKNOWN: _TAKE,
}  # fmt: skip


def is_slide_file(path: Path | str) -> bool:
    """Whether a file is a slide or an image that can be read, by its ending alone."""
    return Path(path).suffix.lower() in SLIDE_EXTENSIONS | IMAGE_EXTENSIONS


@dataclass(frozen=True)
class FoundSlides:
    """The slides of a folder, sorted by path, and what was left out, by reason.

    `are_pictures` says that all of them have names of pictures, and were taken for that reason.
    """

    slides: list[Path]
    left_out: Mapping[str, list[Path]]
    are_pictures: bool = False

    def log(self, folder: Path) -> None:
        """Log what was left out, in a line; as a warning where a slide may be among it."""
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
        """What was left out and why, with the remedy."""
        parts: list[str] = []
        reasons = [reason for reason in _REMEDIES if reason in self.left_out]
        for reason, following in zip(reasons, [*reasons[1:], ""], strict=True):
            paths, remedy = self.left_out[reason], _REMEDIES[reason]
            parts.append(f"{reason} ({len(paths)}: {_names(paths)})")
            if remedy != _REMEDIES.get(following):
                parts[-1] += f": {remedy}"
            if reason == _FOREIGN and any(path.suffix.lower() == ".qptiff" for path in paths):
                parts[-1] += " (--extensions .qptiff tries those as they are)"
        return "; ".join(parts)


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
    files = [path for path in _files_under(folder, left_out) if path.suffix.lower() not in _NO_SLIDES]
    are_pictures = False
    if extensions is None:
        slides, are_pictures = _known_slides(folder, _readable(files, left_out), left_out)
    else:
        wanted = {"." + extension.strip().lower().lstrip(".") for extension in extensions}
        files = [path for path in files if path.suffix.lower() in wanted or _may_be_a_folder(path)]
        slides = [path for path in _readable(files, left_out) if path.suffix.lower() in wanted]
    there = {reason: sorted(paths) for reason, paths in left_out.items() if paths}
    return FoundSlides(sorted(slides), there, are_pictures)


def _known_slides(folder: Path, files: Sequence[Path], left_out: dict[str, list[Path]]) -> tuple[list[Path], bool]:
    """The slides among the files, by ending and name, and whether all of them have names of pictures."""
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
    """Whether a path is a link whose ending is not that of a file."""
    known = SLIDE_EXTENSIONS | IMAGE_EXTENSIONS | FOREIGN_EXTENSIONS | _PACKED_EXTENSIONS
    if path.suffix.lower() in known:
        return False
    try:
        return path.is_symlink()
    except OSError:  # in a folder without permission
        return True


def _files_under(folder: Path, left_out: dict[str, list[Path]]) -> Iterator[Path]:
    """All files that are not hidden. Links to folders are followed last, so that a folder keeps its own name."""
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
            if entry.is_symlink() and _is_reachable(path) and path.is_dir():
                links.append(path)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            else:
                yield path


def _is_reachable(path: Path) -> bool:
    """Whether the target of a link exists and may be read."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _readable(files: Iterable[Path], left_out: dict[str, list[Path]]) -> list[Path]:
    """The files that exist and may be read; the others are added to `left_out`."""
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
    """Remove the files that are parts or pictures of slides; also return whether only pictures were there.

    If all files have names of pictures, and nothing was left out that may be their slide, they are the slides.
    """
    tiled = {path.parent for path in files if path.suffix.lower() in {".vms", ".vmu"}}
    best: dict[tuple[Path, str], int] = {}
    for path in files:
        best[_key(path)] = min(_rank(path), best.get(_key(path), 2))
    names_there = {words_of(_bare_name(path)) for path in files}
    slides, pictures, beside = [], [], []
    for path in files:
        rank = _rank(path)
        if rank == 2 and path.parent in tiled:
            continue  # the tiles that a .vms is made of
        names = [*path.relative_to(folder).parts[:-1], _bare_name(path)]
        if rank > best[_key(path)]:
            beside.append(path)
        elif rank > 0 and any(is_picture_name(name, names_there) for name in names):
            pictures.append(path)
        else:
            slides.append(path)
    left_out[_BESIDE] += beside
    if pictures and not slides and not any(left_out[reason] for reason in _SUSPECT):
        return pictures, True
    left_out[_PICTURE] += pictures
    return slides, False


def _key(path: Path) -> tuple[Path, str]:
    """A file's folder and its bare name in small letters; files with one key belong together."""
    return path.parent, _bare_name(path).casefold()


def _bare_name(path: Path) -> str:
    """A file's name without the endings of slides and images: "x" for both "x.svs" and "x.svs.png"."""
    name = path.name
    while Path(name).suffix.lower() in SLIDE_EXTENSIONS | IMAGE_EXTENSIONS:
        name = Path(name).stem
    return name


def _rank(path: Path) -> int:
    """0 for a scanner's own format, 1 for a TIFF, 2 for an image: of files with one key, the lowest is the slide."""
    ending = path.suffix.lower()
    return 2 if ending in IMAGE_EXTENSIONS else 1 if ending in TIFF_EXTENSIONS else 0


def no_slide_words(folder: Path, looked: FoundSlides, extensions: Sequence[str] | None = None) -> str:
    """Say why a folder has no slides, and what to do."""
    if extensions:
        others = look_for_slides(folder)
        endings = " ".join(sorted({slide.suffix for slide in others.slides}))
        there = f"the slides there end in {endings}" if endings else no_slide_words(folder, others)
        return f"no file with {' '.join(extensions)} in it; {there}"
    if looked.left_out:
        return f"no slide in it; left out {looked.left_out_words}"
    return "no file with a slide's ending in it; check the path, or name the endings with --extensions"


def _names(paths: Sequence[Path]) -> str:
    return named([path.name for path in paths], _NAMED)


def one_per_series(slides: Sequence[Path]) -> list[Path]:
    """Keep one file of each DICOM series, since any of its files opens the whole slide."""
    kept, known = [], set()
    for slide in slides:
        series = (slide.parent, _series(slide)) if slide.suffix.lower() == ".dcm" else None
        if series is None or series[1] is None or series not in known:
            kept.append(slide)
        known.add(series)
    return kept


def slide_bytes(slide: Path) -> int:
    """A slide's size on disk, with the data files of a MIRAX slide; 0 if it cannot be read."""
    try:
        files = [slide, *(data_files(slide) if is_mirax(slide) and data_folder(slide).is_dir() else ())]
        return sum(file.stat().st_size for file in files)
    except (OSError, SlideError):
        return 0


def _series(path: Path) -> str | None:
    """The series UID of a DICOM file, or None if OpenSlide does not open it."""
    try:
        with openslide.OpenSlide(path) as handle:
            return handle.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None
