"""Contributions of instances add up to what the bag's answer differs from that of the reference."""

import pytest
import torch

from MILS import build_mil, list_mils
from MILS.evidence import path_slopes
from MILS.mergeable import BLOCK_ROWS, AttentionModel, MergeableModel

KINDS = {
    "LiteMIL": [{}, {"num_queries": 3, "num_heads": 2}],
    "ABMIL": [{}, {"gated": False}],
    "ABMIL_Multihead": [{}, {"num_heads": 3}],
    "meanPool": [{}],
    "maxPool": [{}],
}
MODELS = [(name, options) for name, every in KINDS.items() for options in every]


def make(name: str, options: dict, dtype: torch.dtype = torch.float64, classes: int = 3) -> MergeableModel:
    """Weights so large that answers are sure and heads are anything but linear."""
    torch.manual_seed(0)
    model = build_mil(name, input_dim=6, num_classes=classes, hidden_dim=12, **options).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2.5
    assert isinstance(model, MergeableModel)
    return model


def answer(model: MergeableModel):
    """The second class's logit, and the third's, of one bag."""
    return lambda pooled: model.classify_pooled(pooled)[0, 1:]


def bag(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * 2


def test_every_model_that_merges_is_here():
    assert {*KINDS, "TransMIL"} == set(list_mils())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("count", [1, 40, 2 * BLOCK_ROWS["cpu"] + 3])
@pytest.mark.parametrize(("name", "options"), MODELS)
def test_contributions_add_up(name, options, count, dtype, tolerance):
    model, x = make(name, options, dtype), bag(count, dtype)
    summary, trace = model.read_blocks([x])
    pooled = model.pooled(summary)
    reference = model.mean_embedding([bag(7, dtype)]).expand(pooled.shape[1:])
    slopes = path_slopes(answer(model), pooled, reference)
    found = model.contributions([x], summary, trace, slopes.mean[:, 0], reference)
    assert found.shape == (2, count)
    expected = slopes.end - slopes.start
    assert torch.allclose(found.sum(dim=1), expected, atol=tolerance * max(1, float(expected.abs().max())))
    assert torch.allclose(slopes.end, model(x[None])[0][0, 1:], atol=tolerance * 100)


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_they_are_those_of_the_definition(name, options):
    """The gradients along 20,000 steps, and each instance's share of the way by itself."""
    model, x = make(name, options), bag(9)
    summary, trace = model.read_blocks([x])
    pooled = model.pooled(summary).detach()
    reference = torch.randn(pooled.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    way = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    places = (reference + way[:, None, None] * (pooled - reference)).requires_grad_()
    mean = torch.autograd.grad(model.classify_pooled(places)[:, 1].sum(), places)[0].mean(dim=0)
    with torch.no_grad():
        h = model.instance_layers()(x)
        if isinstance(model, AttentionModel):
            weights = torch.softmax(model.score(h[None])[0], dim=1)  # (R, N)
            expected = torch.stack(
                [sum(row[i] * (h[i] - z) @ g for row, z, g in zip(weights, reference, mean, strict=True))
                 for i in range(len(x))]
            )  # fmt: skip
        else:
            expected = torch.zeros(len(x), dtype=torch.float64)
            for dimension, supplier in enumerate(h.max(dim=0).indices.tolist()):
                expected[supplier] += ((pooled[0] - reference) * mean)[0, dimension]
    found = model.contributions(
        [x], summary, trace, path_slopes(answer(model), pooled, reference).mean[:, 0], reference
    )
    assert torch.allclose(found[0], expected, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_blocks_change_nothing(name, options):
    model, x = make(name, options), bag(40)
    reference = model.pooled(model.read_blocks([bag(7)])[0])[0]

    def found(blocks):
        summary, trace = model.read_blocks(blocks)
        slopes = path_slopes(answer(model), model.pooled(summary), reference)
        return model.contributions(blocks, summary, trace, slopes.mean[:, 0], reference)

    assert torch.allclose(found([x]), found(list(x.split(7))), atol=1e-9)


def test_an_answer_along_a_way_without_curves_needs_no_more_points_than_one():
    """ABMIL's logits are linear in what is pooled."""
    model = make("ABMIL", {})
    pooled = model.pooled(model.read_blocks([bag(5)])[0])
    slopes = path_slopes(answer(model), pooled, torch.zeros_like(pooled[0]))
    assert torch.allclose(slopes.mean[:, 0, 0], model.classifier.weight[1:], atol=1e-12)


def test_the_mean_embedding_is_that_of_the_instances():
    model, x = make("ABMIL", {}), bag(50)
    with torch.no_grad():
        expected = model.instance_layers()(x).mean(dim=0)
    assert torch.allclose(model.mean_embedding(x.split(8)), expected)
