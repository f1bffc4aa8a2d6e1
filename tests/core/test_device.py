"""What `--precision` stands for on each device."""

import pytest
import torch

from utils.core.device import amp_dtype, uses_tf32
from utils.core.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def capability(monkeypatch):
    """Say of the card that it is of this generation."""

    def of(major: int) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: major >= 8)

    return of


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "tf32"])
def test_a_card_that_has_tf32_uses_it_but_for_fp32(capability, precision):
    capability(9)
    assert uses_tf32(precision, CUDA)
    assert not uses_tf32("fp32", CUDA)


@pytest.mark.parametrize("precision", ["auto", "tf32", "fp32"])
def test_others_do_not(capability, precision):
    capability(7)
    assert not uses_tf32(precision, CUDA)
    assert not uses_tf32(precision, CPU)


def test_tf32_is_no_autocast(capability):
    capability(8)
    assert amp_dtype("tf32", CUDA) is None
    assert amp_dtype("auto", CUDA, auto="fp32") is None


def test_tf32_that_a_device_lacks_is_refused(capability):
    capability(7)
    with pytest.raises(ConfigError, match="--precision tf32: this CUDA device has none"):
        amp_dtype("tf32", CUDA)
    with pytest.raises(ConfigError, match="--precision tf32: needs a CUDA device, not cpu"):
        amp_dtype("tf32", CPU)
