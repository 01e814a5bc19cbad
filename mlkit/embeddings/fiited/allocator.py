"""The chunk address manager: which slots of the pool are free.

Nothing here remembers who owns a slot: the headers say so, and the few who must know (a compaction,
a load) read them. Everything is a function of the calls alone, so that equal calls on several ranks
give equal addresses.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from mlkit.errors import RunError

__all__ = ["OutOfPagesError", "SlabAllocator", "SlotStack"]


class OutOfPagesError(RunError):
    """No page is free for a size class: `SlabAllocator` must be compacted."""


class SlotStack:
    """Free slots of layout "chunk": a stack of int32, the last one freed is the first one used.

    Args:
        used: bool [slots]; True for the slots that are taken.
    """

    def __init__(self, used: Tensor) -> None:
        free = (~used).nonzero().squeeze(1).flip(0)
        dtype = torch.int32 if len(used) <= 1 << 31 else torch.int64
        self._stack = torch.empty(len(used), dtype=dtype, device=used.device)
        self._stack[: len(free)] = free.to(dtype)
        self.num_free = len(free)

    def allocate(self, count: int) -> Int[Tensor, " count"]:
        """Pop `count` slots, int64."""
        if count > self.num_free:
            raise RunError(f"{count} chunks are asked for and {self.num_free} are free")
        self.num_free -= count
        return self._stack[self.num_free : self.num_free + count].flip(0).long()

    def release(self, slots: Int[Tensor, " count"]) -> None:
        """Push slots."""
        self._stack[self.num_free : self.num_free + len(slots)] = slots.to(self._stack.dtype)
        self.num_free += len(slots)

    def free(self) -> Int[Tensor, " numbers"]:
        """Return the free slots, the next one last."""
        return self._stack[: self.num_free].long()

    def load_free(self, numbers: Int[Tensor, " numbers"]) -> None:
        """Take the order of a `free()` of the same slots."""
        if len(numbers) == self.num_free:
            self._stack[: self.num_free] = numbers.to(self._stack)

    @property
    def nbytes(self) -> int:
        """Bytes of the stack."""
        return self._stack.nbytes


class SlabAllocator:
    """Pages of equal units for layout "slab": a unit of class c holds the c chunks of a row.

    A page belongs to one class; one whose units are all free goes back to the free pages when
    `collect` is called. Units are named by their first slot.

    Args:
        used: int64 [rows]: first slots of the units in use.
        sizes: int64 [rows]: their classes, 1..K.
        num_slots: Slots of the pool, a multiple of `page_slots`.
        page_slots: Slots of a page, a multiple of every class.
        num_classes: K.
    """

    def __init__(
        self, used: Tensor, sizes: Tensor, num_slots: int, page_slots: int, num_classes: int
    ) -> None:
        self.page_slots = page_slots
        self._device = used.device
        num_pages = num_slots // page_slots
        self.page_class = torch.zeros(num_pages, dtype=torch.uint8, device=used.device)
        self.page_class[used // page_slots] = sizes.to(torch.uint8)
        free = (self.page_class == 0).nonzero().squeeze(1).flip(0)
        self._pages = torch.empty(num_pages, dtype=torch.int32, device=used.device)
        self._pages[: len(free)] = free.int()
        self.num_free_pages = len(free)
        self._units: list[Tensor] = [self._none() for _ in range(num_classes + 1)]
        for size in range(1, num_classes + 1):
            pages = (self.page_class == size).nonzero().squeeze(1)
            units = self._units_of(pages, size)
            taken = torch.zeros(num_slots, dtype=torch.bool, device=used.device)
            taken[used[sizes == size]] = True
            self._units[size] = units[~taken[units]].flip(0).int()

    def _none(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int32, device=self._device)

    def _units_of(self, pages: Tensor, size: int) -> Tensor:
        step = torch.arange(0, self.page_slots, size, device=self._device)
        return (pages.long().unsqueeze(1) * self.page_slots + step).flatten()

    def allocate(self, size: int, count: int) -> Int[Tensor, " count"]:
        """Take `count` units of a class; their first slots, int64.

        Raises:
            OutOfPagesError: If there are not enough; nothing was taken.
        """
        units = self._units[size]
        missing = count - len(units)
        if missing > 0:
            pages = -(-missing * size // self.page_slots)
            if pages > self.num_free_pages:
                raise OutOfPagesError(
                    f"{pages} pages are needed and {self.num_free_pages} are free"
                )
            self.num_free_pages -= pages
            chosen = self._pages[self.num_free_pages : self.num_free_pages + pages]
            self.page_class[chosen.long()] = size
            fresh = self._units_of(chosen.flip(0), size).flip(0).int()
            units = torch.cat([fresh, units])
        keep = len(units) - count
        self._units[size] = units[:keep].clone()
        return units[keep:].flip(0).long()

    def release(self, size: int, units: Int[Tensor, " count"]) -> None:
        """Give units of a class back."""
        self._units[size] = torch.cat([self._units[size], units.int()])

    def free_units(self, size: int) -> Int[Tensor, " units"]:
        """Return the free units of a class."""
        return self._units[size].long()

    def collect(self) -> None:
        """Give pages without any used unit back to all classes."""
        for size in range(1, len(self._units)):
            units = self._units[size].long()
            page = units // self.page_slots
            count = torch.bincount(page, minlength=len(self.page_class))
            empty = (count == self.page_slots // size) & (self.page_class == size)
            if not bool(empty.any()):
                continue
            pages = empty.nonzero().squeeze(1)
            self._units[size] = units[~empty[page]].int()
            self.page_class[pages] = 0
            stop = self.num_free_pages + len(pages)
            self._pages[self.num_free_pages : stop] = pages.int()
            self.num_free_pages = stop

    def refill(self, left: Tensor, units: list[Tensor]) -> None:
        """After a compaction: pages of the mask `left` are free, and these units of each class."""
        self._units = [u.int() for u in units]
        self.page_class[left] = 0
        pages = left.nonzero().squeeze(1).flip(0)
        stop = self.num_free_pages + len(pages)
        self._pages[self.num_free_pages : stop] = pages.int()
        self.num_free_pages = stop

    @property
    def num_free_units(self) -> int:
        """Free units of all classes, each an int32."""
        return sum(len(u) for u in self._units)

    def free(self) -> Int[Tensor, " numbers"]:
        """Return the free pages and units: how many, then which, the next one last."""
        lists = [self._pages[: self.num_free_pages], *self._units[1:]]
        counts = torch.tensor([len(x) for x in lists], device=self._device)
        return torch.cat([counts, *(x.long() for x in lists)])

    def load_free(self, numbers: Int[Tensor, " numbers"]) -> None:
        """Take the order, and the classes of unused pages, of a `free()` of the same units."""
        numbers = numbers.to(self._device)
        count = len(self._units)
        pages, *units = numbers[count:].split(numbers[:count].tolist())
        self.num_free_pages = len(pages)
        self._pages[: len(pages)] = pages.int()
        self.page_class[pages] = 0
        for size, found in enumerate(units, 1):
            self._units[size] = found.int()
            self.page_class[found // self.page_slots] = size

    @property
    def nbytes(self) -> int:
        """Bytes of the page table and of the free lists."""
        return self.page_class.nbytes + self._pages.nbytes + 4 * self.num_free_units
