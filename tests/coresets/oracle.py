"""Slow oracle for coverage-centric coreset selection: plain Python loops.

Nothing here is shared with the library: it was written from a description of the algorithm alone.
Decisions that the description left open are stated in the docstring of the function concerned.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Hard = Literal["low", "high"]
Numbers = Sequence[float] | npt.NDArray[np.generic]
Visit = tuple[int, int, Numbers, Numbers, int]
"""One visit of one example: (epoch, index, probs (C,), logits (C,), label)."""

MASK = 0xFFFFFFFFFFFFFFFF
CUT_KEY = 0x6375746F6666
"""The ASCII bytes of "cutoff"; XORed into the seed where ties at the cutoff are broken."""


class Selection(TypedDict):
    """What one run of CCS kept and dropped; strata are in ascending score order."""

    indices: list[int]
    budgets: list[int]
    populations: list[int]
    low: float
    high: float
    cut: list[int]


class ClassBalancedSelection(TypedDict):
    """CCS-CP: the union over classes, and each class's own run in global indices."""

    indices: list[int]
    cut: list[int]
    quotas: dict[int, int]
    classes: dict[int, Selection]


# --------------------------------------------------------------------------------------------
# Hashing and counts
# --------------------------------------------------------------------------------------------


def splitmix64(x: int) -> int:
    """Return the splitmix64 output for state `x`, on 64-bit wrap-around arithmetic."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def keyed_hash(id: int, seed: int) -> int:
    """Return splitmix64((id mod 2^64) XOR splitmix64(seed mod 2^64)).

    For a fixed seed this is a bijection of 64-bit ids, so distinct ids never tie.
    """
    return splitmix64((id & MASK) ^ splitmix64(seed & MASK))


def num_kept(n: int, prune_rate: float) -> int:
    """Return floor((1 - prune_rate) * n), exact for the decimal that `prune_rate` prints as."""
    return math.floor((1 - Fraction(str(prune_rate))) * n)


def num_cut(n: int, cutoff: float) -> int:
    """Return floor(cutoff * n), exact for the decimal that `cutoff` prints as."""
    return math.floor(Fraction(str(cutoff)) * n)


# --------------------------------------------------------------------------------------------
# Budgets
# --------------------------------------------------------------------------------------------


def water_fill(populations: Sequence[int], m: int) -> list[int]:
    """Share `m` picks over the strata by CCS's budget loop.

    Strata are handled by ascending population, equal populations by ascending bin index. Each
    gets an equal share of what remains, at most its population. If `m` exceeds the total
    population, every stratum is taken whole.

    Args:
        populations: Members of each stratum.
        m: Number of examples to pick.

    Returns:
        The budget of each stratum, in the order of `populations`.
    """
    order = sorted(range(len(populations)), key=lambda b: (populations[b], b))
    budgets = [0] * len(populations)
    remaining = m
    for position, b in enumerate(order):
        not_handled = len(order) - position
        budgets[b] = min(populations[b], remaining // not_handled)
        remaining -= budgets[b]
    return budgets


def water_level(populations: Sequence[int], m: int) -> list[int]:
    """Share `m` picks by the closed form; agrees exactly with `water_fill`.

    The level t is the largest integer with sum(min(population, t)) <= m. Every stratum gets
    min(population, t), and the remainder goes one each to the largest strata, equal populations
    by descending bin index (they are the last that the loop handles).

    Args:
        populations: Members of each stratum.
        m: Number of examples to pick.

    Returns:
        The budget of each stratum, in the order of `populations`.
    """
    if m >= sum(populations):
        return list(populations)
    level = 0
    while sum(min(population, level + 1) for population in populations) <= m:
        level += 1
    budgets = [min(population, level) for population in populations]
    remainder = m - sum(budgets)
    largest_first = sorted(range(len(populations)), key=lambda b: (-populations[b], -b))
    for b in largest_first[:remainder]:
        budgets[b] += 1
    return budgets


# --------------------------------------------------------------------------------------------
# Selection
# --------------------------------------------------------------------------------------------


def _as_scores(values: Numbers, name: str) -> list[float]:
    """Round to float32 and return the values as Python floats (float64); refuse NaN."""
    rounded = np.asarray(values).astype(np.float32)
    if rounded.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {rounded.shape}")
    out = [float(value) for value in rounded]
    if any(math.isnan(value) for value in out):
        raise ValueError(f"{name} contains NaN")
    return out


def _check_rates(prune_rate: float, cutoff: float) -> None:
    """Refuse rates outside 0 <= cutoff <= prune_rate < 1."""
    alpha, beta = Fraction(str(prune_rate)), Fraction(str(cutoff))
    if not 0 <= alpha < 1:
        raise ValueError(f"prune_rate must be in [0, 1), got {prune_rate}")
    if not 0 <= beta <= alpha:
        raise ValueError(f"cutoff must be in [0, prune_rate], got {cutoff}")


def _split_hardest(
    scores: list[float], ids: list[int], count: int, hard: Hard, seed: int
) -> tuple[list[int], list[int]]:
    """Return (positions of the `count` hardest, positions of the rest), both ascending.

    Equal scores are removed in order of the smallest hash under the cutoff's own key; equal ids
    (the only way for hashes to tie) fall back to position.
    """
    if hard not in ("low", "high"):
        raise ValueError(f"hard must be 'low' or 'high', got {hard!r}")
    sign = 1.0 if hard == "low" else -1.0
    hardest_first = sorted(
        range(len(scores)),
        key=lambda i: (sign * scores[i], keyed_hash(ids[i], seed ^ CUT_KEY), i),
    )
    return sorted(hardest_first[:count]), sorted(hardest_first[count:])


def _score_range(values: list[float]) -> tuple[float, float]:
    """Return the smallest and largest finite value, or (nan, nan) if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    return min(finite), max(finite)


