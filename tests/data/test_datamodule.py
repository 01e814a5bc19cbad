"""DataSpec and ClassificationDataModule: the same examples whatever the data set's style."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, TensorDataset

from mlkit.data import ClassificationDataModule, DataSpec
from mlkit.data.digits import digits
from mlkit.errors import InvalidTypeError, InvalidValueError, MissingDataError
from mlkit.run import build
from tests.helpers.data import fixture_overrides
from tests.helpers.runs import compose_job

HERE = "tests.data.test_datamodule"
NUM, CLASSES = 60, 5


def images(num=NUM, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((num, 1, 4, 3), dtype=np.float32), rng.integers(0, CLASSES, num)


def as_tensors(num=NUM):
    inputs, labels = images(num)
    return TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels))


def as_pairs(num=NUM, low=0):
    inputs, labels = images(num)
    return [(x, int(y) + low) for x, y in zip(inputs, labels, strict=True)]


def as_dicts(num=NUM, input_key="image", label_key="label"):
    inputs, labels = images(num)
    pairs = zip(inputs, labels, strict=True)
    return [{input_key: torch.from_numpy(x), label_key: int(y)} for x, y in pairs]


def as_hugging_face(num=NUM, input_key="image", label_key="label"):
    import datasets

    inputs, labels = images(num)
    table = datasets.Dataset.from_dict({input_key: inputs.tolist(), label_key: labels.tolist()})
    return table.with_format("torch")


def as_targets(num=NUM):
    """A data set that gives its labels without its images, which then must not be touched."""

    class Images:
        targets = images(num)[1].tolist()

        def __len__(self):
            return num

        def __getitem__(self, index):
            raise AssertionError("an image was loaded to learn its label")

    return Images()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(as_pairs())


class StreamWithLength(Stream):
    def __len__(self):
        return NUM


def spec(style="tensors", **changes):
    node = {"_target_": f"{HERE}.as_{style}"}
    arguments = {
        "name": "own",
        "train": node,
        "test": {**node, "num": 20},
        "input_shape": [1, 4, 3],
        "num_classes": CLASSES,
        "batch_size": 7,
        "val_fraction": 0.2,
    }
    return DataSpec(**(arguments | changes))


def module(style="tensors", seed=0, **changes):
    return ClassificationDataModule(spec(style, **changes), seed)


def everything(loader):
    batches = list(loader)
    return {key: torch.cat([b[key] for b in batches]) for key in ("index", "input", "label")}


def assert_same_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() == {"index", "input", "label"}
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert torch.equal(a[key], b[key]), key


# --------------------------------------------------------------------------- one set, many styles


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("style", ["tensors", "pairs", "dicts", "hugging_face"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_style_of_the_data_set_makes_no_difference(style, in_memory, noise):
    reference = module("tensors", in_memory=True, label_noise=noise)
    other = module(style, in_memory=in_memory, label_noise=noise)
    for part in ("pool", "train", "val", "test"):
        assert_same_batches(
            reference.loader(reference.part(part), shuffle=False),
            other.loader(other.part(part), shuffle=False),
        )
    torch.manual_seed(3)
    shuffled = everything(reference.train_dataloader())
    torch.manual_seed(3)
    assert torch.equal(everything(other.train_dataloader())["index"], shuffled["index"])
    assert not torch.equal(shuffled["index"], shuffled["index"].sort().values)


def test_batches_are_the_data(tmp_path):
    inputs, labels = images()
    data = module(val_fraction=0.0, batch_size=16)
    got = everything(data.loader(data.part("pool"), shuffle=False))
    assert got["index"].tolist() == list(range(NUM))
    assert np.array_equal(got["input"].numpy(), inputs)
    assert np.array_equal(got["label"].numpy(), labels)
    assert len(data.part("val")) == 0
    test = everything(data.test_dataloader())
    assert np.array_equal(test["input"].numpy(), images(20)[0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_own_column_names(in_memory):
    keys = {"input_key": "img", "label_key": "fine_label"}
    node = {"_target_": f"{HERE}.as_hugging_face", **keys}
    data = module(in_memory=in_memory, train=node, test=node, **keys)
    reference = module(test={"_target_": f"{HERE}.as_tensors"})
    assert_same_batches(data.test_dataloader(), reference.test_dataloader())
    wrong = module(in_memory=in_memory, train={"_target_": f"{HERE}.as_dicts", **keys})
    with pytest.raises(InvalidValueError, match=r"keys \['fine_label', 'img'\].*data\.input_key"):
        wrong.setup()


def test_workers_give_the_same_batches():
    single, workers = module("pairs"), module("pairs", num_workers=1)
    assert_same_batches(single.val_dataloader(), workers.val_dataloader())


def test_labels_are_read_without_the_images_where_possible():
    data = module("targets", in_memory=False)
    data.setup()
    wanted = torch.as_tensor(images()[1])
    assert torch.equal(data.clean_labels.sort().values, data.pool_labels.sort().values)
    counts = torch.bincount(data.pool_labels, minlength=CLASSES)
    assert (counts <= torch.bincount(wanted, minlength=CLASSES)).all()


# --------------------------------------------------------------------------- splits, indices, noise


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.floats(0, 0.99), st.integers(0, 3), st.booleans())
def test_validation_and_pool_part_the_training_data(num, fraction, seed, in_memory):
    node = {"_target_": f"{HERE}.as_tensors", "num": num}
    data = module(train=node, val_fraction=fraction, seed=seed, in_memory=in_memory)
    pool = everything(data.loader(data.part("pool"), shuffle=False))
    rows = [row.tobytes() for row in pool["input"].numpy()]
    if len(data.part("val")):
        rows += [row.tobytes() for row in everything(data.val_dataloader())["input"].numpy()]
    assert len(data.part("val")) == int(fraction * num)
    assert sorted(rows) == sorted(row.tobytes() for row in images(num)[0])
    assert pool["index"].tolist() == list(range(num - int(fraction * num)))


def test_index_names_the_position_in_the_pool():
    data = module(in_memory=True)
    pool = everything(data.loader(data.part("pool"), shuffle=False))
    shuffled = everything(data.train_dataloader())
    assert torch.equal(pool["input"][shuffled["index"]], shuffled["input"])
    assert torch.equal(data.pool_labels[shuffled["index"]], shuffled["label"])


def test_seed_keys_the_split():
    same, again, other = (module(seed=s) for s in (1, 1, 2))
    first, second, third = (everything(d.val_dataloader())["input"] for d in (same, again, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("in_memory", [True, False])
def test_noise_redraws_its_share_and_leaves_the_test_labels(in_memory):
    node = {"_target_": f"{HERE}.as_tensors", "num": 4000}
    data = module(train=node, val_fraction=0.0, label_noise=0.3, in_memory=in_memory)
    clean = module(train=node, val_fraction=0.0, in_memory=in_memory)
    data.setup(), clean.setup()
    assert torch.equal(data.clean_labels, clean.pool_labels)
    wrong = (data.pool_labels != data.clean_labels).float().mean().item()
    # exactly 1,200 are redrawn, each wrong with chance 4/5: 0.24, standard error 0.0035
    assert wrong == pytest.approx(0.24, abs=5 * 0.0035)
    changed = data.pool_labels[data.pool_labels != data.clean_labels]
    assert set(changed.tolist()) == set(range(CLASSES))
    seen = everything(data.loader(data.part("pool"), shuffle=False))["label"]
    assert torch.equal(seen, data.pool_labels)
    assert torch.equal(
        everything(data.test_dataloader())["label"], everything(clean.test_dataloader())["label"]
    )


def test_all_labels_may_be_noise():
    node = {"_target_": f"{HERE}.as_tensors", "num": 4000}
    data = module(train=node, label_noise=1.0)
    data.setup()
    agreement = (data.pool_labels == data.clean_labels).float().mean().item()
    assert agreement == pytest.approx(1 / CLASSES, abs=5 * (0.16 / 3200) ** 0.5)


def test_training_never_ends_in_a_batch_of_one_and_evaluation_keeps_all():
    node = {"_target_": f"{HERE}.as_tensors", "num": 22}
    data = module(train=node, val_fraction=0.0)
    assert [len(b["label"]) for b in data.train_dataloader()] == [7, 7, 7]
    assert [len(b["label"]) for b in data.loader(data.part("pool"), shuffle=False)] == [7, 7, 7, 1]
    node["num"] = 23
    data = module(train=node, val_fraction=0.0)
    assert [len(b["label"]) for b in data.train_dataloader()] == [7, 7, 7, 2]


# --------------------------------------------------------------------------- transforms


def double(value):
    return 2 * torch.as_tensor(value)


def add_noise(value):
    return torch.as_tensor(value) + torch.randn(())


@pytest.mark.parametrize("in_memory", [True, False])
def test_evaluation_transform_applies_everywhere_without_a_training_one(in_memory):
    plain = module(in_memory=in_memory)
    node = {"_target_": "hydra.utils.get_method", "path": f"{HERE}.double"}
    doubled = module(in_memory=in_memory, eval_transform=[node, node])
    for part in ("pool", "train", "val", "test"):
        first, second = (
            everything(d.loader(d.part(part), shuffle=False))["input"] for d in (plain, doubled)
        )
        assert torch.equal(4 * first, second)


def test_training_transform_is_for_training_alone_and_fresh_at_each_visit():
    node = {"_target_": "hydra.utils.get_method", "path": f"{HERE}.add_noise"}
    data, plain = module(train_transform=[node]), module()
    for part in ("pool", "val", "test"):
        assert_same_batches(
            data.loader(data.part(part), shuffle=False),
            plain.loader(plain.part(part), shuffle=False),
        )
    first, second = (
        everything(data.loader(data.part("train"), shuffle=False))["input"] for _ in range(2)
    )
    assert not torch.equal(first, second)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("style", ["Stream", "StreamWithLength"])
def test_stream_is_refused(style):
    with pytest.raises(InvalidTypeError, match=f"must be a map-style data set, got .*{style}"):
        module(train={"_target_": f"{HERE}.{style}"}).setup()


def test_labels_must_fit_the_number_of_classes():
    with pytest.raises(InvalidValueError, match=r"\[0, 4\] and data\.num_classes is 4"):
        module(num_classes=4).setup()
    node = {"_target_": f"{HERE}.as_pairs", "low": -1}
    with pytest.raises(InvalidValueError, match=r"\[-1, 3\].*0 \.\. num_classes - 1"):
        module(train=node).setup()


def test_test_labels_must_fit_the_number_of_classes():
    node = {"_target_": f"{HERE}.as_pairs", "low": 1}
    with pytest.raises(InvalidValueError, match=r"\[1, 5\] and data\.num_classes is 5"):
        module(test=node).setup()


def test_empty_training_data_are_refused():
    with pytest.raises(InvalidValueError, match="training part of own is empty"):
        module(train={"_target_": f"{HERE}.as_pairs", "num": 0}).setup()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_fraction": -0.1}, r"data\.val_fraction must be a number in \[0, 1\), got -0\.1"),
        ({"val_fraction": 1}, r"data\.val_fraction must be a number in \[0, 1\), got 1"),
        ({"label_noise": 1.01}, r"data\.label_noise must be a number in \[0, 1\], got 1\.01"),
        ({"label_noise": float("nan")}, r"data\.label_noise must be a number in \[0, 1\], got nan"),
        ({"num_classes": 1}, r"data\.num_classes must be an integer of at least 2, got 1"),
        ({"batch_size": 0}, r"data\.batch_size must be an integer of at least 1, got 0"),
        ({"num_workers": -1}, r"data\.num_workers must be an integer of at least 0, got -1"),
        ({"in_memory": True, "train_transform": [{}]}, r"in_memory=true .*train_transform"),
    ],
)
def test_value_out_of_range_is_refused(change, message):
    with pytest.raises(InvalidValueError, match=message):
        spec(**change)


def test_item_of_no_known_kind_is_refused():
    with pytest.raises(InvalidValueError, match=r"\(input, label\) or a mapping, got int"):
        module(train={"_target_": "builtins.range", "_args_": [5]}).setup()


# --------------------------------------------------------------------------- files


def test_absent_root_is_refused_before_loading(tmp_path):
    with pytest.raises(MissingDataError, match=r"own is not at .*absent: set data\.root="):
        spec(root=str(tmp_path / "absent")).check_files()
    spec(root=str(tmp_path)).check_files()
    spec().check_files()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "mnist10k"])
def test_configured_set_loads_from_files_in_its_true_format(name, tmp_path):
    overrides = fixture_overrides(name, tmp_path / "data")
    with compose_job(tmp_path, "recipe=ccs", f"data={name}", *overrides) as cfg:
        configured = build(cfg.data)
    data = configured.build(seed=0)
    batch = next(iter(data.train_dataloader()))
    assert list(batch["input"].shape[1:]) == list(configured.input_shape)
    assert batch["input"].dtype == torch.float32
    assert batch["label"].max() < configured.num_classes
    assert (len(data.part("pool")), len(data.part("val")), len(data.part("test"))) == (72, 8, 20)
    normalise = configured.eval_transform[-1]
    raw = np.stack([np.asarray(image) for image, _ in instantiate(configured.test)]) / 255
    images = raw if raw.ndim == 4 else raw[..., None]
    wanted = (images - np.asarray(normalise["mean"])) / np.asarray(normalise["std"])
    got = everything(data.test_dataloader())["input"].numpy()
    np.testing.assert_allclose(
        got, wanted.transpose(0, 3, 1, 2), atol=1e-5
    )  # float32 against float64


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_folder_without_the_files_is_an_error_in_words(name, tmp_path):
    with compose_job(tmp_path, "recipe=ccs", f"data={name}", f"data.root='{tmp_path}'") as cfg:
        data = build(cfg.data).build(seed=0)
    with pytest.raises(MissingDataError, match=rf"{name} is not at data\.root=.*your/copy"):
        data.setup()


def test_content_hash_changes_with_a_byte(tmp_path):
    overrides = fixture_overrides("fashion_mnist", tmp_path / "data")
    with compose_job(tmp_path, "recipe=ccs", "data=fashion_mnist", *overrides) as cfg:
        configured = build(cfg.data)
    before = configured.source()
    assert "torchvision.datasets.FashionMNIST" in before
    assert configured.source() == before
    path = tmp_path / "data/FashionMNIST/raw/train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert configured.source() != before


# --------------------------------------------------------------------------- digits


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    parts = [digits("train"), digits("test")]
    assert [len(p) for p in parts] == [1347, 450]
    got = np.concatenate([p.tensors[0].reshape(-1, 64).numpy() * 16 for p in parts])
    target = np.concatenate([p.tensors[1].numpy() for p in parts])
    order, wanted = np.lexsort(got.T), np.lexsort(inputs.T)
    assert np.array_equal(got[order], inputs[wanted])
    assert np.array_equal(target[order], labels[wanted])
    assert np.abs(np.bincount(parts[1].tensors[1]) / 450 - np.bincount(labels) / 1797).max() < 0.01
    assert torch.equal(digits("train").tensors[0], parts[0].tensors[0])
    with pytest.raises(InvalidValueError, match="'train' or 'test', got 'val'"):
        digits("val")
