"""Small models, Lightning module, features and accuracy, against plain PyTorch and sklearn."""

import copy
import itertools

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score
from torch import nn
from torch.utils.data import DataLoader

from mlkit.errors import InvalidValueError
from mlkit.models import CNN, MLP, Classifier, extract_features, resnet_cifar
from mlkit.models.lightning import accuracy
from tests.helpers.models import random_small_model


def batches_of(inputs, labels, size):
    return [
        {"input": inputs[i : i + size], "label": labels[i : i + size]}
        for i in range(0, len(labels), size)
    ]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


# --------------------------------------------------------------------------- shapes


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(2, 7),
    st.lists(st.integers(1, 9), max_size=3),
    st.integers(1, 4),
)
def test_mlp_takes_any_shape_and_any_depth(input_shape, num_classes, hidden_sizes, batch):
    model = MLP(input_shape, num_classes, hidden_sizes)
    assert model(torch.randn(batch, *input_shape)).shape == (batch, num_classes)
    linear = [m for m in model if isinstance(m, nn.Linear)]
    sizes = [int(np.prod(input_shape)), *hidden_sizes, num_classes]
    assert [(m.in_features, m.out_features) for m in linear] == list(itertools.pairwise(sizes))


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(4, 13), st.integers(4, 13)),
    st.integers(2, 7),
    st.integers(1, 3),
)
def test_cnn_takes_odd_images(input_shape, num_classes, batch):
    model = CNN(input_shape, num_classes, channels=(3, 5), hidden_size=7)
    assert model(torch.randn(batch, *input_shape)).shape == (batch, num_classes)


def test_input_noise_is_for_training_alone():
    model, inputs = MLP([3], 2, [4], input_noise=0.5), torch.randn(5, 3)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))
    quiet = MLP([3], 2, [4])
    assert torch.equal(quiet(inputs), quiet(inputs))
    noisy = MLP([100_000], 2, [], input_noise=0.5)
    added = noisy[1](torch.zeros(100_000)).detach()
    # standard errors of mean and standard deviation at 1e5 draws: 0.0016 and 0.0011
    assert added.mean().item() == pytest.approx(0, abs=0.008)
    assert added.std().item() == pytest.approx(0.5, abs=0.006)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 3), ("resnet50", 1)])
def test_resnet_has_the_cifar_stem(name, channels):
    from torchvision import models

    model = resnet_cifar(num_classes=7, in_channels=channels, name=name)
    assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
    stem = model.maxpool(model.relu(model.bn1(model.conv1(torch.randn(2, channels, 32, 32)))))
    assert stem.shape == (2, 64, 32, 32)
    with torch.device("meta"):
        structure = resnet_cifar(num_classes=7, in_channels=channels, name=name)
        assert structure(torch.randn(2, channels, 32, 32)).shape == (2, 7)
        stock = getattr(models, name)(num_classes=7)
    same = {k: v.shape for k, v in stock.state_dict().items() if k != "conv1.weight"}
    assert {k: v.shape for k, v in model.state_dict().items() if k != "conv1.weight"} == same


@pytest.mark.parametrize("name", ["resnet9", "vgg11", "resnet", ""])
def test_unknown_resnet_is_refused(name):
    with pytest.raises(InvalidValueError, match=f"torchvision ResNet .* got '{name}'"):
        resnet_cifar(10, name=name)


# --------------------------------------------------------------------------- features


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 4), st.integers(1, 9))
def test_features_are_what_the_head_sees(seed, batch_size, num):
    small = random_small_model(seed)
    model, (inputs, labels) = small.module.train(), small.batch(num, seed)
    before = copy.deepcopy(model.state_dict())
    got = extract_features(model, batches_of(inputs, labels, batch_size))
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    model.eval()
    with torch.no_grad():
        body, head = model[:-1], model[-1]
        wanted = torch.cat([body(inputs[i : i + batch_size]) for i in range(0, num, batch_size)])
        assert torch.equal(got, wanted)
        assert torch.allclose(head(got), model(inputs), atol=1e-5)
    assert not got.requires_grad
    assert not model[-1]._forward_pre_hooks


def test_features_of_a_named_layer_and_another_batch_layout():
    model = MLP([4], 3, [5, 6]).eval()
    inputs = torch.randn(7, 4)
    got = extract_features(model, [(inputs,)], head="4", get_input=lambda batch: batch[0])
    assert torch.equal(got, nn.Sequential(*list(model)[:4])(inputs))


def test_features_need_a_linear_head():
    with pytest.raises(InvalidValueError, match="no linear layer None in the model; it has"):
        extract_features(nn.Conv2d(1, 1, 1), [])
    with pytest.raises(InvalidValueError, match=r"no linear layer 'fc' .*'2', '4'"):
        extract_features(MLP([4], 3, [5]), [], head="fc")


def test_hook_is_gone_after_a_failure():
    model = MLP([4], 3, [5])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        extract_features(model, [{"input": torch.randn(2, 9)}])
    assert model.training
    assert not model[-1]._forward_pre_hooks


# --------------------------------------------------------------------------- accuracy


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 40), st.integers(1, 11))
def test_accuracy_is_that_of_sklearn(seed, num, batch_size):
    small = random_small_model(seed)
    inputs, labels = small.batch(num, seed)
    model = small.module.train()
    got = accuracy(model, batches_of(inputs, labels, batch_size), small.num_classes)
    assert model.training
    predicted = model.eval()(inputs).argmax(1)
    # a float32 quotient against a float64 one
    assert got == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)


# --------------------------------------------------------------------------- classifier


def fit(model, loader, **arguments):
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip
    trainer.fit(model, loader)
    return trainer


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_training_equals_a_plain_loop_with_a_cosine_per_step():
    torch.manual_seed(0)
    inputs, labels = torch.randn(12, 4), torch.arange(12) % 3
    examples = [{"input": x, "label": y} for x, y in zip(inputs, labels, strict=True)]
    net, steps, least = MLP([4], 3, [5]), 5, 0.01
    plain = copy.deepcopy(net)
    classifier = Classifier(net, sgd, min_lr=least)
    trainer = fit(classifier, DataLoader(examples, batch_size=4), max_steps=steps)
    assert trainer.global_step == steps

    rates = []
    for step in range(steps):
        rate = least + (0.5 - least) * (1 + np.cos(np.pi * step / steps)) / 2
        rows = slice(4 * (step % 3), 4 * (step % 3) + 4)
        plain.zero_grad()
        nn.functional.cross_entropy(plain(inputs[rows]), labels[rows]).backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= rate * parameter.grad
        rates.append(rate)
    for got, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # the recursive cosine rounds
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(least)


def test_step_gives_loss_and_logits():
    classifier = Classifier(MLP([4], 3, [5]), sgd)
    batch = {"input": torch.randn(6, 4), "label": torch.arange(6) % 3}
    output = classifier.training_step(batch, 0)
    assert torch.equal(output["logits"], classifier(batch["input"]))
    assert torch.equal(
        output["loss"], nn.functional.cross_entropy(output["logits"], batch["label"])
    )


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_training_learns(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = torch.eye(3)[labels] + 0.1 * torch.randn(60, 3)
    examples = [{"input": x, "label": y} for x, y in zip(inputs, labels, strict=True)]
    classifier = Classifier(MLP([3], 3, [8]), sgd)
    fit(classifier, DataLoader(examples, batch_size=20, shuffle=True), max_steps=40)
    assert accuracy(classifier, batches_of(inputs, labels, 20), 3) == 1.0
