"""What all compressed tables share: the call of `nn.EmbeddingBag`, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlkit.embeddings.memory import MemoryReport, dense_bytes, optimizer_bytes, parse_budget
from mlkit.errors import InvalidTypeError, InvalidValueError

__all__ = ["CompressedEmbeddingBag", "largest_fitting"]

BLOCK = 1 << 16
"""Rows that `to_dense` computes at once."""


def largest_fitting(
    nbytes: Callable[[int], int], budget: int, low: int, high: int, what: str
) -> int:
    """Return the largest number in low .. high whose bytes are within the budget.

    Args:
        nbytes: Bytes of a table by this number; not decreasing.
        budget: In bytes.
        low: The least that works.
        high: The most that is of use.
        what: The table, for the message.

    Raises:
        InvalidValueError: If `low` needs more than the budget; the message has the minimum.
    """
    if nbytes(low) > budget:
        raise InvalidValueError(
            f"memory_budget of {budget:,} bytes is too small for {what}: "
            f"the minimum is {nbytes(low):,} bytes"
        )
    while low < high:
        middle = (low + high + 1) // 2
        if nbytes(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


class CompressedEmbeddingBag(nn.Module):
    """A table of fewer bytes in place of an `nn.EmbeddingBag`; what its children share.

    A child says which parameters there are, how bags are pooled (`pool`), and which row an id has
    (`rows`). Every id has one row, so that a bag is the sum or mean of rows, as in
    `nn.EmbeddingBag`. The id `padding_idx` counts in no bag and gets no gradient.
    Training starts anew: no compressed table takes the weights of a dense one.

    Args:
        num_embeddings: N, rows of the table that it stands for.
        embedding_dim: D.
        optimizer: Whose state counts: a name in `OPTIMIZER_STATE`. It trains nothing by itself.
        mode: "sum" or "mean"; per-sample weights need "sum".
        padding_idx: As in `nn.EmbeddingBag`.
        include_last_offset: As in `nn.EmbeddingBag`.
        sparse: Whether gradients of tables are sparse.

    Raises:
        InvalidValueError: For a value out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        optimizer: str,
        mode: Literal["sum", "mean"],
        padding_idx: int | None,
        include_last_offset: bool,
        sparse: bool,
    ) -> None:
        super().__init__()
        for name, value in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if mode not in ("sum", "mean"):
            raise InvalidValueError(
                f"mode must be 'sum' or 'mean', got {mode!r}: compressed tables have no other"
            )
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise InvalidValueError(
                    f"padding_idx must be within {num_embeddings} rows, got {padding_idx}"
                )
            padding_idx %= num_embeddings
        optimizer_bytes(1, 1, optimizer)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.optimizer = optimizer
        self.mode = mode
        self.padding_idx = padding_idx
        self.include_last_offset = include_last_offset
        self.sparse = sparse

    # ------------------------------------------------------- what a child says

    def reset_parameters(self) -> None:
        """Draw initial values, and forget everything learned; also after `to_empty`."""
        raise NotImplementedError

    def pool(
        self,
        input: Int[Tensor, "*shape"],
        offsets: Int[Tensor, " bags"] | None,
        per_sample_weights: Float[Tensor, "*shape"] | None,
    ) -> Float[Tensor, "bags dim"]:
        """Pool checked ids."""
        raise NotImplementedError

    def rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """The row of each id, as pooled; `padding_idx` is not looked at."""
        raise NotImplementedError

    # ---------------------------------------------------------------- the call

    def forward(
        self,
        input: Int[Tensor, "*shape"],
        offsets: Int[Tensor, " bags"] | None = None,
        per_sample_weights: Float[Tensor, "*shape"] | None = None,
    ) -> Float[Tensor, "bags dim"]:
        """Pool the rows of each bag, with the arguments of `nn.EmbeddingBag`.

        Args:
            input: Ids in 0 .. N - 1, [bags, length], or [n] with `offsets`.
            offsets: Where each bag begins in `input`.
            per_sample_weights: Like `input`; with mode="sum" only.

        Raises:
            InvalidTypeError: For ids that are not int32 or int64.
            InvalidValueError: For an id out of range (looked at on the CPU, outside of compiled
                code), or weights with another mode.
        """
        if input.dtype not in (torch.int64, torch.int32):
            raise InvalidTypeError(f"ids must be int64 or int32, got {input.dtype}")
        if per_sample_weights is not None and self.mode != "sum":
            raise InvalidValueError(f"per_sample_weights need mode='sum', got mode={self.mode!r}")
        if input.device.type == "cpu" and input.numel() and not torch.compiler.is_compiling():
            self._check_range(input)
        return self.pool(input, offsets, per_sample_weights)

    def _check_range(self, ids: Tensor) -> None:
        lowest, highest = (int(bound) for bound in ids.aminmax())
        if lowest < 0 or highest >= self.num_embeddings:
            wrong = lowest if lowest < 0 else highest
            raise InvalidValueError(
                f"id {wrong} is outside 0 .. {self.num_embeddings - 1}, the rows of this "
                f"{type(self).__name__}"
            )

    # ------------------------------------------------------------------- bytes

    def memory_report(self) -> MemoryReport:
        """Count everything that is held, with the state of the optimizer named at construction."""
        matrices = list(self.parameters())
        size = matrices[0].element_size()
        return MemoryReport(
            weight_bytes=sum(p.numel() * p.element_size() for p in matrices),
            optimizer_bytes=sum(
                optimizer_bytes(p.shape[0], p.shape[1], self.optimizer) for p in matrices
            ),
            header_bytes=0,
            allocator_bytes=0,
            other_bytes=0,
            dense_bytes=dense_bytes(self.num_embeddings, self.embedding_dim, self.optimizer, size),
            dense_weight_bytes=self.num_embeddings * self.embedding_dim * size,
        )

    def parse_budget(self, memory_budget: int | str | float, dtype: torch.dtype | None) -> int:
        """Bytes of a budget for this table; see `mlkit.embeddings.memory.parse_budget`."""
        size = (dtype or torch.get_default_dtype()).itemsize
        dense = dense_bytes(self.num_embeddings, self.embedding_dim, self.optimizer, size)
        return parse_budget(memory_budget, dense)

    def row_bytes(self, dim: int, dtype: torch.dtype | None) -> int:
        """Bytes of one row of `dim` weights with its optimizer state."""
        return dense_bytes(1, dim, self.optimizer, (dtype or torch.get_default_dtype()).itemsize)

    # ------------------------------------------------------------------ export

    @torch.no_grad()
    def to_dense(self) -> nn.EmbeddingBag:
        """Return a stock table with the row of every id; that of `padding_idx` is zero."""
        like = next(self.parameters())
        weight = torch.empty(
            self.num_embeddings, self.embedding_dim, device=like.device, dtype=like.dtype
        )
        if not weight.is_meta:
            for start in range(0, self.num_embeddings, BLOCK):
                stop = min(start + BLOCK, self.num_embeddings)
                weight[start:stop] = self.rows(torch.arange(start, stop, device=like.device))
            if self.padding_idx is not None:
                weight[self.padding_idx] = 0
        bag = nn.EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.mode,
            sparse=self.sparse,
            _weight=weight,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
        return bag.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, bytes and modes."""
        report = self.memory_report()
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {report.total_bytes:,} bytes with "
            f"{self.optimizer} ({100 * report.byte_fraction:.1f} % of dense), mode={self.mode}"
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        found = state_dict.get(f"{prefix}weight")
        own = self._parameters.get("weight")
        stock = (self.num_embeddings, self.embedding_dim)
        if (
            isinstance(found, Tensor)
            and tuple(found.shape) == stock
            and (own is None or tuple(own.shape) != stock)
        ):
            raise InvalidValueError(
                f"the checkpoint holds a dense table of {stock[0]} x {stock[1]} for "
                f"{prefix.rstrip('.') or 'the module'}, which a {type(self).__name__} cannot take: "
                "its training starts anew; load the checkpoint's other tensors only"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
