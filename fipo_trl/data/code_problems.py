"""Programming problems in the schemas of public datasets -> columns `prompt`, `solution` and `tests`.

A dataset is known by its columns:

| schema | columns | tests |
|---|---|---|
| MBPP | `text` or `prompt`, `test_list`; `code`, `test_setup_code`, `challenge_test_list`, ... | assertions |
| DeepCoder, LiveCodeBench, TACO | `problem`, `tests`; `starter_code`, `metadata` | input and output, or calls |
| ours | `problem`, `tests` as they become | any |
| verifiable-coding-problems | `problem` or `prompt`, `verification_info` | input and output, or calls |

What `tests` becomes is said in [`fipo_trl.rewards.code_tests`].

Sources: https://huggingface.co/datasets/google-research-datasets/mbpp,
https://huggingface.co/datasets/agentica-org/DeepCoder-Preview-Dataset,
https://huggingface.co/datasets/open-r1/verifiable-coding-problems-python
"""

import ast
import builtins
import json
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from fipo_trl.rewards.code_tests import parse_tests


MOST_TESTS = 15  # of a problem; those with the longest input are taken, as DeepCoder's scorer does
INPUT_OUTPUT = ("stdin_stdout", "stdin")  # what the schemas call such tests

ASKED = (
    "Think step by step, then write the whole program in Python, with its standard library only, as the last thing of "
    "your answer, between ```python and ```."
)
READS = "The program reads standard input and writes to standard output."


def is_code(columns: list[str] | None) -> bool:
    """Whether these are the columns of one of the schemas, for [`from_code`] to convert."""
    return columns is not None and reader_of(set(columns)) is not None


def reader_of(columns: set[str]) -> "Callable[[dict], tuple[str, str, dict]] | None":
    """What reads a row: its question, its solution (empty where there is none) and its tests."""
    if "test_list" in columns and columns & {"text", "prompt"}:
        return read_mbpp
    if "verification_info" in columns and columns & {"problem", "prompt"}:
        return read_verifiable
    if {"problem", "tests"} <= columns and "prompt" not in columns:
        return read_deepcoder
    return None


