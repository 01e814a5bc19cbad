"""TrainingDynamics inside Lightning: every way to tell indices and logits, resume, DDP."""

import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlkit.coresets import DynamicsRecorder, IndexedDataset, IndexedStepMixin, TrainingDynamics
from mlkit.errors import InvalidValueError, RunError
from tests.helpers.ddp import run_ddp

SIZE, CLASSES = 22, 3


def _data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SIZE, 4, generator=generator)
    return inputs, torch.randint(CLASSES, (SIZE,), generator=generator)


class DictData(torch.utils.data.Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        inputs, labels = _data()
        return {"idx": i, "input": inputs[i], "label": labels[i]}


class Plain(L.LightningModule):
    """A stranger's module that knows nothing of coresets but returns its logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).relu())

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Indexed(IndexedStepMixin, Plain):
    pass


class FromDict(Plain):
    def forward(self, x):
        return super().forward(x["input"] if isinstance(x, dict) else x)

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["input"], batch["label"]), batch_idx)


class FromPair(Plain):
    """Unwraps the indexed batch itself and leaves the logits as an attribute."""

    def training_step(self, batch, batch_idx):
        x, y = batch.item
        self.coreset_logits = self(x)
        return nn.functional.cross_entropy(self.coreset_logits, y)


def _trainer(*callbacks, epochs=3, **more):
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **more},
    )


def _by_hand(scores, epochs=3):
    """The same training in a plain loop."""
    model, recorder = Plain(), DynamicsRecorder(SIZE, scores)
    optimizer = model.configure_optimizers()
    inputs, labels = _data()
    for _ in range(epochs):
        for rows in torch.arange(SIZE).split(5):
            features = model.body(inputs[rows]).relu()
            logits = model.head(features)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
            recorder.update(rows, logits, labels[rows], features.detach())
        recorder.end_epoch()
    return recorder, model


def _same(table, recorder):
    want = recorder.compute()
    for name in want:
        np.testing.assert_allclose(table[name].values, want[name].values, atol=1e-6, err_msg=name)


def _indexed_loader(**more):
    return DataLoader(IndexedDataset(TensorDataset(*_data())), batch_size=5, **more)


@pytest.mark.parametrize(
    ("module", "loader"),
    [
        (Indexed, _indexed_loader),
        (FromPair, _indexed_loader),
        (FromDict, lambda: DataLoader(DictData(), batch_size=5)),
    ],
)
def test_every_way_of_telling_gives_the_plain_loop(module, loader):
    scores = ["aum", "forgetting", "el2n", "grand", "variability"]
    dynamics = TrainingDynamics(scores)
    _trainer(dynamics).fit(module(), loader())
    recorder, _ = _by_hand(scores)
    _same(dynamics.compute(), recorder)


def test_evaluation_pass_scores_the_trained_model(tmp_path):
    dynamics = TrainingDynamics(
        ["aum", "entropy", "loss"],
        SIZE,
        eval_dataloader=DataLoader(DictData(), batch_size=4),
        save_to=tmp_path / "scores.safetensors",
    )
    module = FromDict()
    _trainer(dynamics).fit(module, DataLoader(DictData(), batch_size=5))
    inputs, labels = _data()
    want = nn.functional.cross_entropy(module(inputs), labels, reduction="none")
    np.testing.assert_allclose(dynamics.compute()["loss"].values, want.detach(), atol=1e-6)
    assert module.training
    loaded = type(dynamics.compute()).load(tmp_path / "scores.safetensors")
    np.testing.assert_array_equal(loaded["entropy"].values, dynamics.compute()["entropy"].values)


def test_resumed_fit_records_what_an_uninterrupted_one_does(tmp_path):
    scores = ["aum", "forgetting", "dyn_unc"]
    first = TrainingDynamics(scores, window=2)
    trainer = _trainer(first, epochs=2)
    trainer.fit(Indexed(), _indexed_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = TrainingDynamics(scores, window=2)
    _trainer(second, epochs=4).fit(
        Indexed(), _indexed_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    whole = TrainingDynamics(scores, window=2)
    _trainer(whole, epochs=4).fit(Indexed(), _indexed_loader())
    assert (second.compute().visits == 4).all()
    for name in scores:
        np.testing.assert_array_equal(
            second.compute()[name].values, whole.compute()[name].values, err_msg=name
        )


def test_checkpoint_on_the_last_batch_of_an_epoch_loses_no_epoch(tmp_path):
    """Lightning ends that epoch neither before the checkpoint nor after it."""
    first, second = TrainingDynamics(["aum"]), TrainingDynamics(["aum"])
    every = {"dirpath": tmp_path, "every_n_train_steps": 5, "save_top_k": -1, "filename": "{step}"}
    saved = [L.pytorch.callbacks.ModelCheckpoint(**every) for _ in range(2)]
    trainer = _trainer(first, saved[0], epochs=1, enable_checkpointing=True)
    trainer.fit(Indexed(), _indexed_loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory .* not empty")
        trainer = _trainer(second, saved[1], epochs=4, enable_checkpointing=True)
        trainer.fit(
            Indexed(), _indexed_loader(), ckpt_path=tmp_path / "step=5.ckpt", weights_only=True
        )
    assert (second.compute().visits == 4).all()


def test_finished_checkpoint_still_gives_the_table(tmp_path):
    first = TrainingDynamics(["aum"])
    trainer = _trainer(first, epochs=2)
    trainer.fit(Indexed(), _indexed_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second = TrainingDynamics(["aum"])
    _trainer(second, epochs=2).fit(
        Indexed(), _indexed_loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    assert np.array_equal(second.compute()["aum"].values, first.compute()["aum"].values)


def test_two_callbacks_in_one_trainer(tmp_path):
    both = [TrainingDynamics(["aum"], space=s) for s in ("prob", "logit")]
    _trainer(*both).fit(Indexed(), _indexed_loader())
    prob, logit = (b.compute()["aum"] for b in both)
    assert (prob.space, logit.space) == ("prob", "logit")
    assert not np.allclose(prob.values, logit.values)


def _ddp_fit(rank, world, epochs):
    dynamics = TrainingDynamics(["aum", "forgetting"])
    module = Indexed()
    # A learning rate of zero: both worlds then see the same logits for every example.
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=epochs,
        callbacks=[dynamics],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, _indexed_loader(shuffle=True))
    table = dynamics.compute()
    return {k: table[k].values for k in table}, table.visits


def test_lightning_ddp_records_what_one_process_does():
    alone, visits = _ddp_fit(0, 1, 2)
    for scores, seen in run_ddp(_ddp_fit, 2, 2):
        assert (seen == visits).all()
        for name in alone:
            np.testing.assert_allclose(scores[name], alone[name], atol=1e-6, err_msg=name)


def test_what_is_missing_is_named():
    with pytest.raises(InvalidValueError, match="which examples are in this batch.*IndexedDataset"):
        _trainer(TrainingDynamics(["aum"])).fit(
            Plain(), DataLoader(TensorDataset(*_data()), batch_size=5)
        )

    class NoLogits(Indexed):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    with pytest.raises(InvalidValueError, match="where are the logits.*self.coreset_logits"):
        _trainer(TrainingDynamics(["aum"])).fit(NoLogits(), _indexed_loader())
    with pytest.raises(InvalidValueError, match=r"\['entropy'\] describe the trained model"):
        _trainer(TrainingDynamics(["entropy"])).fit(Indexed(), _indexed_loader())
    with pytest.raises(InvalidValueError, match="no linear layer 'hed' in the model; did you mean"):
        _trainer(TrainingDynamics(["grand"], head="hed")).fit(Indexed(), _indexed_loader())
    with pytest.raises(InvalidValueError, match="no score 'amu'"):
        TrainingDynamics(["amu"])
    with pytest.raises(RunError, match=r"run trainer\.fit first"):
        TrainingDynamics(["aum"]).compute()
