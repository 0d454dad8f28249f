"""Several processes train what one trains: with copies of the model (DDP), and with shards of it (FSDP2, ZeRO)."""

import signal
import sys

import pandas
import pytest
import torch
from cpu_ranks import DDP, FSDP2, ZERO2, ZERO3
from held import REWARD, HeldRun
from tiny import PROMPTS, distance, make_model


pytestmark = pytest.mark.slow
# Of a batch that 2, 3 and 4 processes can share. With Adam, the rounding of a gradient near 0 is a step of any sign
SETTINGS = {
    "per_device_train_batch_size": 24,  # of all processes
    "num_generations": 6,
    "steps_per_generation": 1,
    "num_iterations": 3,
    "max_steps": 4,
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 0.0,  # no clipping
    "influence_weight_min": 0.8,  # at 1.0 rounding would decide whether a weight of 1 is at the bound
}
ACCUMULATION = {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
DYNAMIC = {"num_iterations": 2, "dynamic_sampling": True, "dynamic_sampling_carry_over": True, "log_completions": True}
LATE = {"dynamic_sampling_oversample": 4.0, "late": 0.5}  # much to carry over; seconds that the last rank is behind
# Two batches an epoch, so that what happened at earlier visits decides
SKIP = {"dynamic_sampling_carry_over": False, "dynamic_sampling_skip": True, "prompts": PROMPTS[:8], "max_steps": 16}
SKIP |= {"learning_rate": 0.01}  # 16 updates add up what rounding does in each
# Ratios far from 1, so that sequences are dropped, more on one rank than on the other
DROPS = {
    "max_steps": 3,
    "learning_rate": 0.3,
    "delta": 1.5,
    "influence_weight_min": 0.5,
    "influence_safety_ratio": 1.1,
}
LONG = ACCUMULATION | {"long_tailed": True, "max_completion_length": 400}
CASES = {
    "plain": {},
    "clipping": {"max_grad_norm": 0.05},
    "accumulation": ACCUMULATION,
    "accumulation, mean over sequences": ACCUMULATION | {"loss_type": "grpo"},
    "drops": DROPS,
    "drops, accumulation, clipping": DROPS | ACCUMULATION | {"max_grad_norm": 1.5},
    "dynamic sampling": DYNAMIC,
}
OF_ALL_LOADED = {"KL": {"beta": 0.1, "max_grad_norm": 1.0}}
SPREAD = {
    "long tail": LONG,
    "long tail, dynamic sampling": LONG | DYNAMIC | LATE,
    "skipped prompts": DYNAMIC | SKIP,
}
ALL_LOAD = (*FSDP2, "--fsdp_cpu_ram_efficient_loading", "false")
COPIES, SHARDS = {"weights": 1.0, "optimizer": 1.0}, {"weights": 0.5, "optimizer": 0.5}
BOUND = 5e-4  # of the distance between the weights of one process and several, relative to how far they moved
LOGGED = ("fipo/", "policy/", "completions/", "behaviour/", "rollout_iteration", "optimizer_update", "grad_norm")
LOGGED += ("loss",)
OF_ROUNDS = ("dynamic_sampling/", "engine_mismatch/")  # of what was sampled: rounds are multiples of the processes


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory):
    """What one process trains, and the folder of its runs."""
    folder = tmp_path_factory.mktemp("alone")
    cases = {name: SETTINGS | settings for name, settings in (CASES | OF_ALL_LOADED | SPREAD).items()}
    return ranks.run("train_on_ranks:cases", folder, cases, processes=1)[0], folder


def train(ranks, folder, cases, launch, processes=2):
    """What each rank trained and held. All have the same weights."""
    cases = {name: SETTINGS | settings for name, settings in cases.items()}
    several = ranks.run("train_on_ranks:cases", folder, cases, launch=launch, processes=processes)
    for rank in several:
        assert [each["world_size"] for each in rank.values()] == [processes] * len(cases)
        assert all(distance(each["weights"], several[0][name]["weights"]) == 0 for name, each in rank.items())
    return several


def assert_equal(one, several, case, names=LOGGED):
    """Weights and metrics of a case; of the metrics those that begin with `names`, each of which must be there."""
    mine, theirs = one[case], several[0][case]
    moved = distance(mine["weights"], dict(make_model().named_parameters()))
    apart = distance(mine["weights"], theirs["weights"]) / moved
    print(f"{case}: {apart:.1e}")
    assert apart < BOUND, case
    rows = [[row for row in each["log"] if "loss" in row] for each in (mine, theirs)]
    for my_row, their_row in zip(*rows, strict=True):
        for metric in (name for name in my_row if name.startswith(names)):
            assert their_row[metric] == pytest.approx(my_row[metric], rel=1e-3, abs=1e-3), (case, metric)
    compared = set().union(*rows[0])
    assert [name for name in names if not any(metric.startswith(name) for metric in compared)] == []


