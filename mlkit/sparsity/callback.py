"""Lightning callbacks that run the two stages of LTE and reach a wanted sparsity."""

from __future__ import annotations

from typing import Any

import lightning as L

from mlkit.errors import InvalidValueError
from mlkit.sparsity.control import SparsityControl
from mlkit.sparsity.losses import set_aux_loss_scale
from mlkit.sparsity.module import lte_layers
from mlkit.sparsity.schedule import TwoStageSchedule
from mlkit.sparsity.stats import StatsWindow

__all__ = ["LTESchedule", "SparsityController"]


class LTESchedule(L.Callback):
    """Train a converted model in two stages: soft routing with the losses, then hard routing.

    At every step it sets lambda and the scale of the auxiliary loss (gradient scaler, accumulated
    batches); at the boundary it switches to hard routing, freezes the routers and takes their state
    out of the optimizers. It logs `lte/sparsity`, `lte/eff`, `lte/sep`, `lte/eta`, `lte/lam` and
    `lte/stage`. It has no state of its own: the stage follows from the step, and mode and threshold
    are in the model's checkpoint.

    Args:
        stage1_fraction: Part of the optimizer steps that is stage 1.
        total_steps: Optimizer steps of both stages; None asks the trainer.

    Example:
        >>> LTESchedule(stage1_fraction=0.6).stage1_fraction
        0.6
    """

    def __init__(self, stage1_fraction: float = 0.5, total_steps: int | None = None) -> None:
        TwoStageSchedule(total_steps or 1000, stage1_fraction)
        self.stage1_fraction = stage1_fraction
        self.total_steps = total_steps
        self.schedule: TwoStageSchedule | None = None
        self._window: StatsWindow | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is something to schedule, before any step."""
        lte_layers(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the stages."""
        total = self.total_steps or trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            raise InvalidValueError(
                "the trainer does not know how many steps there will be: set max_epochs or "
                "max_steps, or LTESchedule(total_steps=...)"
            )
        self.schedule = TwoStageSchedule(int(total), self.stage1_fraction)
        self._window = StatsWindow(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the model into the state of this step."""
        assert self.schedule is not None
        self.schedule.apply(pl_module, trainer.global_step, trainer.optimizers)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        set_aux_loss_scale(scale / trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log what the layers did since the last time."""
        if (batch_idx + 1) % max(trainer.log_every_n_steps, 1):  # type: ignore[attr-defined]
            return
        assert self._window is not None
        assert self.schedule is not None
        stats = self._window.take(sync=True)
        group = next(iter(lte_layers(pl_module).values())).group
        in_stage2 = trainer.global_step > self.schedule.stage1_steps
        values = {
            "sparsity": stats.sparsity,
            "eff": stats.eff,
            "sep": stats.sep,
            "undecided": stats.undecided,
            "nan": float(stats.nan),
            "eta": float(group.eta),
            "lam": float(group.lam),
            "stage": 1.0 + in_stage2,
        }
        pl_module.log_dict({f"lte/{name}": value for name, value in values.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave nothing global behind."""
        set_aux_loss_scale(1.0)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing global behind."""
        set_aux_loss_scale(1.0)


class SparsityController(L.Callback):
    """Reach a target sparsity: eta in stage 1, the threshold in stage 2 (see `SparsityControl`).

    Use it with `LTESchedule`; only there is a stage without separability loss, in which eta works.

    Args:
        target: Wanted FFN sparsity in (0, 1); None takes `LTEConfig.target_sparsity`.
        interval: Optimizer steps between measurements.
        settings: Further arguments of `EtaController`; its eta begins with that of the config.
    """

    def __init__(self, target: float | None = None, interval: int = 5, **settings: Any) -> None:
        SparsityControl(0.5 if target is None else target, interval, **settings)
        self.target, self.interval, self.settings = target, interval, settings
        self.control: SparsityControl | None = None
        self._pending: dict[str, Any] | None = None
        self._last_step = 0

    @property
    def state_key(self) -> str:
        """Key of this callback in a checkpoint."""
        return "SparsityController"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take target and eta from the model's config, or go on from a checkpoint."""
        config = next(iter(lte_layers(pl_module).values())).config
        target = config.target_sparsity if self.target is None else self.target
        if target is None:
            raise InvalidValueError(
                "SparsityController has no target: set LTEConfig.target_sparsity or target=..."
            )
        eta = min(max(config.eta, 1e-3), 1e3)
        self.control = SparsityControl(target, self.interval, **({"eta": eta} | self.settings))
        if self._pending is not None:
            self.control.load_state_dict(self._pending)
            self._pending = None
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Control after each optimizer step."""
        assert self.control is not None
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.control.step(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the controllers' state."""
        return {} if self.control is None else self.control.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._pending = state_dict or None
