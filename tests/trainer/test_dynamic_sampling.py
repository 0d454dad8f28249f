import io
import itertools
import json
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pandas
import pytest
import tiny
import torch
from datasets import Dataset
from held import REWARD, HeldRun
from test_fipo_trainer import Kill, KillAt
from tiny import (
    fixed_rollouts,
    generate,
    logged,
    longer_is_better,
    make_trainer,
    parameters,
    right_for_some,
    scored_rollouts,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from fipo_trl import DAPOTrainer, FIPOTrainer
from fipo_trl.trainer.dynamic_sampling import DynamicSampler, PromptStream, spread
from fipo_trl.trainer.rollouts import make_sampler


KIND = {row: ["mixed", "right", "wrong"][(row * 7 + 3) % 11 % 3] for row in range(50)}
REWARDS = {"mixed": [1.0, 0.0, 1.0], "right": [1.0, 1.0, 1.0], "wrong": [-1.0, -1.0, -1.0]}
PROMPTS = list(dict.fromkeys(tiny.PROMPTS))


TOKENIZER = AutoTokenizer.from_pretrained(tiny.BASE)


def rollouts_of(prompt):
    trainer = SimpleNamespace(
        processing_class=TOKENIZER, num_generations=4, accelerator=SimpleNamespace(process_index=0)
    )
    return fixed_rollouts([prompt] * 4, trainer)


def rewards_of(prompt):
    """The deciding rewards of the fixed rollouts of a prompt, four of them."""
    completions = rollouts_of(prompt)["completion_ids"]
    return right_for_some([prompt] * 4, TOKENIZER.batch_decode(completions, skip_special_tokens=True))


MIXED_PROMPTS = [prompt for prompt in PROMPTS if len(set(rewards_of(prompt))) > 1]


def roll_out(rows):
    return torch.tensor([REWARDS[KIND[row]] for row in rows]).unsqueeze(2), [{0: row} for row in rows]


def rows(batch):
    return [group.rollouts[0] for group in batch.groups]


# Decisions


def test_spread():
    nan = math.nan
    rewards = torch.tensor([[1, 1, 1], [0, 1, 0], [-1, -1, -1 + 1e-7], [nan, 1, 0], [nan, 1, 1], [nan, nan, nan]])
    assert (spread(rewards) > 1e-6).tolist() == [False, True, False, True, False, False]


def test_stream():
    stream = PromptStream(10, seed=3)
    epochs = [[stream[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    again = PromptStream(10, seed=3)
    assert [again[i] for i in (25, 5, 15)] == [epochs[2][5], epochs[0][5], epochs[1][5]]
    assert [PromptStream(10, seed=4)[i] for i in range(10)] != epochs[0]
    assert [PromptStream(4, seed=3, shuffle=False)[i] for i in range(6)] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("carry_over", [False, True])
@pytest.mark.parametrize("multiple", [1, 2, 3, 7])
@pytest.mark.parametrize("oversample", ["auto", 1.0, 1.5, 4.0])
def test_batches_are_the_mixed_groups_of_the_stream_in_order(oversample, multiple, carry_over):
    stream = PromptStream(50, seed=1)
    expected = (stream[i] for i in itertools.count() if KIND[stream[i]] == "mixed")
    sampler = DynamicSampler(stream, 8, oversample=oversample, multiple=multiple, carry_over=carry_over)
    asked = []

    def spy(rows):
        asked.append(len(rows))
        return roll_out(rows)

    for _ in range(12):
        asked.clear()
        too_old = len(sampler.pool[8:])
        batch = sampler.fill(spy)
        assert rows(batch) == list(itertools.islice(expected, 8))
        list(itertools.islice(expected, too_old))  # dropped
        assert (batch.fillers, batch.rounds, batch.generated) == (0, len(asked), sum(asked))
        assert all(size % multiple == 0 for size in asked)
        assert len(sampler.pool) == (batch.surplus if carry_over else 0)
        mixed = batch.generated - batch.all_right - batch.all_wrong
        assert mixed + batch.carried_over == 8 + batch.surplus


@pytest.mark.parametrize(("oversample", "carried"), [(4.0, 2), (8.0, 8)])
def test_carried_groups_are_used_first_once_and_never_two_generations_later(oversample, carried):
    sampler = DynamicSampler(PromptStream(50, seed=1), 8, oversample=oversample, carry_over=True)
    first = sampler.fill(roll_out)
    pool = [group.rollouts[0] for group in sampler.pool]
    assert len(pool) == first.surplus > 0
    second = sampler.fill(roll_out)
    assert second.carried_over == min(8, len(pool)) == carried
    assert rows(second)[: second.carried_over] == pool[:8]
    left = [group.rollouts[0] for group in sampler.pool]
    assert not set(pool) & set(left)
    if carried == 8:
        assert (second.rounds, second.generated, left) == (0, 0, [])
        assert math.isnan(second.mean_reward)


def test_counts():
    batch = DynamicSampler(PromptStream(50, seed=0, shuffle=False), 5, oversample=4.0).fill(roll_out)
    kinds = [KIND[row] for row in range(20)]
    assert (batch.generated, batch.rounds) == (20, 1)
    assert (batch.all_right, batch.all_wrong) == (kinds.count("right"), kinds.count("wrong"))
    assert batch.surplus == kinds.count("mixed") - 5
    assert batch.mean_reward == pytest.approx(sum(sum(REWARDS[kind]) for kind in kinds) / 60)


def test_when_rounds_run_out_nothing_found_is_lost(caplog):
    def rarely_mixed(rows):
        rewards = torch.ones(len(rows), 2, 2)
        rewards[:, 0, 1] = torch.tensor([0.0 if row % 10 == 0 else 1.0 for row in rows])
        return rewards, [{0: row} for row in rows]

    settings = {"deciding": 1, "oversample": 2.0, "max_rounds": 2}
    sampler = DynamicSampler(PromptStream(100, seed=0, shuffle=False), 8, carry_over=True, **settings)
    with caplog.at_level(logging.WARNING):
        batch = sampler.fill(rarely_mixed)
    assert rows(batch) == [0, 10, 20, 30, 1, 2, 3, 4]
    assert (batch.fillers, batch.rounds, batch.generated, batch.all_right) == (4, 2, 32, 28)
    assert "found 4 of 8 groups" in caplog.text
    assert "dynamic_sampling_max_rounds=2" in caplog.text
    assert sampler.pool == []
    assert rows(sampler.fill(rarely_mixed))[:3] == [40, 50, 60]

    strict = DynamicSampler(PromptStream(100, seed=0, shuffle=False), 8, strict=True, **settings)
    with pytest.raises(RuntimeError, match=r"found 4 of 8.*dynamic_sampling_strict=False"):
        strict.fill(rarely_mixed)


def test_nothing_is_ever_mixed():
    sampler = DynamicSampler(PromptStream(100, seed=0), 8, max_rounds=3)
    asked = []

    def never_mixed(rows):
        asked.append(len(rows))
        return torch.zeros(len(rows), 2, 1), [{0: row} for row in rows]

    batch = sampler.fill(never_mixed)
    assert (len(batch.groups), batch.fillers, batch.all_wrong) == (8, 8, batch.generated)
    assert asked == [8, 32, 32]  # never more than four batches at once


@pytest.mark.parametrize("keep_rate", [k / 10 for k in range(1, 10)])
def test_auto_generates_less_than_a_fixed_factor(keep_rate):
    def generated(oversample):
        generator = torch.Generator().manual_seed(0)

        def roll_out(rows):
            rewards = torch.zeros(len(rows), 2, 1)
            rewards[:, 0, 0] = (torch.rand(len(rows), generator=generator) < keep_rate).float()
            return rewards, [{} for _ in rows]

        sampler = DynamicSampler(PromptStream(10_000, seed=0), 128, oversample=oversample)
        batches = [sampler.fill(roll_out) for _ in range(20)]
        assert not any(batch.fillers for batch in batches)
        return sum(batch.generated for batch in batches) / (20 * 128)

    auto = generated("auto")
    assert auto < min(generated(3.0), generated(4.0))
    assert 1 / keep_rate < auto < 1.35 / keep_rate  # 1 / keep rate is the least possible


def test_auto_follows_a_keep_rate_that_falls():
    sampler = DynamicSampler(PromptStream(1000, seed=0, shuffle=False), 16)

    def roll_out(rows, every=1):
        rewards = torch.zeros(len(rows), 2, 1)
        rewards[[row % every == 0 for row in rows], 0, 0] = 1.0
        return rewards, [{} for _ in rows]

    for _ in range(20):
        assert sampler.fill(roll_out).generated == 16
    for _ in range(4):
        sampler.fill(lambda rows: roll_out(rows, every=4))
    assert sampler.round_size(16) == 64  # and not 20, as the mean of all 24 batches would say


def test_state_survives_a_file():
    def make():
        return DynamicSampler(PromptStream(50, seed=1), 8, oversample=2.5, carry_over=True)

    straight = make()
    batches = [rows(straight.fill(roll_out)) for _ in range(6)]
    interrupted = make()
    for _ in range(3):
        interrupted.fill(roll_out)
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [rows(resumed.fill(roll_out)) for _ in range(3)] == batches[3:]
    assert resumed.round_size(5) == straight.round_size(5)


# The trainer


def make(output_dir, trainer_class=FIPOTrainer, *, keywords=None, **settings):
    rewards = [longer_is_better, right_for_some]
    keywords = {"rollout_func": fixed_rollouts, "reward_funcs": rewards} | (keywords or {})
    settings = {"prompts": PROMPTS} | settings
    sampling = {"dynamic_sampling": True, "dynamic_sampling_reward": "right_for_some"}
    return make_trainer(output_dir, trainer_class, keywords=keywords, **(sampling | settings))


@pytest.mark.parametrize("rollouts", [fixed_rollouts, scored_rollouts])
def test_equals_grpo_on_the_prompts_that_are_kept(tmp_path, rollouts):
    """TRL's own trainer, on a dataset of the mixed prompts only, with all else equal, bit for bit."""
    settings = {"shuffle_dataset": False, "group_by_length": False, "max_steps": 24, "log_completions": True}
    keywords = {"rollout_func": rollouts}
    ours = make(tmp_path / "ours", DAPOTrainer, keywords=keywords, **settings)
    ours.train()
    assert len(MIXED_PROMPTS) < len(PROMPTS)
    theirs = make(
        tmp_path / "theirs", GRPOTrainer, keywords=keywords, prompts=MIXED_PROMPTS, **settings, dynamic_sampling=False,
        dynamic_sampling_reward=None,
    )  # fmt: skip
    theirs.train()
    expected = parameters(theirs)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(ours).items())
    # What TRL logs about the completions is about those that are trained on, and no others
    own = ("completions/", "reward", "rewards/", "frac_reward", "loss", "entropy", "clip_ratio", "grad_norm")
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        names = {name for name in other if name.startswith(own)}
        assert {name: mine[name] for name in names} == {name: other[name] for name in names}
    for file in sorted((tmp_path / "theirs" / "completions").iterdir()):
        pandas.testing.assert_frame_equal(
            pandas.read_parquet(tmp_path / "ours" / "completions" / file.name), pandas.read_parquet(file)
        )
    # but all tokens are counted
    generated = sum(logged(ours, "dynamic_sampling/generated"))
    assert generated > 3 * 8
    assert logged(ours, "num_tokens")[-1] > logged(theirs, "num_tokens")[-1]


def test_metrics(tmp_path):
    trainer = make(tmp_path, max_steps=16, dynamic_sampling_oversample=3.0, dynamic_sampling_carry_over=True)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "dynamic_sampling/rounds" in row]
    assert len(rows) == 2
    prompts = [PROMPTS[trainer.dynamic_sampler.stream[i]] for i in range(24)]
    sums = [sum(rewards_of(prompt)) for prompt in prompts]
    mixed, right, wrong = 24 - sums.count(0) - sums.count(4), sums.count(4), sums.count(0)
    assert min(mixed - 8, right, wrong) > 0
    assert rows[0]["dynamic_sampling/generated"] == 24  # prompts, three batches
    assert rows[0]["dynamic_sampling/kept"] == 8
    assert rows[0]["dynamic_sampling/surplus"] == mixed - 8 == rows[1]["dynamic_sampling/carried_over"]
    assert rows[0]["dynamic_sampling/all_right_fraction"] == pytest.approx(right / 24)
    assert rows[0]["dynamic_sampling/all_wrong_fraction"] == pytest.approx(wrong / 24)
    assert rows[0]["dynamic_sampling/reward"] == pytest.approx(sum(sums) / 96)
    rollouts = [rollouts_of(prompt) for prompt in prompts]  # all tokens count, once
    tokens = sum(len(ids) for r in rollouts for name in ("prompt_ids", "completion_ids") for ids in r[name])
    assert rows[0]["num_tokens"] == tokens


def test_log_probs_are_computed_of_kept_groups_only(tmp_path, monkeypatch):
    passes = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self, model, input_ids, *args, **kwargs):
        passes.append(len(input_ids))
        return original(self, model, input_ids, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
    trainer = make(tmp_path, dynamic_sampling_oversample=4.0)
    generate(trainer)
    assert sum(passes) == 32  # 8 prompts x 4
    assert len(trainer._logs["prompt"]) == 32
    assert set(trainer._logs["prompt"]) <= set(MIXED_PROMPTS)


def test_what_reward_functions_log_is_that_of_kept_groups(tmp_path):
    def logs_extra(prompts, completions, log_extra, log_metric, **kwargs):
        log_extra("shout", [completion.upper() for completion in completions])
        log_metric("seen", float(len(prompts)))
        return right_for_some(prompts, completions)

    keywords = {"reward_funcs": [logs_extra]}
    trainer = make(tmp_path, keywords=keywords, dynamic_sampling_reward=None, log_completions=True, max_steps=8)
    trainer.train()
    table = pandas.concat(map(pandas.read_parquet, sorted((tmp_path / "completions").iterdir())))
    assert len(table) == 8 * 32  # once per update
    assert set(table["prompt"]) <= set(MIXED_PROMPTS)
    assert list(table["shout"]) == [completion.upper() for completion in table["completion"]]
    assert len(logged(trainer, "seen")) == 1


def test_fillers_teach_nothing_even_if_another_reward_differs(tmp_path):
    unmixed = [prompt for prompt in PROMPTS if prompt not in MIXED_PROMPTS]
    settings = {"prompts": unmixed, "max_steps": 8, "learning_rate": 0.1, "dynamic_sampling_max_rounds": 1}
    trainer = make(tmp_path, weight_decay=0.0, log_completions=True, **settings)
    before = parameters(trainer)
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in parameters(trainer).items())
    assert logged(trainer, "dynamic_sampling/kept") == [0]
    table = pandas.read_parquet(next((tmp_path / "completions").iterdir()))
    assert set(table["advantage"]) == {0.0}
    assert len(set(table["longer_is_better"])) > 1

    mixture = MIXED_PROMPTS[:3] + unmixed[:5]
    batches = generate(make(tmp_path, **settings | {"prompts": mixture, "dynamic_sampling_oversample": 1.0}))
    assert sum(int(batch["advantages"].count_nonzero()) for batch in batches) <= 12
    trainer = make(tmp_path, **settings | {"prompts": mixture}, dynamic_sampling_strict=True)
    with pytest.raises(RuntimeError, match="found 3 of 8 groups"):
        trainer.train()


def test_generation_of_transformers_is_split_into_calls_of_a_generation_batch(tmp_path):
    calls = []

    def counting(prompts, trainer):
        calls.append(len(prompts))
        return fixed_rollouts(prompts, trainer)

    make(tmp_path, keywords={"rollout_func": counting}, dynamic_sampling_oversample=2.5, max_steps=1).train()
    assert calls == [32, 32, 16]


def test_rows_are_read_in_one_go_and_are_copies(tmp_path, monkeypatch):
    reads = []
    original = Dataset._getitem
    monkeypatch.setattr(Dataset, "_getitem", lambda self, key, *a: reads.append(key) or original(self, key, *a))
    rollouts = make(tmp_path)._group_rollouts
    rollouts.dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]})
    reads.clear()
    first, second = rollouts._rows([3, 3])
    assert reads == [[3, 3]]
    first["prompt"][0]["content"] = first["new"] = "changed"
    assert second == {"prompt": [{"role": "user", "content": PROMPTS[3]}]} == rollouts._rows([3])[0]


