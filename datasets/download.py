"""Download a public cohort, the MAD-MIL study's patch features and labels; or a real slide to try commands on.

    uv run python -m datasets.download breast                  datasets/breast/features/ and labels.csv
    uv run python -m datasets.download kidney --labels_only    the label table alone
    uv run python -m datasets.download test-slide              testSlides/CMU-1-Small-Region.svs

The features are Zenodo record 10563985 (Keshvarikhojasteh et al. 2024, https://arxiv.org/abs/2404.05362), whose API
gives sizes and MD5 digests; the labels are the study's tables at a fixed commit. The same command resumes an
interrupted download.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.core import cli
from utils.core.settings import REQUIRED, Settings, option


@dataclass(frozen=True, kw_only=True)
class Download(Settings):
    """What `datasets.download` downloads."""

    name: Literal["breast", "kidney", "lung", "tupac", "test-slide"] = option(
        REQUIRED, "a cohort (MAD-MIL study, Zenodo 10563985), or a slide to try", positional=True
    )
    labels_only: bool = option(False, "download the label table without the features")
    output_dir: Path | None = option(None, "folder to write to (default: datasets/<name>, testSlides for the slide)")


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

_ATTEMPTS = 6  # in a row without progress
PAUSE = 2.0  # s before the second attempt, twice as long before each further one
_TIMEOUT = 60  # s without a response
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_BLOCK = 2**20  # bytes
_MEMBER = re.compile(r"(?:[^/]+/)*pt_files/([^/\\]+\.pt)")
_SLIDE_ENDINGS = (".svs", ".tif", ".tiff", ".ndpi")
# How the record's features were made: ImageNet's ResNet50 cut after layer3, patches of 256 px at 20x, not resized.
RECIPE = {
    "backbone": "resnet50", "transform": backbone_spec("resnet50").transform.as_dict(),
    "patch_size": 256, "stride": 256, "mpp": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A cohort's archive of features in the record, its label table, and the table's SHA-256."""

    archive: str
    table: str
    sha256: str


SOURCES = {
    "breast": Source(
        "BRCA.zip", "tcga_brca_subset.csv", "368c651d91d3c08cc2a72d96f16e836ac18d584e30b3bea404c9fb18eb393b82"
    ),
    "kidney": Source(
        "KIDNEY.zip", "tcga_kidney_subset.csv", "4954982a767a29cd5195de4823fce26d1a42ffe2da94963db83ddeacfe48f23f"
    ),
    "lung": Source(
        "LUNG.zip", "tcga_lung_subset.csv", "bb21f8eaf2e74566c216f6d8f8f3a852208a62d029405f28e820b65c71a1e10b"
    ),
    "tupac": Source("TUPAC.zip", "tupac16.csv", "4e437732ed1a3461beaea017beb15cadccc7369af8439940a72e195cdc04656b"),
}


def download_cohort(name: str, folder: Path, labels_only: bool = False) -> None:
    """Download a cohort's labels and features into a folder; complete files are not fetched again.

    Raises DownloadError if the network keeps failing, a file is not what was published, or the disk is too small.
    """
    source, cohort = SOURCES[name], KNOWN_COHORTS[name]
    table = folder / source.table
    fetch(TABLES + source.table, table, algorithm="sha256", expected=source.sha256)
    rows = _label_rows(table.read_text(encoding="utf-8-sig"), table)
    _write_labels(folder / "labels.csv", rows)
    table.unlink()
    _log_classes(folder / "labels.csv", rows, cohort)
    if labels_only:
        return
    features = folder / "features"
    if not _is_unpacked(features, source.archive):
        entry = _record_entry(source.archive)
        archive = folder / source.archive
        # Archive and unpacked files take about the same space.
        _check_space(folder, 2 * entry["size"] - (_size(archive) or _size(_partial(archive))), source.archive)
        fetch(
            entry["links"]["self"], archive, size=entry["size"], algorithm="md5",
            expected=entry["checksum"].removeprefix("md5:"),
        )  # fmt: skip
        _unpack(archive, features)
        write_json(features / "recipe.json", RECIPE)
        archive.unlink()
    _log_missing(features, rows, cohort)