def _stratum(score: float, low: float, high: float, num_strata: int) -> int:
    """Return the equal-width bin of one score; the last bin is closed on the right.

    Infinite scores go to the end bins, and to bin 0 like all others if the width is zero.
    """
    width = (high - low) / num_strata
    if not width > 0:
        return 0
    if math.isinf(score):
        return 0 if score < 0 else num_strata - 1
    return min(num_strata - 1, math.floor((score - low) / width))


def _select(
    scores: list[float],
    cutoff_scores: list[float],
    ids: list[int],
    m: int,
    count_cut: int,
    num_strata: int,
    cutoff_hard: Hard,
    seed: int,
) -> Selection:
    """Cut, stratify, share the budget `m` and draw; the body of `ccs_select`."""
    cut, keep = _split_hardest(cutoff_scores, ids, count_cut, cutoff_hard, seed)
    low, high = _score_range([scores[i] for i in keep])
    members: list[list[int]] = [[] for _ in range(num_strata)]
    for i in keep:
        members[_stratum(scores[i], low, high, num_strata)].append(i)
    populations = [len(stratum) for stratum in members]
    budgets = water_fill(populations, m)
    picked: list[int] = []
    for stratum, budget in zip(members, budgets, strict=True):
        smallest_hash_first = sorted(stratum, key=lambda i: (keyed_hash(ids[i], seed), i))
        picked.extend(smallest_hash_first[:budget])
    return {
        "indices": sorted(picked),
        "budgets": budgets,
        "populations": populations,
        "low": low,
        "high": high,
        "cut": cut,
    }


def _check_inputs(
    scores: Numbers, ids: Sequence[int] | None, cutoff_scores: Numbers | None, num_strata: int
) -> tuple[list[float], list[float], list[int]]:
    """Return (scores, cutoff scores, ids) as lists of one length, with defaults filled in."""
    if num_strata < 1:
        raise ValueError(f"num_strata must be at least 1, got {num_strata}")
    values = _as_scores(scores, "scores")
    cut_values = values if cutoff_scores is None else _as_scores(cutoff_scores, "cutoff_scores")
    id_list = list(range(len(values))) if ids is None else [int(id) for id in ids]
    if len(cut_values) != len(values):
        raise ValueError(f"{len(cut_values)} cutoff_scores for {len(values)} scores")
    if len(id_list) != len(values):
        raise ValueError(f"{len(id_list)} ids for {len(values)} scores")
    return values, cut_values, id_list


