"""A class against its closest rival, from the votes of both."""

from __future__ import annotations

import numpy as np

from certifl.smoothing.bounds import two_sided_sign_test

__all__ = ["lead_of", "sign_test_against"]


def sign_test_against(
    counts: np.ndarray, predicted: np.ndarray, in_favour: bool = False
) -> np.ndarray:
    """P-values of "no other class is more likely than the predicted one", (m,).

    One-sided sign tests of the predicted class against the most voted other one, times the number
    of other classes, because that one was picked from the same votes.

    Args:
        counts: (m, classes). predicted: (m,).
        in_favour: of the opposite instead, "some other class is at least as likely". (Every other
            class must then lose, the closest of them shows least: no factor is needed.)
    """
    top, rival = _tops(counts, predicted)
    ahead, behind = (top, rival) if in_favour else (rival, top)
    tail = np.asarray(two_sided_sign_test(ahead, behind)) / 2.0
    factor = 1 if in_favour else counts.shape[1] - 1
    return np.where(ahead > behind, np.minimum(1.0, tail * factor), 1.0)


def _tops(counts: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(len(counts))
    others = counts.copy()
    others[rows, predicted] = -1
    return counts[rows, predicted], others.max(axis=1)


def lead_of(counts: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Votes of the predicted class minus those of the closest other one, as a share, (m,)."""
    top, rival = _tops(counts, predicted)
    return (top - rival) / np.maximum(counts.sum(axis=1), 1)
