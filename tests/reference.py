"""Slow oracles, written from the formulas in plain float64 loops, independent of the package."""

import math

import torch


def future_kl(log_ratio, mask, half_life):
    """F_t = M_t d_t + gamma F_{t+1}, one token after the other. (B, T) -> (B, T) float64."""
    gamma = 2.0 ** (-1.0 / half_life)
    terms = torch.where(mask != 0, log_ratio.double(), 0.0)
    result = torch.zeros_like(terms)
    tail = torch.zeros(len(terms), dtype=torch.float64)
    for t in reversed(range(terms.shape[1])):
        tail = terms[:, t] + gamma * tail
        result[:, t] = tail
    return result


def influence(
    log_ratio, advantages, mask, half_life, weight_min, weight_max, dual_clip, safety_ratio, participation_mask=True
):
    """Weights (lists of B lists of T floats) and kept sequences, token by token."""
    weights, kept = [], []
    for b in range(len(log_ratio)):
        row, tail, dual_clipped = [], 0.0, 0
        gamma = 2.0 ** (-1.0 / half_life)
        for t in reversed(range(log_ratio.shape[1])):
            scored = bool(mask[b, t])
            d = min(max(log_ratio[b, t].item(), -20.0), 20.0) if scored else 0.0
            advantage = (advantages[b] if advantages.dim() == 1 else advantages[b, t]).item()
            tail = gamma * tail + (d if math.exp(d) <= dual_clip or not participation_mask else 0.0)
            f = min(max(math.exp(tail), weight_min), weight_max)
            if scored and advantage < 0 and math.exp(d) > safety_ratio:
                f = min(max(f, 0.8), 1.0)
            dual_clipped += scored and advantage < 0 and math.exp(d) > dual_clip
            row.insert(0, f)
        weights.append(row)
        kept.append(dual_clipped <= 1)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(kept)


def token_losses(log_ratio, weighted_advantages, epsilon_low, epsilon_high, dual_clip):
    """Eq. 8 per token: the clipped objective, dual-clipped where the advantage is negative. All (B, T)."""
    ratio = log_ratio.clamp(-20.0, 20.0).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    losses = torch.max(-ratio * weighted_advantages, -clipped * weighted_advantages)
    return torch.where(weighted_advantages < 0, torch.min(losses, -dual_clip * weighted_advantages), losses)
