"""What every selector shares: what it may look at, what it gives back, and its checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Integer

from mlkit.coresets.counts import check_fraction, num_selected
from mlkit.coresets.scores import ArrayScore, Hard
from mlkit.errors import InvalidTypeError, InvalidValueError

__all__ = ["Pool", "Selection", "Selector", "Unseen"]

Unseen = Literal["error", "hard", "easy", "drop"]


@dataclass(frozen=True, eq=False)
class Pool:
    """The examples a selector chooses from, and what is known of each.

    Every array has a row per example of the full data set; `candidates` says which of them are
    still in play. Counts (`prune_rate`, cutoffs) always refer to the full data set.

    Args:
        num_samples: Size of the full data set.
        candidates: Ascending positions still in play; None means all.
        scores: Importance, with its hard side.
        cutoff_scores: Another score to cut the hardest by; None means `scores`.
        labels: Class of each example.
        features: Embedding of each example.
        ids: Identity for keyed randomness; None means the position.
        confidence: Mean probability of the label over training, in [0, 1].
    """

    num_samples: int
    candidates: Int[np.ndarray, " c"] | None = None
    scores: ArrayScore | None = None
    cutoff_scores: ArrayScore | None = None
    labels: Integer[np.ndarray, " n"] | None = None
    features: Float[np.ndarray, "n d"] | None = None
    ids: Integer[np.ndarray, " n"] | None = None
    confidence: Float[np.ndarray, " n"] | None = None

    def positions(self) -> Int[np.ndarray, " c"]:
        """Positions still in play, ascending."""
        return np.arange(self.num_samples) if self.candidates is None else self.candidates

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The candidates' part of a per-example array (the array itself when all are in play)."""
        return rows if self.candidates is None else rows[self.candidates]

    def candidate_ids(self) -> Integer[np.ndarray, " c"] | None:
        """Identities of the candidates; None while they are the positions themselves."""
        if self.ids is not None:
            return self.of(self.ids)
        return self.candidates

    def restrict(self, candidates: Int[np.ndarray, " c"]) -> Pool:
        """The same pool with fewer candidates."""
        return dataclasses.replace(self, candidates=candidates)

    def needs(self, what: str, asker: object) -> Any:
        """Return the array `what`, or raise saying who needs it."""
        rows = getattr(self, what)
        if rows is None:
            raise InvalidValueError(
                f"{type(asker).__name__} needs {what}: pass {what}=... to select()"
            )
        return rows


