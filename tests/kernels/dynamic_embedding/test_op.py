"""Names, errors and the choice of the backend; the ops under `torch.compile`; other processes."""

import os
import subprocess
import sys

import pytest
import torch

from mlkit.errors import InvalidTypeError, InvalidValueError, RunError
from mlkit_kernels import dynamic_embedding as kernels
from tests.kernels.dynamic_embedding.cases import make_batch, make_storage, updates

needs_cpp = pytest.mark.skipif(
    "cpp" not in kernels.available_backends("cpu"), reason="needs a C++ compiler"
)


def opaque(storage, batch):
    """The arguments of the op `forward`, and those of `backward`."""
    read = (storage.header, storage.pool, storage.tables, list(storage.layout), 4)
    lookup = (batch.indices, batch.offsets, batch.bag_size, batch.weights)
    forward = (*read, *lookup, batch.mode, "auto")
    update = updates("rowwise_adagrad", keep_new=True)
    backward = (*read[:2], [], *read[2:], *lookup, batch.grad, batch.mode, *update, "auto")
    return forward, backward


def test_opcheck():
    storage = make_storage()
    batch = make_batch(storage)
    sums = kernels.reduce(storage.tables, *batch.written)
    forward, backward = opaque(storage, batch)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    ops = torch.ops.mlkit
    torch.library.opcheck(ops.dynamic_embedding_forward.default, forward)
    torch.library.opcheck(ops.dynamic_embedding_backward.default, backward, test_utils=checks)
    batch_arguments = (*forward[5:9], batch.grad, "sum", "auto")
    torch.library.opcheck(
        ops.dynamic_embedding_reduce.default,
        (storage.tables, *batch_arguments),
        test_utils=checks,
    )
    apply = (*forward[:2], [], *forward[3:5], *sums, *updates("sgd"), "auto")
    torch.library.opcheck(ops.dynamic_embedding_apply.default, apply, test_utils=checks)
    scan = (storage.header, storage.tables, list(storage.layout), 4, torch.ones(3))
    torch.library.opcheck(
        ops.dynamic_embedding_histogram.default, (*scan, 0, False, False, -1, "auto")
    )
    torch.library.opcheck(
        ops.dynamic_embedding_candidates.default,
        (*scan, 0.2, 0.4, 0, False, "auto"),
        test_utils=checks,
    )


def test_compiled_calls_give_what_eager_calls_give():
    storage = make_storage()
    batch = make_batch(storage, bags=2)
    update = updates("rowwise_adagrad")

    def step(header, pool, indices, grad):
        out = kernels.forward(
            header, pool, storage.tables, storage.layout, 4, indices, None, 2, None, "sum"
        )
        kernels.backward(
            header,
            pool,
            [],
            storage.tables,
            storage.layout,
            4,
            indices,
            None,
            2,
            None,
            grad,
            "sum",
            update,
        )
        return out * 2

    one, two = storage.copy(), storage.copy()
    expected = step(one.header, one.pool, batch.indices, batch.grad)
    compiled = torch.compile(step, backend="aot_eager")
    found = compiled(two.header, two.pool, batch.indices, batch.grad)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))


def test_other_types_go_to_the_reference():
    storage = make_storage(dtype=torch.float64, optimizer="sgd")
    batch = make_batch(storage)
    found = kernels.forward(*storage.read, *batch.read)
    assert found.dtype == torch.float64
    expected = kernels.forward(*storage.read, *batch.read, backend="reference")
    assert torch.equal(found, expected)
    with pytest.raises(InvalidTypeError, match="got torch.float64 and 4 chunks"):
        kernels.forward(*storage.read, *batch.read, backend="cpp")


@needs_cpp
def test_arguments_of_other_types_are_converted():
    storage = make_storage()
    batch = make_batch(storage, weighted=True)
    expected = kernels.forward(*storage.read, *batch.read)
    narrow = (batch.indices.int(), batch.offsets.int(), 1, batch.weights.double(), "sum")
    assert torch.equal(kernels.forward(*storage.read, *narrow), expected)
    wide = torch.stack([batch.grad, batch.grad], 2)[:, :, 0]
    one, two = storage.copy(), storage.copy()
    batch_of = (batch.indices, batch.offsets, 1, batch.weights)
    kernels.backward(*one.written, *batch_of, wide, "sum", updates("sgd"))
    kernels.backward(*two.written, *batch_of, batch.grad, "sum", updates("sgd"))
    assert torch.equal(one.pool, two.pool)


@needs_cpp
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 3], "offsets must begin with 0"),
        ([0, 3, 2], "must not fall"),
        ([0, 1, 5], "must end with the number of indices"),
        ([0, 1, 2, 3], "3 bags are not as many for each of 2 tables"),
    ],
)
def test_offsets_that_do_not_fit(offsets, message):
    storage = make_storage(rows=(4, 4))
    indices = torch.zeros(offsets[-1] if len(offsets) == 4 else 3, dtype=torch.int64)
    with pytest.raises(InvalidValueError, match=message):
        kernels.forward(*storage.read, indices, torch.tensor(offsets), backend="cpp")


def test_names():
    storage = make_storage()
    batch = make_batch(storage)
    with pytest.raises(InvalidValueError, match="mode must be one of sum, mean, got 'max'"):
        kernels.forward(*storage.read, batch.indices, batch.offsets, mode="max")
    with pytest.raises(InvalidValueError, match="backend must be one of .* got 'cpq'; did you"):
        kernels.forward(*storage.read, *batch.read, backend="cpq")
    with pytest.raises(InvalidValueError, match="optimizer must be one of .* got 'adamw'"):
        kernels.backward(*storage.written, *batch.written, updates("adamw"))
    with pytest.raises(InvalidValueError, match="utility must be one of .* got 'norm'"):
        kernels.backward(*storage.written, *batch.written, updates("sgd", utility="norm"))


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    storage = make_storage()
    batch = make_batch(storage)
    with pytest.raises(RunError, match="needs tensors on a CUDA device"):
        kernels.forward(*storage.read, *batch.read, backend="triton")


SCRIPT = """
import torch
from mlkit_kernels import dynamic_embedding as kernels
from tests.kernels.dynamic_embedding.cases import make_batch, make_storage
storage = make_storage()
batch = make_batch(storage)
print(kernels.available_backends("cpu"))
print(float(kernels.forward(*storage.read, *batch.read).sum()))
try:
    kernels.forward(*storage.read, *batch.read, backend="cpp")
except kernels.IndexOutOfRange:
    raise
except Exception as error:
    print(type(error).__name__, error)
"""


def test_without_a_compiler_the_reference_runs():
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "('reference',)"
    assert lines[2].startswith("RunError backend='cpp' cannot run: no C++ compiler")
    storage = make_storage()
    batch = make_batch(storage)
    expected = kernels.forward(*storage.read, *batch.read).sum()
    assert abs(float(lines[1]) - float(expected)) < 1e-4


@needs_cpp
def test_forked_process():
    storage = make_storage()
    batch = make_batch(storage)
    expected = kernels.forward(*storage.read, *batch.read, backend="cpp")
    pid = os.fork()
    if pid == 0:
        found = kernels.forward(*storage.read, *batch.read, backend="cpp")
        os._exit(0 if torch.equal(found, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
