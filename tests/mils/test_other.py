"""Other people's modules under the contract: their answers, their attention, and what is wrong with them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from MILS import ModelError, build_mil, list_mils, mil_factory, use_mil
from tests.mils.others import Plain, given, scores_of

X = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))


def model_of(cls, num_classes=2, **options):
    torch.manual_seed(0)
    return mil_factory(cls, input_dim=16, num_classes=num_classes, **options)().eval()


class TestBags:
    def test_padding_and_the_other_bags_change_nothing(self):
        model = model_of(given(lambda logits, h, a: (logits, a)))
        x, mask = torch.full((2, 9, 16), float("nan")), torch.ones(2, 9, dtype=torch.bool)
        x[0, [0, 2, 3, 5, 6, 7, 8]], mask[0, [0, 2, 3, 5, 6, 7, 8]] = X[0], False
        x[1, 4], mask[1, 4] = X[0, 3], False
        logits, aux = model(x, mask)
        alone, attn = model(X)
        torch.testing.assert_close(logits[0], alone[0])
        torch.testing.assert_close(aux["attn"][0][:, ~mask[0]], attn["attn"][0])
        assert (aux["attn"][0][:, mask[0]] == 0).all()
        assert aux["attn"][1, :, 4].tolist() == [1, 1]
        logits, aux = model.forward_bags([X[0], X[0, 3:4]])
        torch.testing.assert_close(logits[0], alone[0])
        assert [each.shape for each in aux["attn"]] == [(2, 7), (2, 1)]

    def test_features_are_standardised_and_cast(self):
        model = model_of(Plain)
        expected = model((X - 2) / 3)[0]
        model.set_feature_scale(torch.full((16,), 2.0), torch.full((16,), 3.0))
        torch.testing.assert_close(model(X.half())[0], expected, atol=1e-2, rtol=0)
        again = build_mil(**model.spec)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.eval()(X)[0], model(X)[0])

    def test_a_copy_and_a_pickle_have_the_weights_and_the_mode(self):
        model = model_of(Plain)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - made here
            assert torch.equal(again(X)[0], model(X)[0])
            assert (again.training, again.spec) == (False, model.spec)
            assert all(weights.requires_grad for weights in again.parameters())

    def test_making_one_leaves_the_random_numbers_as_they_are(self):
        torch.manual_seed(3)
        Plain(16, 2)
        expected = torch.rand(1)
        torch.manual_seed(3)
        mil_factory(Plain, input_dim=16, num_classes=2)()
        assert torch.equal(torch.rand(1), expected)


class TestLogits:
    @pytest.mark.parametrize("shape", [(2,), (1, 2), (1, 1, 2)])
    def test_of_any_shape(self, shape):
        model = model_of(given(lambda logits, h, a: logits.reshape(shape)))
        assert model(X)[0].shape == (1, 2)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_a_single_one_is_that_of_the_second_class(self, shape):
        model = model_of(given(lambda logits, h, a: logits[0, 1].reshape(shape)))
        assert model.is_binary_only
        logits = model(X)[0]
        assert logits[0].tolist() == [0, model.module(X).item()]
        assert model.notes[-1].endswith("gives a single logit z, taken as (0, z)")

    @pytest.mark.parametrize("num_classes", [1, 3, 5])
    def test_as_many_as_the_task_takes(self, num_classes):
        model = model_of(Plain, num_classes)
        assert model(X)[0].shape == (1, num_classes)
        assert not model.is_binary_only

    def test_by_name_and_first(self):
        first = model_of(given(lambda logits, h, a: {"out": logits, "embedding": h}))
        named = model_of(given(lambda logits, h, a: {"embedding": h, "logits": logits}))
        alone = model_of(Plain)
        assert torch.equal(first(X)[0], alone(X)[0])
        assert torch.equal(named(X)[0], alone(X)[0])


class TestAttention:
    @pytest.mark.parametrize(
        "answer",
        [
            lambda logits, h, a: (logits, a),
            lambda logits, h, a: (logits, a[0]),
            lambda logits, h, a: (logits, a.mT),
            lambda logits, h, a: (logits, logits.softmax(dim=1), logits.argmax(dim=1), a[0].T, {}),
            lambda logits, h, a: (logits, {"attn": a.mT}),
            lambda logits, h, a: {"logits": logits, "A": a},
            lambda logits, h, a: {"embedding": h, "attention": a.mT.unsqueeze(0), "logits": logits},
        ],
    )
    def test_raw_scores_in_any_form(self, answer):
        model = model_of(given(answer))
        torch.testing.assert_close(model(X)[1]["attn"][0], scores_of(model, X))
        assert "raw attention scores; their softmax" in model.notes[0]

    @pytest.mark.parametrize("shape", [(7,), (1, 7), (7, 1), (1, 7, 1), (1, 1, 7)])
    def test_of_one_head_in_any_shape(self, shape):
        def answer(logits, h, a):
            return logits, a.softmax(dim=1).reshape([a.shape[1] if size == 7 else size for size in shape])

        model = model_of(given(answer, heads=1))
        torch.testing.assert_close(model(X)[1]["attn"][0], scores_of(model, X))
        assert model.notes == ()

    def test_that_is_asked_for(self):
        class Asked(Plain):
            """As torchmil's."""

            def forward(self, X, mask=None, return_att=False):  # noqa: N803
                logits = super().forward(X)
                return (logits, self.score(X)) if return_att else logits

        model = model_of(Asked)
        torch.testing.assert_close(model(X)[1]["attn"][0], scores_of(model, X))

    @pytest.mark.parametrize(
        "answer",
        [
            lambda logits, h, a: logits,
            lambda logits, h, a: (logits, h.repeat(1, 1, 4)),  # embeddings
            lambda logits, h, a: (logits, a @ a.mT),  # of each patch to each
            lambda logits, h, a: (logits, None),
            lambda logits, h, a: {"logits": logits, "attn": None},
            lambda logits, h, a: (logits, a / 0),
        ],
    )
    def test_none_where_none_is_given(self, answer):
        model = model_of(given(answer))
        assert model(X)[1] == {"attn": None}
        assert model.forward_bags([X[0]])[1] == {}
        assert model.notes[0].endswith("so there is no attention map; its evidence is by gradients")

    def test_two_patches_and_two_heads_are_not_mixed_up(self):
        model = model_of(given(lambda logits, h, a: (logits, a)))
        torch.testing.assert_close(model(X[:, :2])[1]["attn"][0], scores_of(model, X[:, :2]))


