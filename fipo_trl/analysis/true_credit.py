"""The true credit of tokens: what each of them did to the chance of success, by sampling.

    V(s)     = E[reward of the answer that the policy writes from s on]
    credit_t = V(prompt, y_1 ... y_t) - V(prompt, y_1 ... y_{t-1})

A state `s` is a prompt and the first tokens of a completion `y`; the policy is the one that generated `y`. V is the
mean reward of so many answers, sampled from that state with what is left of training's token limit. Where the
completion is at its end, V is its own reward, and known exactly. VinePPO (https://arxiv.org/abs/2410.01679) estimates
credit by continuing from prefixes, too.

The value before a token is that of all tokens that may stand there, so with `p` the chance of `y_t`

    credit_t = (1 - p) (V(prefix, y_t) - V(prefix, another token)),

where the other token is drawn as the policy draws it, but for `y_t`. This is what is sampled: a token that was all but
certain has all but no credit, and this way all but no noise either.

The completions are those of token credit traces. Each is taken with the checkpoint of its generation's start.
"""

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from trl.data_utils import is_conversational
from trl.trainer.utils import is_async_callable

from fipo_trl.analysis.token_credit_page import TOKENS_NAME
from fipo_trl.evaluation.exam import seed_of
from fipo_trl.evaluation.results import append, open_results
from fipo_trl.evaluation.sampling import Sampler, default_batch_size, transformers_sampler, vllm_sampler
from fipo_trl.evaluation.saved_model import SavedModel
from fipo_trl.objective.future_kl import future_kl
from fipo_trl.recipe.build import load_data, rewards_of
from fipo_trl.recipe.validate import Recipe
from fipo_trl.trainer.manifest import read_manifest
from fipo_trl.trainer.token_credit import TokenState, read_trace


NO_ADVANTAGE = 1e-6  # an answer with less has none: its group was all right or all wrong
HALF_LIVES = (2, 8, 128)  # tokens: Future-KL is also calculated with these
SAME_REWARD = 1e-3  # traces hold float32
# Settings of training that a continuation must share
OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length")


@dataclass(frozen=True)
class CreditSettings:
    """What is recorded beside values, because other settings would give others: those are not mixed.

    Attributes:
        answers: Of each trace, at most; drawn among those with an advantage.
        positions: Of each answer, at most; drawn among its tokens.
        samples: Continuations of each state.
        batch_size: Continuations that are sampled at once; `None` stands for that of an evaluation.
    """

    answers: int
    positions: int
    samples: int
    backend: str
    batch_size: int | None
    dtype: str
    tensor_parallel_size: int
    seed: int
    versions: dict[str, str]


class State(NamedTuple):
    """Where continuations begin: after a token of a completion, or after others in its place.

    Attributes:
        row: Of the completion, in the trace.
        position: Of the token.
        other: Whether others stand in its place, another one for each sample.
    """

    row: int
    position: int
    other: bool


class Choice(NamedTuple):
    """What the policy had to choose from where it chose a token.

    Attributes:
        entropy: In nats, before top-p.
        rest: The chance of all other tokens together.
        others: Some of these, as the policy draws them.
    """

    entropy: float
    rest: float
    others: list[int]


class Answer(NamedTuple):
    """A completion at the `N` tokens whose credit was sampled.

    Attributes:
        step, row: Of its trace, and in it.
        positions: (N,), from 0.
        credit: (N,), in units of the reward.
        error: (N,), standard error of `credit`: 0 where all samples agree, which may be too small.
        halves: (2, N), the credit by each half of the samples alone.
        signals: `{name: (N,)}` of `future_kl`, `weight`, `log_ratio`, `entropy`, `shuffled_future_kl`, and Future-KL
            with other half-lives, `future_kl_2` and so on.
    """

    step: int
    row: int
    reward: float
    advantage: float
    positions: np.ndarray
    credit: np.ndarray
    error: np.ndarray
    halves: np.ndarray
    signals: dict[str, np.ndarray]


def name_of(function: Any) -> str:
    return getattr(function, "__name__", str(function))


