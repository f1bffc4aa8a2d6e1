import pytest
import torch
from mil_helpers import D, bag, padded, relative_error, small


@pytest.mark.parametrize("name", ["meanPool", "maxPool"])
def test_equals_plain_pooling(name):
    model = small(name)
    bags = [bag(n, seed=n) for n in (3, 10, 18)]
    x, mask = padded(bags, 20)
    logits, aux = model(x, mask)
    for i, one in enumerate(bags):
        h = model.instance_embed(one[0])
        pooled = h.mean(dim=0) if name == "meanPool" else h.amax(dim=0)
        assert relative_error(logits[i], model.classifier(pooled)) < 1e-12
        if name == "meanPool":
            assert relative_error(aux["attn"][i, 0, ~mask[i]], torch.full_like(h[:, 0], 1 / len(h))) < 1e-12


def identity_max_pool(embeddings):
    """A maxPool whose embedding is the identity, and what it says of embeddings (N, 12) >= 0."""
    model = small("maxPool", hidden_dim=D)
    model.instance_embed = torch.nn.Sequential(torch.nn.Identity())
    return model, torch.tensor(embeddings, dtype=torch.float64)


def test_contribution_is_the_share_of_dimensions_supplied():
    dead, tie = [0.0] * 8, 5.0
    model, h = identity_max_pool([[1, 0, tie, 9, *dead], [3, 0, tie, 0, *dead], [2, 1, tie, 0, *dead]])
    third = 1 / 4
    expected = torch.tensor([2 * third, third, third], dtype=torch.float64)  # the tie goes to the first
    assert torch.equal(model(h[None])[1]["attn"][0, 0], expected)
    for size in (1, 2):
        assert torch.equal(model.forward_blocks(h.split(size))[1]["attn"][0, 0], expected)


def test_contribution_of_dead_embeddings_is_uniform_over_the_real():
    model, h = identity_max_pool([[0.0] * 12] * 4)
    assert model(h[None])[1]["attn"].tolist() == [[[0.25] * 4]]
    mask = torch.tensor([[True, False, False, True]])
    assert model(h[None], mask)[1]["attn"].tolist() == [[[0, 0.5, 0.5, 0]]]
    assert model.forward_blocks(h.split(3))[1]["attn"].tolist() == [[[0.25] * 4]]


def test_bags_of_one_batch_do_not_mix_their_suppliers():
    model = small("maxPool")
    x = bag(5, bags=3)
    together = model(x)[1]["attn"]
    assert torch.equal(together, torch.cat([model(one[None])[1]["attn"] for one in x]))
