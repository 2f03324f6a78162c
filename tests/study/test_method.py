"""Methods as words: what they mean, that equal ones have one spelling, and what is refused."""

import pytest

from dynasty_lightning.policy.threshold import DynastyPolicy
from dynasty_lightning.policy.uniform import UniformPolicy
from dynasty_lightning.study.method import Method, parse_methods


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("float32", "float32"),
        (" uniform8 ", "uniform8"),
        ("dynasty@5.10", "dynasty@5.1"),
        ("dynasty@5.0:interval=25", "dynasty@5:interval=25"),
        ("dynasty@5:loss_guard=None,interval=7", "dynasty@5:interval=7,loss_guard=none"),
        ("dynasty:noise_budget=5e-1", "dynasty:noise_budget=0.5"),
        ("uniform:bits=E:3/X:4/W:5", "uniform:bits=X:4/W:5/E:3"),
        ("uniform4:block_shape=1x32", "uniform4:block_shape=1x32"),
        ("uniform8:unquantized=X+W", "uniform8:unquantized=X+W"),
        # Results are stored under the old name, so that the new one finds them.
        ("uniform8:rest=bf16", "uniform8:rest=bf16"),
        ("uniform8:other_layers=bf16", "uniform8:rest=bf16"),
    ],
)
def test_one_spelling(text, canonical):
    method = Method.parse(text)
    assert str(method) == canonical
    assert Method.parse(canonical) == method
    assert hash(Method.parse(canonical)) == hash(method)
    method.check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no method"),
        ("dynasty@", "is no method"),
        ("dynasty@5:", "is no method"),
        ("Uniform8", "is no method"),
        (
            "uniform9",
            "unknown method 'uniform9': choose from float32, bf16, uniform2 to uniform8, mxint2 "
            "to mxint8",
        ),
        ("uniform1", "unknown method"),
        ("dynasty@much", "has the target 'much'"),
        ("dynasty@20", r"target_speedup must be in \[1, 16\]"),
        ("uniform8@5", "uniform8 takes no target"),
        ("float32@5", "float32 takes no target"),
        ("float32:interval=5", "has no blocks: it takes no options, not interval"),
        ("dynasty@5:interval", "has the option 'interval'"),
        ("dynasty@5:interval=5,interval=6", "names an option twice"),
    ],
)
def test_what_is_no_method(text, message):
    with pytest.raises(ValueError, match=message):
        Method.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dynasty", "dynasty needs a speedup to steer to: write dynasty@5.1, or give --targets"),
        ("dynasty@5:frobnicate=1", "frobnicate"),
        ("dynasty@5:interval=often", "dynasty@5:interval=often: "),
        ("dynasty@5:smoothing=2", "smoothing must be in"),
        ("uniform8:block_shape=3x3", "block_shape"),
        ("uniform8:target=1", "target"),
        ("dynasty@5:noise_budget=1", "not both"),
    ],
)
def test_options_are_checked_before_anything_runs(text, message):
    with pytest.raises(ValueError, match=message):
        Method.parse(text).check()


@pytest.mark.parametrize("name", ["rest", "other_layers"])
def test_either_name_of_an_option_reaches_the_plugin(name):
    plugin = Method.parse(f"uniform8:{name}=bf16").make_plugin(seed=1)
    assert plugin.other_layers == "bf16"


def test_commas_separate_methods_and_their_options():
    methods = parse_methods(
        [
            "float32, dynasty@4:interval=25,bits_of=none,uniform8".replace(
                ",bits_of=none", ",loss_guard=3"
            ),
            "uniform8",
        ]
    )
    assert list(map(str, methods)) == ["float32", "dynasty@4:interval=25,loss_guard=3", "uniform8"]
    words = parse_methods(["uniform:bits=X:4/W:8/E:8,uniform:bits=X:8/W:4/E:8"])
    assert list(map(str, words)) == ["uniform:bits=X:4/W:8/E:8", "uniform:bits=X:8/W:4/E:8"]
    with pytest.raises(ValueError, match="no method is named"):
        parse_methods([" , "])


def test_targets_go_to_methods_that_need_one():
    methods = parse_methods(
        ["float32,dynasty,dynasty@3,dynasty:noise_budget=0.5,uniform8"], [4, 5.1]
    )
    assert list(map(str, methods)) == [
        "float32",
        "dynasty@4",
        "dynasty@5.1",
        "dynasty@3",
        "dynasty:noise_budget=0.5",
        "uniform8",
    ]


def test_plugin_and_callback():
    assert Method.parse("bf16").make_plugin(seed=1) is None
    assert Method.parse("bf16").make_callback(interval=50) is None
    plugin = Method.parse("mxint8").make_plugin(seed=3, mode="exact", block_shape=(4, 4))
    assert (plugin.format.block_shape, plugin.mode, plugin.seed) == ((1, 32), "exact", 3)
    assert Method.parse("uniform8").make_plugin(seed=3, block_shape=(8, 8)).format.block_shape == (
        8,
        8,
    )
    assert Method.parse("uniform8:exclude=head,unquantized=E").make_plugin(seed=0).exclude == (
        "head",
    )
    callback = Method.parse("dynasty@5.1:smoothing=0.5,interval=7").make_callback(interval=50)
    assert isinstance(callback.policy, DynastyPolicy)
    assert (callback.target_speedup, callback.policy.smoothing, callback.schedule.interval) == (
        5.1,
        0.5,
        7,
    )
    uniform = Method.parse("mxint4").make_callback(interval=9)
    assert isinstance(uniform.policy, UniformPolicy)
    assert (uniform.policy.bits, uniform.schedule.interval) == (4, 9)
