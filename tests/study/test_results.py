"""The file of results: torn lines, full disks, other processes, files replaced under an open one.
No record lost, none doubled.
"""

import errno
import json
import os
import subprocess
import sys

import pytest

from dynasty_lightning.study.results import FileInUse, ResultsFile, read_records


def record(key, status="complete", **more):
    return {
        "key": key,
        "config": {"method": "uniform8"},
        "status": status,
        "started": f"at {key}",
        **more,
    }


def line(key, **more):
    return json.dumps(record(key, **more)) + "\n"


def keys(path):
    return [json.loads(text)["key"] for text in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "results.jsonl"


@pytest.fixture
def disk(monkeypatch):
    """os.write that writes `room` bytes and then finds the disk full; None is plenty."""

    class Disk:
        room: int | None = None
        truncates = True

    real_write, real_truncate = os.write, os.ftruncate

    def write(file, data):
        if Disk.room is None or file <= 2:
            return real_write(file, data)
        if not Disk.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: Disk.room]
        Disk.room -= len(part)
        return real_write(file, part)

    def truncate(file, size):
        if not Disk.truncates:
            raise OSError(errno.EIO, "Input/output error")
        real_truncate(file, size)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "ftruncate", truncate)
    return Disk


def test_records_are_appended_and_read(path):
    with ResultsFile(path) as file:
        assert file.add(record("a", accuracy=0.5))
        assert file.add(record("b", "failed"))
    with ResultsFile(path) as file:
        assert file.records["a"]["accuracy"] == 0.5
        assert file.add(record("b", accuracy=0.7))
    assert keys(path) == ["a", "b", "b"]  # nothing is rewritten
    assert [(r["key"], r["status"]) for r in read_records(path)] == [
        ("a", "complete"),
        ("b", "complete"),
    ]


def test_each_record_is_on_the_disk_when_add_returns(path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(os.fstat(file).st_size) or real(file)
    )
    with ResultsFile(path) as file:
        file.add(record("a"))
        assert synced == [path.stat().st_size]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_last_line_is_put_aside(path, cut):
    path.parent.mkdir()
    torn = line("b")[:cut]
    path.write_text(line("a") + torn)
    with pytest.warns(
        UserWarning,
        match=r"the last line of .* was not written to its end; it is in .*results.jsonl.torn",
    ):
        file = ResultsFile(path)
    with file:
        assert set(file.records) == {"a"}
        file.add(record("c"))
    assert keys(path) == ["a", "c"]
    assert path.with_name("results.jsonl.torn").read_text() == torn + "\n"


def test_a_last_line_that_lacks_only_its_end_stays(path):
    path.parent.mkdir()
    path.write_text(line("a") + line("b").rstrip("\n"))
    with ResultsFile(path) as file:
        assert set(file.records) == {"a", "b"}
        file.add(record("c"))
    assert keys(path) == ["a", "b", "c"]
    assert not path.with_name("results.jsonl.torn").exists()


def test_damage_in_the_middle_is_told_and_costs_no_other_line(path):
    path.parent.mkdir()
    path.write_bytes(
        line("a").encode() + b'{"key": "b", \xff\n<<<<<<< HEAD\n[1]\n\n' + line("c").encode()
    )
    with pytest.warns(UserWarning, match="is no record and is left out") as told:
        records = read_records(path)
    assert [r["key"] for r in records] == ["a", "c"]
    assert [str(w.message).split(" is no record")[0].rpartition(" ")[2] for w in told] == [
        "2",
        "3",
        "4",
    ]


def test_a_line_of_another_number_is_left_out_and_one_without_a_digest_is_not(path):
    with ResultsFile(path) as file:
        file.add(record("a", accuracy=0.5))
        file.add(record("b"))
    path.write_text(path.read_text().replace("0.5", "0.6") + line("old"))
    with pytest.warns(
        UserWarning, match=r"line 1 is damaged .* and is left out, so that its run is to do again"
    ):
        assert read_records(path) == [record("b"), record("old")]
    path.write_text(path.read_text().replace("sha256", "sha257"))
    with pytest.warns(UserWarning, match="line [12] is damaged"):
        assert read_records(path) == [record("old")]


def test_one_process_at_a_time(path):
    with ResultsFile(path):
        with pytest.raises(FileInUse, match="another process appends to it"):
            ResultsFile(path)
        # Another process, not just another descriptor of this one.
        code = (
            f"from pathlib import Path; from dynasty_lightning.study.results import "
            f"ResultsFile; ResultsFile(Path({str(path)!r}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "FileInUse" in done.stderr
    ResultsFile(path).close()


@pytest.mark.parametrize("room", [0, 25])
def test_a_full_disk_for_a_while(path, disk, room):
    with ResultsFile(path) as file:
        file.add(record("a"))
        disk.room = room
        assert not file.add(record("b"))
        assert "space" in str(file.error) or "only 25 of" in str(file.error)
        assert keys(path) == ["a"]  # no part of b
        assert not file.add(record("c"))
        assert [r["key"] for r in file.unsaved] == ["b", "c"]
        disk.room = None
        assert file.add(record("d"))
        assert file.unsaved == []
    assert keys(path) == ["a", "b", "c", "d"]


def test_a_full_disk_that_stays_full(path, disk, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    with ResultsFile(path) as file:
        file.add(record("a"))
        disk.room = 0
        file.add(record("b"))
        assert not file.settle((1.0, 2.0))
        assert slept == [1.0, 2.0]
        assert [r["key"] for r in file.unsaved] == ["b"]
    assert keys(path) == ["a"]


def test_a_full_disk_that_empties_while_waiting(path, disk, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(disk, "room", None))
    with ResultsFile(path) as file:
        disk.room = 3
        file.add(record("a"))
        assert file.settle()
    assert keys(path) == ["a"]


def test_a_line_that_can_neither_be_written_nor_taken_back(path, disk):
    with ResultsFile(path) as file:
        file.add(record("a"))
        disk.room, disk.truncates = 25, False
        assert not file.add(record("b"))
        assert path.read_text().endswith('{"key": "b", "config": {"')
        disk.room, disk.truncates = None, True
        with pytest.warns(UserWarning, match="not written to its end"):
            assert file.add(record("c"))
    assert keys(path) == ["a", "b", "c"]


def test_a_sync_that_fails_leaves_no_doubt(path, monkeypatch):
    with ResultsFile(path) as file:
        real = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        )
        assert not file.add(record("a"))
        assert path.read_text() == ""
        monkeypatch.setattr(os, "fsync", real)
        assert file.settle(())
    assert keys(path) == ["a"]


@pytest.mark.parametrize("replacement", [None, "", line("x"), line("x") + line("a")])
def test_a_file_that_is_replaced_while_it_is_open(path, replacement):
    """As by a checkout: what this process has written goes to the new file, once."""
    with ResultsFile(path) as file:
        file.add(record("a"))
        path.unlink()
        if replacement is not None:
            path.write_text(replacement)
        assert file.add(record("b"))
        with pytest.raises(FileInUse):
            ResultsFile(path)
    written = keys(path)
    assert sorted(k for k in written if k != "x") == ["a", "b"]
    assert written.count("x") == (replacement or "").count('"x"')


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        ResultsFile(tmp_path / "file" / "results.jsonl")
