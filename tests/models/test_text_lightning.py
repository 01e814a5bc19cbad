"""TransformerModule and its measures, against torch's and by hand."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlkit.errors import InvalidValueError
from mlkit.models import TransformerModule, classification_accuracy, language_model_loss

VOCABULARY = 11


class Bigram(nn.Module):
    """Predicts a token from the one before it; in Hugging Face's form."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.table(input_ids)
        if self.training:
            logits = logits * 2
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def batches(sizes=(4, 4, 1), length=7, ignored=0.4):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        ids = torch.randint(VOCABULARY, (size, length), generator=generator)
        is_ignored = torch.rand(size, length, generator=generator) < ignored
        yield {"input_ids": ids, "labels": ids.masked_fill(is_ignored, -100)}


def test_loss_weighs_every_token_the_same():
    net = Bigram()
    losses = []
    for batch in batches():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            for before, target in zip(ids[:-1], labels[1:], strict=True):
                if target != -100:
                    losses.append(-net.table(before).log_softmax(-1)[target])
    wanted = torch.stack(losses).double().mean()
    # float32 sums of fewer than 30 terms
    assert language_model_loss(net, batches()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    whole = {k: torch.cat([b[k] for b in batches()]) for k in ("input_ids", "labels")}
    assert language_model_loss(net, [whole]) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_loss_is_the_networks_own_in_evaluation_mode():
    transformers = pytest.importorskip("transformers")  # of the extra hf
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=16
    )
    net = transformers.GPT2LMHeadModel(config).train()
    (batch,) = batches(sizes=(3,))
    measured = language_model_loss(net, [batch])
    assert net.training
    assert net.transformer.drop.training
    with torch.no_grad():
        assert measured == pytest.approx(float(net.eval()(**batch).loss), rel=1e-5)


def test_accuracy_counts_every_example_once():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(VOCABULARY))

        def forward(self, input_ids, attention_mask):
            assert attention_mask.shape == input_ids.shape
            return SimpleNamespace(logits=self.weight[input_ids[:, 0]])

    given = []
    for batch in batches():
        labels = torch.zeros(len(batch["input_ids"]), dtype=torch.int64)
        given.append(
            {**batch, "labels": labels, "attention_mask": torch.ones_like(batch["input_ids"])}
        )
    firsts = torch.cat([b["input_ids"][:, 0] for b in given])
    assert classification_accuracy(First(), given) == (firsts == 0).double().mean()


@pytest.mark.parametrize("measure", [language_model_loss, classification_accuracy])
def test_modes_are_restored_even_after_an_error(measure):
    net = Bigram().train()
    net.dropout.eval()

    def broken():
        assert not net.training
        yield {"input_ids": torch.tensor([[VOCABULARY]]), "labels": torch.zeros(1, 1).long()}

    with pytest.raises(IndexError):
        measure(net, broken())
    assert net.training
    assert net.table.training
    assert not net.dropout.training
    with pytest.raises(InvalidValueError, match="there is no"):
        measure(net, [])


# --------------------------------------------------------------------------- training


def fit(max_steps, warmup_fraction=0.06, **trainer):
    module = TransformerModule(
        Bigram(), lambda parameters: torch.optim.SGD(parameters, lr=1.0), warmup_fraction
    )
    rates = []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    data = torch.utils.data.DataLoader(
        [{k: v[0] for k, v in b.items()} for b in batches(sizes=[1] * 12)], batch_size=3
    )
    L.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record()],
        **trainer,
    ).fit(module, data)
    return module, rates


def test_rate_rises_then_falls_to_nothing():
    _, rates = fit(50, warmup_fraction=0.1)
    up = [(i + 1) / 5 for i in range(5)]
    down = [(50 - i) / 45 for i in range(5, 50)]
    assert rates == pytest.approx(up + down)


@pytest.mark.parametrize("steps", [1, 2, 17])
@pytest.mark.parametrize("fraction", [0.0, 0.06, 1.0])
def test_every_step_learns(steps, fraction):
    _, rates = fit(steps, warmup_fraction=fraction)
    assert len(rates) == steps
    assert all(0 < rate <= 1 for rate in rates)


def test_epochs_set_the_schedule_where_steps_do_not():
    _, rates = fit(-1, warmup_fraction=0.0, max_epochs=2)
    assert rates == pytest.approx([1 - i / 8 for i in range(8)])


def test_endless_fit_is_refused():
    with pytest.raises(InvalidValueError, match="set max_steps"):
        fit(-1, max_epochs=-1)


def test_training_lowers_the_loss():
    module, _ = fit(60)
    torch.manual_seed(0)
    assert language_model_loss(module.net, batches()) < language_model_loss(Bigram(), batches())


def test_optimizer_holds_only_what_wants_a_gradient():
    net = Bigram()
    net.frozen = nn.Linear(2, 2).requires_grad_(False)
    held = []

    def optimizer(parameters):
        held.extend(parameters)
        return torch.optim.SGD(held, lr=1.0)

    module = TransformerModule(net, optimizer)
    module._trainer = SimpleNamespace(estimated_stepping_batches=3)
    module.configure_optimizers()
    assert [id(p) for p in held] == [id(net.table.weight)]


def test_warmup_out_of_range_is_refused():
    with pytest.raises(InvalidValueError, match=r"warmup_fraction must be in \[0, 1\], got 1\.5"):
        TransformerModule(Bigram(), torch.optim.SGD, warmup_fraction=1.5)
