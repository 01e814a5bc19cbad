"""What one forward pass says about each example of a batch."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Visit", "repeats_earlier"]


def repeats_earlier(indices: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
    """True where the same index stands earlier in the batch; no synchronisation with the host."""
    _, inverse = torch.sort(indices, stable=True)
    ordered = indices[inverse]
    repeat = torch.zeros_like(ordered, dtype=torch.bool)
    repeat[1:] = ordered[1:] == ordered[:-1]
    return torch.zeros_like(repeat).scatter_(0, inverse, repeat)


class Visit:
    """Margin, confidence, error and the like of each example; token tasks are averaged.

    Args:
        logits: Unnormalised scores, float32.
        targets: Labels; `ignore_index` marks tokens without one.
        settings: Settings of a `DynamicsRecorder`.
    """

    def __init__(
        self,
        logits: Float[Tensor, "batch *tokens classes"],
        targets: Int[Tensor, batch * tokens],
        settings: dict[str, Any],
    ) -> None:
        self.is_tokens = logits.ndim > 2
        self._logits = logits
        self._space = settings["space"]
        self._labelled = (
            (targets != settings["ignore_index"]).flatten(1) if self.is_tokens else None
        )
        self._targets = targets.to(torch.int64)
        if self.is_tokens:
            self._targets = self._targets.masked_fill(targets == settings["ignore_index"], 0)

    @cached_property
    def probs(self) -> Float[Tensor, "batch *tokens classes"]:
        """The softmax."""
        return self._logits.softmax(-1)

    def _example(self, values: Float[Tensor, batch * tokens]) -> Float[Tensor, " batch"]:
        if self._labelled is None:
            return values
        total = (values.flatten(1) * self._labelled).sum(1)
        return total / self._labelled.sum(1).clamp_min(1)

    def _at_label(self, values: Tensor) -> Tensor:
        return values.gather(-1, self._targets[..., None]).squeeze(-1)

    @property
    def label(self) -> Int[Tensor, " batch"]:
        """Label of each example; of a sequence, that of its first token."""
        return self._targets if not self.is_tokens else self._targets.flatten(1)[:, 0]

    @property
    def confidence(self) -> Float[Tensor, " batch"]:
        """Probability of the label."""
        return self._example(self._at_label(self.probs))

    @property
    def margin(self) -> Float[Tensor, " batch"]:
        """Label against the best other class, in probabilities or logits."""
        values = self.probs if self._space == "prob" else self._logits
        others = values.scatter(-1, self._targets[..., None], -torch.inf).amax(-1)
        return self._example(self._at_label(values) - others)

    @property
    def correct(self) -> Bool[Tensor, " batch"]:
        """Whether the label (of every token that has one) was predicted."""
        right = self._logits.argmax(-1) == self._targets
        if self._labelled is None:
            return right
        return (right.flatten(1) | ~self._labelled).all(1)

    @property
    def error_norm(self) -> Float[Tensor, " batch"]:
        """||p - onehot(y)||_2."""
        error = self.probs.scatter_add(
            -1,
            self._targets[..., None],
            self.probs.new_full((), -1.0).expand_as(self._targets[..., None]),
        )
        return self._example(error.norm(dim=-1))

    @property
    def entropy(self) -> Float[Tensor, " batch"]:
        """Entropy of the prediction, in nats."""
        return self._example(torch.special.entr(self.probs).sum(-1))

    @property
    def loss(self) -> Float[Tensor, " batch"]:
        """Cross entropy."""
        return self._example(-self._at_label(self._logits.log_softmax(-1)))
