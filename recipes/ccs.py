"""Recipe `ccs`: score every training example, select coresets, train on each; compare.

Stages, each resumable:
1. score: one ordinary fit on all training data per seed, with `TrainingDynamics` attached; it is
   also the full-data result.
2. select: every method at every pruning rate.
3. train: a fit per coreset, all with the same number of steps. A method with `cutoff=search` is
   trained at each cutoff; the cutoff is chosen per pruning rate by validation accuracy averaged
   over the seeds, never by test accuracy.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import Progress
from safetensors.numpy import load_file, save_file
from scipy import stats
from torch.utils.data import Dataset

from mlkit.coresets import (
    CoresetSubset,
    ScoreTable,
    Selection,
    TrainingDynamics,
    coverage_auc,
)
from mlkit.coresets.dynamics import FINAL_SCORES
from mlkit.coresets.settings import CCSSettings
from mlkit.data import ClassificationDataModule, DataSpec
from mlkit.models.features import extract_features
from mlkit.models.lightning import accuracy
from mlkit.report import Report, RunContext, is_global_zero

__all__ = ["CCS"]

log = logging.getLogger(__name__)

FULL = "full"


@dataclass(frozen=True)
class Fit:
    """One cell of the experiment: a method at a pruning rate and cutoff, for one seed."""

    method: str
    rate: float
    cutoff: float | None
    seed: int

    @property
    def key(self) -> str:
        """Name of its unit."""
        cutoff = "" if self.cutoff is None else f"-cutoff{self.cutoff:g}"
        return f"{self.method}/{self.rate:g}{cutoff}/seed{self.seed}"


class CCS:
    """Compare coreset methods at several pruning rates.

    Args:
        settings: The arguments `ccs.*`.
        data: What to learn from.
        model: Configuration of a LightningModule that returns logits from `training_step`.
        trainer: Configuration of the Trainer.
        callbacks: Configurations of callbacks for every fit.
    """

    def __init__(
        self,
        settings: CCSSettings,
        data: DataSpec,
        model: DictConfig,
        trainer: DictConfig,
        callbacks: DictConfig,
    ) -> None:
        self.settings, self.data = settings, data
        self.model, self.trainer, self.callbacks = model, trainer, callbacks
        if trainer.get("max_epochs", -1) != -1:
            warnings.warn(
                "trainer.max_epochs is set: coresets would train for fewer steps than the full "
                "data, which confounds the comparison; use ccs.max_steps",
                stacklevel=2,
            )

    def run(self, run: RunContext) -> Report:
        """Run the stages up to `ccs.stage` and report."""
        seeds = range(run.seed, run.seed + self.settings.num_seeds)
        fits = list(self._fits(seeds))
        total = len(seeds) + (len(fits) if self.settings.stage == "train" else 0)
        warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec", append=False)
        with Progress(transient=True, disable=not is_global_zero()) as progress:
            bar = progress.add_task("ccs", total=total)
            for seed in seeds:
                progress.update(bar, description=f"seed {seed}: scoring")
                datamodule = self.data.build(seed)
                datamodule.setup()
                self._score(run, datamodule, seed)
                progress.advance(bar)
                if self.settings.stage == "score":
                    continue
                table, features = self._load_scores(run, seed)
                for fit in (f for f in fits if f.seed == seed):
                    progress.update(bar, description=fit.key)
                    selection = self._select(run, fit, datamodule, table, features)
                    if self.settings.stage == "train":
                        self._train(run, fit, datamodule, selection)
                        progress.advance(bar)
        return self._report(run, seeds, fits)

    def _fits(self, seeds: range) -> Iterator[Fit]:
        for seed in seeds:
            for rate in self.settings.prune_rates:
                for method in self.settings.methods:
                    for cutoff in self.settings.cutoffs_of(method, rate):
                        yield Fit(method, rate, cutoff, seed)

    # ------------------------------------------------------------------ stages

    def _score(self, run: RunContext, datamodule: ClassificationDataModule, seed: int) -> None:
        """Train on all data and keep scores, features and accuracy of seed `seed`."""
        folder = run.directory / "scores"

        def fit() -> dict[str, float]:
            wanted = dict.fromkeys(["aum", self.settings.score, "confidence"])
            pool = datamodule.part("pool")
            dynamics = TrainingDynamics(
                list(wanted),
                len(pool),  # type: ignore[arg-type]
                eval_dataloader=(
                    datamodule.loader(pool, shuffle=False)
                    if not wanted.keys().isdisjoint(FINAL_SCORES)
                    else None
                ),
                **self.settings.dynamics,
            )
            extra: list[L.Callback] = [] if self.settings.scores_path else [dynamics]
            model = self._fit(
                run, f"{FULL}/0/seed{seed}", datamodule.part("train"), datamodule, seed, extra
            )
            if is_global_zero():
                table = (
                    ScoreTable.load(self.settings.scores_path)
                    if self.settings.scores_path
                    else dynamics.compute()
                )
                table.save(folder / f"seed{seed}.safetensors")
                self._save_features(folder / f"features-seed{seed}.safetensors", model, datamodule)
            _barrier()
            return self._measure(model, datamodule)

        run.unit(f"{FULL}/0/seed{seed}", fit)

    def _save_features(
        self, path: Path, model: L.LightningModule, datamodule: ClassificationDataModule
    ) -> None:
        features = {
            part: extract_features(model, datamodule.loader(datamodule.part(part), shuffle=False))
            .half()
            .numpy()
            for part in ("pool", "test")
        }
        save_file(features, path)

    def _load_scores(
        self, run: RunContext, seed: int
    ) -> tuple[ScoreTable, Mapping[str, np.ndarray]]:
        folder = run.directory / "scores"
        features = load_file(folder / f"features-seed{seed}.safetensors")
        return (
            ScoreTable.load(folder / f"seed{seed}.safetensors"),
            {k: v.astype(np.float32) for k, v in features.items()},
        )

    def _select(
        self,
        run: RunContext,
        fit: Fit,
        datamodule: ClassificationDataModule,
        table: ScoreTable,
        features: Mapping[str, np.ndarray],
    ) -> Selection:
        """Choose the coreset of a fit, and keep it with its report and its coverage."""
        path = run.directory / "selections" / f"{fit.key}.safetensors"

        def select() -> dict[str, Any]:
            selector = self.settings.selector(fit.method, fit.rate, fit.cutoff, fit.seed)
            selection = selector.select(
                table[self.settings.score],
                cutoff_scores=table.get("aum"),
                labels=datamodule.pool_labels,
                features=features["pool"],
                confidence=table.get("confidence"),
                unseen=self.settings.unseen,
            )
            noisy = (datamodule.pool_labels != datamodule.clean_labels).numpy()
            if is_global_zero():
                selection.save(path)
            _barrier()
            auc = coverage_auc(features["pool"], selection, eval_features=features["test"])
            return {
                "num_selected": len(selection),
                "coverage_auc": float(auc),
                "wrong_labels": float(noisy[selection.indices].mean()) if len(selection) else 0.0,
            }

        run.unit(f"selections/{fit.key}", select)
        return Selection.load(path)

    def _train(
        self, run: RunContext, fit: Fit, datamodule: ClassificationDataModule, selection: Selection
    ) -> None:
        """Train on a coreset with the steps of the full fit."""

        def train() -> dict[str, float]:
            subset = CoresetSubset(datamodule.part("train"), selection)
            return self._measure(self._fit(run, fit.key, subset, datamodule, fit.seed), datamodule)

        run.unit(f"fits/{fit.key}", train)

    def _fit(
        self,
        run: RunContext,
        key: str,
        examples: Dataset[Any],
        datamodule: ClassificationDataModule,
        seed: int,
        extra: list[L.Callback] | None = None,
    ) -> L.LightningModule:
        """One fit of `ccs.max_steps` steps; goes on from its checkpoint if there is one."""
        folder = run.directory / "checkpoints" / key
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        L.seed_everything(seed, workers=True, verbose=False)
        model = instantiate(self.model)
        callbacks = [
            instantiate(node, **({"dirpath": str(folder)} if "dirpath" in node else {}))
            for node in self.callbacks.values()
        ]
        has_checkpoints = any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks)
        trainer = instantiate(
            self.trainer,
            max_steps=self.settings.max_steps,
            callbacks=[*callbacks, *(extra or [])],
            enable_checkpointing=has_checkpoints,
        )
        last = folder / "last.ckpt"
        trainer.fit(
            model,
            datamodule.loader(examples, shuffle=True),
            ckpt_path=str(last) if last.is_file() else None,
            weights_only=True if last.is_file() else None,
        )
        return model

    def _measure(
        self, model: L.LightningModule, datamodule: ClassificationDataModule
    ) -> dict[str, float]:
        classes = self.data.num_classes
        result = {"test": accuracy(model, datamodule.test_dataloader(), classes)}
        if len(datamodule.part("val")):  # type: ignore[arg-type]
            result["val"] = accuracy(model, datamodule.val_dataloader(), classes)
        return result

    # ------------------------------------------------------------------ report

    def _report(self, run: RunContext, seeds: range, fits: list[Fit]) -> Report:
        report = Report("Coreset selection (CCS)")
        self._facts(report, run, seeds)
        full = [run.unit(f"{FULL}/0/seed{s}", dict) for s in seeds]
        _record(report, f"{FULL}/0", full)
        if self.settings.stage != "train":
            report.verdict.append(
                f"Stopped after the stage {self.settings.stage!r}; files are in scores/ and "
                "selections/. Go on with ccs.stage=train and the same hydra.run.dir."
            )
            return report
        cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for method in self.settings.methods:
            for rate in self.settings.prune_rates:
                cutoff = self._best_cutoff(run, method, rate, seeds)
                chosen = [Fit(method, rate, cutoff, s) for s in seeds]
                cells[method, rate] = [
                    {
                        **run.unit(f"selections/{f.key}", dict),
                        **run.unit(f"fits/{f.key}", dict),
                    }
                    for f in chosen
                ]
                name = f"{method}/{rate:g}"
                _record(report, name, cells[method, rate])
                for measure in ("coverage_auc", "wrong_labels"):
                    report.metric(f"{measure}/{name}", _mean(cells[method, rate], measure))
                if cutoff is not None:
                    report.metric(f"cutoff/{name}", cutoff)
        self._tables(report, cells, full)
        self._verdict(report, cells, full)
        report.figure("accuracy_and_coverage", _figure(cells, full))
        return report

    def _best_cutoff(self, run: RunContext, method: str, rate: float, seeds: range) -> float | None:
        """The cutoff with the best validation accuracy over all seeds; the smaller on a tie."""

        def validation(cutoff: float | None) -> float:
            fits = [Fit(method, rate, cutoff, s) for s in seeds]
            return _mean([run.unit(f"fits/{f.key}", dict) for f in fits], "val")

        cutoffs = self.settings.cutoffs_of(method, rate)
        return cutoffs[0] if len(cutoffs) == 1 else max(cutoffs, key=validation)

    def _facts(self, report: Report, run: RunContext, seeds: range) -> None:
        report.facts |= {
            "data": f"{self.data.name}: {self.data.source()}",
            "label noise": f"{self.data.label_noise:g} of the training labels redrawn",
            "seeds": ", ".join(map(str, seeds))
            + " (initialisation, order, validation split, draw)",
            "steps": f"{self.settings.max_steps} per fit, the full one included: what a coreset "
            "saves here is data, not steps",
            "score": f"{self.settings.score}, recorded in the full fit (its cost: one fit a seed)",
            "cutoff": "chosen per pruning rate by mean validation accuracy over the seeds",
            "seconds": f"{_total_seconds(run):.0f} in all units",
        }

    def _tables(
        self,
        report: Report,
        cells: Mapping[tuple[str, float], list[dict[str, Any]]],
        full: list[dict[str, Any]],
    ) -> None:
        rates = self.settings.prune_rates
        header = ["method", *(f"{r:.4g} pruned" for r in rates)]
        rows = [[FULL, _percent(full), *[""] * (len(rates) - 1)]]
        rows += [
            [method, *(_percent(cells[method, r]) for r in rates)]
            for method in self.settings.methods
        ]
        report.table(f"Test accuracy %, mean ± std over {len(full)} seeds", header, rows)
        extra = []
        for method, node in self.settings.methods.items():
            line = [method]
            for rate in rates:
                cutoff = report.metrics.get(f"cutoff/{method}/{rate:g}", node.get("cutoff"))
                line.append(
                    f"{report.metrics[f'coverage_auc/{method}/{rate:g}']:.3f}"
                    + ("" if cutoff is None else f" (cutoff {cutoff})")
                )
            extra.append(line)
        report.table(
            "Coverage AUC (mean distance to the nearest example; lower covers better)",
            header,
            extra,
        )

    def _verdict(
        self,
        report: Report,
        cells: Mapping[tuple[str, float], list[dict[str, Any]]],
        full: list[dict[str, Any]],
    ) -> None:
        if "ccs" not in self.settings.methods or len(full) < 2:
            return
        for rate in self.settings.prune_rates:
            for method in self.settings.methods:
                if method == "ccs":
                    continue
                ours = np.array([u["test"] for u in cells["ccs", rate]])
                theirs = np.array([u["test"] for u in cells[method, rate]])
                mean, low, high = paired_interval(ours - theirs)
                name = f"ccs-{method}/{rate:g}"
                report.metric(f"test_accuracy_difference/{name}", mean)
                report.metric(f"test_accuracy_difference_low/{name}", low)
                report.metric(f"test_accuracy_difference_high/{name}", high)
                report.verdict.append(
                    f"{rate:g} pruned: ccs {100 * mean:+.1f} points against {method} "
                    f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}, paired by seed)"
                )


def _barrier() -> None:
    """Let the other processes of a distributed run see what rank 0 wrote."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % Student interval of paired differences."""
    mean = float(differences.mean())
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return mean, mean - float(half), mean + float(half)


