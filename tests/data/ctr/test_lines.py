"""Criteo's and Avazu's files in their true formats, written by hand, plain and packed."""

import gzip
import math

import numpy as np
import pytest

from mlkit.data.ctr.avazu import avazu
from mlkit.data.ctr.criteo import criteo
from mlkit.data.ctr.hashing import hash_cells, mix64
from mlkit.errors import InvalidValueError, MissingDataError
from tests.helpers.clicks import AVAZU_HEADER, avazu_rows, criteo_rows

ROW = "1\t1\t-1\t\t5\t1382\t4\t15\t2\t181\t1\t2\t\t2\t" + "\t".join(["68fd1e64"] * 25) + "\t"


def write(path, rows, end="\n", header=None, last=True):
    lines = [*([header] if header else []), *rows]
    path.write_bytes((end.join(lines) + (end if last else "")).encode())
    return path


def everything(stream, batch_size=7):
    parts = [b for split in ("train", "val", "test") for b in stream.batches(split, batch_size)]
    return [np.concatenate([getattr(b, n) for b in parts]) for n in ("dense", "sparse", "label")]


# --------------------------------------------------------------------------- what a row says


def test_criteo_row_is_read_as_it_is_written(tmp_path):
    rows = [ROW, ROW.replace("68fd1e64", "0", 1).replace("1\t", "0\t", 1)]
    stream = criteo(write(tmp_path / "train.txt", rows), test_fraction=0, val_fraction=0)
    (batch,) = stream.batches("train", 10)
    log = math.log
    wanted = [log(2), -log(2), 0, log(6), log(1383), log(5), log(16), log(3), log(182), log(2)]
    assert batch.dense[0] == pytest.approx([*wanted, log(3), 0, log(3)], rel=1e-6)
    assert batch.label.tolist() == [1, 0]
    assert batch.sparse.shape == (2, 26)
    assert (batch.sparse[0] != batch.sparse[1]).tolist() == [True] + [False] * 25
    assert len(set(batch.sparse[0])) > 20  # a key per column, and an empty cell is a category
    assert (stream.num_dense, stream.table_sizes) == (13, (100_000,) * 26)


def test_avazu_row_is_read_as_it_is_written(tmp_path):
    row = (
        "1000009418151094273,0,14102107,1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,"
        "07d7df22,a99f214a,ddd2926e,44956a24,1,2,15706,320,50,1722,0,35,-1,79"
    )
    path = write(tmp_path / "train.csv", [row, row.replace(",0,", ",1,", 1)], header=AVAZU_HEADER)
    stream = avazu(path, table_sizes=[50] * 20 + [9], test_fraction=0, val_fraction=0)
    (batch,) = stream.batches("train", 10)
    assert stream.table_names[:2] == ("hour", "C1")
    assert stream.table_sizes == (24, *[50] * 20, 9)
    assert batch.sparse[:, 0].tolist() == [7, 7]
    assert batch.label.tolist() == [0, 1]
    assert batch.dense.shape == (2, 0)
    assert np.array_equal(batch.sparse[0], batch.sparse[1])
    assert (batch.sparse.max(0) < stream.table_sizes).all()


def test_hash_is_splitmix_keyed_by_column_and_blind_to_neighbours():
    # first outputs of SplitMix64 for seed 0, as in its authors' program
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.arange(1, 4, dtype=np.uint64) * golden
    assert [hex(x) for x in mix64(states)] == [
        "0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f",
    ]  # fmt: skip
    short = np.array([[b"ab", b"ab"], [b"", b"x"]])
    long = np.array([[b"ab", b"ab"], [b"", b"x"], [b"a much longer cell", b"y"]])
    sizes = [1 << 40, 1 << 40]
    assert np.array_equal(hash_cells(short, sizes), hash_cells(long, sizes)[:2])
    ids = hash_cells(long, sizes)
    assert len(np.unique(ids)) == ids.size
    words = np.array([[f"{n:x}".encode()] for n in range(20_000)])
    counts = np.bincount(hash_cells(words, [100])[:, 0], minlength=100)
    # chi-square with 99 degrees of freedom: mean 99, standard deviation 14
    assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * 14


