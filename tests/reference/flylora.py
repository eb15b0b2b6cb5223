"""FlyLoRA as the paper writes it: loops over tokens, ranks and columns, in Python floats (float64).

Nothing here imports the library. Numbers are plain Python floats in nested lists, so that no vectorised
operation, broadcast or kernel is shared with the code under test. Gradients are derived by hand:

    out_t  = W0 x_t + bias + scaling * sum_{i in I_t} b_i y_ti          y_ti = <A_i, x_t>
    dB_i   = scaling * sum_{t: i in I_t} g_t y_ti                       (g = gradient of the output)
    dx_t   = W0^T g_t + scaling * sum_{i in I_t} <b_i, g_t> A_i         (I_t is piecewise constant)
    dA_i   = scaling * sum_{t: i in I_t} <b_i, g_t> x_t                 (were A trained)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Vector = list[float]
Matrix = list[Vector]


@dataclass(frozen=True)
class Block:
    """One router with its experts: A is r x n, B is m x r, bias_steps holds r whole numbers."""

    A: Matrix
    B: Matrix
    bias_steps: list[int]
    k: int
    scaling: float
    selection: str = "magnitude"
    balance_rate: float = 1e-3

    @property
    def r(self) -> int:
        return len(self.A)


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


SCORES: dict[str, Callable[[float, float], float]] = {
    "magnitude": lambda y, d: abs(y) + d,
    "signed": lambda y, d: y + d,
    "biased_magnitude": lambda y, d: abs(y + d),
}


def top_ranks(scores: Vector, k: int) -> set[int]:
    """The k largest, found one after the other; the lower index wins a tie."""
    chosen: set[int] = set()
    for _ in range(k):
        best = None
        for rank, score in enumerate(scores):
            if rank not in chosen and (best is None or score > scores[best]):
                best = rank
        assert best is not None
        chosen.add(best)
    return chosen


def route(x: Vector, block: Block) -> tuple[Vector, Vector]:
    """y = A x and the scores of one token."""
    y = [dot(row, x) for row in block.A]
    if block.selection == "all" or block.k == block.r:
        return y, []
    score = SCORES[block.selection]
    return y, [score(y_i, block.balance_rate * steps) for y_i, steps in zip(y, block.bias_steps, strict=True)]


def margin(x: Vector, block: Block) -> float:
    """Gap between the last score chosen and the first left out: how far a token is from another choice."""
    _, scores = route(x, block)
    ordered = sorted(scores, reverse=True)
    return ordered[block.k - 1] - ordered[block.k] if ordered else math.inf


@dataclass
class Result:
    output: Matrix  # tokens x m
    grad_x: Matrix  # tokens x n
    grad_B: list[Matrix]  # per block, m x r
    grad_weight: Matrix  # m x n: gradient of the base weight, were it trained
    grad_bias: Vector  # m
    counts: list[list[int]]  # per block, how many tokens chose each rank
    chosen: list[list[set[int]]]  # per block and token
    grad_A: list[Matrix] = field(default_factory=list)  # per block, r x n: gradient of A, were it trained


def run(
    tokens: Matrix,
    weight: Matrix | None,
    bias: Vector | None,
    blocks: Sequence[Block],
    grad_output: Matrix,
    counted: Sequence[bool] | None = None,
    chosen: list[list[set[int]]] | None = None,
) -> Result:
    """Forward and backward of a base layer with FlyLoRA on it.

    weight None leaves the base out (output is the update alone). counted says which tokens are real (padding does
    not count). chosen prescribes the ranks, for `random` selection, where nobody can predict them.
    """
    m = len(blocks[0].B)
    n = len(blocks[0].A[0])
    result = Result([], [], [], [[0.0] * n for _ in range(m)], [0.0] * m, [], [])
    for block in blocks:
        result.grad_B.append([[0.0] * block.r for _ in range(m)])
        result.grad_A.append([[0.0] * n for _ in range(block.r)])
        result.counts.append([0] * block.r)
        result.chosen.append([])
    for t, (x, g) in enumerate(zip(tokens, grad_output, strict=True)):
        out = [0.0] * m
        grad_x = [0.0] * n
        for o in range(m):
            if weight is not None:
                out[o] += dot(weight[o], x)
                for j in range(n):
                    grad_x[j] += weight[o][j] * g[o]
                    result.grad_weight[o][j] += g[o] * x[j]
            if bias is not None:
                out[o] += bias[o]
                result.grad_bias[o] += g[o]
        for index, block in enumerate(blocks):
            if chosen is not None:
                y, ranks = [dot(row, x) for row in block.A], chosen[index][t]
            else:
                y, scores = route(x, block)
                ranks = top_ranks(scores, block.k) if scores else set(range(block.r))
            result.chosen[index].append(ranks)
            for i in sorted(ranks):
                if counted is None or counted[t]:
                    result.counts[index][i] += 1
                back = 0.0
                for o in range(m):
                    out[o] += block.scaling * block.B[o][i] * y[i]
                    result.grad_B[index][o][i] += block.scaling * g[o] * y[i]
                    back += block.B[o][i] * g[o]
                for j in range(n):
                    grad_x[j] += block.scaling * back * block.A[i][j]
                    result.grad_A[index][i][j] += block.scaling * back * x[j]
        result.output.append(out)
        result.grad_x.append(grad_x)
    return result


def balance_loss(tokens: Matrix, block: Block) -> tuple[float, Matrix]:
    """r sum_i f_i P_i and its gradient to the tokens: f_i is rank i's share of the choices, P_i its mean softmax score.

    With s_i the scores and p the softmax of one of N tokens, dL/ds_i = r / N * p_i (f_i - sum_j f_j p_j).
    """
    scores = [route(x, block)[1] for x in tokens]
    ranks = range(block.r)
    choices = [top_ranks(row, block.k) for row in scores]
    shares = [sum(i in chosen for chosen in choices) / (block.k * len(tokens)) for i in ranks]
    loss, grads = 0.0, []
    for x, row in zip(tokens, scores, strict=True):
        exponentials = [math.exp(score) for score in row]
        p = [value / sum(exponentials) for value in exponentials]
        mean = dot(shares, p)
        loss += block.r * mean / len(tokens)
        grad = [0.0] * len(x)
        for i in ranks:
            y = dot(block.A[i], x)
            d = block.balance_rate * block.bias_steps[i]
            slope = {"magnitude": y, "biased_magnitude": y + d}.get(block.selection, 1.0)
            back = block.r / len(tokens) * p[i] * (shares[i] - mean) * math.copysign(1.0, slope)
            for j in range(len(x)):
                grad[j] += back * block.A[i][j]
        grads.append(grad)
    return loss, grads


def hadamard(size: int) -> Matrix:
    """The orthonormal Walsh-Hadamard matrix by Sylvester's doubling; size is a power of two."""
    if size == 1:
        return [[1.0]]
    half = hadamard(size // 2)
    root = math.sqrt(2.0)
    top = [[value / root for value in row + row] for row in half]
    return top + [[value / root for value in row] + [-value / root for value in row] for row in half]


def balance_step(bias_steps: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Eq. 9 in whole steps: up by one where a rank was chosen less than the mean, down by one where more."""
    total, r = sum(counts), len(counts)
    moved = []
    for steps, count in zip(bias_steps, counts, strict=True):
        if count * r < total:
            moved.append(steps + 1)
        elif count * r > total:
            moved.append(steps - 1)
        else:
            moved.append(steps)
    return moved


def nonzeros_per_row(density: float, in_features: int) -> int:
    return max(1, round(density * in_features))


def on_bfloat16_grid(value: float) -> bool:
    """True when the float32 bits of value end in sixteen zeros, which is what bfloat16 can hold."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.unpack("<f", struct.pack("<f", value))[0] == value and bits & 0xFFFF == 0


def mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / len(values)


def chi_square(observed: Sequence[int], expected: float) -> float:
    return math.fsum((count - expected) ** 2 / expected for count in observed)
