"""TransMIL against the nystrom-attention package and a plain version built on it."""

import math

import pytest
import torch
from mil_helpers import bag, gradients, relative_error, small, stir
from nystrom_attention import NystromAttention as Reference
from test_litemil import Sizes
from torch import nn

from MILS.TransMIL import (
    NystromAttention,
    PyramidEncoding,
    fold_repeats,
    iterative_pinv,
    normalised,
    segment_means,
    similarity,
)

DIM, HEADS, LANDMARKS = 10, 2, 5


def pair(dim=DIM, heads=HEADS, landmarks=LANDMARKS):
    ours = stir(NystromAttention(dim, heads, landmarks, dropout=0.1)).double().eval()
    theirs = Reference(dim=dim, dim_head=dim // heads, heads=heads, num_landmarks=landmarks).double().eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("tokens", [5, 10, 50])
def test_equals_the_package_where_landmarks_divide(tokens):
    ours, theirs = pair()
    x = bag(tokens, dim=DIM)
    found, landmarks = ours(x)
    expected, attention = theirs(x, return_attn=True)
    assert relative_error(found, expected) < 1e-11
    assert relative_error(landmarks.first_row(), attention[:, :, 0]) < 1e-11
    found.square().sum().backward()
    expected.square().sum().backward()
    expected_gradients = gradients(theirs)
    for name, gradient in gradients(ours).items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-9, name


@pytest.mark.parametrize("tokens", [18, 49, 51])
def test_equals_the_package_told_of_its_zeros_where_they_do_not(tokens):
    ours, theirs = pair()
    x = bag(tokens, dim=DIM)
    expected = theirs(x, mask=torch.ones(1, tokens, dtype=torch.bool))
    # The package divides the short segment by its length + 1e-8.
    assert relative_error(ours(x)[0], expected) < 1e-6
    assert relative_error(ours(x)[0], theirs(x)) > 1e-4


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 50, 81])
def test_first_rows_alone_are_the_first_rows(tokens):
    ours, _ = pair()
    x = bag(tokens, dim=DIM, bags=2)
    for rows in {1, min(4, tokens)}:
        assert relative_error(ours(x, rows=rows)[0], ours(x)[0][:, :rows]) < 1e-12


def test_few_tokens_are_attended_exactly():
    """With no more tokens than landmarks each is its own landmark, and A pinv(A) A = A."""
    ours, _ = pair(landmarks=8)
    with torch.no_grad():
        landmarks = ours(bag(6, dim=DIM))[1]
        exact = similarity(landmarks.query[:, :, :1], landmarks.key)
        kernel = similarity(landmarks.landmark_query, landmarks.landmark_key)
        sharp = landmarks._replace(inverse=iterative_pinv(kernel, iterations=40))
    assert relative_error(sharp.first_row(), exact[:, :, 0]) < 1e-8


@pytest.mark.parametrize("tokens", range(1, 24))
def test_segments_cover_the_tokens_once(tokens):
    x = bag(tokens, dim=3)
    means = segment_means(x, 5)
    length = math.ceil(tokens / 5)
    ends = list(range(tokens, 0, -length))[::-1]
    starts = [max(0, end - length) for end in ends]
    expected = torch.stack([x[:, a:b].mean(dim=1) for a, b in zip(starts, ends, strict=True)], dim=1)
    assert means.shape[1] <= 5
    assert relative_error(means, expected) < 1e-14


def test_pinv_converges_and_each_bag_has_its_own_scale():
    a = torch.softmax(3 * bag(6, dim=6, bags=4).unflatten(0, (2, 2)), dim=-1)
    assert relative_error(iterative_pinv(a, iterations=40), torch.linalg.pinv(a)) < 1e-8
    a[1] *= 50
    assert torch.equal(iterative_pinv(a)[:1], iterative_pinv(a[:1]))


def test_pyramid_is_three_convolutions_and_the_identity():
    pyramid = stir(PyramidEncoding(4)).double()
    x = bag(9 * 9, dim=4, bags=2)
    square = x.transpose(1, 2).reshape(2, 4, 9, 9)
    expected = square.clone()
    for layer, pad in ((pyramid.seven, 3), (pyramid.five, 2), (pyramid.three, 1)):
        expected += nn.functional.conv2d(square, layer.weight, layer.bias, padding=pad, groups=4)
    assert relative_error(pyramid(x), expected.flatten(2).transpose(1, 2)) < 1e-13


def reference_model(model, x):
    """Logits and class-token row of the last layer, step by step, for a bag whose square the landmarks divide."""
    layers = []
    for ours in (model.attention1, model.attention2):
        layer = Reference(dim=DIM, dim_head=DIM // HEADS, heads=HEADS, num_landmarks=LANDMARKS).double()
        layer.load_state_dict(ours.state_dict())
        layers.append(layer)
    h = torch.relu(model.instance_embed[0](x))
    side = math.ceil(math.sqrt(h.shape[1]))
    h = torch.cat([h, h[:, : side**2 - h.shape[1]]], dim=1)
    h = torch.cat([model.class_token, h], dim=1)
    h = h + layers[0](model.norm1(h))
    h = torch.cat([h[:, :1], model.position(h[:, 1:])], dim=1)
    out, attention = layers[1](model.norm2(h), return_attn=True)
    return model.classifier(model.norm(h + out)[:, 0]), attention[:, :, 0]


@pytest.mark.parametrize("instances", [4, 8, 38, 49])
def test_model_equals_a_plain_version(instances):
    model = small("TransMIL", hidden_dim=DIM, num_heads=HEADS)
    x = 2 * bag(instances)
    logits, aux = model(x)
    expected, row = reference_model(model, x)
    assert relative_error(logits, expected) < 1e-10
    folded = row[..., 1 : 1 + instances].clone()
    for i in range(1 + instances, row.shape[-1]):
        folded[..., i - 1 - instances] += row[..., i]
    assert relative_error(aux["attn_raw"], folded) < 1e-10
    clipped = folded.clamp(min=0)
    assert relative_error(aux["attn"], clipped / clipped.sum(dim=-1, keepdim=True)) < 1e-10


def test_repeats_fold_onto_their_originals():
    row = torch.arange(9.0).view(1, 1, 9)
    assert fold_repeats(row, 7).tolist() == [[[7, 9, 2, 3, 4, 5, 6]]]
    assert fold_repeats(row, 9).tolist() == row.tolist()


def test_normalised_clips_and_has_an_answer_for_nothing():
    raw = torch.tensor([[[-1.0, 1.0, 3.0, 0.0], [-1.0, -2.0, -3.0, 0.0]]])
    assert normalised(raw).tolist() == [[[0, 0.25, 0.75, 0], [0.25, 0.25, 0.25, 0.25]]]


def test_memory_grows_with_the_bag_not_its_square():
    model = small("TransMIL", train=True)
    largest = []
    for instances in (900, 3600):
        with Sizes() as sizes:
            model(bag(instances))[0].sum().backward()
        largest.append(max(sizes.sizes))
    assert largest[1] / largest[0] < 4.1
    assert largest[1] < 3600 * 3600 / 10


def test_dropout_is_on_in_training_only():
    model = small("TransMIL", dropout=0.5, train=True)
    x = bag(10)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
