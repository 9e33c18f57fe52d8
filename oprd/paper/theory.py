"""The theory's numbers: variance and signal of gradients, and means by place in a response.

Shapes: M response tokens (rows), V vocabulary, d hidden width, P weights. p is the student's
distribution and q the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def means_by_k(
    values_M: Tensor, lengths: Sequence[int], counts: Sequence[int], last: bool = False
) -> list[list[float]]:
    """Return means over the tokens that are among the first k of their response (Figure 8).

    Responses with fewer tokens contribute all of them.

    Args:
        values_M: a value for each token, one response after another.
        lengths: number of tokens in each response; at least 1.
        counts: the k's.
        last: take the last k tokens instead.

    Returns:
        ``[k, mean]`` for each k.
    """
    places = [torch.arange(n) for n in lengths]
    order_M = torch.cat([p.flip(0) if last else p for p in places]).to(values_M.device)
    return [[k, values_M[order_M < k].double().mean().item()] for k in counts]


def sampled_gradient_moments(
    student_MV: Tensor, teacher_MV: Tensor, head_Vd: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute variance and squared mean of OPD top-1's gradient by the final hidden state.

    With u = log p - log q, the gradient for a sampled token y is g(y) = u(y) d log p(y) / dh
    = u(y) W^T (e_y - p). Both moments are exact: y runs over the whole vocabulary.

    Args:
        student_MV, teacher_MV: logits; converted to float64.
        head_Vd: W, the weight of the student's head, whose logits are linear in the state.

    Returns:
        float64 (M,) each: E|g|^2 - |E g|^2 and |E g|^2. E g is the gradient of KL(p || q).
    """
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (student_MV, teacher_MV))
    p_MV, u_MV = log_p.exp(), log_p - log_q
    w_Vd = head_Vd.double()
    gram_VV = w_Vd @ w_Vd.T
    cross_MV = p_MV @ gram_VV
    norm_MV = gram_VV.diagonal() - 2 * cross_MV + (cross_MV * p_MV).sum(-1, keepdim=True)
    second_M = (p_MV * u_MV.square() * norm_MV).sum(-1)
    kl_M1 = (p_MV * u_MV).sum(-1, keepdim=True)
    mean_Md = (p_MV * (u_MV - kl_M1)) @ w_Vd
    squared_M = mean_Md.square().sum(-1)
    return second_M - squared_M, squared_M


class GradientNoise:
    """Estimates the signal-to-noise ratio of a gradient from those of independent batches.

    The ratio is |E g|^2 / tr Cov g of the gradient g of one batch. Both parts are estimated without
    bias from n gradients: tr Cov g by the sample covariance's trace tr S, and |E g|^2 by
    |mean|^2 - tr S / n.
    """

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.sum_P: Tensor | None = None

    def add(self, gradient_P: Tensor) -> None:
        """Add the gradient of one batch, (P,)."""
        g_P = gradient_P.double()
        self.count += 1
        self.squares += g_P.square().sum().item()
        self.sum_P = g_P if self.sum_P is None else self.sum_P + g_P

    def ratio(self) -> float | None:
        """Return the ratio; None if all gradients are equal, so that there is no noise.

        The estimate of |E g|^2 can fall below 0 where the noise is large; the ratio is then 0.

        Raises:
            ValueError: if fewer than two gradients were added.
        """
        if self.sum_P is None or self.count < 2:
            raise ValueError(
                f"{self.count} gradient(s) were added: add those of at least two batches"
            )
        mean_square = (self.sum_P / self.count).square().sum().item()
        noise = (self.squares - self.count * mean_square) / (self.count - 1)
        if noise <= 0:
            return None
        return max(mean_square - noise / self.count, 0.0) / noise
