"""The C++ kernels against the reference: every layout, type, optimizer and kind of bag."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlkit_kernels import dynamic_embedding as kernels
from mlkit_kernels.dynamic_embedding import IndexOutOfRange, RowGradients, Touched
from tests.kernels.dynamic_embedding.cases import (
    STATES,
    Batch,
    Storage,
    make_batch,
    make_storage,
    updates,
)

pytestmark = pytest.mark.skipif(
    "cpp" not in kernels.available_backends("cpu"), reason="needs a C++ compiler"
)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-5, atol=2e-6)


def compare_storage(found: Storage, expected: Storage) -> None:
    """Sums of up to some tens of float32 in another order; bf16 and codes may round elsewhere."""
    layout, num_chunks = found.layout, found.num_chunks
    assert torch.equal(found.slots(), expected.slots())
    utility = [layout.utilities(s.header, num_chunks) for s in (found, expected)]
    if layout.utility_bytes == 4:
        close(*utility)
    else:
        # A code moves where rounding moves its sum past an integer: 2e-5 of codes, here none.
        assert int((utility[0].int() - utility[1].int()).abs().max()) <= 1
        assert (utility[0] != utility[1]).float().mean() < 0.02
    if layout.row_state:
        close(*(layout.state(s.header, num_chunks) for s in (found, expected)))
    if found.pool.dtype == torch.bfloat16:
        torch.testing.assert_close(found.pool, expected.pool, rtol=2**-7, atol=2e-6)
        assert (found.pool != expected.pool).float().mean() < 0.02
    else:
        close(found.pool, expected.pool)
    for mine, theirs in zip(found.states, expected.states, strict=True):
        close(mine, theirs)


def compare_touched(found: Touched, expected: Touched) -> None:
    assert found.num_nonfinite == expected.num_nonfinite
    assert torch.equal(found.new.rows, expected.new.rows)
    assert torch.equal(found.new.counts, expected.new.counts)
    close(found.new.grads, expected.new.grads)


def compare(storage: Storage, batch: Batch, **changes) -> None:
    close(
        kernels.forward(*storage.read, *batch.read, backend="cpp"),
        kernels.forward(*storage.read, *batch.read, backend="reference"),
    )
    optimizer = changes.pop("optimizer", "rowwise_adagrad")
    update = updates(optimizer, seed=7, exponent=-12, scale=1.5, keep_new=True, **changes)
    found, expected = storage.copy(), storage.copy()
    compare_touched(
        kernels.backward(*found.written, *batch.written, update, backend="cpp"),
        kernels.backward(*expected.written, *batch.written, update, backend="reference"),
    )
    compare_storage(found, expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bags", ["ragged", 1, 3])
@pytest.mark.parametrize("layout", ["slab", "chunk"])
@pytest.mark.parametrize("wide", [False, True])
def test_bags(layout, wide, bags, weighted, mode):
    storage = make_storage(layout=layout, wide=wide, padding=2)
    compare(storage, make_batch(storage, bags=bags, weighted=weighted, mode=mode))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("utility_bytes", [4, 1])
@pytest.mark.parametrize("optimizer", STATES)
@pytest.mark.parametrize("layout", ["slab", "chunk"])
def test_optimizers(layout, optimizer, utility_bytes, dtype):
    storage = make_storage(
        layout=layout, optimizer=optimizer, utility_bytes=utility_bytes, dtype=dtype, width=5
    )
    compare(storage, make_batch(storage, batch=20), optimizer=optimizer)


@pytest.mark.parametrize("width", [1, 3, 4, 8, 16, 17, 40])
@pytest.mark.parametrize("num_chunks", range(1, 9))
def test_widths(num_chunks, width):
    for density in (0.0, 0.5, 1.0):
        storage = make_storage(num_chunks=num_chunks, width=width, density=density)
        compare(storage, make_batch(storage))


@pytest.mark.parametrize("utility", ["freq_grad", "freq", "grad", "none"])
@pytest.mark.parametrize("utility_bytes", [4, 1])
def test_utilities(utility, utility_bytes):
    storage = make_storage(utility_bytes=utility_bytes, num_chunks=3)
    compare(storage, make_batch(storage, batch=30), utility=utility)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    num_chunks=st.integers(1, 8),
    width=st.integers(1, 20),
    layout=st.sampled_from(["slab", "chunk"]),
    wide=st.booleans(),
    optimizer=st.sampled_from(list(STATES)),
    batch=st.sampled_from([0, 1, 2, 17, 150]),
    bags=st.sampled_from(["ragged", 1, 2]),
    weighted=st.booleans(),
    mode=st.sampled_from(["sum", "mean"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, num_chunks, width, layout, wide, optimizer, batch, bags, **options):
    seed = options.pop("seed")
    storage = make_storage(
        rows=rows,
        num_chunks=num_chunks,
        width=width,
        layout=layout,
        wide=wide,
        optimizer=optimizer,
        padding=0,
        seed=seed,
    )
    examples = make_batch(storage, batch=batch, bags=bags, seed=seed, **options)
    compare(storage, examples, optimizer=optimizer)


def test_radix_sort_of_more_than_one_digit():
    storage = make_storage(rows=(5000, 3, 70_000), num_chunks=2, width=4)
    compare(storage, make_batch(storage, batch=400, bags=2))


def test_result_does_not_depend_on_threads():
    storage = make_storage(rows=(3000, 40), width=4)
    batch = make_batch(storage, batch=3000, weighted=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            mine = storage.copy()
            out = kernels.forward(*mine.read, *batch.read, backend="cpp")
            update = updates("rowwise_adagrad", keep_new=True)
            touched = kernels.backward(*mine.written, *batch.written, update, backend="cpp")
            sums = kernels.reduce(mine.tables, *batch.written, backend="cpp")
            results.append([out, *mine.tensors, *touched.new, *sums])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_reduce_then_apply_is_backward():
    storage = make_storage(padding=1, width=8)
    batch = make_batch(storage, batch=30, weighted=True, mode="mean")
    update = updates("rowwise_adagrad", keep_new=True)
    one, two = storage.copy(), storage.copy()
    found = kernels.backward(*one.written, *batch.written, update, backend="cpp")
    sums = kernels.reduce(two.tables, *batch.written, backend="cpp")
    expected = kernels.reduce(two.tables, *batch.written, backend="reference")
    assert torch.equal(sums.rows, expected.rows)
    assert torch.equal(sums.counts, expected.counts)
    close(sums.grads, expected.grads)
    header, pool, states, _, layout, num_chunks = two.written
    again = kernels.apply(header, pool, states, layout, num_chunks, sums, update, backend="cpp")
    compare_touched(again, found)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradients_are_counted_and_earn_nothing(bad):
    storage = make_storage(rows=(9,), density=0.5, optimizer="sgd")
    batch = make_batch(storage, batch=4, bags=1)
    batch.indices.copy_(torch.tensor([3, 4, 5, 5]))
    batch.grad[0, 1] = bad
    batch.grad[2, 7] = bad
    found, expected = storage.copy(), storage.copy()
    update = updates("sgd")
    assert kernels.backward(*found.written, *batch.written, update).num_nonfinite == 2
    kernels.backward(*expected.written, *batch.written, update, backend="reference")
    utility = [s.layout.utilities(s.header, 4) for s in (storage, found, expected)]
    assert torch.equal(utility[0][[3, 5]], utility[1][[3, 5]])
    close(utility[1], utility[2])
    torch.testing.assert_close(found.pool, expected.pool, equal_nan=True)


def test_large_finite_gradients_are_finite():
    storage = make_storage(rows=(4,), density=1.0, optimizer="sgd", width=4)
    batch = make_batch(storage, batch=1, bags=1)
    batch.grad.fill_(3e38)
    update = updates("sgd", utility="freq")
    assert kernels.backward(*storage.written, *batch.written, update).num_nonfinite == 0


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("utility_bytes", [4, 1])
def test_norms_that_overflow_leave_the_largest_utility(utility_bytes, backend):
    storage = make_storage(rows=(4,), utility_bytes=utility_bytes, optimizer="none", width=4)
    batch = make_batch(storage, batch=1, bags=1)
    batch.grad.fill_(1e30)
    for _ in range(2):
        kernels.backward(*storage.written, *batch.written, updates("none"), backend=backend)
    found = storage.layout.utilities(storage.header, 4)[batch.indices]
    assert bool((found == (255 if utility_bytes == 1 else torch.finfo(torch.float32).max)).all())


@pytest.mark.parametrize("wrong", [-1, 11])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_index_out_of_range_names_table_and_index_and_writes_nothing(backend, wrong):
    storage = make_storage()
    batch = make_batch(storage, batch=50, bags=2)
    batch.indices[50 * 2 + 13] = wrong
    batch.indices[50 * 2 + 20] = 99
    before = storage.copy()
    message = f"index {wrong} is outside of table 1, which has 11 rows"
    with pytest.raises(IndexOutOfRange, match=message):
        kernels.forward(*storage.read, *batch.read, backend=backend)
    with pytest.raises(IndexOutOfRange, match=message):
        kernels.backward(
            *storage.written, *batch.written, updates("rowwise_adagrad"), backend=backend
        )
    with pytest.raises(IndexOutOfRange, match=message):
        kernels.reduce(storage.tables, *batch.written, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(storage.tensors, before.tensors, strict=True))


@pytest.mark.parametrize("utility_bytes", [4, 1])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("layout", ["slab", "chunk"])
@pytest.mark.parametrize("num_chunks", [1, 4, 7])
def test_selection(layout, num_chunks, prefix, utility_bytes):
    storage = make_storage(
        rows=(40, 0, 300),
        layout=layout,
        num_chunks=num_chunks,
        utility_bytes=utility_bytes,
        wide=num_chunks == 7,
    )
    arguments = (storage.header, storage.tables, storage.layout, num_chunks)
    inverse = torch.tensor([1.0, 2.0, 0.3])
    options = {"exponent": -9, "prefix": prefix}
    for resident_only in (False, True):
        for within in (-1, int(torch.tensor(0.2).view(torch.int32) >> 16)):
            found, expected = (
                kernels.histogram(
                    *arguments,
                    inverse,
                    **options,
                    resident_only=resident_only,
                    within=within,
                    backend=backend,
                )
                for backend in ("cpp", "reference")
            )
            assert torch.equal(found, expected)
    found, expected = (
        kernels.candidates(*arguments, inverse, 0.1, 0.2, **options, backend=backend)
        for backend in ("cpp", "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(found.admit) > 0


def test_selection_with_threads_that_share_tables():
    storage = make_storage(rows=(40_000, 10, 30_000))
    arguments = (storage.header, storage.tables, storage.layout, 4, torch.ones(3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        counts = kernels.histogram(*arguments, backend="cpp")
        found = kernels.candidates(*arguments, 0.4, 0.6, backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(counts, kernels.histogram(*arguments, backend="reference"))
    expected = kernels.candidates(*arguments, 0.4, 0.6, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_byte_codes_differ_rarely():
    """A code differs where its sum lies within a rounding error of an integer: some 2e-5 of all."""
    rows = 20_000
    storage = make_storage(rows=(rows,), utility_bytes=1, optimizer="none", width=2)
    codes = storage.layout.utilities(storage.header, 4)
    codes.copy_(torch.arange(4 * rows).view(rows, 4) % 256)
    grads = RowGradients(torch.arange(rows), torch.ones(rows).long(), torch.rand(rows, 8))
    found, expected = storage.copy(), storage.copy()
    for mine, backend in ((found, "cpp"), (expected, "reference")):
        header, pool, states, _, layout, num_chunks = mine.written
        update = updates("none", exponent=-12, seed=3)
        kernels.apply(header, pool, states, layout, num_chunks, grads, update, backend=backend)
    one, two = (s.layout.utilities(s.header, 4).int() for s in (found, expected))
    assert int((one - two).abs().max()) <= 1
    assert int((one != two).sum()) <= 20