# --------------------------------------------------------------------------- blocks, ends, gzip


@pytest.mark.parametrize("block_bytes", [1, 7, 100, 1009, 1 << 22])
@pytest.mark.parametrize(("end", "last"), [("\n", True), ("\r\n", True), ("\n", False)])
def test_blocks_of_any_size_give_the_same_rows(tmp_path, block_bytes, end, last):
    rows = criteo_rows(23)
    whole = criteo(write(tmp_path / "whole", rows))
    wanted = everything(whole)
    path = write(tmp_path / "other", rows, end, last=last)
    stream = criteo(path, block_bytes=block_bytes)
    for got, expected in zip(everything(stream), wanted, strict=True):
        assert np.array_equal(got, expected)
    assert [stream.num_samples(s) for s in ("train", "val", "test")] == [19, 1, 3]
    assert np.rint(np.expm1(wanted[0][:, 0])).tolist() == list(range(23))
    middle = np.concatenate([b.label for b in stream.batches("val", 3)])
    assert np.array_equal(middle, wanted[2][19:20])


def test_gzip_and_several_files_are_one_stream(tmp_path):
    rows = criteo_rows(31)
    wanted = everything(criteo(write(tmp_path / "whole", rows)))
    plain = write(tmp_path / "day_0", rows[:12])
    packed = tmp_path / "day_1"
    packed.write_bytes(gzip.compress(("\n".join(rows[12:20]) + "\n").encode()))
    last = write(tmp_path / "day_2", rows[20:], last=False)
    stream = criteo([str(plain), str(packed), str(last)], test_fraction="last_day", block_bytes=300)
    for got, expected in zip(everything(stream), wanted, strict=True):
        assert np.array_equal(got, expected)
    assert [stream.num_samples(s) for s in ("train", "val", "test")] == [18, 2, 11]
    assert "day_0, day_1, day_2" in stream.source


def test_files_without_a_row_change_nothing(tmp_path):
    rows = criteo_rows(20)
    parts = {"a": [], "b": rows[:14], "c": [], "d": rows[14:], "e": []}
    paths = [write(tmp_path / name, part, last=bool(part)) for name, part in parts.items()]
    stream = criteo(paths, test_fraction="last_day", val_fraction=0, block_bytes=700)
    wanted = everything(criteo(write(tmp_path / "whole", rows)))
    for got, expected in zip(everything(stream), wanted, strict=True):
        assert np.array_equal(got, expected)
    assert [stream.num_samples(s) for s in ("train", "val", "test")] == [14, 0, 6]


def test_batches_have_one_size_over_blocks_and_bad_rows(tmp_path):
    rows = criteo_rows(40)
    rows[3] = "oops"
    rows[17] = ""
    stream = criteo(write(tmp_path / "t", rows), val_fraction=0, test_fraction=0, block_bytes=500)
    assert [len(b.label) for b in stream.batches("train", 9)] == [9, 9, 9, 9, 2]
    assert stream.malformed == {"train": 2}
    assert stream.num_samples("train") == 40


def test_source_names_the_text(tmp_path):
    first = criteo(write(tmp_path / "a", criteo_rows(5)))
    again = criteo(tmp_path / "a", block_bytes=3)
    (tmp_path / "b").mkdir()
    other = criteo(write(tmp_path / "b" / "a", criteo_rows(5, seed=1)))
    assert first.source == again.source
    assert first.source != other.source


def test_avazu_test_part_is_the_last_day(tmp_path):
    rows = avazu_rows(72)
    stream = avazu(write(tmp_path / "a.csv", rows, header=AVAZU_HEADER), block_bytes=999)
    assert [stream.num_samples(s) for s in ("train", "val", "test")] == [44, 4, 24]
    hours = np.concatenate([b.sparse[:, 0] for b in stream.batches("test", 5)])
    assert hours.tolist() == list(range(24))
    labels = [int(row.split(",")[1]) for row in rows]
    assert everything(stream)[2].tolist() == labels


