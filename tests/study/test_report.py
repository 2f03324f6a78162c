"""The table's numbers, and pictures that say what is in the figures."""

import json
import math
import re
import struct

import numpy as np
import pytest
from matplotlib import pyplot

from dynasty_lightning.files import write_atomically
from dynasty_lightning.study.report import demo, demo_pictures, run_folder
from dynasty_lightning.study.report.statistics import Spread

LAYERS = ["network.stem", "network.blocks.0.conv1", "network.head"]


def run(name, seed, accuracy, **figures):
    quantized = (
        {}
        if name == "float32"
        else {
            "speedup_ideal": 1.0,
            "speedup_charged": 1.0,
            "energy_ratio_compute": 1.0,
            "energy_ratio_sram": 1.0,
            "energy_ratio_total": 1.0,
            "bits": {"X": 8.0, "W": 8.0, "E": 8.0},
            "analytics_share": 0.01,
        }
    )
    return {
        "name": name,
        "seed": seed,
        "accuracy": accuracy,
        "loss": 0.1,
        "seconds": 2.0,
        "steps": 200,
        **quantized,
        **figures,
    }


def make_summary(data="fashion-mnist", runs=None):
    if runs is None:
        runs = [run("float32", s, 0.90 + s / 100) for s in range(3)]
        runs += [run("uniform8", s, 0.89 + s / 100) for s in range(3)]
        runs += [
            run(
                "dynasty",
                s,
                0.88 + s / 50,
                speedup_ideal=5.5,
                speedup_charged=5.0 + s / 10,
                warmup_steps=20,
            )
            for s in range(3)
        ]
    args = {"data": data, "model": "resnet8", "epochs": 5}
    return {
        "status": "complete",
        "args": args,
        "train_images": 20000,
        "test_images": 10000,
        "runs": runs,
    }


def make_history():
    steps = [10, 20, 30, 40, 60, 100, 200]
    return [
        {
            "step": step,
            "mean_bits": {"X": 3.0, "W": 4.5, "E": 2.25},
            "bits": {
                n: {r: 8.0 if step <= 20 else 2.0 + i + k for k, r in enumerate("XWE")}
                for i, n in enumerate(LAYERS)
            },
        }
        for step in steps
    ]


def make_widths(channels=1):
    rng = np.random.default_rng(0)
    images = np.zeros((4, channels, 28, 28), np.uint8)
    images[:, :, 8:20, 8:20] = 255
    stem = rng.integers(2, 9, (4, 1, 28, 28)).astype(np.uint8)
    first = np.full((4, 4, 14, 14), 2, np.uint8)
    first[:, :, 4:10, 4:10] = 6
    widths = {
        "X/network.stem": stem,
        "X/network.blocks.0.conv1": first,
        "X/network.blocks.0.conv2": first + 1,
    }
    return {"images": images, "labels": np.array(["bag", "coat", "dress", "shirt"]), **widths}


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">2i", content[16:24])


@pytest.fixture
def folder(tmp_path):
    summary = make_summary()
    for entry in summary["runs"]:
        if entry["name"] == "dynasty":
            entry |= {
                "history_file": f"history-{entry['seed']}.jsonl",
                "image_widths_file": f"widths-{entry['seed']}.npz",
            }
            (tmp_path / entry["history_file"]).write_text(
                "".join(json.dumps(h) + "\n" for h in make_history())
            )
            write_atomically(
                tmp_path / entry["image_widths_file"],
                lambda file: np.savez(file, **make_widths()),
                sealed=True,
            )
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def texts(figure):
    figure.canvas.draw()
    found = [t.get_text() for t in figure.findobj(pyplot.Text)]
    pyplot.close(figure)
    return "\n".join(found)


def test_spread():
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.sd, spread.n) == (2.0, 1.0, 3)
    assert spread.text() == "2.00 ± 1.00"
    assert Spread.of([1.5]).text(".1f") == "1.5"
    assert Spread.of([]).text() == "-"
    assert math.isnan(Spread.of([1.5]).sd)


