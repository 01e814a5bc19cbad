"""Run the recipes behind the papers' claims and write `docs/RESULTS.md`.

Each claim runs in `outputs/reproduce/<claim>`: an interrupted one goes on where it stopped, a
finished one is read again (delete its folder to measure anew).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mlkit.data.offline import ENTRIES, data_root, require  # noqa: E402
from mlkit.errors import MissingDataError, RunError, nearest  # noqa: E402
from mlkit.report import write_json  # noqa: E402
from scripts.claims._claim import Claim, all_claims  # noqa: E402
from scripts.claims._documents import render  # noqa: E402
from scripts.provenance import now, provenance  # noqa: E402

__all__ = ["main", "reproduce"]

_TAIL = 40
"""Lines of a failed run's output that are shown again at the end."""


def main(
    argv: Sequence[str] | None = None,
    *,
    claims: Sequence[Claim] | None = None,
    clone: Path = ROOT,
    documents: Path = ROOT,
) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: Arguments; those of the process if None.
        claims: What can be reproduced; those of `scripts/claims` if None.
        clone: Where `train.py` is, and `outputs/`.
        documents: Where `docs/` and the README are.
    """
    parser = argparse.ArgumentParser(prog="reproduce.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="system", help="systems or claims; all if none")
    parser.add_argument(
        "--all", action="store_true", help="also what needs a GPU and your own data"
    )
    parser.add_argument("--list", action="store_true", help="print the claims")
    parser.add_argument("--render", action="store_true", help="only rewrite the documents")
    arguments = parser.parse_args(argv)
    every = all_claims() if claims is None else list(claims)
    known = [*dict.fromkeys(c.system for c in every), *(c.name for c in every)]
    for name in arguments.names:
        if name not in known:
            print(f"no system or claim {name!r}; {nearest(name, known)}", file=sys.stderr)
            print(f"known: {', '.join(known)}", file=sys.stderr)
            return 2
    chosen = [c for c in every if not arguments.names or {c.name, c.system} & set(arguments.names)]
    results = documents / "docs" / "results"
    if arguments.list:
        _print_list(chosen, results)
        return 0
    failed: list[str] = []
    if not arguments.render:
        stored, failed = _run_all(chosen, arguments.all, clone, results)
        if failed and not stored:
            return 1
    for path in render(documents, every):
        print(f"wrote {path.relative_to(documents)}")
    return 1 if failed else 0


def _print_list(claims: Sequence[Claim], results: Path) -> None:
    for claim in claims:
        state = "stored" if (results / f"{claim.name}.json").is_file() else "no result yet"
        reason = _why_not(claim, run_heavy=False)
        print(f"{claim.name} [{state}]: {claim.title}" + (f"\n  {reason}" if reason else ""))


def _run_all(
    claims: Sequence[Claim], run_heavy: bool, clone: Path, results: Path
) -> tuple[list[str], list[str]]:
    """Run what can be run here; return the names of what was stored and of what failed."""
    stored, failed = [], []
    for claim in claims:
        reason = _why_not(claim, run_heavy=run_heavy)
        if reason:
            print(f"{claim.name}: {reason}")
            continue
        print(f"{claim.name}: python {' '.join(claim.arguments)}", flush=True)
        try:
            write_json(results / f"{claim.name}.json", reproduce(claim, clone))
        except RunError as error:
            print(f"{claim.name} failed; its stored result is as before.\n{error}", file=sys.stderr)
            failed.append(claim.name)
        else:
            stored.append(claim.name)
    return stored, failed


def _why_not(claim: Claim, *, run_heavy: bool) -> str | None:
    """Why a claim cannot run here, None if it can."""
    if claim.is_heavy and not run_heavy:
        return "not run here: needs your own copy of the data and a GPU (then: --all)"
    if claim.needs_data is None:
        return None
    try:
        if claim.needs_data in ENTRIES:
            require(claim.needs_data)
        elif not (data_root() / claim.needs_data).is_dir():
            return f"not run here: put your copy of {claim.needs_data} into $MLKIT_DATA"
    except MissingDataError as error:
        return f"not run here: {error}"
    return None


def reproduce(claim: Claim, clone: Path = ROOT) -> dict[str, Any]:
    """Run a claim's recipe, or go on with it, and return what is stored of it.

    Raises:
        RunError: With the end of its output, if the run fails.
    """
    started = now()
    began = time.perf_counter()
    _run(claim.arguments, clone)
    directory = clone / claim.run_directory
    metrics = json.loads((directory / "metrics.json").read_text())
    facts = read_facts((directory / "report.md").read_text())
    units = [json.loads(p.read_text()) for p in sorted((directory / "units").rglob("*.json"))]
    seconds = sum(unit.get("seconds", 0) for unit in units) or time.perf_counter() - began
    return {
        "claim": claim.name,
        "system": claim.system,
        "title": claim.title,
        "command": " ".join(["python", *claim.arguments]),
        "data": facts.get("data", ""),
        "seeds": [int(seed) for seed in re.findall(r"-?\d+", facts.get("seeds", "").split("(")[0])],
        "seconds": round(seconds, 1),
        "facts": facts,
        **provenance(),
        **_state_at_start(directory / "run.json", started),
        "metrics": metrics,
    }


def _run(arguments: Sequence[str], clone: Path) -> None:
    """Run `train.py`, its output passed on as it comes."""
    tail: deque[str] = deque(maxlen=_TAIL)
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            tail.append(line)
    if process.returncode:
        raise RunError(
            f"`python {' '.join(arguments)}` ended with exit status {process.returncode}; the end "
            f"of its output:\n{''.join(tail).rstrip()}"
        )


def read_facts(report: str) -> dict[str, str]:
    """The table "What was run" of a `report.md`."""
    section = report.partition("## What was run")[2]
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", section, flags=re.MULTILINE)
    return {key: value for key, value in rows if key not in ("what", "---")}


def _state_at_start(path: Path, started: datetime) -> dict[str, Any]:
    """Version, commit and day of a run that had been finished before; nothing of a fresh one."""
    if not path.is_file():
        return {}
    state = json.loads(path.read_text())
    began = datetime.fromisoformat(state["started"])
    if began >= started.replace(microsecond=0):
        return {}
    git = state.get("git") or {}
    commit = git.get("commit", "")[:12] if git.get("commit") not in (None, "", "HEAD") else None
    return {"mlkit": state["mlkit"], "commit": commit, "date": began.date().isoformat()}


if __name__ == "__main__":
    sys.exit(main())
