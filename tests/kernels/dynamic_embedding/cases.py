"""Tables with some chunks resident, and batches that read them, for any layout of the header."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mlkit_kernels.dynamic_embedding import HeaderLayout, Update

STATES = {"none": 0, "sgd": 0, "rowwise_adagrad": 0, "adagrad": 1, "adam": 3}


@dataclasses.dataclass
class Storage:
    """Header, pool and states of some tables."""

    header: Tensor
    pool: Tensor
    states: list[Tensor]
    tables: Tensor
    layout: HeaderLayout
    num_chunks: int

    @property
    def read(self) -> tuple[Any, ...]:
        """Arguments of `forward` before the batch."""
        return self.header, self.pool, self.tables, self.layout, self.num_chunks

    @property
    def written(self) -> tuple[Any, ...]:
        """Arguments of `backward` before the batch."""
        return self.header, self.pool, self.states, self.tables, self.layout, self.num_chunks

    @property
    def tensors(self) -> list[Tensor]:
        return [self.header, self.pool, *self.states]

    def copy(self) -> "Storage":
        return dataclasses.replace(
            self,
            header=self.header.clone(),
            pool=self.pool.clone(),
            states=[s.clone() for s in self.states],
        )

    def slots(self) -> Tensor:
        addresses = self.layout.addresses(self.header, self.num_chunks)
        return self.layout.slots(addresses, self.num_chunks)

    def dense(self, table: int) -> Tensor:
        """The table's weights, [rows, D], zeros where there is no storage."""
        first, rows, _ = self.tables[table].tolist()
        slots = self.slots()[first : first + rows]
        values = self.pool.float()[slots.clamp_min(0)] * (slots >= 0).unsqueeze(-1)
        return values.flatten(1)


def make_storage(
    *,
    rows=(7, 11, 5),
    num_chunks=4,
    width=4,
    layout="slab",
    wide=False,
    optimizer="rowwise_adagrad",
    utility_bytes=4,
    dtype=torch.float32,
    density=0.6,
    padding=-1,
    seed=0,
) -> Storage:
    generator = torch.Generator().manual_seed(seed)
    total = sum(rows)
    has_state = int(optimizer == "rowwise_adagrad")
    kind = HeaderLayout(int(layout == "slab"), int(wide), has_state, utility_bytes)
    first = [sum(rows[:t]) for t in range(len(rows))]
    tables = torch.tensor([[f, r, padding] for f, r in zip(first, rows, strict=True)])
    header = torch.zeros(total, kind.words(num_chunks), dtype=torch.int32)
    resident = torch.rand(total, num_chunks, generator=generator) < density
    if padding >= 0:
        resident[tables[:, 0] + padding] = False
    counts = resident.sum(1)
    num_slots = int(counts.sum()) + 3
    order = torch.randperm(total, generator=generator)  # rows lie anywhere in the pool
    start = torch.empty(total, dtype=torch.int64)
    start[order] = counts[order].cumsum(0) - counts[order] + 1
    if kind.slab:
        mask = (resident.long() << torch.arange(num_chunks)).sum(1)
        addresses = kind.pack(start, mask, num_chunks)
    else:
        slots = torch.randperm(num_slots, generator=generator)
        slots = slots[start.unsqueeze(1) + resident.cumsum(1) - 1]
        addresses = torch.where(resident, slots, -1)
    kind.addresses(header, num_chunks).copy_(addresses)
    if has_state:
        kind.state(header, num_chunks).copy_(torch.rand(total, generator=generator))
    used = torch.rand(total, 1, generator=generator) < 0.7
    if utility_bytes == 4:
        utility = torch.rand(total, num_chunks, generator=generator) * used
    else:
        utility = torch.randint(0, 200, (total, num_chunks), generator=generator) * used
    if padding >= 0:
        utility[tables[:, 0] + padding] = 0
    kind.utilities(header, num_chunks).copy_(utility)
    pool = torch.randn(num_slots, width, generator=generator, dtype=torch.float64).to(dtype)
    states = [
        torch.rand(num_slots, width, generator=generator, dtype=torch.float64).float(),
        torch.rand(num_slots, width, generator=generator, dtype=torch.float64).float(),
        torch.randint(0, 5, (num_slots,), generator=generator).float(),
    ][: STATES[optimizer]]
    return Storage(header, pool, states, tables, kind, num_chunks)


@dataclasses.dataclass
class Batch:
    """The arguments of `forward` after the storage, and a gradient of its result."""

    indices: Tensor
    offsets: Tensor | None
    bag_size: int
    weights: Tensor | None
    mode: str
    grad: Tensor

    @property
    def read(self) -> tuple[Any, ...]:
        return self.indices, self.offsets, self.bag_size, self.weights, self.mode

    @property
    def written(self) -> tuple[Any, ...]:
        return self.indices, self.offsets, self.bag_size, self.weights, self.grad, self.mode


def make_batch(
    storage: Storage, *, batch=6, bags="ragged", weighted=False, mode="sum", seed=1
) -> Batch:
    """`bags`: "ragged" for offsets with empty bags, or the size of all bags."""
    generator = torch.Generator().manual_seed(seed)
    num_tables = len(storage.tables)
    if bags == "ragged":
        lengths = torch.randint(0, 5, (num_tables, batch), generator=generator)
        lengths[torch.rand(num_tables, batch, generator=generator) < 0.2] = 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    else:
        lengths = torch.full((num_tables, batch), bags)
        offsets = None
    n = lengths.sum(1).tolist()
    indices = torch.cat(
        [
            torch.randint(0, rows, (count,), generator=generator)
            for (_, rows, _), count in zip(storage.tables.tolist(), n, strict=True)
        ]
    )
    weights = torch.randn(len(indices), generator=generator) if weighted else None
    dim = storage.num_chunks * storage.pool.shape[1]
    grad = torch.randn(batch, num_tables * dim, generator=generator)
    return Batch(indices, offsets, 1 if bags == "ragged" else bags, weights, mode, grad)


def updates(optimizer: str, **changes: Any) -> Update:
    return Update(optimizer=optimizer, lr=0.1, **changes)
