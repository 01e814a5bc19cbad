"""Where the chunks of rows are: masks of resident chunks in, addresses and moved values out.

`Placement` serves both layouts. It moves whatever is indexed by slot, the weights and every state of
an optimizer alike, so that a chunk and its state never part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mlkit.embeddings.fiited.allocator import OutOfPagesError, SlabAllocator, SlotStack
from mlkit_kernels.dynamic_embedding import HeaderLayout

__all__ = ["Placement", "masks_of"]

_BLOCK = 1 << 15  # rows whose chunks are moved at a time
_SCAN = 1 << 18  # rows that are read at a time


def masks_of(resident: Bool[Tensor, "rows chunks"]) -> Int[Tensor, " rows"]:
    """Pack booleans into masks: bit k for chunk k, int64."""
    return (resident.long() << torch.arange(resident.shape[1], device=resident.device)).sum(1)


class Placement:
    """Gives chunks storage and takes it away.

    Args:
        header: The store's header; changed in place.
        layout: How it is read.
        num_chunks: K.
        num_slots: Of the pool.
        page_slots: Of a page of layout "slab".
        columns: Returns what is indexed by slot: weights and states of optimizers.
        free: Of a `free()` of the same header, so that the same slots are used next; None frees the
            lowest slots first.
    """

    def __init__(
        self,
        header: Tensor,
        layout: HeaderLayout,
        num_chunks: int,
        num_slots: int,
        page_slots: int,
        columns: Callable[[], Sequence[Tensor]],
        free: Int[Tensor, " numbers"] | None = None,
    ) -> None:
        self._header, self._layout, self._per_row = header, layout, num_chunks
        self._columns = columns
        self._allocator = self._read(num_slots, page_slots)
        if free is not None:
            self._allocator.load_free(free)

    def _read(self, num_slots: int, page_slots: int) -> SlotStack | SlabAllocator:
        """Make the free lists from what the header says."""
        if not self._layout.slab:
            used = torch.zeros(num_slots, dtype=torch.bool, device=self._header.device)
            self.num_resident = 0
            for _, slots in self._blocks():
                found = slots[slots >= 0]
                used[found] = True
                self.num_resident += len(found)
            return SlotStack(used)
        bases, sizes = [], []
        for _, slots in self._blocks():
            resident = slots >= 0
            size = resident.sum(1)
            rows = size > 0
            bases.append(slots.amax(1)[rows] - size[rows] + 1)
            sizes.append(size[rows])
        size = torch.cat(sizes)
        self.num_resident = int(size.sum())
        return SlabAllocator(torch.cat(bases), size, num_slots, page_slots, self._per_row)

    def _blocks(self) -> Iterator[tuple[int, Int[Tensor, "rows chunks"]]]:
        """Yield (first row, slots) of blocks of the header."""
        addresses = self._layout.addresses(self._header, self._per_row)
        for start in range(0, len(addresses), _SCAN):
            block = addresses[start : start + _SCAN]
            yield start, self._layout.slots(block, self._per_row)

    def free(self) -> Int[Tensor, " numbers"]:
        """Return the free lists, in their order."""
        return self._allocator.free()

    @property
    def nbytes(self) -> int:
        """Bytes of the free lists and the page table."""
        return self._allocator.nbytes

    def slots(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, "rows chunks"]:
        """Return the slots of rows of the header; -1 where a chunk has none."""
        addresses = self._layout.addresses(self._header, self._per_row)[rows]
        return self._layout.slots(addresses, self._per_row)

    def set_masks(self, rows: Int[Tensor, " rows"], masks: Int[Tensor, " rows"]) -> None:
        """Make exactly these chunks of distinct rows resident.

        What stays keeps its values and state; what is new is zeros, state included. Rows that
        shrink go first, so that no more chunks are ever held than before or after.
        """
        bits = torch.arange(self._per_row, device=rows.device)
        wanted = (masks.unsqueeze(1) >> bits & 1).bool()
        before = (self.slots(rows) >= 0).sum(1)
        after = wanted.sum(1)
        order = torch.sort(after - before, stable=True).indices
        for block in order.split(_BLOCK):
            if self._layout.slab:
                self._move_slab(rows[block], wanted[block], after[block])
            else:
                self._set_chunks(rows[block], wanted[block])
        self.num_resident += int((after - before).sum())

    def _set_chunks(self, rows: Tensor, wanted: Tensor) -> None:
        assert isinstance(self._allocator, SlotStack)
        slots = self.slots(rows)
        self._allocator.release(slots[(slots >= 0) & ~wanted])
        fresh = wanted & (slots < 0)
        slots[~wanted] = -1
        new = self._allocator.allocate(int(fresh.sum()))
        slots[fresh] = new
        for column in self._columns():
            column[new] = 0
        addresses = self._layout.addresses(self._header, self._per_row)
        addresses[rows] = slots.to(addresses.dtype)

    def _move_slab(self, rows: Tensor, wanted: Tensor, size: Tensor) -> None:
        assert isinstance(self._allocator, SlabAllocator)
        slots = self.slots(rows)
        kept = wanted & (slots >= 0)
        source = slots[kept]
        values = [column[source] for column in self._columns()]
        old_size = (slots >= 0).sum(1)
        old_base = slots.amax(1) - old_size + 1
        for c in range(1, self._per_row + 1):
            self._allocator.release(c, old_base[old_size == c])
        # Until the new addresses are written, no header names these rows: a compaction on the way
        # must not move what is in `values`.
        addresses = self._layout.addresses(self._header, self._per_row)
        addresses[rows] = 0
        for c in range(1, self._per_row + 1):
            of_class = size == c
            count = int(of_class.sum())
            if count:
                at, place = self._allocate(c, count), of_class.nonzero().squeeze(1)
                addresses[rows[place]] = self._layout.pack(
                    at, masks_of(wanted[place]), self._per_row
                )
                self._fill(place, wanted, kept, self.slots(rows[place]), values)

    def _fill(
        self, place: Tensor, wanted: Tensor, kept: Tensor, slots: Tensor, values: list[Tensor]
    ) -> None:
        """Write the kept values of some rows of a block to their new slots, zeros to the others."""
        number = (kept.flatten().long().cumsum(0) - 1).view_as(kept)[place]
        stays, fresh = kept[place], wanted[place] & ~kept[place]
        for column, value in zip(self._columns(), values, strict=True):
            column[slots[stays]] = value[number[stays]]
            column[slots[fresh]] = 0

    def _allocate(self, size: int, count: int) -> Tensor:
        assert isinstance(self._allocator, SlabAllocator)
        try:
            return self._allocator.allocate(size, count)
        except OutOfPagesError:
            self.compact()
            return self._allocator.allocate(size, count)

    def compact(self) -> None:
        """Fill the holes of layout "slab": units of sparse pages move into fuller ones.

        Afterwards no class has a page's worth of free units. The rows to move are found by reading
        the headers once.
        """
        allocator = self._allocator
        if not isinstance(allocator, SlabAllocator):
            return
        page_slots, num_pages = allocator.page_slots, len(allocator.page_class)
        leave = torch.zeros(num_pages, dtype=torch.bool, device=self._header.device)
        for c in range(1, self._per_row + 1):
            per_page = page_slots // c
            pages = (allocator.page_class == c).nonzero().squeeze(1)
            free = torch.bincount(allocator.free_units(c) // page_slots, minlength=num_pages)[pages]
            used = per_page * len(pages) - int(free.sum())
            order = torch.sort(free, stable=True).indices
            leave[pages[order[-(-used // per_page) :]]] = True
        if not bool(leave.any()):
            return
        targets = self._holes(leave)
        addresses = self._layout.addresses(self._header, self._per_row)
        for start, slots in self._blocks():
            size = (slots >= 0).sum(1)
            base = slots.amax(1) - size + 1
            moving = ((size > 0) & leave[base.clamp_min(0) // page_slots]).nonzero().squeeze(1)
            for c in range(1, self._per_row + 1):
                rows = moving[size[moving] == c]
                if len(rows):
                    new, targets[c] = targets[c][: len(rows)], targets[c][len(rows) :]
                    self._copy(base[rows], new, c)
                    mask = masks_of(slots[rows] >= 0)
                    addresses[rows + start] = self._layout.pack(new, mask, self._per_row)
        allocator.refill(leave, targets)

    def _holes(self, leave: Tensor) -> list[Tensor]:
        """Free units of each class outside of the pages that are left."""
        assert isinstance(self._allocator, SlabAllocator)
        units = [self._allocator.free_units(c) for c in range(1, self._per_row + 1)]
        page = self._allocator.page_slots
        return [units[0][:0], *(u[~leave[u // page]].sort().values for u in units)]

    def _copy(self, old: Tensor, new: Tensor, size: int) -> None:
        step = torch.arange(size, device=old.device)
        source, target = (old.unsqueeze(1) + step).flatten(), (new.unsqueeze(1) + step).flatten()
        for column in self._columns():
            for part, to in zip(source.split(_BLOCK), target.split(_BLOCK), strict=True):
                column[to] = column[part]

    def tidy(self, most_free_units: int) -> None:
        """Give empty pages back, and compact if more units than these are free."""
        if isinstance(self._allocator, SlabAllocator):
            self._allocator.collect()
            if self._allocator.num_free_units > most_free_units:
                self.compact()

    def repack(self, make: Callable[[Tensor, Tensor], None], page_slots: int) -> None:
        """Give all chunks slots in the order of their rows, for a pool of another size.

        Args:
            make: Takes the old slots and the new ones of a block of chunks and copies them.
            page_slots: Of a page of the new pool, in layout "slab".
        """
        cursor = 0
        addresses = self._layout.addresses(self._header, self._per_row)
        if not self._layout.slab:
            for start, slots in self._blocks():
                resident = slots >= 0
                count = int(resident.sum())
                new = torch.arange(cursor, cursor + count, device=slots.device)
                make(slots[resident], new)
                slots[resident] = new
                addresses[start : start + len(slots)] = slots.to(addresses.dtype)
                cursor += count
            return
        for c in range(1, self._per_row + 1):
            cursor = -(-cursor // page_slots) * page_slots
            for start, slots in self._blocks():
                rows = ((slots >= 0).sum(1) == c).nonzero().squeeze(1)
                # Rows of classes before this one have their new addresses already.
                if not len(rows):
                    continue
                chosen = slots[rows]
                mask = masks_of(chosen >= 0)
                base = torch.arange(cursor, cursor + c * len(rows), c, device=slots.device)
                step = torch.arange(c, device=slots.device)
                make(chosen[chosen >= 0], (base.unsqueeze(1) + step).flatten())
                addresses[rows + start] = self._layout.pack(base, mask, self._per_row)
                cursor += c * len(rows)
