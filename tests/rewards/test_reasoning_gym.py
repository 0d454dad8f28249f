"""reasoning-gym's tasks as training data: the same problems everywhere, scored as reasoning-gym scores them."""

import inspect
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import reasoning_gym
from held import PATIENCE
from reasoning_gym.factory import DATASETS

from fipo_trl.data.reasoning_gym import UNUSABLE, load_task
from fipo_trl.data.sources import load_problems, load_splits
from fipo_trl.evaluation.scoring import answers_beside
from fipo_trl.rewards import reasoning_gym as reasoning_gym_rewards
from fipo_trl.rewards import reasoning_gym_process, sandbox
from fipo_trl.rewards.reasoning_gym import predicted_answer, reasoning_gym_accuracy, reasoning_gym_reward
from fipo_trl.rewards.reasoning_gym_process import EVALUATED, PARSED_BY_SYMPY, is_code, process_of


TASKS = sorted(DATASETS.keys() - UNUSABLE.keys())
# 0.1 s and more for one problem
SLOW = {
    "futoshiki",
    "intermediate_integration",
    "knight_swap",
    "puzzle24",
    "sokoban",
    "zebra_puzzles",
}
# Where the answer is empty, since there are several: one of them, from the metadata
EXAMPLES = {
    "graph_color": lambda metadata: json.dumps(metadata["possible_answer"]),
    "propositional_logic": lambda metadata: metadata["example_answer"],
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
}
ORDERED_BY_HASH = {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
ORDERED_BY_HASH |= {"list_functions"}
WITHOUT_ANSWER = {"boxnet", "rush_hour"}
ODD = ["", " ", "x", "é∞𝟙٣\x00\ud800", "[" * 5000, "(" * 5000, "1" * 9900, "{}", "null", "NaN", '{"a": 1}', "[[1], 2]"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Programs of codeio write files, which `entry_of` lets them do where it runs."""
    monkeypatch.chdir(tmp_path)


def chat(text):
    return [{"role": "assistant", "content": text}]


def few(task, **settings):
    sizes = {"size": 1, "test_size": 1} if task in SLOW else {"size": 6, "test_size": 3}
    return load_task(f"reasoning_gym/{task}", sizes | settings)


def entry_of(problem):
    """The entry without our code."""
    fields = json.loads(problem)
    dataset = reasoning_gym.create_dataset(fields["task"], **fields["settings"])
    return dataset, dataset[fields["index"]]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task(task):
    """Problems, and the scores of right answers, of garbage and of none, are reasoning-gym's own."""
    splits = few(task)
    rows = [*splits["train"], *splits["test"]]
    assert len({row["prompt"][0]["content"] for row in rows}) == len(rows)
    row = rows[0]
    dataset, entry = entry_of(row["problem"])
    question = row["prompt"][0]["content"].rpartition("\n\n")[0]
    right = EXAMPLES[task](entry["metadata"]) if task in EXAMPLES else row["solution"]
    answers = ["garbage", "1", "[]", "", right]
    rewards = reasoning_gym_reward([chat(f"So <answer>{each}</answer>.") for each in answers], [row["problem"]] * 5)
    if task not in ORDERED_BY_HASH:  # these are made from other seeds of hashes here than in the other process
        assert question == entry["question"]
        assert row["solution"] == ("" if entry["answer"] is None else str(entry["answer"]))
        assert rewards == [own_score(dataset, entry, each) for each in answers]
    assert rewards[0] < 1
    if task not in WITHOUT_ANSWER:
        assert rewards[-1] == 1
        assert reasoning_gym_accuracy([f"<answer>{right}</answer>", right], [row["problem"]] * 2) == [1.0, 0.0]
    without = [right, f"<answer>{right}", f"{right}</answer>", chat(None), []]
    assert reasoning_gym_reward(without, [row["problem"]] * 5) == [0.0] * 5


def own_score(dataset, entry, answer):
    try:
        return dataset.score_answer(answer, entry)
    except (TypeError, ValueError):  # boxnet and prime_factorization raise
        return 0.0


# The package's folder without its `__init__.py`, which imports torch
BARE = f"""
import sys, types
for name in ("fipo_trl", "fipo_trl.rewards"):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [{str(Path(reasoning_gym_process.__file__).parent)!r}]
"""


def run_beside(code, *arguments, **environment):
    """Output of a Python process that imports reasoning_gym_process.py, and not torch. In a folder of its own: beside
    it there is a module with the name of reasoning-gym's."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(reasoning_gym_process.__file__, folder)
        environment = os.environ | {"PYTHONPATH": folder} | environment
        command = [sys.executable, "-c", BARE + code, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_problems_are_the_same_in_every_process():
    """In each order, too. These tasks go through sets of strings, or draw random numbers of no seed of their own."""
    code = """
import json, sys
from reasoning_gym_process import ask
for task in sys.argv[1:]:
    for index in reversed(range(12)):
        print(ask("make", json.dumps({"task": task, "settings": {"seed": 1, "size": 12}, "index": index})))
"""
    tasks = [*sorted(ORDERED_BY_HASH - {"knight_swap"}), "pool_matrix"]
    one = run_beside(code, *tasks, PYTHONHASHSEED="1").splitlines()
    other = run_beside(code, *tasks[::-1], PYTHONHASHSEED="2").splitlines()
    assert sorted(one) == sorted(other)
    assert len(set(one)) == 12 * len(tasks)


def item_seeds(dataset):
    problems = [json.loads(problem) for problem in dataset["problem"]]
    return {problem["settings"]["seed"] + problem["index"] for problem in problems}


def test_splits_share_no_seed_whatever_their_sizes_and_seeds():
    splits = [few("count_bits", seed=seed, size=size) for seed in (0, 1, 2**70) for size in (1, 40)]
    train = [item_seeds(split["train"]) for split in splits]
    held_out = [item_seeds(split["test"]) for split in splits]
    assert not set.union(*train) & set.union(*held_out)
    assert held_out[0] == held_out[1]  # of whatever size the other split is
    assert not train[1] & train[3]
    assert max(max(seeds) for seeds in train + held_out) < 2**32
    dataset = reasoning_gym.create_dataset("count_bits", seed=min(train[0]), size=1)  # what is called a seed here
    assert dataset[0]["question"] in splits[0]["train"][0]["prompt"][0]["content"]


def questions(dataset):
    return [prompt[0]["content"] for prompt in dataset["prompt"]]


def test_a_question_stands_once_and_in_one_split(caplog):
    """Of 45 words of three letters, most are in both splits at first."""
    caplog.set_level(logging.INFO)
    splits = few("gcd", size=60, test_size=15, max_value=14, min_numbers=2, max_numbers=2)
    train, held_out = questions(splits["train"]), questions(splits["test"])
    assert len(set(train)) == 60
    assert len(set(held_out)) == 15
    assert not set(train) & set(held_out)
    made, repeated, kept, made_held_out, again, kept_held_out, left_out = map(
        int,
        re.search(
            r"reasoning_gym/gcd: train: (\d+) made, (\d+) repeated, (\d+) kept; "
            r"test: (\d+) made, (\d+) repeated, (\d+) kept, (\d+) left out that stand in train\.",
            caplog.text,
        ).groups(),
    )
    assert (kept, kept_held_out) == (60, 15)
    assert made == repeated + kept
    assert made_held_out == again + kept_held_out + left_out
    settings = {"max_value": 14, "min_numbers": 2, "max_numbers": 2}
    settings |= json.loads(splits["train"]["problem"][0])["settings"]
    own = [
        reasoning_gym.create_dataset("gcd", **settings)[index]["question"] for index in range(1, 2 * made_held_out, 2)
    ]
    in_train = [any(question in text for text in train) for question in own]
    assert sum(in_train) == left_out > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 300}, r"no 300 different problems for its split 'train' .* kept\)\. Lower size .* max_value=3"),
        ({"size": 9, "test_size": 9}, r"no 9 different problems for its split 'test' .* left out that stand in train"),
    ],
)
def test_too_few_problems_are_found_out_soon(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        few("gcd", max_value=3, min_numbers=2, max_numbers=2, **settings)
    made = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) made", str(error.value))]
    assert sum(made) < 500


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("spell_backwards", {}, "has no task 'spell_backwards'. Did you mean 'reasoning_gym/spell_backward'?"),
        ("qqq", {}, "has no task 'qqq'. It has ab, acre, .*, zebra_puzzles"),
        ("composite", {}, "'reasoning_gym/composite' is a mixture"),
        ("game_of_life_halting", {}, "has a scorer that takes any answer for right"),
        (
            "gcd",
            {"max_val": 3},
            "has no setting 'max_val'. Did you mean 'max_value'.* size, test_size, seed.*min_numbers=2",
        ),
        ("gcd", {"train_size": 3}, "no setting 'train_size'. Did you mean 'test_size'"),
        ("gcd", {"max_value": "3"}, "max_value='3' of reasoning_gym/gcd must be of type int, like its default, 1000"),
        ("gcd", {"max_value": 3.5}, "max_value=3.5 of reasoning_gym/gcd must be of type int"),
        ("gcd", {"max_value": 0}, r"reasoning_gym/gcd does not take \{'max_value': 0\} \(.*max_value"),
        ("gcd", {"size": 0}, "size=0 must be a whole number, at least 1"),
        ("gcd", {"test_size": True}, "test_size=True must be a whole number, at least 1"),
        ("gcd", {"seed": -1}, "seed=-1 must be a whole number, at least 0"),
        ("gcd", {"seed": 1.0}, "seed=1.0 must be a whole number"),
        ("gcd", {"examples": "gcd of 2 and 4? 2"}, r"examples='gcd .*' must be a list of pairs of texts"),
        ("gcd", {"examples": [["gcd of 2 and 4?", 2]]}, r"examples=\[.*\] must be a list .* Quote numbers."),
        ("gcd", {"examples": [["gcd of 2 and 4?"]]}, "must be a list of pairs"),
        (
            "spell_backward",
            {"data_file": "none.txt"},
            "cannot make problems with .*data_file='none.txt': FileNotFound",
        ),
    ],
)
def test_settings_that_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_task(f"reasoning_gym/{name}", settings)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'dataset_name: .*not installed. pip install "\.\[reasoning-gym\]" in a clone'
    ):
        load_splits("reasoning_gym/gcd")


def test_a_folder_of_that_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reasoning_gym/gcd").mkdir(parents=True)
    Path("reasoning_gym/gcd/train.jsonl").write_text('{"prompt": "a", "solution": "b"}\n')
    assert load_splits("reasoning_gym/gcd")["train"].to_list() == [{"prompt": "a", "solution": "b"}]


def test_problems_to_evaluate_on():
    settings = {"size": 6, "test_size": 4, "seed": 5}
    name, problems = load_problems("reasoning_gym/gcd", task_settings={"reasoning_gym/gcd": settings})
    assert name == "gcd"
    assert problems.to_list() == few("gcd", **settings)["test"].select_columns(problems.column_names).to_list()
    name, problems = load_problems("dice=reasoning_gym/coin_flip", task_settings={"reasoning_gym/coin_flip": settings})
    assert (name, len(problems)) == ("dice", 4)
    with pytest.raises(ValueError, match="takes no dataset_config or dataset_streaming"):
        load_splits("reasoning_gym/gcd", streaming=True)


# Rewards


@pytest.fixture(scope="module")
def gcd():
    return few("gcd")["train"][0]


def test_the_last_answer_counts(gcd):
    right = f"<answer>{gcd['solution']}</answer>"
    texts = [
        f"<answer>0</answer> no, {right}",
        f"{right} no, <answer>0</answer>",
        f"<answer>\n {right[8:]}",
        right + " " * 9000,
    ]
    assert reasoning_gym_reward(texts, [gcd["problem"]] * 4) == [1.0, 0.0, 1.0, 1.0]
    assert reasoning_gym_reward([right + " " * 10_000], [gcd["problem"]]) == [0.0]
    assert predicted_answer(chat("a <answer> 1\n2 </answer>")) == "1\n2"
    assert predicted_answer("a") is None
    assert answers_beside(reasoning_gym_accuracy) is predicted_answer


def test_accuracy_is_0_or_1():
    row = few("spell_backward", min_word_len=5)["train"][0]
    answers = [row["solution"], row["solution"] + "x", row["solution"][:-1] + "x", "x"]
    completions = [f"<answer>{answer}</answer>" for answer in answers]
    rewards = reasoning_gym_reward(completions, [row["problem"]] * 4)
    assert any(0 < reward < 1 for reward in rewards[1:])
    assert reasoning_gym_accuracy(completions, [row["problem"]] * 4) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "task", ["spell_backward", "prime_factorization", "boxnet", "codeio", "countdown", "rubiks_cube"]
)
def test_no_completion_raises(task, caplog):
    problem = few(task)["train"]["problem"][0]
    completions = [f"<answer>{answer}</answer>" for answer in ODD] + [
        "<answer>" * 20_000,
        None,
        [],
        chat(None),
        chat([{}]),
    ]
    start = time.process_time()
    rewards = reasoning_gym_reward(completions, [problem] * len(completions))
    assert all(0 <= reward <= 0.2 for reward in rewards)
    assert time.process_time() - start < 5  # of this process; the other one's is bounded by SECONDS
    assert sum("failed on the answer" in record.message for record in caplog.records) <= 1


def test_a_scorer_that_does_not_end_is_ended(monkeypatch, caplog):
    """`9**9**9` has 370 million digits."""
    row = few("countdown")["train"][0]
    monkeypatch.setattr(reasoning_gym_rewards, "FAILED", set())
    completions = [f"<answer>{answer}</answer>" for answer in ("9**9**9", row["solution"])]
    before = process_of(os.getpid()).pid
    assert reasoning_gym_reward(completions, [row["problem"]] * 2) == [0.0, 1.0]
    assert process_of(os.getpid()).pid != before
    assert "The scorer of reasoning_gym/countdown failed on the answer '9**9**9' (more than 2 s)" in caplog.text


CODE = """
__import__("pathlib").Path("{path}").touch()
[__import__("pathlib").Path("{path}").touch()]
(lambda: __import__("pathlib").Path("{path}").touch())()
[open("{path}", "w") for x in [1]]
sin('open("{path}", "w")')
open("{path}", "w")!
exec("open('{path}', 'w')")
""".strip().splitlines()


@pytest.mark.parametrize("task", sorted(EVALUATED | PARSED_BY_SYMPY))
def test_answers_that_are_code_are_not_run(task, tmp_path):
    problem = few(task)["train"]["problem"][0]
    path = tmp_path / "made"
    codes = [code.format(path=path) for code in CODE]
    assert reasoning_gym_reward([f"<answer>{code}</answer>" for code in codes], [problem] * len(codes)) == [0.0] * len(
        codes
    )
    assert not path.exists()
    dataset, entry = entry_of(problem)  # the danger is real: reasoning-gym's own scorer runs it
    if task not in ORDERED_BY_HASH:
        dataset.score_answer(codes[0], entry)
        assert path.exists()


def test_all_scorers_that_evaluate_are_known():
    evaluating = {
        task
        for task in DATASETS
        if re.search(r"\beval\((?!entry)|parse_expr\(", inspect.getsource(DATASETS[task][0].score_answer))
    }
    assert evaluating == EVALUATED | PARSED_BY_SYMPY


@pytest.mark.parametrize(
    ("task", "answer", "expected"),
    [
        ("countdown", "(3 + 4) * 2 - 1/5", False),
        ("countdown", "x = 3", True),
        ("countdown", "exit()", True),
        ("simple_integration", "2*X**3/3 + sqrt(X)*sin(2*X)**-1 + C", False),
        ("intermediate_integration", "Integral(x*cos(x), x)", True),  # the question, which its scorer takes for solved
        ("intermediate_integration", "sin(x).diff(x)", True),
        ("intermediate_integration", "sin('x')", True),
        ("n_queens", "[['Q', '_'], ['_', 'Q']]", False),
        ("n_queens", "Q _\n_ Q", False),
        ("string_insertion", "ABCDE", False),
        ("string_insertion", "exit()", True),
        ("spiral_matrix", "[x for x in [1]]", True),
    ],
)
def test_is_code(task, answer, expected):
    assert is_code(answer, task) is expected


def test_arguments_that_are_refused(gcd):
    with pytest.raises(ValueError, match="2 completions but 1 problems"):
        reasoning_gym_reward(["a", "b"], [gcd["problem"]])
    with pytest.raises(ValueError, match="problem 'x' cannot be made: JSONDecodeError"):
        reasoning_gym_reward(["a"], ["x"])


def test_each_process_has_its_own_and_takes_it_along():
    code = "import os, reasoning_gym_process; print(reasoning_gym_process.process_of(os.getpid()).pid)"
    pid = int(run_beside(code))
    assert pid != process_of(os.getpid()).pid
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_files_that_problems_write_are_not_left_here(tmp_path):
    process_of(os.getpid()).kill()
    process_of(os.getpid()).wait()  # the next one starts here
    few("codeio", size=80)
    assert list(tmp_path.iterdir()) == []


def test_examples_are_turns_before_the_question(gcd):
    rows = few("gcd", examples=[["gcd of 2 and 4?", "2"], ["gcd of 6 and 9?", "3"]])["train"]
    for row in rows:
        *before, question = row["prompt"]
        assert [turn["content"] for turn in before] == [
            "gcd of 2 and 4?",
            "<answer>2</answer>",
            "gcd of 6 and 9?",
            "<answer>3</answer>",
        ]
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant"] * 2 + ["user"]
        _, entry = entry_of(row["problem"])
        assert question["content"] == entry["question"]
        assert reasoning_gym_accuracy([f"<answer>{row['solution']}</answer>"], [row["problem"]]) == [1.0]


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of what Linux has")
def test_scorers_run_in_the_sandbox(tmp_path):
    """Asked of the process in which they run, of a copy of the module that evaluates what it is asked."""
    (tmp_path / "beside").mkdir()
    copy = tmp_path / "beside" / "reasoning_gym_process.py"
    source = Path(reasoning_gym_process.__file__).read_text()
    changed = source.replace('"score": score}', '"score": score, "look": eval}').replace('{"make": 120', '{"look": 9')
    assert changed != source
    copy.write_text(changed)
    (tmp_path / "outside").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        looks = [
            f"__import__('os').path.exists({str(tmp_path / 'outside')!r})",
            f"__import__('socket').socket().connect_ex({server.getsockname()!r}) == 0",
            "__import__('os').getuid() == 0",
            "'HF_TOKEN' in __import__('os').environ",
            "__import__('importlib').util.find_spec('reasoning_gym') is not None",
        ]
        code = "import json, sys\nfrom reasoning_gym_process import ask\n"
        code += "print(json.dumps([ask('look', each) for each in sys.argv[1:]]))"
        environment = os.environ | {"PYTHONPATH": str(copy.parent), "HF_TOKEN": "secret"}
        command = [sys.executable, "-c", BARE + code, *looks]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [False, False, False, False, True]


def test_scorers_that_evaluate_need_a_sandbox(monkeypatch, gcd):
    row = few("countdown")["train"][0]
    monkeypatch.setattr(sandbox, "isolation_problem", lambda: "bubblewrap is not installed")
    sandbox.warn_of.cache_clear()
    right = f"<answer>{row['solution']}</answer>"
    for completion in (right, ""):
        with pytest.raises(ValueError, match="cannot be isolated here: bubblewrap is not installed"):
            reasoning_gym_accuracy([completion], [row["problem"]])
    assert reasoning_gym_accuracy([right], [row["problem"]], allow_unsandboxed=True) == [1.0]
    assert reasoning_gym_accuracy([f"<answer>{gcd['solution']}</answer>"], [gcd["problem"]]) == [1.0]


def test_a_process_that_was_killed_is_replaced(gcd):
    process = process_of(os.getpid())
    process.kill()
    process.wait()
    assert reasoning_gym_reward([f"<answer>{gcd['solution']}</answer>"], [gcd["problem"]]) == [1.0]
