import builtins
import sys
import urllib.error

import pytest

from utils import doctor
from utils.slides import backbones


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)


def found(what: str) -> doctor.Finding:
    return next(finding for finding in doctor.examine() if finding.what == what)


def test_a_whole_installation(capsys):
    doctor.main()
    told = capsys.readouterr().out
    assert "Everything that LiteMIL needs is there." in told
    for what in ("python", "torch", "device", "slides", "processors", "memory", "disk", "hub"):
        assert what in told
    assert "reads the test slide (1536 x 1280 px)" in told
    assert "cannot be reached" in told
    assert "--weights FILE" in told


def test_what_cannot_be_imported_is_told_and_the_rest_is_checked(monkeypatch, capsys):
    real = builtins.__import__

    def broken(name, *rest):
        if name == "openslide" or name.startswith("utils.slides"):
            raise ImportError("libopenslide.so.1: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 1
    told = capsys.readouterr().out
    assert "BAD  slides      ImportError: libopenslide.so.1" in told
    assert "-> run `uv sync`" in told
    assert "2 of 10 checks failed" in told
    assert "ok   python" in told


@pytest.mark.parametrize(
    ("environment", "load", "state", "words"),
    [
        ({}, 0.5, "ok", "each training chooses its threads; they wait asleep; load 0.5"),
        ({"OMP_NUM_THREADS": "3"}, 0.5, "ok", "OMP_NUM_THREADS 3"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 0.5, "note", "they wait spinning"),
        ({}, 10_000.0, "note", "load 10000.0"),
    ],
)
def test_what_slows_threads_down_is_told(monkeypatch, environment, load, state, words):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    finding = found("processors")
    assert (finding.state, words in finding.found) == (state, True), finding


def test_a_driver_without_cuda_says_why(monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: "470.1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    finding = found("device")
    assert (finding.state, "GPU driver 470.1, but" in finding.found) == ("note", True)
    assert "update the driver" in finding.remedy


def test_a_slide_that_cannot_be_read_and_one_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_TEST_SLIDE", tmp_path / "testSlide.svs")
    assert found("slides").state == "note"
    (tmp_path / "testSlide.svs").write_bytes(b"no slide")
    finding = found("slides")
    assert finding.state == "BAD"
    assert str(tmp_path) not in finding.found


def test_a_small_disk_and_little_memory_are_noted(monkeypatch):
    usage = doctor.shutil.disk_usage(".")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=5e9))
    monkeypatch.setattr("utils.core.runtime.available_memory", lambda: 1_000_000_000)
    assert [found(what).state for what in ("disk", "memory")] == ["note", "note"]
    assert "5.00 GB free here" in found("disk").found


def test_the_hub_and_the_token(monkeypatch):
    monkeypatch.setattr(backbones, "get_token", lambda: "hf_secret")
    reached, told = backbones.hub_access(1)
    assert not reached
    assert "logged in" in told
    assert "hf_secret" not in str(doctor.examine())
    monkeypatch.setattr(backbones, "HF_HUB_OFFLINE", True)
    assert "offline" in backbones.hub_access(1)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for nvidia-smi")
@pytest.mark.parametrize(("script", "version"), [("echo 535.54", "535.54"), ("exit 9", None)])
def test_the_driver_is_asked_for_its_version(tmp_path, monkeypatch, script, version):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._driver() == version
