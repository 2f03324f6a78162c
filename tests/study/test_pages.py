"""Committed pages of results are what the committed records give."""

import json
import re
from pathlib import Path

import pytest

from dynasty_lightning.cli import main
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.record import record_of
from dynasty_lightning.study.report.markdown import check_report, write_report

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "compare"
TITLE = re.compile(r"# Results of (.*)")
PAGES = {
    page: [RECORDS / name for name in title[1].split(", ")]
    for folder in ("studies",)
    for page in sorted((ROOT / "docs" / "results" / folder).glob("*.md"))
    if (title := TITLE.match(page.read_text().split("\n")[0]))
}


def test_there_are_pages():
    assert {page.stem for page in PAGES} == {
        "fashion-mnist",
        "cifar100",
        "stdlib-docs",
        "cifar100-10000",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_what_its_records_give(page):
    """Else: `dynasty-lightning report RECORDS --out PAGE` with the files that its title names."""
    assert check_report(PAGES[page], page) == []


@pytest.fixture
def results(tmp_path):
    """Two runs."""
    path = tmp_path / "results.jsonl"
    for seed in (0, 1):
        config = RunConfig(
            data="digits", model="mlp", method="uniform8", seed=seed, epochs=1, batch_size=8
        )
        figures = {"status": "complete", "accuracy": 0.5, "loss": 1.0, "speedup_charged": 1.0}
        with path.open("a") as file:
            file.write(json.dumps(record_of(config) | figures) + "\n")
    return path


def test_the_command_writes_a_page_and_checks_it(results, tmp_path, capsys):
    page = tmp_path / "pages" / "digits.md"
    check = ["report", str(results), "--out", str(page), "--check"]
    assert main(check) == 1  # it is not there
    assert main(["report", str(results), "--out", str(page)]) == 0
    assert page.read_text().startswith("# Results of results.jsonl\n")
    assert str(page.with_name("digits-accuracy.png")) in capsys.readouterr().out
    assert main(check) == 0
    assert "is up to date" in capsys.readouterr().out
    page.write_text(page.read_text().replace("50.00", "60.00"))
    assert main(check) == 1
    said = capsys.readouterr().err
    assert "-| uniform8 | 2 | 60.00" in said
    assert "+| uniform8 | 2 | 50.00" in said


def test_a_picture_that_is_missing_is_named(results, tmp_path):
    page, picture = write_report([results], tmp_path / "page.md")
    picture.unlink()
    assert check_report([results], page) == [f"{picture} is missing"]


def test_a_run_folder_has_no_page(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--check"])
    assert "are for files of results" in capsys.readouterr().err
