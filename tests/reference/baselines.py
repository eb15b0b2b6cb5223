"""The baselines written out for one token after another, in float64 and with NumPy's scalars and dot products alone.

Nothing here imports the library. Each forward has a hand-derived backward: given g, the gradient of a token's output,
it returns the gradients to x and to every trained tensor. W is the frozen weight (m x n), s the scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Result:
    output: list[Array] = field(default_factory=list)
    grad_x: list[Array] = field(default_factory=list)
    grads: dict[str, Array] = field(default_factory=dict)

    def add(self, name: str, grad: Array) -> None:
        self.grads[name] = self.grads[name] + grad if name in self.grads else grad


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def gated_ranks(tokens: Array, weight: Array, A: Array, B: Array, gates: Array, s: float, grad_output: Array) -> Result:
    """out = W x + s sum_i g_i b_i (a_i . x): SoRA, with gates of 1 LoRA, with gates of a fixed mask DropLoRA."""
    result = Result()
    r = len(gates)
    for x, g in zip(tokens, grad_output, strict=True):
        out, grad_x = weight @ x, weight.T @ g
        grad_A, grad_B, grad_gates = np.zeros_like(A), np.zeros_like(B), np.zeros_like(gates)
        for i in range(r):
            y, back = float(A[i] @ x), float(B[:, i] @ g)
            out = out + s * gates[i] * y * B[:, i]
            grad_x = grad_x + s * gates[i] * back * A[i]
            grad_A[i] = s * gates[i] * back * x
            grad_B[:, i] = s * gates[i] * y * g
            grad_gates[i] = s * y * back
        result.output.append(out)
        result.grad_x.append(grad_x)
        for name, grad in (("A", grad_A), ("B", grad_B), ("gate", grad_gates)):
            result.add(name, grad)
    return result


def split_lora(
    tokens: Array,
    weight: Array,
    A: Array,
    B: Array,
    router: Array,
    k: int,
    s: float,
    grad_output: Array,
    groups: int = 1,
) -> Result:
    """out = W x + s sum_e G_e B_e A_e x, G = sigmoid of the k largest of W_g x in each group and 0 elsewhere."""
    result = Result()
    experts = len(router)
    size = len(A) // experts
    for x, g in zip(tokens, grad_output, strict=True):
        out, grad_x = weight @ x, weight.T @ g
        grad_A, grad_B, grad_router = np.zeros_like(A), np.zeros_like(B), np.zeros_like(router)
        logits = [float(row @ x) for row in router]
        chosen = []
        for group in range(groups):
            members = range(group * experts // groups, (group + 1) * experts // groups)
            chosen += sorted(members, key=lambda e: -logits[e])[:k]
        for e in chosen:
            gate = sigmoid(logits[e])
            total = 0.0
            for i in range(e * size, (e + 1) * size):
                y, back = float(A[i] @ x), float(B[:, i] @ g)
                out = out + s * gate * y * B[:, i]
                grad_x = grad_x + s * gate * back * A[i]
                grad_A[i] = s * gate * back * x
                grad_B[:, i] = s * gate * y * g
                total += s * y * back
            slope = gate * (1.0 - gate)
            grad_router[e] = total * slope * x
            grad_x = grad_x + total * slope * router[e]
        result.output.append(out)
        result.grad_x.append(grad_x)
        for name, grad in (("A", grad_A), ("B", grad_B), ("router", grad_router)):
            result.add(name, grad)
    return result


def hydra_lora(tokens: Array, weight: Array, A: Array, B: Array, router: Array, s: float, grad_output: Array) -> Result:
    """out = W x + s sum_e w_e B_e A x, w = softmax(W_g x); B is experts x m x r."""
    result = Result()
    experts = len(router)
    for x, g in zip(tokens, grad_output, strict=True):
        y = np.array([float(row @ x) for row in A])
        exponentials = [math.exp(float(row @ x)) for row in router]
        weights = [value / sum(exponentials) for value in exponentials]
        out, grad_x, grad_y = weight @ x, weight.T @ g, np.zeros(len(A))
        grad_B = np.zeros_like(B)
        shares = []
        for e in range(experts):
            out = out + s * weights[e] * (B[e] @ y)
            grad_B[e] = s * weights[e] * np.outer(g, y)
            grad_y = grad_y + s * weights[e] * (B[e].T @ g)
            shares.append(s * float(g @ (B[e] @ y)))
        mean = sum(w * share for w, share in zip(weights, shares, strict=True))
        grad_router = np.array([weights[e] * (shares[e] - mean) * x for e in range(experts)])
        for e in range(experts):
            grad_x = grad_x + weights[e] * (shares[e] - mean) * router[e]
        grad_x = grad_x + A.T @ grad_y
        result.output.append(out)
        result.grad_x.append(grad_x)
        for name, grad in (("A", np.outer(grad_y, x)), ("B", grad_B), ("router", grad_router)):
            result.add(name, grad)
    return result


def soft_threshold(gates: list[float], threshold: float) -> list[float]:
    """The proximal step of an l1 penalty: towards 0 by the threshold, and not past it."""
    moved = []
    for gate in gates:
        if gate > threshold:
            moved.append(gate - threshold)
        elif gate < -threshold:
            moved.append(gate + threshold)
        else:
            moved.append(0.0)
    return moved


def largest_entries(matrices: list[Array], share: float) -> list[Array]:
    """Masks that keep int(share x number) of all entries of all matrices: those of largest magnitude."""
    entries = sorted(
        (
            (abs(value), which, index)
            for which, matrix in enumerate(matrices)
            for index, value in enumerate(matrix.flat)
        ),
        reverse=True,
    )
    masks = [np.zeros(matrix.size) for matrix in matrices]
    for _, which, index in entries[: int(share * len(entries))]:
        masks[which][index] = 1.0
    return [mask.reshape(matrix.shape) for mask, matrix in zip(masks, matrices, strict=True)]
