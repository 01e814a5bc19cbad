"""TextSpec and TextDataModule: every token once, whole documents apart, errors before the work."""

import lightning as L
import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.data import ByteTokenizer, TextDataModule, TextSpec
from mlkit.data.text_examples import TokenBlocks, TokenSequences
from mlkit.errors import InvalidTypeError, InvalidValueError, MissingDataError
from mlkit.models import classification_accuracy, language_model_loss
from mlkit.run import build
from tests.helpers.data import fixture_overrides
from tests.helpers.runs import compose_job
from tests.helpers.text import network_overrides, write_tokenizer

HERE = "tests.data.test_text_datamodule"
END = ByteTokenizer.eos_token_id


def documents(num=20, text_key="text"):
    rng = np.random.default_rng(0)
    return [{text_key: f"document {i}: " + "é" * int(rng.integers(1, 40))} for i in range(num)]


def prompted(num=12):
    return [{"meaning": f"m{i // 2}", "text": f"words {i}"} for i in range(num)]


def sentences(num=30):
    return [{"sentence": "x" * (1 + i % 7), "label": i % 3} for i in range(num)]


def dataset(**arguments):
    import datasets

    return datasets.Dataset.from_list(documents(**arguments))


def number(num=20):
    return num


def node(kind, **arguments):
    return {"_target_": f"{HERE}.{kind}", **arguments}


def spec(kind="documents", **changes):
    arguments = {
        "name": "own",
        "task": "language_model",
        "train": node(kind),
        "test": node(kind, num=6),
        "sequence_length": 16,
        "batch_size": 4,
        "val_fraction": 0.2,
    }
    return TextSpec(**(arguments | changes))


def classification(**changes):
    arguments = {"task": "classification", "text_key": "sentence", "num_classes": 3}
    return spec("sentences", **(arguments | changes))


def counted(dataset):
    """The labels of a part in order, each token once."""
    batch = dataset.__getitems__(range(len(dataset)))
    return batch["labels"][batch["labels"] != -100]


def joined(rows, text_key="text"):
    return [i for row in rows for i in (*row[text_key].encode(), END)]


# --------------------------------------------------------------------------- blocks


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(0, 40))
def test_every_token_is_a_label_exactly_once(length, more):
    tokens = torch.arange(length + more)
    blocks = TokenBlocks(tokens, None, length)
    assert len(blocks) == -(-len(tokens) // length)
    assert counted(blocks).tolist() == tokens.tolist()
    for i in range(len(blocks)):
        item = blocks[i]
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert len(item["input_ids"]) == length
        start = int(item["input_ids"][0])
        assert item["input_ids"].tolist() == list(range(start, start + length))
        is_counted = item["labels"] != -100
        assert torch.equal(item["labels"][is_counted], item["input_ids"][is_counted])


def test_blocks_leave_the_stream_as_it_was():
    tokens, is_ignored = torch.arange(7), torch.zeros(7, dtype=torch.bool)
    TokenBlocks(tokens, is_ignored, 4)
    assert not is_ignored.any()


def test_stream_shorter_than_a_block_is_refused():
    with pytest.raises(InvalidValueError, match="3 tokens do not fill one block of 4"):
        TokenBlocks(torch.arange(3), None, 4)


@pytest.mark.parametrize("key", ["text", "content"])
@pytest.mark.parametrize("style", ["documents", "dataset"])
def test_blocks_are_the_documents(style, key):
    kind = node(style, text_key=key)
    data = spec(train=kind, test=kind, text_key=key, val_fraction=0.0).build(seed=0)
    assert isinstance(data, TextDataModule)
    wanted = joined(documents(text_key=key), key)
    for part in ("train", "test"):
        loader = data.loader(data.part(part), shuffle=False)
        labels = torch.cat([batch["labels"] for batch in loader])
        assert labels[labels != -100].tolist() == wanted
        assert labels.shape[1] == 16
    assert len(data.part("val")) == 0
    assert list(data.val_dataloader()) == []


def test_validation_and_training_share_no_document():
    data, again, other = (spec().build(seed) for seed in (1, 1, 2))
    stream = {part: bytes_of(data, part) for part in ("train", "val")}
    texts = [row["text"].encode() for row in documents()]
    held_out = [text in stream["val"] for text in texts]
    assert [text in stream["train"] for text in texts] == [not held for held in held_out]
    share = sum(len(t) for t, h in zip(texts, held_out, strict=True) if h) / sum(map(len, texts))
    assert 0.1 < share <= 0.21
    assert bytes_of(again, "val") == stream["val"]
    assert bytes_of(other, "val") != stream["val"]


def bytes_of(data, part):
    return bytes(i % 256 for i in counted(data.part(part)).tolist())


def test_shuffling_follows_torchs_seed():
    data = spec().build(seed=0)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(torch.cat([b["input_ids"] for b in data.train_dataloader()]))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0].flatten().sort().values, orders[2].flatten().sort().values)