class TestErrors:
    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (lambda logits, h, a: torch.cat([logits, logits], 1), r"must give 2 logits for a bag, got \(1, 4\)"),
            (lambda logits, h, a: h, r"must give 2 logits for a bag, got \(1, 67, 16\)"),
            (lambda logits, h, a: logits * float("nan"), "forward gives NaN or infinity"),
            (lambda logits, h, a: None, "must give logits, alone or first of a tuple or dict, got NoneType"),
            (lambda logits, h, a: (), "must give logits.*got tuple"),
            (lambda logits, h, a: 1 / 0, r"its forward raised ZeroDivisionError: division by zero \(others.py, line"),
        ],
    )
    def test_of_its_answer_are_told_at_once(self, answer, message):
        with pytest.raises(ModelError, match=rf"^others.py:Given: .*{message}"):
            model_of(given(answer))

    def test_a_forward_that_needs_more(self):
        class Graph(Plain):
            """Takes an adjacency, too."""

            def forward(self, x, adj):
                return super().forward(x)

        with pytest.raises(ModelError, match="its forward needs adj, but is given the features of a bag"):
            model_of(Graph)

    def test_nothing_to_train(self):
        class Empty(nn.Module):
            """The mean."""

            def __init__(self):
                super().__init__()

            def forward(self, x):
                return x.mean(dim=1)[:, :2]

        with pytest.raises(ModelError, match="has no parameters to train"):
            model_of(Empty)

    def test_bags_of_another_width(self):
        with pytest.raises(ModelError, match=r"Plain: x must be a float tensor \(B, N, 16\)"):
            model_of(Plain)(torch.zeros(1, 3, 8))

    def test_memory_that_runs_out_is_no_error_of_theirs(self):
        class Large(Plain):
            """Takes much of a large bag."""

            def forward(self, x):
                if x.shape[1] == 7:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
                return super().forward(x)

        with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"):
            model_of(Large)(X)


def test_it_is_no_model_of_ours():
    before = list_mils()
    assert use_mil(Plain) == "others.Plain"
    assert list_mils() == before
