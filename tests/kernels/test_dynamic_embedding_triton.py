"""The Triton kernels of dynamic embeddings: their logic in the interpreter, their code for sm_80 and
sm_90, and on a GPU.

The interpreter must be chosen before triton is imported, so `test_in_the_interpreter` runs this file
in a process of its own, where the cases of `TestAgainstTheReference` are collected.
"""

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mlkit.errors import InvalidTypeError
from mlkit_kernels.dynamic_embedding.header import HeaderLayout, decode
from mlkit_kernels.dynamic_embedding.reference import (
    OPTIMIZERS,
    UTILITIES,
    IndexOutOfRange,
    RowGradients,
    Update,
    apply_gradients,
    backward_reference,
    forward_reference,
    reduce_gradients,
)
from mlkit_kernels.dynamic_embedding.selection import candidates_reference, histogram_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# float32 sums of at most some tens of terms of size about 1, in two orders: 2^-24 for each addition
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


class Storage(NamedTuple):
    """A header and a pool whose chunks lie at random slots, some of them resident."""

    header: Tensor
    pool: Tensor
    tables: Tensor
    layout: HeaderLayout
    chunks: int
    states: list[Tensor]

    def copy(self):
        return self._replace(
            header=self.header.clone(),
            pool=self.pool.clone(),
            states=[state.clone() for state in self.states],
        )

    def to(self, device):
        return self._replace(
            header=self.header.to(device),
            pool=self.pool.to(device),
            states=[state.to(device) for state in self.states],
        )

    @property
    def read(self):
        return self.header, self.pool, self.tables, self.layout, self.chunks

    @property
    def written(self):
        return self.header, self.pool, self.states


def store(
    sizes=(7, 5, 9),
    chunks=4,
    width=4,
    *,
    layout="chunk",
    wide=False,
    row_state=False,
    utility_bytes=4,
    dtype=torch.float32,
    optimizer="none",
    padding=(-1, 2, 0),
    density=0.6,
    exponent=-10,
    seed=0,
):
    """Draw a storage; slots that no chunk has are NaN, so that nobody may read them."""
    g = torch.Generator().manual_seed(seed)
    tables, first = [], 2  # two rows in front that belong to no table
    for number, size in enumerate(sizes):
        tables.append([first, size, padding[number % len(padding)]])
        first += size + number
    rows = first
    how = HeaderLayout(int(layout == "slab"), int(wide), int(row_state), utility_bytes)
    words = how.words(chunks)
    # the reference reads wide addresses only from rows of an even number of words
    header = torch.zeros(rows, words + words % 2, dtype=torch.int32)
    resident = torch.rand(rows, chunks, generator=g) < density
    for start, _, pad in tables:
        if pad >= 0:
            resident[start + pad] = False
    free = torch.randperm(rows * chunks, generator=g) + 1
    slots = torch.full((rows, chunks), -1)
    used, base = 1, torch.zeros(rows, dtype=torch.int64)
    for row in range(rows):
        for chunk in resident[row].nonzero().flatten().tolist():
            slots[row, chunk] = used if layout == "slab" else free[used - 1]
            base[row] = min(int(base[row]) or used, used)
            used += 1
    if layout == "slab":
        mask = (resident.long() << torch.arange(chunks)).sum(1)
        how.addresses(header, chunks)[:] = how.pack(base, mask, chunks)
    else:
        how.addresses(header, chunks)[:] = slots
    assert torch.equal(how.slots(how.addresses(header, chunks), chunks), slots)
    taken = slots[resident]
    pool = torch.full((rows * chunks + 2, width), math.nan)
    pool[taken] = torch.randn(len(taken), width, generator=g)
    touched = torch.rand(rows, chunks, generator=g) < 0.7
    if utility_bytes == 1:
        codes = torch.randint(0, 200, (rows, chunks), generator=g) * touched
        how.utilities(header, chunks)[:] = codes.to(torch.uint8)
    else:
        how.utilities(header, chunks)[:] = torch.rand(rows, chunks, generator=g) * touched
    if row_state:
        how.state(header, chunks)[:] = torch.rand(rows, generator=g)
    shapes = {"adagrad": [width], "adam": [width, width, 0]}.get(optimizer, [])
    states = [
        torch.rand(len(pool), *([size] if size else []), generator=g) if size else torch.zeros(len(pool))
        for size in shapes
    ]
    return Storage(header, pool.to(dtype), torch.tensor(tables), how, chunks, states)


@dataclasses.dataclass
class Batch:
    """Indices of bags, some of which are empty; many are read twice."""

    indices: Tensor
    offsets: Tensor | None
    bag_size: int
    weights: Tensor | None
    mode: str
    grad: Tensor


def draw(storage, batch=4, longest=3, *, fixed=0, weighted=False, mode="sum", seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = storage.tables[:, 1].repeat_interleave(batch)
    if fixed:
        lengths = torch.full((len(sizes),), fixed)
    else:
        lengths = torch.randint(0, longest + 1, (len(sizes),), generator=g)
    limit = sizes.repeat_interleave(lengths)
    indices = (torch.rand(len(limit), generator=g) ** 2 * limit).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    dim = storage.chunks * storage.pool.shape[1]
    return Batch(
        indices,
        None if fixed else offsets,
        fixed or 1,
        torch.rand(len(indices), generator=g) + 0.5 if weighted else None,
        mode,
        torch.randn(batch, len(storage.tables) * dim, generator=g),
    )


def on(device, value):
    return value.to(device) if isinstance(value, Tensor) else value


def forward_both(storage, batch, device="cpu"):
    from mlkit_kernels.dynamic_embedding.triton import forward_triton

    how = (batch.indices, batch.offsets, batch.bag_size, batch.weights, batch.mode)
    want = forward_reference(*storage.read, *how)
    there = storage.to(device)
    got = forward_triton(*there.read, *(on(device, value) for value in how))
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(got.cpu(), want, **TOLERANCE)
    assert not want.isnan().any()
    return got
