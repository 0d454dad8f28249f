from recipes.tiny.running_sums import exact_answer


_generations = 0


def needs_column(completions, level, **kwargs):
    return [float(value) for value in level]


def answer_worth_ever_more(prompts, completions, **kwargs):
    """The tiny task's reward, ten times as large in each generation: with SGD, updates that no policy survives."""
    global _generations
    _generations += 1
    return [10.0**_generations * value for value in exact_answer(prompts, completions)]


# Settings of a run that ends in a collapse, whatever way rounding sends it
COLLAPSE = {"reward_funcs": "tests.rewards_for_tests.answer_worth_ever_more", "scale_rewards": "none", "optim": "sgd"}
COLLAPSE |= {"learning_rate": 1e-3, "max_grad_norm": 1e9, "logging_steps": 1, "max_steps": 200, "on_collapse": "stop"}
COLLAPSE_FLAGS = [str(word) for name, value in COLLAPSE.items() for word in (f"--{name}", value)]
