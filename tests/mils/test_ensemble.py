import pytest
import torch

from MILS import build_mil
from MILS.ensemble import Ensemble


@pytest.fixture
def members():
    torch.manual_seed(0)
    return [build_mil("ABMIL", input_dim=8, num_classes=3, hidden_dim=8).eval() for _ in range(3)]


def test_probabilities_and_attention_are_the_members_means(members):
    x, mask = torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    logits, aux = Ensemble(members)(x, mask)
    answers = [member(x, mask) for member in members]
    torch.testing.assert_close(
        torch.softmax(logits, dim=-1), torch.stack([torch.softmax(one, dim=-1) for one, _ in answers]).mean(dim=0)
    )
    torch.testing.assert_close(torch.logsumexp(logits, dim=-1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(aux["attn"], torch.stack([aux["attn"] for _, aux in answers]).mean(dim=0))
    assert (aux["attn"][1, :, 4:] == 0).all()


def test_one_state_dict_holds_all_members(members):
    fresh = Ensemble([build_mil("ABMIL", input_dim=8, num_classes=3, hidden_dim=8) for _ in range(3)]).eval()
    fresh.load_state_dict(Ensemble(members).state_dict())
    x = torch.randn(1, 5, 8)
    assert torch.equal(fresh(x)[0], Ensemble(members)(x)[0])
