"""The two stages of LTE: what holds at which step.

Stage 1 trains model and routers with soft routing; stage 2 freezes the routers and lets the model
get used to hard routing (Zheng et al. 2024, arXiv 2402.06126, section 4.3). When lambda comes in is
ours, see `LTEConfig.lam_schedule`. Nothing here knows Lightning: call `TwoStageSchedule.apply` at
every step of any loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlkit.errors import InvalidValueError
from mlkit.sparsity.module import lte_layers
from mlkit.sparsity.stats import freeze_routers, set_lte_mode, set_lte_weights

__all__ = ["StagePlan", "TwoStageSchedule", "drop_router_state"]


@dataclass(frozen=True)
class StagePlan:
    """What holds at one step.

    Args:
        stage: 1 or 2.
        mode: Of the layers.
        lam: Weight of the separability loss.
        reason: For the log.
    """

    stage: int
    mode: str
    lam: float
    reason: str


class TwoStageSchedule:
    """Say for every step which stage it is in, and put a model into it.

    Args:
        total_steps: Optimizer steps of both stages.
        stage1_fraction: Part of them that is stage 1; the paper gives both about the same, 0.5.

    Raises:
        InvalidValueError: If a stage would have no step.

    Example:
        >>> from mlkit.sparsity import LTEConfig
        >>> schedule = TwoStageSchedule(100)
        >>> late = LTEConfig(lam_schedule=(0.5, 0.3))
        >>> [schedule.plan(step, late).lam for step in (0, 25, 40, 50)]
        [0.0, 0.0, 0.5, 0.5]
        >>> schedule.plan(50, LTEConfig()).mode
        'hard'
    """

    def __init__(self, total_steps: int, stage1_fraction: float = 0.5) -> None:
        if not 0 < stage1_fraction < 1:
            raise InvalidValueError(f"stage1_fraction must be in (0, 1), got {stage1_fraction}")
        self.total_steps = total_steps
        self.stage1_steps = round(total_steps * stage1_fraction)
        if not 0 < self.stage1_steps < total_steps:
            raise InvalidValueError(
                f"total_steps must leave a step for each stage, got total_steps={total_steps} "
                f"with stage1_fraction={stage1_fraction}"
            )
        self._stage: int | None = None

    def plan(self, step: int, config: Any) -> StagePlan:
        """Decide from the number of optimizer steps done and the `LTEConfig`."""
        if step >= self.stage1_steps:
            return StagePlan(2, "hard", config.lam, "stage 2: hard routing, routers frozen")
        lam = config.lambda_at(step / self.stage1_steps)
        what = "without" if lam == 0 else "with"
        return StagePlan(1, "soft", lam, f"stage 1: soft routing, {what} separability")

    def apply(
        self, model: nn.Module, step: int, optimizers: Iterable[torch.optim.Optimizer] = ()
    ) -> StagePlan:
        """Put the model into the state of a step; at the boundary routers and their state go.

        Args:
            model: Has LTE layers.
            step: Optimizer steps done.
            optimizers: Lose their state of the routers at the boundary.
        """
        plan = self.plan(step, next(iter(lte_layers(model).values())).config)
        set_lte_weights(model, lam=plan.lam)
        if plan.stage != self._stage:
            set_lte_mode(model, plan.mode)
            freeze_routers(model, plan.stage == 2)
            if plan.stage == 2:
                for optimizer in optimizers:
                    drop_router_state(model, optimizer)
            self._stage = plan.stage
        return plan


def drop_router_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take the routers' moments out of an optimizer, and their gradients away.

    The parameters stay in its groups: an optimizer passes over those without a gradient, and
    checkpoints of both stages keep one layout.
    """
    for layer in lte_layers(model).values():
        for parameter in layer.router.parameters():
            parameter.grad = None
            optimizer.state.pop(parameter, None)
