"""Any `nn.Module` that takes one bag and gives logits, under the contract of a bag model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from MILS.bag_model import Aux, BagModel, ModelError, Origin, evaluating

# The names under which models return their attention, and the arguments of `forward` that ask for it.
_ATTENTION = ("attn", "att", "attention", "attn_weights", "attention_weights", "attentions", "A", "A_raw")
_ASKING = ("return_att", "return_attn", "return_attention", "return_attention_weights", "output_attentions")
# Patches of the random bag that shows how a module answers: no usual number of heads or of outputs.
_PROBE_ROWS = 67
# A tensor without a name that has more rows than this is no attention: it may be the patches' embeddings.
_MOST_HEADS = 32


class OtherModel(BagModel):
    """A module whose `forward(x)` takes one bag, x (1, N, D), and gives logits: C numbers of any shape, or a tuple or
    dict whose first entry (or "logits") they are. A single logit z becomes (0, z) where there are two outputs.

    Attention is what it returns besides, by a usual name or in a tuple, as H x N or N x H numbers; None if there is
    none. Non-negative heads that sum to 1 are taken as they are, others are raw scores: their softmax is taken.

    `told` turns what the module's own code raises into a ModelError. A random bag shows at once how it answers; raises
    ModelError for a module that gives anything else.
    """

    def __init__(
        self,
        module: nn.Module,
        input_dim: int,
        num_classes: int,
        told: Callable[[Exception, str], ModelError],
        origin: Origin,
    ) -> None:
        super().__init__(input_dim, num_classes)
        self.module, self.origin, self._told = module, origin, told
        parameters = inspect.signature(module.forward).parameters
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = [p.name for p in parameters.values() if p.kind in positional and p.default is p.empty]
        self.require(len(needed) < 2, f"its forward needs {', '.join(needed[1:])}, but is given the features of a bag")
        self._asked = {name: True for name in _ASKING if name in parameters}
        self._place: str | int | None = None  # of the attention in what the module gives; None if there is none
        self._heads, self._patches_first, self._is_raw, self.is_binary_only = 0, False, False, False
        with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(self):
            self._probe()

    def _probe(self) -> None:
        """Find how the module answers, by a random bag."""
        self.require(any(True for _ in self.module.parameters()), "has no parameters to train")
        x = torch.randn(1, _PROBE_ROWS, self.input_dim, generator=torch.Generator().manual_seed(0))
        logits, others = self._answer(x)
        self.require(bool(torch.isfinite(self._logits(logits)).all()), "its forward gives NaN or infinity")
        self.is_binary_only = logits.numel() == 1 and self.num_classes == 2
        self._place = next((place for place, value in others.items() if _is_attention(place, value)), None)
        if self._place is None:
            self._asked = {}
            return
        attention = others[self._place]
        sizes = [size for size in attention.shape if size != 1]
        self._patches_first, self._heads = sizes[0] == _PROBE_ROWS, attention.numel() // _PROBE_ROWS
        heads = self._by_head(attention, _PROBE_ROWS)
        sums = heads.sum(dim=1)
        self._is_raw = bool((heads < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3)

    @property
    def gives_evidence(self) -> bool:
        return True

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self._place is None:
            notes.append("gives no attention, so there is no attention map; its evidence is by gradients")
        elif self._is_raw:
            notes.append("gives raw attention scores; their softmax over the patches is taken")
        if self.is_binary_only:
            notes.append("gives a single logit z, taken as (0, z)")
        return tuple(f"{self.title} {note}" for note in notes)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Aux]:
        self.check_bags(x, mask)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else ~mask
        answers = [self._of_bag(bag if mask is None else bag[rows]) for bag, rows in zip(x, real, strict=True)]
        logits = torch.stack([logits for logits, _ in answers])
        attentions = [attention for _, attention in answers if attention is not None]
        if len(attentions) < len(answers):
            return logits, {"attn": None}
        attn = attentions[0].new_zeros(len(x), self._heads, x.shape[1])
        for row, (attention, rows) in enumerate(zip(attentions, real, strict=True)):
            attn[row, :, rows] = attention
        return logits, {"attn": attn}

    def forward_bags(self, bags: Sequence[Tensor]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        self.require(len(bags) > 0, "no bag in the batch")
        for bag in bags:
            self.check_bags(bag.unsqueeze(0), None)
        answers = [self._of_bag(bag) for bag in bags]
        attentions = [attention for _, attention in answers if attention is not None]
        aux = {"attn": attentions} if len(attentions) == len(answers) else {}
        return torch.stack([logits for logits, _ in answers]), aux

    def _of_bag(self, bag: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits (C,) and attention (H, n), or None, of a bag (n, D)."""
        logits, others = self._answer(self.cast(bag.unsqueeze(0)))
        attention = None if self._place is None else others.get(self._place)
        if not isinstance(attention, Tensor) or attention.numel() != self._heads * len(bag):
            return self._logits(logits), None
        heads = self._by_head(attention, len(bag))
        return self._logits(logits), heads.softmax(dim=1) if self._is_raw else heads

    def _answer(self, x: Tensor) -> tuple[Tensor, Mapping[Any, Any]]:
        """Return the logits that the module gives for one bag x (1, n, D), and what else it gives, by its place."""
        with self._telling():
            answer = self.module(x, **self._asked)
        logits, others = _first_and_others(answer)
        found = type(logits).__name__
        self.require(
            isinstance(logits, Tensor), f"its forward must give logits, alone or first of a tuple or dict, got {found}"
        )
        return logits, others

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (ModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "memory" in str(error):  # the run has a remedy for it
                raise
            raise self._told(error, "its forward") from error

    def _logits(self, logits: Tensor) -> Tensor:
        """Return logits (C,)."""
        given = logits.reshape(-1)
        if len(given) == 1 and self.num_classes == 2:
            return torch.cat([torch.zeros_like(given), given])
        self.require(
            len(given) == self.num_classes,
            f"its forward must give {self.num_classes} logits for a bag, got {tuple(logits.shape)}",
        )
        return given

    def _by_head(self, attention: Tensor, rows: int) -> Tensor:
        """Return attention (H, n) in single precision at least."""
        attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
        return attention.reshape(rows, -1).T if self._patches_first else attention.reshape(-1, rows)


def _first_and_others(answer: Any) -> tuple[Any, Mapping[Any, Any]]:
    """Return the logits in what a module gives, and the rest by its name or, in a tuple, its number."""
    if hasattr(answer, "_asdict"):
        answer = answer._asdict()
    if isinstance(answer, Mapping) and answer:
        first = "logits" if "logits" in answer else next(iter(answer))
        return answer[first], {name: value for name, value in answer.items() if name != first}
    if isinstance(answer, tuple | list) and answer:
        others: dict[Any, Any] = {}
        for number, value in enumerate(answer[1:], start=1):
            others |= value if isinstance(value, Mapping) else {number: value}
        return answer[0], others
    return answer, {}


def _is_attention(place: Any, value: Any) -> bool:
    """Return whether a value is the attention over the random bag's patches: a number per patch and head."""
    is_named = place in _ATTENTION
    if not isinstance(value, Tensor) or not (is_named or isinstance(place, int)):
        return False
    sizes = [size for size in value.shape if size != 1]
    is_told = sizes.count(_PROBE_ROWS) == 1 and len(sizes) <= 2 and bool(torch.isfinite(value).all())
    return is_told and (is_named or value.numel() <= _MOST_HEADS * _PROBE_ROWS)