def _mean(units: list[dict[str, Any]], measure: str) -> float:
    return float(np.mean([u[measure] for u in units]))


def _std(units: list[dict[str, Any]], measure: str) -> float:
    return float(np.std([u[measure] for u in units], ddof=1)) if len(units) > 1 else 0.0


def _record(report: Report, name: str, units: list[dict[str, Any]]) -> None:
    report.metric(f"test_accuracy/{name}", _mean(units, "test"))
    report.metric(f"test_accuracy_std/{name}", _std(units, "test"))
    if "val" in units[0]:
        report.metric(f"val_accuracy/{name}", _mean(units, "val"))


def _percent(units: list[dict[str, Any]]) -> str:
    return f"{100 * _mean(units, 'test'):.1f} ± {100 * _std(units, 'test'):.1f}"


def _total_seconds(run: RunContext) -> float:
    return math.fsum(u.get("seconds", 0.0) for u in run.finished.values())


def _figure(
    cells: Mapping[tuple[str, float], list[dict[str, Any]]], full: list[dict[str, Any]]
) -> Any:
    """Accuracy and coverage against the pruning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    left.axhline(100 * _mean(full, "test"), color="grey", linestyle="--", label=FULL)
    for method in dict.fromkeys(m for m, _ in cells):
        rates = sorted(r for m, r in cells if m == method)
        units = [cells[method, r] for r in rates]
        left.errorbar(
            rates,
            [100 * _mean(u, "test") for u in units],
            yerr=[100 * _std(u, "test") for u in units],
            marker="o",
            capsize=3,
            label=method,
        )
        right.plot(rates, [_mean(u, "coverage_auc") for u in units], marker="o", label=method)
    left.set(xlabel="share pruned", ylabel="test accuracy %", title="accuracy")
    right.set(
        xlabel="share pruned", ylabel="AUC_pr", title="coverage of test features (lower is better)"
    )
    left.legend()
    right.legend()
    return figure
