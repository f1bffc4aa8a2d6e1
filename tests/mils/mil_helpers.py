"""Small models with no special weights, and bags, for the tests of MILS."""

import torch

from MILS import build_mil, list_mils

D = 12
SMALL = {
    "LiteMIL": {"hidden_dim": 16, "num_heads": 4, "num_queries": 3},
    "ABMIL": {"hidden_dim": 16, "attention_dim": 6},
    "ABMIL_Multihead": {"hidden_dim": 16, "num_heads": 3},
    "TransMIL": {"hidden_dim": 16, "num_heads": 2},
    "meanPool": {"hidden_dim": 16},
    "maxPool": {"hidden_dim": 16},
}
MODELS = list_mils()
MERGEABLE = [name for name in MODELS if name != "TransMIL"]


def stir(module, scale=0.2, seed=1):
    """Move every parameter off its initial value: biases that start at 0 would hide what is done with them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return module


def small(name, *, num_classes=3, dtype=torch.float64, train=False, **options):
    torch.manual_seed(0)
    model = build_mil(name, input_dim=D, num_classes=num_classes, **{**SMALL[name], **options})
    return stir(model).to(dtype).train(train)


def bag(n, seed=0, *, bags=1, dtype=torch.float64, dim=D):
    return torch.randn(bags, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def padded(bags, length, fill=float("nan"), seed=0):
    """(x, mask) that hold the bags (1, n, D) in one batch, each spread in order over random places."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(bags), length, bags[0].shape[2]), fill, dtype=bags[0].dtype)
    mask = torch.ones(len(bags), length, dtype=torch.bool)
    for i, one in enumerate(bags):
        places = torch.randperm(length, generator=generator)[: one.shape[1]].sort().values
        x[i, places] = one[0]
        mask[i, places] = False
    return x, mask


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
