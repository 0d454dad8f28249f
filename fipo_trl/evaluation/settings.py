"""Bounds of the settings by which answers are sampled for an evaluation."""

import importlib.util
import math


def check_evaluation(eval_steps: float | None, n: int, temperature: float, top_p: float):
    """Raise a `ValueError` for settings out of their bounds, or if nothing says when to evaluate."""
    check_sampling(n, temperature, top_p, names=("eval_samples", "eval_temperature", "eval_top_p"))
    if not eval_steps:
        raise ValueError("eval_steps is not set: give the number of updates from one evaluation to the next.")


def check_sampling(n: int, temperature: float, top_p: float, names: tuple[str, str, str]):
    """Raise a `ValueError` where samples could not be drawn, or would all be equal."""
    if n < 1:
        raise ValueError(f"{names[0]}={n} must be at least 1. The paper samples 32 answers per problem.")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{names[1]}={temperature} must be greater than 0: without randomness all samples of a problem are equal. "
            "Set 1.0 (the paper's)."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"{names[2]}={top_p} must be greater than 0 and at most 1. The paper evaluates at 0.7.")


def check_backend(backend: str, tensor_parallel_size: int):
    """Raise a `ValueError` where vLLM shall sample and is not there, or a setting of vLLM is given without it."""
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            '--backend=vllm, but vLLM is not installed. pip install ".[vllm]" in a clone, or use transformers.'
        )
    if backend != "vllm" and tensor_parallel_size != 1:
        raise ValueError(f"--tensor_parallel_size={tensor_parallel_size} is for --backend vllm. Remove it.")
