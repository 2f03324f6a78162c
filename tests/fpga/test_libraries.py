"""A library is loaded only if it is whole and nobody else could have written it; a compiler may do
what it likes.
"""

import ctypes
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from fpga import CompileError, ToolMissing, libraries
from fpga.libraries import (
    CacheError,
    cached_library,
    find_compiler,
    library_folder,
    load_cached,
    run,
    version_of,
)

OTHER_USER = 12345


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "seven.c").write_text("int number() { return 7; }\n")
    subprocess.run(
        [*find_compiler(), "-x", "c", "seven.c", "-shared", "-fPIC", "-o", "seven.so"],
        cwd=folder,
        check=True,
    )
    return folder / "seven.so"


class Cache:
    """A folder of libraries whose compiler copies, and counts."""

    def __init__(self, folder: Path, compiled: Path) -> None:
        self.folder, self.compiled, self.count = folder, compiled, 0

    def compile_in(self, folder: Path) -> Path:
        self.count += 1
        return Path(libraries.shutil.copy(self.compiled, folder))

    def get(self, *, rebuild: bool = False) -> Path:
        return cached_library("seven.so", self.compile_in, folder=self.folder, rebuild=rebuild)


@pytest.fixture
def cache(tmp_path: Path, compiled: Path) -> Cache:
    return Cache(tmp_path / "cache", compiled)