class Task:
    """What a run was trained on: prompts, rewards and how completions were sampled.

    Raises:
        ValueError: as [`fipo_trl.recipe.build.load_data`], and for what cannot be continued or scored here.
    """

    def __init__(self, recipe: Recipe):
        self.training = recipe.training
        self.functions: list[Callable] = []
        for function in rewards_of(recipe):
            if isinstance(function, str) or is_async_callable(function):
                raise ValueError(
                    f"reward_funcs: {name_of(function)} is a reward model or an asynchronous function. Credit is "
                    "sampled with plain functions only: train a run with one to measure it."
                )
            self.functions.append(function)
        if self.training.top_k or self.training.min_p or self.training.repetition_penalty != 1.0:
            raise ValueError(
                "top_k, min_p or repetition_penalty is set. Continuations are sampled by temperature and top_p alone, "
                "and would not be those of this policy."
            )
        if self.training.generation_kwargs:
            raise ValueError("generation_kwargs is set: continuations would not be sampled as the answers were.")
        dataset, _ = load_data(recipe, self.functions)
        if not isinstance(dataset, Dataset):
            raise ValueError("dataset_streaming: true. Prompts are looked up in the data: set it to false.")
        self.columns = dataset.to_dict()
        self.conversational = is_conversational({"prompt": self.columns["prompt"][0]})
        weights = self.training.reward_weights or [1.0] * len(self.functions)
        self.reward_weights = np.array(weights, dtype=np.float64)

    def rewards(self, rows: Sequence[int], completion_ids: list[list[int]], tokenizer: Any) -> np.ndarray:
        """The rewards (N,) of completions to the prompts in these rows of the data, as in training.

        Raises:
            ValueError: if no function scores one of them, or one does not return a number for each.
        """
        completions: list = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if self.conversational:
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        prompts = columns.pop("prompt")
        scores = []
        for function in self.functions:
            values = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            if len(values) != len(completions):
                raise ValueError(f"{name_of(function)} gave {len(values)} rewards for {len(completions)} completions.")
            scores.append([math.nan if value is None else float(value) for value in values])
        table = np.array(scores)  # (functions, N)
        if np.isnan(table).all(axis=0).any():
            raise ValueError("No reward function scored one of the continuations, so its state has no value.")
        return np.nansum(table * self.reward_weights[:, None], axis=0)


