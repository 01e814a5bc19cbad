"""Tokenizers: bytes round-trip; a Hugging Face tokenizer gets an end of document and padding."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlkit.data import ByteTokenizer
from mlkit.data.tokenizer import load_tokenizer
from mlkit.errors import InvalidValueError, MissingDataError, MissingDependencyError
from tests.helpers.text import write_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_bytes_round_trip_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode([*special, *ids, *special]) == text


@given(st.lists(TEXT, max_size=4), st.integers(1, 9))
def test_byte_sequences_are_cut_and_always_end(texts, length):
    tokenizer = ByteTokenizer()
    whole = tokenizer.encode_documents(texts)
    for document, sequence in zip(whole, tokenizer.encode_sequences(texts, length), strict=True):
        assert sequence.tolist() == [*document[: length - 1], tokenizer.eos_token_id]
        assert sequence.dtype == np.int32


def test_special_tokens_of_bytes_are_apart():
    tokenizer = ByteTokenizer()
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == {256, 257}
    assert tokenizer.vocab_size == 258
    assert tokenizer.decode([0xE2, 0x82]) == "�"  # half a character, as a model may say it


def test_lone_surrogate_is_refused():
    with pytest.raises(InvalidValueError, match=r"surrogate '\\ud800' at position 1"):
        ByteTokenizer().encode("a\ud800")


def test_hugging_face_tokenizer_of_a_decoder(tmp_path):
    pytest.importorskip("transformers")  # of the extra hf
    write_tokenizer(tmp_path, eos_token="<end>")
    tokenizer = load_tokenizer(str(tmp_path))
    (ids,) = tokenizer.encode_documents(["the cat the"])
    assert ids.dtype == np.int32
    assert ids[0] == ids[2] != ids[1]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == "the cat the"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.encode_sequences(["the cat the cat"], 3)[0].tolist() == ids.tolist()
    assert tokenizer.encode_documents([]) == []
    assert max(tokenizer.vocab_size - 1, tokenizer.eos_token_id) == tokenizer.vocab_size - 1


def test_hugging_face_tokenizer_of_an_encoder(tmp_path):
    pytest.importorskip("transformers")  # of the extra hf
    write_tokenizer(tmp_path, sep_token="<sep>", cls_token="<cls>", pad_token="<pad>")
    tokenizer = load_tokenizer(str(tmp_path))
    (alone,), (sequence,) = (
        tokenizer.encode_documents(["the cat"]),
        tokenizer.encode_sequences(["the cat"], 8),
    )
    assert sequence[1:-1].tolist() == alone.tolist()
    assert sequence[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in sequence


def test_tokenizer_without_any_end_is_refused(tmp_path):
    pytest.importorskip("transformers")  # of the extra hf
    write_tokenizer(tmp_path)
    with pytest.raises(InvalidValueError, match="neither an end-of-text token nor a separator"):
        load_tokenizer(str(tmp_path))


def test_absent_tokenizers_are_errors_in_words(tmp_path, monkeypatch):
    pytest.importorskip("transformers")  # of the extra hf
    with pytest.raises(MissingDataError, match=r"no folder .*/absent; give a folder of yours"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(MissingDataError, match=r"cannot be loaded: .*data\.tokenizer=/path"):
        load_tokenizer(str(tmp_path))  # an empty folder
    with pytest.raises(MissingDataError, match=r"owner/none cannot be loaded: .*out of reach"):
        load_tokenizer("owner/none")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"mlkit-torch\[hf\].*data\.tokenizer=bytes"):
        load_tokenizer("owner/none")
