"""Cost laws: their rules, the price of a bit by them, and a run that is steered in one."""

from dataclasses import replace

import pytest

from dynasty_lightning import DynastyCallback
from dynasty_lightning.cost.counts import GemmCost
from dynasty_lightning.cost.law import BITS, TABLES, CostLaw, cost_law, mean_factor
from dynasty_lightning.numerics.roles import Gemm, Role
from dynasty_lightning.policy.baselines.widths import EQUAL_SHARES, width_cost
from dynasty_lightning.policy.sensitivity import bit_price, offered_bits
from dynasty_lightning.policy.statistics import example_layer

X, W, E = Role


def counted(bits):
    return tuple(float(b == bits) for b in range(9))


def layer(x, w, e, *, macs, law=TABLES, **options):
    return replace(
        example_layer(),
        macs=macs,
        histogram={X: counted(x), W: counted(w), E: counted(e)},
        law=law,
        **options,
    )


def test_laws_by_name():
    assert cost_law("bits") == BITS
    assert cost_law("core") is TABLES
    with pytest.raises(ValueError, match="'bits' or 'core', not 'energy'"):
        cost_law("energy")


@pytest.mark.parametrize(
    "serial", [(0, 1, 2, 3), (1, 1, 2, 3, 4, 5, 6, 7, 8), (0, 2, 1, 3, 4, 5, 6, 7, 8)]
)
def test_factors_are_nine_begin_with_zero_and_do_not_fall(serial):
    with pytest.raises(ValueError, match="do not fall"):
        CostLaw(name="x", unit="", serial=serial, stationary=BITS.serial, zero_charge=0)


