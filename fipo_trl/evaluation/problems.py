"""What to evaluate on, and by which reward."""

from collections.abc import Callable, Sequence

from datasets import Dataset
from trl.data_utils import is_conversational

from fipo_trl.data.sources import load_problems
from fipo_trl.evaluation.scoring import score
from fipo_trl.rewards.names import columns_read_by, load_reward


def load_evaluation(
    sources: Sequence[str],
    reward: str,
    settings: tuple[str, str] = ("eval_problems", "eval_reward"),
    task_settings: dict[str, dict] | None = None,
    folder: str | None = None,
    allow_unsandboxed: bool = False,
) -> tuple[dict[str, Dataset], Callable]:
    """Load problems and a reward function, and see that the one can score the other.

    Args:
        sources: Of problems, as [`fipo_trl.data.sources.load_problems`] reads them.
        reward, folder, allow_unsandboxed: As [`fipo_trl.rewards.names.load_reward`] takes them.
        settings: What error messages call the two.
        task_settings: Of [`load_problems`].

    Returns:
        `{name: dataset}` and the reward function.

    Raises:
        ValueError: if one cannot be loaded, or they do not fit each other.
    """
    accuracy = load_reward(reward, settings[1], folder, allow_unsandboxed)
    problems = {}
    for source in sources:
        name, dataset = load_problems(source, settings[0], task_settings)
        if name in problems:
            raise ValueError(f"{settings[0]}: two sources are called '{name}'. Rename one with NAME=SOURCE.")
        for column in columns_read_by([accuracy]):
            if column not in dataset.column_names:
                raise ValueError(
                    f"{settings[0]}: '{source}' has no column '{column}', which {reward} reads, only "
                    f"{', '.join(dataset.column_names)}."
                )
        row = {column: [value] for column, value in dataset[0].items()}
        nothing = [{"role": "assistant", "content": ""}] if is_conversational(dataset[0]) else ""
        score(accuracy, row.pop("prompt"), [nothing], completion_ids=[[]], **row)  # refuses other values than 0 and 1
        problems[name] = dataset
    return problems, accuracy
