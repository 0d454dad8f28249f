"""The paper's settings and results, and where a plan departs from the former."""

from typing import Literal

from transformers.trainer_utils import SchedulerType

from fipo_trl.planning.plan import Plan


# The settings that the paper trained with: arXiv 2603.19835, tables 2 and 3, and its official scripts where these are
# silent. `...` stands where neither names a value
SETTINGS = {
    # setting: ("32B", "DAPO"), ("32B", "FIPO"), ("7B", "DAPO"), ("7B", "FIPO")
    "prompts per generation": (512, 512, 512, 512),
    "num_generations": (16, 16, 16, 32),
    "prompts per update": (32, 64, 32, 64),
    "updates per generation": (16, 8, 16, 8),
    "dynamic sampling": ("dapo_accuracy, 10 rounds", "dapo_accuracy, 10 rounds", None, None),
    "dynamic_sampling_oversample": (3.0, 4.0, ..., ...),
    "dynamic_sampling_skip": (False, False, False, False),
    "max_prompt_length": (2048, 2048, 2048, 2048),
    "max_completion_length": (20480, 20480, 8192, 10240),
    "overlong_buffer": (4096, 4096, 4096, 2048),
    "rewards": ({"dapo_reward": 1.0, "overlong_penalty": 1.0},) * 4,
    "temperature": (1.0, 1.0, 1.0, 1.0),
    "top_p": (1.0, 1.0, 1.0, 1.0),
    "vllm_importance_sampling_correction": (False, False, False, False),
    "loss_type": ("dapo", "dapo", "dapo", "dapo"),
    "epsilon": (0.2, 0.2, 0.2, 0.2),
    "epsilon_high": (0.28, 0.28, 0.28, 0.28),
    "delta": (10.0, 10.0, 10.0, 10.0),
    "beta": (0.0, 0.0, 0.0, 0.0),
    "entropy_coef": (0.0, 0.0, 0.0, 0.0),
    "future_kl_half_life": (..., 32.0, ..., 32.0),
    "influence_weight_min": (..., 1.0, ..., 0.8),
    "influence_weight_max": (..., 1.2, ..., 1.2),
    "influence_safety_ratio": (..., 10.0, ..., 3.0),
    "learning_rate": (1e-6, 1e-6, 1e-6, 1e-6),
    "lr_scheduler_type": ("constant_with_warmup",) * 4,
    "warm-up, generations": (10, 10, 10, 10),
    "weight_decay": (0.1, 0.1, 0.1, 0.1),
    "max_grad_norm": (1.0, 1.0, 1.0, 1.0),
}

# Percent, from the paper's tables. A model is known by its (hidden_size, num_hidden_layers).
RESULTS: dict[tuple, dict] = {
    (5120, 64): {
        "model": "Qwen2.5-32B",
        "aime24": {
            "DAPO": {"avg@32": 50, "cons@32": 60, "pass@32": 80},
            "FIPO": {"avg@32": 56, "cons@32": 73, "pass@32": 83},
        },
        "aime25": {
            "DAPO": {"avg@32": 38, "cons@32": 47, "pass@32": 63},
            "FIPO": {"avg@32": 43, "cons@32": 50, "pass@32": 67},
        },
    },
    (3584, 28): {
        "model": "Qwen2.5-Math-7B",
        "aime24": {"GRPO": {"avg@32": 22}, "DAPO": {"avg@32": 36}, "FIPO": {"avg@32": 40}},
        "aime25": {"GRPO": {"avg@32": 18}, "DAPO": {"avg@32": 18}, "FIPO": {"avg@32": 19}},
    },
}


def paper_settings(size: Literal["32B", "7B"], method: Literal["DAPO", "FIPO"]) -> dict:
    """One column of `SETTINGS`, without the settings that have no value there."""
    column = [("32B", "DAPO"), ("32B", "FIPO"), ("7B", "DAPO"), ("7B", "FIPO")].index((size, method))
    return {name: values[column] for name, values in SETTINGS.items() if values[column] is not ...}


def settings(plan: Plan) -> dict:
    """The run's values under the names of `SETTINGS`."""
    args, run = plan.training, plan.run
    prompts = args.generation_batch_size / args.num_generations
    values = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    sampling = None
    if args.dynamic_sampling:
        reward = args.dynamic_sampling_reward or (run.reward_funcs or [None])[0]
        sampling = f"{reward}, {args.dynamic_sampling_max_rounds} rounds"
    names = run.reward_funcs or []
    weights = dict(zip(names, args.reward_weights or [1.0] * len(names), strict=False))
    return values | {
        "prompts per generation": prompts,
        "prompts per update": prompts * args.num_iterations / args.updates_per_generation,
        "updates per generation": args.updates_per_generation,
        "dynamic sampling": sampling,
        "max_prompt_length": run.max_prompt_length,
        "overlong_buffer": run.overlong_buffer,
        "rewards": {name: weight for name, weight in weights.items() if weight},
        "lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value,
        "warm-up, generations": args.warmup_steps / args.updates_per_generation,
    }


def differences(plan: Plan, size: Literal["32B", "7B"]) -> list[tuple[str, object, object]]:
    """Where the run departs from the paper's column for its method: (setting, paper's value, ours)."""
    ours = settings(plan)
    return [
        (name, value, ours[name]) for name, value in paper_settings(size, plan.method).items() if ours[name] != value
    ]
