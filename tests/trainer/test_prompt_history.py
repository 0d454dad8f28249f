import io

import pytest
import torch

from fipo_trl.trainer.dynamic_sampling import DynamicSampler, PromptStream
from fipo_trl.trainer.prompt_history import PromptHistory


RIGHT, WRONG, MIXED, UNSCORED = 1, -1, 0, None


def history_of(*outcomes, rows=1):
    history = PromptHistory(rows)
    for outcome in outcomes:
        history.record([(0, outcome)], follow_target=False)
    return history


@pytest.mark.parametrize(
    ("outcomes", "probability"),
    [
        ([], 1),
        ([MIXED], 1),
        ([RIGHT], 0.5),
        ([WRONG], 0.2),
        ([RIGHT] * 3, 0.125),
        ([WRONG] * 2, 0.04),
        ([RIGHT] * 30, 0.01),  # never less
        ([WRONG, RIGHT, RIGHT], 0.25),  # those in a row, of one kind
        ([RIGHT, RIGHT, WRONG], 0.2),
        ([RIGHT, MIXED], 1),
        ([RIGHT, MIXED, RIGHT], 0.5),
        ([RIGHT, UNSCORED, RIGHT], 0.25),
    ],
    ids=str,
)
def test_probability_falls_with_each_visit_in_a_row(outcomes, probability):
    history = history_of(*outcomes, rows=2)
    history.p_easy, history.p_hard = 0.5, 0.2
    assert history.probability(0) == pytest.approx(probability)
    assert history.probability(1) == 1  # another prompt


def test_a_prompt_is_revived_when_it_is_mixed_after_a_streak():
    history = PromptHistory(4)
    visits = [(0, RIGHT), (1, WRONG), (2, MIXED)]
    assert history.record(visits, follow_target=False) == 0
    visits = [(0, MIXED), (1, WRONG), (2, MIXED), (3, MIXED), (1, MIXED), (1, MIXED)]
    assert history.record(visits, follow_target=False) == 2  # rows 0 and 1, once each


@pytest.mark.parametrize(
    ("easy", "hard", "p_easy", "p_hard"),
    [  # of 24 visits: the targets are 2 easy and 4 hard
        (2, 4, 0.49, 0.49),
        (1, 4, 0.51, 0.49),
        (2, 3, 0.49, 0.51),
        (0, 0, 0.51, 0.51),
    ],
)
def test_probabilities_follow_their_targets(easy, hard, p_easy, p_hard):
    history = PromptHistory(24)
    outcomes = [RIGHT] * easy + [WRONG] * hard + [MIXED] * (24 - easy - hard)
    visits = [*enumerate(outcomes), *((row, UNSCORED) for row in range(24))]
    history.record(visits, follow_target=False)
    assert (history.p_easy, history.p_hard) == (0.5, 0.5)
    history.record(visits, follow_target=True)
    assert (history.p_easy, history.p_hard) == pytest.approx((p_easy, p_hard))
    history.record([], follow_target=True)  # all was carried over: nothing was seen
    assert (history.p_easy, history.p_hard) == pytest.approx((p_easy, p_hard))
    for _ in range(60):
        history.record(visits, follow_target=True)
    bounds = [0.05 if p < 0.5 else 0.95 for p in (p_easy, p_hard)]
    assert [history.p_easy, history.p_hard] == pytest.approx(bounds)


# The rule, in the sampler


class Task:
    """Outcomes that change as a policy learns: a function of the row and of the generation."""

    rows = 40
    rewards = {RIGHT: [1.0, 1.0], WRONG: [0.0, 0.0], MIXED: [0.0, 1.0], UNSCORED: [float("nan")] * 2}

    def __init__(self):
        self.generation = 0

    def outcome(self, row):
        if row % 8 == 7:
            return UNSCORED
        learned = self.generation // 4 + row % 5 - 3  # below 0: not yet; 0 and 1: by half
        return WRONG if learned < 0 else MIXED if learned < 2 or row % 4 == 0 else RIGHT

    def roll_out(self, rows):
        rewards = torch.tensor([self.rewards[self.outcome(row)] for row in rows])
        return rewards.unsqueeze(2), [{0: row} for row in rows]


def slow_oracle(generations, size, seed):
    """Position by position, from what the docstrings say: positions kept, skipped, revived, p_easy and p_hard."""
    task, stream = Task(), PromptStream(Task.rows, seed)
    outcomes = {row: [] for row in range(Task.rows)}
    p = {RIGHT: 0.5, WRONG: 0.5}
    position = 0
    for task.generation in range(generations):
        start, kept, skipped, seen, lap = position, [], 0, [], set()
        while len(kept) < size:
            row = stream[position]
            z, last = 0, outcomes[row][-1:]
            while last != [MIXED] and outcomes[row][-z - 1 : len(outcomes[row]) - z] == last != []:
                z += 1
            if row in lap or (z and stream.draw(position) >= max(p[last[0]] ** z, 0.01)):
                skipped += 1
            else:
                lap = lap | {row} if len(lap) < Task.rows - 1 else set()
                outcome = task.outcome(row)
                seen.append((row, outcome, z))
                kept += [position] if outcome == MIXED else []
            position += 1
        yield kept, skipped, sum(outcome == MIXED and z > 0 for _, outcome, z in seen), dict(p)
        seen = [(row, outcome) for row, outcome, _ in seen if outcome is not UNSCORED]
        for row, outcome in seen:
            outcomes[row].append(outcome)
        for kind, target in {RIGHT: 0.25 / 3, WRONG: 0.5 / 3}.items():
            if start >= Task.rows:
                falls = sum(outcome == kind for _, outcome in seen) / len(seen) >= target
                p[kind] = max(0.05, p[kind] - 0.01) if falls else min(0.95, p[kind] + 0.01)


