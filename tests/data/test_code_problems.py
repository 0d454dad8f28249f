"""Rows of public datasets of programming problems, in their schemas, and what becomes of them."""

import json

import pytest
from conftest import ROOT
from datasets import Dataset
from test_sources import BASE

from fipo_trl.commands import evaluate
from fipo_trl.data.code_problems import ASKED, MOST_TESTS, from_code, is_code
from fipo_trl.data.sources import load_problems, load_splits
from fipo_trl.evaluation.problems import load_evaluation
from fipo_trl.recipe.build import trainer_arguments
from fipo_trl.recipe.read import read
from fipo_trl.recipe.validate import read_and_validate, validate
from fipo_trl.rewards import sandbox
from fipo_trl.rewards.code_tests import code_accuracy


# As in the public files: columns, their types, and what their values look like
MBPP = {
    "task_id": 601,
    "text": "Write a function to add two numbers.",
    "code": "import math\r\nLIMIT = 3\r\ndef sum(a, b):\r\n  return a + b",
    "test_list": ["assert sum(1, 2) == 3", "assert sum(2, 2) == math.sqrt(16)", "assert sum(LIMIT, 0) == 3"],
    "test_setup_code": "import math",
    "challenge_test_list": ["assert sum(-1, 1) == 0"],
}
SANITIZED = {
    "source_file": "a.ipynb",
    "task_id": 2,
    "prompt": "Write a function to find the shared elements of two lists.",
    "code": "def similar(a, b):\n    return tuple(set(a) & set(b))",
    "test_imports": ["import math"],
    "test_list": ["assert set(similar((3, 4), (4, 5))) == set((4,))"],
}
LIVECODEBENCH = {
    "problem": "Add the numbers of a line.",
    "starter_code": "",
    "tests": json.dumps([{"input": "1 2\n", "output": "3", "testtype": "stdin", "metadata": {}}]),
    "metadata": "{}",
}
FUNCTIONAL = {
    "problem": "Find two numbers.",
    "starter_code": "class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        ",
    "tests": json.dumps([{"input": "[2, 7]\n9", "output": "[0, 1]", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "twoSum"}),
}
TACO = {"problem": "Add.", "tests": json.dumps({"inputs": ["1 2\n", ["3 4", ""]], "outputs": ["3\n", "7\n"]})}
TACO_CALLS = {
    "problem": "Add.",
    "tests": json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}),
}
PRIMEINTELLECT = {
    "problem": "Add.",
    "tests": json.dumps([{"type": "function_call", "fn_name": "add", "input": [1, [2]], "output": [[3]]}]),
}
VERIFIABLE = {
    "source": "apps",
    "task_type": "verifiable_code",
    "problem": "Solve it using the programming language python: add.",
    "gold_standard_solution": "```python\nprint(sum(map(int, input().split())))\n```",
    "verification_info": {
        "language": "python",
        "test_cases": [{"fn_name": None, "input": "1 2\n", "output": "3\n", "type": "stdin_stdout"}],
    },
}


def convert(*rows):
    return from_code(Dataset.from_list(list(rows)))


def read_tests(row):
    return json.loads(convert(row)["tests"][0])


@pytest.mark.parametrize(
    ("row", "tests"),
    [
        (
            MBPP,
            {
                "asserts": [*MBPP["test_list"][1:], "assert sum(-1, 1) == 0"],
                "setup": "import math",
                "names": ["LIMIT", "sum"],
            },
        ),
        (SANITIZED, {"asserts": SANITIZED["test_list"], "setup": "import math\n", "names": ["similar"]}),
        (LIVECODEBENCH, {"stdin": [["1 2\n", "3"]]}),
        (FUNCTIONAL, {"function": "twoSum", "calls": [[[[2, 7], 9], [[0, 1]]]]}),
        (TACO, {"stdin": [["3 4\n", "7\n"], ["1 2\n", "3\n"]]}),
        (TACO_CALLS, {"function": "add", "calls": [[[1, 2], [[3], 3]], [[3, 4], [[7], 7]]]}),
        (PRIMEINTELLECT, {"function": "add", "calls": [[[1, [2]], [[[3]], [3]]]]}),
        (VERIFIABLE, {"stdin": [["1 2\n", "3\n"]]}),
        (
            VERIFIABLE | {"verification_info": json.dumps(VERIFIABLE["verification_info"])},
            {"stdin": [["1 2\n", "3\n"]]},
        ),
        ({"problem": "Add.", "tests": json.dumps({"stdin": [["1", "1"]]})}, {"stdin": [["1", "1"]]}),
    ],
)
def test_schemas(row, tests):
    assert is_code(list(row))
    converted = convert(row)[0]
    read = json.loads(converted["tests"])
    for kind in ("stdin", "calls"):  # the longest first, whatever its place
        if kind in read:
            assert sorted(map(json.dumps, read.pop(kind))) == sorted(map(json.dumps, tests.pop(kind)))
    assert read | {"setup": read.get("setup", "").strip()} == tests | {"setup": tests.get("setup", "").strip()}
    (message,) = converted["prompt"]
    assert message["role"] == "user"
    question = row.get("text") or row.get("problem") or row["prompt"]
    assert message["content"].startswith(question)
    assert message["content"].endswith(ASKED)
    assert converted["solution"] == row.get("code", row.get("gold_standard_solution", ""))


