"""The standard library's documentation is a text: read the same way each time, split without
overlap, served in windows.
"""

import itertools
import string

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynasty_lightning.files import DamagedFile
from dynasty_lightning.tasks.data import TextData, TextDataModule, stdlib_docs
from dynasty_lightning.tasks.data import text as text_module
from dynasty_lightning.tasks.data.loader import WindowLoader
from dynasty_lightning.tasks.data.text import CHARACTERS, UNKNOWN, VOCABULARY, decode, encode


def counting(length):
    """A text in which each symbol follows from the one before it."""
    return np.arange(length, dtype=np.int64).astype(np.uint8)


def text_data(length=1000):
    return TextData(
        name="counting",
        train=counting(length),
        validation=counting(90),
        test=counting(70),
        sha256="0",
    )


def loader(*, length=103, context=10, batch_size=4, shuffle=True, seed=0, samples=None):
    return WindowLoader(
        counting(length),
        context=context,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        samples=samples,
    )


def starts(batches):
    return [batch[0][:, 0].tolist() for batch in batches]


# -- Characters


def test_vocabulary_is_printable_ascii_and_newline():
    assert sorted(CHARACTERS) == sorted({*string.printable} - {*"\t\r\v\f"})
    assert (UNKNOWN, VOCABULARY) == (96, 97)


@given(st.text(st.sampled_from(CHARACTERS)))
def test_known_characters_round_trip(text):
    assert decode(encode(text)) == text


@given(st.text())
def test_every_other_character_is_the_unknown_one(text):
    symbols = encode(text)
    assert symbols.dtype == np.uint8
    assert decode(symbols) == "".join(c if c in CHARACTERS else "\ufffd" for c in text)


def test_characters_beyond_unicode_text():
    assert encode("\t\r\x00\x7f\x80é\u2603\U0001f600\ud800").tolist() == [UNKNOWN] * 9


# -- The text


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A folder that the reader takes for a standard library."""
    monkeypatch.setattr(text_module, "_LEAST_CHARACTERS", 20)
    monkeypatch.setattr(
        text_module.sys, "stdlib_module_names", frozenset({"alpha", "beta", "tkinter", "missing"})
    )
    files = {
        "alpha.py": '"""Alpha.\n\nSame words.\n"""\nraise SystemExit("imported")\n',
        "beta/__init__.py": (
            "class B:\n    'Bee.'\n\n"
            "    async def f(self):\n        '''Eff.\n\n        Same words.\n        '''\n\n"
            "    x = 'no docstring'\n\n"
            "try:\n    pass\nexcept OSError:\n    def g(): 'Gee.'\n"
        ),
        "beta/tests/test_b.py": '"""A test."""\n',
        "beta/old.py": '"""Escape \\d."""\n',
        "tkinter/__init__.py": '"""Left out."""\n',
        "site.py": '"""No module of the library."""\n',
        "pydoc_data/topics.py": "# generated\ntopics = {'with': '\\n\\nWith.\\n', 'assert': "
        "'Assert.'}\n",
        "pydoc_data/__init__.py": '"""Left out."""\n',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    yield tmp_path
    stdlib_docs.cache_clear()


def whole(data):
    return decode(np.concatenate([data.train, data.validation, data.test]))


def test_documents_come_sorted_and_paragraphs_once(small_library):
    assert whole(stdlib_docs(small_library)).split("\n\n") == [
        "Alpha.",
        "Same words.",
        "Bee.",
        "Eff.",
        "Gee.",
        "Escape \\d.",
        "Assert.",
        "With.",
    ]


def test_the_text_is_the_same_each_time_and_its_hash_tells(small_library):
    first = stdlib_docs(small_library)
    stdlib_docs.cache_clear()
    again = stdlib_docs(small_library)
    assert again is not first
    assert (whole(again), again.sha256) == (whole(first), first.sha256)
    (small_library / "alpha.py").write_text('"""Another Alpha."""\n')
    stdlib_docs.cache_clear()
    assert stdlib_docs(small_library).sha256 != first.sha256


def test_parts_are_contiguous(small_library):
    data = stdlib_docs(small_library)
    length = len(whole(data))
    assert [len(data.train), len(data.train) + len(data.validation)] == [
        length * 8 // 10,
        length * 9 // 10,
    ]


def test_too_little_text(small_library, monkeypatch):
    monkeypatch.setattr(text_module, "_LEAST_CHARACTERS", 1000)
    with pytest.raises(
        ValueError,
        match=r"holds \d\d characters of documentation, fewer than 1000: install the whole "
        r"standard library",
    ):
        stdlib_docs(small_library)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("alpha.py", b'"""cut off'),
        ("alpha.py", b"\0"),
        ("alpha.py", b"# coding: nothing"),
        ("alpha.py", b"-" * 10_000 + b"1"),
        ("pydoc_data/topics.py", b""),
        ("pydoc_data/topics.py", b"topics = f()"),
        ("pydoc_data/topics.py", b"topics = [1]"),
        ("pydoc_data/topics.py", b"topics = {'with': 1}"),
    ],
)
def test_a_damaged_library_is_told_by_the_name_of_the_file(small_library, name, content):
    (small_library / name).write_bytes(content)
    with pytest.raises(
        DamagedFile,
        match=f"{name} is no source of this Python's standard library .*: install it again",
    ):
        stdlib_docs(small_library)


