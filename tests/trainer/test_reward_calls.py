import asyncio
import importlib.util
import inspect
import math
import os
import time
from functools import partial

import hanging_rewards
import numpy as np
import psutil
import pytest
import torch
from tiny import logged, longer_is_better, make_args, make_trainer, parameters
from torch import nn
from trl.rewards import accuracy_reward, get_soft_overlong_punishment

from fipo_trl import DAPOTrainer, FIPOConfig
from fipo_trl.trainer.reward_calls import RewardCalls, check


FOUR = {"prompts": ["p"] * 4, "completions": ["a", "bb", "ccc", "dddd"]}


def wrapped(function, timeout=None, action="nan"):
    (call,) = RewardCalls([function], ["its_name"], timeout, action).functions
    return call


def run(call, **kwargs):
    value = call(**FOUR | {"log_extra": None, "log_metric": None} | kwargs)
    return asyncio.run(value) if inspect.isawaitable(value) else value


# What is returned


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"returned 0.5 \(float\). Expected is a list of 4 numbers"),
        (np.float64(0.5), r"returned 0.5 \(float\)"),
        (torch.tensor(0.5), r"returned 0.5 \(float\)"),
        (None, "returned None. Expected"),
        ("1111", r"returned '1111' \(str\)"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, r"\(dict\)"),
        ([1.0, 2.0], "returned 2 rewards. Expected is a list of 4"),
        ([1.0, "2", 3.0, 4.0], r"returned '2' \(str\) for completion 1"),
        (torch.ones(4, 1), r"returned \[1.0\] \(list\) for completion 0"),
        ([1.0, torch.ones(2), 3.0, 4.0], "for completion 1"),
        ([1.0, 2.0, -math.inf, 4.0], r"returned -inf \(float\) for completion 2, which is infinite"),
        ([1.0, 2.0, 3.0, 1e39], "for completion 3, which is infinite"),
        ([1.0, 2.0, 3.0, 10**400], "for completion 3"),
    ],
)
def test_what_is_refused(value, message):
    with pytest.raises(ValueError, match=rf"Reward function its_name .*{message}"):
        run(wrapped(lambda **kwargs: value))

    async def function(**kwargs):
        return value

    with pytest.raises(ValueError, match=rf"Reward function its_name .*{message}"):
        run(wrapped(function))


def test_a_coroutine_that_nobody_awaits():
    with pytest.raises(ValueError, match="returned a coroutine"):
        run(wrapped(lambda **kwargs: hanging_rewards.process_async(**kwargs)))


@pytest.mark.parametrize(
    "value",
    [
        [1, 0.5, None, True],
        (1, 0.5, None, True),
        np.array([1, 0.5, np.nan, 1], dtype=np.float32),
        torch.tensor([1, 0.5, math.nan, 1], dtype=torch.bfloat16),
        [torch.tensor(1), torch.tensor([0.5]), None, np.int64(1)],
    ],
)
def test_what_is_taken(value):
    values = check(value, "its_name", FOUR)
    assert [values[0], values[1], values[3]] == [1, 0.5, 1]
    assert values[2] is None or math.isnan(values[2])
    assert check((x for x in value), "its_name", FOUR)[:2] == [1, 0.5]


def test_called_by_hand():
    """Without completions, as TRL's own tests call the rewards of environments."""

    async def later(environments):
        return len(environments)

    assert wrapped(lambda environments: len(environments))(environments=[1, 2]) == 2
    assert asyncio.run(wrapped(later)(environments=[1, 2])) == 2


def test_wrapping_changes_no_name(tmp_path):
    def mine(completions, level=None, **kwargs):
        """Documented."""
        return longer_is_better(completions)

    async def mine_async(completions, **kwargs):
        return longer_is_better(completions)

    functions = [mine, partial(longer_is_better, unused=1), get_soft_overlong_punishment(16, 4), mine_async]
    trainer = make_trainer(tmp_path, keywords={"reward_funcs": functions}, max_steps=1)
    assert trainer.reward_func_names == ["mine", "longer_is_better", "soft_overlong_punishment_reward", "mine_async"]
    assert functions[0] is mine
    for function, wrapper in zip(functions, trainer.reward_funcs, strict=True):
        assert inspect.signature(wrapper) == inspect.signature(function)
        assert wrapper.__module__ == function.__module__
        assert inspect.iscoroutinefunction(wrapper) == (function is mine_async)
    assert trainer.reward_funcs[0].__doc__ == "Documented."
    trainer.train()
    assert logged(trainer, "rewards/mine/mean") == logged(trainer, "rewards/mine_async/mean")


def test_models_are_left_alone():
    model = nn.Linear(1, 1)
    assert wrapped(model) is model


@pytest.mark.parametrize("trainer_class", [None, DAPOTrainer], ids=["FIPO", "DAPO"])
def test_training_ends_with_the_name(tmp_path, trainer_class):
    def one_number(completions, **kwargs):
        return 1.0

    chosen = {"trainer_class": trainer_class} if trainer_class else {}
    trainer = make_trainer(tmp_path, keywords={"reward_funcs": one_number}, **chosen)
    with pytest.raises(ValueError, match=r"Reward function one_number returned 1\.0"):
        trainer.train()


# Not scored


def test_warns_once_where_nothing_was_scored(tmp_path, caplog):
    def nothing(completions, **kwargs):
        return [None] * len(completions)

    trainer = make_trainer(tmp_path, keywords={"reward_funcs": nothing}, max_steps=24)
    trainer.train()
    (said,) = [record.message for record in caplog.records if "scored" in record.message]
    assert "No completion of this generation was scored: nothing returned None or NaN for all 32" in said
    assert "FIPO is not acting" not in caplog.text  # the learning rate is not why


