"""Click networks against NumPy loops; initial values by name; their LightningModule; AUC."""

import copy
from itertools import combinations

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from mlkit.data.ctr import ctr_loader, to_tensors
from mlkit.data.ctr.synthetic import synthetic
from mlkit.errors import InvalidValueError
from mlkit.models import DCN, DLRM, CTRModule, DeepFM, ctr_quality, initialise, split_parameters

NETWORKS = [DLRM, DeepFM, DCN]
SIZES = [7, 5, 11]


def batch_of(num, num_dense=2, sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(num, num_dense, generator=generator)
    columns = [torch.randint(rows, (num,), generator=generator) for rows in sizes]
    return dense, torch.stack(columns, 1)


def vectors_of(net, sparse):
    weights = [table.weight.detach().numpy() for table in net.tables]
    return np.stack([w[ids] for w, ids in zip(weights, sparse.numpy().T, strict=True)], 1)


def run(layers, x):
    """A stack of linear layers and ReLUs in NumPy."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.detach().numpy().T
            x = x if layer.bias is None else x + layer.bias.detach().numpy()
        else:
            x = np.maximum(x, 0)
    return x


def wanted_dlrm(net, dense, sparse):
    vectors, parts = vectors_of(net, sparse), []
    if net.bottom is not None:
        bottom = run(net.bottom, dense.numpy())
        vectors = np.concatenate([bottom[:, None], vectors], 1)
        parts.append(bottom)
    pairs = [(i, j) for i in range(vectors.shape[1]) for j in range(i)]
    parts.append(np.stack([(vectors[:, i] * vectors[:, j]).sum(1) for i, j in pairs], 1))
    return run(net.top, np.concatenate(parts, 1))[:, 0]


def wanted_deepfm(net, dense, sparse):
    vectors = vectors_of(net, sparse)
    pairs = combinations(range(vectors.shape[1]), 2)
    second = sum((vectors[:, i] * vectors[:, j]).sum(1) for i, j in pairs)
    flat = np.concatenate([dense.numpy(), *vectors.transpose(1, 0, 2)], 1)
    return run([net.first_order], flat)[:, 0] + second + run(net.deep, flat)[:, 0]


def wanted_dcn(net, dense, sparse):
    first = np.concatenate([dense.numpy(), *vectors_of(net, sparse).transpose(1, 0, 2)], 1)
    x = first
    for layer in net.cross:
        x = first * run(layer if isinstance(layer, nn.Sequential) else [layer], x) + x
    return run([net.head], np.concatenate([x, run(net.deep, first)], 1))[:, 0]


@pytest.mark.parametrize("num_dense", [0, 1, 3])
@pytest.mark.parametrize(
    ("network", "wanted", "options"),
    [
        (DLRM, wanted_dlrm, {}),
        (DLRM, wanted_dlrm, {"bottom_sizes": [], "top_sizes": [5]}),
        (DeepFM, wanted_deepfm, {}),
        (DeepFM, wanted_deepfm, {"hidden_sizes": []}),
        (DCN, wanted_dcn, {}),
        (DCN, wanted_dcn, {"rank": None, "num_cross_layers": 3, "hidden_sizes": []}),
    ],
)
def test_forward_is_what_the_papers_say(network, wanted, options, num_dense):
    net = network(SIZES, 6, num_dense, **options)
    for table in net.tables:
        nn.init.normal_(table.weight)
    dense, sparse = batch_of(9, num_dense)
    with torch.no_grad():
        got = net(dense, sparse)
    assert got.shape == (9,)
    # float32 sums of a few dozen terms of order 1 to 100
    assert got.numpy() == pytest.approx(wanted(net, dense, sparse), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_all_that_grows_with_the_ids_is_in_the_tables(network):
    small, large = network(SIZES, 4, 2), network([10 * n for n in SIZES], 4, 2)
    grown = {
        name
        for (name, p), (_, q) in zip(
            small.named_parameters(), large.named_parameters(), strict=True
        )
        if p.shape != q.shape
    }
    assert grown == {f"tables.{i}.weight" for i in range(3)}
    assert all(type(table) is nn.EmbeddingBag for table in small.tables)
    dense, sparse = batch_of(4)
    small(dense, sparse).sum().backward()
    assert all(table.weight.grad.is_sparse for table in small.tables)
    outside, inside = split_parameters(small)
    assert [id(p) for p in inside] == [id(table.weight) for table in small.tables]
    assert len(outside) + 3 == len(list(small.parameters()))


@pytest.mark.parametrize("network", NETWORKS)
def test_network_on_meta_gets_the_values_it_would_have_had(network):
    net = network(SIZES, 4, 2)
    initialise(net, 3)
    with torch.device("meta"):
        late = network(SIZES, 4, 2)
    late.to_empty(device="cpu")
    initialise(late, 3)
    state, other = net.state_dict(), late.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    dense, sparse = batch_of(5)
    assert torch.equal(net(dense, sparse), late(dense, sparse))
    before = torch.get_rng_state()
    initialise(late, 4)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(torch.equal(state[name], late.state_dict()[name]) for name in state)


def test_values_depend_on_the_name_and_not_on_other_modules():
    net, other = DLRM(SIZES, 4, 2), DLRM([7, 500, 11], 4, 2)
    initialise(net, 0)
    initialise(other, 0)
    state, others = net.state_dict(), other.state_dict()
    same = {name for name in state if torch.equal(state[name], others[name])}
    assert same == set(state) - {"tables.1.weight"}


def test_tables_begin_as_in_dlrm():
    for fresh in (False, True):
        net = DLRM([10_000, 3], 8, 0)
        if fresh:
            initialise(net, 0)
        weight = net.tables[0].weight.detach()
        assert weight.abs().max() <= 0.01
        # of 80,000 uniform draws in ±0.01: standard deviation 0.01/sqrt(3), here to 0.5 %
        assert weight.std().item() == pytest.approx(0.01 / 3**0.5, rel=5e-3)
        assert abs(weight.mean().item()) < 1e-4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DLRM([], 4, 2), r"at least one table of at least one row, got \[\]"),
        (lambda: DeepFM([3, 0], 4, 2), r"got \[3, 0\]"),
        (lambda: DCN([3], 0, 2), "embedding_dim must be at least 1 .* got 0 and 2"),
        (lambda: DLRM([3], 4, -1), "num_dense at least 0, got 4 and -1"),
        (lambda: DLRM([3], 4, 0), "DLRM needs two tables, or one table and a dense feature"),
        (lambda: DCN([3], 4, 2, num_cross_layers=0), "num_cross_layers and rank must be at least"),
        (lambda: DCN([3], 4, 2, rank=0), "got 2 and 0"),
        (lambda: DLRM([3, 4], 4, 1)(torch.zeros(2, 1), torch.zeros(2, 3).long()), r"\(2, 3\)"),
    ],
)
def test_bad_sizes_are_refused(build, message):
    with pytest.raises(InvalidValueError, match=message):
        build()


# --------------------------------------------------------------------------- LightningModule


def module_of(net, lr=0.5):
    return CTRModule(
        net,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=lr),
    )


def fit(module, loader):
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1,
    )  # fmt: skip
    trainer.fit(module, loader)
    return trainer


def stream(seed=0, **changes):
    small = {"num_samples": 1500, "table_sizes": [30, 20, 10], "num_interacting": 2, **changes}
    return synthetic(seed=seed, latent_dim=4, **small)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_training_equals_a_plain_loop_with_two_optimizers():
    data = stream()
    net = DLRM(data.table_sizes, 4, data.num_dense, [8], [8])
    plain, module = copy.deepcopy(net), module_of(net)
    fit(module, ctr_loader(data, "train", 100))
    for batch in map(to_tensors, data.batches("train", 100)):
        plain.zero_grad()
        logits = plain(batch["dense"], batch["sparse"])
        nn.functional.binary_cross_entropy_with_logits(logits, batch["label"]).backward()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                rate = 0.5 if name.startswith("tables") else 0.1
                parameter -= rate * parameter.grad.to_dense()
    for got, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_tables_that_want_no_gradient_have_no_optimizer():
    data = stream()
    net = DLRM(data.table_sizes, 4, data.num_dense)
    net.tables.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    trainer = fit(module_of(net), ctr_loader(data, "train", 300))
    assert len(trainer.optimizers) == 1
    after = net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith("tables")}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_learn_what_is_planted(network):
    data = stream(num_samples=8000, drift_at=[], oracle_auc=0.9, interaction_share=0.5)
    net = network(data.table_sizes, 8, data.num_dense)
    initialise(net, 0)
    outside, inside = split_parameters(net)
    optimizers = torch.optim.Adam(outside, lr=3e-3), torch.optim.SparseAdam(inside, lr=1e-2)
    for _ in range(3):
        for batch in map(to_tensors, data.batches("train", 100)):
            loss = nn.functional.binary_cross_entropy_with_logits(
                net(batch["dense"], batch["sparse"]), batch["label"]
            )
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    got = ctr_quality(net, ctr_loader(data, "test", 512))["auc"]
    # 2,000 test examples: the standard error of an AUC near 0.9 is 0.008
    assert 0.8 < got < data.oracle_auc("test") + 0.025


class Fixed(nn.Module):
    """Gives the first dense feature."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, dense, sparse):
        assert not self.training
        return dense[:, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(2, 60), st.integers(1, 70))
def test_quality_is_that_of_sklearn(seed, num, batch_size):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 4, num).astype(np.float32)  # with ties
    labels = rng.integers(0, 2, num).astype(np.float32)
    labels[:2] = 0, 1
    dense, label = torch.from_numpy(logits)[:, None], torch.from_numpy(labels)
    batches = [
        {"dense": dense[i : i + batch_size], "sparse": dense[i : i + batch_size].long(),
         "label": label[i : i + batch_size]}
        for i in range(0, num, batch_size)
    ]  # fmt: skip
    net = Fixed()
    got = ctr_quality(net, batches)
    assert net.training
    odds = 1 / (1 + np.exp(-logits.astype(float)))
    # float32 against float64
    assert got["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-6)
    assert got["log_loss"] == pytest.approx(log_loss(labels, odds), abs=1e-5)


def test_quality_needs_both_kinds():
    batch = {"dense": torch.zeros(3, 1), "sparse": torch.zeros(3, 1), "label": torch.ones(3)}
    with pytest.raises(InvalidValueError, match="3 of 3 examples are clicks; AUC needs both"):
        ctr_quality(Fixed(), [batch])
    with pytest.raises(InvalidValueError, match="0 of 0 examples"):
        ctr_quality(Fixed(), [])
