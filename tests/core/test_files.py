"""Files are whole or absent, and loading one executes nothing."""

import errno
import hashlib
import json
import os
import pickle
import platform
import random
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.core import files
from utils.core.errors import CheckpointError, ConfigError, FeatureFileError, LiteMILError
from utils.core.files import (
    check_distinct,
    check_writable,
    claim_on,
    claimed,
    clear_parts,
    clear_parts_of,
    digest,
    is_free,
    read_json,
    wait_for_file,
    whole_file,
    write_bytes,
    write_json,
    write_records,
    write_text,
)
from utils.core.tensor_files import load_tensors, save_tensors

EXPECTED = "a test file"
ROOT = Path(__file__).resolve().parents[2]


class TouchesAFile:
    """A pickle of this runs a command when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def load(path: Path):
    return load_tensors(path, FeatureFileError, EXPECTED)


@pytest.mark.skipif(os.name != "posix", reason="whether a process runs cannot be asked there")
def test_what_a_killed_process_left_is_cleared_and_no_other(tmp_path):
    def begin(name: str) -> None:
        script = "import os, sys; from utils.core.files import whole_file\nwith whole_file(sys.argv[1]): os._exit(9)"
        subprocess.run([sys.executable, "-c", script, tmp_path / name], check=False, cwd=ROOT)

    begin("killed.h5")
    (tmp_path / ".theirs.h5.other_machine-1.abc.part").touch()
    (tmp_path / ".notes.part").touch()
    long_ago = time.time() - 25 * 3600
    for name in (".forgotten.h5.other_machine-1.abc.part", ".old.part"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (long_ago, long_ago))
    assert len(list(tmp_path.iterdir())) == 5
    with whole_file(tmp_path / "mine.h5") as part:
        clear_parts(tmp_path)
        assert part.exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine.h5", ".notes.part", ".old.part", ".theirs.h5.other_machine-1.abc.part",
    }  # fmt: skip


def test_a_file_is_one_process_s_to_make_at_a_time(tmp_path, claimed_elsewhere):
    path = tmp_path / "new" / "a.h5"
    with claimed(path) as other, claimed(path) as second, claimed(tmp_path / "b.h5") as third:
        assert (other, second, third) == ("", f"process {os.getpid()} on {platform.node()}", "")
    assert list(path.parent.iterdir()) == []
    holder = claimed_elsewhere(path)
    with claimed(path) as other:
        assert other == f"process {holder.pid} on {platform.node()}"
    clear_parts(path.parent)
    assert not is_free(claim_on(path))
    kill(holder)
    with claimed(path) as other:
        assert other == ""
    assert list(path.parent.iterdir()) == []


def test_the_claims_of_the_dead_are_cleared(tmp_path, claimed_elsewhere):
    for clear in (lambda _: clear_parts(tmp_path), lambda process: clear_parts_of("", process, tmp_path.parent)):
        holder, other = claimed_elsewhere(tmp_path / "a.h5"), claimed_elsewhere(tmp_path / "b.h5")
        kill(holder)
        assert (tmp_path / ".a.h5.claim").exists()
        clear(holder.pid)
        assert [path.name for path in tmp_path.iterdir()] == [".b.h5.claim"]
        kill(other)


@pytest.mark.parametrize("seconds", [0.2, 60])
def test_another_machines_claim_is_taken_over_without_a_sign_of_life(tmp_path, claimed_elsewhere, monkeypatch, seconds):
    monkeypatch.setattr(files, "SECONDS_WITHOUT_A_SIGN", seconds)
    file = tmp_path / ".a.h5.claim"
    text = f"filelock/2\npid=1\nhost=node7\nmode=lease\ntoken=x\nduration={float(seconds)}\n"
    file.write_text(text)
    claim = claim_on(tmp_path / "a.h5")
    assert not is_free(claim)
    time.sleep(0.3)
    assert is_free(claim) == (seconds < 1)
    assert file.exists() == (seconds > 1)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_claim_whose_process_was_killed_before_it_signed_is_free_after_a_minute(tmp_path):
    """The lock's own rule is that a claim without a name is held for ever."""
    file = tmp_path / ".a.h5.claim"
    file.touch()
    with claimed(tmp_path / "a.h5") as other:
        assert other == "another process"
    assert not is_free(claim_on(tmp_path / "a.h5"))
    os.utime(file, (time.time() - 100,) * 2)
    with claimed(tmp_path / "a.h5") as other:
        assert other == ""
    file.touch()
    os.utime(file, (time.time() - 100,) * 2)
    assert is_free(claim_on(tmp_path / "a.h5"))