@pytest.mark.parametrize("make", [spec, classification])
def test_workers_give_the_same_batches(make):
    single, workers = make().build(0), make(num_workers=1).build(0)
    for a, b in zip(single.test_dataloader(), workers.test_dataloader(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_items_are_rows_of_batches():
    for data in (spec().build(0), classification().build(0)):
        part = data.part("train")
        batch = part.__getitems__([2])
        assert all(torch.equal(batch[key][0], value) for key, value in part[2].items())


# --------------------------------------------------------------------------- prompts


def test_prompts_are_context_and_ends_are_learnt():
    data = spec("prompted", prompt_key="meaning", val_fraction=0.0).build(0)
    wanted = joined(prompted())
    assert counted(data.part("train")).tolist() == wanted
    whole = spec("prompted", prompt_key="meaning", val_fraction=0.0, train_on_prompt=True).build(0)
    both = [{"text": f"{row['meaning']}\n{row['text']}"} for row in prompted()]
    assert counted(whole.part("train")).tolist() == joined(both)
    inputs = [d.part("train").__getitems__([0, 1])["input_ids"] for d in (data, whole)]
    assert torch.equal(*inputs)


def test_rows_with_the_same_prompt_stay_together():
    options = {"prompt_key": "meaning", "val_fraction": 0.4, "sequence_length": 8}
    data = spec("prompted", train_on_prompt=True, **options).build(3)
    train, val = (bytes_of(data, part) for part in ("train", "val"))
    for i in range(6):
        prompt = f"m{i}\n".encode()
        assert (train.count(prompt), val.count(prompt)) in ((2, 0), (0, 2))


# --------------------------------------------------------------------------- classification


def test_sentences_are_padded_to_the_longest_of_their_batch():
    data = classification(val_fraction=0.0, sequence_length=6).build(0)
    seen = 0
    for batch in data.loader(data.part("train"), shuffle=False):
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == lengths.max()
        columns = (batch[key] for key in ("input_ids", "attention_mask", "labels"))
        for ids, mask, label in zip(*columns, strict=True):
            row = sentences()[seen]
            wanted = [*row["sentence"].encode()[:5], END]
            assert ids[mask.bool()].tolist() == wanted
            assert (ids[~mask.bool()] == data.pad_token_id).all()
            assert label == row["label"]
            seen += 1
        assert all(value.dtype == torch.int64 for value in batch.values())
    assert seen == 30


def test_validation_of_sentences_is_a_share_of_rows():
    data = classification().build(0)
    assert [len(data.part(p)) for p in ("train", "val", "test")] == [24, 6, 6]


def test_sequence_without_tokens_is_refused():
    with pytest.raises(InvalidValueError, match="text 1 has no token"):
        TokenSequences([torch.arange(2), torch.arange(0)], torch.arange(2), 0)


def test_hugging_face_tokenizer_sets_vocabulary_and_padding(tmp_path):
    pytest.importorskip("transformers")  # of the extra hf
    write_tokenizer(tmp_path, sep_token="<sep>", cls_token="<cls>", pad_token="<pad>")
    own = {"tokenizer": str(tmp_path), "train": node("words"), "test": node("words")}
    module = classification(val_fraction=0.0, **own).build(0)
    batch = next(iter(module.test_dataloader()))
    assert batch["input_ids"].tolist() == [[11, 1, 2, 10], [11, 1, 10, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert module.model_arguments == {"vocab_size": 13, "pad_token_id": 12, "eos_token_id": 10}


def words(num=2):
    return [{"sentence": text, "label": 0} for text in ("the cat", "the")]


# --------------------------------------------------------------------------- what is refused


def stream_of(rows):
    return iter(rows)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            [{"body": "x"}],
            InvalidValueError,
            r"data\.train of own has the keys \['body'\], not 'te",
        ),
        ([{"text": 3}], InvalidValueError, r"row 0 of data\.train of own has the text 3, which is"),
        (["text"], InvalidTypeError, "row 0 of .* must be a mapping, got str"),
        ([], InvalidValueError, r"data\.train of own is empty"),
        ([{"text": " \n"}], InvalidValueError, r"data\.train of own is empty"),
    ],
)
def test_wrong_rows_are_named(rows, error, message):
    with pytest.raises(error, match=message):
        spec(train={"_target_": "builtins.list", "_args_": [rows]}).build(0).setup()


def test_stream_is_refused():
    wrong = {"_target_": f"{HERE}.stream_of", "rows": [{"text": "x"}]}
    with pytest.raises(InvalidTypeError, match=r"must yield rows .* got list_iterator"):
        spec(train=wrong).build(0).setup()
    with pytest.raises(InvalidTypeError, match="got int"):
        spec(train=node("number")).build(0).setup()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "x", "label": 3}, r"the label 3; labels must be integers 0 \.\. 2"),
        ({"sentence": "x", "label": -1}, "the label -1"),
        ({"sentence": "x", "label": "good"}, "the label 'good'"),
        ({"sentence": " ", "label": 0}, "row 0 of .* has no text to classify"),
        ({"sentence": "x"}, r"not 'label'; set data\.label_key"),
    ],
)
def test_wrong_labels_are_named(row, message):
    rows = {"_target_": "builtins.list", "_args_": [[row]]}
    with pytest.raises(InvalidValueError, match=message):
        classification(train=rows).build(0).setup()


