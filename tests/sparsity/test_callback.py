import contextlib

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import mlkit
from mlkit.errors import InvalidValueError, RunError
from mlkit.sparsity import LTEConfig, LTESchedule, SparsityController, losses, lte_layers
from tests.sparsity import toy


class Module(L.LightningModule):
    def __init__(self, config=None):
        super().__init__()
        self.net = toy.Net()
        if config is not None:
            mlkit.convert(self, config)
        self.seen = []

    def training_step(self, batch, _):
        layer = self.net.layers[0]
        self.seen.append((layer.mode, float(layer.group.lam), float(losses._scale)))
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def predict_step(self, batch, _):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)


def module(**changes):
    config = LTEConfig(expert_size=8, grouping="none", **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Module(config)


def loader(count=320):
    return DataLoader(TensorDataset(*toy.data(count, 1)), batch_size=32)


def trainer(tmp_path, *callbacks, **changes):
    options = {
        "max_epochs": 2, "accelerator": "cpu", "default_root_dir": tmp_path, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
        "enable_checkpointing": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **(options | changes))


def test_two_stages_in_a_fit(tmp_path):
    model, schedule = module(lam_schedule=(0.5, 0.3)), LTESchedule()
    fit = trainer(tmp_path, schedule)
    fit.fit(model, loader())
    modes = [mode for mode, _, _ in model.seen]
    assert modes == ["soft"] * 10 + ["hard"] * 10
    lams = [lam for _, lam, _ in model.seen]
    assert lams[:6] == [0.0] * 6
    assert lams == sorted(lams)
    assert lams[8:] == [0.5] * 12
    routers = [p for m in lte_layers(model).values() for p in m.router.parameters()]
    assert not any(p.requires_grad for p in routers)
    assert not any(p in fit.optimizers[0].state for p in routers)
    logged = {k: float(v) for k, v in fit.callback_metrics.items()}
    assert logged["lte/stage"] == 2
    assert 0 <= logged["lte/sparsity"] <= 1
    assert logged["lte/lam"] == 0.5
    assert float(losses._scale) == 1


def test_accumulated_batches_scale_the_auxiliary_loss_and_count_optimizer_steps(tmp_path):
    model = module()
    trainer(tmp_path, LTESchedule(), accumulate_grad_batches=2).fit(model, loader())
    assert [mode for mode, _, _ in model.seen] == ["soft"] * 10 + ["hard"] * 10
    assert {scale for _, _, scale in model.seen} == {0.5}


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    def weights(batch_size, accumulate):
        model = module(eta=2.0)
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.1)
        data = DataLoader(TensorDataset(*toy.data(64, 1)), batch_size=batch_size)
        fit = trainer(tmp_path, LTESchedule(total_steps=4), max_epochs=1,
                      accumulate_grad_batches=accumulate)  # fmt: skip
        fit.fit(model, data)
        return {n: p.detach() for n, p in model.named_parameters()}

    torch.testing.assert_close(weights(32, 1), weights(16, 2), rtol=1e-4, atol=1e-6)


def test_a_gradient_scaler_scales_the_auxiliary_loss_too(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    class Scaled(MixedPrecision):
        """As on a GPU with 16-mixed, but without its rounding."""

        def forward_context(self):
            return contextlib.nullcontext()

    def weights(**changes):
        model = module(eta=2.0)
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.1)
        fit = trainer(tmp_path, LTESchedule(total_steps=20), max_epochs=1, **changes)
        fit.fit(model, loader())
        return model.seen, {n: p.detach() for n, p in model.named_parameters()}

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    seen, found = weights(plugins=[Scaled("16-mixed", "cpu", scaler)], accumulate_grad_batches=2)
    assert {scale for _, _, scale in seen} == {2.0**11, 2.0**12}, "it grew once on the way"
    torch.testing.assert_close(found, weights(accumulate_grad_batches=2)[1], rtol=1e-4, atol=1e-6)


def test_resume_in_stage_two_and_mode_from_a_checkpoint(tmp_path):
    model = module(target_sparsity=0.5)
    callbacks = LTESchedule(), SparsityController(interval=2)
    fit = trainer(tmp_path, *callbacks, max_epochs=3)
    fit.fit(model, loader())
    path = tmp_path / "last.ckpt"
    fit.save_checkpoint(path)
    limits = {m.limit for m in lte_layers(model).values()}
    assert limits != {0.0}

    again, schedule, controller = module(target_sparsity=0.5), LTESchedule(), SparsityController()
    more = trainer(tmp_path, schedule, controller, max_epochs=4)
    more.fit(again, loader(), ckpt_path=path, weights_only=True)
    assert [mode for mode, _, _ in again.seen] == ["hard"] * 10
    assert controller.control.threshold.limit != 0

    fresh = module(target_sparsity=0.5)
    other = trainer(tmp_path, LTESchedule(), SparsityController())
    other.predict(fresh, loader(), ckpt_path=path, weights_only=True)
    assert {m.limit for m in lte_layers(fresh).values()} == limits
    assert {m.mode for m in lte_layers(fresh).values()} == {"hard"}


def test_controller_moves_eta_then_the_threshold(tmp_path):
    model, controller = module(), SparsityController(0.5, interval=2)
    trainer(tmp_path, LTESchedule(), controller, max_epochs=4).fit(model, loader())
    layer = model.net.layers[0]
    assert float(layer.group.eta) == pytest.approx(controller.control.eta.eta)
    assert controller.control.eta.eta != 1.0
    assert layer.limit == controller.control.threshold.limit != 0.0
    assert layer.group is model.net.layers[1].group


def test_misuse_is_said_before_the_first_step(tmp_path):
    with pytest.raises(RunError, match=r"Module has no LTE layer: mlkit\.convert"):
        trainer(tmp_path, LTESchedule()).fit(Module(), loader())
    with pytest.raises(InvalidValueError, match="SparsityController has no target"):
        trainer(tmp_path, SparsityController()).fit(module(), loader())
    with pytest.raises(InvalidValueError, match="stage1_fraction"):
        LTESchedule(1.0)
    with pytest.raises(InvalidValueError, match="target must be in"):
        SparsityController(1.5)
    with pytest.raises(InvalidValueError, match="does not know how many steps"):
        trainer(tmp_path, LTESchedule(), max_epochs=-1, max_time={"seconds": 5}).fit(
            module(), loader()
        )


def test_a_failing_fit_leaves_the_scale_at_one(tmp_path):
    model = module()

    def fail(*batch):
        raise RuntimeError("stop here")

    model.training_step = fail
    with pytest.raises(RuntimeError, match="stop here"):
        trainer(tmp_path, LTESchedule(), accumulate_grad_batches=4).fit(model, loader())
    assert float(losses._scale) == 1
