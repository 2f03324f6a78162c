"""The report of a file of results: the arithmetic of its differences, its words, and that it shows
what is there and nothing else.
"""

import json
import math

import pytest
from matplotlib import pyplot

from dynasty_lightning.cli import main
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.record import record_of
from dynasty_lightning.study.report.markdown import compose_report, write_report
from dynasty_lightning.study.report.pareto import draw_pareto
from dynasty_lightning.study.report.pictures import course_pairs, draw_course, draw_differences
from dynasty_lightning.study.report.settings import courses, settings_of, titles
from dynasty_lightning.study.report.statistics import Difference

TASK = {"train_samples": 50000, "test_samples": 10000, "validation_samples": 0}


def run(method, seed, accuracy=None, status="complete", *, settings=None, **figures):
    config = RunConfig(
        **{
            "data": "cifar100",
            "model": "resnet8",
            "epochs": 10,
            "batch_size": 128,
            "method": method,
            "seed": seed,
            **(settings or {}),
        }
    )
    record = record_of(config) | {
        "status": status,
        "seconds": 100.0,
        "wall_seconds": 110.0,
        "warnings": [],
        "task": TASK,
    }
    record |= {"config": json.loads(json.dumps(record["config"])), "commit": "c" * 40}
    if accuracy is not None:
        record |= {"accuracy": accuracy, "loss": 1.5}
    if method not in ("float32", "bf16") and status == "complete":
        record |= {
            "speedup_charged": 1.0,
            "speedup_ideal": 1.0,
            "energy_ratio_compute": 1.0,
            "energy_ratio_sram": 1.0,
            "energy_ratio_total": 1.0,
            "bits": {"X": 8.0, "W": 8.0, "E": 8.0},
            "speedup_core": 1.0,
        }
    return record | figures


def study():
    records = []
    for seed, (base, drop) in enumerate([(0.60, 0.002), (0.61, 0.006), (0.62, 0.004)]):
        records.append(run("float32", seed, base + 0.01))
        records.append(run("uniform8", seed, base))
        records.append(
            run("dynasty@5.1", seed, base - drop, speedup_charged=5.1 + seed / 10, speedup_core=3.3)
        )
        records.append(run("dynasty@3", seed, base, speedup_charged=3.0))
    return records


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def rows(report, header):
    """Cells of the table whose header begins so, by method."""
    lines = report.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(header)) + 2
    table = {}
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        label, *cells = (c.strip() for c in line.strip("|").split(" | "))
        table[label.strip()] = cells
    return table


def texts(figure):
    figure.canvas.draw()
    found = "\n".join(t.get_text() for t in figure.findobj(pyplot.Text))
    pyplot.close(figure)
    return found


# -- Arithmetic


def test_an_interval_worked_out_by_hand():
    """Differences 1, 2, 3, 4, 5: mean 3, sd sqrt(2.5), t(0.975; 4) = 2.7764, half = 2.7764 *
    sqrt(2.5 / 5) = 1.9632.
    """
    difference = Difference.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert difference.spread.mean == 3.0
    assert difference.spread.sd == pytest.approx(math.sqrt(2.5))
    assert (difference.low, difference.high) == (
        pytest.approx(1.0368, abs=1e-4),
        pytest.approx(4.9632, abs=1e-4),
    )
    # Two pairs, -1 and -2: t(0.975; 1) = 12.7062, half = 12.7062 * sqrt(0.5 / 2) = 6.3531.
    two = Difference.of([-1.0, -2.0])
    assert (two.low, two.high) == (
        pytest.approx(-7.8531, abs=1e-4),
        pytest.approx(4.8531, abs=1e-4),
    )


@pytest.mark.parametrize(
    ("differences", "text", "reading"),
    [
        ([], "-", "no interval from fewer than two pairs"),
        ([-0.3], "-0.30 (one pair)", "no interval from fewer than two pairs"),
        (
            [-0.2, -0.6],
            "-0.40 [-2.94, +2.14]",
            "nothing yet: two pairs cannot tell a drop from none",
        ),
        ([-2.4, -2.6], "-2.50 [-3.77, -1.23]", "a drop of 1.23 to 3.77 points"),
        ([-0.2, -0.6, -0.4], "-0.40 [-0.90, +0.10]", "no drop larger than 0.90 points"),
        ([-2.2, -2.6, -2.4], "-2.40 [-2.90, -1.90]", "a drop of 1.90 to 2.90 points"),
        ([2.2, 2.6, 2.4], "+2.40 [+1.90, +2.90]", "a gain of 1.90 to 2.90 points"),
    ],
)
def test_what_an_interval_says(differences, text, reading):
    difference = Difference.of(differences)
    assert difference.text() == text
    assert difference.reading() == reading


