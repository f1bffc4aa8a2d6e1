"""Layers the models share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# oneDNN's product x w^T + b. PyTorch gives single precision to MKL, which leaves the AVX-512 of a processor that is not
# Intel's unused: there this is twice as fast. Not every build of PyTorch has it.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_ONEDNN_PAYS = ONEDNN_LINEAR is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"


class Linear(nn.Linear):
    """nn.Linear for many instances; see `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Linear
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D), weight (d, D), bias (d) -> (..., d), as functional.linear; on a CPU by the faster library, which
    `torch.backends.mkldnn.flags(enabled=False)` turns off.
    """
    if _by_onednn(x, weight):
        return _OneDNNLinear.apply(x.flatten(0, -2).contiguous(), weight, bias).unflatten(0, x.shape[:-1])
    return functional.linear(x, weight, bias)


def linear_by_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (H, n, w), weight (H, w, a), bias (H, 1, a) -> (H, n, a): a product for each head."""
    if _by_onednn(x, weight):
        return torch.stack([linear(*head) for head in zip(x, weight.mT, bias.squeeze(1), strict=True)])
    return torch.baddbmm(bias, x, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Of a weight (d, D), from the gradient (n, d) of its product with x (n, D)."""
    return _onednn(grad.contiguous().T, x.contiguous().T) if _by_onednn(grad, x) else grad.T @ x


def _by_onednn(*tensors: Tensor) -> bool:
    return (
        _ONEDNN_PAYS
        and not torch.compiler.is_compiling()  # which takes the private product with constant weights only
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and all(t.dtype is torch.float32 and t.device.type == "cpu" and t.numel() > 0 for t in tensors)
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Both contiguous, or the transpose of what is: with steps between rows oneDNN can be a hundred times slower."""
    assert ONEDNN_LINEAR is not None  # noqa: S101 - for the type checker: it was looked for
    return ONEDNN_LINEAR(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """PyTorch knows no gradient of oneDNN's product, x (n, D) -> (n, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the signature
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            _onednn(grad, weight.T) if for_x else None,
            weight_gradient(grad, x) if for_weight else None,
            grad.sum(dim=0) if for_bias else None,
        )


class Dropout(nn.Dropout):
    """nn.Dropout with a draw of its own on a CPU, where drawing is what dropout costs: 64 random bits serve four
    elements, six times faster.

    There the probability to be kept is rounded to a multiple of 2**-16, and the scale is its inverse: the mean stays
    exact.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Dropout
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        kept = max(1, round((1 - self.p) * 2**16))
        words = torch.empty(math.ceil(input.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: input.numel()].view(input.shape)
        return input * (draws >= 2**15 - kept).to(input.dtype).mul_(2**16 / kept)


def embedding(input_dim: int, hidden_dim: int, dropout: float) -> nn.Sequential:
    """Linear, LayerNorm, ReLU, Dropout: (B, N, D) -> (B, N, d)."""
    return nn.Sequential(
        Linear(input_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU(inplace=True), Dropout(dropout)
    )


def mlp_head(hidden_dim: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Linear to half the width, GELU, Dropout, Linear: (B, d) -> (B, C)."""
    half = hidden_dim // 2
    return nn.Sequential(nn.Linear(hidden_dim, half), nn.GELU(), Dropout(dropout), nn.Linear(half, num_classes))


def at_least_single(x: Tensor) -> Tensor:
    """x, in single precision if it is in half."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(like: Tensor) -> torch.autocast:
    """Context without autocast on the device of `like`."""
    return torch.autocast(like.device.type, enabled=False)