def belongs_to_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(path, OTHER_USER, -1, follow_symlinks=False)
    else:  # nobody but root gives files away: be somebody else instead
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return str(path)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] not in "ZX"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o000])
def test_a_library_is_compiled_once_and_readable_by_all(cache: Cache, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = cache.get()
    finally:
        os.umask(before)
    assert ctypes.CDLL(str(path)).number() == 7
    assert (cache.get(), cache.count) == (path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o755
    assert os.listdir(cache.folder) == ["seven.so"]


def test_a_library_that_was_cut_off_or_changed_is_never_loaded(cache: Cache) -> None:
    path = cache.get()
    whole = path.read_bytes()
    assert whole[:-73] == cache.compiled.read_bytes()
    flipped = [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        for at in range(0, len(whole), len(whole) // 50)
    ]
    for number, damaged in enumerate(
        [b"", *(whole[:at] for at in range(1000, len(whole), len(whole) // 9)), *flipped], start=2
    ):
        path.write_bytes(damaged)
        assert cache.get().read_bytes() == whole
        assert cache.count == number


@pytest.mark.parametrize(
    "planted", ["another's file", "a link", "a file that all may write", "a folder"]
)
def test_a_library_that_others_could_have_planted_is_replaced(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    path = cache.get()
    if planted == "another's file":
        path.chmod(0o644)
        if os.getuid() == 0:
            belongs_to_another(path, monkeypatch)
        else:
            monkeypatch.setattr(
                libraries, "_owned", lambda status: not stat.S_ISREG(status.st_mode)
            )
    elif planted == "a file that all may write":
        path.chmod(0o666)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere") if planted == "a link" else path.mkdir()
    if planted == "a folder":
        with pytest.raises(CacheError, match="no regular file"):
            cache.get()
        return
    before = (tmp_path / "elsewhere").read_bytes() if planted == "a link" else None
    assert cache.get() == path
    assert cache.count == 2
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    if before is not None:
        assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_folder_that_others_can_change_holds_no_library(cache: Cache, tmp_path: Path) -> None:
    cache.get()
    for folder, mode in ((cache.folder, 0o777), (cache.folder, 0o775), (tmp_path, 0o777)):
        before = stat.S_IMODE(folder.stat().st_mode)
        folder.chmod(mode)
        with pytest.raises(
            CacheError, match=r"other users can change what is in .*/cache.*: set DYNASTY_CACHE"
        ):
            cache.get()
        folder.chmod(mode | stat.S_ISVTX)  # as /tmp
        assert cache.get()
        folder.chmod(before)
    assert cache.count == 1


def test_a_folder_that_is_not_safe_is_told_with_what_would_make_it_so(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache.folder
    cache.get()
    folder.chmod(0o777)
    with pytest.raises(CacheError, match=rf"of your own, or chmod go-w {folder}$"):
        cache.get()
    folder.chmod(0o755)
    tmp_path.chmod(0o777)
    with pytest.raises(
        CacheError,
        match=rf", or put another in its place: set DYNASTY_CACHE .*, or chmod o-w {tmp_path}$",
    ):
        cache.get()
    tmp_path.chmod(0o755)
    belongs_to_another(folder, monkeypatch)
    with pytest.raises(
        CacheError,
        match=rf"in {folder}, which belongs to user \d+: set DYNASTY_CACHE to a folder of your "
        rf"own$",
    ):
        cache.get()


def test_users_of_one_cache_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNASTY_CACHE", str(tmp_path))
    tmp_path.chmod(0o1777)
    assert library_folder("kernels") == tmp_path / "kernels"
    (tmp_path / "kernels").mkdir(mode=0o755)
    assert library_folder("kernels") == tmp_path / "kernels"
    belongs_to_another(tmp_path / "kernels", monkeypatch)
    assert library_folder("kernels") == tmp_path / f"kernels-{os.getuid()}"


def test_a_library_that_the_system_does_not_take_is_compiled_anew_once(cache: Cache) -> None:
    cache.compiled = cache.folder.parent / "text"
    cache.compiled.write_text("no library")
    tried = []

    def build(rebuild: bool) -> Path:
        tried.append(rebuild)
        return cache.get(rebuild=rebuild)

    with pytest.raises(OSError, match="invalid ELF header"):
        load_cached(build, lambda path: ctypes.CDLL(str(path)))
    assert (tried, cache.count) == ([False, True], 2)


def test_a_full_disk_or_a_read_only_folder_is_told_with_the_way_out(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(libraries, "write_atomically", full)
    with pytest.raises(
        CacheError,
        match=r"No space left on device.*: set DYNASTY_CACHE to a folder that can be written",
    ):
        cache.get()
    cache.folder = Path("/proc/nowhere")
    with pytest.raises(CacheError, match="cannot write to /proc/nowhere"):
        cache.get()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("env g++", ["env", "g++"]),
        ("'with space/g++' -m64", ["g++", "-m64"]),
        ("with space/g++", ["g++"]),
        ("", ["g++"]),
    ],
)
def test_a_compiler_is_a_path_or_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, words: list[str]
) -> None:
    (tmp_path / "with space").mkdir()
    script(tmp_path / "with space" / "g++", "exec g++ $@")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", named)
    found = find_compiler()
    assert [Path(found[0]).name, *found[1:]] == words
    assert ("with space" in found[0]) == ("with space" in named)


@pytest.mark.parametrize(
    "named", ["no-such-compiler", "'open quote", "ccache-that-is-not-there g++"]
)
def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("CXX", named)
    with pytest.raises(ToolMissing, match=r"no C\+\+ compiler .*install g\+\+"):
        find_compiler()


def test_what_cannot_be_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("")
    for named, told in (
        (tmp_path, "which is a folder; name one in CXX"),
        (tmp_path / "text", "which may not be run; chmod"),
    ):
        monkeypatch.setenv("CXX", str(named))
        with pytest.raises(ToolMissing, match=rf"no C\+\+ compiler: CXX names '{named}', {told}"):
            find_compiler()


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("true", "it ended as if all were well, but wrote no seven.so"),
        (
            "echo here it is > note; touch seven.so",
            "it ended as if all were well, but wrote no seven.so",
        ),
        ("mkdir seven.so", "it ended as if all were well, but wrote no seven.so"),
        ("echo no licence; exit 3", "no licence\nit ended with exit status 3"),
        ("kill -KILL $$", "it was ended by SIGKILL, as by a system that runs out of memory"),
        ("kill -SEGV $$", "it was ended by SIGSEGV"),
        ("kill -40 $$", "it was ended by signal 40"),
    ],
)
def test_how_a_compiler_failed_is_told(tmp_path: Path, does: str, told: str) -> None:
    """Also one that says nothing itself, and one that ends well and has compiled nothing: the cache
    is not to blame for that.
    """
    (tmp_path / "work").mkdir()
    compiler = script(tmp_path / "compiler", does)

    def compile_in(_: Path) -> Path:
        run([compiler], folder=tmp_path / "work", seconds=60, output=Path("seven.so"))
        return tmp_path / "work" / "seven.so"

    with pytest.raises(CompileError, match=rf"(?s)compiler\nin .*failed:\n{told}$"):
        cached_library("seven.so", compile_in, folder=tmp_path / "cache")


def test_no_room_for_temporary_files_is_not_the_caches_fault(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries.tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(
        CacheError, match=r"cannot compile in a temporary folder \(.*nowhere.*set TMPDIR"
    ):
        cache.get()
    with pytest.raises(CompileError, match=r"no place for what it prints \(.*nowhere.*set TMPDIR"):
        run(["true"], seconds=60)


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = [
        script(
            tmp_path / "hangs", f"sleep 1000 & echo $! > {pid}.new; mv {pid}.new {pid}; cat\nwait\n"
        )
    ]
    with pytest.raises(CompileError, match=r"(?s)hangs.*not done after 2 s"):
        run(command, seconds=2)
    for _ in range(
        600
        # a process that was killed takes its time to go; a busy machine may not have come so far as
        # to start it
    ):
        if not (pid.exists() and alive(int(pid.read_text()))):
            return
        time.sleep(0.1)
    pytest.fail("what the compiler started goes on")


def test_a_compiler_may_print_any_bytes_and_none(tmp_path: Path) -> None:
    odd = script(tmp_path / "odd", r"printf '\xff\xfe Ver\xe9sion 9\n'")
    assert version_of((odd,)) == "\ufffd\ufffd Ver\ufffdsion 9"
    silent = script(tmp_path / "silent", "")
    assert version_of((silent,)) == silent
    with pytest.raises(CompileError, match="\ufffd"):
        run([script(tmp_path / "fails", r"printf '\xff'; exit 1")], seconds=60)
    with pytest.raises(CompileError, match="cannot be started"):
        version_of((str(tmp_path),))
