"""The pure functions against the literal reference, and their own promises."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flylora import functional
from flylora.functional import Adapter, Block, Frozen
from flylora.projection import densify, derive_seed, draw_nonzeros
from reference import flylora as reference

SELECTIONS = ("magnitude", "signed", "biased_magnitude", "random", "all")
MODEST = settings(max_examples=25, deadline=None, derandomize=True)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def routed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *adapter: Any) -> Tensor:
    """The frozen product and the routed update in one pass."""
    return functional.routed_update(x, Frozen(weight, bias), Adapter(*adapter))


def routed_update(base: Tensor, x: Tensor, *adapter: Any) -> Tensor:
    """The routed update of a base output that was computed before."""
    return functional.routed_update(x, base, Adapter(*adapter))


class Problem:
    """Random tensors for one layer; everything on the bfloat16 grid, so that any dtype holds the same numbers."""

    def __init__(self, tokens: int, n: int, m: int, blocks: list[Block], seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator) * scale
            # Few mantissa bits: exact in float16 and bfloat16 alike.
            return (values * 16).round().clamp(-120, 120).div(16).to(dtype)

        self.blocks = tuple(blocks)
        self.ranks = [block.r for block in blocks]
        total = sum(self.ranks)
        self.scaling, self.rate = 0.75, 0.05
        self.x, self.grad = draw(tokens, n), draw(tokens, m)
        self.weight, self.bias = draw(m, n), draw(m)
        self.up = draw(m, total)
        self.projection = draw(total, n).float() if dtype != torch.float64 else draw(total, n)
        self.steps = torch.randint(-12, 13, (total,), generator=generator)
        self.mask = torch.rand(tokens, generator=generator) < 0.7

    @property
    def routing_bias(self) -> Tensor:
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        return self.steps.to(dtype) * self.rate

    def reference_blocks(self) -> list[reference.Block]:
        parts = zip(
            self.blocks,
            self.projection.double().split(self.ranks),
            self.up.double().split(self.ranks, dim=1),
            self.steps.split(self.ranks),
            strict=True,
        )
        return [
            reference.Block(
                down.tolist(), up.tolist(), steps.tolist(), block.k, self.scaling, block.selection, self.rate
            )
            for block, down, up, steps in parts
        ]

    def margin(self) -> float:
        """How near any token is to another choice: below it, rounding decides and nothing can be compared."""
        tokens = self.x.double().tolist()
        blocks = [block for block in self.reference_blocks() if block.selection != "random"]
        return min((reference.margin(x, block) for x in tokens for block in blocks), default=1.0)

    def chosen(self) -> list[list[set[int]]]:
        """Per block and token, what `select` says."""
        y = functional.project(self.x, self.projection)
        parts, start = [], 0
        picked = functional.select(y, self.routing_bias, self.blocks)
        for block in self.blocks:
            width = block.r if block.is_linear else block.k
            inside = [sorted(i for i in row if start <= i < start + block.r) for row in picked.tolist()]
            assert all(len(row) == len(set(row)) == width for row in inside)
            parts.append([{i - start for i in row} for row in inside])
            start += block.r
        assert all(len(row) == sum(len(part[t]) for part in parts) for t, row in enumerate(picked.tolist()))
        return parts

    def expected(self, with_bias: bool) -> reference.Result:
        chosen = self.chosen() if any(block.selection == "random" for block in self.blocks) else None
        return reference.run(
            self.x.double().tolist(),
            self.weight.double().tolist(),
            self.bias.double().tolist() if with_bias else None,
            self.reference_blocks(),
            self.grad.double().tolist(),
            counted=self.mask.tolist(),
            chosen=chosen,
        )


@st.composite
def shapes(draw: Any, selection: str) -> dict[str, Any]:
    count = draw(st.integers(1, 3))
    equal = draw(st.booleans())
    blocks: list[Block] = []
    for _ in range(count):
        if blocks and equal:
            blocks.append(blocks[0])
            continue
        r = draw(st.integers(1, 6))
        blocks.append(Block(r, draw(st.integers(1, r)), selection, draw(st.integers(0, 2**32 - 1))))  # type: ignore[arg-type]
    return {
        "tokens": draw(st.integers(1, 6)),
        "n": draw(st.integers(1, 9)),
        "m": draw(st.integers(1, 7)),
        "blocks": blocks,
        "seed": draw(st.integers(0, 10_000)),
    }


def _close(actual: Tensor, expected: Any, dtype: torch.dtype) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(actual.shape)
    tolerance = TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance)


def _run_and_compare(problem: Problem, fused: bool, with_bias: bool, leading: tuple[int, ...]) -> None:
    dtype = problem.x.dtype
    x = problem.x.reshape(*leading, -1).clone().requires_grad_()
    up = problem.up.clone().requires_grad_()
    total = up.shape[1]
    load = torch.zeros(total, dtype=torch.int64)
    bias = problem.bias if with_bias else None
    routing = (problem.projection, up, problem.routing_bias, problem.blocks, problem.scaling, load, problem.mask)
    result = problem.expected(with_bias)
    if fused:
        base = None
        out = routed_linear(x, problem.weight, bias, *routing)
    else:
        # The base is a leaf: its gradient and x's through the update alone are seen apart.
        base = torch.nn.functional.linear(x.detach(), problem.weight, bias).requires_grad_()
        out = routed_update(base, x, *routing)
    assert out.dtype == dtype
    assert out.shape == (*leading, problem.weight.shape[0])
    assert not load.any(), "forward alone must not count"
    out.backward(problem.grad.reshape(out.shape))

    _close(out.detach(), result.output, dtype)
    grad_x = torch.tensor(result.grad_x, dtype=torch.float64)
    if base is not None:
        torch.testing.assert_close(base.grad, problem.grad.reshape(out.shape), rtol=0, atol=0)
        grad_x = grad_x - problem.grad.double() @ problem.weight.double()
    assert x.grad is not None
    assert up.grad is not None
    assert x.grad.dtype == up.grad.dtype == dtype
    _close(x.grad, grad_x.tolist(), dtype)
    _close(up.grad, torch.cat([torch.tensor(part) for part in result.grad_B], dim=1).tolist(), dtype)
    if all(block.is_linear for block in problem.blocks):
        assert not load.any()  # nothing to balance
    else:
        assert load.tolist() == [count for part in result.counts for count in part]


@pytest.mark.parametrize("fused", [False, True], ids=["update", "fused"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_output_gradients_and_counts_equal_the_reference(selection: str, dtype: torch.dtype, fused: bool) -> None:
    @MODEST
    @given(shapes(selection), st.booleans())
    def check(shape: dict[str, Any], with_bias: bool) -> None:
        problem = Problem(**shape, dtype=dtype)
        assume(problem.margin() > 1e-5)
        _run_and_compare(problem, fused, with_bias, (shape["tokens"],))

    check()


@pytest.mark.parametrize("fused", [False, True], ids=["update", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("selection", ["magnitude", "signed"])
def test_half_precision_stays_near_the_reference(selection: Any, dtype: torch.dtype, fused: bool) -> None:
    problem = Problem(24, 12, 10, [Block(6, 2, selection), Block(4, 3, selection)], 5, dtype)
    assert problem.margin() > 1e-5
    _run_and_compare(problem, fused, True, (2, 3, 4))


def test_blocks_may_differ_in_selection_and_be_partly_linear() -> None:
    blocks = [Block(4, 2, "magnitude"), Block(3, 3, "signed"), Block(5, 2, "all"), Block(5, 1, "signed")]
    problem = Problem(9, 8, 6, blocks, 1, torch.float64)
    for fused in (False, True):
        _run_and_compare(problem, fused, False, (3, 3))


@pytest.mark.parametrize("fused", [False, True], ids=["update", "fused"])
def test_strided_inputs_and_gradients(fused: bool) -> None:
    problem = Problem(12, 8, 6, [Block(6, 2)], 2, torch.float64)
    wide = torch.stack([problem.x, problem.x], dim=-1).transpose(0, 1)  # (n, N, 2)
    x = wide[..., 0].t().detach().requires_grad_()
    assert not x.is_contiguous()
    up = problem.up.t().contiguous().t().requires_grad_()
    grad = problem.grad.t().contiguous().t()
    routing = (problem.projection, up, problem.routing_bias, problem.blocks, problem.scaling)
    weight = problem.weight.t().contiguous().t()
    base = torch.nn.functional.linear(x, weight)
    out = routed_linear(x, weight, None, *routing) if fused else routed_update(base, x, *routing)
    out.backward(grad)
    result = problem.expected(with_bias=False)
    _close(out.detach(), result.output, torch.float64)
    _close(x.grad, result.grad_x, torch.float64)  # type: ignore[arg-type]
    _close(up.grad, result.grad_B[0], torch.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "blocks", [[Block(6, 6)], [Block(6, 2, "all")], [Block(3, 3, "signed"), Block(2, 2, "random")]]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_k_equal_r_is_lora_with_a_frozen_a(blocks: list[Block], dtype: torch.dtype) -> None:
    problem = Problem(10, 7, 5, blocks, 7, dtype)
    down = problem.projection.to(dtype)
    x, up = problem.x.clone().requires_grad_(), problem.up.clone().requires_grad_()
    dense = problem.weight + problem.scaling * up @ down
    plain = torch.nn.functional.linear(x, dense, problem.bias)
    wanted = torch.autograd.grad(plain, (x, up), problem.grad)
    routing = (problem.projection, up, problem.routing_bias, problem.blocks, problem.scaling)
    for out in (
        routed_linear(x, problem.weight, problem.bias, *routing),
        routed_update(torch.nn.functional.linear(x, problem.weight, problem.bias), x, *routing),
    ):
        _close(out.detach(), plain.tolist(), dtype)
        for actual, expected in zip(torch.autograd.grad(out, (x, up), problem.grad), wanted, strict=True):
            _close(actual, expected.tolist(), dtype)


@pytest.mark.parametrize("selection", SELECTIONS[:4])
@pytest.mark.parametrize("blocks", [[(8, 3)], [(8, 3), (8, 3)], [(8, 3), (5, 1)]], ids=["one", "equal", "unequal"])
def test_exactly_k_ranks_act_on_each_token(selection: Any, blocks: list[tuple[int, int]]) -> None:
    problem = Problem(50, 20, 4, [Block(r, k, selection) for r, k in blocks], 3, torch.float64)
    problem.x = torch.randn(50, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # no y is 0
    identity = torch.eye(sum(problem.ranks), dtype=torch.float64)
    base = torch.zeros(50, len(identity), dtype=torch.float64)
    codes = routed_update(base, problem.x, problem.projection, identity, problem.routing_bias, problem.blocks, 1.0)
    y = problem.x @ problem.projection.t()
    torch.testing.assert_close(codes, torch.where(codes != 0, y, 0.0))
    for part, (_, k) in zip((codes != 0).split(problem.ranks, dim=1), blocks, strict=True):
        assert (part.sum(dim=1) == k).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_b_gives_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    problem = Problem(40, 24, 16, [Block(8, 2)], 4, dtype)
    up = torch.zeros_like(problem.up)
    base = torch.nn.functional.linear(problem.x, problem.weight, problem.bias)
    routing = (problem.projection, up, problem.routing_bias, problem.blocks, problem.scaling)
    assert torch.equal(routed_update(base, problem.x, *routing), base)
    assert torch.equal(routed_linear(problem.x, problem.weight, problem.bias, *routing), base)
    strided = problem.x.view(5, 8, 24).transpose(0, 1)
    for bias in (None, problem.bias):
        base = torch.nn.functional.linear(strided, problem.weight, bias)
        assert torch.equal(routed_linear(strided, problem.weight, bias, *routing), base)


def test_the_given_base_output_is_left_alone() -> None:
    problem = Problem(6, 5, 4, [Block(4, 2)], 4, torch.float32)
    base = torch.nn.functional.linear(problem.x, problem.weight)
    before = base.clone()
    routing = (problem.projection, problem.up, problem.routing_bias, problem.blocks, problem.scaling)
    routed_update(base, problem.x, *routing)
    assert torch.equal(base, before)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,)], ids=str)
def test_empty_batches_and_single_vectors(shape: tuple[int, ...]) -> None:
    problem = Problem(1, 5, 4, [Block(4, 2)], 4, torch.float32)
    x = torch.ones(shape, requires_grad=True)
    up = problem.up.clone().requires_grad_()
    load = torch.zeros(4, dtype=torch.int64)
    routing = (problem.projection, up, problem.routing_bias, problem.blocks, problem.scaling, load)
    out = routed_linear(x, problem.weight, problem.bias, *routing)
    assert out.shape == (*shape[:-1], 4)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert int(load.sum()) == 2 * (x.numel() // 5)


# --- counting ------------------------------------------------------------------------------------------------


def _counting(problem: Problem, load: Tensor, up: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return routed_linear(
        x, problem.weight, None, problem.projection, up, problem.routing_bias, problem.blocks, 1.0, load, mask
    )


def test_several_forwards_may_precede_their_backwards() -> None:
    """A layer used twice in one graph, or two losses computed before the first backward: each use counts once."""
    problem = Problem(7, 6, 5, [Block(6, 2)], 4, torch.float32)
    up = problem.up.clone().requires_grad_()
    other = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    apart = torch.zeros(6, dtype=torch.int64)
    for x in (problem.x, other):
        _counting(problem, apart, up, x).sum().backward()
    together, reverse = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    (_counting(problem, together, up, problem.x).sum() + _counting(problem, together, up, other).sum()).backward()
    first, second = _counting(problem, reverse, up, problem.x), _counting(problem, reverse, up, other)
    second.sum().backward()
    first.sum().backward()
    assert apart.tolist() == together.tolist() == reverse.tolist()
    assert int(apart.sum()) == 2 * (7 + 9)


def test_a_graph_can_be_walked_twice() -> None:
    problem = Problem(7, 6, 5, [Block(6, 2)], 4, torch.float32)
    up = problem.up.clone().requires_grad_()
    out = _counting(problem, torch.zeros(6, dtype=torch.int64), up, problem.x).sum()
    first = torch.autograd.grad(out, up, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, up)[0], first)


def test_only_the_gradient_of_b_counts() -> None:
    """A frozen adapter passes gradients on to x, but it is not trained and its experts' load is no one's business."""
    problem = Problem(7, 6, 5, [Block(6, 2)], 4, torch.float64)
    load = torch.zeros(6, dtype=torch.int64)
    x = problem.x.clone().requires_grad_()
    problem.scaling = 1.0
    _counting(problem, load, problem.up, x).backward(problem.grad)
    assert x.grad is not None
    _close(x.grad, problem.expected(with_bias=False).grad_x, torch.float64)
    assert not load.any()
    with torch.no_grad():
        _counting(problem, load, problem.up.clone().requires_grad_(), x)
    assert not load.any()


@MODEST
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 9), st.booleans())
def test_expert_load_equals_a_loop(seed: int, tokens: int, r: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = int(torch.randint(1, r + 1, (1,), generator=generator))
    indices = torch.rand(tokens, r, generator=generator).topk(k, dim=1).indices
    mask = torch.rand(tokens, generator=generator) < 0.5 if masked else None
    load = torch.arange(r)
    functional.add_expert_load(load, indices, mask)
    wanted = list(range(r))
    for t, row in enumerate(indices.tolist()):
        for rank in row:
            wanted[rank] += 1 if mask is None else int(mask[t])
    assert load.tolist() == wanted


# --- routing -------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    y, d = torch.tensor([[-3.0, 2.0, 0.5]]), torch.tensor([-1.5, 0.0, -4.0])
    assert functional.scores(y, d, "magnitude").tolist() == [[1.5, 2.0, -3.5]]
    assert functional.scores(y, d, "signed").tolist() == [[-4.5, 2.0, -3.5]]
    assert functional.scores(y, d, "biased_magnitude").tolist() == [[4.5, 2.0, 3.5]]
    for selection in ("all", "unheard_of"):
        with pytest.raises(ValueError, match=selection):
            functional.scores(y, d, selection)  # type: ignore[arg-type]


@pytest.mark.parametrize("selection", ["magnitude", "signed"])
def test_a_smaller_bias_never_raises_a_score(selection: Any) -> None:
    """The negative feedback that Eq. 9 needs; inside the absolute value it would be lost."""
    y = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    for low, high in combinations((-5.0, -0.1, 0.0, 0.1, 5.0), 2):
        below, above = (functional.scores(y, torch.full((8,), d), selection) for d in (low, high))
        assert (below < above).all()


def test_the_bias_moves_the_selection_and_never_the_output() -> None:
    problem = Problem(60, 12, 5, [Block(8, 2)], 9, torch.float64)
    y = functional.project(problem.x, problem.projection)
    plain = functional.select(y, torch.zeros(8, dtype=torch.float64), problem.blocks).sort(dim=1).values
    pushed = functional.select(y, problem.routing_bias * 4, problem.blocks).sort(dim=1).values
    same = (plain == pushed).all(dim=1)
    assert 0 < int(same.sum()) < len(same)
    outputs = [
        routed_linear(problem.x, problem.weight, None, problem.projection, problem.up, d, problem.blocks, 1.0)
        for d in (torch.zeros(8, dtype=torch.float64), problem.routing_bias * 4)
    ]
    assert torch.equal(outputs[0][same], outputs[1][same])


@pytest.mark.parametrize("selection", SELECTIONS[:3])
def test_every_dtype_routes_alike(selection: Any) -> None:
    """The same numbers choose the same ranks, whatever type carries them and under autocast too."""
    seed = derive_seed(0, "layer")
    projection = densify(draw_nonzeros(seed, 32, 96, 24), 96)
    x = torch.randn(3000, 96, generator=torch.Generator().manual_seed(1)).mul(16).round().clamp(-120, 120).div(16)
    steps = torch.randint(-20, 20, (32,), generator=torch.Generator().manual_seed(2))
    blocks = (Block(32, 8, selection),)

    def route(values: Tensor) -> Tensor:
        y = functional.project(values, projection)
        assert y.dtype == torch.promote_types(values.dtype, torch.float32)
        return functional.select(y, steps.to(y.dtype) * 1e-3, blocks).sort(dim=1).values

    wanted = route(x)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(route(x.to(dtype)), wanted)
        with torch.autocast("cpu", dtype):
            assert torch.equal(route(x), wanted)
            assert torch.equal(route(x.to(dtype)), wanted)
    # The check has teeth: the same product in bfloat16 chooses otherwise for some tokens.
    coarse = functional.select(x.bfloat16() @ projection.bfloat16().t(), steps.bfloat16() * 1e-3, blocks)
    assert not torch.equal(coarse.sort(dim=1).values, wanted)


def test_equal_blocks_route_as_each_would_alone() -> None:
    for selection in SELECTIONS[:4]:
        block = Block(6, 2, selection, noise_seed=5)  # type: ignore[arg-type]
        y = torch.randn(40, 18, generator=torch.Generator().manual_seed(1))
        y[:, 6:12] = y[:, :6]
        d = torch.linspace(-0.5, 0.5, 6).repeat(3)
        stacked = functional.select(y, d, (block,) * 3).view(40, 3, 2).sort(dim=2).values
        for i in range(3):
            alone = functional.select(y[:, 6 * i : 6 * i + 6], d[:6], (block,)).sort(dim=1).values
            assert torch.equal(stacked[:, i] - 6 * i, alone), (selection, i)


def test_random_selection_is_seeded_uniform_and_blind_to_the_bias() -> None:
    y = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(16)

    def route(seed: int, d: Tensor = zero) -> Tensor:
        return functional.select(y, d, (Block(16, 4, "random", seed),)).sort(dim=1).values

    before = torch.get_rng_state()
    first = route(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, route(1))
    assert torch.equal(first, route(1, torch.linspace(-9, 9, 16)))
    assert (first == route(2)).all(dim=1).double().mean() < 0.01
    load = Counter(first.flatten().tolist())
    assert reference.chi_square([load[i] for i in range(16)], 1000.0) < 40  # 15 degrees of freedom, less 1/4 of it
    pairs = Counter(pair for row in first.tolist() for pair in combinations(row, 2))
    assert reference.chi_square([pairs[pair] for pair in combinations(range(16), 2)], 200.0) < 190  # 120 pairs
    by_size = y.abs().topk(4, dim=1).indices.sort(dim=1).values
    assert (first == by_size).all(dim=1).double().mean() < 0.01


def test_routed_codes_keep_the_chosen_alone() -> None:
    y = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]])
    codes = functional.routed_codes(y, torch.tensor([[1, 2], [0, 2]]))
    assert codes.tolist() == [[0.0, -2.0, 3.0], [4.0, 0.0, 6.0]]


# --- what is kept and allocated ------------------------------------------------------------------------------


def test_x_is_not_kept_and_codes_are_few() -> None:
    problem = Problem(64, 40, 30, [Block(16, 4)], 1, torch.float32)
    x, up = problem.x.clone().requires_grad_(), problem.up.clone().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        routed_linear(x, problem.weight, None, problem.projection, up, problem.routing_bias, problem.blocks, 1.0)
    frozen = {t.untyped_storage().data_ptr() for t in (problem.weight, problem.projection, up)}
    kept = [t for t in saved if t.untyped_storage().data_ptr() not in frozen]
    assert x.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in saved}
    assert sum(t.untyped_storage().nbytes() for t in kept) <= 64 * 4 * (4 + 1) + 16 * 4


class _Allocations(TorchDispatchMode):
    """Sizes of every new storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[int, int] = {}
        self.alive: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.alive.append(tensor)
                storage = tensor.untyped_storage()
                self.elements.setdefault(storage.data_ptr(), storage.nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_temporary_of_the_outputs_or_inputs_size(dtype: torch.dtype) -> None:
    n, m, tokens = 40, 48, 256
    problem = Problem(tokens, n, m, [Block(8, 2)], 1, dtype)
    x, up = problem.x.clone().requires_grad_(), problem.up.clone().requires_grad_()
    routing = (problem.projection, up, problem.routing_bias, problem.blocks, problem.scaling)

    def large(seen: _Allocations, known: list[Tensor]) -> list[int]:
        given_ = {t.untyped_storage().data_ptr() for t in known}
        return sorted(size for where, size in seen.elements.items() if size >= tokens * n and where not in given_)

    with _Allocations() as forward:
        out = routed_linear(x, problem.weight, problem.bias, *routing)
    # x in float32 for the projection is the one copy, in half precision only.
    copies = [] if dtype == torch.float32 else [tokens * n]
    assert large(forward, [x, problem.weight]) == sorted([tokens * m, *copies])
    with _Allocations() as backward:
        torch.autograd.grad(out, (x, up), problem.grad)
    assert large(backward, [x, problem.weight, problem.grad]) == [tokens * n]


# --- the balance step ----------------------------------------------------------------------------------------


@MODEST
@given(st.lists(st.lists(st.integers(0, 2**40), min_size=1, max_size=9), min_size=1, max_size=4))
def test_balance_steps_equal_the_reference(loads: list[list[int]]) -> None:
    steps = functional.balance_steps(
        torch.tensor([count for part in loads for count in part]), tuple(len(part) for part in loads)
    )
    assert steps.dtype == torch.int32
    assert steps.tolist() == [step for part in loads for step in reference.balance_step([0] * len(part), part)]


def test_balance_steps_by_hand() -> None:
    load = torch.tensor([4, 0, 2, 2, 0, 0, 9, 1])
    assert functional.balance_steps(load, (4, 2, 2)).tolist() == [-1, 1, 0, 0, 0, 0, -1, 1]


def _coefficient_of_variation(selection: Any, steps: int) -> tuple[float, float, float]:
    """Spread of the expert load before and after balancing on inputs that favour some ranks; and the largest d."""
    generator = torch.Generator().manual_seed(0)
    projection = densify(draw_nonzeros(1, 16, 32, 8), 32)
    scale = torch.linspace(0.2, 3.0, 32)
    count = torch.zeros(16, dtype=torch.int32)
    block = (Block(16, 4, selection),)

    def load(tokens: int) -> Tensor:
        x = torch.randn(tokens, 32, generator=generator) * scale
        chosen = functional.select(functional.project(x, projection), count * 0.01, block)
        counts = torch.zeros(16, dtype=torch.int64)
        functional.add_expert_load(counts, chosen)
        return counts

    def spread() -> float:
        counts = load(4000).double()
        return float(counts.std() / counts.mean())

    before = spread()
    for _ in range(steps):
        count += functional.balance_steps(load(64), (16,))
    return before, spread(), float(count.abs().max()) * 0.01


def test_balancing_evens_out_the_load() -> None:
    """With the bias outside the absolute value; inside it, the very same steps drive the load apart."""
    before, after, largest = _coefficient_of_variation("magnitude", 600)
    assert after < before / 3
    assert largest < 1.0
    before, after, _ = _coefficient_of_variation("biased_magnitude", 600)
    assert after > before / 2
