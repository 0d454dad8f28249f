import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import PROMPTS, distance, fixed_rollouts, generate, logged, make_model, make_trainer, parameters, token_logps
from trl import GRPOTrainer

from fipo_trl.trainer.length_grouping import regroup, trim, unknown_keys


ROLLOUTS = {"rollout_func": fixed_rollouts}


def random_micro_batches(seed, count, rows, prompt_columns, completion_columns):
    """Micro-batches whose every value names the row it belongs to."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(count):
        row = torch.arange(rows).unsqueeze(1) + number * rows + 1
        prompt_lengths = torch.randint(1, prompt_columns + 1, (rows, 1), generator=generator)
        completion_lengths = torch.randint(1, completion_columns + 1, (rows, 1), generator=generator)
        prompt_mask = (torch.arange(prompt_columns) >= prompt_columns - prompt_lengths).long()
        completion_mask = (torch.arange(completion_columns) < completion_lengths).long()
        batches.append(
            {
                "prompt_ids": row * prompt_mask,
                "prompt_mask": prompt_mask,
                "completion_ids": row * completion_mask,
                "completion_mask": completion_mask,
                "advantages": row.squeeze(1).double(),
                "old_per_token_logps": row * completion_mask.double(),
                "sampling_per_token_logps": row * completion_mask.double(),
                "ref_per_token_logps": None,
                "importance_sampling_ratio": row.double() if seed % 2 else row * completion_mask.double(),
                "tool_mask": torch.where(completion_mask == 1, (row + torch.arange(completion_columns)) % 2, 1),
                "num_items_in_batch": torch.tensor(123),
            }
        )
    return batches


def by_row(batches):
    """{row: {key: its values, padding excluded}}"""
    result = {}
    for batch in batches:
        for i, row in enumerate(batch["advantages"].tolist()):
            prompt, completion = batch["prompt_mask"][i].bool(), batch["completion_mask"][i].bool()
            result[row] = {}
            for key, value in batch.items():
                if value is not None and value.dim() == 2:
                    kept = value[i] if value.shape[1] == 1 else value[i][prompt if "prompt" in key else completion]
                    result[row][key] = kept.tolist()
    return result


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    updates=st.integers(1, 3),
    per_update=st.integers(1, 4),
    rows=st.integers(1, 5),
    columns=st.tuples(st.integers(1, 9), st.integers(2, 30)),
)
def test_regroup_moves_rows_and_nothing_else(seed, updates, per_update, rows, columns):
    batches = random_micro_batches(seed, updates * per_update, rows, *columns)
    regrouped = regroup(batches, per_update)
    assert len(regrouped) == len(batches)
    for update in range(updates):
        window = slice(update * per_update, (update + 1) * per_update)
        assert by_row(regrouped[window]) == by_row(batches[window])  # every row, whole, in the same update
        totals = [
            (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist() for batch in regrouped[window]
        ]
        flat = [total for batch in totals for total in batch]
        assert flat == sorted(flat, reverse=True)
        assert all(len(batch) == rows for batch in totals)
    for batch in regrouped:
        assert batch.keys() == batches[0].keys()
        assert batch["num_items_in_batch"] == 123
        # As narrow as it can be
        assert batch["prompt_mask"][:, 0].any()
        assert batch["completion_mask"].shape[1] == 1 or batch["completion_mask"][:, -1].any()
        for value in batch.values():
            assert value is None or value.dim() < 2 or value.untyped_storage().nbytes() == value.nbytes


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5))
def test_trim_keeps_the_order_of_rows(seed, rows):
    (batch,) = random_micro_batches(seed, 1, rows, 8, 20)
    trimmed = trim(batch)
    assert torch.equal(trimmed["advantages"], batch["advantages"])
    assert by_row([trimmed]) == by_row([batch])


def test_rows_without_a_scored_token():  # mask_truncated_completions
    (batch,) = random_micro_batches(0, 1, 3, 4, 6)
    batch["completion_mask"][:] = 0
    assert trim(batch)["completion_ids"].shape == (3, 1)
    batch["completion_mask"][1, :2] = 1
    (first, second, third) = regroup(
        [
            {k: v if k == "num_items_in_batch" else v[i : i + 1] for k, v in batch.items() if v is not None}
            for i in range(3)
        ],
        3,
    )
    assert sum(part["completion_mask"].sum() for part in (first, second, third)) == 2


def test_images_are_not_reordered():
    (batch,) = random_micro_batches(0, 1, 2, 3, 4)
    assert unknown_keys(batch) == set()
    assert unknown_keys(batch | {"pixel_values": torch.zeros(7, 2), "num_images": [1, 2], "image_sizes": None}) == {
        "pixel_values",
        "num_images",
    }


def test_an_update_is_the_same_sum_in_float64(tmp_path):
    # TRL computes log-probabilities in float32 whatever the model, so this goes around it. Prompts have one length,
    # because transformers computes rotary positions in float32, and a prompt without padding starts at another one
    prompts = [prompt for prompt in PROMPTS if "c" in prompt]
    trainer = make_trainer(
        tmp_path, prompts=prompts, keywords=ROLLOUTS, group_by_length=False, gradient_accumulation_steps=4
    )
    generate(trainer)
    model = make_model(torch.float64, seed=1)

    def gradient(batches):
        total = 0.0
        for batch in batches:
            log_ratio = token_logps(model, batch) - batch["old_per_token_logps"]
            weights, _ = reference.influence(
                log_ratio, batch["advantages"], batch["completion_mask"], 32.0, 0.5, 2.0, 10.0, 3.0
            )
            losses = reference.token_losses(log_ratio, weights * batch["advantages"].unsqueeze(1), 0.2, 0.28, 10.0)
            total = total + (losses * batch["completion_mask"]).sum()
        return torch.autograd.grad(total, list(model.parameters()))

    window = trainer._buffered_inputs[:4]
    expected, actual = gradient(window), gradient(regroup(window, 4))
    scale = max(value.abs().max() for value in expected)
    for value, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, value, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 4},
        pytest.param({"gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.1}, marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 2, "peft": True, "beta": 0.1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_updates_are_the_same(tmp_path, loss_type, arguments):
    arguments = dict(arguments)
    peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if arguments.pop("peft", False) else {}
    finals = []
    for grouped in (False, True):
        trainer = make_trainer(
            tmp_path,
            keywords=ROLLOUTS | peft,
            group_by_length=grouped,
            loss_type=loss_type,
            optim="sgd",  # Adam would turn the rounding of a gradient near 0 into a step of any sign
            learning_rate=0.1,
            max_steps=3,
            **arguments,
        )
        before = parameters(trainer)
        trainer.train()
        finals.append((parameters(trainer), logged(trainer, "grad_norm"), logged(trainer, "fipo/future_kl")))
    (plain, plain_norms, plain_kl), (sorted_, sorted_norms, sorted_kl) = finals
    assert sorted_norms == pytest.approx(plain_norms, rel=1e-4)
    assert len(plain_norms) == len(plain_kl) == 3
    assert sorted_kl == pytest.approx(plain_kl, rel=1e-3, abs=1e-5)
    moved, size = distance(plain, before), torch.stack([value.norm() for value in plain.values()]).norm().item()
    assert moved > 1e-3 * size
    assert distance(plain, sorted_) < 1e-6 * size
    assert distance(plain, sorted_) < 1e-4 * moved


def test_micro_batches_of_the_trainer_are_grouped(tmp_path):
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, gradient_accumulation_steps=4)
    generate(trainer)
    widths = [batch["completion_ids"].shape[1] for batch in trainer._buffered_inputs]
    for start in range(0, len(widths), 4):
        update = widths[start : start + 4]
        assert update == sorted(update, reverse=True)
        assert update[0] > update[-1]
    for batch in trainer._buffered_inputs:
        scored = batch["completion_mask"] == 1
        torch.testing.assert_close(
            batch["old_per_token_logps"][scored], token_logps(trainer.model, batch)[scored], rtol=1e-4, atol=1e-5
        )


def test_old_and_reference_log_probs_are_not_computed_on_common_padding(tmp_path, monkeypatch):
    shapes = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self, model, input_ids, *args, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return original(self, model, input_ids, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, beta=0.1)
    generate(trainer)
    old, ref = shapes[:8], shapes[8:]
    assert old == ref
    assert all(rows == 4 for rows, _ in old)
    widths = [columns for _, columns in old]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"loss_type": "bnpo"}, "with loss_type='bnpo' micro-batches are cut, but not sorted"),
        ({"entropy_coef": 0.01}, "with an entropy bonus micro-batches"),
        ({"top_entropy_quantile": 0.5}, "with top_entropy_quantile < 1 micro-batches"),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 8}, "with updates that span two generations"),
    ],
)
def test_grouping_steps_aside_with_a_reason(tmp_path, caplog, arguments, reason):
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, **arguments)
    generate(trainer)
    generate(trainer)
    messages = [record.message for record in caplog.records if "group_by_length" in record.message]
    assert len(messages) == 1
    assert reason in messages[0]


def test_grouping_can_be_switched_off(tmp_path):
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, group_by_length=False)
    generate(trainer)
    assert len({batch["completion_ids"].shape[1] for batch in trainer._buffered_inputs}) == 1