# -- Settings and rows


def test_pairs_are_by_seed_and_of_completed_runs_only():
    records = [
        run("uniform8", 0, 0.50),
        run("uniform8", 1, 0.60),
        run("uniform8", 2, status="failed", error="OSError: gone"),
        run("dynasty@5", 2, 0.90),
        run("dynasty@5", 1, 0.58),
        run("dynasty@5", 0, 0.49),
        run("dynasty@5", 3, 0.01, "diverged"),
    ]
    (setting,) = settings_of(records)
    uniform, dynamic = setting.rows
    assert setting.difference(uniform) is None
    difference = setting.difference(dynamic)
    assert difference.spread.n == 2
    assert difference.spread.mean == pytest.approx(-1.5)


def test_baselines_are_those_with_the_same_target_and_blocks():
    records = [run("dynasty@5.1", s, a) for s, a in enumerate((0.50, 0.52, 0.55))] + [
        run("per_layer@5.1", s, 0.50) for s in (0, 1)
    ]
    records += [
        run("dynasty@5.1:smoothing=0", 0, 0.51),
        run("dynasty@5", 0, 0.6),
        run("cpt@5.1:interval=10", 2, 0.45),
        run("uniform4", 0, 0.4),
    ]
    records += [
        run("pfq@5", 1, 0.9),
        run("per_layer@6", 0, 0.1),
        run("random@5.1", 0, 0.1, settings={"block_shape": (8, 8)}),
    ]
    (setting,) = settings_of(records)
    found = {
        (row.label, other.label): (d.spread.n, round(d.spread.mean, 6))
        for row, other, d in setting.against_baselines()
    }
    assert found == {
        ("dynasty@5.1", "per_layer@5.1"): (2, 1.0),  # 0 and 2 points
        ("dynasty@5.1", "cpt@5.1:interval=10"): (1, 10.0),
        ("dynasty@5.1:smoothing=0", "per_layer@5.1"): (1, 1.0),
    }


def test_baselines_in_the_report(report):
    text, _ = report(study())
    assert "with the same target" not in text
    text, _ = report(
        study() + [run("per_layer@5.1", seed, 0.59, speedup_charged=5.15) for seed in range(3)]
    )
    # 59.8, 60.4 and 61.6 minus 59: mean 1.6, sd .916515, half = 4.302653 * .916515 / sqrt(3) =
    # 2.2768.
    assert rows(text, "| with the same target") == {
        "dynasty@5.1 minus per_layer@5.1": [
            "3",
            "+1.60 [-0.68, +3.88]",
            "no drop larger than 0.68 points",
        ]
    }
    assert (
        "not corrected for their number (5)." in text
    )  # four methods minus uniform 8 bits, and this one


def test_baselines_at_another_cost_are_not_compared(report):
    """4.65x and 3.36x are not the same target, whatever both asked for."""
    dynamic = [run("dynasty@5", seed, 0.60 + seed / 100, speedup_charged=4.65) for seed in range(3)]
    text, _ = report(
        [*dynamic, *(run("per_layer@5", seed, 0.59, speedup_charged=3.36) for seed in range(3))]
    )
    ((_, _, says),) = rows(text, "| with the same target").values()
    assert says == "not the same cost: 4.65x and 3.36x, where 5x was asked for"
    text, _ = report(
        [*dynamic, *(run("per_layer@5", seed, 0.59, speedup_charged=None) for seed in range(3))]
    )
    ((_, _, says),) = rows(text, "| with the same target").values()
    assert says == "not the same cost: 4.65x and an unknown speedup, where 5x was asked for"


