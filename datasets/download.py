"""Fetch a public cohort: the MAD-MIL study's patch features and labels; or a real slide to try commands on.

    uv run python -m datasets.download breast                  datasets/breast/features/ and labels.csv
    uv run python -m datasets.download kidney --labels_only    the label table alone
    uv run python -m datasets.download test-slide              testSlides/CMU-1-Small-Region.svs

The features are Zenodo record 10563985 (Keshvarikhojasteh et al. 2024, https://arxiv.org/abs/2404.05362), whose API
tells sizes and MD5; the labels are the study's own tables at a fixed commit. Interrupted, the same command goes on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.core import cli
from utils.core.settings import REQUIRED, Settings, option


@dataclass(frozen=True, kw_only=True)
class Download(Settings):
    """What `datasets.download` fetches."""

    name: Literal["breast", "kidney", "lung", "tupac", "test-slide"] = option(
        REQUIRED, "a cohort (MAD-MIL study, Zenodo 10563985), or a slide to try", positional=True
    )
    labels_only: bool = option(False, "the label table without the features")
    output_dir: Path | None = option(None, "where it goes (default: datasets/<name>, testSlides for the slide)")


_FLAGS = {"download": Download}
if __name__ == "__main__":
    cli.begin(str(__doc__), _FLAGS)

import csv
import errno
import hashlib
import http.client
import io
import json
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.cohorts import KNOWN_COHORTS, KnownCohort
from utils.core.errors import DownloadError, plural
from utils.core.files import whole_file, write_json, write_text
from utils.core.runtime import file_size, log, progress, progress_bar
from utils.features.backbones import backbone_spec

RECORD = "https://zenodo.org/api/records/10563985"
TABLES = "https://raw.githubusercontent.com/tueimage/MAD-MIL/bcd44c1a55ab5dca0a8a8c4ad0950cf93f8398ee/dataset_csv/"
TEST_SLIDE = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/CMU-1-Small-Region.svs"
TEST_SLIDE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
TEST_SLIDE_BYTES = 1_938_955

_ATTEMPTS, _PAUSE = 6, 2.0  # without a byte of progress; seconds before the second, twice as many before each further
_TIMEOUT = 60  # s without an answer
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_PIECE = 2**20
_MEMBER = re.compile(r"(?:[^/]+/)*pt_files/([^/\\]+\.pt)")
_SLIDE_ENDINGS = (".svs", ".tif", ".tiff", ".ndpi")
# Of the record's features: ImageNet's ResNet50 cut after layer3, patches of 256 px at 20x, not resized.
RECIPE = {
    "backbone": "resnet50", "transform": backbone_spec("resnet50").transform.as_dict(),
    "patch_size": 256, "stride": 256, "mpp": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """A cohort's archive of features in the record, its label table and the table's SHA-256."""

    archive: str
    table: str
    sha256: str


_SOURCES = {
    "breast": _Source(
        "BRCA.zip", "tcga_brca_subset.csv", "368c651d91d3c08cc2a72d96f16e836ac18d584e30b3bea404c9fb18eb393b82"
    ),
    "kidney": _Source(
        "KIDNEY.zip", "tcga_kidney_subset.csv", "4954982a767a29cd5195de4823fce26d1a42ffe2da94963db83ddeacfe48f23f"
    ),
    "lung": _Source(
        "LUNG.zip", "tcga_lung_subset.csv", "bb21f8eaf2e74566c216f6d8f8f3a852208a62d029405f28e820b65c71a1e10b"
    ),
    "tupac": _Source("TUPAC.zip", "tupac16.csv", "4e437732ed1a3461beaea017beb15cadccc7369af8439940a72e195cdc04656b"),
}


def download_cohort(name: str, folder: Path, labels_only: bool = False) -> None:
    """Fetch a cohort's labels and features into a folder; what is there and whole is not fetched again.

    Raises DownloadError where the network fails for good, something that was fetched is not what was published, or the
    disk is too small.
    """
    source, known = _SOURCES[name], KNOWN_COHORTS[name]
    table = folder / source.table
    fetch(TABLES + source.table, table, algorithm="sha256", expected=source.sha256)
    rows = _our_rows(table.read_text(encoding="utf-8-sig"), table)
    _write_labels(folder / "labels.csv", rows)
    table.unlink()
    _tell_classes(folder / "labels.csv", rows, known)
    if labels_only:
        return
    features = folder / "features"
    if not _is_unpacked(features, source.archive):
        listed = _listed(source.archive)
        archive = folder / source.archive
        # Unpacked they take about as much again.
        _check_space(folder, 2 * listed["size"] - (_size(archive) or _size(_part(archive))), source.archive)
        fetch(
            listed["links"]["self"], archive, size=listed["size"], algorithm="md5",
            expected=listed["checksum"].removeprefix("md5:"),
        )  # fmt: skip
        _unpack(archive, features)
        write_json(features / "recipe.json", RECIPE)
        archive.unlink()
    _tell_missing(features, rows, known)


def fetch(url: str, target: Path, *, algorithm: str, expected: str, size: int | None = None) -> None:
    """Fetch a file, going on from what an earlier attempt left; `target` appears when its digest is the expected one.

    Raises DownloadError.
    """
    if target.is_dir():
        raise DownloadError(f"{target}: is a folder, where a file is to be; move it away")
    if target.exists() and _digest(target, algorithm) == expected:
        return
    _make_folder(target.parent)
    part, failures, has_told_of_retries = _part(target), 0, False
    with progress_bar(target.name, size, unit="B", unit_scale=True) as bar:
        while True:
            before = _size(part)
            bar.n = before
            try:
                if _continue(url, part, size, bar):
                    break
            except (OSError, http.client.HTTPException) as failure:
                if getattr(failure, "errno", None) in _OF_THE_DISK:
                    remedy = "free some space, or give another --output_dir"
                    raise DownloadError(f"{part}: cannot be written ({failure}); {remedy}") from failure
                failures = 1 if _size(part) > before else failures + 1
                if failures == _ATTEMPTS or _is_final(failure):
                    kept = f"the first {file_size(_size(part))} are kept: " if _size(part) else ""
                    raise DownloadError(
                        f"{url}: cannot be fetched ({failure}); {kept}run the same command again"
                    ) from failure
                if not has_told_of_retries:
                    has_told_of_retries = True
                    log.info("%s: %s; tried again, up to %d times without progress", url, failure, _ATTEMPTS)
                bar.set_postfix_str(f"attempt {failures + 1} of {_ATTEMPTS}")
                time.sleep(_PAUSE * 2 ** (failures - 1))
    found = _digest(part, algorithm)
    if found != expected:
        part.unlink()
        raise DownloadError(
            f"{url}: what came is damaged ({algorithm} {found}, expected {expected}) and was removed; run the same "
            "command again"
        )
    part.replace(target)


def _continue(url: str, part: Path, size: int | None, bar: Any) -> bool:
    """Append to `part` what is missing of its `size`, where that is known; True when there is no more."""
    have = _size(part)
    if size is not None and have >= size:
        return True
    headers = {"User-Agent": "LiteMIL"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - addresses of this file and of the record
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310
            begins = f"bytes {have}-"  # where a server goes on elsewhere than asked, all is fetched anew
            goes_on = have > 0 and (answer.headers.get("Content-Range") or "").startswith(begins)
            if answer.status == http.HTTPStatus.PARTIAL_CONTENT and not goes_on:
                part.unlink()
                raise http.client.IncompleteRead(b"")
            length = answer.headers.get("Content-Length")
            with part.open("ab" if goes_on else "wb") as file:
                bar.n = have if goes_on else 0
                came, most = 0, float("inf") if size is None else size - bar.n
                while came <= most and (piece := answer.read(_PIECE)):
                    file.write(piece)
                    bar.update(len(piece))
                    came += len(piece)
            expected = most if size is not None else int(length or 0)
            if came < expected:
                raise http.client.IncompleteRead(b"", int(expected) - came)
    except urllib.error.HTTPError as failure:
        if failure.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # there is no more than we have
            return True
        raise
    return True


def _is_final(failure: Exception) -> bool:
    """Whether to ask again is in vain: the server knows of no such file, or lets nobody have it."""
    return isinstance(failure, urllib.error.HTTPError) and 400 <= failure.code < 500 and failure.code not in (408, 429)


def _listed(archive: str) -> dict[str, Any]:
    """What the record says of one of its files: `size`, `checksum`, `links`."""
    try:
        with urllib.request.urlopen(RECORD, timeout=_TIMEOUT) as answer:
            files = json.loads(answer.read())["files"]
        return next(file for file in files if file["key"] == archive and file["checksum"].startswith("md5:"))
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, StopIteration) as failure:
        raise DownloadError(
            f"{RECORD}: does not tell where {archive} is ({str(failure) or 'not listed'}); try again later"
        ) from failure


def _unpack(archive: Path, features: Path) -> None:
    """The archive's feature files, each whole or absent; those that are there already are left."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = {found[1]: one for one in file.infolist() if (found := _MEMBER.fullmatch(one.filename))}
            missing = [(name, one) for name, one in members.items() if _size(features / name) != one.file_size]
            _check_space(features, sum(one.file_size for _, one in missing), archive.name)
            if not members:
                raise DownloadError(f"{archive}: no pt_files/*.pt in it; look at the record's page")
            for name, one in progress(missing, "Unpacking", unit="file"):
                with file.open(one) as packed, whole_file(features / name) as part, part.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, _PIECE)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as failure:  # the last two: packed in another way
        raise DownloadError(f"{archive}: damaged ({failure}); remove it and run the same command again") from failure
    except OSError as failure:
        raise DownloadError(
            f"{features}: cannot be written ({failure}); free some space, and run it again"
        ) from failure


