"""What a stored number carries with it: the machine, the versions, the commit, the day."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlkit

__all__ = ["ROOT", "commit", "hardware", "now", "provenance"]

ROOT = Path(__file__).resolve().parent.parent

_CODE = ("mlkit", "kernels", "recipes", "conf", "scripts", "train.py")
"""What decides a number; a changed document does not."""


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit and date, as stored beside a result."""
    import torch

    return {
        "hardware": hardware(),
        "torch": str(torch.__version__),
        "mlkit": mlkit.__version__,
        "commit": commit(),
        "date": now().date().isoformat(),
    }


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory in GiB, and the GPU if there is one."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the clone, marked if its code has been changed since; None outside a clone."""
    head = _git("rev-parse", "--verify", "--quiet", "--short=12", "HEAD")
    if not head:
        return None
    return f"{head} (changed)" if _git("status", "--porcelain", "--", *_CODE) else head


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
