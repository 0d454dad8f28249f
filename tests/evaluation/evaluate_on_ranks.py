"""Evaluate on however many processes there are. Run by test_evaluation_callback.py."""

import json
import sys

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tiny import PROMPTS, make_trainer

from fipo_trl.evaluation.callback import EvaluationCallback


def main(result):
    seen = []

    def odd_variety(completions, **kwargs):
        seen[:] = completions
        return [float(len(set(completion)) % 2) for completion in completions]

    trainer = make_trainer("unused", eval_steps=1)
    problems = {"x": Dataset.from_dict({"prompt": PROMPTS[:5]}), "one": Dataset.from_dict({"prompt": PROMPTS[:1]})}
    greedy = EvaluationCallback(trainer, problems, odd_variety, n=3, top_p=1e-6).evaluate("x")
    EvaluationCallback(trainer, problems, odd_variety, n=16, temperature=2.0, top_p=1.0).evaluate("one")
    everyones = gather_object([greedy])
    completions = gather_object(list(seen))
    if trainer.accelerator.is_main_process:
        content = {
            "world_size": trainer.accelerator.num_processes,
            "greedy": greedy,
            "different_answers": len(set(completions)),
            "same_on_all": all(each == greedy for each in everyones),
        }
        with open(result, "w") as file:
            json.dump(content, file)
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