def test_prompts_of_both_arms_are_the_same(tmp_path):
    arms = [make(tmp_path, trainer_class) for trainer_class in (FIPOTrainer, DAPOTrainer)]
    for trainer in arms:
        generate(trainer)
    fipo, dapo = ([*trainer._logs["prompt"]] for trainer in arms)
    assert fipo == dapo
    assert len(set(fipo)) == 8


@pytest.mark.parametrize(
    ("name", "keywords", "settings"),
    [
        ("tools", {"tools": [lambda: 0]}, {}),
        ("a streamed dataset", {"train_dataset": Dataset.from_dict({"prompt": PROMPTS}).to_iterable_dataset()}, {}),
        (
            "images",
            {"train_dataset": Dataset.from_dict({"prompt": PROMPTS, "image": [None] * len(PROMPTS)})},
            {},
        ),
    ],
)
def test_refuses(tmp_path, name, keywords, settings, monkeypatch):
    trainer = make(tmp_path)
    if name == "tools":  # TRL wants a chat template for them, which the tiny tokenizer has not
        trainer.tools = keywords["tools"]
    else:
        trainer.train_dataset = keywords["train_dataset"]
    with pytest.raises(ValueError, match=f"dynamic_sampling=True does not work with {name}"):
        make_sampler(trainer)


