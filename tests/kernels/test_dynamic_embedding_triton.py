"""The Triton kernels of dynamic embeddings: in the interpreter, compiled for sm_90, and on a GPU.

The interpreter must be chosen before triton is imported, so `test_in_the_interpreter` runs this
file in a process of its own, where the cases that take a `device` run on the CPU.
"""

import dataclasses
import importlib.util
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mlkit.errors import InvalidTypeError
from mlkit_kernels.dynamic_embedding import selection
from mlkit_kernels.dynamic_embedding.header import HeaderLayout
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

# the interpreter's numpy says what a GPU does not
LOUD = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


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
    header = torch.zeros(rows, how.words(chunks), dtype=torch.int32)
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
        torch.rand(len(pool), *([size] if size else []), generator=g)
        if size
        else torch.zeros(len(pool))
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


def same_storage(got, want, rounded=0.02):
    """Compare what a backward pass wrote; a share of what is rounded may be a step off."""
    how, chunks = want.layout, want.chunks
    width = how.address_words(chunks)
    got = got.to("cpu")
    assert torch.equal(got.header[:, :width], want.header[:, :width])
    ours, theirs = how.utilities(got.header, chunks), how.utilities(want.header, chunks)
    if how.utility_bytes == 1:
        off = (ours.int() - theirs.int()).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() <= rounded
    else:
        torch.testing.assert_close(ours, theirs, **TOLERANCE, equal_nan=True)
    if how.row_state:
        ours, theirs = how.state(got.header, chunks), how.state(want.header, chunks)
        torch.testing.assert_close(ours, theirs, **TOLERANCE, equal_nan=True)
    if want.pool.dtype == torch.bfloat16:
        step = {"atol": 1e-5, "rtol": 2.0**-7}  # neighbours in bfloat16
        torch.testing.assert_close(got.pool, want.pool, **step, equal_nan=True)
        off = (got.pool != want.pool) & ~want.pool.isnan()
        assert off.float().mean() <= rounded
    else:
        torch.testing.assert_close(got.pool, want.pool, **TOLERANCE, equal_nan=True)
    for ours, theirs in zip(got.states, want.states, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE, equal_nan=True)


def same_gradients(got, want):
    assert torch.equal(got.rows.cpu(), want.rows)
    assert torch.equal(got.counts.cpu(), want.counts)
    torch.testing.assert_close(got.grads.cpu(), want.grads, **TOLERANCE, equal_nan=True)


def backward_both(storage, batch, update, device="cpu", **tolerance):
    from mlkit_kernels.dynamic_embedding.triton import (
        apply_triton,
        backward_triton,
        reduce_triton,
    )

    how = (batch.indices, batch.offsets, batch.bag_size, batch.weights, batch.grad, batch.mode)
    there = tuple(on(device, value) for value in how)
    want, got, by_parts = storage.copy(), storage.copy().to(device), storage.copy().to(device)

    sums = reduce_gradients(storage.tables, *how)
    found = reduce_triton(storage.tables, *there)
    same_gradients(found, sums)

    expected = backward_reference(
        *want.written, want.tables, want.layout, want.chunks, *how, update
    )
    touched = backward_triton(*got.written, got.tables, got.layout, got.chunks, *there, update)
    parts = apply_triton(*by_parts.written, got.layout, got.chunks, found, update)
    for result, changed in ((touched, got), (parts, by_parts)):
        assert result.num_nonfinite == expected.num_nonfinite
        same_gradients(result.new, expected.new)
        same_storage(changed, want, **tolerance)
    return touched