ODD = {
    "the seed": ({"seed": "0"}, "it: seed must be a whole number in [0, 4294967295], not '0'"),
    "an accuracy in percent": (
        {"accuracy": 61.0},
        "it: accuracy must be null or a number in [0, 1], not 61.0",
    ),
    "an accuracy that is none": (
        {"accuracy": math.nan},
        "it: accuracy must be null or a number in [0, 1], not nan",
    ),
    "no settings": ({"config": [1]}, "it: config must be an object of settings, not [1]"),
    "settings of other types": (
        {"config": {"method": ["x"]}},
        "its config: method must be a text of one line, not ['x']",
    ),
    "settings that lack one": ({"config": {"method": "uniform8"}}, "its config lacks 'data'"),
    "a command of something else": (
        {"command": "rm -r x"},
        "it: command must be a command of `compare` with --methods and a whole --seed",
    ),
    "a quotation without end": ({"command": "dynasty-lightning compare 'x"}, "it: command must be"),
    "versions as a text": ({"versions": "1"}, "it: versions must be an object of texts, not '1'"),
    "a status of its own": (
        {"status": "done"},
        "it: status must be one of complete, diverged, failed, not 'done'",
    ),
    "warnings as a text": ({"warnings": "x"}, "it: warnings must be a list of texts, not 'x'"),
    "half a character": ({"error": "\ud800"}, "is not JSON ('utf-8' codec can't encode character"),
    "bits of another form": (
        {"bits": 8},
        "it: bits must be null or an object of mean widths, not 8",
    ),
    "a speedup of zero": (
        {"speedup_charged": 0},
        "it: speedup_charged must be null or a number in [1e-06, 1000000.0], not 0",
    ),
}


def test_an_odd_record_is_told_by_line_and_the_rest_is_reported(tmp_path):
    good = [run("uniform8", s, 0.5) for s in range(2)]
    odd = [
        run("dynasty@5", 0, 0.5) | {"key": f"odd {i}"} | change
        for i, (change, _) in enumerate(ODD.values())
    ]
    path = write(tmp_path / "results.jsonl", [good[0], *odd, good[1]])
    with path.open("a") as file:
        file.write("[" * 100_000 + "\n" + '{"key": 1}\n')
    with pytest.warns(UserWarning, match="is left out") as caught:
        out, *_ = write_report([path], tmp_path / "report.md")
    told = [str(w.message) for w in caught]
    assert [t.partition(" is no record")[0] for t in told] == [
        f"{path}, line {n}" for n in [*range(2, len(ODD) + 2), len(ODD) + 3, len(ODD) + 4]
    ]
    for text, (_, message) in zip(told, ODD.values(), strict=False):
        assert message in text
    text = out.read_text()
    assert [cells[0] for cells in rows(text, "| method | runs").values()] == ["2"]
    assert text.count("is no record and is left out") == len(ODD) + 2


def test_what_was_trained_otherwise_stands_apart():
    records = [
        run("uniform8", 0, 0.5),
        run("float32", 0, 0.5),
        run("uniform8", 0, 0.7, settings={"epochs": 20}),
    ]
    records.append(
        run("uniform8", 0, 0.6, settings={"validation_samples": 5000, "evaluate_on": "validation"})
    )
    assert [len(s.rows) for s in settings_of(records)] == [2, 1, 1]
    assert "accuracy on 5000 held-out training images" in settings_of(records)[2].text()
    # What concerns blocks only is part of the row: float32 is the same run for all of them.
    records = [run("float32", 0, 0.5, settings={"interval": 9}), run("float32", 1, 0.5)]
    records += [
        run(m, 0, 0.5, settings={"interval": 9, "block_shape": (8, 8)})
        for m in ("uniform8", "dynasty@5")
    ] + [run("uniform8", 0, 0.6)]
    (setting,) = settings_of(records)
    assert [r.label for r in setting.rows] == [
        "float32",
        "uniform8 (block shape 8x8, interval 9)",
        "dynasty@5 (block shape 8x8, interval 9)",
        "uniform8",
    ]
    assert setting.reference_of(setting.rows[2]) is setting.rows[1]  # with the same blocks
    assert setting.reference_of(setting.rows[0]) is setting.rows[3]


# -- The report


@pytest.fixture
def report(tmp_path):
    def make(records):
        written = write_report(
            [write(tmp_path / "results.jsonl", records)], tmp_path / "docs" / "report.md"
        )
        return written[0].read_text(), [p.name for p in written[1:]]

    return make


