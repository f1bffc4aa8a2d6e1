"""Wherever a cohort's features are kept, they are those of its files, and nothing is read or kept twice."""

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.cohort import synthetic_bag
from utils.bags import packed
from utils.bags.packed import FileFeatures, MemoryFeatures, open_packed, pack, packed_path
from utils.bags.store import Bag, peek_bag, write_bag
from utils.core.errors import FeatureFileError
from utils.core.runtime import log

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (3, 700, 1, 40)


def write_slides(folder: Path, lengths=LENGTHS, dim: int = 5) -> list[Path]:
    """Slide files S0, S1, ... of alternating types, by three writers' habits."""
    rng = np.random.default_rng(0)
    paths = []
    for number, length in enumerate(lengths):
        features = rng.standard_normal((length, dim)).astype(("f4", "f2")[number % 2])
        path = folder / (f"S{number}.pt" if number % 4 == 3 else f"S{number}.h5")
        if number % 4 == 2:
            with h5py.File(path, "w") as file:
                file.create_dataset("features", data=features, chunks=(1, dim))
        else:
            write_bag(path, synthetic_bag(f"S{number}", features, rng))
        paths.append(path)
    return paths


def files_of(paths) -> FileFeatures:
    return FileFeatures(paths, [peek_bag(path) for path in paths], "features")


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    (tmp_path / "features").mkdir()
    return write_slides(tmp_path / "features")