def fetch(url: str, target: Path, *, algorithm: str, expected: str, size: int | None = None) -> None:
    """Fetch a file, continuing an earlier attempt; it gets the name `target` once its digest is the expected one.

    Raises DownloadError.
    """
    if target.is_dir():
        raise DownloadError(f"{target}: is a folder, expected a file; move it away")
    if target.exists() and _digest(target, algorithm) == expected:
        return
    _make_folder(target.parent)
    partial = _partial(target)
    with progress_bar(target.name, size, unit="B", unit_scale=True) as bar:
        _fetch_with_retries(url, partial, size, bar)
    digest = _digest(partial, algorithm)
    if digest != expected:
        partial.unlink()
        raise DownloadError(
            f"{url}: the downloaded file is damaged ({algorithm} {digest}, expected {expected}) and was removed; run "
            "the same command again"
        )
    partial.replace(target)


def _fetch_with_retries(url: str, partial: Path, size: int | None, bar: Any) -> None:
    failures, has_logged_a_retry = 0, False
    while True:
        before = _size(partial)
        bar.n = before
        try:
            _continue(url, partial, size, bar)
            return
        except (OSError, http.client.HTTPException) as failure:
            if getattr(failure, "errno", None) in _DISK_ERRORS:
                remedy = "free some space, or give another --output_dir"
                raise DownloadError(f"{partial}: cannot be written ({failure}); {remedy}") from failure
            failures = 1 if _size(partial) > before else failures + 1
            if failures == _ATTEMPTS or _is_final(failure):
                saved = f"the first {file_size(_size(partial))} are kept: " if _size(partial) else ""
                raise DownloadError(
                    f"{url}: cannot be fetched ({failure}); {saved}run the same command again"
                ) from failure
            if not has_logged_a_retry:
                has_logged_a_retry = True
                log.info("%s: %s; tried again, up to %d times without progress", url, failure, _ATTEMPTS)
            bar.set_postfix_str(f"attempt {failures + 1} of {_ATTEMPTS}")
            time.sleep(PAUSE * 2 ** (failures - 1))


def _continue(url: str, partial: Path, size: int | None, bar: Any) -> None:
    """Append the remaining bytes to the partial file; `size` is None if unknown. Raises OSError or HTTPException if it
    is still incomplete.
    """
    offset = _size(partial)
    if size is not None and offset >= size:
        return
    headers = {"User-Agent": "LiteMIL"} | ({"Range": f"bytes={offset}-"} if offset else {})
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - addresses of this file and of the record
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:  # noqa: S310
            expected_range = f"bytes {offset}-"  # if a server sends another range, everything is fetched anew
            is_resumed = offset > 0 and (response.headers.get("Content-Range") or "").startswith(expected_range)
            if response.status == http.HTTPStatus.PARTIAL_CONTENT and not is_resumed:
                partial.unlink()
                raise http.client.IncompleteRead(b"")
            length = response.headers.get("Content-Length")
            with partial.open("ab" if is_resumed else "wb") as file:
                bar.n = offset if is_resumed else 0
                received, limit = 0, float("inf") if size is None else size - bar.n
                while received <= limit and (block := response.read(_BLOCK)):
                    file.write(block)
                    bar.update(len(block))
                    received += len(block)
            expected = limit if size is not None else int(length or 0)
            if received < expected:
                raise http.client.IncompleteRead(b"", int(expected) - received)
    except urllib.error.HTTPError as failure:
        if failure.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # that means the file is complete
            raise


def _is_final(failure: Exception) -> bool:
    """Return whether retrying is pointless: the server has no such file, or refuses it."""
    return isinstance(failure, urllib.error.HTTPError) and 400 <= failure.code < 500 and failure.code not in (408, 429)


def _record_entry(archive: str) -> dict[str, Any]:
    """Return the record's entry of one of its files: `size`, `checksum`, `links`."""
    try:
        with urllib.request.urlopen(RECORD, timeout=_TIMEOUT) as response:
            files = json.loads(response.read())["files"]
        return next(file for file in files if file["key"] == archive and file["checksum"].startswith("md5:"))
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, StopIteration) as failure:
        raise DownloadError(
            f"{RECORD}: does not tell where {archive} is ({str(failure) or 'not listed'}); try again later"
        ) from failure