def test_refuses_an_unknown_reward(tmp_path):
    with pytest.raises(ValueError, match=r"dynamic_sampling_reward='accuracy'.*right_for_some"):
        make(tmp_path, dynamic_sampling_reward="accuracy")


FEW = MIXED_PROMPTS[:12] + [prompt for prompt in PROMPTS if prompt not in MIXED_PROMPTS][:12]


def test_skipping(tmp_path):
    """Prompts that are never mixed are sampled less and less, and their rows are what they are known by."""
    trainer = make(tmp_path, DAPOTrainer, prompts=FEW, max_steps=64, dynamic_sampling_skip=True)
    trainer.train()
    skipped, generated = (logged(trainer, f"dynamic_sampling/{name}") for name in ("skipped", "generated"))
    assert skipped[0] == 0
    assert sum(skipped) > 20
    assert sum(generated[-3:]) < sum(generated[:3])
    assert set(logged(trainer, "dynamic_sampling/kept")) == {8}
    assert logged(trainer, "dynamic_sampling/revived") == [0] * 8
    assert {"dynamic_sampling/p_easy", "dynamic_sampling/p_hard"} <= trainer.state.log_history[0].keys()
    streaks = trainer.dynamic_sampler.history.streaks.tolist()
    kinds = [0 if prompt in MIXED_PROMPTS else 1 if sum(rewards_of(prompt)) else -1 for prompt in FEW]
    assert [(streak > 0) - (streak < 0) for streak in streaks] == kinds


