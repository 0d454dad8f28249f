"""Groups of completions that are sampled and scored ahead through TRL, and replayed to it when a batch is full.

A group is rolled out with the trainer's own `_generate` and `_calculate_rewards`, before any log-probability is
computed, and stays with the process that sampled it. When [`DynamicSampler`] has enough groups, they are redistributed
over the processes, and TRL's own code runs on them as if it had just sampled them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from fipo_trl.trainer.dynamic_sampling import Batch, DynamicSampler, Group, PromptStream


if TYPE_CHECKING:
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer


def make_sampler(trainer: "DAPOTrainer") -> DynamicSampler:
    """The sampler that a trainer's settings describe.

    Raises:
        ValueError: for what cannot be sampled ahead, or a deciding reward that there is not.
    """
    args = trainer.args
    columns = getattr(trainer.train_dataset, "column_names", None) or []
    refused = {
        "tools": trainer.tools,
        "environments": trainer.environment_factories,
        "images": {"image", "images"} & set(columns),
        "a streamed dataset": not isinstance(trainer.train_dataset, Dataset),
    }
    if reasons := [name for name, applies in refused.items() if applies]:
        raise ValueError(
            f"dynamic_sampling=True does not work with {' and '.join(reasons)}, because rollouts must be sampled "
            "ahead and put into another batch. Set dynamic_sampling=False."
        )
    name = args.dynamic_sampling_reward or trainer.reward_func_names[0]
    if name not in trainer.reward_func_names:
        raise ValueError(
            f"dynamic_sampling_reward='{name}' is not one of the reward functions, {trainer.reward_func_names}."
        )
    world_size = trainer.accelerator.num_processes
    return DynamicSampler(
        PromptStream(len(trainer.train_dataset), args.seed, trainer.shuffle_dataset),
        args.generation_batch_size // trainer.num_generations,
        deciding=trainer.reward_func_names.index(name),
        oversample=args.dynamic_sampling_oversample,
        max_rounds=args.dynamic_sampling_max_rounds,
        carry_over=args.dynamic_sampling_carry_over,
        strict=args.dynamic_sampling_strict,
        multiple=world_size // math.gcd(world_size, trainer.num_generations),
        skip=args.dynamic_sampling_skip,
    )


class GroupRollouts:
    """Generation batches of mixed groups, for a trainer.

    Args:
        trainer: Generates and scores, and holds the data.
    """

    def __init__(self, trainer: "DAPOTrainer"):
        self.trainer = trainer
        self.sampler = make_sampler(trainer)
        self.dataset = trainer._remove_unused_columns(trainer.train_dataset)
        self.replayed_rewards: Tensor | None = None  # (all rows, F), while TRL's code runs on what is there already

    def generate(self, generate_and_score: Callable[[list[dict]], dict]) -> tuple[dict, Tensor | None]:
        """Fill a batch with mixed groups, and let TRL's code run on it.

        Args:
            generate_and_score: TRL's `_generate_and_score_completions`.

        Returns:
            What that returns for the batch, and which of its rows (B,) the present policy sampled; `None` if no row.
        """
        trainer, device = self.trainer, self.trainer.accelerator.device
        batch = self.sampler.fill(self.sample_and_score)
        places, rollouts = self._redistribute(batch.groups)
        rewards = torch.cat([group.rewards for group in batch.groups]).to(device)
        rows = [self.sampler.stream[batch.groups[group].position] for group, _ in places]
        with self._replay(rollouts, rewards):
            outputs = generate_and_score(self._rows(rows))
        group_numbers = torch.tensor([group for group, _ in places], device=device)
        self._zero_filler_advantages(outputs, batch, group_numbers)
        for name, value in batch.metrics().items():
            trainer._metrics["train"][f"dynamic_sampling/{name}"].append(value)
        return outputs, (group_numbers >= batch.carried_over) if batch.rounds else None

    def sample_and_score(self, rows: list[int]) -> tuple[Tensor, list[dict[int, dict]]]:
        """Sample and score a group for each row of the dataset, and leave no trace in TRL's metrics.

        An engine gets all prompts at once; transformers, which would run out of memory, no more than a generation
        batch. What reward functions pass to `log_metric` cannot be told apart by completion: it stays, and describes
        all that was sampled.

        Returns:
            Rewards of all processes (groups, G, F), and for each group this process's rollouts by their number in it.
        """
        trainer = self.trainer
        per_call = len(rows) if trainer.use_vllm else self.sampler.size
        rewards = []
        rollouts: list[dict[int, dict]] = [{} for _ in rows]
        for start in range(0, len(rows), per_call):
            places = self._places(len(rows[start : start + per_call]))
            inputs = self._rows([rows[start + group] for group, _ in places])
            prompts = [row["prompt"] for row in inputs]
            metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
            prompt_ids, completion_ids, tool_mask, completions, logps, extra, _, _ = trainer._generate(prompts)
            trainer._metrics["train"].clear()
            trainer._metrics["train"].update(metrics)
            extra_fields = [
                {name: values[i] if isinstance(values, list) else values for name, values in extra.items()}
                for i in range(len(inputs))
            ]
            for row, fields in zip(inputs, extra_fields, strict=True):
                row.update(fields)
            scored = trainer._calculate_rewards(inputs, prompts, completions, completion_ids)
            rewards.append(scored.cpu().view(-1, trainer.num_generations, len(trainer.reward_funcs)))
            for i, (group, number) in enumerate(places):
                rollouts[start + group][number] = {
                    "prompt_ids": torch.tensor(prompt_ids[i], dtype=torch.int32),
                    "completion_ids": torch.tensor(completion_ids[i], dtype=torch.int32),
                    "logprobs": logps and torch.tensor([math.nan if logp is None else logp for logp in logps[i]]),
                    "env_mask": tool_mask and torch.tensor(tool_mask[i], dtype=torch.int8),
                    "extra_fields": extra_fields[i],
                    "extra_logs": {column: values[i] for column, values in trainer._pending_extra_logs.items()},
                }
            trainer._pending_extra_logs.clear()
        return torch.cat(rewards), rollouts

    def _rows(self, numbers: list[int]) -> list[dict]:
        """Rows of the dataset as the dataloader gives them: copies, because TRL adds to them."""
        return self.dataset.__getitems__(numbers)

    def _places(self, groups: int) -> list[tuple[int, int]]:
        """(group, number in the group) of each completion of this process, dealt as TRL deals: in order."""
        generations, accelerator = self.trainer.num_generations, self.trainer.accelerator
        share = groups * generations // accelerator.num_processes
        first = accelerator.process_index * share
        return [divmod(completion, generations) for completion in range(first, first + share)]

    def _redistribute(self, groups: list[Group]) -> tuple[list[tuple[int, int]], list[dict]]:
        """This process's share of a batch, in order. Rollouts come from whichever process sampled them.

        Returns:
            (group, number in the group) of each completion, and its rollout.
        """
        mine = [((i, number), rollout) for i, group in enumerate(groups) for number, rollout in group.rollouts.items()]
        sampled = dict(gather_object(mine))
        places = self._places(len(groups))
        return places, [sampled[place] for place in places]

    @contextmanager
    def _replay(self, rollouts: list[dict], rewards: Tensor) -> Iterator[None]:
        """Let TRL's code generate these rollouts, through its hook `rollout_func`, and calculate these rewards.

        So it decodes, pads and logs them as its own. Tokens have been counted when they were sampled.
        """

        def replayed(prompts, trainer) -> dict[str, Any]:
            def column(name):
                values = [rollout[name] for rollout in rollouts]
                return None if values[0] is None else [value.tolist() for value in values]

            extra = {
                name: [rollout["extra_fields"][name] for rollout in rollouts] for name in rollouts[0]["extra_fields"]
            }
            tool_mask = column("env_mask")
            if tool_mask is not None:
                extra["env_mask"] = tool_mask
            return extra | {name: column(name) for name in ("prompt_ids", "completion_ids", "logprobs")}

        trainer = self.trainer
        for name in dict.fromkeys(name for rollout in rollouts for name in rollout["extra_logs"]):
            trainer._pending_extra_logs[name] = [rollout["extra_logs"].get(name) for rollout in rollouts]
        rollout_func, trainer.rollout_func = trainer.rollout_func, replayed
        tokens_seen = trainer.state.num_input_tokens_seen
        self.replayed_rewards = rewards
        try:
            yield
        finally:
            self.replayed_rewards = None
            trainer.rollout_func = rollout_func
            trainer.state.num_input_tokens_seen = tokens_seen
            trainer._metrics["train"]["num_tokens"] = [tokens_seen]

    def _zero_filler_advantages(self, outputs: dict, batch: Batch, group_numbers: Tensor):
        """Groups that are not mixed teach nothing, even where another reward than the deciding one differs."""
        outputs["advantages"][group_numbers >= len(batch.groups) - batch.fillers] = 0.0
        for completion in range(1, batch.fillers * self.trainer.num_generations + 1):
            self.trainer._logs["advantages"][-completion] = 0.0