def test_where_nothing_can_be_written_nothing_is_claimed(tmp_path):
    tmp_path.chmod(0o500)
    with claimed(tmp_path / "a.h5") as other:
        assert other == ""
    assert is_free(claim_on(tmp_path / "a.h5"))


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with whole_file(path) as part:
            part.write_bytes(b"half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["result.bin"]  # noqa: PTH208 - the hidden files too


def test_until_the_block_ends_only_the_old_file_bears_the_name(tmp_path):
    path = tmp_path / "new" / "folder" / "result.bin"
    with whole_file(path) as part:
        assert part.parent == path.parent, "a rename across file systems is not atomic"
        part.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    with whole_file(path) as part:
        part.write_bytes(b"newer")
        assert path.read_bytes() == b"whole"
    assert path.read_bytes() == b"newer"
    assert os.listdir(path.parent) == ["result.bin"]  # noqa: PTH208


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "ours", b"")
        (tmp_path / "plain").write_bytes(b"")
        assert os.umask(umask) == umask, "the process's umask was changed"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_folder_that_cannot_be_written_is_one_line_of_the_error_asked_for(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError) as caught, whole_file(tmp_path / "file" / "result.bin", CheckpointError):
        pytest.fail("the block ran")
    assert str(tmp_path / "file" / "result.bin") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_shows_late_is_waited_for_but_not_for_ever(tmp_path):
    late = tmp_path / "late"
    threading.Timer(0.3, late.touch).start()
    assert wait_for_file(late, 30).exists()
    assert not wait_for_file(tmp_path / "never", 0.2).exists()


def test_a_folder_is_tried_without_a_trace(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"file/folder: cannot be written \(Not a directory\); choose another"):
        check_writable(tmp_path / "file" / "folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(LiteMILError, match="cannot be written"):
            write_bytes(tmp_path / "result.bin", b"")
    finally:
        tmp_path.chmod(0o755)


def test_a_folder_under_the_files_name_is_one_line_and_stays(tmp_path):
    (tmp_path / "result.bin").mkdir()
    with pytest.raises(LiteMILError, match=r"result\.bin: cannot be written \(Is a directory\)"):
        write_bytes(tmp_path / "result.bin", b"")
    assert os.listdir(tmp_path) == ["result.bin"]  # noqa: PTH208


def test_a_long_name_can_be_written(tmp_path):
    path = tmp_path / ("n" * 250 + ".bin")
    write_bytes(path, b"x")
    assert path.read_bytes() == b"x"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.nan])
def test_json_never_holds_nan(tmp_path, value):
    path = tmp_path / "outputs.json"
    write_json(path, {"auc": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"folds": [{"auc": value}]})
    assert json.loads(path.read_text()) == {"auc": 0.5}
    assert os.listdir(tmp_path) == ["outputs.json"]  # noqa: PTH208


