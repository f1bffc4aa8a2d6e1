"""The folder beside a MIRAX slide's file, which holds the slide's pixels."""

import re
from pathlib import Path

from utils.core.errors import SlideError

# The slide's own files; others (Thumbs.db, .DS_Store) do not matter.
_DATA_FILE = re.compile(r"slidedat\.ini|index\.dat|data\S*\.dat", re.IGNORECASE)


def is_mirax(slide: Path) -> bool:
    """Return whether the file is a MIRAX slide, by its ending."""
    return slide.suffix.lower() == ".mrxs"


def data_folder(slide: Path) -> Path:
    """Return the folder of a MIRAX slide; for a link without one, the folder beside its target."""
    folder = slide.with_suffix("")
    return folder if folder.is_dir() else slide.resolve().with_suffix("")


def data_files(slide: Path) -> list[Path]:
    """Return the files in a MIRAX slide's folder that belong to it, sorted. Raises SlideError if there is no folder."""
    folder = data_folder(slide)
    try:
        return sorted(path for path in folder.iterdir() if path.is_file() and _DATA_FILE.fullmatch(path.name))
    except OSError as error:
        raise SlideError(f"{folder}: the folder of {slide} cannot be read ({error.strerror})") from error


def check_data_folder(slide: Path) -> None:
    """Raise SlideError if a MIRAX slide's folder is not beside it, where OpenSlide looks for it."""
    folder = slide.with_suffix("")
    if not is_mirax(slide) or not slide.exists() or folder.is_dir():
        return
    missing = f"{slide}: its folder {folder} is missing, which holds the slide's pixels"
    if data_folder(slide).is_dir():
        raise SlideError(f"{missing}; {slide.name} is a link: link {data_folder(slide)} beside it too")
    raise SlideError(f"{missing}; copy it beside the .mrxs file")
