"""How far the models' answers in a `--precision` are from those in float64. On a card it is the card's own arithmetic;
on a CPU bf16 and fp16 are autocast's, and TF32 is imitated by rounding the factors of the large product.
"""

import copy

import pytest
import torch
from mil_helpers import MODELS, gradients, relative_error, stir

from MILS import build_mil, layers
from utils.core.device import has_tf32, set_tf32

# The most by which logits and attention, and then gradients, differ from those in float64, as a share of their size.
# A gradient is that of another function where rounding moves an embedding past the ReLU's corner.
MOST = {"fp32": (1e-5, 1e-3), "tf32": (1e-3, 3e-2), "fp16": (5e-3, 3e-2), "bf16": (3e-2, 1e-1)}
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def in_tf32(values: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers to ten bits of fraction; others, and gradients, pass as they are."""
    if values.dtype is not torch.float32:
        return values
    fixed = values.detach()
    return values + (((fixed.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) - fixed)


@pytest.fixture
def tf32(device, monkeypatch):
    """Make products of float32 numbers those of TF32."""
    if device.type == "cuda":
        if not has_tf32(device):
            pytest.skip("the card has no TF32")
        set_tf32(device, on=True)
        yield
        set_tf32(device, on=False)
        return
    product = layers.linear

    def rounded(x, weight, bias=None):
        return product(in_tf32(x), in_tf32(weight), bias)

    monkeypatch.setattr(layers, "linear", rounded)
    yield


def answers(model, x, device, precision):
    dtype = AUTOCAST.get(precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        logits, aux = model(x)
    torch.tanh(logits.double()).sum().backward()
    return [logits.double(), aux["attn"].double(), next(iter(gradients(model).values())).double()]


def check(name, device, precision):
    torch.manual_seed(0)
    exact = stir(build_mil(name, input_dim=256, num_classes=3, dropout=0.0), scale=0.05).double().eval()
    model = copy.deepcopy(exact).float().to(device)
    x = torch.randn(1, 600, 256).half()  # as features are kept
    expected = answers(exact, x.double(), torch.device("cpu"), "fp32")
    found = [values.cpu() for values in answers(model, x.to(device), device, precision)]
    logits, attention, gradient = map(relative_error, found, expected)
    of_answers, of_gradients = MOST[precision]
    assert logits < of_answers
    if name != "maxPool":  # whose winners are decided by a hair
        assert attention < of_answers
        assert gradient < of_gradients


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_agrees_with_float64(name, precision, device):
    set_tf32(device, on=False)
    check(name, device, precision)


@pytest.mark.parametrize("name", MODELS)
def test_tf32_agrees_with_float64(name, device, tf32):
    check(name, device, "tf32")


def test_rounding_to_tf32_keeps_ten_bits():
    values = torch.tensor([1 + 2**-10, 1 + 2**-12, 3.0])
    assert in_tf32(values).tolist() == [1 + 2**-10, 1.0, 3.0]


def test_scores_and_statistics_are_not_in_tf32(device, monkeypatch):
    """What is computed in full precision does not depend on the setting, on a card; elsewhere there is no setting."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 512, device=device), torch.randn(512, 64, device=device)
    set_tf32(device, on=True)
    with layers.full_precision(a):
        product = a @ b
    is_on = torch.backends.cuda.matmul.fp32_precision == "tf32"
    set_tf32(device, on=False)
    assert relative_error(product.cpu().double(), a.cpu().double() @ b.cpu().double()) < 1e-6
    assert is_on == (device.type == "cuda"), "the setting is as it was"
