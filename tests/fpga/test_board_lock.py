"""The lock of a board: who may have it, and what may lie in its place."""

import contextlib
import fcntl
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fpga.devices.lock
from fpga import DeviceError
from fpga.devices.lock import lock_folder, take_board

NOBODY = 65534
NAME = "board"
FILE = f"dynasty-dpgemm-{NAME}.lock"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """As /run/lock is: every user may write there."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o1777)
        yield Path(made)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[os.stat_result]:
    handle = take_board(NAME, folder)
    try:
        yield os.fstat(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Root is another user for a while; any other user stays who it is."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_lock_is_an_empty_file_that_all_users_can_wait_for(folder: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with held(folder) as found:
            assert (stat.S_IMODE(found.st_mode), found.st_size) == (0o644, 0)
    finally:
        os.umask(before)


def test_another_users_lock_is_taken_and_waited_for(folder: Path) -> None:
    """And nothing is written to it, whatever it holds."""
    with held(folder):
        pass
    (folder / FILE).write_text("what another version wrote")
    (folder / FILE).chmod(0o444)
    with (
        as_another_user(),
        held(folder),
        pytest.raises(
            DeviceError, match=f"{NAME} is in use by process {os.getpid()}: close that one"
        ),
    ):
        take_board(NAME, folder)
    assert (folder / FILE).read_text() == "what another version wrote"


def test_a_lock_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / FILE).touch(mode=0o000)
    message = re.escape(
        f"the lock of {NAME} cannot be opened: {folder / FILE}: Permission denied: remove what "
        f"lies there"
    )
    with as_another_user(), pytest.raises(DeviceError, match=message):
        take_board(NAME, folder)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_a_locks_place_is_not_followed(folder: Path, exists: bool) -> None:
    """It could name any file of root's."""
    victim = folder / "victim"
    if exists:
        victim.write_text("precious")
    (folder / FILE).symlink_to(victim)
    with pytest.raises(
        DeviceError,
        match=r"cannot be opened: .*\.lock: Too many levels of symbolic links: remove what lies "
        r"there",
    ):
        take_board(NAME, folder)
    assert victim.read_text() == "precious" if exists else not victim.exists()


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, os.mkfifo, lambda path: os.link(path.parent / "other", path)],
    ids=["folder", "fifo", "link"],
)
def test_what_is_no_lock_is_not_locked(folder: Path, make: Callable[[Path], object]) -> None:
    (folder / "other").touch()
    make(folder / FILE)
    with pytest.raises(
        DeviceError,
        match=r"\.lock is no lock of ours, but a device, a folder or another name of some file: "
        r"remove it",
    ):
        take_board(NAME, folder)
    with open(folder / "other") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "x" * 101, "line\n", "a b"])
def test_a_name_is_a_file_name(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a lock's name must be up to 100 letters"):
        take_board(name, folder)
    assert not list(folder.iterdir())


def test_a_second_process_is_told_who_has_it_until_that_one_is_gone(folder: Path) -> None:
    take = f"b.take_board({NAME!r}, pathlib.Path({str(folder)!r}))"
    code = (
        f"import sys, pathlib, fpga.devices.lock as b; {take}; print('taken', flush=True); "
        f"sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(
            DeviceError, match=f"{NAME} is in use by process {other.pid}: close that one, or wait"
        ):
            take_board(NAME, folder)
        other.kill()
    with held(folder):
        pass


@pytest.fixture
def own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where locks go on a machine without /run/lock."""
    monkeypatch.setattr(fpga.devices.lock, "_SHARED_LOCKS", folder / "none")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder / f"dynasty-dpgemm-{os.geteuid()}"


def test_without_a_common_folder_locks_go_to_one_of_the_users_own(own: Path) -> None:
    assert lock_folder() == own
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    with held(lock_folder()):
        assert [path.name for path in own.iterdir()] == [FILE]


def test_a_common_folder_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fpga.devices.lock, "_SHARED_LOCKS", folder)
    assert lock_folder() == folder


@pytest.mark.parametrize(
    "make",
    [
        lambda path: (
            (path.parent / "private").mkdir(mode=0o700),
            path.symlink_to(path.parent / "private"),
        ),
        Path.touch,
        lambda path: (path.mkdir(), path.chmod(0o777)),
        lambda path: (path.mkdir(), path.chmod(0o720)),
    ],
    ids=["link", "file", "writable by all", "writable by a group"],
)
def test_a_folder_that_others_can_change_is_not_used(
    own: Path, make: Callable[[Path], object]
) -> None:
    make(own)
    with pytest.raises(
        DeviceError,
        match=r"dynasty-dpgemm-\d+, for locks, is no folder of this user's alone: remove it, or "
        r"set TMPDIR",
    ):
        lock_folder()


def test_another_users_folder_is_not_used(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    own.with_name(f"dynasty-dpgemm-{other}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(DeviceError, match="is no folder of this user's alone"):
        lock_folder()
