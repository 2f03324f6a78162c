# SPDX-License-Identifier: Apache-2.0
"""Training on several ranks, with gloo on 127.0.0.1: whatever differs between ranks, their maps and
histories do not.
"""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from .distributed_runs import run

pytestmark = [pytest.mark.gloo, pytest.mark.slow]


@functools.cache
def results_of(name, ranks):
    return run(name, ranks)


def alike(name, ranks=2, folder=None):
    """What all ranks returned; a test fails where one did not, or where one has another map,
    history or weights than the rest.
    """
    results = run(name, ranks, folder) if folder else results_of(name, ranks)
    assert [r.get("error") for r in results] == [None] * ranks
    first, *others = (r["value"] for r in results)
    for other in others:
        assert json.dumps(other) == json.dumps(first)  # a loss that is NaN is the same, too
    assert first["entries"] > 0
    assert first["steps"] == 14
    return first


@pytest.mark.parametrize(
    "name",
    [
        "ragged",
        "smaller_last_batch",
        "token_lengths",
        "image_sizes",
        "unused_layer_on_one_rank",
        "alternating_layers",
        "static_graph",
        "bucket_view",
        "broadcast_buffers",
        "own_buffers",
        "accumulation",
        "scheduled_accumulation",
        "manual_without_sync",
        "frozen_layer",
        "tied_weights",
        "gradient_checkpointing",
        "nonfinite_on_one_rank",
        "loss_guard_on_one_rank",
        "empty_batches_on_one_rank",
        "rest_in_bfloat16",
        "gradients_in_float16",
        "gradients_of_low_rank",
        "sharded_bfloat16",
        "sharded_accumulation",
        "loaders_of_two_lengths",
        "streams_of_two_lengths",
        "time_limit",
        "early_stopping_between_validations",
    ],
)
def test_ranks_that_differ_get_the_same_map(name):
    alike(name)


def test_four_ranks_of_ragged_batches_get_the_same_map():
    alike("ragged", 4)


@pytest.mark.parametrize("name", ["checkpoints_at_every_step", "validation_within_epochs"])
def test_what_happens_between_steps_changes_no_map_and_no_history(name):
    """A checkpoint holds the loss of all ranks, and that does not count twice."""
    undisturbed, disturbed = alike("even"), alike(name)
    assert disturbed["hash"] == undisturbed["hash"]
    for a, b in zip(undisturbed["history"], disturbed["history"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-12)
        assert b["bits"] == a["bits"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sync_batchnorm", "SyncBatchNorm layers only work with GPU modules"),
        ("gradients_in_bfloat16", "BF16 all reduce communication hook"),
    ],
)
def test_what_torch_refuses_on_a_cpu_ends_before_the_first_step_in_its_words(name, words):
    assert all(words in r["error"] for r in run(name, 2))


@pytest.mark.parametrize(("first", "then"), [(2, 2), (2, 1), (1, 2), (2, 4)])
def test_a_run_resumes_on_another_number_of_ranks(first, then, tmp_path):
    whole, rest = alike("saved", first, tmp_path), alike("resumed", then, tmp_path)
    assert [h["step"] for h in rest["history"]] == [h["step"] for h in whole["history"]]
    assert rest["speedup"] == pytest.approx(whole["speedup"], rel=0.02)
    if first == then:
        assert rest == whole


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_in_micro_batches_gets_the_bits_of_the_whole(ranks):
    whole, parts = alike("even", 1)["history"], alike("accumulation", ranks)["history"]
    for a, b in zip(whole, parts, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=5e-3)
        assert b["mean_bits"] == pytest.approx(a["mean_bits"], abs=0.1)


def test_a_callback_without_its_plugin_ends_all_ranks():
    assert all("DynastyPrecision" in r["error"] for r in run("callback_without_plugin", 2))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("other_options_on_one_rank", "DynastyCallback's options"),
        ("other_plugin_on_one_rank", "DynastyPrecision's options"),
        ("other_layers_on_one_rank", "the layers that DynastyPrecision converts"),
        ("other_weights_on_one_rank", "the weight of body"),
        ("other_past_on_one_rank", "what DynastyCallback knows of the run so far"),
        ("other_map_on_one_rank", "map of step"),
    ],
)
def test_ranks_that_disagree_are_named(name, what):
    for result in run(name, 2):
        assert what in result["error"]
        assert "rank 1 of 2 differ" in result["error"]


def test_the_same_images_get_the_same_bits_on_one_two_and_four_ranks():
    one, two, four = (alike("even", ranks)["history"] for ranks in (1, 2, 4))
    for other in (two, four):
        for a, b in zip(one, other, strict=True):
            assert a["step"] == b["step"]
            assert b["loss"] == pytest.approx(a["loss"], abs=5e-3)
            assert b["mean_bits"] == pytest.approx(a["mean_bits"], abs=0.1)


def _differing(maps, others, *, shift):
    """Of each map, the names whose thresholds differ, E's by more than what its scale explains."""
    found = []
    for a, b in zip(maps, others, strict=True):
        assert a.keys() == b.keys()
        found.append(
            [
                n
                for n in a
                if not torch.equal(
                    torch.tensor(a[n]) + (shift if n.endswith("E") else 0), torch.tensor(b[n])
                )
            ]
        )
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_exact_mode_gives_the_same_maps_on_every_number_of_ranks(ranks):
    """A rank's loss is the mean over its own images, so its E is `ranks` times as large, and so are
    the thresholds for E. E's rounding (each rank has random numbers of its own) leads to other
    weights, and turns a threshold of the first map here and there: without it, all maps are the
    same."""
    shift = math.log2(ranks)
    one, more = (alike("exact_unrounded_errors", n)["maps"] for n in (1, ranks))
    assert len(one) == 6
    assert _differing(one, more, shift=shift) == [[]] * 6
    one, more = (alike("exact", n)["maps"][0] for n in (1, ranks))
    for name in one:
        by = shift if name.endswith("E") else 0
        moved = (torch.tensor(more[name]) - torch.tensor(one[name]) - by).abs()
        assert moved.max() <= 1, name
        assert moved.double().mean() < 0.05, name


