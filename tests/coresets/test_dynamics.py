"""The streaming recorder against a recomputation from the whole log."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.coresets import CCS, DynamicsRecorder, exact_grand
from mlkit.coresets.dynamics import FINAL_SCORES
from mlkit.coresets.scores import RECORDED
from mlkit.errors import InvalidTypeError, InvalidValueError, RunError
from tests.coresets import oracle
from tests.helpers.ddp import run_ddp

STREAMED = [s for s in RECORDED if s not in FINAL_SCORES and s != "grand"]


def _run(num_samples, num_classes, epochs, *, seed=0, batch=5, duplicates=False, **settings_):
    """Record a made-up training run, and keep its whole log."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    recorder = DynamicsRecorder(num_samples, STREAMED, previous_dtype=torch.float32, **settings_)
    log = []
    for epoch in range(epochs):
        order = torch.randperm(num_samples, generator=generator)
        if duplicates:
            order = torch.cat([order, order[:3], order[:1]])
        for rows in order.split(batch):
            logits = torch.randn(len(rows), num_classes, generator=generator) * 2
            recorder.update(rows, logits, labels[rows])
            probs = logits.double().softmax(-1)
            log += [
                (epoch, int(i), p.numpy(), z.numpy(), int(labels[i]))
                for i, p, z in zip(rows, probs, logits, strict=True)
            ]
        recorder.end_epoch()
    return recorder, log


@pytest.mark.filterwarnings("ignore:.*visited less often than window")
@pytest.mark.filterwarnings("ignore:.*visits were ignored as repeats")  # of one or two examples
@settings(max_examples=25, deadline=None)
@given(
    num_samples=st.integers(1, 12),
    num_classes=st.integers(2, 5),
    epochs=st.integers(1, 9),
    window=st.integers(2, 4),
    space=st.sampled_from(["prob", "logit"]),
    reduce=st.sampled_from(["mean", "sum"]),
    never_learned=st.sampled_from(["max", "zero"]),
    duplicates=st.booleans(),
    seed=st.integers(0, 10),
)
def test_streaming_equals_the_whole_log(
    num_samples, num_classes, epochs, window, space, reduce, never_learned, duplicates, seed
):
    recorder, log = _run(
        num_samples,
        num_classes,
        epochs,
        seed=seed,
        duplicates=duplicates,
        window=window,
        el2n_visits=3,
        dual_visits=6,
        space=space,
        reduce=reduce,
        never_learned=never_learned,
    )
    table = recorder.compute()
    want = oracle.scores_from_log(
        log,
        num_samples,
        num_classes,
        space=space,
        reduce=reduce,
        never_learned=never_learned,
        window=3,
        dual_window=window,
        dual_visits=6,
        dyn_unc_window=window,
        tdds_window=window,
    )
    if reduce == "sum":
        want["el2n"] = want["el2n_sum"]
    for name in STREAMED:
        # fp32 sums of at most 9 terms of magnitude at most 10.
        np.testing.assert_allclose(table[name].values, want[name], atol=2e-5, err_msg=name)
    assert (table.visits == epochs).all()


def test_three_examples_by_hand():
    """Probabilities of the label: 0.8 0.4 0.9; 0.3 0.6 0.2; 0.1 0.2 0.3 of two classes."""
    trace = torch.tensor([[0.8, 0.3, 0.1], [0.4, 0.6, 0.2], [0.9, 0.2, 0.3]])
    recorder = DynamicsRecorder(
        3, ["aum", "forgetting", "el2n", "correctness", "confidence", "variability"]
    )
    for p in trace:
        logits = torch.stack([p, 1 - p], dim=1).log()
        recorder.update(torch.arange(3), logits, torch.zeros(3, dtype=torch.long))
        recorder.end_epoch()
    table = recorder.compute()
    np.testing.assert_allclose(table["aum"].values, [0.4, -4 / 15, -0.6], atol=1e-6)
    assert table["forgetting"].values.tolist() == [1, 1, 3]  # the third was never right
    assert table["correctness"].values.tolist() == [2, 1, 0]
    np.testing.assert_allclose(
        table["el2n"].values, np.sqrt(2) * np.array([0.3, 1.9 / 3, 0.8]), atol=1e-6
    )
    np.testing.assert_allclose(table["confidence"].values, [0.7, 1.1 / 3, 0.2], atol=1e-6)
    np.testing.assert_allclose(
        table["variability"].values, trace.std(dim=0, correction=0), atol=1e-6
    )


def test_aum_by_sum_and_mean_rank_alike():
    (first, _), (second, _) = (_run(30, 4, 6, reduce=r, window=2) for r in ("sum", "mean"))
    assert np.array_equal(
        np.argsort(first.compute()["aum"].values), np.argsort(second.compute()["aum"].values)
    )


