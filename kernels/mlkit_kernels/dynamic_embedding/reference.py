"""Dynamic embeddings in plain PyTorch: the definition, the test oracle and the fallback.

T tables of one dimension D share a header and a pool of chunks of C = D / K numbers. `tables` is
int64 [T, 3] on the CPU: the table's first row in the header, its number of rows, and its
`padding_idx` (-1: none). Indices are those within a table; they and the bags are ordered by table,
as in FBGEMM: bag b of table t is number t * B + b.

Yao et al., "FIITED: Fine-grained embedding dimension optimization during training", arXiv
2401.04408: the utility of a chunk grows by a * ||g||, a the accesses of its row and g the gradient
of the chunk in this step, whether it is resident or not, and decays by gamma at each step. The
decay is lazy (our decision): utilities are kept divided by gamma^step, so an increment is
multiplied by `scale` = gamma^-step instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlkit.errors import InvalidValueError
from mlkit_kernels.dynamic_embedding.header import (
    LARGEST,
    HeaderLayout,
    decode,
    encode,
    uniform_bits,
)

__all__ = [
    "MODES",
    "OPTIMIZERS",
    "UTILITIES",
    "RowGradients",
    "Touched",
    "Update",
    "apply_gradients",
    "backward_reference",
    "check_indices",
    "forward_reference",
    "reduce_gradients",
]

MODES = ("sum", "mean")
OPTIMIZERS = ("none", "sgd", "rowwise_adagrad", "adagrad", "adam")
"""Fused optimizers by the number that the ops take; `none` updates the utilities alone."""
UTILITIES = ("freq_grad", "freq", "grad", "none")


class Update(NamedTuple):
    """What a backward pass does to header and pool.

    Args:
        optimizer: One of `OPTIMIZERS`.
        lr: Learning rate.
        eps: Added to the root in Adagrad and Adam.
        beta1: Of Adam.
        beta2: Of Adam.
        utility: One of `UTILITIES`.
        scale: gamma^-step.
        exponent: Of one-byte utilities.
        seed: Of random rounding; changes from step to step.
        keep_new: Whether to return the gradients of rows that were never touched before.
    """

    optimizer: str = "none"
    lr: float = 0.0
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    utility: str = "freq_grad"
    scale: float = 1.0
    exponent: int = 0
    seed: int = 0
    keep_new: bool = False


class RowGradients(NamedTuple):
    """Sums over a batch for each row that it reads.

    Args:
        rows: Of the header, ascending and distinct.
        counts: How often each was read.
        grads: The gradient of each, [rows, D].
    """

    rows: Int[Tensor, " rows"]
    counts: Int[Tensor, " rows"]
    grads: Float[Tensor, "rows dim"]


class Touched(NamedTuple):
    """What a backward pass found.

    Args:
        new: Rows without any chunk and utility before it; none unless `keep_new`.
        num_nonfinite: How many rows had a NaN or an infinity in their gradient.
    """

    new: RowGradients
    num_nonfinite: int


def _bags(
    num_indices: int, offsets: Tensor | None, bag_size: int, device: torch.device
) -> tuple[Tensor, int]:
    """Return the bag of each index, and how many bags there are."""
    if offsets is None:
        return torch.arange(num_indices, device=device) // bag_size, num_indices // bag_size
    lengths = offsets.diff()
    bag = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=device), lengths, output_size=num_indices
    )
    return bag, lengths.numel()


def _rows(indices: Tensor, bag: Tensor, tables: Tensor, num_bags: int) -> tuple[Tensor, Tensor]:
    """Return the header's row of each index, and whether it counts (is no padding)."""
    batch = max(num_bags // tables.shape[0], 1)
    table = bag // batch
    first, size, padding = (column[table] for column in tables.to(indices.device).unbind(1))
    wrong = ((indices < 0) | (indices >= size)).nonzero()
    if wrong.numel():
        raise IndexOutOfRange(int(table[wrong[0]]), int(indices[wrong[0]]), int(size[wrong[0]]))
    return first + indices, indices != padding


def check_indices(
    tables: Int[Tensor, "tables 3"],
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None,
    bag_size: int,
) -> None:
    """Look for an index outside its table.

    Raises:
        IndexOutOfRange: For the first one.
    """
    bag, num_bags = _bags(indices.numel(), offsets, bag_size, indices.device)
    _rows(indices, bag, tables, num_bags)


class IndexOutOfRange(InvalidValueError, IndexError):  # noqa: N818 (as PyTorch's message)
    """An index outside its table; `table` counts those of the call, from 0, or is its name."""

    def __init__(self, table: int | str, index: int, rows: int) -> None:
        super().__init__(f"index {index} is outside of table {table}, which has {rows} rows")
        self.table, self.index, self.rows = table, index, rows


def _coefficients(
    counts: Tensor, bag: Tensor, num_bags: int, weights: Tensor | None, mode: str
) -> Tensor:
    """Return what each index's row is multiplied by in its bag's sum."""
    found = counts.to(torch.float32) if weights is None else weights * counts
    if mode == "mean":
        lengths = torch.zeros(num_bags, device=bag.device).index_add_(0, bag, counts.float())
        found = found / lengths.clamp_min(1)[bag]
    return found


def forward_reference(
    header: Int[Tensor, "rows words"],
    pool: Float[Tensor, "slots width"],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None = None,
    bag_size: int = 1,
    weights: Float[Tensor, " n"] | None = None,
    mode: str = "sum",
) -> Float[Tensor, "batch tables_times_dim"]:
    """Pool the rows of each bag; a chunk without storage counts as zeros, an empty bag is zeros.

    Args:
        header: See `header.py`.
        pool: The chunks.
        tables: See above.
        layout: How the header is read.
        num_chunks: K.
        indices: Rows within their tables.
        offsets: Where the bags begin, and the end; None if all have `bag_size` indices.
        bag_size: See `offsets`; 1 looks single rows up.
        weights: A factor for each index, only for sums.
        mode: "sum" or "mean"; padding does not count in a mean.

    Returns:
        Float32 (float64 for a pool of float64), table t in columns t * D to (t + 1) * D.

    Raises:
        IndexOutOfRange: For an index outside its table.
    """
    num_tables, width = tables.shape[0], pool.shape[1]
    bag, num_bags = _bags(indices.numel(), offsets, bag_size, indices.device)
    rows, counts = _rows(indices, bag, tables, num_bags)
    factor = _coefficients(counts, bag, num_bags, weights, mode)
    slots = layout.slots(layout.addresses(header, num_chunks)[rows], num_chunks)
    values = _compute(
        pool[slots.clamp_min(0)] if len(pool) else pool.new_zeros(*slots.shape, width)
    )
    values = torch.where((slots >= 0).unsqueeze(-1), values, 0).flatten(1)
    out = values.new_zeros(num_bags, num_chunks * width)
    out.index_add_(0, bag, values * factor.to(values.dtype).unsqueeze(1))
    by_table = out.view(num_tables, num_bags // num_tables, num_chunks * width)
    return by_table.transpose(0, 1).flatten(1)


def _compute(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def reduce_gradients(
    tables: Int[Tensor, "tables 3"],
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None,
    bag_size: int,
    weights: Float[Tensor, " n"] | None,
    grad: Float[Tensor, "batch tables_times_dim"],
    mode: str,
) -> RowGradients:
    """Sum the gradient of each distinct row over the batch; padding is left out."""
    num_tables = tables.shape[0]
    bag, num_bags = _bags(indices.numel(), offsets, bag_size, indices.device)
    rows, counts = _rows(indices, bag, tables, num_bags)
    factor = _coefficients(counts, bag, num_bags, weights, mode)
    by_bag = _compute(
        grad.view(len(grad), num_tables, grad.shape[1] // num_tables).transpose(0, 1).flatten(0, 1)
    )
    rows, bag, factor = rows[counts], bag[counts], factor[counts]
    distinct, place, repeats = torch.unique(rows, return_inverse=True, return_counts=True)
    sums = by_bag.new_zeros(len(distinct), by_bag.shape[1])
    sums.index_add_(0, place, by_bag[bag] * factor.to(by_bag.dtype).unsqueeze(1))
    return RowGradients(distinct, repeats, sums)


def apply_gradients(
    header: Int[Tensor, "rows words"],
    pool: Float[Tensor, "slots width"],
    states: list[Tensor],
    layout: HeaderLayout,
    num_chunks: int,
    gradients: RowGradients,
    update: Update,
) -> Touched:
    """Add to the utilities of distinct rows, and update the resident chunks, all in place.

    States: none for `sgd`, none here for `rowwise_adagrad` (it is in the header: the sum of the
    mean square of the row's gradient over all D dimensions, resident or not), [slots, C] for
    `adagrad`, and for `adam` two of these and float32 [slots], the steps of each chunk.

    A row whose gradient is not finite earns no utility; its weights get what PyTorch's optimizer
    would give them.
    """
    rows, counts, grads = gradients
    chunks = grads.view(len(rows), num_chunks, pool.shape[1])
    addresses = layout.addresses(header, num_chunks)[rows]
    slots = layout.slots(addresses, num_chunks)
    finite = grads.isfinite().all(1)
    stored = layout.utilities(header, num_chunks)
    utility = stored[rows]
    new = (slots < 0).all(1) & (utility == 0).all(1) & update.keep_new
    if update.utility != "none":
        norm = torch.linalg.vector_norm(chunks, dim=2).float()
        gain = counts.unsqueeze(1).float() if update.utility != "grad" else torch.ones_like(norm)
        gain = gain * norm if update.utility != "freq" else gain.expand_as(norm)
        number = rows.unsqueeze(1) * num_chunks + torch.arange(num_chunks, device=rows.device)
        if layout.utility_bytes == 1:
            value = (decode(utility, update.exponent) + gain * update.scale).clamp_max(LARGEST)
            value = encode(value, number, update.seed, update.exponent)
        else:
            value = (utility + gain * update.scale).clamp_max(LARGEST)
        stored[rows] = torch.where(finite.unsqueeze(1), value, utility)
    if update.optimizer != "none":
        _optimize(header, pool, states, layout, slots, rows, chunks, update)
    kept = RowGradients(rows[new], counts[new], grads[new])
    return Touched(kept, int((~finite).sum()))


def _optimize(
    header: Tensor,
    pool: Tensor,
    states: list[Tensor],
    layout: HeaderLayout,
    slots: Tensor,
    rows: Tensor,
    chunks: Tensor,
    update: Update,
) -> None:
    num_chunks = slots.shape[1]
    resident = slots >= 0
    at, g = slots[resident], chunks[resident]
    if update.optimizer == "sgd":
        step = update.lr * g
    elif update.optimizer == "rowwise_adagrad":
        state = layout.state(header, num_chunks)
        sums = state[rows] + chunks.square().mean((1, 2)).float()
        state[rows] = sums
        root = (sums.to(g.dtype).sqrt() + update.eps).unsqueeze(1).expand_as(resident)[resident]
        step = update.lr * g / root.unsqueeze(1)
    elif update.optimizer == "adagrad":
        states[0][at] += g.square().to(states[0].dtype)
        step = update.lr * g / (states[0][at].to(g.dtype).sqrt() + update.eps)
    else:
        first, second, steps = states
        steps[at] += 1
        first[at] = (update.beta1 * first[at] + (1 - update.beta1) * g).to(first.dtype)
        second[at] = (update.beta2 * second[at] + (1 - update.beta2) * g.square()).to(second.dtype)
        # Little is left after the subtraction: in float32 it would have four digits.
        count = steps[at].double().unsqueeze(1)
        m = first[at].to(g.dtype) / (1 - update.beta1**count).to(g.dtype)
        v = second[at].to(g.dtype) / (1 - update.beta2**count).to(g.dtype)
        step = update.lr * m / (v.sqrt() + update.eps)
    value = _compute(pool[at]) - step
    pool[at] = _rounded(value, at, update.seed) if pool.dtype == torch.bfloat16 else value


def _rounded(value: Tensor, at: Tensor, seed: int) -> Tensor:
    """Round float32 to bfloat16 up or down with the probability of the fraction."""
    width = value.shape[1]
    number = at.unsqueeze(1) * width + torch.arange(width, device=at.device)
    noise = uniform_bits(number, seed) >> 16
    bits = value.contiguous().view(torch.int32).long() + noise
    found = (bits >> 16 << 16).int().view(torch.float32)
    return torch.where(value.isfinite(), found, value).to(torch.bfloat16)


def backward_reference(
    header: Int[Tensor, "rows words"],
    pool: Float[Tensor, "slots width"],
    states: list[Tensor],
    tables: Int[Tensor, "tables 3"],
    layout: HeaderLayout,
    num_chunks: int,
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None,
    bag_size: int,
    weights: Float[Tensor, " n"] | None,
    grad: Float[Tensor, "batch tables_times_dim"],
    mode: str,
    update: Update,
) -> Touched:
    """`reduce_gradients`, then `apply_gradients`."""
    gradients = reduce_gradients(tables, indices, offsets, bag_size, weights, grad, mode)
    return apply_gradients(header, pool, states, layout, num_chunks, gradients, update)
