"""Future-KL: how far the policy has moved on a token and on all that follows it (FIPO, eq. 6).

Of a completion with log-ratios `d_t = log pi_theta(y_t) - log pi_old(y_t)`, the token at position `t` gets

    F_t = sum_{k >= t} gamma^(k - t) M_k d_k      or, as a recurrence,      F_t = M_t d_t + gamma F_{t+1},

with `gamma = 2^(-1 / half_life)` and `M` the mask of tokens that take part. The official code sums this as a matrix
product, O(T^2) work per completion. Here neighbours are folded into pairs: seen from the first token of a pair, the
rest of the completion is a completion of pairs, half as long, in which the half-life is half as many positions. The
recursion does O(T) work in O(log T) vectorised steps, uses no matrix product (so neither autocast nor TF32 can touch
its precision), and adds terms in a tree, which rounds less than adding them in order.

Shapes: B sequences, T completion tokens. Source: https://arxiv.org/abs/2603.19835.
"""

import torch
from torch import Tensor


def future_kl(log_ratio: Tensor, mask: Tensor, *, half_life: float) -> Tensor:
    """Discounted sum of the log-ratios from each token to the end of its completion (eq. 6).

    Args:
        log_ratio: (B, T), `log pi_theta - log pi_old` of each completion token, in nats, any floating dtype. Values
            where `mask` is 0 are never read, so NaN and infinity are harmless there.
        mask: (B, T), true or non-zero where the token takes part. Distances count positions, so a hole in the mask
            (tool output, a token left out) still ages what lies behind it.
        half_life: distance, in tokens, at which a later token counts half (tau in the paper). `math.inf` discounts
            nothing.

    Returns:
        (B, T) Future-KL, in float64 for float64 input and in float32 for any other. Gradients flow through it.

    Raises:
        ValueError: if the shapes differ or `half_life` is not greater than 0.
    """
    if log_ratio.shape != mask.shape:
        raise ValueError(f"log_ratio {tuple(log_ratio.shape)} and mask {tuple(mask.shape)} must have the same shape.")
    if not half_life > 0:
        raise ValueError(f"half_life must be greater than 0 tokens, got {half_life}.")
    compute_dtype = torch.promote_types(log_ratio.dtype, torch.float32)
    return _discounted_suffix_sum(log_ratio.to(compute_dtype).masked_fill(mask == 0, 0.0), half_life)


def _discounted_suffix_sum(values: Tensor, half_life: float) -> Tensor:
    """`S_t = values_t + 2^(-1 / half_life) S_{t+1}` along the last dimension, without a loop over it."""
    length = values.shape[-1]
    if length <= 1:
        return values
    gamma = 2.0 ** (-1.0 / half_life)
    pairs = torch.add(values[..., : length - 1 : 2], values[..., 1::2], alpha=gamma)
    if length % 2:  # the last token has no partner
        pairs = torch.cat([pairs, values[..., -1:]], dim=-1)
    pair_sums = _discounted_suffix_sum(pairs, half_life / 2)
    sums = values.clone()
    sums[..., 0::2] = pair_sums
    sums[..., 1 : length - 1 : 2].add_(pair_sums[..., 1:], alpha=gamma)
    return sums
