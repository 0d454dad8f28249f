"""Evaluation during training, with sampling settings of its own: the paper trains at top-p 1.0 and evaluates at 0.7.

TRL's evaluation (`eval_strategy`) samples as training does, runs the loss, and knows rewards only. Here the trainer's
own generation, whichever it is, answers the problems with other settings; [`Exam`] judges and averages as elsewhere.
Training does not notice: it goes on bit for bit as without.
"""

import math
import random
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import GenerationConfig, Trainer, TrainerCallback, set_seed
from trl import GRPOTrainer

from fipo_trl.evaluation.exam import Exam, metrics_of
from fipo_trl.evaluation.settings import check_evaluation
from fipo_trl.evaluation.statistics import quartiles


class EvaluationCallback(TrainerCallback):
    """Answers problems before the first update, after every `eval_steps` updates and after the last.

    Logs `eval_NAME/avg@n`, `cons@n`, `pass@n`, `mean_length`, `length_q25`, `length_median`, `length_q75` (tokens) and
    `truncated`; trackers show them as `eval/NAME/avg@n` and so on. A step that is in the log is not evaluated again
    when a run is resumed. One turn is sampled per problem, without tools, of at most `max_completion_length` tokens.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            A trainer with `eval_steps`. It generates with transformers, or with vLLM, colocated or as a server.
        problems (`dict[str, Dataset]`):
            `{name: dataset}` with the column `prompt` and those that `accuracy` reads.
        accuracy (`Callable`):
            Reward function that gives 1 or 0, see [`fipo_trl.evaluation.scoring.score`].
        n, temperature, top_p:
            Samples per problem, and how they are drawn. All else is as in training.

    Raises:
        ValueError: for settings out of their bounds, a trainer without `eval_steps`, or prompts that the vLLM engine's
            context cannot hold.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        problems: dict[str, Dataset],
        accuracy: Callable,
        n: int = 32,
        temperature: float = 1.0,
        top_p: float = 0.7,
    ):
        check_evaluation(trainer.args.eval_steps, n, temperature, top_p)
        self.trainer = trainer
        self.n = n
        self.sampling = {"temperature": temperature, "top_p": top_p}
        self.exams = {}
        for name, dataset in problems.items():
            prompt_ids = trainer._tokenize_prompts(dataset["prompt"][:])[0]
            self._check_context(name, max(map(len, prompt_ids)))
            self.exams[name] = Exam(
                dataset.to_dict(), prompt_ids, accuracy, trainer.processing_class, trainer.eos_token_ids
            )

    def _check_context(self, name: str, longest: int):
        """vLLM would cut completions where its context ends, and say nothing."""
        trainer = self.trainer
        if not trainer.use_vllm or trainer.vllm_mode != "colocate":
            return
        context = trainer.vllm_generation.llm.llm_engine.model_config.max_model_len
        needed = longest + trainer.max_completion_length
        if needed > context:
            raise ValueError(
                f"eval_problems: the longest prompt of {name} ({longest} tokens) and max_completion_length="
                f"{trainer.max_completion_length} need a context of {needed} tokens, but the engine has {context}. "
                f"Set vllm_max_model_length={needed}."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        self._evaluate_if_due(state, control)

    def on_step_end(self, args, state, control, **kwargs):
        self._evaluate_if_due(state, control)

    def _evaluate_if_due(self, state, control):
        if state.global_step % state.eval_steps and state.global_step < state.max_steps:
            return
        done = {name for row in state.log_history if row["step"] == state.global_step for name in row}
        for name in self.exams:
            if f"eval_{name}/avg@{self.n}" in done:
                continue
            metrics = self.evaluate(name)
            should_log = control.should_log
            # Not GRPOTrainer.log, which would write the training metrics gathered so far into this row and forget them
            Trainer.log(self.trainer, {f"eval_{name}/{metric}": value for metric, value in metrics.items()})
            control.should_log = should_log  # whether the training metrics of this update are still to be logged

    def evaluate(self, name: str) -> dict[str, float]:
        """Answer the problems of this name; every process must call it. Returns the metrics, the same on each."""
        exam = self.exams[name]
        with as_in_evaluation(self.trainer, **self.sampling):
            problems, completion_ids = self._sample(exam.prompt_ids)
        samples = exam.judge(problems, completion_ids)
        # Of all processes, in their order, without the texts and without those with which the last one was filled up
        samples = gather_object([{key: sample[key] for key in sample if key != "completion"} for sample in samples])
        total = len(exam.prompt_ids) * self.n
        of_problems = [samples[start : start + self.n] for start in range(0, total, self.n)]
        metrics = metrics_of(of_problems, exam.has_answers)
        lengths = [[sample["length"] for sample in row] for row in of_problems]
        logged = [f"avg@{self.n}", f"cons@{self.n}", f"pass@{self.n}", "mean_length", "truncated"]
        spread = zip(("length_q25", "length_median", "length_q75"), quartiles(lengths), strict=True)
        return {metric: metrics[metric].mean().item() for metric in logged if metric in metrics} | dict(spread)

    def _sample(self, prompt_ids: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        """This process's share of the completions, equally many on each: which problems they answer, and token ids."""
        trainer = self.trainer
        total = len(prompt_ids) * self.n
        share = math.ceil(total / trainer.accelerator.num_processes)
        first = share * trainer.accelerator.process_index
        rows = [number % total // self.n for number in range(first, first + share)]
        # vLLM makes its own batches; a forward pass with transformers gets as many sequences as in training
        in_training = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        batch = share if trainer.use_vllm else in_training
        completion_ids = []
        for start in range(0, share, batch):
            prompts = [prompt_ids[row] for row in rows[start : start + batch]]
            completion_ids += trainer._generate_single_turn(prompts, None, {}, num_generations=1)[0]
        return rows, completion_ids


@contextmanager
def as_in_evaluation(trainer: GRPOTrainer, **sampling):
    """The trainer generates with other sampling settings, without dropout, and from random numbers of its own.

    Afterwards settings, mode, random states and the version of the weights that vLLM is taken to hold are what they
    were: it gets the weights again before the next rollouts, which clears its cache of prefixes, too.
    """
    args = trainer.args
    generator = trainer.vllm_generation if trainer.use_vllm else trainer
    kept = {(generator, "generation_kwargs"): generator.generation_kwargs}
    if trainer.use_vllm:
        kept[trainer, "_last_loaded_step"] = trainer._last_loaded_step
    else:
        kept[trainer, "generation_config"] = trainer.generation_config
    training = trainer.model_wrapped.training
    states = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator() if args.device.type != "cpu" else None
    devices = [torch.accelerator.current_device_index()] if accelerator else []
    # Ranks that share an engine must draw the same tokens, all others different ones
    share_engine = args.vllm_tensor_parallel_size if trainer.use_vllm and trainer.vllm_mode == "colocate" else 1
    with torch.random.fork_rng(devices, device_type=accelerator.type if accelerator else "cuda"):
        try:
            generator.generation_kwargs = generator.generation_kwargs | sampling  # these win over all other settings
            if not trainer.use_vllm:
                trainer.generation_config = GenerationConfig(**trainer.generation_kwargs, disable_compile=True)
            trainer.model_wrapped.eval()
            set_seed(args.seed + trainer.state.global_step + args.process_index // share_engine)
            yield
        finally:
            trainer.model_wrapped.train(training)
            random.setstate(states[0])
            np.random.set_state(states[1])
            for (owner, name), value in kept.items():
                setattr(owner, name, value)
