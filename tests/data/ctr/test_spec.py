"""`CTRSpec` and the tensors that come of it."""

import pytest
import torch

from mlkit.data import CTRSpec
from mlkit.data.ctr import CTRBatches, SyntheticConfig, ctr_loader, to_tensors
from mlkit.errors import InvalidValueError, MissingDataError
from mlkit.run import build
from tests.helpers.runs import compose_job

SMALL = {
    "_target_": "mlkit.data.ctr.synthetic.synthetic",
    "num_samples": 500,
    "table_sizes": [5, 9, 4],
    "num_interacting": 2,
}


def spec(**changes):
    return CTRSpec(**{"name": "small", "stream": SMALL, "batch_size": 64, **changes})


def test_the_stream_gets_seed_and_shares():
    stream = spec(val_fraction=0.2, test_fraction=0.3).load(seed=5)
    assert [stream.num_samples(s) for s in ("train", "val", "test")] == [250, 100, 150]
    assert stream.source == spec().load(5).source != spec().load(6).source


def test_loader_gives_the_batches_in_order_every_time():
    stream = spec(test_fraction=0.3).load(0)
    loader = ctr_loader(stream, "train", 64)
    for _ in range(2):
        got = list(loader)
        assert [len(b["label"]) for b in got] == [64] * 4 + [44]
        for name in ("dense", "sparse", "label"):
            whole = torch.cat([b[name] for b in got])
            assert torch.equal(whole, to_tensors(stream.part("train"))[name])
    first = next(iter(CTRBatches(stream, "test", 7)))
    kinds = {name: tensor.dtype for name, tensor in first.items()}
    assert kinds == {"dense": torch.float32, "sparse": torch.int64, "label": torch.float32}


def test_bad_values_are_refused():
    with pytest.raises(InvalidValueError, match="data.batch_size must be an integer .* got 0"):
        spec(batch_size=0)
    with pytest.raises(InvalidValueError, match=r"data.val_fraction must be .* got 1.0"):
        spec(val_fraction=1.0)
    with pytest.raises(InvalidValueError, match=r"last_day needs two days"):
        spec(test_fraction="last_day").load(0)


def test_absent_files_are_named_before_anything_is_loaded(tmp_path):
    spec().check_files()
    own = {"_target_": "mlkit.data.ctr.criteo.criteo", "path": None}
    with pytest.raises(MissingDataError, match="small cannot be fetched .* data.path=/path/to"):
        spec(stream=own).check_files()
    with pytest.raises(MissingDataError, match="there is no file nowhere.txt"):
        spec(stream=own, path="nowhere.txt").check_files()
    (tmp_path / "mine").write_text("x")
    spec(stream=own, path=[str(tmp_path / "mine")]).check_files()
    with pytest.raises(MissingDataError, match=r"movielens100k is neither in .*fetch_data.py"):
        spec(name="movielens100k", root=str(tmp_path)).check_files()


def test_configured_files_of_days_are_read(tmp_path):
    for day in range(3):
        rows = [f"{n % 2}\t" + "\t".join(["7"] * 13 + ["0a"] * 26) for n in range(4 + day)]
        (tmp_path / f"day_{day}").write_text("\n".join(rows) + "\n")
    days = ",".join(f"'{tmp_path}/day_{day}'" for day in range(3))
    chosen = ["data=criteo", "model=dlrm", f"data.path=[{days}]", "data.test_fraction=last_day"]
    with compose_job(tmp_path / "run", "recipe=ccs", *chosen) as cfg:
        made = build(cfg.data)
    made.check_files()
    stream = made.load(0)
    assert [stream.num_samples(s) for s in ("train", "val", "test")] == [8, 1, 6]
    (batch,) = stream.batches("test", made.batch_size)
    assert batch.label.tolist() == [0, 1, 0, 1, 0, 1]


def test_the_configured_stream_is_the_default_one(tmp_path):
    with compose_job(tmp_path, "recipe=ccs", "data=ctr_synthetic", "model=dlrm") as cfg:
        made = build(cfg.data)
        given = {k: v for k, v in cfg.data.stream.items() if k != "_target_"}
    assert SyntheticConfig(**given) == SyntheticConfig()
    assert (made.val_fraction, made.test_fraction) == (0.05, 0.25)
