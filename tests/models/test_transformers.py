"""Hugging Face networks: from a configuration, from a folder, and what is refused."""

import sys

import pytest
import torch

from mlkit.errors import InvalidValueError, MissingDataError, MissingDependencyError
from mlkit.models import causal_lm, sequence_classifier

transformers = pytest.importorskip("transformers")  # of the extra hf

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
BYTES = {"vocab_size": 258, "pad_token_id": 257, "eos_token_id": 256}


def tiny(**changes):
    torch.manual_seed(0)
    return causal_lm(config=LLAMA, **(BYTES | changes))


@pytest.fixture
def bert(tmp_path):
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_network_from_a_configuration():
    net = tiny()
    assert isinstance(net, transformers.LlamaForCausalLM)
    assert (net.config.hidden_size, net.config.vocab_size) == (16, 258)
    assert (net.config.pad_token_id, net.config.eos_token_id) == (257, 256)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    ids = torch.randint(0, 256, (2, 9))
    assert net(input_ids=ids).logits.shape == (2, 9, 258)
    assert not any(m.p for m in net.modules() if isinstance(m, torch.nn.Dropout))
    assert net.config.attention_dropout == 0


def test_seed_decides_the_weights():
    first, second = tiny(), tiny()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_through_a_folder(tmp_path, dtype):
    net = tiny()
    net.save_pretrained(tmp_path)
    again = causal_lm(pretrained=str(tmp_path), dtype=dtype, **BYTES)
    for (name, a), b in zip(net.named_parameters(), again.parameters(), strict=True):
        assert b.dtype == getattr(torch, dtype), name
        assert torch.equal(a.to(b.dtype), b), name
    assert all(module.training for module in again.modules())
    with pytest.raises(InvalidValueError, match=r"have 300 token ids and .* knows 258.*tokenizer="):
        causal_lm(pretrained=str(tmp_path), vocab_size=300)


def test_classifier_keeps_the_encoder_and_adds_a_head(bert):
    net = sequence_classifier(bert, 3, vocab_size=30, pad_token_id=0)
    stock = transformers.BertModel.from_pretrained(bert)
    for a, b in zip(net.bert.encoder.parameters(), stock.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    assert net(input_ids=torch.ones(2, 5, dtype=torch.int64)).logits.shape == (2, 3)
    with pytest.raises(InvalidValueError, match="have 31 token ids"):
        sequence_classifier(bert, 3, vocab_size=31)
    with pytest.raises(
        InvalidValueError, match=r"num_classes of at least 2, got None; is the data"
    ):
        sequence_classifier(bert, None)


def test_decoder_as_classifier_learns_its_padding(tmp_path):
    tiny(pad_token_id=None).save_pretrained(tmp_path)
    net = sequence_classifier(str(tmp_path), 2, pad_token_id=257)
    assert net.config.pad_token_id == 257
    ids = torch.tensor([[1, 2, 257, 257], [3, 4, 5, 6]])
    alone = net(input_ids=ids[:1, :2]).logits
    torch.testing.assert_close(net(input_ids=ids).logits[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either pretrained or config, got pretrained=None, config=None"),
        ({"config": LLAMA, "pretrained": "x"}, "either pretrained or config"),
        ({"config": LLAMA}, "needs vocab_size.*is the data a text set"),
        ({"config": {"hidden_size": 8}, "vocab_size": 9}, "needs a model_type"),
        ({"config": {"model_type": "lama"}, "vocab_size": 9}, "model_type=lama is none of"),
        ({"config": LLAMA, "vocab_size": 9, "dtype": "int8"}, "dtype must name .* got 'int8'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        causal_lm(**arguments)


def test_absent_networks_are_errors_in_words(tmp_path, monkeypatch):
    absent = str(tmp_path / "absent")
    for load in (lambda: causal_lm(pretrained=absent), lambda: sequence_classifier(absent, 2)):
        with pytest.raises(MissingDataError, match="there is no folder .*absent"):
            load()
    with pytest.raises(MissingDataError, match="owner/none cannot be loaded"):
        causal_lm(pretrained="owner/none")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"causal_lm needs .*mlkit-torch\[hf\]"):
        causal_lm(pretrained=absent)
