"""The fixtures are read by the stock loaders, and their stock checks stay in force."""

import numpy as np
import pytest
from torchvision import datasets

from tests.helpers import data as fixtures

SIZES = {"train": 80, "test": 20}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_by_a_subclass_and_refused_by_the_stock_class(name, tmp_path):
    fixtures.FIXTURES[name][0](tmp_path)
    fixture, stock = {
        "cifar10": (fixtures.CIFAR10Fixture, datasets.CIFAR10),
        "cifar100": (fixtures.CIFAR100Fixture, datasets.CIFAR100),
    }[name]
    for split, size in SIZES.items():
        read = fixture(str(tmp_path), train=split == "train", download=False)
        image, label = read[7]
        assert len(read) == size
        assert image.size == (32, 32)
        assert label == 7
        assert read.classes[3] == "class3"
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        stock(str(tmp_path), download=False)
    victim = next((tmp_path / fixture.base_folder).glob("*test*"))
    victim.unlink()
    with pytest.raises((RuntimeError, FileNotFoundError)):
        fixture(str(tmp_path), download=False)


@pytest.mark.parametrize("name", ["FashionMNIST", "MNIST", "KMNIST"])
def test_mnist_family_is_read_by_the_stock_class(name, tmp_path):
    fixtures.write_mnist(tmp_path, name)
    for split, size in SIZES.items():
        read = getattr(datasets, name)(str(tmp_path), train=split == "train", download=False)
        assert read.data.shape == (size, 28, 28)
        assert np.array_equal(read.targets, np.arange(size) % 10)


IMAGES = {
    "cifar10": fixtures.CIFAR10Fixture,
    "cifar100": fixtures.CIFAR100Fixture,
    "fashion_mnist": datasets.FashionMNIST,
    "mnist10k": datasets.MNIST,
}


@pytest.mark.parametrize("name", IMAGES)
def test_classes_differ_in_brightness(name, tmp_path):
    fixtures.FIXTURES[name][0](tmp_path)
    read = IMAGES[name](str(tmp_path), train=True)
    brightness = np.asarray(read.data, dtype=float).reshape(len(read), -1).mean(axis=1)
    assert np.corrcoef(brightness, np.asarray(read.targets))[0, 1] > 0.99


def test_sets_that_ship_with_a_dependency_need_no_fixture(tmp_path):
    assert fixtures.fixture_overrides("digits", tmp_path) == []
    assert not list(tmp_path.iterdir())