def test_resume_in_the_middle_of_an_epoch_changes_nothing(tmp_path):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 20, 3, generator=generator)
    labels = torch.randint(3, (20,), generator=generator)
    whole = DynamicsRecorder(20, STREAMED, window=3)
    parts = DynamicsRecorder(20, STREAMED, window=3)
    for epoch in range(6):
        for rows in torch.arange(20).split(8):
            for recorder in (whole, parts):
                recorder.update(rows, logits[epoch, rows], labels[rows])
            if epoch == 3 and rows[0] == 8:
                torch.save(parts.state_dict(), tmp_path / "record.pt")
                parts = DynamicsRecorder(20, STREAMED, window=3)
                parts.load_state_dict(torch.load(tmp_path / "record.pt", weights_only=True))
        whole.end_epoch()
        parts.end_epoch()
    for name in STREAMED:
        assert np.array_equal(whole.compute()[name].values, parts.compute()[name].values), name


def test_resume_with_other_settings_is_refused():
    state = DynamicsRecorder(20, ["aum"]).state_dict()
    with pytest.raises(InvalidValueError, match="record does not fit"):
        DynamicsRecorder(21, ["aum"]).load_state_dict(state)
    with pytest.raises(InvalidValueError, match="record does not fit"):
        DynamicsRecorder(20, ["aum"], space="logit").load_state_dict(state)


