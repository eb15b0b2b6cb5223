"""The reference is itself checked: its hand-derived gradients against plain autograd, its routing by eye."""

from __future__ import annotations

import pytest
import torch

from reference import flylora as reference


def _problem(selection: str) -> tuple[list[list[float]], list[list[float]], list[reference.Block]]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> list[list[float]]:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).tolist()

    blocks = [
        reference.Block(draw(5, 6), draw(4, 5), [0, 3, -2, 1, 0], 2, 0.7, selection, 0.1),
        reference.Block(draw(3, 6), draw(4, 3), [0, 0, 0], 1, 0.7, selection, 0.1),
    ]
    return draw(7, 6), draw(4, 6), blocks


@pytest.mark.parametrize("selection", ["magnitude", "signed", "biased_magnitude", "all"])
def test_gradients_agree_with_autograd_through_a_masked_product(selection: str) -> None:
    tokens, weight, blocks = _problem(selection)
    grad = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    result = reference.run(tokens, weight, None, blocks, grad.tolist())

    x = torch.tensor(tokens, dtype=torch.float64, requires_grad=True)
    base = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    ups = [torch.tensor(block.B, dtype=torch.float64, requires_grad=True) for block in blocks]
    out = x @ base.t()
    for block, up, chosen in zip(blocks, ups, result.chosen, strict=True):
        mask = torch.tensor([[float(i in ranks) for i in range(block.r)] for ranks in chosen])
        y = x @ torch.tensor(block.A, dtype=torch.float64).t()
        out = out + block.scaling * (y * mask) @ up.t()
    out.backward(grad)

    torch.testing.assert_close(torch.tensor(result.output, dtype=torch.float64), out.detach())
    torch.testing.assert_close(torch.tensor(result.grad_x, dtype=torch.float64), x.grad)
    torch.testing.assert_close(torch.tensor(result.grad_weight, dtype=torch.float64), base.grad)
    for up, grad_up in zip(ups, result.grad_B, strict=True):
        torch.testing.assert_close(torch.tensor(grad_up, dtype=torch.float64), up.grad)


def test_top_ranks_takes_the_largest() -> None:
    assert reference.top_ranks([0.1, 0.9, 0.5, 0.9], 3) == {1, 2, 3}
    assert reference.top_ranks([1.0, 1.0, 1.0], 2) == {0, 1}


def test_each_selection_can_choose_differently() -> None:
    identity = [[float(i == j) for j in range(6)] for i in range(6)]
    x = [-3.0, 2.0, 0.1, 0.0, 0.0, 0.0]
    chosen = {}
    for selection in reference.SCORES:
        block = reference.Block(identity, identity, [0, 0, 0, 0, 0, -40], 1, 1.0, selection, 0.1)
        chosen[selection] = reference.run([x], None, None, [block], [[0.0] * 6]).chosen[0][0]
    assert chosen == {"magnitude": {0}, "signed": {1}, "biased_magnitude": {5}}


def test_balance_step_pulls_towards_the_mean() -> None:
    assert reference.balance_step([0, 0, 5, -1], [4, 0, 2, 2]) == [-1, 1, 5, -1]


def test_grid_and_density_helpers() -> None:
    assert reference.on_bfloat16_grid(0.15625)
    assert not reference.on_bfloat16_grid(0.1)
    assert reference.nonzeros_per_row(0.25, 10) == 2  # round half to even, as Python does
    assert reference.nonzeros_per_row(0.001, 10) == 1
