"""MovieLens-100k and the Open Bandit sample: on hand-written files, and on the real ones."""

from collections import Counter

import numpy as np
import pytest

from mlkit.data.ctr.movielens import convert_movielens100k, movielens100k
from mlkit.data.ctr.obd import convert_obd, obd
from mlkit.data.fetch import fetch
from mlkit.data.offline import ENTRIES, require
from mlkit.errors import InvalidValueError, MissingDataError, RunError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
USER = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"


def movielens_files(folder, **changes):
    folder.mkdir(exist_ok=True)
    texts = {
        "ml-100k.inter": INTER + "1\t20\t4\t300\n2\t10\t3\t100\n1\t10\t5\t200\n3\t20\t1\t300\n",
        "ml-100k.user": USER
        + "1\t17\tF\twriter\tT8H1N\n2\t18\tM\tother\t85711\n3\t56\tM\twriter\t8\n",
        "ml-100k.item": ITEM + "10\tHeat\t1995\tAction Crime\n20\tunknown\t\tunknown\n",
    }
    for name, text in {**texts, **changes}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_movielens_joins_the_side_files_and_goes_by_time(tmp_path):
    data = movielens100k(movielens_files(tmp_path), val_fraction=0.25, test_fraction=0.25)
    assert data.label.tolist() == [0, 1, 1, 0]
    columns = dict(zip(data.table_names, data.sparse.T.tolist(), strict=True))
    assert columns == {
        "user": [1, 0, 0, 2],
        "item": [0, 0, 1, 1],
        "age": [1, 0, 0, 2],
        "gender": [1, 0, 0, 1],
        "occupation": [0, 1, 1, 1],
        "zip_prefix": [0, 1, 1, 0],
        "year": [1, 1, 0, 0],
        "genre": [0, 0, 1, 1],
    }
    assert data.table_sizes == (3, 2, 3, 2, 2, 2, 2, 2)
    assert data.ends == (1, 2)  # the two at time 300 are together
    assert data.num_dense == 0
    assert "not to be redistributed" in data.source


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ml-100k.inter", "", r"ml-100k.inter, line 1: expected the columns user_id, item_id"),
        ("ml-100k.inter", USER, r"line 1: expected the columns user_id, item_id, rating"),
        ("ml-100k.inter", INTER + "1\t20\t4\n", r"line 2: expected 4 cells, got 3"),
        ("ml-100k.inter", INTER + "9\t20\t4\t1\n", r"line 2: user_id '9' is in no row of the side"),
        ("ml-100k.inter", INTER + "1\t30\t4\t1\n", r"line 2: item_id '30' is in no row"),
        ("ml-100k.inter", INTER + "1\t20\tgood\t1\n", r"rating must be a number, got 'good'"),
        ("ml-100k.user", USER + "1\told\tF\tx\t1\n", r"ml-100k.(user|inter), line "),
    ],
)
def test_malformed_movielens_files_are_refused(tmp_path, name, text, message):
    with pytest.raises(InvalidValueError, match=message):
        movielens100k(movielens_files(tmp_path, **{name: text}))