def test_what_the_prompt_tells():
    mbpp, starter, function, script = (
        convert(row)["prompt"][0][0]["content"] for row in (MBPP, FUNCTIONAL, TACO_CALLS, TACO)
    )
    assert MBPP["test_list"][0] in mbpp
    assert not any(test in mbpp for test in MBPP["test_list"][1:])  # these are scored, that one is not
    assert FUNCTIONAL["starter_code"].rstrip() in starter
    assert "The function is called `add`." in function
    assert "reads standard input" in script
    assert "reads standard input" not in function


def test_the_solutions_of_rows_pass_their_tests():
    solutions = [
        (MBPP, MBPP["code"]),
        (SANITIZED, SANITIZED["code"]),
        (FUNCTIONAL, "class Solution:\n    def twoSum(self, nums, target):\n        return (0, 1)"),
        (TACO_CALLS, "def add(a, b):\n    return a + b"),
        (TACO_CALLS, "def add(a, b):\n    return [a + b]"),
        (PRIMEINTELLECT, "def add(a, b):\n    return [a + b[0]]"),
        (VERIFIABLE, "print(sum(map(int, input().split())))"),
    ]
    answers = [f"```python\n{solution}\n```" for _, solution in solutions]
    assert code_accuracy(answers, [convert(row)["tests"][0] for row, _ in solutions]) == [1.0] * len(solutions)


def test_names_without_a_solution_are_those_that_nobody_else_defines():
    row = {"text": "Add.", "test_list": ["n = len('ab')\nassert [add(x, n) for x in (1,)] == [math.floor(3)]"] * 2}
    assert read_tests(row | {"test_setup_code": "import math"})["names"] == ["add"]


def test_of_many_tests_the_longest_are_taken():
    cases = [{"input": "1" * n, "output": "1", "type": "stdin_stdout"} for n in range(1, 40)]
    kept = read_tests({"problem": "a", "tests": json.dumps(cases)})["stdin"]
    assert [len(given) for given, _ in kept] == list(range(39, 39 - MOST_TESTS, -1))


@pytest.mark.parametrize(
    ("schema", "changes", "message"),
    [
        (MBPP, {"text": " "}, "column 'text': must be a text, not blank"),
        (MBPP, {"test_list": []}, "column 'test_list': must hold an assertion"),
        (MBPP, {"test_list": None}, "column 'test_list': must hold an assertion"),
        (MBPP, {"test_list": "assert sum(1, 2) == 3"}, "column 'test_list': must be a list of texts"),
        (MBPP, {"challenge_test_list": [1]}, "column 'challenge_test_list': must be a list of texts"),
        (SANITIZED, {"test_imports": "import math"}, "column 'test_imports': must be a list of texts"),
        (MBPP, {"test_list": ["assert sum("]}, r"column 'test_list': must be Python \("),
        (MBPP, {"test_list": ["assert 1 == 1"]}, "column 'test_list': must call a function of the solution"),
        (MBPP, {"code": "def sum(:"}, r"column 'code': must be Python \("),
        (LIVECODEBENCH, {"problem": None}, "column 'problem': must be a text"),
        (LIVECODEBENCH, {"tests": "["}, r"column 'tests': must be JSON \("),
        (LIVECODEBENCH, {"tests": None}, r"column 'tests': must be JSON \("),
        (LIVECODEBENCH, {"tests": "[]"}, "column 'tests': must be a list of tests"),
        (LIVECODEBENCH, {"tests": '{"inputs": [], "outputs": []}'}, "column 'tests': must be a list of tests"),
        (LIVECODEBENCH, {"tests": '{"inputs": ["1"], "outputs": []}'}, "column 'tests': must hold as many 'inputs'"),
        (LIVECODEBENCH, {"tests": '[{"input": "1", "output": "1"}]'}, "column 'tests': must have tests of one type"),
        (
            LIVECODEBENCH,
            {"tests": '[{"input": "1", "type": "stdin"}]'},
            "column 'tests': must have tests with 'input'",
        ),
        (LIVECODEBENCH, {"tests": '[{"input": 1, "output": "1", "type": "stdin"}]'}, "'output' are texts"),
        (LIVECODEBENCH, {"tests": '{"stdin": [["1"]]}'}, r"in its tests: tests must be \{\"stdin\""),
        (LIVECODEBENCH, {"tests": '{"asserts": ["assert ("], "setup": "", "names": ["f"]}'}, "is no Python"),
        (FUNCTIONAL, {"metadata": "{}"}, "column 'tests': must name the function"),
        (FUNCTIONAL, {"metadata": "{"}, r"column 'metadata': must be JSON"),
        (
            FUNCTIONAL,
            {"tests": '[{"input": "[", "output": "1", "type": "functional"}]'},
            "column 'tests': must be JSON",
        ),
        (VERIFIABLE, {"verification_info": None}, "column 'verification_info': must have language 'python'"),
        (VERIFIABLE, {"verification_info": {"language": "c", "test_cases": []}}, "must have language 'python'"),
        (VERIFIABLE, {"verification_info": {"language": "python", "test_cases": []}}, "must be a list of tests"),
    ],
)
def test_malformed_rows(tmp_path, schema, changes, message):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [schema, schema, schema | changes, schema]))
    dataset = load_splits(str(path))["train"]
    with pytest.raises(ValueError, match=rf"^Row 2 \(the first is 0\) is malformed .*{message}"):
        from_code(dataset)