@pytest.mark.parametrize(
    ("launch", "cases", "engine", "held"),
    [
        (DDP, CASES | OF_ALL_LOADED, "MULTI_CPU", COPIES),
        (FSDP2, CASES, "FSDP", SHARDS),
        (ALL_LOAD, OF_ALL_LOADED, "FSDP", SHARDS),
        (ZERO2, CASES | OF_ALL_LOADED, "DEEPSPEED", COPIES | {"optimizer": 0.5}),
        (ZERO3, CASES | OF_ALL_LOADED, "DEEPSPEED", SHARDS),
    ],
    ids=["DDP", "FSDP2", "FSDP2, all processes load", "ZeRO-2", "ZeRO-3"],
)
def test_two_processes_equal_one(ranks, alone, tmp_path, launch, cases, engine, held):
    one, _ = alone
    two = train(ranks, tmp_path, cases, launch)
    for case in cases:
        for rank in two:
            assert rank[case]["loss_scale"] == 1.0
            assert rank[case]["held"] == {"engine": engine, "DTensor": engine == "FSDP"} | {
                what: pytest.approx(share, abs=0.01) for what, share in held.items()
            }
        names = (*LOGGED, *OF_ROUNDS) if case == "dynamic sampling" else LOGGED
        assert_equal(one, two, case, names)


def test_the_cases_are_what_they_say(alone):
    """Weights act, gradients are clipped, sequences dropped, batches filled in rounds: else all would equal all."""

    def logged(case, name):
        return [row[name] for row in alone[0][case]["log"] if name in row]

    for case in CASES | OF_ALL_LOADED | SPREAD:
        assert sum(logged(case, "fipo/active_fraction")) > 0.5, case
    assert min(logged("clipping", "grad_norm")) > 0.05
    for case in ("drops", "drops, accumulation, clipping"):
        assert max(logged(case, "fipo/dropped_sequence_fraction")) > 0.2
    norms = logged("drops, accumulation, clipping", "grad_norm")
    assert max(norms) > 1.5 > min(norms)  # clipped, and not
    assert sum(logged("dynamic sampling", "engine_mismatch/nan_tokens")) > 0
    assert max(logged("dynamic sampling", "dynamic_sampling/rounds")) > 1
    assert sum(logged("long tail, dynamic sampling", "dynamic_sampling/carried_over")) > 0
    assert max(logged("long tail", "completions/max_length")) > 10 * max(
        logged("long tail", "completions/median_length")
    )
    assert max(logged("KL", "kl")) > 0.01


@pytest.mark.parametrize(
    ("launch", "processes", "cases"),
    [
        (DDP, 3, ["dynamic sampling", "skipped prompts"]),
        (FSDP2, 4, ["dynamic sampling", "long tail, dynamic sampling"]),
        (ZERO3, 3, ["long tail", "long tail, dynamic sampling"]),
    ],
    ids=["DDP", "FSDP2", "ZeRO-3"],
)
def test_three_and_four_processes_equal_one(ranks, alone, tmp_path, launch, processes, cases):
    one, folder = alone
    several = train(ranks, tmp_path, {name: (CASES | SPREAD)[name] for name in cases}, launch, processes)
    for case in cases:
        assert_equal(one, several, case)
        for what in ("weights", "optimizer"):
            shares = [rank[case]["held"][what] for rank in several]
            assert max(shares) < 1.1 / processes or launch == DDP
            assert sum(shares) >= 1
        if case == "skipped prompts":
            for each in (one, several[0]):
                assert sum(row.get("dynamic_sampling/skipped", 0) for row in each[case]["log"]) > 5
        if case != "long tail":
            tables = [sorted((each / case / "completions").iterdir()) for each in (folder, tmp_path)]
            for mine, theirs in zip(*tables, strict=True):
                pandas.testing.assert_frame_equal(pandas.read_parquet(mine), pandas.read_parquet(theirs), rtol=1e-3)


# What is refused


def test_models_that_only_the_first_process_would_load(ranks, tmp_path):
    refused = {"reference": SETTINGS | {"beta": 0.1}, "reward": SETTINGS | {"reward_model": "some/reward-model"}}
    said, other = ranks.run("train_on_ranks:refusals", tmp_path, refused, launch=FSDP2)
    assert said == other
    for name, model in {"reference": "the reference model of beta=0.1", "reward": "a reward model"}.items():
        assert said[name] == (
            f"With fsdp_cpu_ram_efficient_loading: true, {model} would have no weights on any process but the first. "
            "Set it to false, under fsdp_config in the file of accelerate."
        )


def test_dropped_sequences_that_could_not_leave_the_mean(ranks, tmp_path):
    refused = {
        "drops": SETTINGS | ACCUMULATION,
        "no drops": SETTINGS | ACCUMULATION | {"drop_dual_clipped_sequences": False},
        "no accumulation": SETTINGS,
    }
    said, _ = ranks.run("train_on_ranks:refusals", tmp_path, refused, launch=(*ZERO2, "--zero_stage", "1"))
    assert said.keys() == {"drops"}
    assert "gradient_accumulation_steps=2 needs DeepSpeed's ZeRO-2 or ZeRO-3, got zero_stage=1" in said["drops"]


# Signals


@pytest.mark.parametrize("signalled", [0, 1])
def test_sigterm_to_one_process_stops_both_at_the_same_update(tmp_path, signalled):
    arguments = ["--config", "recipes/tiny/fipo.yaml", "--per_device_train_batch_size", "8", *REWARD]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *DDP, "--main_process_port", "0"]  # a free one
    command = [*launch, "scripts/train_fipo.py", *arguments, "--output_dir", str(tmp_path / "run")]
    with HeldRun(command, tmp_path / "held", generation=2, processes=2) as run:
        run.signal(signal.SIGTERM, run.ranks[signalled])  # the other must stop at the same update
        run.let_go()
    assert "Stopped at update 9," in run.log.read_text()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    states = [torch.load(checkpoint / f"generation_state_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert states[0]["step"] == states[1]["step"] == int(checkpoint.name.split("-")[1]) == 9
    assert states[0]["layout"]["world_size"] == 2