@pytest.fixture
def files(paths) -> FileFeatures:
    return files_of(paths)


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "cache" / "a.packed"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that are read, in that order."""
    found = []

    def noting(files, slide):
        found.append(files.paths[slide].name)
        return read(files, slide)

    read = FileFeatures.__call__
    monkeypatch.setattr(FileFeatures, "__call__", noting)
    return found


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    return lambda: caplog.text


def same(features, files: FileFeatures) -> bool:
    """Twice over, so that what is kept from the first time is looked at too."""
    for slide in (*range(len(files.paths)), *reversed(range(len(files.paths)))):
        expected = files_of(files.paths)(slide)
        found = features(slide)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    return True


@pytest.mark.parametrize("home", ["files", "memory", "packed"])
def test_features_are_those_of_their_files(home, files, store):
    features = {"files": lambda: files, "memory": lambda: MemoryFeatures(files), "packed": lambda: pack(store, files)}
    assert same(features[home](), files)


# In their files


def test_hdf5_is_asked_only_once_for_a_file(files, monkeypatch):
    first = files(1)
    monkeypatch.setattr(h5py, "File", None)
    assert torch.equal(files(1), first)


def test_a_file_that_is_rewritten_in_use_is_refused(files, paths):
    write_bag(paths[1], Bag(np.ones((700, 5), "f4")))
    with pytest.raises(FeatureFileError, match=r"S1\.h5: was changed while it was in use; start again"):
        files(1)
    files(0)
    write_bag(paths[0], Bag(np.ones((3, 5), "f4")))
    with pytest.raises(FeatureFileError, match=r"S0\.h5: was changed while it was in use; start again"):
        files(0)


# In memory


def test_memory_is_filled_by_the_first_who_asks(files, reads):
    features = MemoryFeatures(files)
    assert reads == []
    for _ in range(2):
        features(1)
    assert reads == ["S1.h5"]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_worker_fills_the_memory_of_all(files, reads):
    features = MemoryFeatures(files)
    expected = files_of(files.paths)(1)
    reads.clear()
    worker = os.fork()
    if worker == 0:
        features(1)
        os._exit(0)
    assert os.waitpid(worker, 0)[1] == 0
    assert torch.equal(features(1), expected)
    assert reads == [], "the parent reads what the worker has read"


def test_a_worker_started_afresh_gets_the_files(files):
    copy = pickle.loads(pickle.dumps(MemoryFeatures(files)))  # noqa: S301
    assert type(copy) is FileFeatures
    assert same(copy, files)


def test_a_worker_started_afresh_opens_the_same_packed_file(files, store):
    features = pack(store, files)
    content = pickle.dumps(features)
    assert len(content) < 2000, "the features travel with it"
    copy = pickle.loads(content)  # noqa: S301
    assert copy.packed == features.packed
    assert same(copy, files)


# In one packed file


def test_a_packed_file_is_made_once(files, store, reads):
    pack(store, files)
    assert reads == ["S0.h5", "S1.h5", "S2.h5", "S3.pt"]
    assert sorted(path.name for path in store.parent.iterdir() if path.suffix != ".lock") == ["a.packed"]
    reads.clear()
    assert same(pack(store, files), files_of(files.paths))
    assert [name for name in reads if name in reads[8:]] == reads[8:], "the packing read files"
    reads.clear()
    before = store.stat()
    pack(store, files)
    assert reads == []
    assert store.stat().st_mtime_ns == before.st_mtime_ns


def test_a_packed_file_tells_what_the_feature_files_hold(files, store, paths):
    features = pack(store, files)
    assert [features.info(path) for path in paths] == [peek_bag(path) for path in paths]
    assert features.info(paths[0].with_name("S9.h5")) is None
    os.utime(paths[1], ns=(1, 1))
    assert features.info(paths[1]) is None
    paths[2].unlink()
    assert features.info(paths[2]) is None


def test_only_what_is_new_or_changed_is_read_again(files, store, paths, reads):
    pack(store, files)
    write_bag(paths[1], Bag(np.full((9, 5), 7, "f4")))
    write_bag(paths[0].with_name("S4.h5"), Bag(np.full((2, 5), 8, "f2")))
    more = files_of([*paths, paths[0].with_name("S4.h5")])
    reads.clear()
    features = pack(store, more)
    assert reads == ["S1.h5", "S4.h5"]
    assert same(features, more)


def test_files_that_were_only_touched_are_compared_and_not_packed_again(files, store, paths, reads):
    pack(store, files)
    inode = store.stat().st_ino
    for path in paths[:3]:
        os.utime(path, ns=(path.stat().st_mtime_ns + 10**9,) * 2)
    touched = files_of(paths)
    reads.clear()
    features = pack(store, touched)
    assert reads == ["S0.h5", "S1.h5", "S2.h5"]
    assert store.stat().st_ino == inode, "it was written anew"
    assert same(features, touched)
    reads.clear()
    pack(store, touched)
    assert reads == [], "the new times were not kept"


def test_a_file_of_the_same_size_and_other_features_is_packed_again(store, paths):
    pack(store, files_of(paths))
    before = paths[0].stat()
    write_bag(paths[0], synthetic_bag("S0", np.ones((LENGTHS[0], 5), "f4"), np.random.default_rng(0)))
    os.utime(paths[0], ns=(1, before.st_mtime_ns + 10**9))
    assert paths[0].stat().st_size == before.st_size
    changed = files_of(paths)
    assert same(pack(store, changed), changed)


def test_tables_that_share_some_slides_share_the_packed_file(store, paths, reads):
    pack(store, files_of(paths[:3]))
    pack(store, files_of(paths[2:]))
    assert reads == ["S0.h5", "S1.h5", "S2.h5", "S3.pt"]
    reads.clear()
    pack(store, files_of(paths[:3]))
    assert reads == []
    paths[0].unlink()
    write_bag(paths[1], Bag(np.full((9, 5), 7, "f4")))
    pack(store, files_of(paths[1:]))
    assert reads == ["S1.h5"]
    assert set(open_packed(store, paths).index) == {"S1.h5", "S2.h5", "S3.pt"}, "a file that is gone is kept"


def test_features_of_another_width_in_the_same_folder_do_no_harm(store, paths):
    pack(store, files_of(paths))
    write_bag(paths[0].with_name("wide.h5"), Bag(np.ones((3, 11), "f4")))
    wide = files_of([paths[0].with_name("wide.h5")])
    assert same(pack(store, wide), wide)
    assert same(pack(store, files_of(paths)), files_of(paths))


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "older"])
def test_a_damaged_packed_file_is_made_anew(files, store, said, damage):
    pack(store, files)
    if damage == "older":
        with h5py.File(store, "r+") as file:
            file.attrs["litemil_packed"] = 0
    else:
        content = store.read_bytes()
        store.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"text" * 5000}[damage])
    assert same(pack(store, files), files)
    assert f"{store}: not readable as a packed file" in said()


def test_a_packing_that_dies_goes_on_where_it_was(files, store, reads, monkeypatch, said):
    monkeypatch.setattr(packed, "FLUSH_BYTES", 1)
    read = FileFeatures.__call__

    def dying(files, slide):
        if slide == 2:
            raise KeyboardInterrupt
        return read(files, slide)

    with monkeypatch.context() as patch:
        patch.setattr(FileFeatures, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            pack(store, files)
    assert not store.exists()
    reads.clear()
    features = pack(store, files)
    assert reads == ["S2.h5", "S3.pt"]
    assert "goes on after 2 of 4 slides" in said()
    assert same(features, files)


def test_a_packing_that_died_is_not_gone_on_with_when_a_file_has_changed(files, paths, store, monkeypatch):
    monkeypatch.setattr(packed, "FLUSH_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            packed, "progress", lambda items, *_, **__: (item for n, item in enumerate(items) if n < 2 or 1 / 0)
        )
        with pytest.raises(ZeroDivisionError):
            pack(store, files)
    write_bag(paths[0], Bag(np.full((3, 5), 9, "f4")))
    again = files_of(paths)
    assert same(pack(store, again), again)


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"nonsense"])
def test_the_rest_of_a_packing_that_never_began_is_no_hindrance(files, store, content):
    store.parent.mkdir()
    store.with_name("a.packed.part").write_bytes(content)
    assert same(pack(store, files), files)


def test_a_damaged_feature_file_is_named_and_no_packed_file_appears(files, paths, store):
    write_bag(paths[1], Bag(np.full((700, 5), np.nan, "f4")))
    with pytest.raises(FeatureFileError, match=r"S1\.h5: 3500 values are NaN or infinite, the first in row 0"):
        pack(store, files_of(paths))
    assert not store.exists()


def test_a_feature_file_that_changes_while_it_is_packed_is_named(files, paths, store, monkeypatch):
    read = FileFeatures.__call__

    def touching(files, slide):
        features = read(files, slide)
        os.utime(files.paths[slide], ns=(1, 1))
        return features

    monkeypatch.setattr(FileFeatures, "__call__", touching)
    with pytest.raises(FeatureFileError, match=r"S0\.h5: was changed while it was packed; start again"):
        pack(store, files)
    assert not store.exists()


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_a_feature_file_that_changes_before_it_is_packed_is_named(files, paths, store, dtype):
    """Of the same shape, and of either type: what was looked at is not what would be packed."""
    for path, info in zip(paths[:2], files.info, strict=False):
        write_bag(path, Bag(np.ones((info.num_instances, 5), dtype)))
    with pytest.raises(FeatureFileError, match=r"S0\.h5: was changed while it was in use; start again"):
        pack(store, files)
    assert not store.exists()


def test_a_full_disk_is_told_before_anything_is_written(files, store, monkeypatch):
    usage = shutil.disk_usage(store.parents[1])._replace(free=2**26)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(FeatureFileError, match=r"0\.1 GB free, the packed features take 0\.0 GB; give --cache another"):
        pack(store, files)
    assert [path.name for path in store.parent.iterdir()] == ["a.packed.lock"]


def test_a_disk_that_fills_up_leaves_no_packed_file(files, store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        FeatureFileError, match=r"a\.packed: cannot be written \(No space left on device\); give --cache"
    ):
        pack(store, files)
    assert not store.exists()


def test_a_folder_that_is_none_is_named(files, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FeatureFileError, match="cannot be written"):
        pack(tmp_path / "cache" / "a.packed", files)


def test_a_whole_packed_file_is_only_read(files, store):
    """It may lie where this user may not write: no lock is taken."""
    pack(store, files)
    locks = list(store.parent.glob("*.lock"))
    assert locks
    for lock in locks:
        lock.unlink()
    assert same(pack(store, files), files)
    assert not list(store.parent.glob("*.lock"))


def test_the_name_tells_folders_and_features_apart(tmp_path):
    names = {
        packed_path(tmp_path, folder, feat_type).name
        for folder in (tmp_path / "a" / "features", tmp_path / "b" / "features")
        for feat_type in ("features", "features/uni")
    }
    assert len(names) == 4
    assert all(name.endswith(".packed") and "/" not in name for name in names)
    assert packed_path(tmp_path, tmp_path / "a" / ".." / "a", "x") == packed_path(tmp_path, tmp_path / "a", "x")


SCRIPT = """
import sys, time
from pathlib import Path
from utils.bags import packed
from utils.bags.store import peek_bag
from utils.core.runtime import start_logging
start_logging()
paths = sorted(Path(sys.argv[1]).iterdir())
read = packed.FileFeatures.__call__
def slowly(files, slide):
    print("begun with", files.paths[slide].name, flush=True)
    if sys.argv[3].startswith("until "):
        while not Path(sys.argv[3].removeprefix("until ")).exists():
            time.sleep(0.05)
    else:
        time.sleep(float(sys.argv[3]))
    print("read", files.paths[slide].name, flush=True)
    return read(files, slide)