# the interpreter's process has no GPU to use, and the other one no interpreter
@pytest.fixture(params=["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def pick(seed):
    """Draw a storage, a batch and an update; every choice of each is drawn somewhere below."""
    choose = random.Random(seed).choice
    optimizer = OPTIMIZERS[seed % len(OPTIMIZERS)]
    storage = store(
        sizes=choose([(7, 5, 9), (12,), (1, 30)]),
        chunks=choose([1, 2, 3, 4, 7, 8]),
        width=choose([1, 4, 10, 16]),
        layout=choose(["chunk", "slab"]),
        wide=choose([False, True]),
        row_state=optimizer == "rowwise_adagrad",
        utility_bytes=choose([1, 4]),
        dtype=choose([torch.float32, torch.bfloat16]),
        optimizer=optimizer,
        density=choose([0, 0.3, 0.7, 1]),
        seed=seed,
    )
    batch = draw(
        storage,
        batch=choose([1, 3, 6]),
        longest=choose([2, 5]),
        fixed=choose([0, 0, 1, 3]),
        weighted=choose([False, True]),
        mode=choose(["sum", "mean"]),
        seed=seed,
    )
    update = Update(
        optimizer=optimizer,
        lr=0.1,
        utility=choose(UTILITIES),
        scale=choose([1.0, 1.7]),
        exponent=-10,
        seed=seed,
        keep_new=choose([False, True]),
    )
    return storage, batch, update


@pytest.mark.skipif(INTERPRETED, reason="already there")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class TestForward:
    @pytest.mark.parametrize("width", [1, 4, 10, 16])
    @pytest.mark.parametrize("chunks", [1, 3, 4, 8])
    def test_shapes(self, chunks, width, device):
        layout = ["chunk", "slab"][(chunks + width) % 2]
        storage = store(chunks=chunks, width=width, layout=layout, row_state=chunks == 3)
        forward_both(storage, draw(storage), device)

    @pytest.mark.parametrize("wide", [False, True])
    @pytest.mark.parametrize("layout", ["chunk", "slab"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layouts_and_types(self, layout, wide, dtype, device):
        storage = store(layout=layout, wide=wide, dtype=dtype, utility_bytes=1)
        for batch in (draw(storage, fixed=1), draw(storage, fixed=3, weighted=True)):
            forward_both(storage, batch, device)
        forward_both(storage, draw(storage, mode="mean", longest=20), device)

    def test_many_programs(self, device, monkeypatch):
        import mlkit_kernels.dynamic_embedding.triton as kernels

        monkeypatch.setattr(kernels, "_TILE", 128)
        storage = store(sizes=(40, 3), layout="slab")
        forward_both(storage, draw(storage, batch=13), device)

    def test_slots_past_31_bits_of_a_slab_address(self, device):
        storage = store(sizes=(3,), layout="slab", density=1)
        address = storage.layout.addresses(storage.header, 4)
        # a base of 2^28 - 1 makes the word negative; only its one chunk that is absent is asked for
        address[2] = storage.layout.pack(torch.tensor([2**28 - 1]), torch.tensor([0]), 4)[0]
        assert address[2] < 0
        batch = Batch(torch.tensor([0]), None, 1, None, "sum", torch.zeros(1, 16))
        assert not forward_both(storage, batch, device).any()

    def test_rows_apart_and_other_integers(self, device):
        storage = store()
        batch = draw(storage)
        spread = torch.zeros(len(storage.header), storage.header.shape[1] + 3, dtype=torch.int32)
        spread[:, :-3] = storage.header
        batch.indices, batch.offsets = batch.indices.int(), batch.offsets.int()
        batch.indices = torch.stack([batch.indices, batch.indices], -1)[:, 0]
        forward_both(storage._replace(header=spread[:, :-3]), batch, device)

    def test_nothing_to_read(self, device):
        storage = store()
        batch = draw(storage, longest=0)
        assert not forward_both(storage, batch, device).any()
        batch.offsets = batch.offsets[:1]
        assert forward_both(storage, batch, device).shape == (0, 48)
        empty = storage._replace(pool=storage.pool[:0], header=store(density=0).header)
        assert not forward_both(empty, draw(storage), device).any()

    def test_other_types_are_refused(self, device):
        from mlkit_kernels.dynamic_embedding.triton import forward_triton

        storage = store(dtype=torch.float64).to(device)
        with pytest.raises(InvalidTypeError, match=r"takes pool of .*bfloat16, got torch.float64"):
            forward_triton(*storage.read, torch.zeros(3, dtype=torch.int64, device=device))


class TestBackward:
    @pytest.mark.parametrize("seed", range(20))
    def test_equals_the_reference(self, seed, device):
        backward_both(*pick(seed), device)

    @pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
    def test_hot_rows_and_many_programs(self, optimizer, device, monkeypatch):
        import mlkit_kernels.dynamic_embedding.triton as kernels

        monkeypatch.setattr(kernels, "_TILE", 128)
        storage = store(sizes=(2, 30), chunks=2, optimizer=optimizer, row_state=optimizer != "adam")
        update = Update(optimizer, lr=0.05, keep_new=True)
        touched = backward_both(storage, draw(storage, batch=6, longest=6), update, device)
        assert len(touched.new.rows)

    def test_random_rounding_is_the_references_bit_for_bit(self, device):
        storage = store(sizes=(60,), dtype=torch.bfloat16, density=0.9, padding=(-1,))
        batch = draw(storage, batch=60, fixed=1)
        batch.indices = torch.arange(60)  # a sum of one number has one value
        for seed in (7, -1, 2**40 + 2**31):
            update = Update("sgd", lr=0.5, utility="none", seed=seed)
            backward_both(storage, batch, update, device, rounded=0)

    @LOUD
    @pytest.mark.parametrize("utility_bytes", [1, 4])
    def test_gradients_that_are_not_finite(self, utility_bytes, device):
        storage = store(utility_bytes=utility_bytes, row_state=True)
        batch = draw(storage, batch=6)
        batch.grad[0, 3], batch.grad[1, 20], batch.grad[2, 40] = math.nan, math.inf, -math.inf
        for optimizer in ("sgd", "rowwise_adagrad"):
            update = Update(optimizer, lr=0.1, exponent=-10)
            assert backward_both(storage, batch, update, device).num_nonfinite

    @LOUD
    @pytest.mark.parametrize("utility_bytes", [1, 4])
    def test_norms_that_overflow(self, utility_bytes, device):
        storage = store(utility_bytes=utility_bytes)
        batch = draw(storage)
        batch.grad[:] = 1e30
        backward_both(storage, batch, Update(exponent=-10), device)

    def test_the_ops_by_parts_run_these_kernels(self, device, monkeypatch):
        from mlkit_kernels.dynamic_embedding import op, triton

        called = []
        for name in ("reduce_triton", "apply_triton"):
            run = getattr(triton, name)
            monkeypatch.setattr(
                triton, name, lambda *a, run=run, name=name: (called.append(name), run(*a))[1]
            )
        storage = store(row_state=True)
        batch = draw(storage)
        how = (batch.indices, batch.offsets, batch.bag_size, batch.weights, batch.grad, batch.mode)
        update = Update("rowwise_adagrad", lr=0.1)
        want, got = storage.copy(), storage.copy().to(device)
        sums = reduce_gradients(storage.tables, *how)
        apply_gradients(*want.written, want.layout, want.chunks, sums, update)
        there = tuple(on(device, value) for value in how)
        found = op.reduce(storage.tables, *there, backend="triton")
        same_gradients(found, sums)
        op.apply(*got.written, got.layout, got.chunks, found, update, backend="triton")
        same_storage(got, want)
        assert called == ["reduce_triton", "apply_triton"]

    def test_many_steps_of_adam(self, device):
        storage = store(optimizer="adam")
        storage.states[2][:] = torch.arange(len(storage.pool)) ** 2 * 1000.0
        backward_both(storage, draw(storage), Update("adam", lr=0.1), device)

    def test_no_row_is_touched(self, device):
        from mlkit_kernels.dynamic_embedding.triton import backward_triton

        for longest, index in ((0, 0), (2, 2)):
            storage = store(sizes=(5,), padding=(2,), optimizer="adam").to(device)
            batch = draw(storage, longest=longest)
            batch.indices.fill_(index)  # padding
            before = storage.copy()
            found = backward_triton(
                *storage.written,
                storage.tables,
                storage.layout,
                storage.chunks,
                *(on(device, v) for v in (batch.indices, batch.offsets, 1, None, batch.grad)),
                "sum",
                Update("adam", lr=0.1, keep_new=True),
            )
            assert found.num_nonfinite == 0
            assert [tuple(t.shape) for t in found.new] == [(0,), (0,), (0, 16)]
            assert torch.equal(storage.header, before.header)
            assert torch.equal(storage.pool.nan_to_num(), before.pool.nan_to_num())

    def test_gradients_of_odd_strides(self, device):
        storage = store()
        batch = draw(storage)
        batch.grad = batch.grad[0, 0].expand(4, 48)
        backward_both(storage, batch, Update("sgd", lr=0.1), device)
        batch.grad = torch.randn(48, 4, generator=torch.Generator().manual_seed(1)).t()
        backward_both(storage, batch, Update("sgd", lr=0.1), device)
        batch.grad = batch.grad.bfloat16()
        backward_both(storage, batch, Update("sgd", lr=0.1), device)

    def test_rows_in_any_order(self, device):
        from mlkit_kernels.dynamic_embedding.triton import apply_triton

        storage = store(row_state=True, layout="slab")
        rows = torch.tensor([11, 3, 20, 5])
        grads = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        gradients = RowGradients(rows, torch.tensor([1, 4, 2, 1]), grads)
        update = Update("rowwise_adagrad", lr=0.1, keep_new=True)
        want, got = storage.copy(), storage.copy().to(device)
        expected = apply_gradients(*want.written, want.layout, want.chunks, gradients, update)
        there = RowGradients(*(t.to(device) for t in gradients))
        found = apply_triton(*got.written, got.layout, got.chunks, there, update)
        same_gradients(found.new, expected.new)
        same_storage(got, want)

    def test_twice_the_same_bits(self, device):
        from mlkit_kernels.dynamic_embedding.triton import reduce_triton

        storage = store(sizes=(4,))
        batch = draw(storage, batch=40)
        how = (batch.indices, batch.offsets, 1, None, batch.grad, "mean")
        one, two = (reduce_triton(storage.tables, *(on(device, v) for v in how)) for _ in range(2))
        assert torch.equal(one.grads, two.grads)


class TestOutOfRange:
    @pytest.mark.parametrize("wrong", [-1, 5, 2**31, -(2**40)])
    @pytest.mark.parametrize("fixed", [0, 2])
    def test_says_which_and_writes_nothing(self, wrong, fixed, device):
        from mlkit_kernels.dynamic_embedding.triton import (
            backward_triton,
            forward_triton,
            reduce_triton,
        )

        storage = store(optimizer="adagrad")
        batch = draw(storage, fixed=fixed)
        table = batch.indices.numel() // 3 if fixed else int(batch.offsets[4])
        batch.indices[table + 1] = wrong
        batch.indices[-1] = 99  # the first counts
        how = (batch.indices, batch.offsets, batch.bag_size, None)
        with pytest.raises(IndexOutOfRange) as expected:
            forward_reference(*storage.read, *how)
        assert (expected.value.table, expected.value.index) == (1, wrong)
        there, rest = tuple(on(device, v) for v in how), (batch.grad.to(device), "sum")
        moved = storage.copy().to(device)
        update = Update("adagrad", lr=0.1)
        for call in (
            lambda: forward_triton(*moved.read, *there),
            lambda: reduce_triton(storage.tables, *there, *rest),
            lambda: backward_triton(
                *moved.written, moved.tables, moved.layout, moved.chunks, *there, *rest, update
            ),
        ):
            with pytest.raises(IndexOutOfRange) as got:
                call()
            assert str(got.value) == str(expected.value)
        assert torch.equal(moved.header.cpu(), storage.header)
        assert torch.equal(moved.pool.nan_to_num().cpu(), storage.pool.nan_to_num())


class TestSelection:
    @pytest.mark.parametrize("seed", range(8))
    def test_equals_the_reference(self, seed, device, monkeypatch):
        import mlkit_kernels.dynamic_embedding.triton_selection as kernels

        # the reference's exp2 has another last bit in a vector than in what is left over of one
        codes = kernels.levels(-10, torch.device(device)).cpu()
        monkeypatch.setattr(selection, "decode", lambda code, _: codes[code.long()])
        choose = random.Random(seed).choice
        monkeypatch.setattr(kernels, "_TILE", choose([64, 256, 1024]))
        prefix = seed % 4 in (1, 2)
        storage = store(
            sizes=choose([(17, 0, 40), (33,), (1, 9)]),
            chunks=[1, 3, 4, 8][seed % 4],
            layout=["chunk", "slab"][seed // 4],
            wide=choose([False, True]),
            row_state=choose([False, True]),
            utility_bytes=[1, 4][seed // 2 % 2],
            padding=(-1,),
            seed=seed,
        )
        inverse = torch.rand(len(storage.tables), generator=torch.Generator().manual_seed(seed))
        header, how = storage.header.to(device), (storage.layout, storage.chunks, inverse)
        upper = {"exponent": -10, "prefix": prefix}
        bins = histogram_reference(storage.header, storage.tables, *how, **upper)
        lower = {**upper, "resident_only": True, "within": int(bins.sum(0).argmax())}
        for options in (upper, lower):
            want = histogram_reference(storage.header, storage.tables, *how, **options)
            got = kernels.histogram_triton(header, storage.tables, *how, **options)
            assert torch.equal(got.cpu(), want)
        middle = float(codes[100]) if storage.layout.utility_bytes == 1 else 0.2
        for low, high in ((middle / 2, middle), (0.0, math.inf)):
            how = (storage.layout, storage.chunks, inverse, low, high, -10, prefix)
            want = candidates_reference(storage.header, storage.tables, *how)
            got = kernels.candidates_triton(header, storage.tables, *how)
            for ours, theirs in zip(got, want, strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours.cpu(), theirs)

    def test_no_table_and_no_row(self, device):
        from mlkit_kernels.dynamic_embedding.triton_selection import (
            candidates_triton,
            histogram_triton,
        )

        storage = store(sizes=(0,))
        for tables in (storage.tables, storage.tables[:0]):
            how = (storage.header.to(device), tables, storage.layout, 4, torch.ones(len(tables)))
            assert histogram_triton(*how).shape == (len(tables), 65536)
            assert [len(t) for t in candidates_triton(*how, 0.5, 0.5)] == [0, 0, 0, 0]


HALF, SINGLE, LONG, WORD, BYTE = "*bf16", "*fp32", "*i64", "*i32", "*u8"
TYPES = {
    **dict.fromkeys(["header", "keys", "bag_of", "nonfinite"], WORD),
    **dict.fromkeys(["header_bytes", "new"], BYTE),
    **dict.fromkeys(["tables", "indices", "offsets", "first_wrong", "starts", "order"], LONG),
    **dict.fromkeys(["rows", "counts", "found", "evict", "admit"], LONG),
    **dict.fromkeys(["code_values", "weights", "out", "factors", "grad", "sums"], SINGLE),
    **dict.fromkeys(["first", "second", "steps", "new_grads", "inverse"], SINGLE),
    **dict.fromkeys(["evict_scores", "admit_scores"], SINGLE),
    **dict.fromkeys(["lr", "eps", "beta1", "beta2", "rest1", "rest2"], "fp32"),
    **dict.fromkeys(["scale", "lowest", "low", "high"], "fp32"),
    "pool": HALF,
}
TILE = {"CHUNKS": 4, "WIDTH": 16, "BLOCK_P": 8, "BLOCK_K": 4, "BLOCK_C": 16}
SLAB = {"SLAB": True, "WIDE": False}
CHUNK = {"SLAB": False, "WIDE": True}
READS = {"OFFSETS": True, "WEIGHTS": True, "MEAN": True}
ROWS = {"BLOCK_R": 256, "BLOCK_K": 4, "CHUNKS": 4}
WORDS = {"STATE": 8, "UTILITY": 9}


def build(kernel, constants, capability=90, **types):
    """Compile a kernel; its pointers are multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {**TYPES, **types}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if signature[n][0] == "*"]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert built.asm["cubin"]
    return built.asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
def test_compiles_for_gpus_that_are_not_here(monkeypatch, tmp_path):
    """A lookup becomes machine code with 16-byte loads of chunks; so does the longest update."""
    from mlkit_kernels.dynamic_embedding import triton, triton_update

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    alone = {"OFFSETS": False, "WEIGHTS": False, "MEAN": False, "offsets": None, "weights": None}
    lookup = {**TILE, **SLAB, **alone, "BLOCK_B": 32, "BLOCK_P": 1}
    assert "ld.global.v4.b32" in build(triton._forward_kernel, lookup)
    update = {"GATHER": True, "FACTORS": True, "KEEP_NEW": True, "KIND": 0, "counts": None}
    update |= {**TILE, **SLAB, **WORDS, "OPTIMIZER": OPTIMIZERS.index("adam"), "BYTES": 1}
    build(triton_update.update_kernel, {**update, "BLOCK_R": 4}, bags=WORD)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability, monkeypatch, tmp_path):
    from mlkit_kernels.dynamic_embedding import (
        triton,
        triton_reads,
        triton_selection,
        triton_update,
    )

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    whole = {**TILE, "CHUNKS": 1, "WIDTH": 64, "BLOCK_K": 1, "BLOCK_C": 64}
    sums = {**whole, "FACTORS": True, "BLOCK_R": 4}
    build(triton_update.reduce_kernel, sums, capability, bags=WORD)
    built = [
        (triton._forward_kernel, {**TILE, **CHUNK, **READS, "BLOCK_B": 4}),
        (triton_reads.locate_kernel, {**READS, "BLOCK_B": 64, "BLOCK_P": 8}),
    ]
    for number, layout in ((4, CHUNK), (1, SLAB)):
        score = {**ROWS, **layout, "UTILITY": 9, "BYTES": number, "PREFIX": number == 1}
        count = {"RESIDENT": True, "WITHIN": True, "NUM_BINS": 65536}
        built += [
            (triton_selection._histogram_kernel, score | count),
            (triton_selection._candidates_kernel, {**score, "STORE": number == 4}),
        ]
    names = ["starts", "order", "bags", "factors", "new_grads"]
    for optimizer in range(len(OPTIMIZERS)):
        update = {**TILE, **CHUNK, **WORDS, "OPTIMIZER": optimizer, "KIND": optimizer % 4}
        update |= dict.fromkeys(names) | {"GATHER": False, "FACTORS": False, "KEEP_NEW": False}
        built += [(triton_update.update_kernel, {**update, "BYTES": 4, "BLOCK_R": 32})]
    for kernel, constants in built:
        build(kernel, constants, capability)
