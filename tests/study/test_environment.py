"""Where figures are made."""

import subprocess

from dynasty_lightning.study import environment
from dynasty_lightning.study.environment import finite


def test_commit_of_a_checkout_and_of_none(tmp_path, monkeypatch):
    environment.commit.cache_clear()
    try:
        monkeypatch.setattr(environment, "PACKAGE", tmp_path)
        assert environment.commit() is None
        environment.commit.cache_clear()
        package = tmp_path / "dynasty_lightning"
        package.mkdir()
        (package / "__init__.py").write_text("")
        monkeypatch.setattr(environment, "PACKAGE", package)
        git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run([*git, "init", "-q"], check=True)
        assert environment.commit() is None  # a checkout, but not of this package
        environment.commit.cache_clear()
        subprocess.run([*git, "add", "dynasty_lightning"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
        (tmp_path / "results.jsonl").write_text("{}\n")  # results are no change of the code
        clean = environment.commit()
        assert len(clean) == 40
        environment.commit.cache_clear()
        (package / "__init__.py").write_text("x = 1\n")
        assert environment.commit() == clean + "+changes"
    finally:
        environment.commit.cache_clear()


def test_what_json_does_not_know_is_null():
    assert finite({"a": float("nan"), "b": [1.0, float("inf")], "c": ("x", 2)}) == {
        "a": None,
        "b": [1.0, None],
        "c": ["x", 2],
    }
