"""`using_executor`: whose GEMMs an executor computes, for how long, and what it leaves behind."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.gemms import EXECUTORS, using_executor
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.numerics.roles import Gemm


@pytest.fixture
def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    convert(model, mode="exact")
    return model


def giving(value: float, calls: list[tuple[Gemm, int]] | None = None) -> Callable[..., Tensor]:
    def execute(gemm: Gemm, left, right, plan, input_shape) -> Tensor:
        if calls is not None:
            calls.append((gemm, plan.layer_index))
        shapes = (plan.output_shape(input_shape), input_shape, plan.geometry.weight_shape)
        return torch.full(shapes[gemm], value)

    return execute


def plans(network: nn.Module) -> list[object]:
    return [layer.plan for layer in dynamic_layers(network).values()]


def test_all_three_gemms_of_all_layers_are_the_executors(network: nn.Module) -> None:
    before, calls = plans(network), []
    with using_executor(network, giving(1.0, calls)):
        network(torch.randn(3, 8).requires_grad_()).sum().backward()
    assert set(calls) == {(gemm, index) for gemm in Gemm for index in (0, 1)}
    assert len(calls) == 6
    assert all(torch.equal(m.weight.grad, torch.ones_like(m.weight)) for m in network[::2])
    assert all(a is b for a, b in zip(plans(network), before, strict=True))
    network(torch.randn(3, 8)).sum().backward()
    assert len(calls) == 6


def test_one_layer_alone_can_be_given(network: nn.Module) -> None:
    calls: list[tuple[Gemm, int]] = []
    with using_executor(network[2], giving(1.0, calls)), torch.no_grad():
        network(torch.randn(3, 8))
    assert calls == [(Gemm.FORWARD, 1)]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_gives_the_plans_back_and_forgets_the_executor(
    network: nn.Module, error: type[BaseException]
) -> None:
    before, known = plans(network), dict(EXECUTORS)

    def failing(*_: object) -> Tensor:
        raise error

    with pytest.raises(error), using_executor(network, failing):
        network(torch.randn(3, 8))
    assert plans(network) == before
    assert known == EXECUTORS


def test_blocks_in_each_other_restore_the_outer_one(network: nn.Module) -> None:
    x, seen = torch.randn(3, 8), []
    with torch.no_grad():
        own = network(x)
        network[2].bias.zero_()
        with using_executor(network, giving(1.0)):
            with suppress(ZeroDivisionError), using_executor(network, giving(2.0)):
                seen.append(network(x))
                raise ZeroDivisionError
            with using_executor(network, giving(3.0)):
                seen.append(network(x))
            seen.append(network(x))
        assert [float(y.unique()) for y in seen] == [2.0, 3.0, 1.0]
        assert not torch.equal(network(x), seen[-1])
        assert network(x).shape == own.shape


def test_backward_after_the_block_is_refused_with_the_executors_name(network: nn.Module) -> None:
    with using_executor(network, giving(1.0), name="mine"):
        y = network(torch.randn(3, 8))
    with pytest.raises(RuntimeError, match=r"'mine/\d+' that computes \w+ of layer 1 is closed"):
        y.sum().backward()


def test_two_blocks_of_one_name_are_two(network: nn.Module) -> None:
    other = nn.Sequential(nn.Linear(8, 4))
    convert(other, mode="exact")
    with (
        torch.no_grad(),
        using_executor(network, giving(1.0), name="same"),
        using_executor(other, giving(2.0), name="same"),
    ):
        y, z = network(torch.randn(3, 8)), other(torch.randn(3, 8))
    assert torch.allclose(y - network[2].bias, torch.tensor(1.0))
    assert torch.allclose(z - other[0].bias, torch.tensor(2.0))


def test_a_network_without_converted_layers_runs_as_it_is() -> None:
    plain = nn.Linear(8, 4)
    plain.plan = "no plan of a layer"
    with using_executor(plain, giving(1.0)):
        assert not torch.equal(plain(torch.randn(3, 8)), torch.ones(3, 4))
    assert plain.plan == "no plan of a layer"


def test_only_a_module_and_a_function_are_taken(network: nn.Module) -> None:
    with pytest.raises(TypeError, match="not None"), using_executor(None, print):
        pass
    with pytest.raises(TypeError, match="5 cannot be"), using_executor(network, 5):
        pass


@pytest.mark.parametrize(
    ("result", "met"),
    [
        (torch.zeros(1), r"torch.float32 \(1,\)"),
        (torch.zeros(2, 4).double(), r"torch.float64 \(2, 4\)"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_result_of_a_gemm_is_refused(result, met):
    network = nn.Sequential(nn.Linear(8, 4))
    convert(network)
    with (
        using_executor(network, lambda *call: result, name="mine"),
        pytest.raises(ValueError, match=rf"'mine/\d+' must return FORWARD of .*, not {met}"),
    ):
        network(torch.ones(2, 8))
