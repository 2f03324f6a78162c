# SPDX-License-Identifier: Apache-2.0
"""The soak's short form, and that it sees what grows."""

import pytest

from .__main__ import cycles, quiet
from .usage import Usage, growth

CYCLES = 8


def flat(n=40):
    return [
        Usage(rss=300 * 2**20 + (i * 37 % 11) * 2**18, descriptors=20 + i % 3, threads=4)
        for i in range(n)
    ]


def test_what_is_flat_passes():
    assert growth(flat()) == []


@pytest.mark.parametrize(("field", "each"), [("rss", 2**20), ("descriptors", 1), ("threads", 1)])
def test_what_grows_is_seen(field, each):
    grown = [
        Usage(**{**vars(u), field: getattr(u, field) + i * each}) for i, u in enumerate(flat())
    ]
    (fault,) = growth(grown)
    assert ("memory" if field == "rss" else field) in fault


def test_what_is_filled_once_is_no_growth():
    assert (
        growth(
            [
                Usage(
                    rss=u.rss - 2**20 * max(8 - i, 0), descriptors=u.descriptors, threads=u.threads
                )
                for i, u in enumerate(flat())
            ]
        )
        == []
    )


@pytest.mark.filterwarnings("ignore")
def test_a_few_cycles_leave_nothing_behind(tmp_path):
    quiet()
    passed = cycles(tmp_path)
    seen = [next(passed) for _ in range(CYCLES)]
    assert growth(seen) == [], seen
