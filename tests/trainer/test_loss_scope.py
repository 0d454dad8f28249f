"""The scope of a loss and the statistics that it collects, without a trainer."""

import math

import pytest
import torch

from fipo_trl.objective.influence import InfluenceStatistics, PolicyStatistics, influence_weights, policy_statistics
from fipo_trl.trainer.loss_scope import LossScope


def batch(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    log_ratio = torch.randn(rows, columns, generator=generator)
    mask = (torch.rand(rows, columns, generator=generator) < 0.8).int()
    return log_ratio, torch.randn(rows, generator=generator), mask


def test_inputs_are_a_copy_and_known_only_inside():
    scope, inputs = LossScope(), {"advantages": torch.ones(2)}
    with scope.open(inputs) as copied:
        assert scope.inputs is copied
        copied["advantages"] = torch.zeros(2)
        scope.statistics.append(None)
    assert scope.inputs is None
    assert inputs["advantages"].tolist() == [1, 1]


def test_a_loss_that_asks_for_no_log_probs_is_an_error():
    scope = LossScope()
    with pytest.raises(RuntimeError, match="did not ask for log-probabilities"), scope.open({}):
        pass
    assert scope.inputs is None


def test_the_error_of_a_loss_is_not_hidden():
    scope = LossScope()
    with pytest.raises(ZeroDivisionError), scope.open({}):
        raise ZeroDivisionError
    assert scope.inputs is None


def test_tool_output_is_not_scored_and_missing_old_log_probs_mean_the_same_policy():
    scope, logps = LossScope(), torch.tensor([[-1.0, -2.0, -3.0]])
    masks = {"completion_mask": torch.tensor([[1, 1, 0]]), "tool_mask": torch.tensor([[0, 1, 1]])}
    with scope.open(masks):
        scope.statistics.append(None)
        log_ratio, mask = scope.log_ratio(logps)
        assert (log_ratio.tolist(), mask.tolist()) == ([[0, 0, 0]], [[0, 1, 0]])
        scope.inputs["old_per_token_logps"] = torch.tensor([[-1.5, -1.5, -1.5]])
        assert scope.log_ratio(logps)[0].tolist() == [[0.5, -0.5, -1.5]]


def policy(log_ratio, advantages, mask):
    return policy_statistics(log_ratio, advantages, mask, dual_clip=2.0)


def influence(log_ratio, advantages, mask):
    return influence_weights(
        log_ratio, advantages, mask, weight_min=0.5, weight_max=1.5, dual_clip=2.0, safety_ratio=1.5
    ).statistics


@pytest.mark.parametrize(("kind", "of"), [(PolicyStatistics, policy), (InfluenceStatistics, influence)])
def test_totals_are_those_of_one_batch_of_all_rows(kind, of):
    batches = [batch(3, 20, seed) for seed in range(4)]
    log_ratio, advantages, mask = (torch.cat(parts) for parts in zip(*batches, strict=True))
    scope = LossScope()
    scope.statistics = [of(*each) for each in batches]
    total = scope.total(gather=lambda rows: rows)
    assert type(total) is kind
    assert scope.statistics == []
    assert total == pytest.approx(tuple(map(float, of(log_ratio, advantages, mask))), rel=1e-5)
    assert all(math.isfinite(value) for value in total)


def test_totals_of_other_processes_are_gathered():
    scope = LossScope()
    scope.statistics = [policy(*batch(3, 20, 0))]
    doubled = scope.total(gather=lambda rows: torch.cat([rows, rows]))
    assert doubled.tokens == 2 * policy(*batch(3, 20, 0)).tokens
