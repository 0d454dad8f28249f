"""Score other completions on each process with TRL, and save what each gets back. Run by test_trl_contract.py."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from tiny import leave_process_group, longer_is_better, make_trainer
from trl import GRPOTrainer


def first_letter(completions, **kwargs):
    return [None if completion.startswith("b") else float(ord(completion[0])) for completion in completions]


def main(folder):
    rank = PartialState(cpu=True).process_index
    trainer = make_trainer(folder, GRPOTrainer, keywords={"reward_funcs": [longer_is_better, first_letter]})
    prompts = ["a0b1=", "a2b3="]
    completions = [["c", "cc"], ["bbb", "dddd"]][rank]
    rewards = trainer._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, [[2], [3]])
    torch.save(rewards, Path(folder) / f"rewards_{rank}.pt")
    trainer.accelerator.wait_for_everyone()
    del trainer
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
