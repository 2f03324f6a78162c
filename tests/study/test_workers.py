"""Jobs in worker processes and here."""

import os

import torch

from dynasty_lightning.study.workers import run_here, run_in_workers


def variables(job, send):
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    if job == "leave":
        os._exit(3)
    return [os.environ.get(name) for name in names], torch.get_num_threads()


def test_workers_keep_memory_and_say_how_they_ended(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    taken = []
    run_in_workers(variables, ["leave", "look"], lambda *message: taken.append(message), count=1)
    assert taken[0] == ("died", "leave", "the worker process ended by itself with exit code 3")
    assert taken[1][:2] == ("done", "look")
    assert taken[1][2][0] == ["33554432", "8589934592", "1"]  # what is set stays
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ


def double(job, send):
    send(job)
    return 2 * job


def test_jobs_done_here_are_taken_as_those_of_workers():
    here, there = [], []
    run_here(double, [1, 2], lambda *message: here.append(message))
    run_in_workers(double, [1, 2], lambda *message: there.append(message), count=1)
    assert here == there == [("progress", 1, 1), ("done", 1, 2), ("progress", 2, 2), ("done", 2, 4)]
