"""Recipe `fiited`: one click model, several ways to keep its embedding tables small; compare.

For each seed, method and budget (each a resumable unit): build the network with the method's tables
at that many bytes, train it on one pass over the past, in the order of time, and measure the AUC on
the future that follows. Then, for each method, the peak memory of a training process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress
from torch import nn

from mlkit.data.ctr import CTRSpec, CTRStream, ctr_loader
from mlkit.embeddings import dynamic_stores
from mlkit.embeddings.memory import dense_bytes, optimizer_bytes
from mlkit.embeddings.settings import FIITEDSettings
from mlkit.models import CTRModule, ctr_quality
from mlkit.report import Report, RunContext, is_global_zero
from recipes.fiited_dims import chunk_statistics
from recipes.fiited_memory import peak_memory
from recipes.fiited_networks import network, table_optimizers
from recipes.fiited_report import report_of
from recipes.fiited_watch import Watch
from recipes.fitting import fit, quiet_fits

__all__ = ["FIITED", "Cell"]


@dataclass(frozen=True)
class Cell:
    """A method at a budget (1 for the dense tables), for one seed."""

    method: str
    fraction: float
    seed: int

    @property
    def key(self) -> str:
        """Name of its unit."""
        return f"{self.method}/{self.fraction:g}/seed{self.seed}"


class FIITED:
    """Compare dynamic embeddings with other small tables at equal bytes.

    Args:
        settings: The arguments `fiited.*`.
        data: What to learn from.
        model: Configuration of a `CTRModule`; its table optimizer is the settings'.
        trainer: Configuration of the Trainer.
        callbacks: Configurations of callbacks for every fit.
    """

    def __init__(
        self,
        settings: FIITEDSettings,
        data: CTRSpec,
        model: DictConfig,
        trainer: DictConfig,
        callbacks: DictConfig,
    ) -> None:
        self.settings, self.data = settings, data
        self.model: Mapping[str, Any] = OmegaConf.to_container(model, resolve=True)  # type: ignore[assignment]
        self.trainer, self.callbacks = trainer, callbacks

    def run(self, run: RunContext) -> Report:
        """Run every cell and report."""
        quiet_fits()
        seeds = range(run.seed, run.seed + self.settings.num_seeds)
        cells = [cell for seed in seeds for cell in self._cells(seed)]
        hidden = not is_global_zero() or self.trainer.get("enable_progress_bar", False)
        with Progress(transient=True, disable=hidden) as progress:
            bar = progress.add_task("fiited", total=len(cells) + 1)
            for seed in seeds:
                progress.update(bar, description=f"seed {seed}: the clicks")
                stream = self.data.load(seed)
                for cell in self._cells(seed):
                    progress.update(bar, description=cell.key)
                    run.unit(cell.key, partial(self._work, run, cell, stream))
                    progress.advance(bar)
            progress.update(bar, description="peak memory")
            peaks = run.unit("memory", partial(self._memory, stream))
        return report_of(run, self.settings, stream, cells, peaks)

    def _cells(self, seed: int) -> Iterator[Cell]:
        yield Cell("dense", 1.0, seed)
        for fraction in self.settings.fractions:
            for method in self.settings.methods:
                if method != "dense":
                    yield Cell(method, fraction, seed)

    def _sizes(self, stream: CTRStream) -> dict[str, Any]:
        return {"table_sizes": list(stream.table_sizes), "num_dense": stream.num_dense}

    def _work(self, run: RunContext, cell: Cell, stream: CTRStream) -> dict[str, Any]:
        L.seed_everything(cell.seed, workers=True, verbose=False)
        settings = self.settings
        net = network(
            self.model, self._sizes(stream), settings, cell.method, cell.fraction, cell.seed
        )
        module = CTRModule(
            net,
            instantiate(self.model["dense_optimizer"]),
            lambda _: table_optimizers(net, settings, cell.method),
        )
        watch = Watch(stream, settings.window)
        fit(
            run,
            cell.key,
            module,
            ctr_loader(stream, "train", self.data.batch_size),
            self.trainer,
            self.callbacks,
            [watch],
            limit_train_batches=settings.max_steps,
            max_epochs=1,
        )
        found: dict[str, Any] = ctr_quality(net, ctr_loader(stream, "test", 8192))
        found |= {"step_ms": watch.step_ms}
        found |= table_bytes(net, settings)
        found |= {"windows": watch.windows, "num_steps": watch.num_steps}
        if dynamic_stores(net):
            found |= chunk_statistics(net, stream)
            found |= {"coverage": watch.coverage, "churn": watch.churn}
        return found

    def _memory(self, stream: CTRStream) -> dict[str, int]:
        """Measure at the first budget."""
        rows = [self.settings.memory_scale * size for size in stream.table_sizes]
        return peak_memory(
            self.model,
            {**self._sizes(stream), "table_sizes": rows},
            asdict(self.settings),
            self.settings.fractions[0],
            self.data.batch_size,
        )


def table_bytes(net: nn.Module, settings: FIITEDSettings) -> dict[str, float]:
    """Return what the tables of a network take, and as fractions of the dense ones."""
    stores, tables = dynamic_stores(net), list(net.get_submodule("tables").children())
    holders: list[Any] = [*stores] or [t for t in tables if hasattr(t, "memory_report")]
    reports = [holder.memory_report() for holder in holders]
    stock = [t for t in tables if type(t) is nn.EmbeddingBag]
    sizes = [tuple(t.weight.shape) for t in stock]
    extra = sum(dense_bytes(rows, dim, settings.optimizer) for rows, dim in sizes)
    state = sum(optimizer_bytes(rows, dim, settings.optimizer) for rows, dim in sizes)
    total = sum(r.total_bytes for r in reports) + extra
    dense = sum(r.dense_bytes for r in reports) + extra
    weights = sum(r.weight_bytes for r in reports) + extra - state
    dense_weights = sum(r.dense_weight_bytes for r in reports) + extra - state
    return {
        "bytes": float(total),
        "byte_fraction": total / dense,
        "weight_fraction": weights / dense_weights,
    }
