"""idx files: round trips against torchvision's reader and struct, and every way to be broken."""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlkit.data.idx import (
    IDX_FILES,
    convert_fashion_mnist,
    convert_mnist10k,
    read_idx,
    write_idx,
)
from mlkit.errors import InvalidValueError, MissingDataError

ARRAYS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=7))


@given(ARRAYS)
def test_round_trip_and_exact_layout(array: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x-idx"
        write_idx(path, array)
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        assert path.read_bytes() == header + array.tobytes()
        back = read_idx(path)
    assert back.dtype == np.uint8
    assert back.shape == array.shape
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)


@given(ARRAYS, st.data())
def test_any_other_length_is_refused(array: np.ndarray, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x-idx"
        write_idx(path, array)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:cut])
        with pytest.raises(InvalidValueError, match=r"x-idx is (truncated|not an idx file)"):
            read_idx(path)
        path.write_bytes(whole + b"\0")
        with pytest.raises(InvalidValueError, match="too long"):
            read_idx(path)


@settings(max_examples=300)
@given(st.binary(max_size=64) | st.binary(max_size=40).map(lambda tail: b"\0\0\x08" + tail))
def test_arbitrary_bytes_never_escape_as_another_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x-idx"
        path.write_bytes(content)
        with contextlib.suppress(InvalidValueError):
            array = read_idx(path)
            assert 4 + 4 * array.ndim + array.size == len(content)


def test_torchvision_reads_what_is_written(tmp_path: Path) -> None:
    mnist = pytest.importorskip("torchvision.datasets.mnist")
    array = np.arange(3 * 5 * 7, dtype=np.uint8).reshape(3, 5, 7)
    write_idx(tmp_path / "images", array)
    np.testing.assert_array_equal(
        mnist.read_image_file(str(tmp_path / "images")).numpy(), read_idx(tmp_path / "images")
    )


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.T,
        lambda a: a[::2, ::-1],
        np.asfortranarray,
        lambda a: np.broadcast_to(a[0], (4, 7)),
    ],
    ids=["transposed", "strided", "fortran", "broadcast"],
)
def test_non_contiguous_arrays_are_written_in_c_order(tmp_path: Path, view) -> None:  # type: ignore[no-untyped-def]
    array = view(np.arange(42, dtype=np.uint8).reshape(6, 7))
    write_idx(tmp_path / "x", array)
    np.testing.assert_array_equal(read_idx(tmp_path / "x"), array)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), "uint8, got float64"),
        (np.zeros(3, np.int8), "uint8, got int8"),
        (np.zeros(3, bool), "uint8, got bool"),
        (np.uint8(3), "1 to 32 dimensions, got 0"),
        (np.broadcast_to(np.uint8(0), (2**32,)), "below 2\\*\\*32"),
    ],
)
def test_write_refuses_what_the_format_cannot_hold(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message):
        write_idx(tmp_path / "x", array)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\0\0\x08", "not an idx file"),
        (b"PK\x03\x04rest", "50 4b 03 04"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "dtype code 0x0d"),
        (b"\0\0\x08\0\x05", "claims 0 dimensions"),
        (b"\0\0\x08\xff" + bytes(4 * 255), "claims 255 dimensions"),
        (b"\0\0\x08\x03\0\0\0\x01", "truncated inside its header"),
        # a header that asks for 2**64 bytes must not be believed
        (b"\0\0\x08\x02" + b"\xff" * 8 + b"x", "truncated"),
        (b"\0\0\x08\x04" + bytes(4) + b"\xff" * 12, "cannot hold shape"),
    ],
)
def test_broken_headers_say_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken-idx"
    path.write_bytes(content)
    with pytest.raises(InvalidValueError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_a_gzipped_file_gets_its_own_hint(tmp_path: Path) -> None:
    path = tmp_path / "x-idx.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\0"))
    with pytest.raises(InvalidValueError, match="gunzip it first"):
        read_idx(path)


def test_a_missing_file_and_a_folder_are_missing_data(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(MissingDataError, match="no idx file at"):
            read_idx(path)


def test_fashion_converter_unpacks_all_four(tmp_path: Path) -> None:
    source = tmp_path / "source"
    packed = source / "usr/share/datasets/fashion-mnist"
    packed.mkdir(parents=True)
    for position, name in enumerate(IDX_FILES):
        (packed / f"{name}.gz").write_bytes(gzip.compress(bytes([position]) * 70_000))
    convert_fashion_mnist(source, tmp_path / "out")
    raw = tmp_path / "out" / "FashionMNIST" / "raw"
    assert sorted(p.name for p in raw.iterdir()) == sorted(IDX_FILES)
    for position, name in enumerate(IDX_FILES):
        assert (raw / name).read_bytes() == bytes([position]) * 70_000


def test_mnist_converter_gives_back_every_byte_value_and_pairs_labels(tmp_path: Path) -> None:
    """The package's three decimals of value/255 identify all 256 values."""
    digits = tmp_path / "source/package/src/digits"
    digits.mkdir(parents=True)
    rng = np.random.default_rng(0)
    originals = {}
    for digit in range(10):
        images = rng.integers(0, 256, size=(3 + digit, 784))
        images[0, :256] = np.arange(256)
        images[:, -1] = digit  # marks the image with its own label
        originals[digit] = images
        floats = [round(int(value) / 255, 3) for value in images.ravel()]
        (digits / f"{digit}.json").write_text(json.dumps({"data": floats}))
    convert_mnist10k(tmp_path / "source", tmp_path / "a")
    convert_mnist10k(tmp_path / "source", tmp_path / "b")

    parts = [read_idx(tmp_path / "a/MNIST/raw" / name) for name in IDX_FILES]
    again = [read_idx(tmp_path / "b/MNIST/raw" / name) for name in IDX_FILES]
    for first, second in zip(parts, again, strict=True):
        np.testing.assert_array_equal(first, second)
    train_x, train_y, test_x, test_y = parts
    total = sum(range(3, 13))
    assert train_x.shape == (total - total // 10, 28, 28)
    assert test_x.shape == (total // 10, 28, 28)
    images, labels = np.concatenate([train_x, test_x]), np.concatenate([train_y, test_y])
    np.testing.assert_array_equal(images[:, -1, -1], labels)
    assert (np.diff(labels.astype(int)) < 0).any(), "not shuffled"
    stored = sorted(row.tobytes() for row in images)
    expected = np.concatenate(list(originals.values())).astype(np.uint8)
    assert stored == sorted(row.tobytes() for row in expected)
