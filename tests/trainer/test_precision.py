# SPDX-License-Identifier: Apache-2.0
"""The plugin's options by their names of before 0.1.0."""

import pytest

from dynasty_lightning import DynastyPrecision


def test_the_old_name_of_other_layers_works_and_warns():
    with pytest.warns(DeprecationWarning, match="rest is called other_layers now"):
        plugin = DynastyPrecision(rest="bf16")
    assert plugin.other_layers == "bf16"
    with pytest.warns(DeprecationWarning, match="rest is called other_layers now"):
        assert plugin.rest == "bf16"


@pytest.mark.filterwarnings("ignore:rest is called other_layers now")
def test_a_wrong_value_is_refused_under_either_name():
    with pytest.raises(ValueError, match="other_layers must be '32' or 'bf16', not '16'"):
        DynastyPrecision(rest="16")
    with pytest.raises(ValueError, match="are one option"):
        DynastyPrecision(rest="32", other_layers="bf16")
