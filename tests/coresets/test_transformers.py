"""Recording inside the Hugging Face Trainer."""

import datasets
import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
pytest.importorskip("accelerate", reason="needs the extra 'hf'")

from mlkit.coresets import DynamicsRecorder, DynamicsTrainerMixin, IndexCollator
from mlkit.errors import InvalidValueError, RunError

SIZE = 10


class Recording(DynamicsTrainerMixin, transformers.Trainer):
    pass


def _model(kind):
    torch.manual_seed(0)
    if kind == "causal":
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _dataset(kind):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (SIZE, 6))
    labels = tokens.copy() if kind == "causal" else rng.integers(0, 3, SIZE)
    rows = {"input_ids": tokens.tolist(), "labels": labels.tolist(), "index": list(range(SIZE))}
    return datasets.Dataset.from_dict(rows)


def _trainer(kind, folder, epochs=2, lr=0.0, collator=None, **more):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=4,
        learning_rate=lr, remove_unused_columns=False, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, **{"save_strategy": "no", **more},
    )  # fmt: skip
    collator = collator or IndexCollator(transformers.default_data_collator)
    trainer = Recording(
        _model(kind), arguments, train_dataset=_dataset(kind), data_collator=collator
    )
    trainer.recorder = DynamicsRecorder(SIZE, ["aum", "confidence"])
    return trainer


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_scores_are_those_of_the_model(kind, tmp_path):
    """With a learning rate of zero the recorded confidence is that of the untouched model."""
    trainer = _trainer(kind, tmp_path)
    trainer.train()
    table = trainer.recorder.compute()
    assert (table.visits == 2).all()
    rows = _dataset(kind)
    tokens = torch.tensor(rows["input_ids"][:])
    labels = torch.tensor(rows["labels"][:])
    with torch.no_grad():
        probs = _model(kind)(input_ids=tokens).logits.softmax(-1)
    if kind == "causal":
        want = probs[:, :-1].gather(-1, labels[:, 1:, None]).squeeze(-1).mean(1)
    else:
        want = probs.gather(-1, labels[:, None]).squeeze(-1)
    np.testing.assert_allclose(table["confidence"].values, want, atol=1e-5)


def test_resume_keeps_the_record(tmp_path):
    whole = _trainer("classifier", tmp_path / "whole", epochs=4, lr=1e-2)
    whole.train()
    first = _trainer("classifier", tmp_path / "parts", epochs=4, lr=1e-2, save_strategy="epoch")
    first.train()
    second = _trainer("classifier", tmp_path / "parts", epochs=4, lr=1e-2)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-6"))
    third = _trainer("classifier", tmp_path / "parts", epochs=5, lr=1e-2)
    third.train(resume_from_checkpoint=True)
    assert (third.recorder.compute().visits == 5).all()
    table = second.recorder.compute()
    assert (table.visits == 4).all()
    np.testing.assert_allclose(
        table["aum"].values, whole.recorder.compute()["aum"].values, atol=1e-5
    )


def test_what_is_missing_is_named(tmp_path):
    trainer = _trainer("classifier", tmp_path)
    trainer.recorder = None
    with pytest.raises(RunError, match=r"trainer\.recorder = DynamicsRecorder"):
        trainer.train()
    with pytest.raises(InvalidValueError, match="no 'index': add dataset.add_column"):
        IndexCollator(transformers.default_data_collator)([{"labels": 1}])
    trainer = _trainer(
        "classifier",
        tmp_path,
        collator=lambda rows: transformers.default_data_collator(
            [{k: v for k, v in r.items() if k != "index"} for r in rows]
        ),
    )
    with pytest.raises(InvalidValueError, match="needs 'index' and 'labels': wrap the collator"):
        trainer.train()
