# SPDX-License-Identifier: Apache-2.0
"""The lists of mutants fit the sources; what they find out takes half an hour, and CI runs it."""

import pytest

from dynasty_lightning.numerics.backends import toolchain
from tests.mutants import core, numerics


@pytest.mark.parametrize("mutation", numerics.MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_of_the_kernels_replaces_one_text(mutation):
    pattern = numerics.in_any_layout(mutation.old)
    sources = [path.read_text() for path in toolchain.SOURCES.iterdir()]
    assert sum(len(pattern.findall(text)) for text in sources) == 1


@pytest.mark.parametrize("mutation", core.MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_of_the_core_replaces_one_text(mutation):
    assert (core.ROOT / "fpga" / mutation.path).read_text().count(mutation.old) == 1
    assert (core.ROOT / mutation.tests[0]).is_file()


@pytest.mark.parametrize("mutations", [numerics.MUTATIONS, core.MUTATIONS], ids=["kernels", "core"])
def test_names_are_of_one_mutation(mutations):
    assert len({mutation.name for mutation in mutations}) == len(mutations)