def test_one_long_document_cannot_be_parted():
    with pytest.raises(InvalidValueError, match="none of the 1 training documents .* small enough"):
        spec(train=node("documents", num=1)).build(0).setup()


def test_too_little_text_names_the_part():
    with pytest.raises(InvalidValueError, match=r"the val part of own: \d+ tokens do not fill"):
        spec(sequence_length=400, test=node("documents")).build(0).setup()


def test_unknown_part_is_refused():
    with pytest.raises(InvalidValueError, match="no part 'valid' of the data; did you mean 'val'"):
        spec().build(0).part("valid")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "translation"}, "no data.task 'translation'; known: classification, language_m"),
        ({"val_fraction": 1}, r"data\.val_fraction must be a number in \[0, 1\), got 1"),
        ({"val_fraction": "a"}, r"must be a number in \[0, 1\), got 'a'"),
        ({"sequence_length": 1}, r"data\.sequence_length must be an integer of at least 2, got 1"),
        ({"batch_size": 0}, r"data\.batch_size must be an integer of at least 1, got 0"),
        ({"num_workers": -1}, r"data\.num_workers must be an integer of at least 0, got -1"),
        ({"tokenizer": None}, "data.tokenizer must be 'bytes', a folder or a hub name, got None"),
        ({"num_classes": 2}, "data.num_classes=2 is for data.task=classification"),
        ({"train_on_prompt": True}, "data.train_on_prompt=true needs data.prompt_key"),
        ({"task": "classification"}, "needs data.num_classes of at least 2, got None"),
        (
            {"task": "classification", "num_classes": 2, "prompt_key": "p"},
            "data.prompt_key is for data.task=language_model",
        ),
    ],
)
def test_value_out_of_range_is_refused(change, message):
    with pytest.raises(InvalidValueError, match=message):
        spec(**change)


# --------------------------------------------------------------------------- files, source