packed.FileFeatures.__call__ = slowly
packed.FLUSH_BYTES = 1
files = packed.FileFeatures(paths, [peek_bag(path) for path in paths], "features")
print("packing", flush=True)
packed.pack(Path(sys.argv[2]), files)
"""


def start(paths, store, wait: float | str) -> subprocess.Popen:
    """Pack in another process, which waits before each slide: so many seconds, or "until" a file is there."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(paths[0].parent), str(store), str(wait)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_packing_leaves_nothing_half(files, paths, store):
    process = start(paths, store, 0.3)
    assert process.stdout is not None
    while "read S1" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not store.exists()
    assert same(pack(store, files), files)


def test_of_two_packings_at_once_one_waits(files, paths, store, tmp_path, caplog):
    other_waits = tmp_path / "the other waits"
    first = start(paths, store, f"until {other_waits}")
    assert first.stdout is not None
    while "begun" not in (line := first.stdout.readline()):
        assert line, first.communicate()
    with caplog.at_level("INFO", log.name), ThreadPoolExecutor() as pool:
        second = pool.submit(pack, store, files)
        while "another process is packing these features; waiting" not in caplog.text:
            assert not second.done(), second.result()
            time.sleep(0.01)
        other_waits.touch()
        out, err = first.communicate(timeout=60)
        assert first.returncode == 0, err
        assert out.count("read") == 4
        assert "packing the features of" in err
        assert same(second.result(), files)
    assert "packing the features of" not in caplog.text, "it is written twice"


MEMORY = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from utils.bags.packed import PackedFeatures
for store in sys.argv[1:]:
    features = PackedFeatures(Path(store), [])
    features.paths = [Path(name) for name in features.index]
    total = sum(float(features(slide).float().sum()) for slide in range(len(features.paths)))
    rollup = Path("/proc/self/smaps_rollup").read_text().split()
    print(rollup[rollup.index("Anonymous:") + 1])
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell private memory")
def test_private_memory_does_not_grow_with_the_cohort(tmp_path):
    stores = []
    for count in (2, 20):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        paths = [folder / f"S{number:02}.h5" for number in range(count)]
        for path in paths:
            write_bag(path, Bag(np.ones((1000, 512), "f4")))
        stores.append(tmp_path / f"{count}.packed")
        pack(stores[-1], files_of(paths))
    assert stores[-1].stat().st_size > 40e6
    run = subprocess.run([sys.executable, "-c", MEMORY, *stores], cwd=ROOT, capture_output=True, text=True, check=True)
    few, many = map(int, run.stdout.split())
    assert many - few < 8_000, f"private kB after 2 and after 20 slides more: {few}, {many}"
