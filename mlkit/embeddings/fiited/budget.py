"""From a budget in bytes to a number of chunks, and back, without torch.

bytes = rows * header + slots * (chunk + state) + allocator. The header and the allocator are the
price of moving: at D = 16 with four chunks they are a third of the dense table, at D = 64 a tenth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlkit.embeddings.fiited.config import FIITEDConfig
from mlkit.embeddings.memory import OPTIMIZER_STATE, dense_bytes, parse_budget
from mlkit.errors import InvalidValueError

__all__ = ["Plan", "plan"]

_ADAM_STEP = 4  # bytes of each chunk's count of steps


@dataclass(frozen=True)
class Plan:
    """How the storage of some tables of one dimension is laid out.

    Args:
        num_rows: Virtual rows of all tables.
        row_words: 32-bit words of a row's header.
        num_chunks: Chunks that may be resident at once, over all tables.
        num_slots: Physical chunks; some more than `num_chunks` in layout "slab", whose size classes
            leave gaps.
        page_slots: Slots of a page of layout "slab"; every size class fits into it exactly.
        chunk_bytes: Of a chunk's weights.
        state_bytes: Of a chunk's optimizer state.
        row_state_bytes: Of a row's optimizer state.
        other_bytes: Per row, outside of the header: keys of an exact id map.
        dense_bytes: Of the dense tables with the same optimizer.
        dense_weight_bytes: Of their weights.
    """

    num_rows: int
    row_words: int
    num_chunks: int
    num_slots: int
    page_slots: int
    chunk_bytes: int
    state_bytes: int
    row_state_bytes: int
    other_bytes: int
    dense_bytes: int
    dense_weight_bytes: int

    @property
    def most_free_units(self) -> int:
        """Free units of layout "slab" past which a round compacts the pool."""
        return self.num_slots // 64 + 7 * self.page_slots

    @property
    def allocator_bytes(self) -> int:
        """Free lists and page table, at their largest between two rounds.

        New rows take whole pages: of the class of full rows, and of one more class for the last of
        them that gets storage. So there are at most two pages' units more than after a round.
        """
        most = self.most_free_units + 2 * self.page_slots
        return _allocator_bytes(self.num_slots, self.page_slots, most)

    @property
    def total_bytes(self) -> int:
        """Everything."""
        header = self.num_rows * (4 * self.row_words + self.other_bytes)
        return (
            header + self.num_slots * (self.chunk_bytes + self.state_bytes) + self.allocator_bytes
        )


def _allocator_bytes(num_slots: int, page_slots: int, most_free_units: int) -> int:
    if not page_slots:
        return 4 * num_slots  # a stack of free slots
    return 5 * (num_slots // page_slots) + 4 * most_free_units  # class and free stack of pages


def _page_slots(num_chunks_per_row: int, total: int) -> int:
    """Slots of a page: the least multiple that every class fits, some hundred pages or more."""
    least = math.lcm(*range(1, num_chunks_per_row + 1))
    page = least
    while page < 1024 and total // (2 * page) >= 128 * (num_chunks_per_row + 1):
        page *= 2
    return page


def _slots(chunks: int, per_row: int, page: int) -> int:
    """Slots that hold `chunks` chunks in layout "slab" whatever the sizes of the rows."""
    return (-(-chunks // page) + per_row) * page if page else chunks


def plan(
    config: FIITEDConfig,
    num_rows: int,
    dim: int,
    *,
    element_size: int = 4,
    padding_rows: int = 0,
    num_tables: int = 1,
    chunks: int | None = None,
) -> Plan:
    """Lay out the storage of tables of one dimension.

    Args:
        config: Its budget or density holds for these tables together.
        num_rows: Virtual rows of all of them.
        dim: D.
        element_size: Bytes of a weight.
        padding_rows: Rows that never get storage.
        num_tables: Of them; each must have room for a chunk.
        chunks: Resident chunks, instead of the config's budget or density.

    Raises:
        InvalidValueError: If the budget does not hold the headers and a chunk of each table, or K
            does not divide D.
    """
    per_row = config.num_chunks
    if dim % per_row:
        divisors = [k for k in range(1, 9) if dim % k == 0]
        raise InvalidValueError(
            f"num_chunks must divide the embedding dimension {dim}, got {per_row}; "
            f"these do: {', '.join(map(str, divisors))}"
        )
    optimizer = config.optimizer or config.unfused_optimizer
    per_state_row, words = OPTIMIZER_STATE[optimizer]
    width = dim // per_row
    fused_row_state = config.optimizer == "rowwise_adagrad"
    state = 4 * words * width
    if config.optimizer == "adam":
        state += _ADAM_STEP
    if per_state_row and not fused_row_state:
        state += per_state_row  # a torch optimizer's row is a slot of the pool
    utility_words = per_row if config.utility_dtype == "float32" else -(-per_row // 4)
    most = (num_rows - padding_rows) * per_row
    slab = config.layout == "slab"
    other = 8 if config.id_map == "exact" else 0

    def lay_out(chunks: int) -> Plan:
        page = _page_slots(per_row, chunks) if slab else 0
        slots = _slots(chunks, per_row, page)
        limit = 1 << (32 - per_row) if slab else 1 << 31
        address = (1 if slab else per_row) * (2 if slots > limit else 1)
        return Plan(
            num_rows=num_rows,
            row_words=address + int(fused_row_state) + utility_words,
            num_chunks=chunks,
            num_slots=slots,
            page_slots=page,
            chunk_bytes=width * element_size,
            state_bytes=state,
            row_state_bytes=4 * int(fused_row_state),
            other_bytes=other,
            dense_bytes=dense_bytes(num_rows, dim, optimizer, element_size),
            dense_weight_bytes=num_rows * dim * element_size,
        )

    if chunks is not None:
        return lay_out(min(chunks, most))
    target, fewest = config.target_density, max(min(num_tables, most), 1)
    if target is not None:
        chunks = min(math.floor(target * num_rows * per_row + 1e-9), most)
        if chunks < fewest:
            raise InvalidValueError(
                f"target_density {target} leaves {chunks} of {num_rows * per_row} chunks to "
                f"{num_tables} tables; the least is {num_tables / (num_rows * per_row):.3g}, "
                "a chunk of each"
            )
        return lay_out(chunks)
    assert config.memory_budget is not None
    whole = lay_out(most)
    budget = parse_budget(config.memory_budget, whole.dense_bytes)
    least = lay_out(fewest)
    if least.total_bytes > budget:
        raise InvalidValueError(
            f"memory_budget {config.memory_budget!r} is {budget} bytes, but the headers of "
            f"{num_rows} rows and a chunk of each table take {least.total_bytes} bytes "
            f"({least.total_bytes / whole.dense_bytes:.1%} of the dense tables): give at least "
            "that, fewer chunks (num_chunks), one-byte utilities (utility_dtype='uint8'), or "
            "min_rows"
        )
    if whole.total_bytes <= budget:
        return whole
    low, high = fewest, most  # low fits
    while high - low > 1:
        middle = (low + high) // 2
        if lay_out(middle).total_bytes <= budget:
            low = middle
        else:
            high = middle
    return lay_out(low)
