"""Recipe `lte`: one dense model, several ways to make its feed-forward layers sparse; compare.

For each seed, each step resumable:
1. start: train the dense model (none of this for a pretrained one).
2. dense: train it on, by as many steps as any method gets. Methods without training act on it.
3. lte, random_router, fixed_router at every target: convert the start, train by as many steps.
4. decode: the time of a token through one wide layer at the sparsities that were measured.

Quality is measured on test text that no method has seen, at the sparsity measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import Progress

import mlkit
from mlkit.convert import load_pretrained, save_pretrained
from mlkit.data import TextDataModule, TextSpec
from mlkit.data.text_rows import read_rows
from mlkit.models import TransformerModule, classification_accuracy, language_model_loss
from mlkit.report import Report, RunContext, is_global_zero
from mlkit.sparsity import (
    LTESchedule,
    MagnitudeThreshold,
    SparsityController,
    TopKExperts,
    freeze_routers,
    lte_flops,
    lte_stats,
    reset_lte_stats,
    set_lte_mode,
)
from mlkit.sparsity.settings import LTESettings
from recipes.fitting import fit, quiet_fits
from recipes.lte_decode import DecodeTimes
from recipes.lte_report import report_of

__all__ = ["LTE"]

POST_HOC = {"magnitude": MagnitudeThreshold, "moefication": TopKExperts}
FROZEN = ("random_router", "fixed_router")


@dataclass(frozen=True)
class Cell:
    """A method at a target sparsity (0 for the dense model), for one seed."""

    method: str
    target: float
    seed: int

    @property
    def key(self) -> str:
        """Name of its unit."""
        return f"{self.method}/{self.target:g}/seed{self.seed}"


class LTE:
    """Compare LTE with other sparse feed-forward layers at equal training and equal sparsity.

    Args:
        settings: The arguments `lte.*`.
        data: What to learn from.
        model: Configuration of a `TransformerModule`.
        trainer: Configuration of the Trainer.
        callbacks: Configurations of callbacks for every fit.
    """

    def __init__(
        self,
        settings: LTESettings,
        data: TextSpec,
        model: DictConfig,
        trainer: DictConfig,
        callbacks: DictConfig,
    ) -> None:
        self.settings, self.data = settings, data
        self.model, self.trainer, self.callbacks = model, trainer, callbacks

    def run(self, run: RunContext) -> Report:
        """Run every cell and report."""
        quiet_fits()
        seeds = range(run.seed, run.seed + self.settings.num_seeds)
        cells = [cell for seed in seeds for cell in self._cells(seed)]
        hidden = not is_global_zero() or self.trainer.get("enable_progress_bar", False)
        with Progress(transient=True, disable=hidden) as progress:
            bar = progress.add_task("lte", total=len(seeds) + len(cells) + 1)
            for seed in seeds:
                progress.update(bar, description=f"seed {seed}: the dense model")
                datamodule = self._prepare(seed)
                self._start(run, datamodule, seed)
                progress.advance(bar)
                for cell in self._cells(seed):
                    progress.update(bar, description=cell.key)
                    run.unit(cell.key, self._work(run, cell, datamodule))
                    progress.advance(bar)
            if self.data.task == "classification":
                run.unit("tfidf", self._tfidf)
            progress.update(bar, description="decode")
            times = self._decode(run, cells)
        return report_of(run, self.settings, self.data, cells, times)

    def _cells(self, seed: int) -> Iterator[Cell]:
        yield Cell("dense", 0.0, seed)
        for target in self.settings.targets:
            for method in self.settings.methods:
                if method != "dense":
                    yield Cell(method, target, seed)

    def _prepare(self, seed: int) -> TextDataModule:
        datamodule = self.data.build(seed)
        if is_global_zero():
            datamodule.prepare_data()
        datamodule.setup()
        return datamodule

    # --------------------------------------------------------------------- work

    def _start(self, run: RunContext, datamodule: TextDataModule, seed: int) -> None:
        """Train the dense model that every method begins with."""

        def train() -> dict[str, float]:
            module = self._module(datamodule, seed, self.settings.start_lr)
            if self.settings.start_steps:
                self._fit(run, f"start/seed{seed}", module, datamodule, self.settings.start_steps)
            if is_global_zero():
                save_pretrained(module.net, self._folder(run, f"start/seed{seed}"))
            return {"quality": self._quality(module.net, self._test(datamodule))}

        run.unit(f"start/seed{seed}", train)

    def _work(
        self, run: RunContext, cell: Cell, datamodule: TextDataModule
    ) -> Callable[[], dict[str, Any]]:
        if cell.method == "dense":
            return lambda: self._dense(run, cell, datamodule)
        if cell.method in POST_HOC:
            return lambda: self._post_hoc(run, cell, datamodule)
        return lambda: self._routed(run, cell, datamodule)

    def _dense(self, run: RunContext, cell: Cell, datamodule: TextDataModule) -> dict[str, Any]:
        module = self._started(run, cell, datamodule)
        self._fit(run, cell.key, module, datamodule, self.settings.steps)
        if is_global_zero():
            save_pretrained(module.net, self._folder(run, cell.key))
        return {"quality": self._quality(module.net, self._test(datamodule)), "sparsity": 0.0}

    def _routed(self, run: RunContext, cell: Cell, datamodule: TextDataModule) -> dict[str, Any]:
        """Convert the start and train it: LTE, or hard routing by routers that stay as they are."""
        module = self._started(run, cell, datamodule)
        net = module.net
        mlkit.convert(net, self.settings.lte_config(cell.method, cell.target, cell.seed))
        callbacks: list[L.Callback] = [SparsityController()]
        if cell.method in FROZEN:
            set_lte_mode(net, "hard")
            freeze_routers(net)
        else:
            callbacks.insert(0, LTESchedule(self.settings.stage1_fraction))
        self._fit(run, cell.key, module, datamodule, self.settings.steps, callbacks)
        set_lte_mode(net, "hard")
        reset_lte_stats(net)
        quality = self._quality(net, self._test(datamodule))
        stats = lte_stats(net)
        if is_global_zero():
            save_pretrained(net, self._folder(run, cell.key))
        return {
            "quality": quality,
            "sparsity": stats.sparsity,
            "layers": [layer.sparsity for layer in stats.layers.values()],
            "undecided": stats.undecided,
            "flops_fraction": 1 / lte_flops(net, stats).speedup,
        }

    def _post_hoc(self, run: RunContext, cell: Cell, datamodule: TextDataModule) -> dict[str, Any]:
        """Make the trained dense model sparse; training batches may be looked at."""
        net = self._module(datamodule, cell.seed, self.settings.lr).net
        load_pretrained(net, self._folder(run, Cell("dense", 0.0, cell.seed).key))
        mlkit.convert(net, self.settings.lte_config(cell.method, cell.target, cell.seed))
        set_lte_mode(net, "dense")
        torch.manual_seed(cell.seed)
        loader = datamodule.train_dataloader()
        calibration = list(islice(loader, self.settings.calibration_batches))

        with POST_HOC[cell.method](net) as method:
            method.fit(cell.target, lambda: -self._quality(net, calibration))
            quality, sparsity = method.measure(lambda: self._quality(net, self._test(datamodule)))
            layers = method.layer_sparsity()
            inputs = [float(site.skipped[0] / site.tokens) for site in method.sites]
        flops = lte_flops(net, sparsity)
        return {
            "quality": quality,
            "sparsity": sparsity,
            "layers": layers,
            "input_sparsity": sum(inputs) / len(inputs),
            "flops_fraction": 1 - flops.skipped / flops.dense,  # without a router
        }

    def _tfidf(self) -> dict[str, float]:
        """Accuracy of logistic regression on words and pairs of words, without a network."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        train, test = (read_rows(self.data, part) for part in ("train", "test"))
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10)
        )
        model.fit(train.texts, train.labels)
        return {"quality": float(model.score(test.texts, test.labels))}

    def _decode(self, run: RunContext, cells: list[Cell]) -> dict[str, dict[str, float]]:
        """Time a token at each method's mean measured sparsity."""
        times: dict[str, dict[str, float]] = {}
        timed = DecodeTimes(**self.settings.decode_sizes())
        for method, target in dict.fromkeys((c.method, c.target) for c in cells):
            found = [run.finished[c.key] for c in cells if (c.method, c.target) == (method, target)]
            sparsity = sum(unit["sparsity"] for unit in found) / len(found)
            inputs = sum(unit.get("input_sparsity", 0.0) for unit in found) / len(found)
            name = f"{method}/{target:g}"
            measure = partial(timed.measure, method, sparsity, inputs)
            times[name] = run.unit(f"decode/{name}", measure)
        return times

    # -------------------------------------------------------------------- parts

    def _module(self, datamodule: TextDataModule, seed: int, lr: float) -> TransformerModule:
        L.seed_everything(seed, workers=True, verbose=False)
        module: TransformerModule = instantiate(
            self.model, net=datamodule.model_arguments, optimizer={"lr": lr}
        )
        return module

    def _started(
        self, run: RunContext, cell: Cell, datamodule: TextDataModule
    ) -> TransformerModule:
        module = self._module(datamodule, cell.seed, self.settings.lr)
        load_pretrained(module.net, self._folder(run, f"start/seed{cell.seed}"))
        return module

    def _fit(
        self,
        run: RunContext,
        key: str,
        module: TransformerModule,
        datamodule: TextDataModule,
        steps: int,
        extra: list[L.Callback] | None = None,
    ) -> None:
        fit(
            run,
            key,
            module,
            datamodule.train_dataloader(),
            self.trainer,
            self.callbacks,
            extra or [],
            max_steps=steps,
            gradient_clip_val=self.settings.clip,
        )

    def _test(self, datamodule: TextDataModule) -> Any:
        return datamodule.test_dataloader()

    def _quality(self, net: torch.nn.Module, batches: Any) -> float:
        """Negative loss in nats per token, or accuracy: higher is better."""
        if self.data.task == "classification":
            return classification_accuracy(net, batches)
        return -language_model_loss(net, batches)

    def _folder(self, run: RunContext, key: str) -> Path:
        return run.directory / "models" / key