# --------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    "bad",
    [
        "1\t2",
        ROW.replace("1\t", "2\t", 1),
        ROW.replace("\t-1\t", "\t-\t"),
        ROW.replace("\t-1\t", "\t1.5\t"),
        ROW.replace("\t-1\t", "\t1_0\t"),
        ROW.replace("68fd1e64", "68FD1E64"),
        ROW.replace("68fd1e64", "68fd\x001e"),
        ROW + "\t",
        ROW.removeprefix("1\t"),
        "",
    ],
)
def test_malformed_rows_are_left_out_up_to_the_limit(tmp_path, bad):
    good = criteo_rows(6)
    path = write(tmp_path / "train.txt", [*good[:3], bad, *good[3:]])
    stream = criteo(path, val_fraction=0, test_fraction=0, max_malformed=1)
    (batch,) = stream.batches("train", 50)
    (wanted,) = criteo(write(tmp_path / "good", good), val_fraction=0, test_fraction=0).batches(
        "train", 50
    )
    assert np.array_equal(batch.sparse, wanted.sparse)
    assert stream.malformed == {"train": 1}
    strict = criteo(path, val_fraction=0, test_fraction=0, max_malformed=0, block_bytes=10)
    with pytest.raises(InvalidValueError, match=r"train.txt, line 4: malformed row number 1 of"):
        list(strict.batches("train", 50))


def test_message_of_a_bad_row_counts_the_header_and_the_file(tmp_path):
    rows = avazu_rows(10)
    first = write(tmp_path / "one.csv", rows[:5], header=AVAZU_HEADER)
    rows[7] = rows[7].replace(",1005,", ",")
    second = write(tmp_path / "two.csv", rows[5:], header=AVAZU_HEADER)
    stream = avazu([str(first), str(second)], max_malformed=0, test_fraction=0)
    with pytest.raises(InvalidValueError, match=r"two.csv, line 4: .* expected 24 cells"):
        list(stream.batches("train", 3))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(MissingDataError, match=r"criteo cannot be fetched .* data.path=/path"):
        criteo(None)
    with pytest.raises(MissingDataError, match=r"avazu: there is no file .*nowhere; set data.path"):
        avazu(str(tmp_path / "nowhere"))
    path = write(tmp_path / "a", criteo_rows(3))
    with pytest.raises(InvalidValueError, match="names a file twice"):
        criteo([str(path), str(path)])
    with pytest.raises(InvalidValueError, match="last_day needs two days, and the data name 0"):
        criteo(path, test_fraction="last_day").num_samples("test")
    with pytest.raises(InvalidValueError, match="there is no row; expected label 0 or 1"):
        criteo(write(tmp_path / "empty", [], last=False)).num_samples("test")
    with pytest.raises(InvalidValueError, match=r"a, line 1: expected the header id,click"):
        avazu(path).num_samples("test")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"\n".join([ROW.encode()] * 50))[:-9])
    with pytest.raises(InvalidValueError, match=r"cut.gz is no whole gzip file"):
        criteo(tmp_path / "cut.gz").num_samples("test")
    (tmp_path / "long").write_bytes(b"1" * 200_000)
    with pytest.raises(InvalidValueError, match="long has no line end within 65536 bytes"):
        criteo(tmp_path / "long").num_samples("test")


def test_rows_out_of_the_order_of_time_are_refused(tmp_path):
    rows = avazu_rows(48)
    rows[10], rows[40] = rows[40], rows[10]
    path = write(tmp_path / "a.csv", rows, header=AVAZU_HEADER)
    with pytest.raises(
        InvalidValueError, match=r"a.csv, line 13: hour 14102116 comes after 14102312"
    ):
        avazu(path).num_samples("test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table_sizes": 0}, "one integer of at least 1, or 26 of them"),
        ({"table_sizes": [5] * 25}, r"or 26 of them \(for C1, C2"),
        ({"max_malformed": -1}, "max_malformed must be at least 0"),
        ({"block_bytes": 0}, "block_bytes at least 1"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    path = write(tmp_path / "a", criteo_rows(2))
    with pytest.raises(InvalidValueError, match=message):
        criteo(path, **arguments)
    stream = criteo(path)
    with pytest.raises(InvalidValueError, match="batch_size must be at least 1"):
        stream.batches("train", 0)
    with pytest.raises(InvalidValueError, match="no part 'tests'"):
        stream.batches("tests", 4)
