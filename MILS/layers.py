"""Layers that the models share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# oneDNN's product x w^T + b. For single precision PyTorch uses MKL, which does not use AVX-512 on processors other than
# Intel's: there this is twice as fast. Not every build of PyTorch has it.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
ONEDNN_PAYS = ONEDNN_LINEAR is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"


class Linear(nn.Linear):
    """nn.Linear for many instances; see `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Linear
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x (..., D) by weight (d, D) and bias (d) to (..., d), as functional.linear; on a CPU through oneDNN if it is
    faster, which `torch.backends.mkldnn.flags(enabled=False)` turns off.
    """
    if _by_onednn(x, weight):
        return _OneDNNLinear.apply(x.flatten(0, -2).contiguous(), weight, bias).unflatten(0, x.shape[:-1])
    return functional.linear(x, weight, bias)


def linear_by_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map x (H, n, w) by weight (H, w, a) and bias (H, 1, a) to (H, n, a): one product per head."""
    if _by_onednn(x, weight):
        return torch.stack([linear(*head) for head in zip(x, weight.mT, bias.squeeze(1), strict=True)])
    return torch.baddbmm(bias, x, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a weight (d, D), given that of its product with x (n, D), `grad` (n, d)."""
    return _onednn(grad.contiguous().T, x.contiguous().T) if _by_onednn(grad, x) else grad.T @ x


def _by_onednn(*tensors: Tensor) -> bool:
    return (
        ONEDNN_PAYS
        and not torch.compiler.is_compiling()  # which supports the private product only with constant weights
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and all(t.dtype is torch.float32 and t.device.type == "cpu" and t.numel() > 0 for t in tensors)
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by oneDNN. x and weight must be contiguous, or transposed so: else it can be a hundred times slower."""
    assert ONEDNN_LINEAR is not None  # noqa: S101 - for the type checker: callers check it
    return ONEDNN_LINEAR(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """oneDNN's product x (n, D) -> (n, d) with its gradient, which PyTorch lacks."""

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
    """nn.Dropout with a faster random draw on a CPU, where that dominates its cost: 64 random bits serve four elements,
    six times faster.

    There the probability of keeping an element is rounded to a multiple of 2**-16, and the scale is its inverse, so
    that the mean stays exact.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Dropout
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        keep = max(1, round((1 - self.p) * 2**16))
        words = torch.empty(math.ceil(input.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: input.numel()].view(input.shape)
        return input * (draws >= 2**15 - keep).to(input.dtype).mul_(2**16 / keep)


def embedding(input_dim: int, hidden_dim: int, dropout: float) -> nn.Sequential:
    """Return Linear, LayerNorm, ReLU, Dropout: (B, N, D) -> (B, N, d)."""
    return nn.Sequential(
        Linear(input_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU(inplace=True), Dropout(dropout)
    )


def mlp_head(hidden_dim: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Return Linear to half the width, GELU, Dropout, Linear: (B, d) -> (B, C)."""
    half = hidden_dim // 2
    return nn.Sequential(nn.Linear(hidden_dim, half), nn.GELU(), Dropout(dropout), nn.Linear(half, num_classes))


def at_least_single(x: Tensor) -> Tensor:
    """Return x, in single precision if it is in half."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast and TF32 off within the context, on the device of `like`."""
    without_autocast = torch.autocast(like.device.type, enabled=False)
    if like.device.type != "cuda" or torch.compiler.is_compiling():
        return without_autocast
    return _without_tf32(without_autocast)


@contextmanager
def _without_tf32(without_autocast: torch.autocast) -> Iterator[None]:
    # By the newer name: it can be read whichever name it was set by.
    was_on = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if was_on:
        torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with without_autocast:
            yield
    finally:
        if was_on:
            torch.backends.cuda.matmul.allow_tf32 = True
