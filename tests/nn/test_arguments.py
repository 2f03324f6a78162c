"""What passes through the fused operators: named here and flat there, in one order."""

import pytest
import torch

from dynasty_lightning.nn.arguments import BackwardInputs, Forwarded, ForwardInputs, Packed
from dynasty_lightning.nn.gemms import Requests, recipe_of, settings_of
from dynasty_lightning.nn.plan import LayerPlan
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Gemm, Role

PLAN = LayerPlan(geometry=LayerGeometry(kind="linear", weight_shape=(8, 16)))


@pytest.mark.parametrize(
    ("name", "inputs"), [("layer_forward", ForwardInputs), ("layer_backward", BackwardInputs)]
)
def test_a_schema_has_the_named_fields_in_their_order(name, inputs):
    schema = getattr(torch.ops.dynasty, name).default._schema
    assert tuple(argument.name for argument in schema.arguments) == inputs._fields


def test_forwarded_is_flat_at_the_border_and_named_within():
    schema = torch.ops.dynasty.layer_forward.default._schema
    outputs = [torch.tensor(n) for n in range(len(schema.returns))]
    forwarded = Forwarded.from_flat(outputs)
    assert [int(t) for t in forwarded.flat()] == list(range(len(outputs)))
    assert isinstance(forwarded.w, Packed)
    assert (int(forwarded.w.headers), int(forwarded.x_headers)) == (8, 11)


@pytest.mark.parametrize("gemm", [Gemm.FORWARD, Gemm.WGRAD])
@pytest.mark.parametrize("ask", [{"bits": 7}, {"lsb_exponent": -4, "least_bits": 2}])
def test_a_precision_reaches_the_recipe(gemm, ask):
    precision = OperandPrecision(**ask, backward_bits=5)
    eight = settings_of(None)
    requests = Requests(
        precision.values, precision.values, precision.values, [*settings_of(precision), *eight * 2]
    )
    recipe = recipe_of(PLAN, Role.ACTIVATION, gemm, requests)
    in_backward = gemm is Gemm.WGRAD
    assert recipe.is_threshold == (precision.bits is None)
    assert recipe.least_bits == precision.least_bits
    assert recipe.most_bits == (5 if in_backward else 8)
    if precision.bits is not None:
        assert int(recipe.request) == (5 if in_backward else 7)


def test_shifting_a_role_leaves_the_others():
    lsb = torch.tensor(-4, dtype=torch.int16)
    shifted = Requests(lsb, lsb, lsb, [1, 0, 8, 8, 0x876543220] * 3).shifted(Role.ERROR, 1)
    assert [int(shifted.of(role)) for role in Role] == [-4, -4, -3]