def _is_unpacked(features: Path, archive: str) -> bool:
    """Whether nothing is left to do: the declaration is written last."""
    return (features / "recipe.json").exists() and not (features.parent / archive).exists()


def _our_rows(text: str, table: Path) -> list[dict[str, str]]:
    """The study's table with our columns first, the others as they are."""
    rows = list(csv.DictReader(io.StringIO(text)))
    label = next((name for name in ("label", "oncotree_code") if rows and name in rows[0]), None)
    if label is None or "slide_id" not in rows[0]:
        raise DownloadError(f"{table}: no column slide_id or label in it; it is not the table that was published")
    ours = []
    for row in rows:
        slide = row["slide_id"]
        ending = next((one for one in _SLIDE_ENDINGS if slide.lower().endswith(one)), "")
        named = {"case_id": row["case_id"], "wsi_id": slide[: len(slide) - len(ending)], "label": row[label]}
        ours.append(named | {name: value for name, value in row.items() if name and name not in ("case_id", "label")})
    return ours


def _write_labels(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if path.exists() and path.read_text(encoding="utf-8") != content.getvalue():
        raise DownloadError(f"{path}: is there, and is not the study's table; move it away")
    write_text(path, content.getvalue())


def _tell_classes(path: Path, rows: Sequence[Mapping[str, str]], known: KnownCohort) -> None:
    counts = Counter(known.label_names.get(row["label"], row["label"]) for row in rows)
    told = ", ".join(f"{name} {counts[name]}" for name in known.class_names)
    rare = sum(counts[name] for name in known.left_out)
    left = f"; {plural(rare, 'slide')} of {', '.join(known.left_out)} left out" if rare else ""
    log.info("%s: %s (%s)%s", path, plural(sum(counts[name] for name in known.class_names), "slide"), told, left)


def _tell_missing(features: Path, rows: Sequence[Mapping[str, str]], known: KnownCohort) -> None:
    wanted = [row["wsi_id"] for row in rows if row["label"] not in known.left_out]
    missing = [name for name in wanted if not (features / f"{name}.pt").exists()]
    log.info("%s: %s", features, plural(len(list(features.glob("*.pt"))), "feature file"))
    if missing:
        told = plural(len(missing), "slide")
        log.warning("%s without features, such as %s; train with --allow missing", told, missing[0])


def _check_space(folder: Path, needed: int, what: str) -> None:
    _make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{folder}: {file_size(free)} free, but {what} needs {file_size(needed)}; free some space, or give "
            "--output_dir on another disk"
        )