def test_differences_are_paired_by_seed():
    runs = [
        run("uniform8", 0, 0.5),
        run("uniform8", 1, 0.9),
        run("dynasty", 1, 0.88),
        run("dynasty", 0, 0.49),
        run("dynasty", 2, 0.1),
    ]
    difference = demo.paired_difference(make_summary(runs=runs), "dynasty")
    assert difference.n == 2
    assert difference.mean == pytest.approx(-1.5)


def test_table():
    table = demo.format_table(make_summary())
    rows = {
        label: values
        for label, *values in (re.split(r" {2,}", line.strip()) for line in table.splitlines())
    }
    assert table.splitlines()[0].split() == ["float32", "uniform", "8", "bits", "dynasty"]
    assert rows["test accuracy (%)"] == ["91.00 ± 1.00", "90.00 ± 1.00", "90.00 ± 2.00"]
    assert rows["minus uniform 8 bits, by seed"] == ["+1.00 ± 0.00", "+0.00 ± 1.00"]
    assert rows["zero blocks counted"] == ["-", "1.00 ± 0.00", "5.10 ± 0.10"]
    assert "10000 test images" in table
    assert "no evidence" not in table
    assert max(map(len, table.splitlines())) <= 110


def test_odd_runs_lines_and_files_are_told_and_the_rest_is_drawn(folder):
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    summary["runs"][1:1] = [
        7,
        {"name": "uniform8"},
        run("uniform4", 0, "0.5"),
        run("dynasty", 9, 0.5) | {"history_file": "../x"},
    ]
    path.write_text(json.dumps(summary))
    history = folder / "history-0.jsonl"
    lines = history.read_text().splitlines()
    history.write_text("\n".join([lines[0], "{", json.dumps({"step": 15}), lines[0], *lines[1:]]))
    (folder / "widths-0.npz").write_bytes(b"PK" * 100)
    with pytest.warns(UserWarning, match="is left out|lacks a picture") as caught:
        pictures = demo_pictures.draw_report(folder)
    assert [p.name for p in pictures] == [
        demo_pictures.ACCURACY_PICTURE,
        demo_pictures.TIME_PICTURE,
    ]
    told = "\n".join(str(w.message) for w in caught)
    for text in (
        f"{path}, run 2 is left out: it is no object, but 7",
        f"{path}, run 3 is left out: it lacks 'seed'",
        f"{path}, run 4 is left out: it: accuracy must be a number in [0, 1], not '0.5'",
        f"{path}, run 5 is left out: it: history_file must be the name of a file in the same "
        f"folder, not '../x'",
        f"{history}, line 2 is left out: it is not JSON",
        f"{history}, line 3 is left out: it lacks 'mean_bits'",
        f"{history}, line 4 is left out: step 10 does not follow 10",
        f"{folder} lacks a picture: {folder / 'widths-0.npz'} has no digest",
    ):
        assert text in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff", "summary.json is not JSON"),
        (b"[" * 100_000, "summary.json is not JSON"),
        (b'{"args": 1, "runs": []}', "args must be an object, not 1"),
        (
            b'{"args": {"data": "digits", "model": 3}, "runs": []}',
            "args: model must be a text of one line, not 3",
        ),
        (b'{"args": {"data": "digits", "model": "mlp"}, "runs": {}}', "its runs are no list"),
    ],
)
def test_a_summary_that_is_none_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "summary.json").write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        run_folder.read_summary(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_table_of_digits_says_that_they_are_no_evidence():
    assert table_note(make_summary("digits"))
    assert not table_note(make_summary("cifar100"))


def table_note(summary):
    return "no evidence for accuracy" in demo.format_table(summary)


def test_table_of_a_single_run_without_figures():
    table = demo.format_table(
        make_summary(runs=[run("dynasty", 0, 0.9, analytics_share=None, bits=None)])
    )
    assert "90.00" in table
    assert "±" not in table.split("\n\n")[0]


def test_all_pictures(folder):
    pictures = demo_pictures.draw_report(folder)
    assert [p.name for p in pictures] == [
        "accuracy-speedup.png",
        "widths-over-time.png",
        "widths-over-image.png",
    ]
    for picture in pictures:
        width, height = png_size(picture)
        assert width > 800
        assert height > 300
    assert not list(folder.glob("*.tmp*"))
    assert not pyplot.get_fignums()


def test_a_folder_without_dynamic_runs_gets_the_picture_it_can(folder):
    summary = make_summary(runs=[run("float32", 0, 0.9), run("uniform8", 0, 0.9)])
    (folder / "summary.json").write_text(json.dumps(summary))
    assert [p.name for p in demo_pictures.draw_report(folder)] == ["accuracy-speedup.png"]
    (folder / "summary.json").write_text(json.dumps(make_summary(runs=[run("float32", 0, 0.9)])))
    assert demo_pictures.draw_report(folder) == []


def test_accuracy_picture_says_what_it_shows():
    shown = texts(demo_pictures.draw_accuracy(make_summary())).replace("\n", " ")
    assert (
        "Dynamic precision needs 5.1x fewer bit operations than uniform 8-bit blocks; accuracy "
        "changes by +0.00 ± 1.00 points" in shown
    )
    assert "n = 3" in shown
    assert "Test accuracy (%)" in shown
    assert "no evidence" not in shown
    assert "no evidence" in texts(demo_pictures.draw_accuracy(make_summary("digits")))
    other = texts(
        demo_pictures.draw_accuracy(
            make_summary(
                runs=[run("uniform8", 0, 0.9), run("uniform4", 0, 0.88, speedup_charged=4.0)]
            )
        )
    )
    assert "Accuracy and speedup of uniform 8 bits and uniform 4 bits" in other.replace("\n", " ")


def test_time_picture():
    summary = make_summary()
    dynamic = summary["runs"][-3]
    figure = demo_pictures.draw_widths_over_time(make_history(), dynamic, summary)
    meshes = [axes.collections[0] for axes in figure.axes[:3]]
    np.testing.assert_allclose(meshes[0].get_array()[:, -1], [2, 3, 4])
    np.testing.assert_allclose(meshes[2].get_array()[:, -1], [4, 5, 6])
    assert all(m.get_clim() == (0, 8) for m in meshes)
    assert figure.axes[0].get_ylim() == (3, 0)  # the input on top
    shown = texts(figure)
    assert "3.0 bits in X, 4.5 in W and 2.2 in E on average at the end" in shown
    assert "end of warm-up, step 20" in shown
    assert "Mean width of blocks (bits)" in shown


def test_image_picture_of_grey_images_compares_figure_and_ground():
    summary = make_summary()
    shown = texts(demo_pictures.draw_widths_over_image(make_widths(), summary["runs"][-3], summary))
    assert "Widths follow the image: 6.0 bits on average inside the outline, 2.0 outside" in shown
    assert "blocks.0.conv1" in shown
    assert "bag" in shown


def test_image_picture_claims_no_difference_that_is_not_there():
    summary, widths = make_summary(), make_widths()
    widths["X/network.blocks.0.conv1"][:] = 3
    assert "3.0 to 3.0 bits" in texts(
        demo_pictures.draw_widths_over_image(widths, summary["runs"][-3], summary)
    )
    colour = texts(
        demo_pictures.draw_widths_over_image(make_widths(channels=3), summary["runs"][-3], summary)
    )
    assert "Each image gets its own widths, block by block: 2.0 to 6.0 bits" in colour


def test_picture_layer():
    assert demo_pictures.picture_layer(make_widths()) == "network.blocks.0.conv1"
    stem = {"X/network.stem": np.zeros((4, 1, 8, 8), np.uint8)}
    assert demo_pictures.picture_layer(stem) == "network.stem"
    with pytest.raises(ValueError, match="no convolution"):
        demo_pictures.picture_layer({"images": np.zeros(1)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no summary of a demo"),
        ('{"runs": []}', "lacks args or runs"),
    ],
)
def test_a_wrong_summary(tmp_path, content, message):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run_folder.read_summary(tmp_path)


def test_no_summary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no summary.json: name a folder that"):
        run_folder.read_summary(tmp_path)
