"""Rewards for verifiable answers. A recipe names those of this package without their module."""

from fipo_trl.rewards.code_tests import code_accuracy, code_reward
from fipo_trl.rewards.dapo import dapo_accuracy, dapo_reward, normalize_answer, overlong_penalty, predicted_answer
from fipo_trl.rewards.reasoning_gym import reasoning_gym_accuracy, reasoning_gym_reward


__all__ = [
    "code_accuracy",
    "code_reward",
    "dapo_accuracy",
    "dapo_reward",
    "normalize_answer",
    "overlong_penalty",
    "predicted_answer",
    "reasoning_gym_accuracy",
    "reasoning_gym_reward",
]
