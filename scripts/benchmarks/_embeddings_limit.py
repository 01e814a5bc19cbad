"""The physical bound of a step: every line of memory that it changes comes once and goes once.

Measured on the machine by a loop in C that changes rows of a large array at random, far ahead of
which it prefetches, and by a plain copy. Rows of the batch before count as cached, and so does what
the backward pass finds again of the forward pass.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlkit.embeddings.fiited.pages import ask_for_large_pages
from scripts.benchmarks._embeddings_case import Case, batches
from scripts.benchmarks._harness import alternate, calling

__all__ = ["bound_ms", "measure"]

_LINE = 64
_CHUNKS = 4
_MOST_LINES = 4
_SOURCE = Path(__file__).with_suffix(".c")


@functools.cache
def _library() -> Any:
    """The compiled loop, or None without a compiler of C."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "limit.so"
        command = [compiler, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(target)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        return ctypes.CDLL(str(target))


def measure(size: int, accesses: int, repeats: int) -> dict[str, float]:
    """Time rows of 1 to 4 lines at random in memory of `size` bytes, in this process.

    Returns:
        "read_<lines>" and "write_<lines>": seconds for such a row, the least of all repeats;
        "byte": for a byte that is copied, read and written counted. Empty without a compiler.
    """
    library = _library()
    if library is None:
        return {}
    memory = torch.empty(size, dtype=torch.uint8)
    ask_for_large_pages(memory)
    memory.fill_(1)
    found = {}
    for lines in range(1, _MOST_LINES + 1):
        for write, name in enumerate(("read", "write")):
            taken = []
            for _ in range(repeats):
                rows = torch.randint(size // (lines * _LINE), (accesses,))
                started = time.process_time()
                library.walk(
                    ctypes.c_void_p(memory.data_ptr()), ctypes.c_void_p(rows.data_ptr()),
                    ctypes.c_int64(accesses), ctypes.c_int64(lines), ctypes.c_int64(write),
                )  # fmt: skip
                taken.append(time.process_time() - started)
            found[f"{name}_{lines}"] = min(taken) / accesses
    half = size // 2
    copied = alternate({"": calling(memory[:half].copy_, memory[half : 2 * half])}, repeats)
    found["byte"] = min(copied[""]) / size
    return found


def bound_ms(
    speeds: Mapping[str, float], case: Case, density: float, ids: str, *, update: bool
) -> float | None:
    """Milliseconds of a step, or of a forward pass; None where nothing was measured.

    A header is one line, a row's chunks lie together, each resident with probability `density`; the
    output is written, the gradient read.
    """
    if not speeds:
        return None
    kind = "write" if update else "read"
    chunk = 4 * case.dim / _CHUNKS
    row = speeds[f"{kind}_1"]
    for count in range(1, _CHUNKS + 1):
        share = math.comb(_CHUNKS, count) * density**count * (1 - density) ** (_CHUNKS - count)
        lines = math.ceil(count * chunk / _LINE)
        row += share * speeds[f"{kind}_{min(lines, _MOST_LINES)}"] * max(lines / _MOST_LINES, 1)
    lookups = case.tables * case.batch
    streamed = lookups * (8 + 4 * case.dim) * (2 if update else 1)
    return 1e3 * (_new_rows(case, ids) * row + streamed * speeds["byte"])


@functools.cache
def _new_rows(case: Case, ids: str) -> int:
    """Rows of a batch that are not in the batch before, a sample of it."""
    before, now = (
        batch.view(case.tables, -1) + case.rows * torch.arange(case.tables).unsqueeze(1)
        for batch in batches(case, ids, 2)
    )
    new = torch.unique(now)
    return int((~torch.isin(new, before.flatten())).sum())
