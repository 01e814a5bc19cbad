"""Importance scores from one ordinary training run, in streaming form.

A few numbers per example are updated at every visit; no log of softmaxes is kept (for ImageNet the
official CCS logger keeps 154 GB, this 30 MB). Definitions, with p the softmax of the example at its
visit, y its label:

- aum: mean or sum of p_y - max_{c != y} p_c (Pleiss et al. 2020, arXiv 2001.10528, in logits; the
  official CCS code in probabilities).
- forgetting: visits at which a right prediction turned wrong (Toneva et al. 2019,
  arXiv 1812.05159).
- el2n: mean of ||p - onehot(y)||_2 over the first visits (Paul et al. 2021, arXiv 2107.07075).
- grand: mean of ||p - onehot(y)||_2 * sqrt(1 + ||phi||^2) over the first visits: the gradient norm
  of a linear head with bias on features phi (Paul et al. 2021, last-layer form).
- correctness, confidence, variability: number of right visits, mean and population standard
  deviation of p_y (Swayamdipta et al. 2020, arXiv 2009.10795).
- dual, dyn_unc: mean over windows of J visits of std(p_y) * (1 - mean(p_y)) (Cho et al. 2025,
  arXiv 2502.06905; first visits only) and of std(p_y) (He et al. 2023, arXiv 2306.05175).
- tdds: per window of J visits, the norm of the deviation of J - 1 values
  sum_c |p'_c log(p'_c / p_c)| from their mean; exponentially weighted towards the last window
  (Zhang et al. 2024, arXiv 2311.13613, official code).
- entropy, loss: of the final model, from a pass over the data after training (`record_final`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from mlkit.coresets.scores import RECORDED, ScoreTable
from mlkit.coresets.visit import Visit, repeats_earlier
from mlkit.errors import InvalidTypeError, InvalidValueError, RunError, nearest

__all__ = ["FINAL_SCORES", "DynamicsRecorder"]

FINAL_SCORES = ("entropy", "loss")
"""Scores of the trained model, from `record_final`."""

_MOST = torch.iinfo(torch.int16).max
_WINDOWED = ("dual", "dyn_unc", "tdds")


class DynamicsRecorder:
    """Collect importance scores while any training loop runs.

    Call `update` after every forward pass and `end_epoch` after every epoch; `compute` gives the
    `ScoreTable`. An example counts once per epoch: a second visit (a sampler's padding) is ignored.
    The state lives on the device of the first logits and is never read back during training.

    Args:
        num_samples: Size of the data set; indices are 0 .. num_samples - 1.
        scores: Which of `scores.RECORDED` to record.
        window: J, visits per window of dual, dyn_unc and tdds; at least 2. 10 in their papers.
        el2n_visits: First visits that el2n and grand average over. 10 in the official CCS code.
        dual_visits: First visits that dual looks at. 30 in its paper.
        tdds_decay: Weight of the newest window in tdds. 0.9 in the official code.
        space: "prob" or "logit": where aum takes its margin.
        reduce: "mean" or "sum" of aum, el2n and grand over visits; the ranking is the same for
            examples visited equally often.
        never_learned: Forgetting of an example that was never right: "max" (Toneva et al.: the
            number of epochs, above every count) or "zero" (official CCS code).
        previous_dtype: Precision of the softmax that tdds keeps per example (N x C).
        ignore_index: Target that marks a token without label in token-level tasks.

    Raises:
        InvalidValueError: For an unknown score or a value out of range.

    Example:
        >>> recorder = DynamicsRecorder(4, scores=["aum"])
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> recorder.update(torch.tensor([0, 1]), logits, torch.tensor([0, 0]))
        >>> recorder.end_epoch()
        >>> recorder.compute()["aum"].values.round(2)
        array([ 0.76, -0.76,   nan,   nan], dtype=float32)
    """

    def __init__(
        self,
        num_samples: int,
        scores: Sequence[str] = ("aum", "forgetting", "el2n"),
        *,
        window: int = 10,
        el2n_visits: int = 10,
        dual_visits: int = 30,
        tdds_decay: float = 0.9,
        space: Literal["prob", "logit"] = "prob",
        reduce: Literal["mean", "sum"] = "mean",
        never_learned: Literal["max", "zero"] = "max",
        previous_dtype: torch.dtype = torch.float16,
        ignore_index: int = -100,
    ) -> None:
        if num_samples < 1:
            raise InvalidValueError(f"num_samples must be at least 1, got {num_samples}")
        for name in scores:
            if name not in RECORDED:
                raise InvalidValueError(f"no score {name!r}; {nearest(name, RECORDED)}")
        if not scores:
            raise InvalidValueError(f"scores is empty; choose of {', '.join(RECORDED)}")
        if window < 2 or el2n_visits < 1 or dual_visits < window:
            raise InvalidValueError(
                "window must be at least 2, el2n_visits at least 1 and dual_visits at least "
                f"window, got window={window}, el2n_visits={el2n_visits}, dual_visits={dual_visits}"
            )
        for key, value, allowed in (
            ("space", space, ("prob", "logit")),
            ("reduce", reduce, ("mean", "sum")),
            ("never_learned", never_learned, ("max", "zero")),
        ):
            if value not in allowed:
                raise InvalidValueError(f"{key} must be one of {allowed}, got {value!r}")
        self.num_samples = num_samples
        self.scores = tuple(dict.fromkeys(scores))
        self.settings: dict[str, Any] = {
            "window": window,
            "el2n_visits": el2n_visits,
            "dual_visits": dual_visits,
            "tdds_decay": tdds_decay,
            "space": space,
            "reduce": reduce,
            "never_learned": never_learned,
            "ignore_index": ignore_index,
        }
        self._previous_dtype = previous_dtype
        self.epoch = 0
        self._num_classes: int | None = None
        self._state: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ state

    def _wants(self, *names: str) -> bool:
        return not set(names).isdisjoint(self.scores)

    def _allocate(self, num_classes: int, device: torch.device) -> None:
        """Allocate the state; the extra last row takes what must not count."""
        rows, window = self.num_samples + 1, self.settings["window"]

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        state = {
            "visits": zeros(dtype=torch.int32),
            "seen": zeros(dtype=torch.bool),
            "touched": zeros(dtype=torch.bool),
            "targets": zeros(dtype=torch.int32) - 1,
        }
        if self._wants("aum"):
            state["aum"] = zeros()
        if self._wants("forgetting", "correctness"):
            state["correct"] = zeros(dtype=torch.int16)
        if self._wants("forgetting"):
            state["forgotten"] = zeros(dtype=torch.int16)
            state["last_correct"] = zeros(dtype=torch.bool)
        if self._wants("confidence", "variability"):
            state["mean"], state["m2"] = zeros(), zeros()
        for name in ("el2n", "grand", "dual", "dyn_unc", "tdds"):
            if self._wants(name):
                state[name] = zeros()
        if self._wants("dual", "dyn_unc"):
            state["recent"] = zeros(window)
        if self._wants("tdds"):
            state["previous"] = zeros(num_classes, dtype=self._previous_dtype)
            state["divergence"] = zeros(window - 1)
        for name in FINAL_SCORES:
            if self._wants(name):
                state[name] = torch.full((rows,), torch.nan, device=device)
        for name in ("repeated", "out_of_range"):
            state[name] = torch.zeros((), dtype=torch.int64, device=device)
        self._num_classes, self._state = num_classes, state

    @property
    def bytes_per_example(self) -> float:
        """Memory of the state divided by the number of examples; 0 before the first update."""
        return sum(t.numel() * t.element_size() for t in self._state.values()) / self.num_samples

    # ----------------------------------------------------------------- update

    @torch.no_grad()
    def update(
        self,
        indices: Int[Tensor, " batch"],
        logits: Float[Tensor, "batch *tokens classes"],
        targets: Int[Tensor, batch * tokens],
        features: Float[Tensor, "batch features"] | None = None,
    ) -> None:
        """Record one visit of each example of a batch.

        Args:
            indices: Data-set index of each example.
            logits: Unnormalised scores of any float type; taken to float32. Token-level tasks
                score an example by the mean over its labelled tokens (right if all are).
            targets: Labels, or `ignore_index` for tokens without one.
            features: Input of the linear head; needed for "grand".

        Raises:
            InvalidValueError: For shapes that do not fit, or (on CPU) an index out of range.
        """
        self._check(indices, logits, targets)
        if self._wants("grand") and features is None:
            raise InvalidValueError(
                "the score 'grand' needs features: pass the input of the linear head to update()"
            )
        if not self._state:
            self._allocate(logits.shape[-1], logits.device)
        state, device = self._state, self._state["visits"].device
        indices = indices.to(device, torch.int64, non_blocking=True)
        visit = Visit(logits.to(device).float(), targets.to(device), self.settings)
        if self._wants("tdds") and visit.is_tokens:
            raise InvalidValueError("the score 'tdds' is not defined for token-level tasks")

        inside = (indices >= 0) & (indices < self.num_samples)
        state["out_of_range"] += (~inside).sum()
        indices = torch.where(inside, indices, self.num_samples)
        fresh = ~state["seen"][indices] & ~repeats_earlier(indices)
        state["repeated"] += (inside & ~fresh).sum()
        slot = torch.where(fresh, indices, self.num_samples)
        past = state["visits"][slot]
        self._accumulate(slot, past, visit, features)
        state["visits"][slot] = past + 1
        state["seen"][slot] = True
        state["touched"][slot] = True
        state["targets"][slot] = visit.label.to(torch.int32)

    def _accumulate(
        self,
        slot: Int[Tensor, " batch"],
        past: Int[Tensor, " batch"],
        visit: Visit,
        features: Tensor | None,
    ) -> None:
        state, settings = self._state, self.settings
        if "aum" in state:
            state["aum"].index_add_(0, slot, visit.margin)
        if "correct" in state:
            correct = visit.correct
            state["correct"][slot] += correct & (state["correct"][slot] < _MOST)
            if "forgotten" in state:
                turned = state["last_correct"][slot] & ~correct
                state["forgotten"][slot] += turned & (state["forgotten"][slot] < _MOST)
                state["last_correct"][slot] = correct
        if "mean" in state:
            delta = visit.confidence - state["mean"][slot]
            state["mean"].index_add_(0, slot, delta / (past + 1))
            state["m2"].index_add_(0, slot, delta * (visit.confidence - state["mean"][slot]))
        early = past < settings["el2n_visits"]
        if "el2n" in state:
            state["el2n"].index_add_(0, slot, visit.error_norm * early)
        if "grand" in state:
            assert features is not None
            scale = (1 + features.to(slot.device).float().square().sum(-1)).sqrt()
            state["grand"].index_add_(0, slot, visit.error_norm * scale * early)
        window = settings["window"]
        if "recent" in state:
            state["recent"][slot, past % window] = visit.confidence
            recent = state["recent"][slot]
            full = past + 1 >= window
            spread = recent.std(dim=1) * full
            if "dyn_unc" in state:
                state["dyn_unc"].index_add_(0, slot, spread)
            if "dual" in state:
                spread = spread * (past < settings["dual_visits"])
                state["dual"].index_add_(0, slot, spread * (1 - recent.mean(dim=1)))
        if "previous" in state:
            before = state["previous"][slot].float()
            change = (visit.probs + 1e-8).log() - (before + 1e-8).log()
            divergence = (visit.probs * change).abs().sum(-1)
            state["previous"][slot] = visit.probs.to(self._previous_dtype)
            state["divergence"][slot, (past - 1) % (window - 1)] = divergence
            values = state["divergence"][slot]
            norm = (values - values.mean(dim=1, keepdim=True)).norm(dim=1)
            decay = settings["tdds_decay"]
            updated = (1 - decay) * state["tdds"][slot] + decay * norm
            state["tdds"][slot] = torch.where(past + 1 >= window, updated, 0.0)

    @torch.no_grad()
    def record_final(
        self,
        indices: Int[Tensor, " batch"],
        logits: Float[Tensor, "batch *tokens classes"],
        targets: Int[Tensor, batch * tokens],
    ) -> None:
        """Record entropy and loss of the trained model (evaluation mode, evaluation transform)."""
        self._check(indices, logits, targets)
        if not self._state:
            self._allocate(logits.shape[-1], logits.device)
        state, device = self._state, self._state["visits"].device
        indices = indices.to(device, torch.int64)
        visit = Visit(logits.to(device).float(), targets.to(device), self.settings)
        if "entropy" in state:
            state["entropy"][indices] = visit.entropy
        if "loss" in state:
            state["loss"][indices] = visit.loss
        state["targets"][indices] = visit.label.to(torch.int32)
        state["touched"][indices] = True

    def _check(self, indices: Tensor, logits: Tensor, targets: Tensor) -> None:
        if not all(isinstance(t, Tensor) for t in (indices, logits, targets)):
            raise InvalidTypeError(
                "indices, logits and targets must be tensors, got "
                + ", ".join(type(t).__name__ for t in (indices, logits, targets))
            )
        if indices.ndim != 1 or logits.ndim < 2 or logits.shape[:-1] != targets.shape:
            raise InvalidValueError(
                "expected indices (batch,), logits (batch, ..., classes) and targets (batch, ...), "
                f"got {tuple(indices.shape)}, {tuple(logits.shape)} and {tuple(targets.shape)}"
            )
        if len(indices) != len(logits):
            raise InvalidValueError(f"{len(indices)} indices for {len(logits)} rows of logits")
        if self._num_classes not in (None, logits.shape[-1]):
            raise InvalidValueError(
                f"logits have {logits.shape[-1]} classes and had {self._num_classes} before"
            )
        if logits.shape[-1] < 2:
            raise InvalidValueError(
                "logits need at least two classes in their last dimension, got shape "
                f"{tuple(logits.shape)}; stack [-z, z] / 2 for one logit z"
            )
        if targets.device.type == "cpu" and logits.ndim == 2 and len(targets):
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= logits.shape[-1]:
                raise InvalidValueError(
                    f"target {low if low < 0 else high} is out of range for {logits.shape[-1]} "
                    "classes"
                )
        if indices.device.type == "cpu" and len(indices):
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= self.num_samples:
                raise InvalidValueError(
                    f"index {low if low < 0 else high} is out of range for num_samples="
                    f"{self.num_samples}; pass the size of the whole data set"
                )

    # ------------------------------------------------------- epochs and ranks

    def end_epoch(self) -> None:
        """Close an epoch: merge the ranks' records, then let every example be visited again.

        Raises:
            InvalidValueError: If an index was out of range (on an accelerator it shows here).
        """
        self.sync()
        if self._state:
            self._state["seen"].zero_()
            outside = int(self._state["out_of_range"])
            if outside:
                raise InvalidValueError(
                    f"{outside} indices were out of range for num_samples={self.num_samples}; pass "
                    "the size of the whole data set"
                )
        self.epoch += 1

    @torch.no_grad()
    def sync(self) -> None:
        """Merge the records of all ranks; does nothing outside `torch.distributed`.

        Each example's record is taken from the lowest rank that visited it since the last merge.
        Records travel as bytes that are zero on all other ranks, so the sum is exact for any type.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        if not self._state:
            raise RunError("this rank recorded nothing before the ranks merged their records")
        rank, world, state = dist.get_rank(), dist.get_world_size(), self._state
        owner = torch.where(state["touched"], rank, world).to(torch.int32)
        dist.all_reduce(owner, dist.ReduceOp.MIN)
        repeated = state["repeated"] + (state["touched"] & (owner < rank)).sum()
        mine, anyone = owner == rank, owner < world
        state["touched"].zero_()
        for name, rows in sorted(state.items()):  # the same order on all ranks
            if rows.ndim == 0:
                continue
            payload = rows.reshape(len(rows), -1).contiguous().view(torch.uint8)
            payload = torch.where(mine[:, None], payload, 0)
            dist.all_reduce(payload, dist.ReduceOp.SUM)
            merged = payload.view(rows.dtype).reshape(rows.shape)
            keep = anyone.reshape(-1, *[1] * (rows.ndim - 1))
            state[name] = torch.where(keep, merged, rows)
        state["repeated"] = repeated

    # ---------------------------------------------------------------- results

    def compute(self) -> ScoreTable:
        """Return the scores of all examples; NaN where an example was not visited often enough."""
        if not self._state:
            raise RunError("nothing was recorded: call update() during training first")
        state = {k: v[:-1].cpu() if v.ndim else v.cpu() for k, v in self._state.items()}
        visits, settings = state["visits"].float(), self.settings
        if int(state["repeated"]) > int(visits.sum()):
            warnings.warn(
                f"{int(state['repeated'])} visits were ignored as repeats within an epoch, more "
                "than were counted; call end_epoch() after every epoch",
                stacklevel=2,
            )
        columns: dict[str, Tensor] = {}
        for name in self.scores:
            if name == "forgetting":
                worst = 0.0 if settings["never_learned"] == "zero" else float(visits.max())
                columns[name] = torch.where(
                    state["correct"] == 0, worst, state["forgotten"].float()
                )
            elif name == "correctness":
                columns[name] = state["correct"].float()
            elif name == "confidence":
                columns[name] = state["mean"]
            elif name == "variability":
                columns[name] = (state["m2"] / visits).clamp_min(0).sqrt()
            elif name in _WINDOWED:
                windows = visits - settings["window"] + 1
                if name == "dual":
                    limit = settings["dual_visits"] - settings["window"] + 1
                    windows = windows.clamp_max(limit)
                value = state[name] if name == "tdds" else state[name] / windows
                columns[name] = torch.where(windows >= 1, value, torch.nan)
            elif name in ("aum", "el2n", "grand") and settings["reduce"] == "mean":
                counted = visits if name == "aum" else visits.clamp_max(settings["el2n_visits"])
                columns[name] = state[name] / counted
            else:
                columns[name] = state[name]
            if name not in FINAL_SCORES:
                columns[name] = torch.where(visits > 0, columns[name], torch.nan)
        self._warn_about_windows(visits)
        return ScoreTable(
            {k: v.numpy() for k, v in columns.items()},
            targets=state["targets"].numpy(),
            visits=state["visits"].numpy(),
            meta={**settings, "epochs": self.epoch, "num_classes": self._num_classes},
        )

    def _warn_about_windows(self, visits: Float[Tensor, " n"]) -> None:
        short = int(((visits > 0) & (visits < self.settings["window"])).sum())
        if short and self._wants(*_WINDOWED):
            warnings.warn(
                f"{short} examples were visited less often than window={self.settings['window']}: "
                f"their {[s for s in _WINDOWED if s in self.scores]} is NaN; train longer or use a "
                "smaller window",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded so far, for a checkpoint."""
        return {
            "num_samples": self.num_samples,
            "scores": list(self.scores),
            "settings": dict(self.settings),
            "epoch": self.epoch,
            "num_classes": self._num_classes,
            "state": {k: v.clone() for k, v in self._state.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            InvalidValueError: If it was written with another data-set size, scores or settings.
        """
        mine = (self.num_samples, list(self.scores), self.settings)
        theirs = (state["num_samples"], list(state["scores"]), state["settings"])
        if mine != theirs:
            raise InvalidValueError(
                f"the checkpoint's record does not fit: it has {theirs}, this recorder {mine}; "
                "resume with the settings of the first run"
            )
        self.epoch, self._num_classes = state["epoch"], state["num_classes"]
        device = self._state["visits"].device if self._state else None
        self._state = {k: v.to(device or v.device, copy=True) for k, v in state["state"].items()}

    def to(self, device: torch.device | str) -> DynamicsRecorder:
        """Move the state; later updates follow it."""
        self._state = {k: v.to(device) for k, v in self._state.items()}
        return self
