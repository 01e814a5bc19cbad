# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
"""Dynamic embeddings on GPUs: the functions of `reference.py` in Triton.

    forward    programs over tiles of bags; a chunk without storage, or padding, reads no pool
    locate     row, bag and factor of each index, programs over tiles of bags
    sort       indices by row, stable, in PyTorch (32-bit keys where rows fit), and where rows begin
    rows       programs over tiles of distinct rows: gradient sum, norms, utility, update, at once
               (`backward`), or the sum alone (`reduce`), or the rest of it (`apply`)

All sums are float32 and their order depends on shapes and indices alone: the same call gives the
same bits. Bytes read in `forward` are those of each index' header row and resident chunks;
`backward` reads a header row, its resident chunks and their state once for each distinct row, and
the gradient once for each index.

Waits for the host, so that no call here can be part of a CUDA graph: `forward` one, for the
smallest position of an index outside its table (nothing is read for such an index); `reduce` and
`backward` one for it and the number of distinct rows, before anything is written; `apply` and
`backward` one for the number of rows with a gradient that is not finite, and with `keep_new` one
for the new rows.

Not measured on a GPU yet; sizes of tiles not tuned. A row that is read very often is summed by one
program, `READS` reads at a time. Pools are float32 or bfloat16, states float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from mlkit.errors import InvalidTypeError
from mlkit_kernels.dynamic_embedding.header import HeaderLayout
from mlkit_kernels.dynamic_embedding.reference import (
    OPTIMIZERS,
    UTILITIES,
    RowGradients,
    Touched,
    Update,
)
from mlkit_kernels.dynamic_embedding.triton_header import levels, seed_bits, slots_of
from mlkit_kernels.dynamic_embedding.triton_reads import (
    READS,
    Reads,
    bag_bounds,
    check_range,
    count_bags,
    reads_at_once,
    rows_of,
    sort_reads,
    table_of,
)
from mlkit_kernels.dynamic_embedding.triton_selection import candidates_triton, histogram_triton
from mlkit_kernels.dynamic_embedding.triton_update import reduce_kernel, update_kernel

__all__ = [
    "apply_triton",
    "backward_triton",
    "candidates_triton",
    "forward_triton",
    "histogram_triton",
    "reduce_triton",
]

_TILE = 2048
"""Numbers that a program holds at once, unless one row has more."""
_POOL_TYPES = (torch.float32, torch.bfloat16)


@triton.jit(do_not_specialize=["bags", "batch"])
def _forward_kernel(
    header,
    pool,
    tables,
    indices,
    offsets,
    weights,
    out,
    first_wrong,
    bags,
    batch,
    bag_size,
    row_words,
    out_stride,
    OFFSETS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    MEAN: tl.constexpr,
    SLAB: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    q = tl.arange(0, BLOCK_B * BLOCK_P)
    k = tl.arange(0, BLOCK_K)[None, :]
    c = tl.arange(0, BLOCK_C)[None, None, :]
    bag = tl.program_id(0) * BLOCK_B + q // BLOCK_P
    start, end = bag_bounds(offsets, bag, bags, bag_size, OFFSETS)
    first, size, padding = table_of(tables, bag // batch, bag < bags)
    total = tl.zeros([BLOCK_B, BLOCK_K * BLOCK_C], tl.float32)
    length = tl.zeros([BLOCK_B], tl.int32)
    for done in range(0, tl.max(end - start, 0).to(tl.int32), BLOCK_P):
        at = start + done + q % BLOCK_P
        row, counts = rows_of(indices, first, size, padding, first_wrong, at, at < end)
        words = header + (row * row_words)[:, None]
        slots = slots_of(words, counts[:, None], k, SLAB, WIDE, CHUNKS)[:, :, None]
        value = tl.load(pool + slots * WIDTH + c, mask=(slots >= 0) & (c < WIDTH), other=0.0)
        value = value.to(tl.float32)
        if WEIGHTS:
            weight = tl.load(weights + at, mask=counts, other=0.0).to(tl.float32)
            value *= weight[:, None, None]
        total += tl.sum(value.reshape([BLOCK_B, BLOCK_P, BLOCK_K * BLOCK_C]), 1)
        if MEAN:
            length += tl.sum(counts.to(tl.int32).reshape([BLOCK_B, BLOCK_P]), 1)
    if MEAN:
        total = total / tl.maximum(length, 1).to(tl.float32)[:, None]
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    d = tl.arange(0, BLOCK_K * BLOCK_C)[None, :]
    line = (b % batch).to(tl.int64) * out_stride + (b // batch) * (CHUNKS * WIDTH)
    inside = (b < bags) & (d // BLOCK_C < CHUNKS) & (d % BLOCK_C < WIDTH)
    tl.store(out + line + (d // BLOCK_C) * WIDTH + d % BLOCK_C, total, mask=inside)


def _blocks(num_chunks: int, width: int, reads: int) -> dict[str, int]:
    """Sizes of a tile of groups, each of `reads` rows at a time."""
    block_k, block_c = triton.next_power_of_2(num_chunks), triton.next_power_of_2(width)
    groups = max(_TILE // (block_k * block_c * reads), 1)
    return {"groups": groups, "BLOCK_P": reads, "BLOCK_K": block_k, "BLOCK_C": block_c}


def _check(**tensors: Tensor) -> None:
    """Refuse what the kernels would read wrongly."""
    for name, tensor in tensors.items():
        allowed = _POOL_TYPES if name == "pool" else (torch.float32,)
        if tensor.dtype not in allowed:
            raise InvalidTypeError(
                f"backend='triton' takes {name} of {' or '.join(map(str, allowed))}, "
                f"got {tensor.dtype}; the reference takes any"
            )


def forward_triton(
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
    """Pool the rows of each bag as `forward_reference` does.

    Args:
        header: int32, rows of any stride.
        pool: Float32 or bfloat16, contiguous.
        tables: int64, on the CPU.
        layout: How the header is read.
        num_chunks: K.
        indices: Rows within their tables.
        offsets: Where the bags begin, and the end; None if all have `bag_size` indices.
        bag_size: See `offsets`.
        weights: A factor for each index.
        mode: "sum" or "mean".

    Returns:
        Float32.

    Raises:
        IndexOutOfRange: For an index outside its table; one wait for the host.
        InvalidTypeError: For a pool of another type.
    """
    _check(pool=pool)
    device, num, width = indices.device, indices.numel(), pool.shape[1]
    bags = count_bags(indices, offsets, bag_size)
    batch, dim = max(bags // len(tables), 1), num_chunks * width
    out = torch.zeros(
        bags // len(tables), len(tables) * dim, dtype=torch.float32, device=header.device
    )
    if num == 0:
        return out
    blocks = _blocks(num_chunks, width, reads_at_once(num, bags))
    groups = blocks.pop("groups")
    first_wrong = torch.full((1,), num, dtype=torch.int64, device=device)
    _forward_kernel[(triton.cdiv(bags, groups),)](
        header,
        pool,
        tables.to(device),
        indices.contiguous(),
        offsets,
        None if weights is None else weights.contiguous(),
        out,
        first_wrong,
        bags,
        batch,
        bag_size,
        header.stride(0),
        out.stride(0),
        OFFSETS=offsets is not None,
        WEIGHTS=weights is not None,
        MEAN=mode == "mean",
        SLAB=bool(layout.slab),
        WIDE=bool(layout.wide),
        CHUNKS=num_chunks,
        WIDTH=width,
        BLOCK_B=groups,
        **blocks,
    )
    check_range(int(first_wrong), tables, indices, offsets, bag_size, batch)
    return out


def reduce_triton(
    tables: Int[Tensor, "tables 3"],
    indices: Int[Tensor, " n"],
    offsets: Int[Tensor, " bags_plus_1"] | None,
    bag_size: int,
    weights: Float[Tensor, " n"] | None,
    grad: Float[Tensor, "batch tables_times_dim"],
    mode: str,
) -> RowGradients:
    """Sum the gradient of each distinct row as `reduce_gradients` does, float32."""
    reads = sort_reads(tables, indices, offsets, bag_size, weights, mode)
    dim = grad.shape[1] // len(tables)
    num = len(reads.rows)
    sums = torch.empty(num, dim, dtype=torch.float32, device=grad.device)
    if num:
        blocks = _blocks(1, dim, READS)
        groups = blocks.pop("groups")
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        reduce_kernel[(triton.cdiv(num, groups),)](
            reads.starts,
            reads.order,
            reads.bags,
            reads.factors,
            grad,
            sums,
            num,
            reads.batch,
            grad.stride(0),
            FACTORS=reads.factors is not None,
            CHUNKS=1,
            WIDTH=dim,
            BLOCK_R=groups,
            **blocks,
        )
    return RowGradients(reads.rows, reads.starts.diff(), sums)


def _update(
    header: Tensor,
    pool: Tensor,
    states: list[Tensor],
    layout: HeaderLayout,
    num_chunks: int,
    rows: Tensor,
    counts: Tensor,
    grad: Tensor,
    reads: Reads | None,
    update: Update,
) -> Touched:
    """Launch `update_kernel`; `grad` is that of the output if there are `reads`."""
    _check(pool=pool, **{f"states[{i}]": state for i, state in enumerate(states)})
    num, width, device = len(rows), pool.shape[1], header.device
    dim = num_chunks * width
    gathers = reads is not None
    new = torch.zeros(num if update.keep_new else 0, dtype=torch.bool, device=device)
    nonfinite = torch.zeros(1, dtype=torch.int32, device=device)
    sums = grad
    if gathers:
        sums = torch.empty(len(new), dim, dtype=torch.float32, device=device)
    if num == 0:
        return Touched(RowGradients(rows, counts, sums[:0]), 0)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    first, second, steps = (*states, None, None, None)[:3]
    blocks = _blocks(num_chunks, width, READS if gathers else 1)
    groups = blocks.pop("groups")
    state = layout.address_words(num_chunks)
    update_kernel[(triton.cdiv(num, groups),)](
        header,
        header.view(torch.uint8),
        levels(update.exponent, device),
        pool,
        first,
        second,
        steps,
        rows,
        counts,
        *((reads.starts, reads.order, reads.bags, reads.factors) if reads else (None,) * 4),
        grad if gathers else grad.contiguous(),
        new.view(torch.uint8),
        sums,
        nonfinite,
        num,
        reads.batch if reads else 1,
        grad.stride(0),
        header.stride(0),
        seed_bits(update.seed),
        float(update.lr),
        float(update.eps),
        float(update.beta1),
        float(update.beta2),
        1.0 - update.beta1,
        1.0 - update.beta2,
        float(update.scale),
        2.0**update.exponent,
        GATHER=gathers,
        FACTORS=reads is not None and reads.factors is not None,
        KEEP_NEW=update.keep_new,
        KIND=UTILITIES.index(update.utility),
        OPTIMIZER=OPTIMIZERS.index(update.optimizer),
        SLAB=bool(layout.slab),
        WIDE=bool(layout.wide),
        STATE=state,
        UTILITY=state + layout.row_state,
        BYTES=layout.utility_bytes,
        CHUNKS=num_chunks,
        WIDTH=width,
        BLOCK_R=groups,
        **blocks,
    )
    if update.keep_new:
        kept = new.nonzero().squeeze(1)
        found = RowGradients(rows[kept], counts[kept], sums[kept])
    else:
        found = RowGradients(rows[:0], counts[:0], sums[:0])
    return Touched(found, int(nonfinite))


def apply_triton(
    header: Int[Tensor, "rows words"],
    pool: Float[Tensor, "slots width"],
    states: list[Tensor],
    layout: HeaderLayout,
    num_chunks: int,
    gradients: RowGradients,
    update: Update,
) -> Touched:
    """Update header and pool in place as `apply_gradients` does.

    The rounding of a sum may differ from the reference's, and with it, rarely, which way a random
    rounding goes.
    """
    rows, counts, grads = gradients
    return _update(header, pool, states, layout, num_chunks, rows, counts, grads, None, update)


def backward_triton(
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
    """`reduce_triton` and `apply_triton` at once; no gradient of a row is stored but those kept."""
    reads = sort_reads(tables, indices, offsets, bag_size, weights, mode)
    counts = reads.starts.diff() if update.keep_new else reads.rows
    return _update(
        header, pool, states, layout, num_chunks, reads.rows, counts, grad, reads, update
    )