def test_report_of_a_study(report):
    text, pictures = report(study())
    assert pictures == ["report-accuracy.png", "report-differences.png"]
    assert (
        "cifar100, resnet8: 10 epochs of 50000 images, batch 128; accuracy on 10000 test images."
        in text
    )
    assert "](report-accuracy.png)" in text
    accuracy = rows(text, "| method | runs")
    assert accuracy["float32"] == [
        "3",
        "62.00 ± 1.00",
        "1.500 ± 0.000",
        "+1.00 [+1.00, +1.00]",
        "a gain of 1.00 to 1.00 points",
    ]
    assert accuracy["uniform8"][:2] == ["3", "61.00 ± 1.00"]
    assert accuracy["uniform8"][3].strip(" |") == ""
    # -0.2, -0.6, -0.4: mean -0.4, sd 0.2, half = 4.3027 * 0.2 / sqrt(3) = 0.4968.
    assert accuracy["dynasty@5.1"][3:] == [
        "-0.40 [-0.90, +0.10]",
        "no drop larger than 0.90 points",
    ]
    cost = rows(text, "| method | reduction in bit operations")
    assert set(cost) == {"uniform8", "dynasty@5.1", "dynasty@3"}
    assert cost["dynasty@5.1"][:4] == ["5.20 ± 0.10", "5.10", "1.00 ± 0.00", "3.30 ± 0.00"]
    assert cost["uniform8"][4:6] == ["1.00 / 1.00 / 1.00", "8.0 / 8.0 / 8.0"]
    assert "Commit " + "c" * 40 + ": 12 runs" in text
    assert (
        "    dynasty-lightning compare --methods float32,uniform8,dynasty@5.1,dynasty@3 --seed "
        "0 --seeds 3 "
        "--data=cifar100 --model=resnet8 --epochs=10 --batch-size=128 --codes=plain --out "
        "FILE.jsonl" in text
    )
    assert "Not completed" not in text
    assert "no evidence" not in text


def test_what_went_wrong_is_in_the_report(report):
    records = study()
    records.append(run("uniform2", 0, 0.01, "diverged"))
    records.append(
        run(
            "uniform2",
            1,
            status="failed",
            error="Traceback | x\nthe worker process was killed by signal 9",
        )
    )
    records.append(run("uniform4", 0, 0.5, warnings=["loss guard: up"]))
    records[2] |= {"status": "diverged", "accuracy": 0.01}
    text, _ = report(records)
    accuracy = rows(text, "| method | runs")
    assert accuracy["uniform2"] == ["0 of 2", "-", "-", "-", "**diverged in 1 of 2 runs**"]
    assert accuracy["dynasty@5.1"][0] == "2 of 3"
    assert accuracy["dynasty@5.1"][4].startswith(
        "**diverged in 1 of 3 runs**; the others: nothing yet: two pairs cannot tell"
    )
    assert "- uniform2, seed 0: diverged, accuracy 1.00 %" in text
    assert "- uniform2, seed 1: failed: the worker process was killed by signal 9" in text
    assert "- dynasty@5.1, seed 0: diverged, accuracy 1.00 %" in text
    assert "- uniform4, seed 0: loss guard: up" in text
    assert accuracy["uniform4"][3:] == [
        "-10.00 (one pair)",
        "no interval from fewer than two pairs",
    ]


def test_settings_have_sections_and_pictures_of_their_own(report):
    records = study() + [
        run(m, s, 0.7, settings={"data": "digits"}) for m in ("float32", "uniform8") for s in (0, 1)
    ]
    text, pictures = report(records)
    assert pictures == [
        f"report-{n}-{kind}.png" for n in (1, 2) for kind in ("accuracy", "differences")
    ]
    assert text.count("\n## ") == 3
    assert text.count("no evidence for accuracy") == 1


def test_runs_without_blocks_have_no_speedup_to_draw(report):
    text, pictures = report([run("float32", 0, 0.5)])
    assert pictures == []
    assert rows(text, "| method | runs")["float32"][:2] == ["1", "50.00"]


def test_seeds_apart_are_commands_apart(report):
    text, _ = report([run("uniform8", seed, 0.5) for seed in (0, 1, 2, 7)])
    assert "--methods uniform8 --seed 0 --seeds 3 " in text
    assert "--methods uniform8 --seed 7 --seeds 1 " in text