@dataclass(frozen=True, eq=False)
class Selection:
    """A chosen subset and the account of how it was chosen.

    Args:
        indices: Chosen positions, ascending, int64: ready for `torch.utils.data.Subset` and
            `datasets.Dataset.select`.
        report: JSON-ready account: settings, counts, strata, classes, what was cut, a hash.
    """

    indices: Int[np.ndarray, " m"]
    report: dict[str, Any]

    def __len__(self) -> int:
        return len(self.indices)

    def explain(self) -> str:
        """The report as lines of text, one decision each."""
        lines = []
        for key, value in self.report.items():
            if key == "strata":
                lines.append(f"strata: {len(value)} non-empty")
                lines += [
                    f"  [{s['low']:.6g}, {s['high']:.6g}]"
                    + (f" class {s['class']}" if "class" in s else "")
                    + f": {s['budget']} of {s['population']}"
                    for s in value
                ]
            else:
                lines.append(f"{key}: {value}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file holding the indices and the report, whole or not at all."""
        from safetensors.numpy import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file({"indices": self.indices}, partial, metadata={"mlkit": json.dumps(self.report)})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote.

        Raises:
            InvalidValueError: If the file is not a Selection or was altered.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                report = json.loads((file.metadata() or {})["mlkit"])
                indices = file.get_tensor("indices")
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise InvalidValueError(f"{path} is not a Selection file: {error}") from error
        if fingerprint(indices) != report.get("hash"):
            raise InvalidValueError(f"{path}: the indices do not match the hash in its report")
        return cls(indices, report)


def as_integer(name: str, value: Any) -> int:
    """Return any kind of integer as an int.

    Raises:
        InvalidValueError: If it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidValueError(f"{name} must be an integer, got {value!r}") from None


def fingerprint(indices: Int[np.ndarray, " m"]) -> str:
    """Sixteen hex digits of the SHA-256 of the indices (little-endian int64)."""
    return hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").data).hexdigest()[:16]


@dataclass(kw_only=True)
class Selector(ABC):
    """A rule that maps what is known of the examples to the subset worth training on.

    A selector is a decision: deterministic in its arguments and `seed`, and independent of the
    order of the data when `ids` are given.

    Args:
        prune_rate: Fraction of the full data set to leave out, in [0, 1); the coreset has
            floor((1 - prune_rate) * N) examples, exactly.
        seed: Key of every random choice.
    """

    prune_rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("prune_rate", self.prune_rate, below_one=True)
        self.seed = as_integer("seed", self.seed)

    @abstractmethod
    def _choose(self, pool: Pool) -> tuple[Int[np.ndarray, " m"], dict[str, Any]]:
        """Return the chosen positions, ascending, and what the report should say besides."""

    def budget(self, pool: Pool) -> int:
        """How many examples to choose.

        Raises:
            InvalidValueError: If fewer are still in play.
        """
        wanted = num_selected(pool.num_samples, self.prune_rate)
        available = pool.num_samples if pool.candidates is None else len(pool.candidates)
        if wanted > available:
            raise InvalidValueError(
                f"prune_rate={self.prune_rate} asks for {wanted} examples and only {available} of "
                f"{pool.num_samples} are left to choose from; raise prune_rate or filter less"
            )
        return wanted

    def select(
        self,
        scores: Any = None,
        *,
        hard: Hard | None = None,
        cutoff_scores: ArrayScore | None = None,
        labels: Any = None,
        features: Any = None,
        ids: Any = None,
        confidence: Any = None,
        num_samples: int | None = None,
        unseen: Unseen = "error",
    ) -> Selection:
        """Choose the coreset.

        Args:
            scores: Importance of each example: a column of a `ScoreTable`, an `ArrayScore`, or any
                array together with `hard`.
            hard: Side of a plain array on which the hard examples lie.
            cutoff_scores: Score that decides the hardest when it is not `scores`.
            labels: Class of each example, integers.
            features: Embedding of each example, (N, d).
            ids: Integer identity of each example for keyed randomness; its position if None.
            confidence: Mean probability of the label of each example over training, in [0, 1]: an
                array or the column "confidence" of a `ScoreTable`.
            num_samples: Size of the data set, where nothing else tells it.
            unseen: What to do with examples the scoring run never visited: "error", count them as
                "hard" or "easy", or "drop" them from the choice.

        Returns:
            The chosen positions and the report.

        Raises:
            InvalidValueError: For NaN scores, lengths that differ, a missing input, a coreset that
                is larger than what is left.
            InvalidTypeError: For a data set that has no length.
        """
        pool = _pool(
            scores, hard, cutoff_scores, labels, features, ids, num_samples, unseen, confidence
        )
        indices, details = self._choose(pool)
        report: dict[str, Any] = {
            "selector": type(self).__name__,
            "settings": self.state_dict(),
            "num_samples": pool.num_samples,
            "num_selected": len(indices),
            "prune_rate": self.prune_rate,
        }
        if pool.scores is not None:
            report["score"] = {"name": pool.scores.name, "hard": pool.scores.hard}
            if pool.scores.space is not None:
                report["score"]["space"] = pool.scores.space
        report |= details
        if pool.labels is not None:
            classes, counts = np.unique(pool.labels[indices], return_counts=True)
            report["class_histogram"] = {
                str(c): int(k) for c, k in zip(classes, counts, strict=True)
            }
        report["hash"] = fingerprint(indices)
        return Selection(indices, report)

    def state_dict(self) -> dict[str, Any]:
        """The settings, JSON-ready."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the settings of another selector of the same class."""
        type(self)(**state)
        for name, value in state.items():
            setattr(self, name, value)


def _pool(
    scores: Any,
    hard: Hard | None,
    cutoff_scores: ArrayScore | None,
    labels: Any,
    features: Any,
    ids: Any,
    num_samples: int | None,
    unseen: Unseen,
    confidence: Any = None,
) -> Pool:
    """Check every input of `select` and gather them."""
    score = None if scores is None else _as_score(scores, hard)
    cut = None if cutoff_scores is None else _as_score(cutoff_scores, None)
    labels = _rows("labels", labels, np.integer)
    features = _rows("features", features, np.floating, ndim=2)
    ids = _rows("ids", ids, np.integer)
    if isinstance(confidence, ArrayScore):
        confidence = _without_unseen(confidence, unseen)[0].values
    confidence = _rows("confidence", confidence, np.floating)
    named = {
        "scores": score,
        "cutoff_scores": cut,
        "labels": labels,
        "features": features,
        "ids": ids,
        "confidence": confidence,
    }
    lengths = {k: len(v) for k, v in named.items() if v is not None}
    if num_samples is not None:
        lengths["num_samples"] = int(num_samples)
    if not lengths:
        raise InvalidValueError("nothing to choose from: pass scores, features or num_samples=...")
    if len(set(lengths.values())) > 1:
        raise InvalidValueError(
            f"lengths differ: {lengths}; every array needs one row per example of the data set"
        )
    size = next(iter(lengths.values()))
    if size == 0:
        raise InvalidValueError("nothing to choose from: the data set is empty")
    candidates = None
    if score is not None:
        score, candidates = _without_unseen(score, unseen)
    if cut is not None:
        cut, scored = _without_unseen(cut, unseen)
        if scored is not None:
            candidates = scored if candidates is None else np.intersect1d(candidates, scored)
    if confidence is not None:
        _check_probabilities(confidence, candidates)
    return Pool(size, candidates, score, cut, labels, features, ids, confidence)


def _check_probabilities(
    confidence: Float[np.ndarray, " n"], candidates: Int[np.ndarray, " c"] | None
) -> None:
    """Raise if a candidate's value is outside [0, 1] or NaN."""
    wrong = ~((confidence >= 0) & (confidence <= 1))
    if candidates is not None:
        wrong[np.setdiff1d(np.arange(len(wrong)), candidates, assume_unique=True)] = False
    if wrong.any():
        first = int(wrong.argmax())
        raise InvalidValueError(
            f"confidence must lie in [0, 1], got {int(wrong.sum())} values outside (first index "
            f"{first}: {confidence[first]}); it is the mean probability of the label"
        )


def _as_score(scores: Any, hard: Hard | None) -> ArrayScore:
    if isinstance(scores, ArrayScore):
        if hard is not None and hard != scores.hard:
            raise InvalidValueError(
                f"hard={hard!r} contradicts the score {scores.name!r}, whose hard side is "
                f"{scores.hard!r}; leave hard out"
            )
        return dataclasses.replace(scores, values=_rows("scores", scores.values, np.floating))
    if hard is None:
        raise InvalidValueError(
            "pass hard='low' or hard='high' with a plain array of scores: AUM is 'low', EL2N, "
            "forgetting and entropy are 'high' (a column of a ScoreTable knows its own)"
        )
    return ArrayScore(_rows("scores", scores, np.floating), hard)


def _rows(name: str, rows: Any, kind: Any, ndim: int = 1) -> Any:
    """Return `rows` as an array of the wanted kind and rank, without a copy where it is one."""
    if rows is None:
        return None
    if hasattr(rows, "__iter__") and not hasattr(rows, "__len__"):
        raise InvalidTypeError(
            f"{name} has no length ({type(rows).__name__}). A stream can be pruned in two passes: "
            "score it once keeping (id, score), choose ids with a selector on those arrays, then "
            "filter the second pass by id"
        )
    if hasattr(rows, "detach"):
        rows = rows.detach().cpu()
        rows = (rows.float() if rows.dtype.is_floating_point else rows).numpy()
    array = np.asarray(rows)
    if kind is np.floating and array.dtype.kind in "iub":
        array = array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
    if array.ndim != ndim or not np.issubdtype(array.dtype, kind):
        hint = "; np.unique(labels, return_inverse=True)[1] numbers any labels"
        raise InvalidValueError(
            f"{name} must be {ndim}-dimensional {kind.__name__} numbers, got shape {array.shape} "
            f"of {array.dtype}" + (hint if name == "labels" else "")
        )
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    return array


def _without_unseen(
    score: ArrayScore, unseen: Unseen
) -> tuple[ArrayScore, Int[np.ndarray, " c"] | None]:
    """Settle examples without a score, then refuse any NaN that is left."""
    if unseen not in ("error", "hard", "easy", "drop"):
        raise InvalidValueError(f"unseen must be 'error', 'hard', 'easy' or 'drop', got {unseen!r}")
    values, candidates = score.values, None
    missing = score.unseen
    if missing is not None and missing.any():
        if unseen == "error":
            raise InvalidValueError(
                f"{int(missing.sum())} of {len(values)} examples have no score {score.name!r} "
                f"(first index {int(missing.argmax())}): they were never visited, or less often "
                "than the score's window; train at least one whole epoch, or pass unseen='hard', "
                "'easy' or 'drop'"
            )
        seen = values[~missing]
        if not len(seen) and unseen == "drop":
            raise InvalidValueError(
                f"no example has a score {score.name!r}: train longer, or use a smaller window"
            )
        high = (unseen == "hard") == (score.hard == "high")
        values = values.copy()
        values[missing] = (seen.max() if high else seen.min()) if len(seen) else 0.0
        if unseen == "drop":
            candidates = np.flatnonzero(~missing)
    nan = np.isnan(values)
    if nan.any():
        raise InvalidValueError(
            f"{int(nan.sum())} of {len(values)} scores are NaN (first index {int(nan.argmax())}); "
            "leave these examples out or give them a score"
        )
    return dataclasses.replace(score, values=values), candidates
