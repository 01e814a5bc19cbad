"""Which backend runs: what can be loaded here, and what takes these tensors."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlkit.errors import InvalidTypeError, InvalidValueError, RunError, nearest
from mlkit_kernels._build import cpu_kernel_failure, load_cpu_kernel

__all__ = ["BACKENDS", "available_backends", "cpp_ops", "resolve", "triton_kernels"]

BACKENDS = ("auto", "cpp", "triton", "reference")

_FOLDER = Path(__file__).parent
_SOURCES = (_FOLDER / "cpu.cpp",)
_HEADERS = (*sorted(_FOLDER.glob("cpu_*.h")), _FOLDER.parent / "sparse_mlp" / "cpu_vector.h")
_CPP_TYPES = (torch.float32, torch.bfloat16)
_MOST_CHUNKS = 8


@functools.cache
def cpp_ops() -> Any:
    """Return the namespace of the compiled ops, or None."""
    return torch.ops.mlkit if load_cpu_kernel("dynamic_embedding", _SOURCES, _HEADERS) else None


def _triton_refusal(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on `device`, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"it needs tensors on a CUDA device, got {device} (or TRITON_INTERPRET=1 for tests)"
    try:
        triton_kernels()
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    return None


def triton_kernels() -> Any:
    """Return the module of the Triton kernels; ImportError where there is no Triton."""
    return importlib.import_module("mlkit_kernels.dynamic_embedding.triton")


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Return the backends that run for tensors on `device`, the fastest first.

    This builds the C++ kernels if that has not happened yet.

    Example:
        >>> available_backends("meta")
        ('reference',)
    """
    device = torch.device(device)
    if device.type == "cpu" and cpp_ops() is not None:
        return ("cpp", "reference")
    if device.type == "cuda" and _triton_refusal(device) is None:
        return ("triton", "reference")
    return ("reference",)


def resolve(backend: str, header: Tensor, num_chunks: int, *numbers: Tensor) -> str:
    """Return the backend that runs; the first of `numbers` is the pool, the rest are states."""
    fits = num_chunks <= _MOST_CHUNKS and all(
        t.dtype is torch.float32 or (i == 0 and t.dtype in _CPP_TYPES)
        for i, t in enumerate(numbers)
    )
    if backend == "auto":
        if header.is_cpu:
            return "cpp" if fits and cpp_ops() is not None else "reference"
        taken = fits and header.is_cuda and _triton_refusal(header.device) is None
        return "triton" if taken else "reference"
    if backend == "reference":
        return backend
    if backend not in BACKENDS:
        raise InvalidValueError(
            f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; "
            f"{nearest(backend, BACKENDS)}"
        )
    if not fits:
        got = ", ".join(str(t.dtype) for t in numbers)
        raise InvalidTypeError(
            f"backend={backend!r} takes a pool of float32 or bfloat16, states of float32 and up to "
            f"{_MOST_CHUNKS} chunks; got {got} and {num_chunks} chunks. Use backend='reference'."
        )
    if backend == "cpp":
        if not header.is_cpu:
            raise InvalidValueError(
                f"backend='cpp' needs CPU tensors, got {header.device}; use backend='auto'."
            )
        if cpp_ops() is None:
            raise RunError(
                f"backend='cpp' cannot run: {cpu_kernel_failure('dynamic_embedding')}. "
                "Use backend='auto' or 'reference'."
            )
        return backend
    refusal = _triton_refusal(header.device)
    if refusal is not None:
        raise RunError(f"backend='triton' cannot run: {refusal}. Use backend='auto'.")
    return backend