def ccs_select(
    scores: Numbers,
    prune_rate: float,
    cutoff: float = 0.0,
    num_strata: int = 50,
    hard: Hard = "low",
    seed: int = 0,
    ids: Sequence[int] | None = None,
    cutoff_scores: Numbers | None = None,
    cutoff_hard: Hard | None = None,
) -> Selection:
    """Select floor((1 - prune_rate) * N) examples by CCS.

    Scores are rounded to float32 and everything after that is float64. Strata run from the
    lowest to the highest kept score whatever `hard` is; `hard` only directs the cutoff. The
    range is that of the finite kept scores; infinite ones go to the end strata.

    Args:
        scores: Importance of each example, without NaN.
        prune_rate: Share of the full data set to drop (alpha).
        cutoff: Share of the full data set to drop as hardest (beta), at most `prune_rate`.
        num_strata: Number of equal-width strata.
        hard: Which end of the scores is hard.
        seed: Key of the hashes.
        ids: Identity of each example in the hash; its position if not given.
        cutoff_scores: Scores that rank the cutoff; `scores` if not given.
        cutoff_hard: Which end of the cutoff's scores is hard; `hard` if not given.

    Returns:
        The sorted selected and cut positions, and populations, budgets and range of the strata.
    """
    _check_rates(prune_rate, cutoff)
    values, cut_values, id_list = _check_inputs(scores, ids, cutoff_scores, num_strata)
    return _select(
        values,
        cut_values,
        id_list,
        m=num_kept(len(values), prune_rate),
        count_cut=num_cut(len(values), cutoff),
        num_strata=num_strata,
        cutoff_hard=hard if cutoff_hard is None else cutoff_hard,
        seed=seed,
    )


def class_quotas(labels: Sequence[int] | npt.NDArray[np.integer], m: int) -> dict[int, int]:
    """Share `m` over the classes in proportion to their size, by largest remainder.

    Args:
        labels: Class of each example.
        m: Number of examples to pick.

    Returns:
        For each label, ascending, floor(m * N_c / N), plus one for the classes of largest
        remainder (equal remainders by ascending label) so that the quotas add up to `m`.
    """
    label_list = [int(label) for label in labels]
    n = len(label_list)
    exact = {c: Fraction(m * label_list.count(c), n) for c in sorted(set(label_list))}
    quotas = {c: math.floor(share) for c, share in exact.items()}
    missing = m - sum(quotas.values())
    largest_remainder_first = sorted(exact, key=lambda c: (quotas[c] - exact[c], c))
    for c in largest_remainder_first[:missing]:
        quotas[c] += 1
    return quotas


def ccs_select_class_balanced(
    scores: Numbers,
    labels: Sequence[int] | npt.NDArray[np.integer],
    prune_rate: float,
    cutoff: float = 0.0,
    num_strata: int = 50,
    hard: Hard = "low",
    seed: int = 0,
    ids: Sequence[int] | None = None,
    cutoff_scores: Numbers | None = None,
    cutoff_hard: Hard | None = None,
) -> ClassBalancedSelection:
    """Run CCS inside each class with proportional quotas (CCS-CP).

    The cutoff removes floor(cutoff * N_c) of each class, so in total it may remove fewer than
    floor(cutoff * N). A quota never exceeds what the cutoff leaves of its class. Each class has
    its own score range and strata; hashes use the global ids.

    Args:
        scores: As in `ccs_select`.
        labels: Class of each example.
        prune_rate: As in `ccs_select`.
        cutoff: As in `ccs_select`, applied inside each class.
        num_strata: As in `ccs_select`.
        hard: As in `ccs_select`.
        seed: As in `ccs_select`.
        ids: As in `ccs_select`; the global position if not given.
        cutoff_scores: As in `ccs_select`.
        cutoff_hard: As in `ccs_select`.

    Returns:
        The sorted selected and cut positions, the quotas, and the run of each class, whose
        positions are global too.
    """
    _check_rates(prune_rate, cutoff)
    values, cut_values, id_list = _check_inputs(scores, ids, cutoff_scores, num_strata)
    label_list = [int(label) for label in labels]
    if len(label_list) != len(values):
        raise ValueError(f"{len(label_list)} labels for {len(values)} scores")
    quotas = class_quotas(label_list, num_kept(len(values), prune_rate))
    classes: dict[int, Selection] = {}
    for c, quota in quotas.items():
        rows = [i for i, label in enumerate(label_list) if label == c]
        run = _select(
            [values[i] for i in rows],
            [cut_values[i] for i in rows],
            [id_list[i] for i in rows],
            m=quota,
            count_cut=num_cut(len(rows), cutoff),
            num_strata=num_strata,
            cutoff_hard=hard if cutoff_hard is None else cutoff_hard,
            seed=seed,
        )
        run["indices"] = [rows[i] for i in run["indices"]]
        run["cut"] = [rows[i] for i in run["cut"]]
        classes[c] = run
    return {
        "indices": sorted(i for run in classes.values() for i in run["indices"]),
        "cut": sorted(i for run in classes.values() for i in run["cut"]),
        "quotas": quotas,
        "classes": classes,
    }


