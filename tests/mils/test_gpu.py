"""On a CUDA device the models answer as on the CPU. Run with `pytest -m gpu`."""

import pytest
import torch
from mil_helpers import MERGEABLE, MODELS, bag, gradients, padded, relative_error, small

from MILS import build_mil, mergeable
from MILS.mergeable import BLOCK_ROWS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def blocks_of_seven(monkeypatch):
    monkeypatch.setitem(BLOCK_ROWS, "cuda", 7)


def answer(model, x, mask):
    model.zero_grad()
    logits, aux = model(x, mask)
    torch.tanh(logits).sum().backward()
    return [logits, aux["attn"], *gradients(model).values()]


def check_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu() - other.cpu()).norm() <= tolerance * max(1.0, other.norm().item())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("saved_rows", [1000, 0])
def test_logits_attention_and_gradients(name, saved_rows, monkeypatch):
    monkeypatch.setattr(mergeable, "SAVED_ROWS", saved_rows)
    model = small(name)
    x, mask = padded([bag(9), bag(30)], 33)
    expected = answer(model, x, mask)
    check_close(answer(model.cuda(), x.cuda(), mask.cuda()), expected, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_ragged_bags(name):
    model, bags = small(name), [bag(n, seed=n)[0] for n in (3, 30, 4, 1)]
    expected, aux = model.forward_bags(bags)
    found, found_aux = model.cuda().forward_bags([one.cuda() for one in bags])
    check_close([found, *found_aux["attn"]], [expected, *aux["attn"]], 1e-10)


@pytest.mark.parametrize("name", MERGEABLE)
def test_blocks_come_from_the_cpu(name):
    model, x = small(name), bag(30)
    expected, aux = model(x)
    found, found_aux = model.cuda().forward_blocks(x[0].split(11))
    check_close([found, found_aux["attn"]], [expected, aux["attn"]], 1e-10)


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("saved_rows", [1000, 0])
def test_the_way_back_has_the_dropout_of_the_way_there(name, saved_rows, monkeypatch):
    monkeypatch.setattr(mergeable, "SAVED_ROWS", saved_rows)
    model, x = small(name, train=True, dropout=0.4).cuda(), bag(30).cuda()

    def loss():
        torch.manual_seed(5)
        return torch.tanh(model(x)[0]).sum()

    value = loss()
    torch.rand(1, device="cuda")
    state = torch.cuda.get_rng_state()
    value.backward()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    weight = model.instance_layers()[0].weight
    direction = torch.randn_like(weight)
    by_gradient = (weight.grad * direction).sum().item()
    with torch.no_grad():
        weight += 1e-6 * direction
    above = loss().item()
    with torch.no_grad():
        weight -= 2e-6 * direction
    assert by_gradient == pytest.approx((above - loss().item()) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_stays_near(name):
    torch.manual_seed(0)
    model = build_mil(name, input_dim=64, num_classes=2).cuda().eval()
    x = torch.randn(1, 300, 64, device="cuda")
    expected, _ = model(x)
    with torch.autocast("cuda", dtype=torch.float16):
        logits, aux = model(x.half())
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert relative_error(logits.float(), expected) < 0.05
    assert aux["attn"].float().sum(-1).cpu().numpy() == pytest.approx(1, abs=1e-3)
