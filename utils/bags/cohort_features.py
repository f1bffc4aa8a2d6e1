"""The feature files of a cohort together: whether they fit each other, and where their features are read from."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.bags.feature_folder import refuse
from utils.bags.packed import FileFeatures, MemoryFeatures, PackedFeatures, open_packed, pack
from utils.bags.store import BagInfo, peek_bag, read_bag
from utils.core.errors import ConfigError, FeatureFileError, RecipeError, first_few
from utils.core.recipe import COMPARED_FIELDS, Recipe
from utils.core.runtime import available_memory, log, progress

# By default, features are kept in memory if the whole cohort fits in this share of the free memory.
_MEMORY_SHARE = 0.25


def look_at_files(paths: Sequence[Path], feat_type: str, folder: Path, packed: Path | None) -> list[BagInfo]:
    """Return what each feature file holds, without its features; from the packed file where there is one.

    Raise FeatureFileError, naming all damaged files, and all whose features are of another width than most;
    RecipeError for files made in different ways.
    """
    opened = None if packed is None else open_packed(packed, paths, folder)
    info, faults = [], []
    for path in progress(paths, "Looking at feature files", unit="slide", leave=False):
        try:
            info.append((opened.info(path) if opened else None) or peek_bag(path, feat_type))
        except FeatureFileError as error:
            faults.append(str(error))
    if faults:  # files of a sound layout may be damaged inside: read all, so that one message names every damaged file
        faults = [fault for path in paths if (fault := _fault_of(path, feat_type))]
    refuse(FeatureFileError, faults, len(paths))
    _check_widths(paths, info)
    _check_recipes(paths, info)
    return info


def open_features(
    files: FileFeatures, cache: str | Path | None, packed: Path | None
) -> FileFeatures | MemoryFeatures | PackedFeatures:
    """Return the features where `cache` says (see `MILDataset`), and log where that is. Raise ConfigError where the
    memory does not hold them.
    """
    total, free = sum(info.nbytes for info in files.info), available_memory()
    size = f"{len(files.info)} slides, {total / 1e9:.2f} GB of features"

    def fits(share: float) -> bool:
        return free is None or total <= free * share

    if packed is not None:
        features = pack(packed, files)
        log.info("%s: packed in %s", size, packed)
        return features
    if cache == "off" or (cache is None and not fits(_MEMORY_SHARE)):
        advice = "" if cache else "; --cache DIR packs them into one fast file"
        log.info("%s: read from their files in every epoch%s", size, advice)
        return files
    if not fits(1):
        raise ConfigError(f"--cache ram: {size}, {(free or 0) / 1e9:.2f} GB of memory free; give off or a folder")
    log.info("%s: kept in memory after the first read", size)
    return MemoryFeatures(files)


def share(features: FileFeatures | MemoryFeatures | PackedFeatures, path: Path) -> FileFeatures | PackedFeatures:
    """Return the features for several processes: those kept in memory are packed into one file."""
    if isinstance(features, MemoryFeatures):
        log.info("several processes share the features: packed into one file, not in memory")
        return pack(path, features.files)
    if isinstance(features, FileFeatures):
        log.info("each process reads the feature files in every epoch; --cache DIR packs them for all")
    return features


def _fault_of(path: Path, feat_type: str) -> str | None:
    try:
        read_bag(path, feat_type)
    except FeatureFileError as error:
        return str(error)
    return None


def _check_widths(paths: Sequence[Path], info: Sequence[BagInfo]) -> None:
    width = Counter(bag.dim for bag in info).most_common(1)[0][0]
    first = next(path for path, bag in zip(paths, info, strict=True) if bag.dim == width)
    faults = [
        f"{path}: features are {bag.dim} wide, those of {first} are {width}"
        for path, bag in zip(paths, info, strict=True)
        if bag.dim != width
    ]
    refuse(FeatureFileError, faults, len(paths), "; extract all slides with one backbone")


def _check_recipes(paths: Sequence[Path], info: Sequence[BagInfo]) -> None:
    recorded: dict[str, tuple[Path, Recipe]] = {}  # the first file that says so, by field: some record only some fields
    faults: dict[str, list[Path]] = {}  # the files that differ in the same way
    for path, bag in zip(paths, info, strict=True):
        recipe = bag.passport.recipe if bag.passport else Recipe()
        for name in COMPARED_FIELDS:
            if recipe[name] is not None:
                recorded.setdefault(name, (path, recipe))
            first, expected = recorded.get(name, (path, recipe))
            mismatches = expected.differences(recipe, [name])
            if mismatches:
                fault = f"made in another way than {first} ({'; '.join(mismatches)})"
                faults.setdefault(fault, []).append(path)
                break
    if faults:
        texts = [f"{first_few([str(path) for path in files])}: {fault}" for fault, files in faults.items()]
        raise RecipeError(f"{'; '.join(texts)}; extract all slides with one recipe")