def official_budgets(scores: Numbers, m: int, num_strata: int = 50) -> tuple[list[int], list[int]]:
    """Bin and budget as the official code does, its lost maximum included.

    Bin b holds lo + b * step <= s < lo + (b + 1) * step with step = (max * 1.0001 - lo) / k, all
    in float32. So scores with max <= 0 lose their maximum. The official code sorts strata of
    equal population in no fixed order; here they are in ascending bin index.

    Args:
        scores: Scores that are left after the cutoff.
        m: Number of examples to pick.
        num_strata: Number of bins.

    Returns:
        The population and the budget of each bin.
    """
    values = [np.float32(value) for value in _as_scores(scores, "scores")]
    low = min(values)
    open_end = np.float32(max(values) * np.float32(1.0001))
    step = np.float32(np.float32(open_end - low) / np.float32(num_strata))
    edges = [np.float32(low + np.float32(np.float32(b) * step)) for b in range(num_strata + 1)]
    populations = [
        sum(1 for value in values if edges[b] <= value < edges[b + 1]) for b in range(num_strata)
    ]
    return populations, water_fill(populations, m)


# --------------------------------------------------------------------------------------------
# Scores from a full log
# --------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _std(values: Sequence[float], ddof: int) -> float:
    center = _mean(values)
    squares = math.fsum((value - center) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - ddof))


def _windows(count: int, length: int) -> list[range]:
    """Return the positions of all windows of `length` consecutive visits out of `count`."""
    return [range(start, start + length) for start in range(count - length + 1)]


def _margin(values: list[float], label: int) -> float:
    return values[label] - max(value for c, value in enumerate(values) if c != label)


def _forgetting_events(correct: list[bool]) -> int:
    """Count the correct -> wrong transitions between consecutive visits."""
    return sum(1 for before, after in itertools.pairwise(correct) if before and not after)


def _el2n(probs: list[float], label: int) -> float:
    squares = [(p - (1.0 if c == label else 0.0)) ** 2 for c, p in enumerate(probs)]
    return math.sqrt(math.fsum(squares))


def _tdds_step(before: list[float], after: list[float], absolute: str) -> float:
    """Return the change of the prediction between two consecutive visits."""
    terms = [
        q * (math.log(q + 1e-8) - math.log(p + 1e-8)) for p, q in zip(before, after, strict=True)
    ]
    if absolute == "terms":
        return math.fsum(abs(term) for term in terms)
    return abs(math.fsum(terms))


def _tdds(probs: list[list[float]], length: int, decay: float, absolute: str) -> float:
    windows = _windows(len(probs), length)
    score = 0.0
    for w, window in enumerate(windows):
        steps = [_tdds_step(probs[t], probs[t + 1], absolute) for t in window[:-1]]
        center = _mean(steps)
        norm = math.sqrt(math.fsum((step - center) ** 2 for step in steps))
        score += decay * (1 - decay) ** (len(windows) - 1 - w) * norm
    return score


