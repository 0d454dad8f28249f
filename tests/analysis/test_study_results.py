"""Runs of a study that are finished are summarised; parts of several machines are merged, if they are of one study."""

import json
import shutil

import pytest
from PIL import Image

from fipo_trl.analysis.study import Study, begin, tasks_of
from fipo_trl.analysis.study_results import merge, summarise


TINY = ["--config", "recipes/tiny/fipo.yaml", "--max_steps", "16"]
ENDPOINTS = ("auc_avg@4", "avg@4", "mean_length")
STUDY = Study(
    arms={"DAPO": [*TINY, "--trainer", "dapo"], "FIPO": TINY, "wide": [*TINY, "--influence_weight_min", "0.8"]},
    evaluation=[],
    seeds=range(1, 7),
    endpoints=ENDPOINTS,
)


def finish(study, root, wanted=None):
    """Runs as training leaves them behind; `wanted` are (seed, arm)."""
    for (seed, arm), task in tasks_of(study, root).items():
        if wanted is not None and (seed, arm) not in wanted:
            continue
        begin(task)
        better = 0.125 * list(STUDY.arms).index(arm)
        rows = [{"step": step, "loss": 0.0, "reward": seed / 100 + better, "grad_norm": 0.5} for step in (8, 16)]
        rows += [
            {"step": step, "eval_data/avg@4": seed / 64 + better * step / 16, "eval_data/mean_length": 20.0 + seed**2}
            for step in (0, 8, 16)
        ]
        task.run.mkdir(parents=True)
        state = {"global_step": 16, "log_history": rows}
        (task.run / "trainer_state.json").write_text(json.dumps(state))


