"""ScoreTable: files, Hugging Face columns, ensembles."""

import datasets
import numpy as np
import pytest

from mlkit.coresets import ArrayScore, ScoreTable
from mlkit.errors import InvalidTypeError, InvalidValueError, MissingDataError


def _table(seed=0):
    rng = np.random.default_rng(seed)
    aum = rng.normal(size=5)
    aum[2] = np.nan
    return ScoreTable(
        {"aum": aum, "mine": rng.normal(size=5)},
        targets=np.arange(5),
        visits=np.array([3, 3, 0, 3, 3], dtype=np.int32),
        meta={"space": "prob", "epochs": 3},
        hard={"mine": "high"},
    )


def test_file_round_trip(tmp_path):
    table = _table()
    table.save(tmp_path / "deep" / "scores.safetensors")
    loaded = ScoreTable.load(tmp_path / "deep" / "scores.safetensors")
    assert list(loaded) == ["aum", "mine"]
    for name in table:
        assert np.array_equal(loaded[name].values, table[name].values, equal_nan=True)
        assert loaded[name].hard == table[name].hard
    assert loaded.meta == table.meta
    assert loaded["aum"].unseen.tolist() == [False, False, True, False, False]
    assert loaded.targets.tolist() == [0, 1, 2, 3, 4]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["scores.safetensors"]


def test_files_that_are_none(tmp_path):
    with pytest.raises(MissingDataError, match=r"no score table at .*ccs.stage=score"):
        ScoreTable.load(tmp_path / "absent")
    (tmp_path / "text").write_text("not a table at all")
    with pytest.raises(InvalidValueError, match="is not a ScoreTable file"):
        ScoreTable.load(tmp_path / "text")
    good = tmp_path / "good"
    _table().save(good)
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-9])
    with pytest.raises(InvalidValueError, match="is not a ScoreTable file"):
        ScoreTable.load(tmp_path / "cut")


def test_hugging_face_columns():
    hf = datasets.Dataset.from_dict({"text": list("abcde")})
    table = _table()
    annotated = table.to_hf(hf)
    assert annotated.column_names == ["text", "score_aum", "score_mine"]
    back = ScoreTable.from_hf(annotated, hard={"mine": "high"})
    assert np.array_equal(back["aum"].values, table["aum"].values, equal_nan=True)
    assert back["aum"].unseen.tolist() == [False, False, True, False, False]
    with pytest.raises(InvalidValueError, match="has the columns .*already"):
        table.to_hf(annotated)
    with pytest.raises(InvalidValueError, match="5 rows and the data set 2"):
        table.to_hf(hf.select([0, 1]))
    with pytest.raises(InvalidValueError, match="no column begins with 'score_'"):
        ScoreTable.from_hf(hf)


def test_mean_of_runs():
    tables = [_table(s) for s in range(3)]
    mean = ScoreTable.mean(tables)
    assert np.allclose(mean["mine"].values, np.mean([t["mine"].values for t in tables], axis=0))
    assert np.isnan(mean["aum"].values).tolist() == [False, False, True, False, False]
    assert mean.meta["runs"] == 3
    with pytest.raises(InvalidValueError, match="columns differ"):
        ScoreTable.mean([_table(), ScoreTable({"aum": np.zeros(5)})])
    with pytest.raises(InvalidTypeError, match="non-empty sequence of ScoreTable"):
        ScoreTable.mean([])


def test_bad_tables():
    with pytest.raises(InvalidValueError, match="no score 'amu' here; did you mean 'aum'"):
        _table()["amu"]
    with pytest.raises(InvalidValueError, match="columns of one length"):
        ScoreTable({"aum": np.zeros(3), "el2n": np.zeros(4)})
    with pytest.raises(InvalidValueError, match="at least one score"):
        ScoreTable({})
    with pytest.raises(InvalidValueError, match=r"which side of \['mine'\] is hard"):
        ScoreTable({"mine": np.zeros(3)})
    with pytest.raises(InvalidValueError, match="hard must be 'low' or 'high'"):
        ArrayScore(np.zeros(3), "left")


def test_array_score_is_an_array():
    score = ArrayScore(np.array([1.0, 2.0]), "low", "aum")
    assert np.asarray(score).tolist() == [1.0, 2.0]
    assert score.hardness().tolist() == [-1.0, -2.0]
    assert len(score) == 2
    assert "5 examples: aum, mine" in repr(_table())