def scores_from_log(
    log: Sequence[Visit],
    num_samples: int,
    num_classes: int,
    *,
    space: Literal["prob", "logit"] = "prob",
    reduce: Literal["sum", "mean"] = "mean",
    never_learned: Literal["zero", "max"] = "max",
    window: int = 10,
    dual_window: int = 10,
    dual_visits: int = 30,
    dyn_unc_window: int = 10,
    tdds_window: int = 10,
    tdds_decay: float = 0.9,
    tdds_abs: Literal["terms", "sum"] = "terms",
) -> dict[str, FloatArray]:
    """Recompute every score from the whole log.

    Of several visits of one example in one epoch only the first counts. A visit is correct if the
    label is the first of the classes of largest probability. An example with no counted visit is
    NaN in every array; one with fewer visits than a score's window is NaN in that score (`dual`,
    `dyn_unc`, `tdds`), while EL2N takes the visits there are.

    Args:
        log: All visits in the order in which they happened.
        num_samples: Length of the returned arrays.
        num_classes: Length of probs and logits, at least 2.
        space: Whether AUM's margins are of probabilities or of logits.
        reduce: Whether AUM is the sum or the mean of the margins.
        never_learned: Forgetting of an example that was never correct: 0, or the number of
            distinct epochs in the log, which is above any possible count.
        window: EL2N covers this many first visits of the example.
        dual_window: Visits in one window of DUAL.
        dual_visits: DUAL covers this many first visits of the example.
        dyn_unc_window: Visits in one window of Dyn-Unc.
        tdds_window: Visits in one window of TDDS.
        tdds_decay: TDDS weights window w of W with decay * (1 - decay) ** (W - 1 - w).
        tdds_abs: Whether a TDDS step is sum_c |term_c| ("terms") or |sum_c term_c| ("sum").

    Returns:
        Arrays of float64: aum, forgetting, correctness (number of correct visits), confidence,
        variability, el2n (mean), el2n_sum, dual, dyn_unc and tdds.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    for length in (dual_window, dyn_unc_window, tdds_window):
        if length < 2:
            raise ValueError(f"a window needs at least 2 visits, got {length}")

    visits: list[list[tuple[list[float], list[float], int]]] = [[] for _ in range(num_samples)]
    counted: set[tuple[int, int]] = set()
    for epoch, index, probs, logits, label in log:
        if not 0 <= index < num_samples:
            raise ValueError(f"index {index} is outside [0, {num_samples})")
        if not 0 <= label < num_classes:
            raise ValueError(f"label {label} is outside [0, {num_classes})")
        prob_list, logit_list = [float(p) for p in probs], [float(z) for z in logits]
        if len(prob_list) != num_classes or len(logit_list) != num_classes:
            raise ValueError(f"expected {num_classes} probs and logits at index {index}")
        if (int(epoch), int(index)) in counted:
            continue
        counted.add((int(epoch), int(index)))
        visits[int(index)].append((prob_list, logit_list, int(label)))
    num_epochs = len({epoch for epoch, _ in counted})

    names = ["aum", "forgetting", "correctness", "confidence", "variability"]
    names += ["el2n", "el2n_sum", "dual", "dyn_unc", "tdds"]
    out: dict[str, FloatArray] = {name: np.full(num_samples, np.nan) for name in names}
    for i, history in enumerate(visits):
        if not history:
            continue
        margins: list[float] = []
        correct: list[bool] = []
        p_label: list[float] = []
        errors: list[float] = []
        for probs, logits, label in history:
            margins.append(_margin(probs if space == "prob" else logits, label))
            correct.append(probs.index(max(probs)) == label)
            p_label.append(probs[label])
            errors.append(_el2n(probs, label))

        out["aum"][i] = math.fsum(margins) if reduce == "sum" else _mean(margins)

        if any(correct):
            out["forgetting"][i] = _forgetting_events(correct)
        else:
            out["forgetting"][i] = num_epochs if never_learned == "max" else 0

        out["correctness"][i] = sum(correct)
        out["confidence"][i] = _mean(p_label)
        out["variability"][i] = _std(p_label, ddof=0)

        out["el2n"][i] = _mean(errors[:window])
        out["el2n_sum"][i] = math.fsum(errors[:window])

        first = p_label[:dual_visits]
        values = []
        for positions in _windows(len(first), dual_window):
            inside = [first[t] for t in positions]
            values.append(_std(inside, ddof=1) * (1 - _mean(inside)))
        if values:
            out["dual"][i] = _mean(values)

        values = [
            _std([p_label[t] for t in positions], ddof=1)
            for positions in _windows(len(p_label), dyn_unc_window)
        ]
        if values:
            out["dyn_unc"][i] = _mean(values)

        if len(history) >= tdds_window:
            all_probs = [probs for probs, _, _ in history]
            out["tdds"][i] = _tdds(all_probs, tdds_window, tdds_decay, tdds_abs)
    return out


# --------------------------------------------------------------------------------------------
# Coverage
# --------------------------------------------------------------------------------------------


def coverage_auc(features: npt.NDArray[np.generic], selected: Sequence[int]) -> float:
    """Return the mean over all rows of the L2 distance to the nearest selected row.

    Args:
        features: One row per example, selected rows included.
        selected: Row numbers of the coreset, at least one.

    Returns:
        The area under the curve of partial cover radii, AUC_pr; lower is better coverage.
    """
    rows = np.asarray(features, dtype=np.float64)
    if len(selected) == 0:
        raise ValueError("selected is empty")
    nearest: list[float] = []
    for row in rows:
        best = math.inf
        for j in selected:
            best = min(best, math.sqrt(float(np.sum((row - rows[j]) ** 2))))
        nearest.append(best)
    return _mean(nearest)