def read(root):
    return json.loads((root / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All runs on one machine."""
    root = tmp_path_factory.mktemp("one") / "short"
    finish(STUDY, root)
    summarise(STUDY, root)
    return root


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The same runs on two machines, by seeds; their results.json."""
    paths = []
    for seeds in ((1, 2, 3, 4), (5, 6)):
        root = tmp_path_factory.mktemp("part") / "short"
        part = STUDY._replace(seeds=seeds)
        finish(part, root)
        summarise(part, root)
        paths.append(root / "results.json")
    return paths


def test_endpoints_are_in_the_tables_and_results(whole):
    tables = (whole / "tables.md").read_text()
    assert "Endpoints, named in advance: auc_avg@4, avg@4, mean_length." in tables
    assert (
        "| avg@4, mean over training (area under the curve), % | FIPO | +6.2 [+6.2, +6.2] | 6 | < 0.0001 |" in tables
    )
    assert "| mean length, tokens | wide | +0.0 [+0.0, +0.0] | 6 | 1.0000 | 1.0000 |" in tables
    assert "Holm's correction is over all 2 x 3 comparisons." in tables
    arms = read(whole)["arms"]
    assert arms["FIPO"]["endpoints"]["mean_length"] == {"seeds": 6, "p": 1.0, "p_holm": 1.0}
    assert "endpoints" not in arms["DAPO"]
    assert arms["wide"]["curves"]["6"]["avg@4"] == {"0": 0.09375, "8": 0.21875, "16": 0.34375}
    assert Image.open(whole / "held_out.png").width > 500


def test_merged_parts_are_the_whole(whole, parts, tmp_path):
    text = merge(STUDY, parts, tmp_path / "short")
    assert text + "\n" == (whole / "tables.md").read_text()
    assert read(tmp_path / "short") == read(whole)
    for name in ("differences.png", "held_out.png"):
        assert (tmp_path / "short" / name).read_bytes() == (whole / name).read_bytes()


def test_parts_may_have_other_arms(whole, tmp_path):
    paths = []
    for arms in (("FIPO",), ("wide", "DAPO")):
        part = STUDY._replace(arms={arm: STUDY.arms[arm] for arm in arms})
        root = tmp_path / arms[0] / "short"
        finish(part, root)
        summarise(part, root)
        paths.append(root / "results.json")
    merge(STUDY, paths, tmp_path / "merged" / "short")
    assert (tmp_path / "merged/short/tables.md").read_text() == (whole / "tables.md").read_text()


def test_merging_again_adds_the_rest(whole, parts, tmp_path):
    """Numbers that are null come back as such: no run reached 80% of its final reward."""
    first = json.loads(parts[0].read_text())
    assert first["arms"]["DAPO"]["runs"]["1"]["updates_to_80"] is None
    merge(STUDY, parts[:1], tmp_path / "once" / "short")
    merge(STUDY, [tmp_path / "once/short/results.json", parts[1]], tmp_path / "twice" / "short")
    assert read(tmp_path / "twice" / "short") == read(whole)


def test_only_what_is_finished_is_summarised(tmp_path):
    root = tmp_path / "short"
    done = {(seed, arm) for seed in (1, 2, 3) for arm in ("DAPO", "FIPO")} | {(4, "DAPO")}
    finish(STUDY, root, done)
    begin(tasks_of(STUDY, root)[4, "FIPO"])  # is in training
    text = summarise(STUDY, root)
    assert "Seeds: 4 of DAPO, 3 of FIPO." in text
    assert "| avg@4, % | wide | - | 0 | - | - |" in text
    assert read(root)["arms"].keys() == {"DAPO", "FIPO"}
    assert read(root)["arms"]["FIPO"]["endpoints"]["avg@4"]["seeds"] == 3
    with pytest.raises(ValueError, match="seed-1 holds a run of other arguments or of another recipe"):
        summarise(STUDY._replace(arms=STUDY.arms | {"FIPO": [*TINY, "--learning_rate", "1e-3"]}), root)


def test_nothing_of_the_control_is_finished(tmp_path):
    finish(STUDY, tmp_path / "short", {(1, "FIPO")})
    with pytest.raises(ValueError, match="No run of DAPO, with which all others are compared, is finished in "):
        summarise(STUDY, tmp_path / "short")
    assert not (tmp_path / "short" / "results.json").exists()


def test_an_endpoint_that_no_run_has(whole):
    with pytest.raises(ValueError, match="endpoints: no run has 'avg@8', only alarms, auc_avg@4, avg@4, "):
        summarise(STUDY._replace(endpoints=("avg@8",)), whole)


def set_recipe(part):
    part["arms"]["FIPO"]["recipe_sha256"] = "0123"


def set_arguments(part):
    part["arms"]["FIPO"]["train"][-1] = "32"


def set_torch(part):
    part["versions"]["torch"] = "1.0"


def set_evaluation(part):
    part["evaluate"] = ["--dataset", "aime24"]


def set_name(part):
    part["study"] = "long"


def add_arm(part):
    part["arms"] = {"GRPO": part["arms"]["FIPO"]}


def take_curves(part):
    del part["arms"]["FIPO"]["curves"]


def take_recipe(part):
    del part["arms"]["FIPO"]["recipe_sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "Seed 1 of the arm 'DAPO' is in .*results.json and in .*other.json"),
        (set_recipe, "other.json: recipe_sha256 of 'FIPO' is 0123, but .* in a part before it"),
        (set_arguments, "other.json: train of 'FIPO' is .*'32'], but .*'16'] in a part before it"),
        (set_torch, "other.json has versions .*'torch': '1.0'}, but .*results.json has "),
        (set_evaluation, "other.json has evaluate .*aime24"),
        (set_name, "other.json has study long, but .*results.json has short"),
        (add_arm, "other.json: the study has no arm 'GRPO', only DAPO, FIPO, wide"),
        (take_curves, "other.json is not the results.json of a study, or one of an older version: 'curves'"),
        (take_recipe, "other.json cannot be merged: it does not say recipe_sha256"),
    ],
)
def test_parts_of_another_study_are_refused(parts, tmp_path, change, message):
    part = json.loads(parts[1 if change else 0].read_text())
    if change:
        change(part)
    (tmp_path / "other.json").write_text(json.dumps(part))
    with pytest.raises(ValueError, match=message):
        merge(STUDY, [parts[0], tmp_path / "other.json"], tmp_path / "out" / "short")
    assert not (tmp_path / "out").exists()


def test_a_part_is_not_written_over(parts, tmp_path):
    shutil.copytree(parts[0].parent, tmp_path / "short")
    with pytest.raises(ValueError, match=r"results\.json is a part, and would be written over\. Give another"):
        merge(STUDY, [tmp_path / "short" / "results.json", parts[1]], tmp_path / "short")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"arms": {"DAPO": {"runs": {"one": {}}, "curves": {}}}}'])
def test_what_is_no_part(parts, tmp_path, text):
    path = tmp_path / "part.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"part\.json (cannot be read|is not the results.json)"):
        merge(STUDY, [path], tmp_path / "short")
