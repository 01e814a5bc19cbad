"""`mlkit.convert` with a `FIITEDConfig`: what is replaced, what is not, and whose weights stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import mlkit
from mlkit.convert import load_pretrained, save_pretrained
from mlkit.embeddings import DynamicEmbedding, DynamicEmbeddingBag, FIITEDConfig
from mlkit.errors import InvalidValueError
from tests.embeddings.fiited import toy

WHOLE = FIITEDConfig(target_density=1.0)
HALF = FIITEDConfig(target_density=0.5)


def stores(model: nn.Module) -> list[Any]:
    return list({id(m.store): m.store for m in model.modules() if hasattr(m, "store")}.values())


def test_tables_of_one_dimension_share_a_store_and_the_rest_stays() -> None:
    model, stock = toy.bags(), toy.bags()
    out = model.out
    report = mlkit.convert(model, WHOLE)
    assert report.replaced == ["user", "item", "tag", "city"]
    assert model.out is out
    assert isinstance(model.user, DynamicEmbeddingBag)
    assert model.user.store is model.item.store is model.tag.store
    assert model.city.store is not model.user.store
    assert [s.name for s in model.user.store.tables.specs] == ["user", "item", "tag"]
    for name in report.replaced:
        assert torch.equal(
            model.get_submodule(name).dense_weight(), stock.get_submodule(name).weight
        )
    # a mean is a sum of products here and a quotient there
    torch.testing.assert_close(model(*toy.ids()), stock(*toy.ids()), rtol=1e-6, atol=1e-7)
    words = toy.words()
    expected = words(*toy.ids())
    mlkit.convert(words, WHOLE)
    assert isinstance(words.word, DynamicEmbedding)
    assert torch.equal(words(*toy.ids()), expected)


def test_a_trained_model_goes_back_with_what_it_learned() -> None:
    model = toy.bags()
    mlkit.convert(model, HALF)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    for store in stores(model):
        store.register_optimizer(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(*toy.ids()).square().sum().backward()
        optimizer.step()
    expected = model(*toy.ids())
    assert all(0 < s.density <= 0.5 for s in stores(model))
    mlkit.restore(model)
    assert type(model.user) is nn.EmbeddingBag
    assert model.city.include_last_offset
    assert model.item.padding_idx == 0
    assert model.user.weight.requires_grad
    torch.testing.assert_close(model(*toy.ids()), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("budget", [30_000, "12KiB"])
def test_bytes_are_for_all_tables_together(budget: int | str) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.EmbeddingBag(300, 16), nn.EmbeddingBag(200, 16)
            self.c = nn.Embedding(100, 32)

    model = Wide()
    report = mlkit.convert(model, FIITEDConfig(memory_budget=budget, num_chunks=2))
    total = sum(store.memory_report().total_bytes for store in stores(model))
    most = budget if isinstance(budget, int) else 12 * 1024
    assert 0.8 * most < total <= most
    assert abs(report.after.nbytes - total) <= 0.05 * total, "the report is of full free lists"
    assert report.before.nbytes == 4 * (500 * 16 + 100 * 32)


def test_small_tables_are_left_out() -> None:
    model = toy.bags()
    report = mlkit.convert(model, FIITEDConfig(target_density=0.5, min_rows=30))
    assert report.replaced == ["user", "item"]
    assert type(model.tag) is nn.EmbeddingBag
    assert "a table of 20 rows, below min_rows" in str(report)
    with pytest.raises(InvalidValueError, match="user is a table of 40 rows, below min_rows"):
        mlkit.convert(toy.bags(), FIITEDConfig(target_density=0.5, min_rows=41))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.other = nn.Embedding(20, 8)
        self.head.weight = self.word.weight


class Scaled(nn.Embedding):
    pass


def with_subclass() -> nn.Module:
    return nn.Sequential(Scaled(20, 8), nn.Embedding(20, 8))


def with_hook() -> nn.Module:
    model = nn.Sequential(nn.Embedding(20, 8))
    model[0].register_forward_hook(lambda *_: None)
    return model


def frozen() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8)).requires_grad_(False)


def with_padding() -> nn.Module:
    model = nn.Sequential(nn.Embedding(20, 8, padding_idx=3))
    nn.init.ones_(model[0].weight)
    return model


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (Tied, WHOLE, "word: its weight is shared with head.weight"),
        (with_subclass, WHOLE, "0: Scaled is a class of its own"),
        (with_hook, WHOLE, "0: it has hooks"),
        (frozen, HALF, "0: it is frozen and would stay empty"),
        (with_padding, WHOLE, "0: its row padding_idx=3 is not zeros"),
        (toy.words, FIITEDConfig(target_density=1.0, num_chunks=3), "word: num_chunks=3 does not"),
        (lambda: toy.words().half(), WHOLE, "word: its weight is torch.float16"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), WHOLE, "finds nothing to convert"),
        (toy.bags, FIITEDConfig(memory_budget=800), "headers of 102 rows and a chunk of each"),
    ],
)
def test_refusals_say_why_and_leave_the_model(build: Any, config: Any, message: str) -> None:
    model = build()
    before = [type(m) for m in model.modules()]
    with pytest.raises(InvalidValueError, match=message):
        mlkit.convert(model, config)
    assert [type(m) for m in model.modules()] == before


def test_what_can_be_converted_is_where_strict_is_off() -> None:
    model = Tied()
    assert mlkit.convert(model, WHOLE, strict=False).replaced == ["other"]
    model = frozen()
    mlkit.convert(model, WHOLE)
    assert not any(p.requires_grad for p in model.parameters())
    mlkit.restore(model)
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_recipes_build_on_meta(optimizer: str | None) -> None:
    with torch.device("meta"):
        model = toy.bags()
    config = FIITEDConfig(target_density=0.5, optimizer=optimizer)
    mlkit.convert(model, config)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert model.user.density == 0
    assert not model.eval().user(torch.arange(6).view(2, 3)).any()
    real = toy.bags()
    mlkit.convert(real, config)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in real.state_dict().items()
    ]
    with torch.device("meta"):
        whole = toy.words()
    mlkit.convert(whole, WHOLE)
    whole.to_empty(device="cpu").word.store.reset_parameters()
    assert whole.word.density == 49 / 50, "all but padding"


# -------------------------------------------------------------------- checkpoints


def test_stock_weights_load_at_density_1_or_by_magnitude() -> None:
    stock = toy.bags()
    checkpoint = {k: v + 1 if "padding" not in k else v for k, v in stock.state_dict().items()}
    whole = toy.bags()
    mlkit.convert(whole, WHOLE)
    whole.load_state_dict(checkpoint)
    assert torch.equal(whole.tag.dense_weight(), checkpoint["tag.weight"])
    assert torch.equal(whole.item.dense_weight()[1:], checkpoint["item.weight"][1:])
    kept = toy.bags()
    mlkit.convert(kept, FIITEDConfig(target_density=0.5, warm_start="magnitude", num_chunks=2))
    kept.load_state_dict(checkpoint)
    weight = kept.user.dense_weight()
    resident = kept.user.store.resident(slice(0, 40)).repeat_interleave(4, 1)
    assert torch.equal(weight, checkpoint["user.weight"] * resident)
    assert kept.user.density == 0.5
    fresh = toy.bags()
    mlkit.convert(fresh, HALF)
    with pytest.raises(InvalidValueError, match=r"table 'user' at density 0.5.*warm_start"):
        fresh.load_state_dict(checkpoint)
    del checkpoint["tag.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*tag.weight"):
        whole.load_state_dict(checkpoint)
    checkpoint["tag.weight"] = torch.zeros(19, 8)
    with pytest.raises(InvalidValueError, match=r"table 'tag' must be of shape \(20, 8\)"):
        whole.load_state_dict(checkpoint)


def test_a_shared_store_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = toy.bags(), toy.bags()
    mlkit.convert(model, WHOLE)
    mlkit.convert(other, WHOLE)
    with torch.no_grad():
        model.user.store.pool += 1
    calls = []
    original = nn.Module._load_from_state_dict

    def counted(self: nn.Module, *args: Any) -> None:
        calls.append(type(self).__name__)
        original(self, *args)

    monkeypatch.setattr(nn.Module, "_load_from_state_dict", counted)
    other.load_state_dict(model.state_dict())
    assert calls.count("DynamicEmbeddingStore") == 2, "one for each dimension"
    assert torch.equal(other.tag.dense_weight(), model.tag.dense_weight())
    with torch.no_grad():
        model.user.store.pool += 1
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.user.dense_weight(), model.user.dense_weight())


def test_a_checkpoint_loads_at_another_budget(tmp_path: Any) -> None:
    model = toy.bags()
    mlkit.convert(model, FIITEDConfig(target_density=0.8, warm_start="magnitude"))
    smaller = toy.bags()
    mlkit.convert(smaller, HALF)
    smaller.load_state_dict(model.state_dict())
    store = smaller.user.store
    assert store.density == pytest.approx(0.5, abs=0.01)
    weight, resident = smaller.user.dense_weight(), store.resident(slice(0, 40))
    expected = model.user.dense_weight() * resident.repeat_interleave(2, 1)
    assert torch.equal(weight, expected)
    model.user.resize(target_density=0.3)
    save_pretrained(model, tmp_path)
    again = load_pretrained(toy.bags(), tmp_path)
    assert again.user.store.num_resident == model.user.store.num_resident
    assert torch.equal(again.eval()(*toy.ids()), model.eval()(*toy.ids()))
    with torch.device("meta"):
        empty = toy.bags()
    load_pretrained(empty, tmp_path)
    assert empty.user.store is empty.tag.store
    assert torch.equal(empty.eval()(*toy.ids()), model(*toy.ids()))


def test_a_copy_of_one_bag_takes_its_store_along() -> None:
    model = toy.bags()
    mlkit.convert(model, WHOLE)
    copied = copy.deepcopy(model)
    assert copied.user.store is copied.tag.store is not model.tag.store
    alone = copy.deepcopy(model.tag)
    with torch.no_grad():
        alone.store.pool.zero_()
    assert alone.dense_weight().abs().sum() == 0
    assert model.tag.dense_weight().abs().sum() > 0