def test_the_last_record_of_a_run_counts_over_files(tmp_path):
    first = write(
        tmp_path / "a.jsonl",
        [run("uniform8", 0, status="failed", error="gone"), run("float32", 0, 0.5)],
    )
    second = write(tmp_path / "b.jsonl", [run("uniform8", 0, 0.6)])
    text = write_report([first, second], tmp_path / "out.md")[0].read_text()
    assert rows(text, "| method | runs")["uniform8"][:2] == ["1", "60.00"]
    assert "failed" not in text


def test_no_record_no_report(tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"no record in .*empty.jsonl"):
        write_report([empty], tmp_path / "out.md")
    with pytest.raises(FileNotFoundError):
        write_report([tmp_path / "none.jsonl"], tmp_path / "out.md")
    assert not (tmp_path / "out.md").exists()


def test_the_command_draws_again(tmp_path, capsys):
    results = write(tmp_path / "results.jsonl", study())
    assert main(["compare", "--report-only", str(results)]) == 0
    names = ["results.md", "results-accuracy.png", "results-differences.png"]
    assert capsys.readouterr().out.strip() == "Report: " + ", ".join(
        str(tmp_path / n) for n in names
    )
    assert not pyplot.get_fignums()


# -- Pictures


def test_runs_in_the_engines_currency_have_a_column_and_a_panel(tmp_path):
    records = study()
    before = compose_report([write(tmp_path / "before.jsonl", records)], "r").text
    assert "engine" not in before
    records += [
        run("dynasty@4:cost=core", seed, 0.6, speedup_engine=4.0 + seed / 10) for seed in range(3)
    ]
    text = compose_report([write(tmp_path / "after.jsonl", records)], "r").text
    header = next(line for line in text.splitlines() if "| ideal |" in line)
    at = header.split(" | ").index("engine")
    lines = {
        line.split(" | ")[0].lstrip("| "): line.split(" | ")
        for line in text.splitlines()
        if line.count(" | ") == header.count(" | ")
    }
    assert lines["dynasty@4:cost=core"][at].startswith("4.10")
    assert lines["dynasty@5.1"][at] == "-"
    (setting,) = settings_of(records)
    figure = draw_pareto(setting)
    assert len(figure.axes) == 3
    assert "engine of tables" in figure.axes[1].get_xlabel()


def test_pareto_picture():
    (setting,) = settings_of(
        [
            *study(),
            run("uniform2", 0, 0.2, speedup_charged=16.0),
            run("uniform2", 1, 0.02, "diverged"),
        ]
    )
    figure = draw_pareto(setting)
    panels = figure.axes
    assert [p.get_xscale() for p in panels] == ["log", "log"]
    joined = [
        line.get_xydata()
        for line in panels[0].lines
        if len(line.get_xdata()) == 2 and line.get_color() == "#D55E00"
    ]
    assert any([round(x, 1) for x, _ in points] == [3.0, 5.2] for points in joined)
    shown = texts(figure)
    assert "4  dynasty@3: 61.00 ± 1.00 % at 3.00 ± 0.00x" in shown
    assert "5  uniform2: 20.00 % at 16.00x; 1 diverged" in shown
    assert "5 (20.0)" in shown  # at the edge, with its accuracy
    assert "n = 1 to 3" in shown
    assert "Speedup of the core" in shown
    low, high = panels[0].get_ylim()
    assert 55 < low < 60 < 63 < high < 68  # the others decide the scale
    (flat,) = settings_of([run("mxint8", 0, 0.5, speedup_core=None)])
    assert len(draw_pareto(flat).axes) == 1


def test_labels_cover_no_marks_of_fifteen_methods():
    records = [run("uniform8", seed, 0.60 + seed / 500) for seed in range(3)]
    words = [
        f"dynasty@{t}:smoothing={s}" for s in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7) for t in (5, 5.1)
    ]
    for i, word in enumerate(words):
        records += [
            run(word, seed, 0.595 + i / 2500 + seed / 500, speedup_charged=5 + (i % 2) / 5)
            for seed in range(3)
        ]
    (setting,) = settings_of(records)
    figure = draw_pareto(setting)
    figure.canvas.draw()
    axes = figure.axes[0]
    boxes = [t.get_window_extent() for t in axes.texts]
    assert len(boxes) == 15
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    frame = axes.get_window_extent()
    assert all(
        frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1
        for b in boxes
    )
    marks = [axes.transData.transform((m.mean(), n.mean())) for m, n in _means(axes)]
    assert not [1 for x, y in marks for b in boxes if b.x0 < x < b.x1 and b.y0 < y < b.y1]
    pyplot.close(figure)


