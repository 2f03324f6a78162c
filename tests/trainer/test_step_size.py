"""Effective step sizes, against what the optimizers do."""

import pytest
import torch
from torch import nn

from dynasty_lightning.trainer.step_size import effective_step_sizes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.25},
    ],
    ids=str,
)
def test_sgd_moves_so_far_for_one_impulse(options):
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.2, **options)
    # The first gradient enters the momentum undamped, so the impulse comes second.
    for step in range(400):
        weight.grad = torch.full_like(weight, 1.0 if step == 1 else 0.0)
        optimizer.step()
    moved = -float(weight.detach()[0])
    expected = effective_step_sizes([optimizer])[id(weight)]
    # Nesterov applies an impulse once more at once: it moves by lr (1 + m / (1 - m)) = lr / (1 - m)
    # as well.
    assert moved == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_divides_by_the_root_of_its_second_moment(kind):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(200))
    optimizer = kind([weight], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(300):
        weight.grad = 0.5 * torch.randn(200)
        optimizer.step()
    # Noise of root mean square 0.5: a unit of gradient moves the weight by lr / 0.5, all steps
    # together.
    assert effective_step_sizes([optimizer])[id(weight)] == pytest.approx(1e-3 / 0.5, rel=0.05)


def test_several_groups_and_optimizers():
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    sizes = effective_step_sizes(
        [
            torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b]}], lr=0.5),
            torch.optim.Adam([c]),
        ]
    )
    assert sizes == {id(a): 1.0, id(b): 0.5, id(c): 1e-3}
