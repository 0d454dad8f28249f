"""One path from problems to numbers: answers are sampled, judged and averaged here, whoever asks.

The command (and with it the studies) and the quickstart call [`Exam.answers`]. The callback samples through the
trainer's own generation, and shares all that comes after.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from fipo_trl.evaluation.sampling import Sampler
from fipo_trl.evaluation.scoring import answers_beside, score
from fipo_trl.evaluation.statistics import per_problem


# What is known of an answer: `completion` (its text), `answer` (what it gives as its result, or `None`), `correct`,
# `length` (in tokens) and `truncated` (whether it was cut off before it ended)
Sample = dict


@dataclass
class Exam:
    """Problems, and how answers to them are judged.

    Args:
        columns: Of the problems: `prompt` (texts or chats), and those that the reward function reads.
        prompt_ids: Token ids of the prompts.
        accuracy: A reward function, see [`fipo_trl.evaluation.scoring.score`].
        tokenizer: Makes texts of answers.
        end_ids: Tokens that end an answer.
    """

    columns: dict[str, list]
    prompt_ids: list[list[int]]
    accuracy: Callable
    tokenizer: PreTrainedTokenizerBase
    end_ids: Collection[int]

    @property
    def has_answers(self) -> bool:
        """Whether something tells what a completion gives as its result; without it there is no cons@n."""
        return answers_beside(self.accuracy) is not None

    def answers(
        self, sampler: Sampler, n: int, batch_size: int, seed: int, done: Collection[int] = ()
    ) -> Iterator[dict[int, list[Sample]]]:
        """Answer all problems but those that are done; give `{problem: its n samples}` as soon as a batch is there.

        Problems are always answered in the same groups, of which each is seeded anew: what an engine computes depends
        a little on what it computes beside. So what is done already changes nothing.

        Args:
            batch_size: Answers that are sampled at once, at most.
        """
        size = max(1, batch_size // n)
        for first in range(0, len(self.prompt_ids), size):
            group = range(first, min(first + size, len(self.prompt_ids)))
            if all(problem in done for problem in group):
                continue
            problems = [problem for problem in group for _ in range(n)]
            seeds = [seed_of(seed, problem) + number for problem in group for number in range(n)]
            # One batch, or several about as large where it does not hold the n answers to one problem
            share = ceil(len(problems) / ceil(len(problems) / batch_size))
            completion_ids = []
            for start in range(0, len(problems), share):
                prompts = [self.prompt_ids[problem] for problem in problems[start : start + share]]
                completion_ids += sampler(prompts, seeds[start : start + share])
            samples = self.judge(problems, completion_ids)
            of_problems = (samples[start : start + n] for start in range(0, len(samples), n))
            yield {problem: row for problem, row in zip(group, of_problems, strict=True) if problem not in done}

    def judge(self, problems: Sequence[int], completion_ids: list[list[int]]) -> list[Sample]:
        """What is known of answers.

        Args:
            problems: Which one each of them answers.
            completion_ids: Their tokens.

        Raises:
            ValueError: as [`score`].
        """
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        columns = {name: [values[problem] for problem in problems] for name, values in self.columns.items()}
        prompts, completions = columns.pop("prompt"), texts
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        correct, answers = score(self.accuracy, prompts, completions, completion_ids=completion_ids, **columns)
        return [
            {
                "completion": text,
                "answer": answer,
                "correct": right,
                "length": len(ids),
                "truncated": not ids or ids[-1] not in self.end_ids,
            }
            for text, answer, right, ids in zip(
                texts, answers or [None] * len(texts), correct, completion_ids, strict=True
            )
        ]


def seed_of(seed: int, problem: int) -> int:
    """Where the seeds of the answers to one problem begin, so that those of no two problems overlap."""
    return random.Random(f"{seed} {problem}").getrandbits(48)


def metrics_of(samples: Sequence[Sequence[Sample]], has_answers: bool) -> dict[str, np.ndarray]:
    """[`per_problem`] of the samples of all problems, (P, n)."""
    columns = {
        key: [[sample[key] for sample in row] for row in samples]
        for key in ("correct", "answer", "length", "truncated")
    }
    return per_problem(
        columns["correct"], columns["answer"] if has_answers else None, columns["length"], columns["truncated"]
    )
