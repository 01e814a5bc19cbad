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

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import Progress
from safetensors.numpy import load_file, save_file
from torch.utils.data import Dataset

from mlkit.coresets import (
    CoresetSubset,
    ScoreTable,
    Selection,
    TrainingDynamics,
    coverage_auc,
)
from mlkit.coresets.counts import num_selected
from mlkit.coresets.dynamics import FINAL_SCORES
from mlkit.coresets.settings import CCSSettings
from mlkit.data import ClassificationDataModule, DataSpec
from mlkit.errors import InvalidValueError
from mlkit.models.features import extract_features
from mlkit.models.lightning import accuracy
from mlkit.report import Report, RunContext, is_global_zero
from recipes.ccs_report import FULL, add_tables, add_verdict, figure, mean, record
from recipes.fitting import fit, quiet_fits

__all__ = ["CCS"]


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
        searched = [m for m, n in settings.methods.items() if n.get("cutoff") == "search"]
        if searched and data.val_fraction == 0:
            raise InvalidValueError(
                f"ccs.methods.{searched[0]}.cutoff=search needs validation data: set "
                "data.val_fraction above 0, or give a cutoff"
            )

    def run(self, run: RunContext) -> Report:
        """Run the stages up to `ccs.stage` and report."""
        seeds = range(run.seed, run.seed + self.settings.num_seeds)
        fits = list(self._fits(seeds))
        total = len(seeds) + (len(fits) if self.settings.stage == "train" else 0)
        quiet_fits()
        hidden = not is_global_zero() or self.trainer.get("enable_progress_bar", False)
        with Progress(transient=True, disable=hidden) as progress:
            bar = progress.add_task("ccs", total=total)
            for seed in seeds:
                progress.update(bar, description=f"seed {seed}: scoring")
                datamodule = self._prepare(seed)
                self._score(run, datamodule, seed)
                progress.advance(bar)
                if self.settings.stage == "score":
                    continue
                table, features = self._load_scores(run, seed)
                for cell in (f for f in fits if f.seed == seed):
                    progress.update(bar, description=cell.key)
                    selection = self._select(run, cell, datamodule, table, features)
                    if self.settings.stage == "train":
                        self._train(run, cell, datamodule, selection)
                        progress.advance(bar)
        return self._report(run, seeds, fits)

    def _prepare(self, seed: int) -> ClassificationDataModule:
        """Load the data of a seed; refuse a pruning rate that would leave nothing."""
        datamodule = self.data.build(seed)
        if is_global_zero():
            datamodule.prepare_data()
        datamodule.setup()
        size = len(datamodule.pool_labels)
        for rate in self.settings.prune_rates:
            if num_selected(size, rate) == 0:
                raise InvalidValueError(
                    f"ccs.prune_rate={rate} leaves none of the {size} training examples; lower it"
                )
        return datamodule

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
            given = self._given_scores(datamodule, seed)
            dynamics = self._dynamics(datamodule)
            extra: list[L.Callback] = [dynamics] if given is None else []
            model = self._fit(
                run, f"{FULL}/0/seed{seed}", datamodule.part("train"), datamodule, seed, extra
            )
            if is_global_zero():
                table = dynamics.compute() if given is None else given
                table.save(folder / f"seed{seed}.safetensors")
                self._save_features(folder / f"features-seed{seed}.safetensors", model, datamodule)
            return self._measure(model, datamodule)

        run.unit(f"{FULL}/0/seed{seed}", fit)

    def _dynamics(self, datamodule: ClassificationDataModule) -> TrainingDynamics:
        pool, wanted = datamodule.part("pool"), self.settings.recorded
        is_final = not set(FINAL_SCORES).isdisjoint(wanted)
        return TrainingDynamics(
            wanted,
            len(pool),  # type: ignore[arg-type]
            eval_dataloader=datamodule.loader(pool, shuffle=False) if is_final else None,
            **self.settings.dynamics,
        )

    def _given_scores(self, datamodule: ClassificationDataModule, seed: int) -> ScoreTable | None:
        """The table of `ccs.scores_path`, if it was made for this training pool.

        Raises:
            InvalidValueError: If its rows or labels are others.
        """
        if self.settings.scores_path is None:
            return None
        path = self.settings.scores_path.replace("{seed}", str(seed))
        table = ScoreTable.load(path)
        labels = datamodule.pool_labels.numpy()
        if table.num_samples != len(labels):
            raise InvalidValueError(
                f"{path} scores {table.num_samples} examples and the training pool of seed {seed} "
                f"has {len(labels)}; score the same data, split and seed"
            )
        targets = labels if table.targets is None else table.targets
        if ((targets >= 0) & (targets != labels)).any():
            raise InvalidValueError(
                f"the labels in {path} are not those of the training pool of seed {seed}: its rows "
                "are other examples; score the same data, split and seed"
            )
        return table

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
            settings = self.settings
            selector = settings.selector(fit.method, fit.rate, fit.cutoff, fit.seed)
            cut_by = settings.cutoff_score
            selection = selector.select(
                table[settings.score_of(fit.method)],
                cutoff_scores=table[cut_by] if cut_by else None,
                labels=datamodule.pool_labels,
                features=features["pool"],
                confidence=table.get("confidence"),
                unseen=settings.unseen,
            )
            noisy = (datamodule.pool_labels != datamodule.clean_labels).numpy()
            if is_global_zero():
                selection.save(path)
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
        L.seed_everything(seed, workers=True, verbose=False)
        model: L.LightningModule = instantiate(self.model)
        loader = datamodule.loader(examples, shuffle=True)
        steps = self.settings.max_steps
        fit(run, key, model, loader, self.trainer, self.callbacks, extra or [], max_steps=steps)
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
        full = [run.finished[f"{FULL}/0/seed{s}"] for s in seeds]
        record(report, f"{FULL}/0", full)
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
                        **run.finished[f"selections/{f.key}"],
                        **run.finished[f"fits/{f.key}"],
                    }
                    for f in chosen
                ]
                name = f"{method}/{rate:g}"
                record(report, name, cells[method, rate])
                for measure in ("coverage_auc", "wrong_labels"):
                    report.metric(f"{measure}/{name}", mean(cells[method, rate], measure))
                if cutoff is not None:
                    report.metric(f"cutoff/{name}", cutoff)
        add_tables(report, self.settings, cells, full)
        add_verdict(report, self.settings, cells, full)
        report.figure("accuracy_and_coverage", figure(cells, full))
        return report

    def _best_cutoff(self, run: RunContext, method: str, rate: float, seeds: range) -> float | None:
        """The cutoff with the best validation accuracy over all seeds; the smaller on a tie."""

        def validation(cutoff: float | None) -> float:
            fits = [Fit(method, rate, cutoff, s) for s in seeds]
            return mean([run.finished[f"fits/{f.key}"] for f in fits], "val")

        cutoffs = self.settings.cutoffs_of(method, rate)
        return cutoffs[0] if len(cutoffs) == 1 else max(cutoffs, key=validation)

    def _facts(self, report: Report, run: RunContext, seeds: range) -> None:
        seconds = math.fsum(u["seconds"] for u in run.finished.values())
        report.facts |= {
            "data": f"{self.data.name}: {self.data.source()}",
            "label noise": f"{self.data.label_noise:g} of the training labels redrawn",
            "seeds": ", ".join(map(str, seeds))
            + " (initialisation, order, validation split, draw)",
            "steps": f"{self.settings.max_steps} per fit, the full one included: what a coreset "
            "saves here is data, not steps",
            "score": f"{self.settings.score}, recorded in the full fit (its cost: one fit a seed)",
            "cutoff": "chosen per pruning rate by mean validation accuracy over the seeds",
            "seconds": f"{seconds:.0f} in all units",
        }
