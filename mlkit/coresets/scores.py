"""Importance scores: one array with its direction, and the table of all that a run recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from mlkit.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingDataError,
    UnknownNameError,
    nearest,
)

if TYPE_CHECKING:
    import datasets

__all__ = ["HARD_SIDE", "RECORDED", "ArrayScore", "Hard", "ScoreTable"]

Hard = Literal["low", "high"]

RECORDED = (
    "aum", "forgetting", "correctness", "confidence", "variability", "el2n", "grand",
    "dual", "dyn_unc", "tdds", "entropy", "loss",
)  # fmt: skip
"""Scores that a `DynamicsRecorder` can record."""

HARD_SIDE: dict[str, Hard] = {
    "aum": "low",
    "forgetting": "high",
    "el2n": "high",
    "entropy": "high",
    "loss": "high",
    "grand": "high",
    "dual": "high",
    "dyn_unc": "high",
    "tdds": "high",
    "cal": "high",
    "correctness": "low",
    "confidence": "low",
    "variability": "high",
}
"""Which side of each known score is the hard one."""


@dataclass(frozen=True, eq=False)
class ArrayScore:
    """One score per example, and which side of it is hard.

    Args:
        values: Float array, one number per example.
        hard: "low" if a low score means a hard example (AUM), "high" if a high one does (EL2N).
        name: For reports.
        unseen: True where the run visited the example too rarely for a score, or never.
        space: "prob" or "logit" for margins; equal-width strata differ between them.

    Example:
        >>> ArrayScore(np.array([0.1, 0.9]), hard="high", name="mine").values
        array([0.1, 0.9])
    """

    values: Float[np.ndarray, " n"]
    hard: Hard
    name: str = "score"
    unseen: Bool[np.ndarray, " n"] | None = None
    space: str | None = None

    def __post_init__(self) -> None:
        if self.hard not in ("low", "high"):
            raise InvalidValueError(
                f"hard must be 'low' or 'high', got {self.hard!r}: the side of the score on which "
                "the hard examples lie (AUM 'low'; EL2N, forgetting, entropy 'high')"
            )

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def hardness(self) -> Float[np.ndarray, " n"]:
        """The values, turned if need be so that higher is harder."""
        return self.values if self.hard == "high" else -self.values


class ScoreTable(Mapping[str, ArrayScore]):
    """The scores that one training run gave to every example; `table["aum"]` is an `ArrayScore`.

    Args:
        scores: Name to float array, all of one length; NaN where the run visited the example
            too rarely for that score, or never.
        targets: Label of each example, -1 where the run never saw it.
        visits: How often each example was visited.
        meta: What else a reader must know (the space of the margin, windows, epochs, seed);
            anything JSON can hold.
        hard: Hard side of scores that `HARD_SIDE` does not know.
    """

    def __init__(
        self,
        scores: Mapping[str, np.ndarray],
        *,
        targets: np.ndarray | None = None,
        visits: np.ndarray | None = None,
        meta: Mapping[str, Any] | None = None,
        hard: Mapping[str, Hard] | None = None,
    ) -> None:
        self._scores = {k: np.asarray(v, dtype=np.float32) for k, v in scores.items()}
        self.targets = None if targets is None else np.asarray(targets)
        self.visits = None if visits is None else np.asarray(visits)
        self.meta: dict[str, Any] = dict(meta or {})
        self.hard: dict[str, Hard] = {**HARD_SIDE, **(hard or {})}
        lengths = {k: len(v) for k, v in self._scores.items()}
        for name, extra in (("targets", self.targets), ("visits", self.visits)):
            if extra is not None:
                lengths[name] = len(extra)
        if not self._scores or len(set(lengths.values())) > 1:
            raise InvalidValueError(
                f"a ScoreTable needs at least one score and columns of one length, got {lengths}"
            )
        unknown = sorted(set(self._scores) - set(self.hard))
        if unknown:
            raise InvalidValueError(
                f"which side of {unknown} is hard? pass hard={{{unknown[0]!r}: 'low' or 'high'}}"
            )

    @property
    def num_samples(self) -> int:
        """Number of rows."""
        return len(next(iter(self._scores.values())))

    def __getitem__(self, name: str) -> ArrayScore:
        if name not in self._scores:
            raise UnknownNameError(f"no score {name!r} here; {nearest(name, self._scores)}")
        values = self._scores[name]
        space = self.meta.get("space") if name == "aum" else None
        return ArrayScore(values, self.hard[name], name, np.isnan(values), space)

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        return f"ScoreTable({self.num_samples} examples: {', '.join(self._scores)})"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        path = Path(path)
        tensors = {f"score/{k}": v for k, v in self._scores.items()}
        extras = {"targets": self.targets, "visits": self.visits}
        tensors |= {name: rows for name, rows in extras.items() if rows is not None}
        header = {"meta": self.meta, "hard": {k: self.hard[k] for k in self._scores}}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()},
            partial,
            metadata={"mlkit": json.dumps(header)},
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> ScoreTable:
        """Read what `save` wrote.

        Raises:
            MissingDataError: If there is no such file.
            InvalidValueError: If the file is not a ScoreTable.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise MissingDataError(
                f"no score table at {path}; write one with ScoreTable.save, or by "
                "`python train.py recipe=ccs ccs.stage=score`"
            )
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})["mlkit"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no iterator)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise InvalidValueError(f"{path} is not a ScoreTable file: {error}") from error
        return cls(
            {k.removeprefix("score/"): v for k, v in tensors.items() if k.startswith("score/")},
            targets=tensors.get("targets"),
            visits=tensors.get("visits"),
            meta=header["meta"],
            hard=header["hard"],
        )

    def to_hf(self, dataset: datasets.Dataset, prefix: str = "score_") -> datasets.Dataset:
        """Return the Hugging Face data set with one column `<prefix><name>` per score."""
        if len(dataset) != self.num_samples:
            raise InvalidValueError(
                f"the table has {self.num_samples} rows and the data set {len(dataset)}; "
                "score the same split that you annotate"
            )
        present = {prefix + name for name in self._scores} & set(dataset.column_names)
        if present:
            raise InvalidValueError(
                f"the data set has the columns {sorted(present)} already; remove them with "
                "remove_columns, or pass another prefix"
            )
        for name, values in self._scores.items():
            dataset = dataset.add_column(prefix + name, values)
        return dataset

    @classmethod
    def from_hf(
        cls,
        dataset: datasets.Dataset,
        prefix: str = "score_",
        hard: Mapping[str, Hard] | None = None,
    ) -> ScoreTable:
        """Read the columns `<prefix><name>` of a Hugging Face data set."""
        names = [c for c in dataset.column_names if c.startswith(prefix)]
        if not names:
            raise InvalidValueError(
                f"no column begins with {prefix!r}; the data set has {dataset.column_names}"
            )
        columns = {c.removeprefix(prefix): np.asarray(dataset[c][:], np.float32) for c in names}
        return cls(columns, hard=hard)

    @classmethod
    def mean(cls, tables: Sequence[ScoreTable]) -> ScoreTable:
        """Average several runs (EL2N and GraNd are defined as expectations over initialisations).

        Raises:
            InvalidValueError: If the tables differ in their scores or rows.
        """
        if not tables or any(not isinstance(t, ScoreTable) for t in tables):
            raise InvalidTypeError(f"expected a non-empty sequence of ScoreTable, got {tables!r}")
        first = tables[0]
        for other in tables[1:]:
            if list(other) != list(first) or other.num_samples != first.num_samples:
                raise InvalidValueError(f"cannot average {first} with {other}: columns differ")
        visits = [t.visits for t in tables if t.visits is not None]
        return cls(
            {k: np.stack([t[k].values for t in tables]).mean(axis=0) for k in first},
            targets=first.targets,
            visits=np.min(visits, axis=0) if len(visits) == len(tables) else None,
            meta={**first.meta, "runs": len(tables)},
            hard={k: first.hard[k] for k in first},
        )