def test_warns_once_where_one_function_scored_nothing(tmp_path, caplog):
    def nothing(completions, **kwargs):
        return [math.nan] * len(completions)

    trainer = make_trainer(tmp_path, keywords={"reward_funcs": [longer_is_better, nothing]}, max_steps=16)
    trainer.train()
    (said,) = [record.message for record in caplog.records if "scored" in record.message]
    assert "Reward function nothing scored no completion of this generation" in said


def test_rows_without_a_score_are_no_news(tmp_path, caplog):
    def every_other(completions, **kwargs):
        return [None if i % 2 else float(len(text)) for i, text in enumerate(completions)]

    make_trainer(tmp_path, keywords={"reward_funcs": every_other}, max_steps=8).train()
    assert not [record.message for record in caplog.records if "scored" in record.message]


# Time


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_timeout": 0.0}, "reward_timeout=0.0 must be a number of seconds greater than 0"),
        ({"reward_timeout": math.inf}, "reward_timeout=inf must be"),
        ({"reward_timeout": 1.0, "reward_timeout_action": "skip"}, "'skip' must be 'nan' or 'error'"),
        ({"reward_timeout_action": "error"}, "does nothing without reward_timeout"),
    ],
)
def test_wrong_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, FIPOConfig, **settings)


def test_a_hung_process_is_killed_and_started_anew(caplog):
    call = wrapped(hanging_rewards.hangs_for_some, timeout=2)
    first = run(call)[0]
    assert first not in (os.getpid(), None)
    assert run(call)[0] == first  # it is kept
    started = time.monotonic()
    assert run(call, prompts=["hang"] * 4) == [None] * 4
    assert time.monotonic() - started < 60
    assert "Reward function its_name did not return within reward_timeout=2 s: its 4 completions" in caplog.text
    assert not psutil.pid_exists(int(first))
    assert run(call)[0] not in (first, None)


@pytest.mark.parametrize("function", [hanging_rewards.hangs, lambda **kwargs: hanging_rewards.hangs(**kwargs)])
def test_a_timeout_may_be_an_error(function):
    with pytest.raises(TimeoutError, match=r"its_name did not return within reward_timeout=0.5 s. Its 4 completions"):
        run(wrapped(function, timeout=0.5, action="error"))


def test_what_cannot_be_imported_elsewhere_runs_in_a_thread():
    pids = []

    def closure(completions, log_metric, prompts, **kwargs):
        pids.append(os.getpid())
        log_metric("metric", 1.0)
        return hanging_rewards.hangs_for_some(completions, prompts)

    logged = []
    call = wrapped(closure, timeout=1)
    assert run(call, log_metric=lambda *pair: logged.append(pair))[0] == os.getpid()
    assert run(call, prompts=["hang"] * 4, log_metric=lambda *pair: logged.append(pair)) == [None] * 4
    assert pids == [os.getpid()] * 2
    assert logged == [("metric", 1.0)]  # not of the call that timed out


def test_environments_stay_in_their_process():
    assert run(wrapped(hanging_rewards.hangs_for_some, timeout=60), environments=[object()] * 4)[0] == os.getpid()


def test_a_process_has_a_main_thread_and_logs():
    extra, metrics = [], []
    values = run(
        wrapped(hanging_rewards.main_thread, timeout=60),
        log_extra=lambda *pair: extra.append(pair),
        log_metric=lambda *pair: metrics.append(pair),
    )
    assert values == [1.0] * 4
    assert (extra, metrics) == ([("column", FOUR["completions"])], [("metric", 0.5)])


def test_asynchronous_functions_have_a_timeout(caplog):
    first, second = (run(wrapped(hanging_rewards.process_async, timeout=60))[0] for _ in range(2))
    assert os.getpid() not in (first, second)

    async def closure(completions, **kwargs):
        await asyncio.sleep(hanging_rewards.FOREVER)

    assert run(wrapped(closure, timeout=0.2)) == [None] * 4
    assert "did not return within reward_timeout=0.2 s" in caplog.text


def test_what_goes_wrong_elsewhere_is_told_here():
    with pytest.raises(ConnectionError, match="refused") as error:
        run(wrapped(hanging_rewards.refuses, timeout=60))
    assert "in refuses" in "".join(error.value.__notes__)
    with pytest.raises(RuntimeError, match="Reward function its_name: its process ended with status 7"):
        run(wrapped(hanging_rewards.dies, timeout=60))


def test_a_timeout_changes_no_update(tmp_path):
    function = {"reward_funcs": hanging_rewards.length}
    plain = make_trainer(tmp_path / "plain", keywords=function)
    plain.train()
    timed = make_trainer(tmp_path / "timed", keywords=function, reward_timeout=60)
    timed.train()
    expected = parameters(plain)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(timed).items())


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math_verify")
def test_math_verify_times_out_in_a_process():
    chats = [[{"role": "assistant", "content": rf"It is \boxed{{{text}}}"}] for text in ("1/3", "2", "3", "x")]
    solutions = [r"$\frac{1}{3}$", "$2$", "$4$", "$y$"]
    extra = {}
    values = run(
        wrapped(accuracy_reward, timeout=100),
        completions=chats,
        solution=solutions,
        log_extra=lambda name, column: extra.update({name: column}),
    )
    assert values == [1.0, 1.0, 0.0, 0.0]
    assert extra["solution"] == solutions