def _unpack(archive: Path, features: Path) -> None:
    """Unpack the archive's feature files, each whole or absent; skip those that exist already."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = {match[1]: info for info in file.infolist() if (match := _MEMBER.fullmatch(info.filename))}
            missing = [(name, info) for name, info in members.items() if _size(features / name) != info.file_size]
            _check_space(features, sum(info.file_size for _, info in missing), archive.name)
            if not members:
                raise DownloadError(f"{archive}: no pt_files/*.pt in it; look at the record's page")
            for name, info in progress(missing, "Unpacking", unit="file"):
                with file.open(info) as packed, whole_file(features / name) as path, path.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, _BLOCK)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as failure:  # the last two: an unknown compression
        raise DownloadError(f"{archive}: damaged ({failure}); remove it and run the same command again") from failure
    except OSError as failure:
        raise DownloadError(
            f"{features}: cannot be written ({failure}); free some space, and run it again"
        ) from failure


def _is_unpacked(features: Path, archive: str) -> bool:
    """Return whether everything is unpacked: the recipe is written last."""
    return (features / "recipe.json").exists() and not (features.parent / archive).exists()


def _label_rows(text: str, table: Path) -> list[dict[str, str]]:
    """Return the rows of the study's table as `labels.csv` has them: our columns first, the others unchanged."""
    rows = list(csv.DictReader(io.StringIO(text)))
    label = next((name for name in ("label", "oncotree_code") if rows and name in rows[0]), None)
    if label is None or "slide_id" not in rows[0]:
        raise DownloadError(f"{table}: no column slide_id or label in it; it is not the table that was published")
    label_rows = []
    for row in rows:
        slide = row["slide_id"]
        ending = next((ending for ending in _SLIDE_ENDINGS if slide.lower().endswith(ending)), "")
        columns = {"case_id": row["case_id"], "wsi_id": slide[: len(slide) - len(ending)], "label": row[label]}
        columns |= {name: value for name, value in row.items() if name and name not in ("case_id", "label")}
        label_rows.append(columns)
    return label_rows


def _write_labels(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if path.exists() and path.read_text(encoding="utf-8") != content.getvalue():
        raise DownloadError(f"{path}: is there, and is not the study's table; move it away")
    write_text(path, content.getvalue())


def _log_classes(path: Path, rows: Sequence[Mapping[str, str]], cohort: KnownCohort) -> None:
    counts = Counter(cohort.label_names.get(row["label"], row["label"]) for row in rows)
    by_class = ", ".join(f"{name} {counts[name]}" for name in cohort.class_names)
    rare = sum(counts[name] for name in cohort.left_out)
    omitted = f"; {plural(rare, 'slide')} of {', '.join(cohort.left_out)} left out" if rare else ""
    total = plural(sum(counts[name] for name in cohort.class_names), "slide")
    log.info("%s: %s (%s)%s", path, total, by_class, omitted)


def _log_missing(features: Path, rows: Sequence[Mapping[str, str]], cohort: KnownCohort) -> None:
    slides = [row["wsi_id"] for row in rows if row["label"] not in cohort.left_out]
    missing = [slide for slide in slides if not (features / f"{slide}.pt").exists()]
    log.info("%s: %s", features, plural(len(list(features.glob("*.pt"))), "feature file"))
    if missing:
        count = plural(len(missing), "slide")
        log.warning("%s without features, such as %s; train with --allow missing", count, missing[0])


def _check_space(folder: Path, needed: int, file: str) -> None:
    _make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{folder}: {file_size(free)} free, but {file} needs {file_size(needed)}; free some space, or give "
            "--output_dir on another disk"
        )


def _make_folder(folder: Path) -> None:
    """Make a folder; raise DownloadError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise DownloadError(f"{folder}: cannot be made ({failure}); give another --output_dir") from failure


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main() -> None:
    """Download the cohort or the slide, and print the next step."""
    (download,) = cli.parse(str(__doc__), _FLAGS)
    if download.name == "test-slide":
        target = (download.output_dir or Path("testSlides")) / TEST_SLIDE.rsplit("/", 1)[1]
        fetch(TEST_SLIDE, target, algorithm="sha256", expected=TEST_SLIDE_SHA256, size=TEST_SLIDE_BYTES)
        print(f"{target}: a real slide, skin, H&E (OpenSlide's test data, CC0; took {cli.took()})")
        print(f"\nNext:\n\n  uv run extractFeatures.py --input {target} --output_dir features --mpp 0.5 --preview")
        return
    folder = download.output_dir or Path("datasets") / download.name
    download_cohort(download.name, folder, download.labels_only)
    print(f"{folder}: the cohort's {'labels' if download.labels_only else 'labels and features'} (took {cli.took()})")
    if not download.labels_only:
        print(f"\nNext:\n\n  uv run train.py --mil LiteMIL --dataset {download.name}")


if __name__ == "__main__":
    cli.run(main)
