"""Merging written out literally, one number at a time where it can be, sharing no code with the library."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def keep_largest(update: Array, density: float) -> Array:
    """Zero all but the int(density * size) entries of largest magnitude."""
    order = np.argsort(-np.abs(update), axis=None, kind="stable")
    kept = np.zeros(update.size)
    for index in order[: int(density * update.size)]:
        kept[index] = update.flat[index]
    return kept.reshape(update.shape)


def ties(updates: list[Array], weights: list[float], density: float) -> Array:
    """Trim, elect a sign by total mass, and average what agrees with it (Yadav et al., 2023)."""
    trimmed = [keep_largest(update, density) for update in updates]
    out = np.zeros(updates[0].shape)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            entries = [update[i, j] for update in trimmed]
            sign = 1.0 if sum(entries) >= 0 else -1.0
            agreeing = [w * e for w, e in zip(weights, entries, strict=True) if np.sign(e) == sign]
            out[i, j] = sum(agreeing) / max(1, len(agreeing))
    return out


def elect(updates: list[Array], weights: list[float]) -> Array:
    """TIES without trimming."""
    return ties(updates, weights, 1.0)


def least_squares(ups: list[Array], grams: list[Array], weights: list[float], prior: Array, penalty: float) -> Array:
    """The minimiser of sum_t w_t tr((B - B_t) G_t (B - B_t)^T) + penalty |B - P|^2, one row of B at a time."""
    rank = prior.shape[1]
    out = np.zeros_like(prior)
    for row in range(prior.shape[0]):
        left = penalty * np.eye(rank)
        right = penalty * prior[row]
        for up, gram, weight in zip(ups, grams, weights, strict=True):
            left = left + weight * gram
            right = right + weight * gram @ up[row]
        out[row] = np.linalg.solve(left, right)
    return out


def knots(factors: list[tuple[Array, Array]], weights: list[float], density: float) -> Array:
    """TIES on the right singular vectors of the updates side by side (Stoica et al., 2024), by a full SVD."""
    updates = [up @ down for up, down in factors]
    n = updates[0].shape[1]
    u, s, vt = np.linalg.svd(np.concatenate(updates, axis=1), full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    parts = [vt[:rank, t * n : (t + 1) * n] for t in range(len(updates))]
    return (u[:, :rank] * s[:rank]) @ ties(parts, weights, density)