def _one_rank(rank, world, epochs):
    """Each rank records its share; with three ranks' padding some examples are seen twice."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(epochs, 11, 3, generator=generator)
    labels = torch.randint(3, (11,), generator=generator)
    recorder = DynamicsRecorder(11, [*STREAMED, "grand", "entropy", "loss"], window=3)
    for epoch in range(epochs):
        order = torch.randperm(11, generator=torch.Generator().manual_seed(epoch))
        order = torch.cat([order, order[:1]])  # a distributed sampler pads 11 to 12
        for rows in order[rank::world].split(2):
            recorder.update(rows, logits[epoch, rows], labels[rows], logits[epoch, rows] * 2)
            if epoch == 1 and rows[0] == order[rank::world][0]:
                recorder.sync()  # a checkpoint in the middle of an epoch
        recorder.end_epoch()
    for rows in torch.arange(rank, 11, world).split(2):
        recorder.record_final(rows, logits[0, rows], labels[rows])
    recorder.sync()
    table = recorder.compute()
    return {k: table[k].values for k in table}, table.visits


def test_two_ranks_record_what_one_does():
    alone, visits = _one_rank(0, 1, 5)
    for scores, seen in run_ddp(_one_rank, 2, 5):
        assert (seen == visits).all()
        for name in alone:
            np.testing.assert_array_equal(scores[name], alone[name], err_msg=name)


def test_low_precision_logits_are_taken_to_float32_first():
    logits = torch.tensor([[8.0, 7.96875]])
    for dtype in (torch.bfloat16, torch.float16):
        recorder = DynamicsRecorder(1, ["aum"])
        recorder.update(torch.tensor([0]), logits.to(dtype), torch.tensor([0]))
        want = logits.to(dtype).float().softmax(-1)
        assert recorder.compute()["aum"].values[0] == pytest.approx(float(want[0, 0] - want[0, 1]))


def test_last_layer_grand_is_the_gradient_norm_of_a_linear_head():
    torch.manual_seed(0)
    features, labels = torch.randn(6, 5), torch.randint(3, (6,))
    head = torch.nn.Linear(5, 3)
    recorder = DynamicsRecorder(6, ["grand"])
    recorder.update(torch.arange(6), head(features), labels, features)
    exact = exact_grand(head, features, labels)
    np.testing.assert_allclose(recorder.compute()["grand"].values, exact, rtol=1e-5)
    for row in range(6):
        head.zero_grad()
        torch.nn.functional.cross_entropy(
            head(features[row : row + 1]), labels[row : row + 1]
        ).backward()
        norm = sum(p.grad.square().sum() for p in head.parameters()).sqrt()
        assert float(exact[row]) == pytest.approx(float(norm), rel=1e-5)


def test_final_entropy_and_loss():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    recorder = DynamicsRecorder(5, ["entropy", "loss"])
    recorder.record_final(torch.tensor([3, 1, 0, 2]), logits, labels)
    table = recorder.compute()
    want = torch.distributions.Categorical(logits=logits).entropy()
    np.testing.assert_allclose(table["entropy"].values[[3, 1, 0, 2]], want, atol=1e-6)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(table["loss"].values[[3, 1, 0, 2]], loss, atol=1e-6)
    assert np.isnan(table["loss"].values[4])


def test_tokens_average_over_labelled_positions():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5)
    targets = torch.tensor([[1, 2, -100, -100], [0, -100, 3, 4]])
    recorder = DynamicsRecorder(2, ["aum", "el2n", "confidence", "correctness"])
    recorder.update(torch.arange(2), logits, targets)
    table = recorder.compute()
    for row, positions in ((0, [0, 1]), (1, [0, 2, 3])):
        single = DynamicsRecorder(len(positions), ["aum", "el2n", "confidence"])
        single.update(torch.arange(len(positions)), logits[row, positions], targets[row, positions])
        want = single.compute()
        for name in ("aum", "el2n", "confidence"):
            assert table[name].values[row] == pytest.approx(want[name].values.mean(), abs=1e-6)
    with pytest.raises(InvalidValueError, match="tdds' is not defined for token"):
        DynamicsRecorder(2, ["tdds"]).update(torch.arange(2), logits, targets)


def test_state_is_small():
    recorder = DynamicsRecorder(10_000, ["aum", "forgetting", "el2n"])
    recorder.update(torch.arange(4), torch.randn(4, 1000), torch.zeros(4, dtype=torch.long))
    assert recorder.bytes_per_example < 25.1


def test_forgotten_end_epoch_is_noticed():
    recorder = DynamicsRecorder(4, ["aum"])
    for _ in range(3):
        recorder.update(torch.arange(4), torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    with pytest.warns(UserWarning, match="8 visits were ignored .* call end_epoch"):
        recorder.compute()


def test_too_few_visits_for_a_window():
    recorder = DynamicsRecorder(4, ["dual", "aum"], window=3)
    recorder.update(torch.arange(3), torch.randn(3, 2), torch.zeros(3, dtype=torch.long))
    with pytest.warns(UserWarning, match="3 examples were visited less often than window=3"):
        table = recorder.compute()
    assert np.isnan(table["dual"].values).all()
    assert np.isnan(table["aum"].values).tolist() == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, ["aum"], {}), "num_samples must be at least 1, got 0"),
        ((4, ["aumm"], {}), "no score 'aumm'; did you mean 'aum'"),
        ((4, [], {}), "scores is empty"),
        ((4, ["dual"], {"window": 1}), "window must be at least 2"),
        ((4, ["dual"], {"dual_visits": 3}), "dual_visits at least window"),
        ((4, ["aum"], {"space": "log"}), "space must be one of"),
        ((4, ["aum"], {"reduce": "max"}), "reduce must be one of"),
        ((4, ["forgetting"], {"never_learned": "inf"}), "never_learned must be one of"),
    ],
)
def test_bad_settings(arguments, message):
    num_samples, scores, more = arguments
    with pytest.raises(InvalidValueError, match=message):
        DynamicsRecorder(num_samples, scores, **more)


def test_bad_updates():
    recorder = DynamicsRecorder(4, ["aum", "grand"])
    rows, logits, labels = torch.arange(3), torch.randn(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(RunError, match="nothing was recorded"):
        recorder.compute()
    with pytest.raises(InvalidValueError, match="'grand' needs features"):
        recorder.update(rows, logits, labels)
    recorder = DynamicsRecorder(4, ["aum"])
    with pytest.raises(InvalidValueError, match="index 4 is out of range for num_samples=4"):
        recorder.update(rows + 2, logits, labels)
    with pytest.raises(InvalidValueError, match="index -1 is out of range"):
        recorder.update(rows - 1, logits, labels)
    with pytest.raises(InvalidValueError, match="expected indices"):
        recorder.update(rows, logits, labels[:2])
    with pytest.raises(InvalidValueError, match="2 indices for 3 rows"):
        recorder.update(rows[:2], logits, labels)
    with pytest.raises(InvalidTypeError, match="must be tensors"):
        recorder.update([0, 1, 2], logits, labels)
    recorder.update(rows, logits, labels)
    with pytest.raises(InvalidValueError, match="have 3 classes and had 2 before"):
        recorder.update(rows, torch.randn(3, 3), labels)


def test_targets_out_of_range_and_single_logits_are_refused():
    recorder = DynamicsRecorder(4, ["aum"])
    with pytest.raises(InvalidValueError, match="target -1 is out of range for 2 classes"):
        recorder.update(torch.arange(2), torch.randn(2, 2), torch.tensor([0, -1]))
    with pytest.raises(InvalidValueError, match="target 2 is out of range"):
        recorder.update(torch.arange(2), torch.randn(2, 2), torch.tensor([0, 2]))
    with pytest.raises(InvalidValueError, match="at least two classes"):
        recorder.update(torch.arange(2), torch.randn(2, 1), torch.tensor([0, 0]))


def test_final_scores_alone_can_be_selected_by():
    recorder = DynamicsRecorder(4, ["entropy"])
    labels = torch.tensor([0, 1, 1, 0])
    recorder.record_final(torch.arange(4), torch.randn(4, 2), labels)
    table = recorder.compute()
    assert table.targets.tolist() == labels.tolist()
    assert len(CCS(prune_rate=0.5).select(table["entropy"])) == 2


def test_counters_stop_at_their_limit():
    recorder = DynamicsRecorder(1, ["correctness", "forgetting"])
    recorder.update(torch.tensor([0]), torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    recorder._state["correct"][0] = 32767
    recorder._state["forgotten"][0] = 32767
    for logits in ([[0.0, 2.0]], [[2.0, 0.0]]):
        recorder.end_epoch()
        recorder.update(torch.tensor([0]), torch.tensor(logits), torch.tensor([0]))
    table = recorder.compute()
    assert table["correctness"].values[0] == table["forgetting"].values[0] == 32767


def test_exact_grand_leaves_the_model_as_it_was():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    norms = exact_grand(model, torch.randn(7, 3), torch.randint(2, (7,)), chunk_size=3)
    assert norms.shape == (7,)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