@pytest.mark.parametrize("multiple", [1, 3, 7])
@pytest.mark.parametrize("oversample", ["auto", 1.0, 2.5, 4.0])
def test_batches_are_the_mixed_groups_of_the_stream_less_those_skipped(oversample, multiple):
    """Whatever the size of the rounds, and so the number of processes."""
    task = Task()
    sampler = DynamicSampler(
        PromptStream(Task.rows, seed=1), 8, oversample=oversample, multiple=multiple, max_rounds=99, skip=True
    )
    expected = list(slow_oracle(20, 8, seed=1))
    assert sum(skipped for _, skipped, _, _ in expected) > 100
    assert sum(revived for _, _, revived, _ in expected) > 5
    for task.generation, (kept, skipped, revived, p) in enumerate(expected):
        batch = sampler.fill(task.roll_out)
        assert [group.position for group in batch.groups] == kept
        metrics = batch.metrics()
        assert (metrics["skipped"], metrics["revived"]) == (skipped, revived)
        assert (metrics["p_easy"], metrics["p_hard"]) == pytest.approx((p[RIGHT], p[WRONG]))


def test_nothing_is_skipped_in_the_first_pass_and_less_is_sampled_after_it():
    sampled = {}
    for skip in (False, True):
        sampler, sampled[skip] = DynamicSampler(PromptStream(60, seed=0), 6, skip=skip), []
        while sampler.position < 600:
            before = sampler.position
            batch = sampler.fill(lambda rows: (torch.tensor([[[0.0], [float(row % 3 == 0)]] for row in rows]), rows))
            sampled[skip].append(batch.generated)
            assert batch.skipping.get("skipped", 0) == 0 or sampler.position > 60
            assert ("skipped" in batch.metrics()) == skip
            assert len({group.position for group in batch.groups}) == 6
            assert before <= batch.groups[0].position
    assert sampled[False][:3] == sampled[True][:3]
    assert sum(sampled[True]) < 0.6 * sum(sampled[False])  # of which a third is the least possible


def test_no_prompt_is_sampled_twice_in_a_generation_before_all_others():
    """Also where so many are skipped that a generation passes the data several times."""

    def roll_out(rows):
        asked.extend(rows)
        rewards = torch.ones(len(rows), 2, 1)
        rewards[[row < mixed for row in rows], 0] = 0.0
        return rewards, [{0: row} for row in rows]

    sampler = DynamicSampler(PromptStream(30, seed=0), 6, max_rounds=99, skip=True)
    sampler.history.streaks[:] = 4
    mixed, asked = 6, []  # of the rows; as many as a batch needs
    batch = sampler.fill(roll_out)
    assert sampler.position > 3 * 30
    assert sorted(group.rollouts[0] for group in batch.groups) == list(range(6))
    assert len(asked[:30]) == len(set(asked[:30]))
    mixed = 4  # fewer: the same ones again, when all others have been sampled
    asked.clear()
    batch = sampler.fill(roll_out)
    assert sorted(asked[:30]) == list(range(30))
    assert sorted({group.rollouts[0] for group in batch.groups}) == list(range(4))


def test_a_prompt_that_is_mixed_again_is_found_again():
    """Wrong at three visits and mixed from then on: half of the prompts within 1 / p^3 passes, and all of them."""
    visits = [0] * 400
    found = {}  # passes from the third visit to the next, by row

    def roll_out(rows):
        rewards = torch.zeros(len(rows), 2, 1)
        for place, row in enumerate(rows):
            if row % 2 == 0 or visits[row] >= 3:
                rewards[place, 0] = 1.0
        return rewards, [{0: row} for row in rows]

    third = {}
    sampler = DynamicSampler(PromptStream(400, seed=0), 50, oversample=1.0, max_rounds=99, skip=True)
    passes = 0
    while passes < 120:
        history, before = sampler.history, sampler.history.streaks.clone()
        sampler.fill(roll_out)
        passes = sampler.position // 400
        for row in range(1, 400, 2):
            if history.streaks[row] != before[row]:
                visits[row] -= int(history.streaks[row]) - int(before[row]) if history.streaks[row] < 0 else 0
                if history.streaks[row] <= -3:
                    third.setdefault(row, passes)
                elif history.streaks[row] == 0:
                    found[row] = passes - third[row]
    assert len(found) == 200
    assert sorted(found.values())[100] <= 8
    assert max(found.values()) > 8  # they were skipped meanwhile


def test_state_survives_a_file():
    def make():
        return DynamicSampler(PromptStream(Task.rows, seed=1), 8, oversample=2.5, skip=True)

    def run(sampler, generations):
        for task.generation in generations:
            batch = sampler.fill(task.roll_out)
            yield [group.position for group in batch.groups], batch.metrics()

    task = Task()
    straight = list(run(make(), range(16)))
    interrupted = make()
    list(run(interrupted, range(10)))
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert list(run(resumed, range(10, 16))) == straight[10:]
    assert straight[15][1]["skipped"] > 0
