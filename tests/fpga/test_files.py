"""Files are whole or not there, and read only as they were written."""

import errno
import io
import os
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fpga import files
from fpga.archives import parse_array, parse_arrays
from fpga.files import (
    DamagedFile,
    cache_folder,
    check_seal,
    read_bounded,
    read_sealed,
    remove_leftovers,
    replace_folder,
    write_atomically,
)
from fpga.records import check_record, parse_json, read_json, seal_record


def zipped(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"new", "new", lambda file: file.write(b"new")], ids=["bytes", "text", "function"]
)
def test_a_file_gets_its_content_and_the_mode_that_the_user_gives_new_files(
    tmp_path: Path, content: files.Content
) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", content)
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_content_is_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")
    sync, replace = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        there = Path(f"/proc/self/fd/{handle}").resolve()
        seen.append("folder" if there.is_dir() else f"content of {there.stat().st_size} bytes")
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(
        os, "replace", lambda a, b: (seen.append(f"over {path.read_bytes()!r}"), replace(a, b))
    )
    write_atomically(path, b"newer", sealed=True)
    assert seen == ["content of 78 bytes", "over b'old'", "folder"]


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone_and_names_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage != "write":
        monkeypatch.setattr(os, stage, full)
    with pytest.raises(OSError, match=r"No space left.*/file'"):
        write_atomically(path, full if stage == "write" else b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_not_there_is_named_by_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere/file'"):
        write_atomically(tmp_path / "nowhere" / "file", b"")


def test_what_is_no_file_is_not_replaced_and_a_link_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"no regular file.*/pipe'"):
        write_atomically(tmp_path / "pipe", b"")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"x"


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path: Path) -> None:
    kept = [".run[1].ckpt.notes.tmp", ".run1.ckpt.0123456789abcdef.tmp", "run[1].ckpt"]
    for name in [*kept, ".run[1].ckpt.0123456789abcdef.tmp"]:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "run[1].ckpt")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_flipped_bit_and_every_cut_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"content", sealed=True)
    whole = path.read_bytes()
    assert read_sealed(path) == b"content"
    check_seal(path)
    for damaged in [whole[:cut] for cut in range(len(whole))] + [
        whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :]
        for bit in range(0, 8 * len(whole), 3)
    ]:
        path.write_bytes(damaged)
        for read in (read_sealed, check_seal):
            with pytest.raises(DamagedFile, match=r"/file (is damaged|has no digest)"):
                read(path)


def test_files_that_are_too_large_or_none_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedFile, match=r"/large is larger than the 1,000 bytes"):
        read_bounded(tmp_path / "large", 1000)
    with pytest.raises(DamagedFile, match="is no regular file"):
        read_bounded("/dev/zero", 1000)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a": ',
        b"\xff\xfe\xfa",
        b"",
        b"1" * 5000,
        b'["\\uD800"]',
        b'["\xed\xa0\x80"]',
    ],
    ids=["deep", "cut", "bytes", "empty", "long", "surrogate", "raw surrogate"],
)
def test_what_is_no_json_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "file.json").write_bytes(text)
    with pytest.raises(DamagedFile, match=r"file\.json is not JSON"):
        read_json(tmp_path / "file.json")


def test_json_of_other_encodings_and_pairs_of_surrogates_are_read() -> None:
    assert parse_json('["\\ud83d\\ude00"]', "text") == ["\U0001f600"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert parse_json('{"a": "é"}'.encode(encoding), "text") == {"a": "é"}


def test_a_record_is_known_by_its_digest_however_it_is_written() -> None:
    record = seal_record({"b": [1.5e-7, "é"], "a": None})
    check_record(
        parse_json(
            f'{{"a": null, "sha256": "{record["sha256"]}", "b": [0.00000015, "\\u00e9"]}}', "text"
        ),
        "text",
    )
    for changed in (record | {"b": 2}, record | {"c": 1}, {"a": None, "sha256": record["sha256"]}):
        with pytest.raises(DamagedFile, match="line 3 is damaged"):
            check_record(changed, "line 3")
    with pytest.raises(DamagedFile, match="line 3 has no sha256"):
        check_record({"a": None}, "line 3")


def test_arrays_come_back_as_they_were() -> None:
    arrays = {
        "a": np.arange(6, dtype="<i2").reshape(2, 3),
        "b": np.asfortranarray(np.ones((3, 2))),
        "c": np.float32(3),
        "d": np.empty((0, 4)),
    }
    loaded = parse_arrays(zipped(**arrays), "file")
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)
        assert loaded[name].flags.writeable


def test_sizes_are_not_believed_before_they_are_compared() -> None:
    def header(shape: str, descr: str = "<f8") -> bytes:
        text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()

    for data in (
        header("(1099511627776,)"),
        header("(-1,)") + bytes(8),
        header("(2,)") + bytes(17),
        header("(1 << 70,)"),
        header("(1,)", "O") + bytes(8),
    ):
        with pytest.raises(DamagedFile, match="file"):
            parse_array(data, "file")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", header("(2000000,)") + bytes(16_000_000))
    with pytest.raises(DamagedFile, match="unpacks to 16,000,128 bytes, more than the 1,000,000"):
        parse_arrays(bomb.getvalue(), "file", 1_000_000)


def test_damaged_archives_end_in_no_error_of_zipfile() -> None:
    whole = zipped(a=np.arange(50), b=np.zeros(9, np.int8))
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for at in generator.integers(0, len(data), generator.integers(1, 4)):
            data[at] = generator.integers(0, 256)
        with suppress(DamagedFile):  # and nothing else
            parse_arrays(bytes(data), "the archive", 1 << 20)


def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("DYNASTY_CACHE", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/dynasty-lightning")
    for named, expected in (
        (".", tmp_path),
        ("~/c", Path("/home/somebody/c")),
        ("c", tmp_path / "c"),
    ):
        monkeypatch.setenv("DYNASTY_CACHE", named)
        assert cache_folder() == expected
    monkeypatch.delenv("DYNASTY_CACHE")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_folder().name == f"dynasty-lightning-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_folder() == Path("/var/cache/me/dynasty-lightning")


@pytest.mark.parametrize("before", ["folder", "file", "nothing"])
@pytest.mark.parametrize("fails", ["fill", "move aside", "put in place", "nothing"])
def test_a_folder_is_replaced_whole_or_stays(
    before: str, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "build"
    if before == "folder":
        out.mkdir()
        (out / "old.txt").write_text("old")
    elif before == "file":
        out.write_text("old")

    def fill(folder: Path) -> None:
        (folder / "new.txt").write_text("new")
        if fails == "fill":
            raise KeyboardInterrupt

    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        aside = "-old-" in str(target)
        if (fails == "move aside" and aside) or (fails == "put in place" and target == out):
            monkeypatch.setattr(os, "replace", replace)
            raise OSError("no more space")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    succeeds = fails == "nothing" or (fails == "move aside" and before == "nothing")
    if succeeds:
        replace_folder(out, fill)
        assert [path.name for path in out.iterdir()] == ["new.txt"]
    else:
        with pytest.raises((OSError, KeyboardInterrupt)):
            replace_folder(out, fill)
        if before == "folder":
            assert [path.name for path in out.iterdir()] == ["old.txt"]
        elif before == "file":
            assert out.read_text() == "old"
        else:
            assert not out.exists()
    assert [path for path in tmp_path.iterdir() if path != out] == []