def test_movielens_shows_its_terms_before_it_is_fetched(tmp_path):
    with pytest.raises(MissingDataError, match=r"fetch_data.py movielens100k"):
        movielens100k(tmp_path)
    with pytest.raises(RunError, match=r"GroupLens: for research.*--accept-license"):
        fetch("movielens100k", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_converters_copy_the_files_as_they_are(tmp_path):
    source = tmp_path / "source"
    for name, convert in (("movielens100k", convert_movielens100k), ("obd", convert_obd)):
        entry, ready = ENTRIES[name], tmp_path / name
        ready.mkdir()
        for member in entry.members:
            (source / member.path).parent.mkdir(parents=True, exist_ok=True)
            (source / member.path).write_text(member.path)
        convert(source, ready)
        assert not entry.missing_from(ready)
        kept = sorted((ready / product).read_text() for product in entry.produces)
        assert kept == sorted(member.path for member in entry.members)


def obd_files(folder, log=None, items=None):
    for product in ENTRIES["obd"].produces:
        (folder / product).parent.mkdir(parents=True, exist_ok=True)
        (folder / product).write_text("")
    users = ",".join(f"user_feature_{i}" for i in range(4))
    log = log or [
        "0,2019-11-24 00:00:17.004101+00:00,1,3,1,0.1,u0,v0,w0,x0,0.5",
        "1,2019-11-25 01:30:00+00:00,0,1,0,0.1,u1,v0,w0,x0,0.5",
        "2,2019-11-24 23:59:59.9+00:00,0,2,0,0.1,u0,v0,w0,x0,0.5",
    ]
    head = f",timestamp,item_id,position,click,propensity_score,{users},user-item_affinity_0"
    (folder / "bts/men/men.csv").write_text("\n".join([head, *log]) + "\n")
    items = items or ["0,0,-0.5,a,b,c", "1,1,0.25,d,b,e"]
    features = ",".join(f"item_feature_{i}" for i in range(4))
    context = "\n".join([f",item_id,{features}", *items]) + "\n"
    (folder / "bts/men/item_context.csv").write_text(context)
    return folder


def test_obd_joins_the_items_and_goes_by_time(tmp_path):
    data = obd(obd_files(tmp_path), policy="bts", campaign="men", val_fraction=0)
    assert data.label.tolist() == [1, 0, 0]
    assert data.dense[:, 0].tolist() == [0.25, -0.5, -0.5]
    columns = dict(zip(data.table_names, data.sparse.T.tolist(), strict=True))
    assert columns["item"] == [1, 0, 0]
    assert columns["position"] == [2, 1, 0]
    assert columns["hour"] == [0, 2, 1]  # hours 0, 23 and 1 occur
    assert columns["user_feature_0"] == [0, 0, 1]
    assert columns["item_feature_1"] == [1, 0, 0]
    assert data.ends == (2, 2)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (["0,2019-11-24 00:00:17+00:00,7,3,1,0.1,u,v,w,x,0.5"], "line 2: expected an item of"),
        (["0,2019-11-24 00:00:17+00:00,1,3,2,0.1,u,v,w,x,0.5"], "and click '2'"),
        (["0,yesterday,1,3,1,0.1,u,v,w,x,0.5"], "timestamp must be an ISO time"),
        (["0,2019-11-24 00:00:17+00:00,1,3,1"], "men.csv, line 2: expected 11 cells, got 5"),
    ],
)
def test_malformed_obd_files_are_refused(tmp_path, log, message):
    with pytest.raises(InvalidValueError, match=message):
        obd(obd_files(tmp_path, log=log), policy="bts", campaign="men")


def test_unknown_policy_and_empty_file_are_refused(tmp_path):
    obd_files(tmp_path)
    with pytest.raises(InvalidValueError, match="no policy 'bandit'; known: bts, random"):
        obd(tmp_path, policy="bandit")
    with pytest.raises(InvalidValueError, match="no campaign 'mens'; did you mean 'men'"):
        obd(tmp_path, campaign="mens")
    with pytest.raises(InvalidValueError, match="all.csv, line 1: there is no column timestamp"):
        obd(tmp_path)


@pytest.mark.data("movielens100k")
def test_real_movielens():
    data = movielens100k()
    assert data.table_sizes[:2] == (943, 1682)
    assert len(data.label) == 100_000
    assert data.label.sum() == 55_375
    counts = Counter(data.sparse[:, 1].tolist())
    top = sum(count for _, count in counts.most_common(168))
    assert top / 100_000 == pytest.approx(0.427, abs=0.002)
    assert data.ends[1] == 90_000


@pytest.mark.data("obd")
@pytest.mark.parametrize(
    ("policy", "campaign", "clicks"), [("random", "all", 38), ("bts", "men", 69)]
)
def test_real_obd(policy, campaign, clicks):
    data = obd(require("obd"), policy=policy, campaign=campaign)
    assert len(data.label) == 10_000
    assert data.label.sum() == clicks
    assert np.ptp(data.sparse[:, 1]) == 2