def _means(axes):
    return [c[0].get_data() for c in axes.containers]


def test_differences_picture():
    (setting,) = settings_of(study())
    figure = draw_differences(setting)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["float32", "dynasty@5.1", "dynasty@3"]
    middles = [c[0].get_xdata()[0] for c in axes.containers]
    assert middles == [pytest.approx(1.0), pytest.approx(-0.4), pytest.approx(0.0)]
    segment = axes.containers[1][2][0].get_segments()[0]
    assert segment[:, 0].tolist() == [
        pytest.approx(-0.8968, abs=1e-3),
        pytest.approx(0.0968, abs=1e-3),
    ]
    assert "-0.40 [-0.90, +0.10]  n = 3" in texts(figure)


def test_other_schedules_and_machines_are_other_settings():
    records = [
        run("uniform8", 0, 0.5),
        run("uniform8", 0, 0.6, settings={"decay": "steps"}),
        run("uniform8", 0, 0.7, settings={"accelerator": "gpu"}),
    ]
    old = run("dynasty@5.1", 0, 0.4)
    del old["config"]["decay"], old["config"]["accelerator"]
    plain, stepped, gpu = settings_of([*records, old])
    assert [row.label for row in plain.rows] == ["uniform8", "dynasty@5.1"]
    assert ", decay steps;" in stepped.text()
    assert ", accelerator gpu;" in gpu.text()
    assert "decay" not in plain.text()


# -- Length of training


def lengths():
    """Drops of 4, 2 and 0 points after 5, 10 and 20 epochs, the last of one seed; uniform 4 bits
    after 5 epochs alone.
    """
    records = []
    for epochs, drop, seeds in ((20, 0.0, 1), (5, 0.04, 3), (10, 0.02, 2)):
        for seed in range(seeds):
            records.append(run("uniform8", seed, 0.6, settings={"epochs": epochs}))
            records.append(
                run(
                    "dynasty@5.1",
                    seed,
                    0.6 - drop - seed / 1000,
                    settings={"epochs": epochs},
                    speedup_charged=5.1,
                )
            )
    return [
        *records,
        run("uniform4", 0, 0.5, settings={"epochs": 5}),
        run("uniform8", 0, 0.5, settings={"epochs": 5, "batch_size": 64}),
    ]


def test_lengths_of_one_training_are_a_course():
    settings = settings_of(lengths())
    (course,) = courses(settings)
    assert [s.values["epochs"] for s in course] == [5, 10, 20]
    assert titles(settings) == [
        "cifar100, resnet8, epochs 20, batch size 128",
        "cifar100, resnet8, epochs 5, batch size 128",
        "cifar100, resnet8, epochs 10, batch size 128",
        "cifar100, resnet8, epochs 5, batch size 64",
    ]
    assert courses(settings[:1]) == []
    assert titles(settings[:1]) == ["cifar100, resnet8"]


def test_course_in_the_report(report):
    text, pictures = report(lengths())
    section = text[text.index("length of training") :].split("## ")[0]
    assert "report-length.png" in section
    assert "report-length.png" in pictures
    lines = [line for line in section.splitlines() if line.startswith("| dynasty@5.1 ")]
    assert [[c.strip() for c in line.split("|")[2:4]] for line in lines] == [
        ["5", "3"],
        ["10", "2"],
        ["20", "1"],
    ]
    assert "-4.10 [-4.35, -3.85]" in lines[0]  # 4.0, 4.1, 4.2: t(.975, 2) * .1 / sqrt(3) = .248
    assert "uniform4" not in section


def test_picture_of_a_course():
    (course,) = courses(settings_of(lengths()))
    figure = draw_course(course)
    axes = figure.axes[0]
    (means,) = [line for line in axes.lines if line.get_label() == "dynasty@5.1, n = 3, 2, 1"]
    assert means.get_xdata().tolist() == [5, 10, 20]
    assert means.get_ydata().tolist() == [
        pytest.approx(-4.1),
        pytest.approx(-2.05),
        pytest.approx(0.0),
    ]
    assert len(axes.containers) == 1  # an interval for three pairs, none for two or one
    alone = courses(settings_of([r for r in lengths() if r["config"]["method"] == "uniform8"]))
    assert course_pairs(alone[0]) == {}
    pyplot.close(figure)
