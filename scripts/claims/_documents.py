"""Write `docs/RESULTS.md` and the README's block from the stored results, and from nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlkit.report import Table
from scripts.bench import cells, number
from scripts.benchmarks._harness import Row
from scripts.claims._claim import Claim, Figure

__all__ = ["render"]

START, END = "<!-- results:start -->", "<!-- results:end -->"

Stored = Mapping[str, Any]

_HEAD = """\
# Results

Written by `python scripts/reproduce.py --render` from the files in `docs/results/`; edits are lost.
Paper's figures marked *from memory* come from tables that could not be read again."""


def render(root: Path, claims: Sequence[Claim]) -> list[Path]:
    """Rewrite the documents below `root`.

    Args:
        root: Holds `docs/results/`, and perhaps a `README.md` with the two markers.
        claims: In the order in which they appear.

    Returns:
        The files that were written.
    """
    folder = root / "docs" / "results"
    stored = {c.name: _read(folder / f"{c.name}.json") for c in claims}
    benches = [json.loads(path.read_text()) for path in sorted(folder.glob("bench-*.json"))]
    parts = [_HEAD, "## Claims", _claims_table(claims, stored).markdown()]
    parts += [part for claim in claims for part in _section(claim, stored[claim.name])]
    parts += [part for bench in benches for part in _bench_section(bench)]
    written = [root / "docs" / "RESULTS.md"]
    _write(written[0], "\n\n".join(parts) + "\n")
    readme = root / "README.md"
    if readme.is_file():
        text = readme.read_text()
        if START in text and END in text:
            before, _, rest = text.partition(START)
            after = rest.partition(END)[2]
            block = "\n\n".join([START, *_summary(claims, stored, benches), END])
            _write(readme, before + block + after)
            written.append(readme)
    return written


def _read(path: Path) -> Stored | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


# --------------------------------------------------------------------------------------- claims


def _claims_table(claims: Sequence[Claim], stored: Mapping[str, Stored | None]) -> Table:
    columns = ["claim", "paper's figure", "ours", "data", "seeds and interval", "verdict"]
    rows = []
    for claim in claims:
        result = stored[claim.name]
        for figure in claim.paper:
            what = f"{figure.what} ({claim.name})"
            if result is None:
                rows.append([what, figure.paper, "", claim.needs_data or "", "", _absent(claim)])
            else:
                rows.append([what, figure.paper, *_measured(figure, result)])
    return Table("", columns, rows)


def _measured(figure: Figure, result: Stored) -> list[str]:
    """Ours, data, seeds and interval, verdict."""
    metrics, data = result["metrics"], result["data"].partition(" (")[0]
    count, interval = len(result["seeds"]), figure.interval(metrics)
    seeds = f"{count} seed" if count == 1 else f"{count} seeds"
    if interval is not None:
        seeds += f", 95 %: {figure.text(interval[0])} to {figure.text(interval[1])}"
    value = figure.value(metrics)
    return [
        "" if value is None else f"{figure.text(value)} {figure.unit}",
        data,
        seeds,
        figure.verdict(metrics),
    ]


def _absent(claim: Claim) -> str:
    if claim.is_heavy:
        return "not run here: needs your own copy of the data and a GPU"
    return "not run yet"


def _section(claim: Claim, result: Stored | None) -> list[str]:
    heading = f"## {claim.name}\n\n{claim.title}."
    if result is None:
        flag = " --all" if claim.is_heavy else ""
        return [f"{heading} {_sentence(_absent(claim))}"
                f" Command: `python scripts/reproduce.py {claim.name}{flag}`."]  # fmt: skip
    parts = [heading, claim.verdict(result["metrics"])]
    if claim.table is not None:
        table = claim.table(result["metrics"])
        parts += [f"{table.title}:", table.markdown()]
    facts = [[key, str(value)] for key, value in result["facts"].items()]
    run = [
        ["command", f"`{result['command']}`"],
        *facts,
        ["hardware", _hardware(result["hardware"])],
        ["versions", _versions(result)],
        ["stored", f"{result['date']}, [{claim.name}.json](results/{claim.name}.json)"],
    ]
    return [*parts, Table("", ["what was run", ""], run).markdown()]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _hardware(found: Mapping[str, Any]) -> str:
    words = [found["cpu"], f"{found['cores']} cores", f"{found['memory_gib']} GiB"]
    return ", ".join([*words, *([found["gpu"]] if "gpu" in found else [])])


def _versions(result: Stored) -> str:
    return (
        f"mlkit {result['mlkit']}, torch {result['torch']}, commit {result['commit'] or 'unknown'}"
    )


# ----------------------------------------------------------------------------------- benchmarks


def _bench_section(bench: Stored) -> list[str]:
    subject = bench["subject"]
    warning = ["**Tiny sizes (`--quick`): no measurement.**"] if bench.get("quick") else []
    columns = ["case", "metric", "mlkit", "peer", "peer's", "ratio", "limit", "limit ratio"]
    rows = [_escaped(cells(Row(**row))) for row in bench["rows"]]
    return [
        f"## Benchmark {subject}",
        *warning,
        "Medians with the 20th and 80th percentile; a ratio above 1 means that mlkit is better; a "
        "limit ratio of 1 or more means that a target is met, or is the share of a physical bound. "
        f"Command: `python scripts/bench.py {subject}`, {bench.get('threads', 1)} thread(s); "
        f"{_hardware(bench['hardware'])}; {_versions(bench)}; {bench['date']}; "
        f"[bench-{subject}.json](results/bench-{subject}.json).",
        Table("", columns, rows).markdown(),
    ]


def _escaped(row: Sequence[str]) -> list[str]:
    return [re.sub(r"([|\[\]])", r"\\\1", cell) for cell in row]


# --------------------------------------------------------------------------------------- README


def _summary(
    claims: Sequence[Claim], stored: Mapping[str, Stored | None], benches: Sequence[Stored]
) -> list[str]:
    """The headline figures and what was measured against peers, in two short tables."""
    rows = []
    for claim in claims:
        result = stored[claim.name]
        if result is None:
            continue
        for figure in (f for f in claim.paper if f.is_headline):
            ours, _, seeds, verdict = _measured(figure, result)
            rows.append([figure.what, figure.paper, ours, f"{claim.name}, {seeds}", verdict])
    parts = []
    if rows:
        columns = ["claim", "paper's figure", "ours", "run", "verdict"]
        parts.append(Table("", columns, rows).markdown())
    peers = [
        [row["case"], row["metric"], f"{number(row['value'])} {row['unit']}", row["peer"],
         number(row["peer_value"]), number(row["ratio"])]
        for bench in benches if not bench.get("quick")
        for row in bench["rows"] if row["ratio"] is not None and not row.get("is_detail")
    ]  # fmt: skip
    if peers:
        columns = ["measured", "metric", "mlkit", "peer", "peer's", "ratio"]
        parts.append(Table("", columns, [_escaped(row) for row in peers]).markdown())
    source = (
        "All figures, their data, seeds, hardware and commands: [docs/RESULTS.md](docs/RESULTS.md)."
    )
    return [*parts, source if parts else "Nothing has been measured yet."]