def test_skipping_without_dynamic_sampling_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dynamic_sampling_skip=True does nothing without dynamic_sampling=True"):
        make(tmp_path, dynamic_sampling=False, dynamic_sampling_reward=None, dynamic_sampling_skip=True)


# Resuming


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [8, 5], ids=["between generations", "inside a generation"])
@pytest.mark.parametrize("carry_over", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"rollout_func": None}], ids=["fixed rollouts", "sampled"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, save_steps, carry_over, keywords):
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": save_steps, "log_completions": True}
    settings |= {"dynamic_sampling_carry_over": carry_over, "dynamic_sampling_oversample": 1.5}
    uninterrupted = make(tmp_path / "uninterrupted", keywords=keywords, **settings)
    uninterrupted.train()

    killed = make(tmp_path / "killed", keywords=keywords | {"callbacks": [KillAt(save_steps + 2)]}, **settings)
    with pytest.raises(Kill):
        killed.train()
    resumed = make(tmp_path / "killed", keywords=keywords, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 20
    for name in ("reward", "dynamic_sampling/generated", "dynamic_sampling/carried_over", "num_tokens"):
        assert logged(resumed, name) == logged(uninterrupted, name) != []
    assert list(resumed._logs["prompt"]) == list(uninterrupted._logs["prompt"]) != []
    if carry_over:
        assert sum(logged(resumed, "dynamic_sampling/carried_over")) > 0
    expected = parameters(uninterrupted)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(resumed).items())


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [34, 40], ids=["inside a generation", "between generations"])
def test_a_run_that_skips_is_resumed_with_its_history(tmp_path, killed_at):
    settings = {"max_steps": 64, "save_strategy": "steps", "save_steps": killed_at - 1, "prompts": FEW}
    settings |= {"dynamic_sampling_skip": True, "dynamic_sampling_oversample": 1.5}
    uninterrupted = make(tmp_path / "uninterrupted", **settings)
    uninterrupted.train()
    with pytest.raises(Kill):
        make(tmp_path / "killed", keywords={"callbacks": [KillAt(killed_at)]}, **settings).train()
    resumed = make(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    for name in ("skipped", "revived", "generated", "p_easy", "p_hard"):
        assert logged(resumed, f"dynamic_sampling/{name}") == logged(uninterrupted, f"dynamic_sampling/{name}") != []
    assert list(resumed._logs["prompt"]) == list(uninterrupted._logs["prompt"]) != []
    assert sum(logged(resumed, "dynamic_sampling/skipped")[5:]) > 10  # after the resume
    expected = parameters(uninterrupted)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(resumed).items())