def test_datasets_that_are_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(MBPP) + "\n")
    with pytest.raises(ValueError, match="Set dataset_streaming: false"):
        from_code(load_splits(str(path), streaming=True)["train"])
    with pytest.raises(ValueError, match="There is no row"):
        from_code(Dataset.from_dict({"problem": [], "tests": []}))


@pytest.mark.parametrize(
    "columns", [None, ["prompt", "solution"], ["prompt", "tests"], ["problem", "answer"], ["prompt", "reward_model"]]
)
def test_other_data_are_not_taken_for_programming_problems(columns):
    assert not is_code(columns)


# In a recipe and an evaluation


def recipe(path, tmp_path, *arguments):
    config = ["--config", str(ROOT / "recipes/tiny/fipo.yaml"), "--output_dir", str(tmp_path / "out")]
    given = ["--model_name_or_path", str(BASE), "--dataset_name", str(path), "--reward_funcs", "code_reward"]
    return [*config, *given, *map(str, arguments)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text(json.dumps(MBPP) + "\n")
    return path


def test_a_recipe_trains_on_them(data, tmp_path):
    arguments = trainer_arguments(read_and_validate(recipe(data, tmp_path)))
    assert arguments["train_dataset"].column_names == ["prompt", "solution", "tests"]
    assert arguments["reward_funcs"][0].__name__ == "code_reward"


def test_problems_to_evaluate_on(data):
    name, problems = load_problems(str(data))
    assert name == "mbpp"
    assert sorted(problems.column_names) == ["prompt", "solution", "tests"]


def test_where_programs_cannot_be_isolated_a_recipe_does_not_start(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "isolation_problem", lambda: "bubblewrap is not installed")
    sandbox.warn_of.cache_clear()
    with pytest.raises(ValueError, match="cannot be isolated here: bubblewrap is not installed"):
        trainer_arguments(read_and_validate(recipe(data, tmp_path)))
    allowed = trainer_arguments(read_and_validate(recipe(data, tmp_path, "--allow_unsandboxed", "true")))
    assert allowed["reward_funcs"][0].keywords == {"allow_unsandboxed": True}
    assert "RUN WITHOUT A SANDBOX" in caplog.text


def test_allow_unsandboxed_is_for_rewards_that_run_programs(data, tmp_path):
    written = read([*recipe(data, tmp_path), "--allow_unsandboxed", "true", "--reward_funcs", "dapo_reward"])
    with pytest.raises(ValueError, match="'allow_unsandboxed' does nothing: no reward runs programs"):
        trainer_arguments(validate(written))


def test_an_evaluation_asks_for_the_sandbox_before_it_samples(data, monkeypatch):
    problems, accuracy = load_evaluation([str(data)], "code_accuracy")
    assert len(problems["mbpp"]) == 1
    assert accuracy is code_accuracy
    monkeypatch.setattr(sandbox, "isolation_problem", lambda: "bubblewrap is not installed")
    with pytest.raises(ValueError, match="cannot be isolated here"):
        load_evaluation([str(data)], "code_accuracy")
    _, accuracy = load_evaluation([str(data)], "code_accuracy", allow_unsandboxed=True)
    assert accuracy.keywords == {"allow_unsandboxed": True}
    given = ["--model", "none", "--dataset", "recipes/tiny/data", "--reward", "dapo_accuracy", "--allow_unsandboxed"]
    with pytest.raises(
        ValueError, match="--allow_unsandboxed is for a --reward that runs programs, not dapo_accuracy"
    ):
        evaluate.run(evaluate.read_options(given))