def _make_folder(folder: Path) -> None:
    """Raises DownloadError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise DownloadError(f"{folder}: cannot be made ({failure}); give another --output_dir") from failure


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main() -> None:
    """Fetch what is asked for, and say what to do with it."""
    (asked,) = cli.parse(str(__doc__), _FLAGS)
    if asked.name == "test-slide":
        target = (asked.output_dir or Path("testSlides")) / TEST_SLIDE.rsplit("/", 1)[1]
        fetch(TEST_SLIDE, target, algorithm="sha256", expected=TEST_SLIDE_SHA256, size=TEST_SLIDE_BYTES)
        print(f"{target}: a real slide, skin, H&E (OpenSlide's test data, CC0; took {cli.took()})")
        print(f"\nNext:\n\n  uv run extractFeatures.py --input {target} --output_dir features --mpp 0.5 --preview")
        return
    folder = asked.output_dir or Path("datasets") / asked.name
    download_cohort(asked.name, folder, asked.labels_only)
    print(f"{folder}: the cohort's {'labels' if asked.labels_only else 'labels and features'} (took {cli.took()})")
    if not asked.labels_only:
        print(f"\nNext:\n\n  uv run train.py --mil LiteMIL --dataset {asked.name}")


if __name__ == "__main__":
    cli.run(main)