def test_another_layout_goes_on_with_the_same_prompts(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 8, "dynamic_sampling_carry_over": True}
    trainer = make(tmp_path, max_steps=8, dynamic_sampling_oversample=2.0, **settings)
    trainer.train()
    carried = [trainer.dynamic_sampler.stream[group.position] for group in trainer.dynamic_sampler.pool]
    assert carried
    resumed = make(tmp_path, max_steps=9, per_device_train_batch_size=8, **settings)
    resumed.train(resume_from_checkpoint=True)
    # the prompts that were carried over come first, sampled anew
    assert logged(resumed, "dynamic_sampling/carried_over")[-1] == 0
    assert list(resumed._logs["prompt"])[:1] == [PROMPTS[carried[0]]]
    assert "holds no generation state for these processes and batch layout" in caplog.text

    caplog.clear()
    other = make(tmp_path, max_steps=9, prompts=PROMPTS[:40], **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "with another dataset: prompts start anew" in caplog.text

    caplog.clear()  # prompts are known by their row: the same number of others is other data, too
    other = make(tmp_path, max_steps=9, prompts=PROMPTS[::-1], **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "with another dataset: prompts start anew" in caplog.text


@pytest.mark.slow
def test_killed_after_a_save(tmp_path):
    """A real run in a process of its own, kill -9, and the recipe's own command to go on."""
    command = [sys.executable, "scripts/train_fipo.py", "--config", "recipes/tiny/fipo.yaml", *REWARD]
    command += ["--dynamic_sampling", "true", "--dynamic_sampling_carry_over", "true", "--max_steps", "30"]
    command += ["--steps_per_generation", "2", "--save_steps", "3", "--max_completion_length", "32"]
    command += ["--per_device_train_batch_size", "32", "--save_total_limit", "9"]

    def run(name, *more):
        return subprocess.Popen(
            [*command, "--output_dir", str(tmp_path / name), *more],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    straight = run("straight")
    with HeldRun([*command, "--output_dir", str(tmp_path / "killed")], tmp_path / "held", generation=3):
        pass
    # Update 3 is in the middle of the second generation
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-3"]
    (tmp_path / "killed" / "checkpoint-29").mkdir()  # as if another save had been cut short
    resumed = run("killed", "--resume_from_checkpoint", "latest")
    assert (straight.wait(), resumed.wait()) == (0, 0)
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("straight", "killed")]
    assert [state["global_step"] for state in states] == [30, 30]
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("straight", "killed")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
