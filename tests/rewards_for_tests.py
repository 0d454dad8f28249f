import os
import time

from recipes.tiny.running_sums import exact_answer


def needs_column(completions, level, **kwargs):
    return [float(value) for value in level]


def exact_answer_behind_a_gate(prompts, completions, trainer_state, **kwargs):
    """After two generations of 8 updates, the file of `GATE_FOR_TESTS` is waited for."""
    if trainer_state.global_step == 16 and not os.path.exists(os.environ["GATE_FOR_TESTS"]):
        print("The reward waits for the gate.", flush=True)
        while not os.path.exists(os.environ["GATE_FOR_TESTS"]):
            time.sleep(0.05)
    return exact_answer(prompts, completions, **kwargs)
