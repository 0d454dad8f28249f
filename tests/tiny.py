"""A language model of 3,000 weights, completions that the seed fixes, and a trainer around them."""

import gc
import random
from dataclasses import fields

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from fipo_trl import DAPOConfig, DAPOTrainer, FIPOConfig, FIPOTrainer


BASE = "recipes/tiny/base"
PROMPTS = [f"a{i % 5}b{i // 5 % 5}=" if i % 3 else f"a{i % 5}b{i // 5 % 5}c{i // 25}=" for i in range(100)]


def make_model(dtype=torch.float32, seed=0):
    """Large random weights, so that samples differ and a few updates move the policy far."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        name_or_path=BASE,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def longer_is_better(completions, **kwargs):
    return [len(completion) + completion.count("a") / 7 for completion in completions]


def right_for_some(prompts, completions, **kwargs):
    """A reward by which groups are all right, all wrong, or mixed, depending on their prompts."""
    kinds = [random.Random(prompt).choice(["right", "wrong", "mixed", "mixed"]) for prompt in prompts]
    return [
        float(kind == "right" or (kind == "mixed" and len(completion) % 2))
        for kind, completion in zip(kinds, completions, strict=True)
    ]


def fixed_rollouts(prompts, trainer):
    """TRL's rollout_func: a completion is a function of its prompt and of its number within the group."""
    tokenizer = trainer.processing_class
    first = trainer.accelerator.process_index * len(prompts)  # groups may straddle processes
    completions = []
    for i, prompt in enumerate(prompts):
        generator = random.Random(f"{prompt} {(first + i) % trainer.num_generations}")
        length = generator.randint(1, 12)
        completions.append([generator.randrange(2, len(tokenizer)) for _ in range(length)] + [tokenizer.eos_token_id])
    return {
        "prompt_ids": [tokenizer.encode(prompt) for prompt in prompts],
        "completion_ids": completions,
        "logprobs": None,
    }


def scored_rollouts(prompts, trainer):
    """The same completions with the log-probs of an engine: functions of the row, and missing here and there."""
    rollouts = fixed_rollouts(prompts, trainer)
    rollouts["logprobs"] = [
        [None if (len(ids) + t) % 7 == 0 else -3.0 - t / 10 for t in range(len(ids))]
        for ids in rollouts["completion_ids"]
    ]
    return rollouts


def make_args(output_dir, config_class=FIPOConfig, **settings):
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 16,
        "max_steps": 16,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return config_class(**defaults | settings)


def make_trainer(output_dir, trainer_class=FIPOTrainer, *, args=None, prompts=PROMPTS, keywords=None, **settings):
    """`settings` go to the config (those of FIPO not to DAPO's), `keywords` to the trainer."""
    config_class = DAPOConfig if trainer_class is DAPOTrainer else FIPOConfig  # which is a GRPOConfig, too
    known = {f.name for f in fields(config_class)}
    settings = {name: value for name, value in settings.items() if name in known or not hasattr(FIPOConfig, name)}
    return trainer_class(
        model=make_model(),
        args=args or make_args(output_dir, config_class, **settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(BASE, padding_side="left"),
        **{"reward_funcs": longer_is_better, **(keywords or {})},
    )


def generate(trainer):
    """Generate as a training loop would; go to the last update. Returns its micro-batches, as TRL buffers them."""
    args = trainer.args
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer._step = args.steps_per_generation - args.gradient_accumulation_steps
    return trainer._buffered_inputs[trainer._step :]


def last_update(trainer):
    """Run the micro-steps of the last update of the generation, up to the optimizer step."""
    for remaining in reversed(range(trainer.args.gradient_accumulation_steps)):
        trainer.accelerator.gradient_state._set_sync_gradients(remaining == 0)
        trainer.training_step(trainer.model, None, None)


def token_logps(model, inputs):
    """Log-probabilities (B, T) of the completion tokens, from a plain forward pass."""
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    length = inputs["completion_ids"].shape[1]
    logps = logits[:, -length - 1 : -1].log_softmax(dim=-1)
    return logps.gather(2, inputs["completion_ids"].unsqueeze(2)).squeeze(2)


def leave_process_group():
    """As scripts/train_fipo.py does, which says why. The trainer must not be referred to any more."""
    gc.collect()
    torch.distributed.destroy_process_group()


def parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def distance(one, other):
    """Euclidean distance between two sets of parameters of the same names."""
    return torch.stack([(value - other[name]).detach().norm() for name, value in one.items()]).norm().item()


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]
