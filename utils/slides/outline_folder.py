"""Match the files in a folder of outlines (`--tissue`, `--annotations`) to slides."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.core.errors import ConfigError, SlideError, did_you_mean, first_few, plural
from utils.core.runtime import log

_ENDING = ".geojson"
_NAMED = 4


@dataclass(frozen=True)
class OutlineFolder:
    """A folder of files `<slide>.geojson` or `<slide>.svs.geojson`, with that ending in any case.

    With `is_strict` every slide needs a file. Slides are given with the subfolder that holds their file. `flag` is the
    flag that names the folder.
    """

    path: Path
    is_strict: bool = False
    flag: str = "--tissue"
    _listings: dict[Path, list[Path]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise ConfigError(f"{self.flag} {self.path}: no such folder; give that of the .geojson files")

    def file_of(self, slide: Path, subfolder: Path) -> Path | None:
        """Return the file with a slide's outlines, or None.

        Raises SlideError if there are two, or none and every slide needs one.
        """
        folder = self.path / subfolder
        expected = _names_of(slide)
        files = [path for path in self._files_in(folder) if _plain_name(path) in expected]
        if len(files) > 1:
            raise SlideError(f"{files[0]} and {files[1]}: which are the outlines of {slide}? Move one of them away")
        if not files and self.is_strict:
            raise SlideError(f"{folder / expected[0]}: missing; draw the slide's tissue, or leave --tissue_strict out")
        return files[0] if files else None

    def log_unused(self, slides: Iterable[tuple[Path, Path]]) -> None:
        """Warn of files that match none of the slides, which are given with their subfolders."""
        expected = {subfolder / name: slide for slide, subfolder in slides for name in _names_of(slide)}
        files = {path.relative_to(self.path): path for path in self._all_files()}
        used = {name for name, path in files.items() if name.with_name(_plain_name(path)) in expected}
        outlined = {expected[name.with_name(_plain_name(files[name]))] for name in used}
        free = [name.as_posix() for name, slide in expected.items() if slide not in outlined]
        unused = sorted(name.as_posix() for name in files.keys() - used)
        if unused:
            hints = [did_you_mean(name, free).removeprefix("; ") for name in unused[:_NAMED]]
            words = [f"{name} ({hint})" if hint else name for name, hint in zip(unused, hints, strict=False)]
            log.warning(
                "%s: %d of %s match no slide by name, and are not used: %s",
                self.path, len(unused), plural(len(files), "file"), first_few([*words, *unused[_NAMED:]], _NAMED),
            )  # fmt: skip

    def log_missing(self, slide: Path) -> None:
        """Warn if there are files, but none for the single slide."""
        files = sorted(path.relative_to(self.path).as_posix() for path in self._all_files())
        if files and self.file_of(slide, Path()) is None:
            name = _names_of(slide)[0]
            log.warning(
                "%s: no file for %s; there are %s%s", self.path, slide.name, first_few(files), did_you_mean(name, files)
            )

    def _files_in(self, folder: Path) -> list[Path]:
        """List the files of a folder, which is read only once."""
        if folder not in self._listings:
            self._listings[folder] = sorted(folder.iterdir()) if folder.is_dir() else []
        return self._listings[folder]

    def _all_files(self) -> Iterator[Path]:
        """Yield all files named as outlines are, including those in subfolders."""
        for folder, _, names in os.walk(self.path):
            yield from (Path(folder, name) for name in names if _ENDING in name.lower() and not name.startswith("."))


def _names_of(slide: Path) -> tuple[str, str]:
    return f"{slide.stem}{_ENDING}", f"{slide.name}{_ENDING}"


def _plain_name(path: Path) -> str:
    """Return the file's name with its ending in lower case."""
    return path.stem + path.suffix.lower()
