"""Small click logs in the true formats of sets that are not on every machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlkit.data.offline import ENTRIES

__all__ = [
    "AVAZU_HEADER",
    "avazu_rows",
    "criteo_rows",
    "write_avazu",
    "write_criteo",
    "write_movielens100k",
    "write_obd",
]

AVAZU_HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,"
    "device_id,device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)


def criteo_rows(num: int, seed: int = 0) -> list[str]:
    """Lines of Criteo's log; the first integer is the number of the line."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        integers = [str(rng.integers(-3, 5000)) if rng.random() < 0.7 else "" for _ in range(13)]
        hashes = [f"{rng.integers(9):08x}" if rng.random() < 0.8 else "" for _ in range(26)]
        integers[0] = str(number)
        rows.append("\t".join([str(rng.integers(2)), *integers, *hashes]))
    return rows


def avazu_rows(num: int, days: int = 3, seed: int = 0) -> list[str]:
    """Lines of Avazu's log, spread over some days of October 2014."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        hour = number * 24 * days // num
        stamp = f"1410{21 + hour // 24}{hour % 24:02}"
        middle = [f"{rng.integers(5):08x}" for _ in range(9)]
        end = ["1", "0", "15706", "320", "50", "1722", "0", "35", "-1", "79"]
        cells = [str(10**18 + number), str(rng.integers(2)), stamp, "1005", "0", *middle, *end]
        rows.append(",".join(cells))
    return rows


def write_criteo(root: Path, num: int = 400) -> Path:
    """Write a log as Criteo's; return the file."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / "train.txt"
    path.write_text("\n".join(criteo_rows(num)) + "\n")
    return path


def write_avazu(root: Path, num: int = 400) -> Path:
    """Write a log as Avazu's; return the file."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / "train.csv"
    path.write_text("\n".join([AVAZU_HEADER, *avazu_rows(num)]) + "\n")
    return path


def write_movielens100k(root: Path, num: int = 1500) -> None:
    """Write the three files of MovieLens-100k as RecBole has them: 150 users and 200 films."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    ratings = [
        f"{rng.integers(150)}\t{rng.integers(200)}\t{rng.integers(1, 6)}\t{time}"
        for time in range(num)
    ]
    users = [f"{i}\t{18 + i % 60}\t{'MF'[i % 2]}\twriter\t{10_000 + i}" for i in range(150)]
    films = [f"{i}\tFilm {i}\t{1960 + i % 40}\tDrama" for i in range(200)]
    files = {
        "inter": ("user_id:token item_id:token rating:float timestamp:float", ratings),
        "user": ("user_id:token age:token gender:token occupation:token zip_code:token", users),
        "item": ("item_id:token movie_title:token_seq release_year:token class:token_seq", films),
    }
    for name, (head, rows) in files.items():
        lines = [head.replace(" ", "\t"), *rows]
        (root / f"ml-100k.{name}").write_text("\n".join(lines) + "\n")


def write_obd(root: Path, num: int = 400) -> None:
    """Write the Open Bandit sample: the log of `random/all`, of five items; others are empty."""
    rng = np.random.default_rng(0)
    for product in ENTRIES["obd"].produces:
        (root / product).parent.mkdir(parents=True, exist_ok=True)
        (root / product).write_text("")
    users = ",".join(f"user_feature_{i}" for i in range(4))
    log = [f",timestamp,item_id,position,click,propensity_score,{users},user-item_affinity_0"]
    for i in range(num):
        stamp = f"2019-11-{24 + i // 200} {i % 24:02}:00:17.004101+00:00"
        log.append(f"{i},{stamp},{rng.integers(5)},{i % 3 + 1},{i % 2},0.1,u{i % 7},v,w,x,0.5")
    items = [",item_id," + ",".join(f"item_feature_{i}" for i in range(4))]
    items += [f"{i},{i},{i / 5},a{i},b,c" for i in range(5)]
    folder = root / "random" / "all"
    (folder / "all.csv").write_text("\n".join(log) + "\n")
    (folder / "item_context.csv").write_text("\n".join(items) + "\n")
