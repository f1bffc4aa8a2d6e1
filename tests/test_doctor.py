import builtins
import sys
import urllib.error

import pytest

from utils import doctor
from utils.core import runtime
from utils.features import weights


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)


def found(what: str) -> doctor.Finding:
    return next(finding for finding in doctor.examine() if finding.subject == what)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Without CUDA, let a line of shell script answer for NVIDIA's program."""
    if sys.platform == "win32":
        pytest.skip("a shell script stands in for nvidia-smi")
    program = tmp_path / "nvidia-smi"

    def answer(line: str) -> None:
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)

    return answer


def test_a_whole_installation(capsys):
    doctor.main()
    told = capsys.readouterr().out
    assert "Everything that LiteMIL needs is there." in told
    for what in ("python", "torch", "device", "slides", "processors", "memory", "disk", "hub"):
        assert what in told
    assert "reads the test slide (1536 x 1280 px)" in told
    assert "cannot be reached" in told
    assert "--weights FILE" in told


def test_what_cannot_be_imported_is_named_and_the_rest_is_checked(monkeypatch, capsys):
    real = builtins.__import__

    def broken(name, *rest):
        if name == "openslide" or name.startswith(("utils.slides", "utils.features")):
            raise ImportError("libopenslide.so.1: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 1
    told = capsys.readouterr().out
    assert "BAD  slides      ImportError: libopenslide.so.1" in told
    assert "-> run `uv sync`" in told
    assert "2 of 11 checks failed" in told
    assert "BAD  processors" not in told


def test_a_driver_without_cuda_says_why(nvidia_smi):
    nvidia_smi("echo 470.1")
    finding = found("device")
    assert (finding.state, "GPU driver 470.1, but" in finding.text) == ("note", True)
    assert "update the driver" in finding.remedy


def test_a_slide_that_cannot_be_read_and_one_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "TEST_SLIDE", tmp_path / "testSlide.svs")
    assert found("slides").state == "note"
    (tmp_path / "testSlide.svs").write_bytes(b"no slide")
    finding = found("slides")
    assert finding.state == "BAD"
    assert str(tmp_path) not in finding.text


def test_processors_are_listed_with_their_limit_and_what_competes(monkeypatch):
    monkeypatch.setattr(runtime, "visible_processors", lambda: 64)
    monkeypatch.setattr(runtime, "processors", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (1.5, 0, 0), raising=False)
    assert found("processors").text == "4 of 64: a limit of the batch system or container; load 1.5"
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 0, 0), raising=False)
    finding = found("processors")
    assert (finding.state, finding.text.endswith("load 9.0, as much as there is")) == ("note", True)
    assert "OMP_NUM_THREADS" in finding.remedy


def test_threads_are_listed_with_how_they_wait(monkeypatch):
    for name in runtime.WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    finding = found("threads")
    assert (finding.state, "those that wait spin" in finding.text) == ("note", True)
    assert finding.remedy.endswith("unset OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert found("threads").text.endswith("as OMP_NUM_THREADS says; those that wait sleep")


def test_a_small_disk_and_little_memory_are_noted(monkeypatch):
    usage = doctor.shutil.disk_usage(".")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=5e9))
    monkeypatch.setattr("utils.core.runtime.available_memory", lambda: 1_000_000_000)
    assert [found(what).state for what in ("disk", "memory")] == ["note", "note"]
    assert "5.00 GB free here" in found("disk").text


def test_the_hub_and_the_token(monkeypatch):
    monkeypatch.setattr(weights, "get_token", lambda: "hf_secret")
    reached, told = weights.hub_access(1)
    assert not reached
    assert "logged in" in told
    assert "hf_secret" not in str(doctor.examine())
    monkeypatch.setattr(weights, "HF_HUB_OFFLINE", True)
    assert "offline" in weights.hub_access(1)[1]


@pytest.mark.parametrize(("script", "text"), [("echo 535.54", "GPU driver 535.54, but"), ("exit 9", "no GPU: the CPU")])
def test_the_driver_is_asked_for_its_version(nvidia_smi, script, text):
    nvidia_smi(script)
    assert found("device").text.startswith(text)
