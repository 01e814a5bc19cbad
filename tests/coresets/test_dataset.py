"""Data sets, data modules and the sampler: a coreset reaches training by every road."""

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mlkit.coresets import (
    CCS,
    CoresetDataModule,
    CoresetSubset,
    CoverageCentricSampler,
    IndexedDataset,
    RandomSelector,
    TopK,
)
from mlkit.errors import InvalidTypeError, InvalidValueError

SCORES = np.linspace(0, 1, 40, dtype=np.float32)


def _selection(rate=0.75):
    return CCS(prune_rate=rate, num_strata=5).select(SCORES, hard="high")


def _tensors():
    return TensorDataset(torch.arange(40.0)[:, None], torch.arange(40) % 3)


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(40)


def test_indexed_batches_collate_to_pairs():
    batch = next(iter(DataLoader(IndexedDataset(_tensors()), batch_size=4)))
    assert batch.index.tolist() == [0, 1, 2, 3]
    assert batch.item[0].tolist() == [[0], [1], [2], [3]]


@pytest.mark.parametrize("workers", [0, 2])
def test_subset_yields_the_chosen_examples(workers):
    selection = _selection()
    subset = CoresetSubset(_tensors(), selection)
    loader = DataLoader(subset, batch_size=3, num_workers=workers)
    seen = torch.cat([x.flatten() for x, _ in loader])
    assert seen.tolist() == selection.indices.tolist()
    assert len(subset) == 10
    assert subset.report["num_selected"] == 10
    assert subset[0][0].item() == selection.indices[0]


def test_hugging_face_select_and_subset_agree():
    selection = _selection()
    hf = datasets.Dataset.from_dict({"x": list(range(40))})
    assert hf.select(selection.indices)["x"][:] == selection.indices.tolist()
    rows = [row["x"] for row in CoresetSubset(hf, selection)]
    assert rows == selection.indices.tolist()
    batch = CoresetSubset(hf, selection).__getitems__([1, 0])
    assert [row["x"] for row in batch] == selection.indices[[1, 0]].tolist()


def test_wrong_data_sets_are_refused():
    with pytest.raises(InvalidValueError, match="made from 40 examples and the data set has 39"):
        CoresetSubset(list(range(39)), _selection())
    for wrap in (IndexedDataset, lambda d: CoresetSubset(d, _selection())):
        with pytest.raises(InvalidTypeError, match=r"Stream has no length .* two\s+passes"):
            wrap(Stream())


class Module(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(_tensors(), batch_size=4, drop_last=True, num_workers=0)

    def val_dataloader(self):
        return "validation"

    def test_dataloader(self):
        return "test"

    def predict_dataloader(self):
        return "predict"


def test_any_data_module_trains_on_a_coreset():
    selection = _selection()
    module = CoresetDataModule(Module(), selection)
    module.prepare_data()
    module.setup("fit")
    loader = module.train_dataloader()
    assert loader.batch_size == 4
    assert loader.drop_last
    assert len(loader) == 2
    seen = {int(v) for x, _ in loader for v in x}
    assert seen <= set(selection.indices.tolist())
    assert len(seen) == 8
    assert (module.val_dataloader(), module.test_dataloader()) == ("validation", "test")
    assert module.predict_dataloader() == "predict"
    module.teardown("fit")


def test_data_module_without_one_loader_is_refused():
    module = Module()
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 40, 40)
    module.train_dataloader = lambda: DataLoader(_tensors(), batch_size=4, sampler=sampler)
    with pytest.raises(InvalidTypeError, match="samples by WeightedRandomSampler"):
        CoresetDataModule(module, _selection()).train_dataloader()
    module.train_dataloader = lambda: [1, 2]
    with pytest.raises(InvalidTypeError, match="one DataLoader with a batch_size, got list"):
        CoresetDataModule(module, _selection()).train_dataloader()


def test_inner_hooks_and_small_coresets():
    class Shifted(Module):
        def train_dataloader(self):
            return DataLoader(_tensors(), batch_size=16, drop_last=True, num_workers=0)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return "shifted"

    module = CoresetDataModule(Shifted(), _selection())
    assert len(module.train_dataloader()) == 1, "a coreset below one batch is not dropped"
    assert module.on_after_batch_transfer(None, 0) == "shifted"


def test_static_sampler_is_the_selection_in_new_orders():
    sampler = CoverageCentricSampler(SCORES, CCS(prune_rate=0.75, num_strata=5), hard="high")
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == _selection().indices.tolist()
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_resampling_keeps_cut_and_budgets_and_sees_more():
    selector = CCS(prune_rate=0.75, cutoff=0.2, num_strata=5, seed=3)
    sampler = CoverageCentricSampler(SCORES, selector, hard="high", resample_every=2)
    epochs = [sorted(sampler) for _ in range(40)]
    assert epochs[0] == epochs[1] == selector.select(SCORES, hard="high").indices.tolist()
    assert epochs[2] != epochs[0]
    strata = sampler.plan.strata
    for epoch in epochs:
        assert np.array_equal(np.bincount(strata[epoch], minlength=5), sampler.plan.budgets)
    assert set().union(*epochs) == set(range(32))


def test_steps_per_epoch_repeats_the_coreset_evenly():
    sampler = CoverageCentricSampler(
        SCORES, CCS(prune_rate=0.75), hard="high", steps_per_epoch=7, batch_size=4
    )
    indices = list(sampler)
    assert len(sampler) == len(indices) == 28
    counts = np.bincount(indices, minlength=40)
    assert set(counts[counts > 0]) <= {2, 3}


def test_sampler_resumes():
    first = CoverageCentricSampler(SCORES, CCS(prune_rate=0.5), hard="high", resample_every=1)
    list(first)
    other = CoverageCentricSampler(SCORES, CCS(prune_rate=0.5), hard="high", resample_every=1)
    other.load_state_dict(first.state_dict())
    assert list(other) == list(first)


def test_bad_samplers():
    with pytest.raises(InvalidTypeError, match="pass CCS or Stratified, got RandomSelector"):
        CoverageCentricSampler(SCORES, RandomSelector(prune_rate=0.5), hard="high")
    with pytest.raises(InvalidTypeError, match="got TopK"):
        CoverageCentricSampler(SCORES, TopK(prune_rate=0.5), hard="high")
    selector = CCS(prune_rate=0.5)
    with pytest.raises(InvalidValueError, match="resample_every must be at least 1, got 0"):
        CoverageCentricSampler(SCORES, selector, hard="high", resample_every=0)
    with pytest.raises(InvalidValueError, match="steps_per_epoch and batch_size go together"):
        CoverageCentricSampler(SCORES, selector, hard="high", steps_per_epoch=3)
    with pytest.raises(InvalidValueError, match="the coreset is empty"):
        CoverageCentricSampler(SCORES[:1], CCS(prune_rate=0.9), hard="high")