def from_code(dataset: Dataset) -> Dataset:
    """Rows of a public schema -> columns `prompt` (chat, one user turn), `solution` (text) and `tests` (JSON).

    Of assertions, the first stands in the prompt, since it shows the function's name and arguments. So it does not
    count where there are others: to know its answer by heart earns nothing.

    Args:
        dataset: With the columns of one of the schemas; others are not read.

    Raises:
        ValueError: for a malformed row, with its number (the first is 0) and column; for a streamed dataset.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError("A streamed dataset cannot be converted row by row. Set dataset_streaming: false.")
    read = reader_of(set(dataset.column_names))
    assert read is not None  # the caller has asked `is_code`
    rows = []
    for number, row in enumerate(dataset):
        try:
            question, solution, tests = read(row)
            written = json.dumps(tests)
            parse_tests(written)
        except Malformed as error:
            column, expected, value = error.args
            raise ValueError(
                f"Row {number} (the first is 0) is malformed in column '{column}': {expected}, got {value!r:.200}."
            ) from error
        except ValueError as error:
            raise ValueError(f"Row {number} (the first is 0) is malformed in its tests: {error}") from error
        prompt = [{"role": "user", "content": f"{question.strip()}\n\n{ASKED}"}]
        rows.append({"prompt": prompt, "solution": solution, "tests": written})
    if not rows:
        raise ValueError("There is no row. Give a dataset with problems.")
    return Dataset.from_list(rows)


class Malformed(ValueError):
    """A value that is not as its schema has it: the column, what was expected, and the value."""


def text_in(row: dict, *columns: str) -> str:
    """The text in the first of these columns that there is."""
    column = next(name for name in columns if name in row)
    if not isinstance(row[column], str) or not row[column].strip():
        raise Malformed(column, "must be a text, not blank", row[column])
    return row[column]


# MBPP


def read_mbpp(row: dict) -> tuple[str, str, dict]:
    """A row of MBPP, also of its sanitized version, in which `text` is called `prompt`, and of MBPP+."""
    asserts = texts_in(row, "test_list")
    if not asserts:
        raise Malformed("test_list", "must hold an assertion", asserts)
    setup = "\n".join([*texts_in(row, "test_imports"), row.get("test_setup_code") or ""])
    solution = row.get("code") or ""
    if not isinstance(solution, str):
        raise Malformed("code", "must be a text", solution)
    names = names_of_program(solution, setup, asserts)
    example, *others = asserts
    others += texts_in(row, "challenge_test_list")
    question = f"{text_in(row, 'text', 'prompt')}\n\nFor example, this holds:\n```python\n{example}\n```"
    return question, solution, {"asserts": others or [example], "setup": setup, "names": names}


def texts_in(row: dict, column: str) -> list[str]:
    """The texts in a column, none where there is no such column or nothing in it."""
    found = row.get(column) or []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise Malformed(column, "must be a list of texts", found)
    return found


def names_of_program(solution: str, setup: str, asserts: list[str]) -> list[str]:
    """The names that assertions have from the program, as the solution defines them.

    Without a solution, those that neither the tests nor Python define.
    """
    defined: set[str] = set()
    used: set[str] = set()
    for test in [setup, *asserts]:
        for node in ast.walk(parsed("test_list", test)):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
            elif isinstance(node, ast.alias):
                defined.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
    if solution:
        tree = parsed("code", solution)
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        names = used & own
    else:
        names = used - defined - set(vars(builtins))
    if not names:
        raise Malformed("test_list", "must call a function of the solution", asserts)
    return sorted(names)


def parsed(column: str, source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise Malformed(column, f"must be Python ({error})", source) from error


# DeepCoder and verifiable-coding-problems


def read_deepcoder(row: dict) -> tuple[str, str, dict]:
    """A row of DeepCoder: `tests` is JSON, a list of tests, or lists of `inputs` and `outputs` with an `fn_name`.

    Or one of ours, with tests as they become.
    """
    tests = from_json("tests", row["tests"])
    if isinstance(tests, dict) and tests.keys() & {"stdin", "asserts", "calls"}:
        return text_in(row, "problem") + (f"\n\n{READS}" if "stdin" in tests else ""), "", tests
    metadata = row.get("metadata") or {}
    metadata = from_json("metadata", metadata) if isinstance(metadata, str) else metadata
    name = (metadata or {}).get("func_name")
    if isinstance(tests, dict):
        inputs, outputs, name = tests.get("inputs"), tests.get("outputs"), tests.get("fn_name") or name
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise Malformed("tests", "must hold as many 'inputs' as 'outputs', or be a list", tests)
        kind = "function_call" if name else "stdin_stdout"
        tests = [{"input": one, "output": other, "type": kind} for one, other in zip(inputs, outputs, strict=True)]
    question = text_in(row, "problem")
    if starter := row.get("starter_code"):
        question += f"\n\nStart from this code:\n```python\n{starter.rstrip()}\n```"
    return with_cases("tests", question, "", tests, name)


def read_verifiable(row: dict) -> tuple[str, str, dict]:
    """A row of verifiable-coding-problems: `verification_info` has a `language` and `test_cases`."""
    information = row["verification_info"]
    if isinstance(information, str):
        information = from_json("verification_info", information)
    if not isinstance(information, dict) or information.get("language") != "python":
        raise Malformed("verification_info", "must have language 'python' and 'test_cases'", information)
    solution = row.get("gold_standard_solution") or ""
    return with_cases(
        "verification_info", text_in(row, "problem", "prompt"), solution, information.get("test_cases"), None
    )


def from_json(column: str, text) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise Malformed(column, f"must be JSON ({error})", text) from error


def with_cases(column: str, question: str, solution: str, cases, name: str | None) -> tuple[str, str, dict]:
    """A question with its test cases: dicts with `input`, `output`, and `type` or `testtype`.

    Args:
        name: Of the function to call, where the cases do not name it.
    """
    if not isinstance(cases, list) or not cases or not all(isinstance(case, dict) for case in cases):
        raise Malformed(column, "must be a list of tests", cases)
    kinds = {case.get("testtype") or case.get("type") for case in cases}
    read = {"functional": lines_of_json, "function_call": list_of_arguments}
    kind = kinds.pop()
    if kinds or kind not in (*INPUT_OUTPUT, *read):
        raise Malformed(column, f"must have tests of one type, of {', '.join([*INPUT_OUTPUT, *read])}", kinds | {kind})
    for case in cases:
        if case.get("input") is None or case.get("output") is None:
            raise Malformed(column, "must have tests with 'input' and 'output'", case)
    cases = sorted(cases, key=lambda case: len(str(case["input"])), reverse=True)[:MOST_TESTS]
    if kind in INPUT_OUTPUT:
        pairs = [[joined(column, case["input"]), joined(column, case["output"])] for case in cases]
        return f"{question}\n\n{READS}", solution, {"stdin": pairs}
    name = cases[0].get("fn_name") or (cases[0].get("metadata") or {}).get("func_name") or name
    if not isinstance(name, str) or not name.isidentifier():
        raise Malformed(column, "must name the function that its tests call, as 'fn_name' or 'func_name'", name)
    calls = [list(read[kind](column, case["input"], case["output"])) for case in cases]
    return f"{question}\n\nThe function is called `{name}`.", solution, {"function": name, "calls": calls}


def joined(column: str, value) -> str:
    """A text, also where it comes as a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise Malformed(column, "must have tests whose 'input' and 'output' are texts", value)
    return value


def lines_of_json(column: str, given, output) -> tuple[list, list]:
    """Arguments and accepted values of LiveCodeBench: an argument a line, each JSON."""
    lines = joined(column, given).strip().split("\n")
    return [from_json(column, line) for line in lines], [from_json(column, output)]


def list_of_arguments(column: str, given, output) -> tuple[list, list]:
    """Arguments and accepted values of TACO and PrimeIntellect: lists, or JSON of such; the value often in a list."""
    arguments = from_json(column, given) if isinstance(given, str) else given
    if not isinstance(arguments, list):
        raise Malformed(column, "must have tests whose 'input' is a list of arguments", given)
    value = from_json(column, output) if isinstance(output, str) else output
    return arguments, [value, value[0]] if isinstance(value, list) and len(value) == 1 else [value]
