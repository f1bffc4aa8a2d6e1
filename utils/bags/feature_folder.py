"""The feature files of a folder and its subfolders, by slide id."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.bags.store import is_feature_file
from utils.core.errors import FeatureFileError, LabelsError, LiteMILError, first_few, plural

_MOST_FAULTS = 5  # faulty feature files that an error names


class FeatureFolder:
    """The feature files of a folder, listed once: `<wsi_id>.h5`, `.hdf5`, `.pt` or `.pth`, subfolders included, hidden
    files left out. `files` maps each slide id to its files, which should be one. Raises FeatureFileError for a missing
    folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FeatureFileError(f"{path}: no such folder; give the folder of feature files (--features_dir)")
        self.files: dict[str, list[Path]] = {}
        for file in sorted(self.path.rglob("*")):
            if is_feature_file(file) and not self._is_hidden(file) and file.is_file():
                self.files.setdefault(file.stem, []).append(file)

    def find(self, wsi_id: str) -> Path | None:
        """Return the slide's feature file, the first of several; None if there is none."""
        return self.files.get(wsi_id, [None])[0]

    def check_unique(self, wsi_ids: Iterable[str]) -> None:
        """Raise LabelsError, naming slides and files, where a slide has more than one feature file."""
        repeated = {wsi_id: files for wsi_id in wsi_ids if len(files := self.files.get(wsi_id, [])) > 1}
        if not repeated:
            return
        slides = [f"slide {wsi_id} has {' and '.join(map(self._name, files))}" for wsi_id, files in repeated.items()]
        count = f"{plural(len(slides), 'slide')} with several feature files: " if len(slides) > 1 else ""
        raise LabelsError(
            f"{self.path}: {count}{first_few(slides)}; keep one of them, or give the subfolder with the right ones"
        )

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()

    def _is_hidden(self, file: Path) -> bool:
        return any(name.startswith(".") for name in file.relative_to(self.path).parts)


def refuse(error: type[LiteMILError], faults: Sequence[str], total: int, remedy: str = "") -> None:
    """Raise `error` if any of `total` feature files has a fault; of several faults, count them and name the first."""
    if len(faults) > 1:
        more = f"; and {len(faults) - _MOST_FAULTS} more (utils.audit names all)" if faults[_MOST_FAULTS:] else ""
        first = "; ".join(faults[:_MOST_FAULTS])
        raise error(f"{len(faults)} of {total} feature files cannot be used: {first}{more}{remedy}")
    if faults:
        raise error(f"{faults[0]}{remedy}")