def test_no_library(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no standard library in .*nowhere"):
        stdlib_docs(tmp_path / "nowhere")


def test_the_running_python():
    data = stdlib_docs()
    text = whole(data)
    assert stdlib_docs() is data
    assert len(text) > 1_000_000
    assert 'The "with" statement' in text
    assert (np.concatenate([data.train, data.validation, data.test]) == UNKNOWN).mean() < 0.01
    paragraphs = text.split("\n\n")
    # Cut paragraphs apart, nothing comes twice: the test part repeats nothing of the training part.
    assert len(set(paragraphs)) == len(paragraphs)


# -- Windows


def test_targets_are_the_next_symbols():
    for shuffle in (True, False):
        for symbols, following in loader(shuffle=shuffle):
            assert symbols.dtype == following.dtype == torch.int64
            assert torch.equal(symbols[:, 1:], following[:, :-1])
            assert torch.equal(following, symbols + 1)


def test_evaluation_windows_lie_side_by_side():
    assert starts(loader(shuffle=False)) == [[0, 10, 20, 30], [40, 50, 60, 70], [80, 90]]
    assert starts(loader(shuffle=False, length=101)) == starts(loader(shuffle=False))
    assert starts(loader(shuffle=False, length=100))[-1] == [
        80
    ]  # a symbol after the last window is missing


def test_an_epoch_shows_windows_side_by_side_from_a_random_offset():
    source = loader()
    offsets = set()
    for _ in range(40):
        shown = sorted(itertools.chain.from_iterable(starts(source)))
        assert np.diff(shown).tolist() == [10] * 8
        assert 0 <= shown[0] < 10
        offsets.add(shown[0])
    assert len(offsets) > 5


@pytest.mark.parametrize("stop", range(8))
def test_resume_goes_on_with_the_very_next_batch(stop):
    def stream(source, count):
        return list(
            itertools.islice(itertools.chain.from_iterable(source for _ in range(9)), count)
        )

    expected = stream(loader(samples=7), 8)
    interrupted, resumed = loader(samples=7), loader(samples=7)
    stream(interrupted, stop)
    resumed.load_state_dict(interrupted.state_dict())
    got = stream(resumed, 8 - stop)
    for (x, y), (want_x, want_y) in zip(got, expected[stop:], strict=True):
        assert torch.equal(x, want_x)
        assert torch.equal(y, want_y)


def test_fewer_windows_an_epoch():
    source = loader(samples=6)
    assert len(source) == 2
    assert [len(s) for s in starts(source)] == [4, 2]
    assert starts(loader(samples=6, seed=1)) != starts(loader(samples=6))


def test_loader_checks_its_arguments():
    with pytest.raises(ValueError, match="text of 10 symbols has no room for a window of 10"):
        loader(length=10, shuffle=False)
    with pytest.raises(
        ValueError, match=r"samples must be in \[1, 9\], the number there are, not 10"
    ):
        loader(samples=10)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        loader(batch_size=0)


# -- Data module


def test_loaders_of_each_part():
    module = TextDataModule(
        text_data(), context=10, batch_size=4, train_windows=12, validation_windows=5
    )
    assert module.vocabulary == VOCABULARY
    assert [
        module.train_dataloader().samples,
        module.val_dataloader().samples,
        module.test_dataloader().samples,
    ] == [12, 5, 6]
    assert TextDataModule(text_data(), context=10).val_dataloader().samples == 8
    assert TextDataModule(text_data(), context=10).train_dataloader().samples == 99
    assert TextDataModule(text_data(), context=10, validation_windows=0).val_dataloader() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_windows": 100}, "counting has 99 train windows of 10 symbols: train_windows=100"),
        ({"train_windows": 0}, "train_windows=0"),
        (
            {"validation_windows": 9},
            "counting has 8 validation windows of 10 symbols: validation_windows=9",
        ),
        ({"validation_windows": -1}, "validation_windows=-1"),
    ],
)
def test_more_windows_than_there_are(options, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(text_data(), context=10, **options)