def test_a_rank_out_of_batches_joins_in_a_loop_without_a_trainer():
    long, short = (r["value"] for r in run("join_without_a_trainer", 2))
    assert (long["steps"], short["steps"]) == (7, 5)
    assert short["weights"] == long["weights"]


@pytest.mark.parametrize("name", ["epochs_of_two_lengths", "stop_on_one_rank"])
def test_a_rank_that_ends_early_is_complete_and_the_other_one_is_told(name):
    """As without the callback: DDP waits for gradients until the connection closes, or the group's
    timeout ends.
    """
    other, ended = run(name, 2)
    assert ended["value"]["entries"] > 0
    assert "by peer" in other["error"]
    assert f"on rank 0 of 2 after step {ended['value']['steps']}" in other["error"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("failure_on_one_rank", "on rank 0 of 2 after step 6"),
        (
            "failure_before_an_analysis",
            "rank 0 of 2 came to the analysis of step 6, and not all other ranks did",
        ),
        (
            "policy_fails_on_one_rank",
            "rank 0 of 2 came to the precision map of step 4, and not all other ranks did",
        ),
    ],
)
def test_a_rank_that_fails_ends_the_others_in_an_error_that_says_where(name, told):
    other, failed = run(name, 2)
    assert "the reason" in failed["error"]
    assert told in other["error"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "layer_added_on_one_rank",
            "came to the analysis of step 6 with (63|84) values, and rank {} to something else",
        ),
        (
            "other_values_on_one_rank",
            "came to (an analysis|a checkpoint) with [0-9]+ values, and rank {} to something else",
        ),
    ],
)
def test_ranks_that_exchange_other_things_are_told_before_the_backend_ends_them(name, told):
    for rank, result in enumerate(run(name, 2)):
        assert re.search(told.format(1 - rank), result["error"])


def test_a_wait_ends_in_time_and_says_for_which_layer():
    for rank, result in enumerate(run("slow_rank", 2)):
        assert (
            f"rank {rank} of 2 came to the gradient of body at step 2, and not all other ranks did"
            in result["error"]
        )


def test_join_is_refused_by_name_before_the_first_step():
    assert all(
        "join() is not supported" in r["error"] and "after step 0" in r["error"]
        for r in run("join", 2)
    )


def test_weights_that_are_sharded_get_the_maps_and_history_of_whole_ones():
    """FSDP2, of Linear and Conv."""
    assert alike("sharded") == alike("even")


def test_sharded_weights_with_sharded_moments_get_the_maps_of_whole_ones():
    """Adam's, clipped: the norm of all gradients is added up in another order."""
    shards, copies = alike("sharded_clipped"), alike("clipped")
    assert shards["hash"] == copies["hash"]
    assert shards["weights"] == pytest.approx(copies["weights"], rel=1e-6)


def test_a_sharded_run_resumes_exactly_and_on_another_number_of_ranks(tmp_path):
    whole, same, more = (
        alike(*args, tmp_path)
        for args in (("sharded_saved", 2), ("sharded_resumed", 2), ("sharded_resumed", 4))
    )
    assert same == whole
    assert more["speedup"] == pytest.approx(whole["speedup"], rel=0.02)


def test_layers_that_are_split_among_ranks_are_refused_by_name():
    assert all(
        "does not support tensor parallelism" in r["error"] for r in run("tensor_parallel", 2)
    )


def test_the_packages_loaders_share_an_epoch_out_and_evaluate_everything_on_each_rank():
    first, second = (r["value"] for r in run("own_loaders", 2))
    assert [len(batch) for batch in first["epochs"][0]] == [3, 3, 1]
    for a, b in zip(first["epochs"], second["epochs"], strict=True):
        assert [len(batch) for batch in a] == [len(batch) for batch in b]
        shown = sorted(number for batch in a + b for number in batch)
        assert len(shown) == 14  # 13, and one of them twice, for as many on both ranks
        assert set(shown) == set(range(13))
    assert first["epochs"][0] != first["epochs"][1]
    assert first["batches"] == second["batches"] == 3
    assert (
        first["evaluation"]
        == second["evaluation"]
        == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12]]
    )
    together = sorted(first["windows"] + second["windows"])
    assert len(first["windows"]) == len(second["windows"]) == 12
    assert together == list(range(together[0], together[0] + 4 * 24, 4))
    assert first["augmented"] != second["augmented"]


def test_every_test_that_the_docs_name_is_there():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "distributed.md").read_text()
    code = "".join(
        Path(__file__).with_name(f"{name}.py").read_text()
        for name in ("test_distributed", "test_launchers", "test_lightning")
    )
    named = re.findall(r"`(test_\w+)(?:`|\[)", page)
    settings = [name for name in re.findall(r"\[(\w+)\]`", page) if not name.isdigit()]
    assert len(named) > 20
    assert len(settings) > 20
    assert [
        name
        for name in named
        if name not in ("test_launchers", "test_lightning") and f"def {name}(" not in code
    ] == []
    assert [name for name in settings if f'"{name}"' not in code] == []