def test_prices_of_the_engine_of_tables():
    # Planes of the serial operand, four at least, times passes of four bits of the other.
    for serial in range(2, 9):
        for stationary in range(2, 9):
            assert TABLES.price(serial, stationary) == max(serial, 4) * -(-stationary // 4)
    cheapest = TABLES.cheapest()
    assert cheapest[5, 3] == cheapest[3, 5] == 5  # the wider one is serial
    assert cheapest[5, 8] == 10
    assert cheapest[0, 8] == 0
    assert mean_factor(TABLES.serial, [1, 0, 1, 0, 0, 0, 0, 0, 2]) == (0 + 4 + 8 + 8) / 4
    assert mean_factor(TABLES.serial, [0] * 9) == 0.0


def test_width_cost_by_law():
    widths = {X: 3, W: 8, E: 5}
    # FORWARD 3 x 8: 8 planes, one pass; DGRAD 5 x 8: 5 planes, two passes; WGRAD 5 x 3: 5 planes.
    assert width_cost(EQUAL_SHARES, widths, TABLES) == pytest.approx((8 + 10 + 5) / 3 / 16)
    assert width_cost(EQUAL_SHARES, widths) == pytest.approx((24 + 40 + 15) / 3 / 64)


@pytest.mark.parametrize(("bits", "role"), [((6, 3, 4), X), ((6, 3, 4), E), ((5, 8, 4), X)])
def test_price_of_a_serial_bit_is_what_one_more_costs(bits, role):
    gemm = Gemm.FORWARD if role is X else Gemm.DGRAD
    s = layer(*bits, macs={gemm: 1000})
    partner = bits[W]
    # By difference: the same GEMM with a bit more, per MAC; widths of four and more have no floor.
    more = TABLES.serial[bits[role] + 1] - TABLES.serial[bits[role]]
    expected = 1000 * more * TABLES.stationary[partner] / (64.0 * 16 * 1000)
    assert bit_price(s, role, 64.0, 1000) == pytest.approx(expected)


def test_price_of_a_stationary_operand_is_that_of_a_pass():
    s = layer(6, 4, 4, macs={Gemm.FORWARD: 1000})
    # W at four bits, against X's six planes: a pass costs six planes more, weighed three times.
    assert bit_price(s, W, 64.0, 1000) == pytest.approx(3 * 6 * 1000 / (64.0 * 16 * 1000))
    # Backward reads no more than its limit: no pass to pay for.
    limited = replace(
        layer(8, 4, 6, macs={Gemm.DGRAD: 1000}), unlimited={W: 0.5}, backward_bits={W: 4.0}
    )
    assert bit_price(limited, W, 64.0, 1000) == 0.0


def test_widths_that_are_worth_their_price():
    macs = dict.fromkeys(Gemm, 1000)
    # W is stationary in both of its GEMMs, X serial in FORWARD; E serial.
    s = layer(6, 4, 5, macs=macs)
    assert offered_bits(s, W) == (4, 8)
    assert offered_bits(s, X) == (4, 5, 6, 7, 8)
    assert offered_bits(s, E) == (4, 5, 6, 7, 8)
    # The wider operand is serial.
    assert offered_bits(layer(4, 6, 4, macs={Gemm.FORWARD: 1000}), X) == (4, 8)
    assert offered_bits(layer(4, 6, 4, macs={Gemm.FORWARD: 1000}), W) == (4, 5, 6, 7, 8)
    # A GEMM that reads at most four bits has no say: W in DGRAD.
    limited = layer(4, 6, 8, macs={Gemm.FORWARD: 1000, Gemm.DGRAD: 9000}, unlimited={W: 0.5})
    assert offered_bits(limited, W) == (4, 5, 6, 7, 8)
    assert offered_bits(replace(s, law=BITS), W) == ()


def test_widths_nobody_counted_are_all_the_mean():
    macs = {Gemm.FORWARD: 1000}
    without = replace(layer(8, 8, 8, macs=macs), histogram={})
    without = replace(without, mean_bits={X: 6.5, W: 4.0, E: 2.0})
    halves = {X: (0, 0, 0, 0, 0, 0, 1, 1, 0), W: counted(4), E: counted(2)}
    between = replace(layer(8, 8, 8, macs=macs), histogram=halves)
    for role in (X, W):
        assert bit_price(without, role, 64.0, 1000) == bit_price(between, role, 64.0, 1000)


def test_counts_of_before_cost_laws_are_read():
    old = GemmCost(macs=3, products=5, products_charged=5, baseline=7)
    assert GemmCost.from_list(old.to_list()[:-3]) == old
    assert GemmCost.from_list(old.to_state()) == old
    assert len(old.to_state()) == len(old.to_list()) - 3
    assert old.speedup_engine is None
    assert old.speedup(BITS) == old.speedup_charged
    priced = GemmCost(baseline=64, products_charged=32, engine_baseline=16, engine_charged=4)
    assert GemmCost.from_list(priced.to_state()) == priced
    assert (priced.speedup(TABLES), priced.speedup_engine) == (4.0, 4.0)
    assert priced.speedup(BITS) == priced.speedup_charged == 2.0
    assert priced.at_baseline().speedup(TABLES) == 1.0
    with pytest.raises(ValueError, match="zip"):
        GemmCost.from_list([1.0] * 4)


def test_zero_blocks_alone_are_charged_in_the_laws_own_currency():
    # No pair is occupied: no baseline, and yet no bit products.
    nothing = GemmCost(products_charged=4096, engine_charged=1024)
    assert nothing.spent(TABLES) == 1024
    assert nothing.full(TABLES) == 0
    assert nothing.spent(BITS) == 4096


def test_schedules_that_count_bit_products_refuse_another_law():
    with pytest.raises(ValueError, match="'cpt', whose schedule counts bit products"):
        DynastyCallback(policy="cpt", target_speedup=3.0, cost="core")
    for cost in ("joules", ["core"], None):
        with pytest.raises(ValueError, match="cost must be 'bits' or 'core'"):
            DynastyCallback(target_speedup=3.0, cost=cost)


def test_what_a_law_cannot_give_is_said():
    # When training begins: configurations and committed records are read in silence.
    asked = DynastyCallback(target_speedup=8.0, cost="core").options
    with pytest.warns(UserWarning, match="8 with cost='core': blocks of 4 bits are 4 times faster"):
        asked.warn_of_reach()
    DynastyCallback(target_speedup=8.0).options.warn_of_reach()
    DynastyCallback(target_speedup=4.0, cost="core").options.warn_of_reach()
    with pytest.raises(ValueError, match="backward_bits=X:3 save nothing with cost='core'"):
        DynastyCallback(target_speedup=3.0, cost="core", backward_bits={"X": 3, "W": 4})


def test_a_checkpoint_of_another_cost_law_is_refused():
    saved = DynastyCallback(target_speedup=3.0, cost="core").state_dict()
    DynastyCallback(target_speedup=3.0, cost="core").load_state_dict(saved)
    with pytest.raises(ValueError, match="trained with cost='core', this run has cost='bits'"):
        DynastyCallback(target_speedup=3.0).load_state_dict(saved)
    plain = DynastyCallback(target_speedup=3.0).state_dict()
    assert "cost_law" not in plain
    with pytest.raises(ValueError, match="trained with cost='bits', this run has cost='core'"):
        DynastyCallback(target_speedup=3.0, cost="core").load_state_dict(plain)


def test_of_two_roles_that_cost_the_same_one_is_serial():
    # All at one width: FORWARD reads X first, DGRAD and WGRAD read E first.
    macs = dict.fromkeys(Gemm, 1000)
    for bits in (4, 6, 8):
        s = layer(bits, bits, bits, macs=macs)
        assert offered_bits(s, W) == (4, 8)
        assert offered_bits(s, E) == (4, 5, 6, 7, 8)
        assert offered_bits(layer(bits, bits, bits, macs={Gemm.WGRAD: 1000}), X) == (4, 8)
