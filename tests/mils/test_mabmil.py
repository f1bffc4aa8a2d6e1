"""ABMIL and MAD-MIL against their equations, written head by head."""

import math

import pytest
import torch
from mil_helpers import bag, padded, relative_error, small


def reference(model, one):
    """Logits (C) and attention (H, N) of a bag (N, D)."""
    h = torch.relu(one @ model.instance_embed[0].weight.T + model.instance_embed[0].bias)
    gate, width = model.gate, model.gate.weight.shape[1]
    sums, attention = [], []
    for k in range(model.num_heads):
        own = h[:, k * width : (k + 1) * width]
        hidden = own @ gate.weight[k] + gate.bias[k]
        if gate.gated:
            half = hidden.shape[1] // 2
            hidden = torch.tanh(hidden[:, :half]) * torch.sigmoid(hidden[:, half:])
        else:
            hidden = torch.tanh(hidden)
        a = torch.softmax((hidden @ gate.score_weight[k] + gate.score_bias[k])[:, 0], dim=0)
        sums.append(a @ own)
        attention.append(a)
    return model.classifier(torch.cat(sums)), torch.stack(attention)


@pytest.mark.parametrize("name", ["ABMIL", "ABMIL_Multihead"])
@pytest.mark.parametrize("gated", [True, False])
def test_equals_its_equations(name, gated):
    model = small(name, gated=gated)
    bags = [3 * bag(n, seed=n) for n in (4, 11, 25)]
    x, mask = padded(bags, 25)
    logits, aux = model(x, mask)
    for i, one in enumerate(bags):
        expected, attention = reference(model, one[0])
        assert relative_error(logits[i], expected) < 1e-12
        assert relative_error(aux["attn"][i, :, ~mask[i]], attention) < 1e-12


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_heads_share_the_width_rounded_up(heads):
    model = small("ABMIL_Multihead", num_heads=heads)
    width = math.ceil(16 / heads)
    assert model.gate.weight.shape == (heads, width, 2 * (width // 2))
    assert model.classifier.in_features == heads * width
    assert model(bag(6))[1]["attn"].shape == (1, heads, 6)


@pytest.mark.parametrize("name", ["ABMIL", "ABMIL_Multihead"])
def test_dropout_reaches_embedding_and_attention(name):
    model = small(name, dropout=0.5)
    x = bag(10)
    for part in (model.instance_embed, model.gate):
        model.eval()
        part.train()
        assert not torch.equal(model(x)[0], model(x)[0])