def test_absent_files_are_refused_before_loading(tmp_path):
    with pytest.raises(MissingDataError, match=r"own is not at .*absent: set data\.root="):
        spec(root=str(tmp_path / "absent")).check_files()
    with pytest.raises(MissingDataError, match=r"there is no folder .*absent; give a folder"):
        spec(tokenizer=str(tmp_path / "absent")).check_files()
    spec(root=str(tmp_path), tokenizer=str(tmp_path)).check_files()
    spec(tokenizer="owner/model").check_files()
    spec().check_files()


def test_source_hashes_the_rows_whatever_holds_them():
    first = spec()
    assert first.source() == spec().source()
    assert f"{HERE}.documents, train sha256" in first.source()
    hashes = first.source().partition(", ")[2]
    other = spec(train=node("dataset"))
    assert other.source().partition(", ")[2] == hashes
    changed = spec(train=node("documents", num=19)).source().partition(", ")[2]
    assert changed.split(", ")[0] != hashes.split(", ")[0]
    assert changed.split(", ")[1] == hashes.split(", ")[1]
    assert classification().source() != classification(train=node("sentences", num=29)).source()


# --------------------------------------------------------------------------- configured sets

LANGUAGE = ["pydoc", "brown", "shakespeare", "e2e", "wikitext"]


def configured(tmp_path, data, model, *more):
    """The specification of a data group on its fixture, and the built model, fit for one step."""
    pytest.importorskip("transformers")  # of the extra hf
    overrides = [
        *fixture_overrides(data, tmp_path / "data"),
        *network_overrides(model, tmp_path / "net"),
        *more,
    ]
    names = ["recipe=ccs", f"data={data}", f"model={model}"]
    with compose_job(tmp_path, *names, *overrides) as cfg:
        spec = build(cfg.data)
        spec.check_files()
        module = spec.build(seed=0)
        return module, instantiate(cfg.model, net=module.model_arguments)


def one_step(module, network):
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = [p.detach().clone() for p in network.parameters()]
    trainer.fit(network, module.train_dataloader())
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("model", ["llama_tiny", "smollm2_135m"])
@pytest.mark.parametrize("data", LANGUAGE)
def test_configured_language_model_trains(tmp_path, data, model):
    module, network = configured(tmp_path, data, model, "data.sequence_length=16")
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["input_ids"].max() < module.vocab_size
    one_step(module, network)
    assert 0 < language_model_loss(network.net, module.val_dataloader()) < 7


@pytest.mark.parametrize("model", ["minilm", "hf_classifier"])
def test_configured_classifier_trains(tmp_path, model):
    module, network = configured(tmp_path, "vader_movie", model)
    one_step(module, network)
    assert 0 <= classification_accuracy(network.net, module.test_dataloader()) <= 1


def test_own_files_train(tmp_path):
    (tmp_path / "mine.txt").write_text("a line of mine\n" * 60)
    files = [f"data.{part}.data_files='{tmp_path}/mine.txt'" for part in ("train", "test")]
    parts = ["data.train.split='train[:80%]'", "data.test.split='train[80%:]'"]
    short = "data.sequence_length=16"
    module, network = configured(tmp_path, "custom_text", "llama_tiny", *files, *parts, short)
    assert bytes_of(module, "test") == b"a line of mine\0" * 12  # 256, the end, modulo 256
    one_step(module, network)


@pytest.mark.parametrize("data", ["brown", "wikitext"])
def test_files_of_a_configured_set_are_asked_for(tmp_path, data):
    with compose_job(
        tmp_path, "recipe=ccs", f"data={data}", "model=llama_tiny", f"data.root='{tmp_path}/none'"
    ) as cfg:
        spec = build(cfg.data)
    with pytest.raises(MissingDataError, match=rf"{data} is n.*data\.root=/path/to/your/copy"):
        spec.check_files()


def test_a_model_for_classes_refuses_a_language_set(tmp_path):
    with pytest.raises(InstantiationException, match="is the data for data.task=classification"):
        configured(tmp_path, "pydoc", "minilm")
