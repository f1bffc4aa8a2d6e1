"""Gradients of a bag that is processed block by block, in memory that hardly grows with the bag.

The forward pass saves each block's summary, which is small, and at most the product of the first layer. The backward
pass goes through the blocks again: the gradients of the merged summary give those of each block's summary; the block is
computed again from its product, or from its input if that was not saved, with the same dropout.

Results that outlive a block are written into one preallocated tensor per kind: allocated between the short-lived
tensors of the blocks, they would fragment the heap of a CPU by as much memory as they take themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from MILS.layers import weight_gradient

STREAMED_DEVICES = ("cpu", "cuda")  # those whose random state can be replayed

SummaryTuple = TypeVar("SummaryTuple", bound=Any)


def stream(model: Any, x: Tensor, mask: Tensor | None, rows: int, *, keep_products: bool) -> tuple[Any, Tensor]:
    """Return a mergeable model's summary and trace of bags x (B, N, D), `rows` instances at a time, with gradients for
    the parameters.

    `keep_products` saves one (B, N, d) tensor, so that the first layer is not computed twice.
    """
    trace, *fields = _Stream.apply(model, x, mask, rows, keep_products, *model.parameters())
    return model.summary_type(*fields), trace


def blocks_of(x: Tensor, mask: Tensor | None, rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut x (B, N, D) and its mask into blocks along N."""
    blocks = x.split(rows, dim=1)
    return zip(blocks, [None] * len(blocks) if mask is None else mask.split(rows, dim=1), strict=True)


class Joined:
    """Joins tensors (..., n_i) along their last axis as they arrive; `tensor` is None before the first."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.length = 0

    def append(self, values: Tensor) -> None:
        end = self.length + values.shape[-1]
        if self.memory is None:
            self.memory = values
        else:
            if end > self.memory.shape[-1]:
                grown = values.new_empty(*values.shape[:-1], 2 * end)
                grown[..., : self.length] = self.memory[..., : self.length]
                self.memory = grown
            self.memory[..., self.length : end] = values
        self.length = end

    @property
    def tensor(self) -> Tensor | None:
        return None if self.memory is None else self.memory[..., : self.length]


def merged(summaries: Sequence[SummaryTuple]) -> SummaryTuple:
    """Merge the summaries of a bag's blocks, in their order."""
    return functools.reduce(lambda earlier, later: earlier.merge(later), summaries)


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, model: Any, x: Tensor, mask: Tensor | None, rows: int, keep_products: bool, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.model, ctx.rows, ctx.modes = model, rows, modes_of(model)
        ctx.random_state, ctx.autocast = random_state(x.device), autocast_state(x.device)
        products, trace, fields = None, x.new_empty(0), []
        # Without autocast's cache: a copy of a weight made with gradients off must not be used with gradients on.
        with torch.autocast(x.device.type, **ctx.autocast, cache_enabled=False):
            for i, (block, block_mask) in enumerate(blocks_of(x, mask, rows)):
                columns = slice(i * rows, i * rows + block.shape[1])
                y = model.product(model.prepared(block, block_mask))
                if i == 0 and keep_products:
                    products = y.new_empty(*x.shape[:2], y.shape[2])
                if products is not None:
                    products[:, columns] = y
                summary, block_trace = model.summarise_product(y, block_mask)
                if i == 0:
                    trace = block_trace.new_empty(*block_trace.shape[:2], x.shape[1])
                    fields = [field.new_empty(-(-x.shape[1] // rows), *field.shape) for field in summary]
                trace[..., columns] = block_trace
                for field, value in zip(fields, summary, strict=True):
                    field[i] = value
        ctx.fields = fields
        ctx.save_for_backward(x, mask, products, *parameters)
        whole = merged([model.summary_type(*values) for values in zip(*fields, strict=True)])
        ctx.mark_non_differentiable(*(field for field in whole if not field.is_floating_point()))
        return trace, *whole

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the signature
        ctx: Any, *output_grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, mask, products, *parameters = ctx.saved_tensors
        trace_grad, *whole_grads = output_grads
        model, layer = ctx.model, ctx.model.instance_layers()[0]
        if modes_of(model) != ctx.modes:
            raise RuntimeError(
                f"{type(model).__name__}: was switched between training and evaluation before the backward pass, which "
                "computes a long bag again in the mode it was in; call backward first"
            )
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        grads: dict[int, Tensor] = {}

        def grad_of(parameter: Tensor) -> Tensor:
            if id(parameter) not in grads:
                grads[id(parameter)] = torch.zeros_like(parameter)
            return grads[id(parameter)]

        field_grads = grads_of_fields(model.summary_type, ctx.fields, whole_grads)
        with replaying(ctx.random_state, x.device), torch.autocast(x.device.type, **ctx.autocast):
            for i, (block, block_mask) in enumerate(blocks_of(x, mask, ctx.rows)):
                columns = slice(i * ctx.rows, i * ctx.rows + block.shape[1])
                prepared = model.prepared(block, block_mask)
                y = model.product(prepared) if products is None else products[:, columns]
                y = y.detach().requires_grad_()
                with torch.enable_grad():
                    summary, trace = model.summarise_product(y, block_mask)
                block_grads = [None if grad is None else grad[i] for grad in field_grads]
                block_grads.append(None if trace_grad is None else trace_grad[..., columns])
                y_grad, *parameter_grads = gradients([*summary, trace], block_grads, [y, *trained])
                for parameter, grad in zip(trained, parameter_grads, strict=True):
                    if grad is not None:
                        grad_of(parameter).add_(grad)
                if y_grad is not None and layer.weight.requires_grad:
                    instances = prepared.flatten(0, 1).to(y_grad.dtype)  # that of autocast, where it is on
                    grad_of(layer.weight).add_(weight_gradient(y_grad.flatten(0, 1), instances))
                if y_grad is not None and layer.bias.requires_grad:
                    grad_of(layer.bias).add_(y_grad.sum(dim=(0, 1)))
        return None, None, None, None, None, *(grads.get(id(parameter)) for parameter in parameters)


def grads_of_fields(
    summary_type: type[Any], fields: Sequence[Tensor], whole_grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of the blocks' summaries, field by field (K, ...), from those of the merged fields."""
    with torch.enable_grad():
        leaves = [field.detach().requires_grad_(field.is_floating_point()) for field in fields]
        whole = merged([summary_type(*values) for values in zip(*leaves, strict=True)])
    grads = iter(gradients(whole, whole_grads, [leaf for leaf in leaves if leaf.requires_grad]))
    return [next(grads) if leaf.requires_grad else None for leaf in leaves]


def gradients(
    outputs: Sequence[Tensor], output_grads: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return torch.autograd.grad of the outputs that require a gradient and have one."""
    pairs = [(o, g) for o, g in zip(outputs, output_grads, strict=True) if o.requires_grad and g is not None]
    return torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def replaying(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Repeat, within the context, the random draws that followed `state` on the CPU and on `device`."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


def autocast_state(device: torch.device) -> dict[str, Any]:
    return {"dtype": torch.get_autocast_dtype(device.type), "enabled": torch.is_autocast_enabled(device.type)}