class Trace:
    """A token credit trace, the policy that generated it, and the states that are sampled.

    Args:
        run: Output directory of the run.
        step: Of the trace.
        task: That of the run.
        settings: How much is sampled.
        policy: Folder or Hub id of the policy, or [`policy_of`] the trace where it is `None`.

    Raises:
        ValueError: if the trace, its policy, the data or the rewards are missing or do not fit each other.
    """

    def __init__(self, run: Path, step: int, task: Task, settings: CreditSettings, policy: str):
        self.table, of_run = read_trace(run, step)
        self.step, self.task, self.generation = step, task, of_run["generation"]
        self.name = f"step_{step:06d}"
        self.model = SavedModel(policy)
        self.policy = policy
        self.check_sampling()
        states = self.table["state"].combine_chunks().flatten().to_numpy()
        if (states & TokenState.UNSCORED).any():
            raise ValueError(f"The trace of step {step} holds what tools wrote. A continuation cannot call them.")
        self.completion_ids = self.table["completion_ids"].to_pylist()
        self.positions = self.choose(settings)
        self.data_rows, self.prompt_ids = self.find_prompts()
        self.rewards = self.score_answers()
        longest = max((len(ids) for ids in self.prompt_ids.values()), default=0) + task.training.max_completion_length
        self.context = longest
        batch_size = settings.batch_size or default_batch_size(settings.backend, longest)
        self.settings = replace(settings, batch_size=batch_size)
        tokens = [(row, place) for row, places in self.positions.items() for place in places]
        wanted = [State(*token, other) for token in tokens for other in (False, True)]
        # Prefixes of about one length are sampled together: little padding
        self.states = sorted(wanted, key=lambda state: (len(self.prompt_ids[state.row]) + state.position, state))

    def check_sampling(self):
        """See that the recipe samples as the run did, where its checkpoint says how."""
        manifest = read_manifest(self.policy) if os.path.isdir(self.policy) else None
        for name in OF_SAMPLING:
            given = getattr(self.task.training, name)
            was = manifest["settings"].get(name) if manifest else given
            if given != was:
                raise ValueError(
                    f"{name}={given} by the recipe, but {self.policy} was trained with {was}. Give --{name} {was}, or "
                    "the recipe of this run."
                )

    def choose(self, settings: CreditSettings) -> dict[int, list[int]]:
        """The answers, by row, and the positions in each. Without advantage a weight does nothing: left out."""
        generator = random.Random(f"{settings.seed} {self.step}")
        advantages, dropped = self.table["advantage"].to_pylist(), self.table["dropped"].to_pylist()
        learnt = [
            row
            for row, (advantage, drop) in enumerate(zip(advantages, dropped, strict=True))
            if abs(advantage) > NO_ADVANTAGE and not drop
        ]
        rows = sorted(generator.sample(learnt, min(settings.answers, len(learnt))))
        lengths = {row: len(self.completion_ids[row]) for row in rows}
        return {row: sorted(generator.sample(range(n), min(settings.positions, n))) for row, n in lengths.items()}

    def find_prompts(self) -> tuple[dict[int, int], dict[int, list[int]]]:
        """The row in the data, and the token ids, of each answer's prompt: the trace holds its text alone."""
        encoded = self.model.encode(self.task.columns["prompt"], self.task.training.max_completion_length)
        tokenizer = self.model.tokenizer
        places: dict[str, int] = {}
        for place, ids in enumerate(encoded):
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            places.setdefault(text.encode(errors="replace").decode(), place)
        prompts = self.table["prompt"].to_pylist()
        for row in self.positions:
            if prompts[row] not in places:
                raise ValueError(
                    f"The trace of step {self.step} answers {prompts[row]!r:.80}, which is not in the data of the "
                    "recipe. Give the recipe and the flags of this run (dataset_name, dataset_settings, ...)."
                )
        rows = {row: places[prompts[row]] for row in self.positions}
        return rows, {row: encoded[place] for row, place in rows.items()}

    def score_answers(self) -> dict[int, float]:
        """The reward of each answer, by its row, which must be that of training where the trace knows it."""
        if not self.positions:
            return {}
        ids = [self.completion_ids[row] for row in self.positions]
        now = self.task.rewards(list(self.data_rows.values()), ids, self.model.tokenizer).tolist()
        for row, value in zip(self.positions, now, strict=True):
            was = self.table["reward"][row].as_py()
            if abs(value - was) > SAME_REWARD:  # not where it is NaN
                raise ValueError(
                    f"Answer {row} of step {self.step} had a reward of {was:.4g} in training, and has {value:.4g} by "
                    "the recipe. Give the recipe and the flags of this run (reward_funcs, reward_weights, data). A "
                    "reward that is drawn at random cannot be measured."
                )
        return dict(zip(self.positions, now, strict=True))

    def recorded(self) -> dict:
        """What results in a folder must share."""
        sampling = {name: getattr(self.task.training, name) for name in OF_SAMPLING}
        states = [list(state) for state in self.states]
        return {
            **asdict(self.settings),
            **sampling,
            "rewards": [name_of(function) for function in self.task.functions],
            "policy": Path(self.policy).name,
            "weights": self.model.version(),
            "states": states,
        }

    def sampler(self, policy: Any, scratch: Path) -> Sampler:
        training, settings = self.task.training, self.settings
        limits = (training.temperature, training.top_p, training.max_completion_length)
        if settings.backend == "transformers":
            return transformers_sampler(policy, self.model.end_ids, *limits)
        return vllm_sampler(
            self.model,
            *limits,
            settings.dtype,
            context=self.context,
            tensor_parallel_size=settings.tensor_parallel_size,
            scratch=scratch,
        )

    def begun(self, state: State, choices: dict[int, list[Choice]]) -> list[list[int]]:
        """The tokens of the completion that are there, for each sample."""
        before = self.completion_ids[state.row][: state.position]
        if state.other:
            others = choices[state.row][self.positions[state.row].index(state.position)].others
            return [[*before, token] for token in others]
        return [[*before, self.completion_ids[state.row][state.position]]] * self.settings.samples

    def sample(
        self, sampler: Sampler, choices: dict[int, list[Choice]], done: dict[int, list[dict]]
    ) -> Iterator[dict[int, list[dict]]]:
        """Continue from all states that are not done; give `{number of the state: its samples}`, batch by batch.

        As in an evaluation, batches are always the same ones and each is seeded anew: what is done changes nothing.
        """
        n, at_once = self.settings.samples, self.settings.batch_size
        longest = self.task.training.max_completion_length
        assert at_once is not None
        size = max(1, at_once // n)
        for first in range(0, len(self.states), size):
            group = range(first, min(first + size, len(self.states)))
            if all(number in done for number in group):
                continue
            whole = [ids for number in group for ids in self.begun(self.states[number], choices)]
            rows = [self.states[number].row for number in group for _ in range(n)]
            seeds = [seed_of(self.settings.seed + self.step, number) + i for number in group for i in range(n)]
            unfinished = [i for i, ids in enumerate(whole) if ids[-1] not in self.model.end_ids and len(ids) < longest]
            for start in range(0, len(unfinished), at_once):  # several calls where a state has more samples than that
                part = unfinished[start : start + at_once]
                prompts = [self.prompt_ids[rows[i]] + whole[i] for i in part]
                limits = [longest - len(whole[i]) for i in part]
                for i, ids in zip(part, sampler(prompts, [seeds[i] for i in part], limits), strict=True):
                    whole[i] = whole[i] + ids
            rewards = self.task.rewards([self.data_rows[row] for row in rows], whole, self.model.tokenizer).tolist()
            samples = [{"reward": reward, "length": len(ids)} for reward, ids in zip(rewards, whole, strict=True)]
            of_states = (samples[start : start + n] for start in range(0, len(samples), n))
            yield {number: each for number, each in zip(group, of_states, strict=True) if number not in done}

    @torch.no_grad()
    def choices(self, policy: Any) -> dict[int, list[Choice]]:
        """What the policy chose from at each position of each answer."""
        training, n, found = self.task.training, self.settings.samples, {}
        for row, places in self.positions.items():
            prompt, ids = self.prompt_ids[row], self.completion_ids[row]
            logits = policy(input_ids=torch.tensor([prompt + ids], device=policy.device)).logits[0]
            logits = logits[[len(prompt) + place - 1 for place in places]].double().cpu() / training.temperature
            chances = nucleus(logits.softmax(-1), training.top_p)
            chosen = torch.tensor([ids[place] for place in places])[:, None]
            others = chances.scatter(1, chosen, 0.0)
            rest = others.sum(-1)
            others[rest == 0] = 1.0  # no others: what is drawn will have no weight
            generator = torch.Generator().manual_seed(seed_of(self.settings.seed + self.step, -1 - row))
            drawn = torch.multinomial(others, n, replacement=True, generator=generator)
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            found[row] = [Choice(*each) for each in zip(entropy.tolist(), rest.tolist(), drawn.tolist(), strict=True)]
        return found

    def answers(self, samples: dict[int, list[dict]], choices: dict[int, list[Choice]]) -> list[Answer]:
        """The credit of the chosen tokens, beside what the trace says of them."""
        n = self.settings.samples
        rewards = {
            state: np.array([sample["reward"] for sample in samples[number]])
            for number, state in enumerate(self.states)
        }
        answers = []
        for row, places in self.positions.items():
            rest = np.array([choice.rest for choice in choices[row]])[:, None]
            with_it, without = (
                np.stack([rewards[State(row, place, other)] for place in places]) for other in (False, True)
            )  # (N, n)
            difference = rest * (with_it - without)  # of independent samples: their order means nothing
            answers.append(
                Answer(
                    step=self.step,
                    row=row,
                    reward=self.rewards[row],
                    advantage=self.table["advantage"][row].as_py(),
                    positions=np.array(places),
                    credit=difference.mean(axis=1),
                    error=rest[:, 0] * np.sqrt((with_it.var(axis=1, ddof=1) + without.var(axis=1, ddof=1)) / n),
                    halves=np.stack([difference[:, : n // 2].mean(axis=1), difference[:, n // 2 :].mean(axis=1)]),
                    signals={
                        **{name: values[places].astype(np.float64) for name, values in self.signals(row).items()},
                        "entropy": np.array([choice.entropy for choice in choices[row]]),
                    },
                )
            )
        return answers

    def signals(self, row: int) -> dict[str, np.ndarray]:
        """What the trace says of all tokens of an answer, (T,) each, and what follows from it."""
        column = {name: self.table[name][row].values.to_numpy() for name in ("future_kl", "weight", "log_ratio")}
        masked = torch.from_numpy(self.table["state"][row].values.to_numpy() & TokenState.MASKED).bool()
        log_ratio = torch.from_numpy(column["log_ratio"].copy())
        for half_life in HALF_LIVES:
            column[f"future_kl_{half_life}"] = future_kl(log_ratio, ~masked, half_life=half_life).numpy()
        generator = np.random.default_rng([self.settings.seed, self.step, row])
        return column | {"shuffled_future_kl": generator.permutation(column["future_kl"])}


def nucleus(chances: Tensor, top_p: float) -> Tensor:
    """The chances (N, V) with which tokens are drawn: of the likeliest ones whose chances reach `top_p` together."""
    ordered, order = chances.sort(dim=-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0) if top_p < 1 else ordered
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(chances).scatter(1, order, kept)


def policy_of(run: Path, settings: dict, base: str | None) -> str:
    """The policy that generated what a trace holds: the checkpoint before the updates of its generation, or the model
    with which training began.

    Args:
        settings: Of the trace.
        base: `model_name_or_path` of the recipe.

    Raises:
        ValueError: if it was not kept.
    """
    step, generation = settings["step"], settings["generation"]
    updates, rest = divmod(step, generation)
    if rest:
        raise ValueError(
            f"step {step}: its generation, number {generation}, did not begin at a multiple of its updates, because "
            "the run went on with other batches. Name the policy that generated it with --policy."
        )
    if step == updates and base is not None:
        return base
    policy = run / f"checkpoint-{step - updates}"
    if not policy.is_dir():
        raise ValueError(
            f"step {step}: {run} holds no {policy.name}, the policy that generated the answers of updates "
            f"{step - updates + 1} to {step}. Train with save_steps: {updates} and a save_total_limit that keeps it; "
            "or name the policy with --policy."
        )
    return str(policy)


def credit_of(traces: Sequence[Trace], output_dir: Path) -> list[Answer]:
    """Sample what is not there yet in `output_dir/step_UPDATE`, with a progress bar over all traces.

    Traces of which no answer has an advantage have no states, and need no policy.

    Raises:
        ValueError: if results there are of other settings or in use, or memory does not hold a batch.
    """
    answers = []
    with ExitStack() as files:
        opened = []
        for trace in [trace for trace in traces if trace.states]:
            written = json.loads(json.dumps(trace.recorded()))
            done, file = open_results(output_dir / trace.name, written)
            opened.append((trace, done, files.enter_context(file)))
        waiting = [trace for trace, done, _ in opened if len(done) < len(trace.states)]
        if len(waiting) > 1 and waiting[0].settings.backend == "vllm":
            raise ValueError(
                f"vLLM holds one policy per process, and {len(waiting)} traces are to be sampled. Give --step "
                f"{waiting[0].step} first, then the others one by one; with all of them given, what is done is read."
            )
        total, there = sum(len(trace.states) for trace in traces), sum(len(done) for _, done, _ in opened)
        with tqdm(total=total, initial=there, unit="state", disable=None) as bar:
            for trace, done, file in opened:
                bar.set_description(trace.name)
                answers += trace.answers(*finish(trace, done, file, output_dir / trace.name, bar))
    return answers


def finish(
    trace: Trace, done: dict[int, list[dict]], file: BinaryIO, folder: Path, bar: tqdm
) -> tuple[dict[int, list[dict]], dict[int, list[Choice]]]:
    """Sample what a trace lacks; its samples and choices. The policy is loaded only if something is lacking."""
    path = folder / "choices.json"
    policy = None
    if not path.exists() or not done:
        policy = trace.model.load(trace.settings.dtype).eval()
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(trace.choices(policy)))
        os.replace(unfinished, path)
    choices = {int(row): [Choice(*each) for each in of_row] for row, of_row in json.loads(path.read_text()).items()}
    if len(done) < len(trace.states):
        # vLLM loads its own, and needs the room
        policy = None if trace.settings.backend == "vllm" else policy or trace.model.load(trace.settings.dtype).eval()
        for samples in trace.sample(trace.sampler(policy, folder), choices, done):
            append(file, samples)
            done |= samples
            bar.update(len(samples))
    return done, choices


def write_tokens(answers: Sequence[Answer], folder: Path):
    """One row for each token whose credit was sampled: `folder/tokens.parquet`."""
    rows = [
        {
            "step": answer.step,
            "row": answer.row,
            "position": int(answer.positions[i]),
            "reward": answer.reward,
            "advantage": answer.advantage,
            "credit": float(answer.credit[i]),
            "error": float(answer.error[i]),
            **{name: float(values[i]) for name, values in answer.signals.items()},
        }
        for answer in answers
        for i in range(len(answer.positions))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / TOKENS_NAME, compression="zstd")
