"""`EmbeddingBudget` under a real trainer: one step each, logs, density by metric, resume."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlkit.embeddings import (
    AutoDensity,
    DynamicEmbeddingStore,
    EmbeddingBudget,
    FIITEDConfig,
    FusedEmbeddingOptimizer,
    TableSpec,
)
from mlkit.embeddings.fiited.lookup import lookup

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer"),
]

ROWS, DIM, BATCH = 40, 8, 8


class Model(L.LightningModule):
    """A fused store's steps end with its "own" optimizer, the "head"'s, or Lightning's ("none")."""

    def __init__(self, trained_by="own", auc=(), **settings):
        super().__init__()
        settings = {
            "target_density": 0.5, "optimizer": "adagrad", "lr": 0.5, "schedule": "fixed",
            "prune_every": 4, "trigger": 0.0, "decay": 0.3, "num_chunks": 2,
        } | settings  # fmt: skip
        specs = [TableSpec("user", ROWS), TableSpec("item", ROWS)]
        self.store = DynamicEmbeddingStore(specs, DIM, FIITEDConfig(**settings))
        torch.manual_seed(0)
        self.head = nn.Linear(2 * DIM, 1)
        self.trained_by = trained_by
        self.auc = iter(auc)

    def forward(self, ids):
        return self.head(lookup(self.store, ids.T.flatten())).squeeze(1)

    def training_step(self, batch, number):
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, number):
        self.log("loss", self.training_step(batch, number))

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("auc", next(self.auc, 0.0))

    def configure_optimizers(self):
        if self.trained_by == "none":
            return None
        if self.trained_by == "head":
            return torch.optim.Adam(self.head.parameters(), lr=0.01)
        fused = self.store.config.optimizer is not None
        optimizer = (
            FusedEmbeddingOptimizer(self) if fused else torch.optim.Adam(self.parameters(), lr=0.1)
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Recorder(DummyLogger):
    def __init__(self):
        super().__init__()
        self.found = []

    def log_metrics(self, metrics, step=None):
        self.found.append((step, metrics))


def loader(batches, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(ROWS // 2, (batches * BATCH, 2), generator=generator)
    half = len(ids) // 2
    ids[half:] += ROWS // 2
    target = torch.randn(len(ids), generator=generator)
    return DataLoader(TensorDataset(ids, target), batch_size=BATCH)


def trainer_of(callback, folder, **settings):
    settings = {"logger": False, "enable_checkpointing": False, "max_epochs": 1} | settings
    return L.Trainer(
        accelerator="cpu", callbacks=[callback], default_root_dir=folder, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip


WAYS = [
    {"trained_by": "own"},
    {"trained_by": "head"},
    {"trained_by": "none"},
    {"trained_by": "own", "optimizer": None},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("accumulate", "steps"), [(1, 10), (3, 4)])
def test_one_step_of_the_store_for_each_step_of_the_optimizer(way, accumulate, steps, tmp_path):
    model = Model(**way)
    callback = EmbeddingBudget()
    trainer = trainer_of(callback, tmp_path, accumulate_grad_batches=accumulate)
    trainer.fit(model, loader(10), loader(3, 1))
    assert trainer.global_step == steps
    assert model.store.steps == steps
    assert len(model.store.rounds) == steps // 4


def test_second_fit_steps_no_store_twice(tmp_path):
    for way in WAYS[:2] + WAYS[3:]:
        model, callback = Model(**way), EmbeddingBudget()
        for _ in range(2):
            trainer_of(callback, tmp_path).fit(model, loader(5))
        assert model.store.steps == 10
        assert model.store._optimizers == []


def test_optimizer_that_was_registered_by_hand_steps_once(tmp_path):
    class Registered(Model):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.store.register_optimizer(optimizer)
            return optimizer

    model = Registered(optimizer=None)
    trainer_of(EmbeddingBudget(), tmp_path).fit(model, loader(5))
    assert model.store.steps == 5
    assert len(model.store._optimizers) == 1


def test_schedule_of_lightning_reaches_the_store(tmp_path):
    model = Model()
    trainer_of(EmbeddingBudget(), tmp_path).fit(model, loader(7))
    assert model.store.update().lr == pytest.approx(0.5 * 0.7**2)


def test_validation_changes_nothing(tmp_path):
    model = Model(id_map="exact")
    trainer_of(EmbeddingBudget(), tmp_path).fit(model, loader(5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer_of(EmbeddingBudget(), tmp_path).validate(model, loader(4, 9), verbose=False)
    model.store.step()  # ids seen in validation would get rows here
    after = model.state_dict()
    for name in before:
        if name != "store._extra_state":
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("way", [WAYS[0], WAYS[1], WAYS[3]], ids=str)
def test_ten_steps_and_ten_resumed_are_twenty_steps(way, tmp_path):
    def fit(epochs, **settings):
        model = Model(**way)
        trainer = trainer_of(EmbeddingBudget(), tmp_path, max_epochs=epochs)
        trainer.fit(model, loader(10), **settings)
        return model, trainer

    whole, _ = fit(2)
    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = fit(2, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    assert whole.store.steps == 20
    assert whole.store.rounds[-1] == rest.store.rounds[-1]
    assert sum(r.evicted for r in whole.store.rounds) > 0


def test_rounds_are_logged(tmp_path):
    model, recorder = Model(), Recorder()
    trainer_of(EmbeddingBudget(), tmp_path, logger=recorder).fit(model, loader(9))
    found = {s: m for s, m in recorder.found if "embeddings/churn/user" in m}
    assert list(found) == [3, 4, 5, 6, 7, 8]  # steps from 0; a round's values stay until the next
    rounds = model.store.rounds
    assert [r.step for r in rounds] == [4, 8]
    for step, stats in ((3, rounds[0]), (6, rounds[0]), (7, rounds[1]), (8, rounds[1])):
        metrics = found[step]
        assert metrics["embeddings/churn/user"] == pytest.approx(stats.churn)
        assert metrics["embeddings/threshold/user"] == pytest.approx(stats.threshold)
        total = metrics["embeddings/density/user"] + metrics["embeddings/density/item"]
        assert total == pytest.approx(2 * stats.resident / (2 * ROWS * 2))
    total = model.store.memory_report().total_bytes
    assert found[8]["embeddings/bytes/user"] == pytest.approx(total)


# -------------------------------------------------------------------- density by metric


@pytest.mark.parametrize("way", [WAYS[0], WAYS[3]], ids=str)
def test_density_follows_the_metric(way, tmp_path):
    model = Model(auc=[0.8, 0.7995, 0.79, 0.8], **way)
    auto = AutoDensity(0.8, 0.001, step=0.125, lowest=0.1)
    callback = EmbeddingBudget(auto_density=auto, metric="auc")
    found = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, *_):
            found.append(model.store.density_of(model.store.budget))

    trainer = trainer_of(callback, tmp_path, max_epochs=5)
    trainer.callbacks.append(Watch())
    trainer.fit(model, loader(6), loader(2, 1))
    assert found == [0.5, 0.375, 0.25, 0.375, 0.375]
    assert auto.is_settled
    assert model.store.num_resident <= model.store.budget == 60
    assert model.store.steps == 30


@pytest.mark.parametrize("way", [WAYS[0], WAYS[3]], ids=str)
def test_resumed_search_is_the_same_search(way, tmp_path):
    def fit(epochs, auc, **settings):
        model = Model(auc=auc, **way)
        auto = AutoDensity(0.8, step=0.125, lowest=0.1)
        callback = EmbeddingBudget(auto_density=auto, metric="auc")
        trainer = trainer_of(callback, tmp_path, max_epochs=epochs)
        trainer.fit(model, loader(6), loader(2, 1), **settings)
        return model, trainer

    auc = [0.8, 0.8, 0.7, 0.8]
    whole, _ = fit(4, auc)
    half, trainer = fit(2, auc[:2])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = fit(4, auc[2:], ckpt_path=tmp_path / "half.ckpt")
    assert half.store.budget == 40
    assert rest.store.budget == whole.store.budget == 60
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_unknown_metric_is_named(tmp_path):
    callback = EmbeddingBudget(auto_density=AutoDensity(0.8), metric="aucc")
    trainer = trainer_of(callback, tmp_path)
    with pytest.raises(ValueError, match=r"metric='aucc'\) was not logged .*did you mean 'auc'"):
        trainer.fit(Model(auc=[1.0]), loader(2), loader(1, 1))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="auto_density and metric belong together"):
        EmbeddingBudget(metric="auc")
    plain = Model("none")
    del plain.store
    with pytest.raises(ValueError, match="Model has no dynamic embedding: call mlkit.convert"):
        trainer_of(EmbeddingBudget(), tmp_path).fit(plain, loader(1))
    with pytest.raises(ValueError, match="no optimizer of the trainer trains the pool of user"):
        trainer_of(EmbeddingBudget(), tmp_path).fit(Model("head", optimizer=None), loader(1))
