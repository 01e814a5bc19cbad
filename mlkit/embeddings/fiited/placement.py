"""Where the chunks of rows are: masks of resident chunks in, addresses and moved values out.

`Placement` serves both layouts. It moves whatever is indexed by slot, the weights and every state
of an optimizer alike, so that a chunk and its state never part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mlkit.embeddings.fiited.allocator import SlabAllocator, SlotStack
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
        # Of each mask: its bits, how many there are, and the place of each chunk among them.
        masks = torch.arange(1 << num_chunks, device=header.device).unsqueeze(1)
        bits = masks >> torch.arange(num_chunks, device=header.device) & 1
        self._bits, self._size, self._rank = bits.bool(), bits.sum(1), bits.cumsum(1) - 1
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
        self.num_resident = 0
        return SlabAllocator(
            self._units(), num_slots, page_slots, self._per_row, self._header.device
        )

    def _units(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (first slots, sizes) of the rows that have chunks, and count these."""
        addresses = self._layout.addresses(self._header, self._per_row)[:, 0]
        for block in addresses.split(_SCAN):
            base, masks = self._layout.unpack(block, self._per_row)
            size = self._size[masks]
            self.num_resident += int(size.sum())
            held = size > 0
            yield base[held], size[held]

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

    def masks(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Return which chunks of rows of the header are resident, as bits."""
        if not self._layout.slab:
            return masks_of(self.slots(rows) >= 0)
        addresses = self._layout.addresses(self._header, self._per_row)[:, 0]
        return self._layout.unpack(addresses.index_select(0, rows), self._per_row)[1]

    def set_masks(self, rows: Int[Tensor, " rows"], masks: Int[Tensor, " rows"]) -> None:
        """Make exactly these chunks of distinct rows resident.

        What stays keeps its values and state; what is new is zeros, state included. Rows that grow
        go last, so that no more chunks are ever held than before or after.
        """
        before, after = self._size[self.masks(rows)], self._size[masks]
        grows = after > before
        for part in (~grows, grows):
            for block in part.nonzero().squeeze(1).split(_BLOCK):
                if self._layout.slab:
                    self._move_slab(rows[block], masks[block])
                else:
                    self._set_chunks(rows[block], self._bits.index_select(0, masks[block]))
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
            column.index_fill_(0, new, 0)
        addresses = self._layout.addresses(self._header, self._per_row)
        addresses[rows] = slots.to(addresses.dtype)

    def _move_slab(self, rows: Tensor, masks: Tensor) -> None:
        # index_select and its like are several times faster here than indexing by tensors.
        allocator = self._allocator
        assert isinstance(allocator, SlabAllocator)
        addresses = self._layout.addresses(self._header, self._per_row)[:, 0]
        old_base, old = self._layout.unpack(addresses.index_select(0, rows), self._per_row)
        stays = self._bits.index_select(0, old & masks)
        source = (old_base.unsqueeze(1) + self._rank.index_select(0, old)).masked_select(stays)
        values = [column.index_select(0, source) for column in self._columns()]
        old_size, size = self._size[old], self._size[masks]
        for c in range(1, self._per_row + 1):
            allocator.release(c, old_base[old_size == c])
        # No header names these rows while there may be a compaction, which must not move what is
        # in `values`.
        addresses.index_fill_(0, rows, 0)
        places = [(size == c).nonzero().squeeze(1) for c in range(self._per_row + 1)]
        if not allocator.has_room([len(place) for place in places]):
            self.compact()
        base = torch.zeros_like(rows)
        for c in range(1, self._per_row + 1):
            base[places[c]] = allocator.allocate(c, len(places[c]))
        packed = self._layout.pack(base, masks, self._per_row).squeeze(1)
        addresses.index_copy_(0, rows, packed)
        slots = base.unsqueeze(1) + self._rank.index_select(0, masks)
        target = slots.masked_select(stays)
        fresh = slots.masked_select(self._bits.index_select(0, masks & ~old))
        for column, value in zip(self._columns(), values, strict=True):
            column.index_copy_(0, target, value)
            column.index_fill_(0, fresh, 0)

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
