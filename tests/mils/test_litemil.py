"""LiteMIL against torch.nn.MultiheadAttention on the same weights."""

import pytest
import torch
from mil_helpers import D, bag, gradients, padded, relative_error, small
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FixedDropout(torch.nn.Module):
    """A dropout whose keep mask is given."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, weights):
        return weights * self.scale


def reference(model, x, mask=None):
    """The definition, with torch's attention: N keys, N values."""
    h = model.stream.project(x if mask is None else x.masked_fill(mask.unsqueeze(-1), 0))
    query = model.stream.query.expand(len(x), -1, -1)
    out, attn = model.stream.attn(query, h, h, key_padding_mask=mask, average_attn_weights=False)
    return model.classifier(out.mean(dim=1)), attn.mean(dim=2)


def compare(model, x, mask, tolerance, run_reference=reference):
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=x.dtype)
    results = []
    for run in (run_reference, lambda model, *bags: model(*bags)):
        model.zero_grad()
        logits, attn = run(model, x, mask)
        (torch.tanh(logits) @ weight).sum().backward()
        results.append((logits, attn["attn"] if isinstance(attn, dict) else attn, gradients(model)))
    (logits, attn, expected), (our_logits, our_attn, found) = results
    assert relative_error(our_logits, logits) < tolerance
    assert relative_error(our_attn, attn) < tolerance
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("with_mask", [False, True])
def test_equals_multihead_attention(dtype, tolerance, queries, with_mask):
    model = small("LiteMIL", num_queries=queries, dtype=dtype)
    x, mask = padded([bag(n, seed=n, dtype=dtype) for n in (5, 17, 30)], 30, fill=3.0)
    compare(model, x, mask if with_mask else None, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("queries", [1, 4])
def test_equals_multihead_attention_under_its_dropout(monkeypatch, queries, dtype, tolerance):
    model = small("LiteMIL", num_queries=queries, dtype=dtype)
    x, mask = padded([bag(n, seed=n, dtype=dtype) for n in (8, 20)], 20)
    scale = (torch.rand(2, 4, queries, 20, generator=torch.Generator().manual_seed(2)) < 0.7).to(dtype) / 0.7
    model.stream.attn_dropout = FixedDropout(scale.flatten(1, 2))
    model.stream.attn_dropout.train()

    def fixed(x, *_, **__):
        # torch's attention holds its weights as (B * H, Q, N); the dropouts of other layers are off.
        return x * scale.flatten(0, 1) if x.shape == (8, queries, 20) else x

    def with_dropout(model, x, mask):
        model.stream.attn.train()
        with monkeypatch.context() as patch:
            patch.setattr(functional, "dropout", fixed)
            logits, _ = reference(model, x, mask)
        model.stream.attn.eval()
        return logits, reference(model, x, mask)[1]

    compare(model, x, mask, tolerance, with_dropout)
    dropped = model(x, mask)[0]
    model.stream.attn_dropout.eval()
    assert relative_error(dropped, model(x, mask)[0]) > 1e-3


def test_attention_dropout_is_on_in_training_only():
    model = small("LiteMIL", dropout=0.9)
    x = bag(6)
    model.stream.attn_dropout.train()
    torch.manual_seed(0)
    first, first_aux = model(x)
    second, second_aux = model(x)
    assert not torch.equal(first, second)
    assert torch.equal(first_aux["attn"], second_aux["attn"])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_key_bias_has_a_gradient_of_exact_zero():
    model = small("LiteMIL")
    model(bag(9))[0].sum().backward()
    query, key, value = model.stream.attn.in_proj_bias.grad.chunk(3)
    assert (key == 0).all()
    assert query.abs().min() > 0
    assert value.abs().min() > 0


class Sizes(TorchDispatchMode):
    """Records, of what each operation computes anew, the number of elements."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.sizes += [t.numel() for t in new if t.untyped_storage().data_ptr() not in known]
        return result


@pytest.mark.parametrize("queries", [1, 2])
def test_no_keys_or_values_of_the_bag_s_length(queries):
    """After the embedding nothing as large as it is made, and on the way back only its own gradient."""
    instances = 500
    model = small("LiteMIL", num_queries=queries)
    h = model.instance_layers()(bag(instances)).detach().requires_grad_()
    given = torch.nn.Identity()
    given.forward = lambda _: h
    model.instance_layers = lambda: torch.nn.Sequential(given)
    with Sizes() as forward:
        logits, _ = model(bag(instances))
    with Sizes() as backward:
        logits.sum().backward()
    assert [size for size in forward.sizes if size >= h.numel()] == []
    # By way of the scores, by way of the sum, and the two together.
    assert len([size for size in backward.sizes if size >= h.numel()]) <= 3


def test_first_version_checkpoint_loads():
    shapes = {
        "stream.query": (2, 16),
        "stream.project.0.weight": (16, D),
        "stream.project.0.bias": (16,),
        "stream.project.1.weight": (16,),
        "stream.project.1.bias": (16,),
        "stream.attn.in_proj_weight": (48, 16),
        "stream.attn.in_proj_bias": (48,),
        "stream.attn.out_proj.weight": (16, 16),
        "stream.attn.out_proj.bias": (16,),
        "classifier.0.weight": (8, 16),
        "classifier.0.bias": (8,),
        "classifier.3.weight": (3, 8),
        "classifier.3.bias": (3,),
    }
    small("LiteMIL", num_queries=2).load_state_dict({name: torch.zeros(shape) for name, shape in shapes.items()})