def test_json_and_text_keep_every_letter(tmp_path):
    write_json(tmp_path / "a.json", {"Präparat": "ß", "n": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"Präparat": "ß", "n": [1, 2.5, None]}
    assert "Präparat" in (tmp_path / "a.json").read_text(encoding="utf-8")
    write_text(tmp_path / "a.txt", "µm\n")
    assert (tmp_path / "a.txt").read_bytes() == "µm\n".encode()


@pytest.mark.parametrize("content", [b'{"half": ', b"\xff\xfe", None])
def test_json_that_cannot_be_read_names_the_file(tmp_path, content):
    path = tmp_path / "splits.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LiteMILError, match=r"splits\.json: not readable as JSON"):
        read_json(path)


def test_equal_tensors_give_equal_bytes_whatever_the_files_name(tmp_path):
    content = {"weight": torch.arange(6.0).reshape(2, 3), "names": ["a", "b"]}
    names = ["a.pth", "another_and_longer.pth", "a.ckpt"]
    for name in names:
        save_tensors(tmp_path / name, content)
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1
    loaded = load(tmp_path / names[0])
    assert torch.equal(loaded["weight"], content["weight"])
    assert loaded["names"] == ["a", "b"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8", ">f4", "S3", "U3"])
def test_numpy_arrays_dtypes_and_scalars_load(tmp_path, dtype, zipped):
    array = np.array([[0, 1], [1, 0]]).astype(dtype)
    path = tmp_path / "bag.pt"
    content = {"coords": array, "dtype": array.dtype, "scalar": array[0, 1]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = load(path)
    assert loaded["coords"].dtype == array.dtype.newbyteorder("="), "NumPy swaps bytes on loading"
    assert loaded["dtype"] == array.dtype
    np.testing.assert_array_equal(loaded["coords"], array)
    assert loaded["scalar"] == array[0, 1]
    assert type(loaded["scalar"]) is type(array[0, 1])


def test_arrays_of_numpy_1_load(tmp_path):
    path = tmp_path / "bag.pt"
    torch.save({"coords": np.arange(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(content)
    assert b"numpy.core" in content
    np.testing.assert_array_equal(load(path)["coords"], np.arange(4))


def _write_zip(path: Path, content: object) -> None:
    torch.save(content, path)


def _write_legacy(path: Path, content: object) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _write_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content))


def _write_old_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=0))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [_write_zip, _write_legacy, _write_pickle, _write_old_pickle])
def test_nothing_in_a_file_is_executed(tmp_path, write):
    witness = tmp_path / "executed"
    path = tmp_path / "evil.pt"
    write(path, {"features": torch.zeros(2, 2), "metadata": TouchesAFile(witness)})
    with pytest.raises(FeatureFileError) as caught:
        load(path)
    assert not witness.exists()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "nothing in it was executed" in message
    assert "weights_only" not in message
    assert "safe_globals" not in message
    assert "\n" not in message
    # What the file would have done, so that this test is known to be one that can fail.
    if write in (_write_pickle, _write_old_pickle):
        pickle.loads(path.read_bytes())  # noqa: S301
    else:
        torch.load(path, weights_only=False)
    assert witness.exists()


def test_the_forbidden_thing_is_named(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"metadata": TouchesAFile(tmp_path / "executed")}, path)
    with pytest.raises(FeatureFileError, match=r"it holds (posix|nt)\.system"):
        load(path)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"just some text\n" * 50, b"PK\x03\x04 not a zip", b"\x80\x02", b"\x89HDF\r\n"]
)
def test_what_is_no_tensor_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "notes.pt"
    path.write_bytes(content)
    with pytest.raises(FeatureFileError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not loadable as {EXPECTED}")
    assert "weights_only" not in message
    assert "\n" not in message


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: no such file; expected {EXPECTED}"):
            load_tensors(path, CheckpointError, EXPECTED)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_cut_short_is_refused_wherever_it_ends(tmp_path, zipped):
    whole, path = tmp_path / "whole.pt", tmp_path / "cut.pt"
    content = {"features": torch.arange(200.0).reshape(50, 4), "coords": np.arange(100).reshape(50, 2)}
    torch.save(content, whole, _use_new_zipfile_serialization=zipped)
    data = whole.read_bytes()
    lengths = {0, 1, 2, len(data) - 1, *random.Random(0).sample(range(len(data)), 60)}  # noqa: S311
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        with pytest.raises(FeatureFileError, match=r"cut\.pt"):
            load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_with_flipped_bytes_loads_or_is_refused(tmp_path, zipped):
    whole, path = tmp_path / "whole.pt", tmp_path / "flipped.pt"
    content = {"features": torch.zeros(5, 4), "coords": np.arange(10).reshape(5, 2), "metadata": {"a": 1}}
    torch.save(content, whole, _use_new_zipfile_serialization=zipped)
    draw, data = random.Random(1), whole.read_bytes()  # noqa: S311
    refused = 0
    for _ in range(150):
        flipped = bytearray(data)
        for _ in range(3):
            flipped[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(flipped)
        try:
            load(path)
        except FeatureFileError:
            refused += 1
    assert refused > 30


def test_loading_a_file_does_not_read_its_tensors(tmp_path):
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("the system does not count the bytes a process reads")

    def bytes_read() -> int:
        return int(counters.read_text().split("rchar:")[1].split()[0])

    path = tmp_path / "large.pt"
    torch.save({"features": torch.ones(2**20, 8)}, path)
    before = bytes_read()
    shape = load(path)["features"].shape
    assert bytes_read() - before < path.stat().st_size / 10
    assert shape == (2**20, 8)


def test_digest_is_of_the_parts_and_not_of_their_joint():
    assert digest("abc") == digest(b"abc")
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("abc", ""), digest("c", "ab")}) == 5
    assert digest() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    framed = b"\x01" + bytes(7) + b"a" + b"\x02" + bytes(7) + "ß".encode()
    assert digest("a", "ß") == hashlib.sha256(framed).hexdigest()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "old.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LiteMILError, match=r"old\.json: cannot be written \(No space left on device\)"):
        write_text(tmp_path / "old.json", "new")
    assert (tmp_path / "old.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


@dataclass(frozen=True)
class Record:
    file: Path
    reason: str = ""
    patches: int | None = None
    seconds: float | None = None


def test_records_are_rows_of_a_table_with_nothing_for_none(tmp_path):
    write_records(tmp_path / "new" / "table.csv", [Record(Path("a.h5"), 'no, "not" it'), Record(Path("b"), "", 7, 0.5)])
    lines = b'file,reason,patches,seconds\na.h5,"no, ""not"" it",,\nb,,7,0.5\n'
    assert (tmp_path / "new" / "table.csv").read_bytes() == lines


def test_two_sources_of_one_target_are_told():
    check_distinct({Path("a.h5"): Path("out/a.h5"), Path("b.h5"): Path("out/b.h5")})
    with pytest.raises(ConfigError, match=r"^a\.h5 and a\.pt would both be written to out/a\.h5; rename one of them$"):
        check_distinct({Path(name): Path("out/a.h5") for name in ("a.h5", "a.pt")})
