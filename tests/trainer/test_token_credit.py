import json
import math
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
import torch
from browser import CHROMIUM, Browser
from conftest import ROOT
from cpu_ranks import DDP
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    distance,
    fixed_rollouts,
    generate,
    last_update,
    longer_is_better,
    make_args,
    make_trainer,
    parameters,
    right_for_some,
    token_logps,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from fipo_trl.analysis.token_credit_page import write_page
from fipo_trl.commands.token_credit import main
from fipo_trl.trainer.token_credit import (
    MAX_COMPLETIONS,
    TokenState,
    read_trace,
    token_texts,
    trace_path,
    write_trace,
)


ROLLOUTS = {"rollout_func": fixed_rollouts}
SETTINGS = {
    "step": 80,
    "generation": 10,
    "future_kl_half_life": 32.0,
    "influence_weight_min": 0.8,
    "influence_weight_max": 1.2,
    "delta": 10.0,
    "influence_safety_ratio": 3.0,
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "token_credit_every": 10,
}


# Traces


def with_a_tool(prompts, trainer):
    """Completions in which every third token was written by a tool."""
    rollouts = fixed_rollouts(prompts, trainer)
    rollouts["env_mask"] = [[int(t % 3 != 1) for t in range(len(ids))] for ids in rollouts["completion_ids"]]
    return rollouts


def none_for_short(completions, **kwargs):
    return [None if len(completion) < 6 else 1.0 for completion in completions]


def expected_states(row, log_ratio, scored, args):
    """Token by token, from the definitions."""
    states = []
    for d, is_scored in zip(log_ratio.tolist(), scored.tolist(), strict=True):
        ratio, negative = math.exp(min(d, 20.0)), row["advantage"] < 0
        far = ratio < 1 - args.epsilon if negative else ratio > 1 + args.epsilon_high
        state = 0
        if not is_scored:
            state = TokenState.UNSCORED
        else:
            state |= TokenState.CLIPPED * (far and row["advantage"] != 0)
            state |= TokenState.MASKED * (ratio > args.delta)
            state |= TokenState.SAFETY_CAPPED * (negative and ratio > args.influence_safety_ratio)
            state |= TokenState.DUAL_CLIPPED * (negative and ratio > args.delta)
        states.append(int(state))
    return states


@pytest.mark.parametrize(
    ("rollout_func", "settings"),
    [
        (fixed_rollouts, {}),
        (fixed_rollouts, {"gradient_accumulation_steps": 2, "influence_weight_min": 0.5, "influence_weight_max": 2.0}),
        (fixed_rollouts, {"group_by_length": False, "drop_dual_clipped_sequences": False}),
        (with_a_tool, {"future_kl_half_life": 4.0}),
    ],
    ids=["plain", "accumulation", "as they come", "tool"],
)
def test_a_trace_holds_what_the_slow_formulas_give(tmp_path, rollout_func, settings):
    settings = {"delta": 1.6, "influence_safety_ratio": 1.3} | settings
    trainer = make_trainer(tmp_path, keywords={"rollout_func": rollout_func}, token_credit_every=1, **settings)
    args, tokenizer = trainer.args, trainer.processing_class
    batches = generate(trainer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    last_update(trainer)
    table, stored = read_trace(tmp_path)
    assert stored["step"] == 1
    assert stored["generation"] == 1
    rows = iter(table.to_pylist())
    seen = TokenState(0)
    for inputs in batches:
        scored = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        with torch.no_grad():
            log_ratio = (token_logps(trainer.model, inputs) - inputs["old_per_token_logps"]).double()
        log_ratio = torch.where(scored != 0, log_ratio, 0.0)
        weights, kept = reference.influence(
            log_ratio,
            inputs["advantages"],
            scored,
            args.future_kl_half_life,
            args.influence_weight_min,
            args.influence_weight_max,
            args.delta,
            args.influence_safety_ratio,
        )
        future_kl = reference.future_kl(log_ratio, scored * (log_ratio.exp() <= args.delta), args.future_kl_half_life)
        for b in range(len(log_ratio)):
            row, length = next(rows), int(inputs["completion_mask"][b].sum())
            ids = inputs["completion_ids"][b, :length].tolist()
            assert row["completion_ids"] == ids
            assert "".join(row["tokens"]) == tokenizer.decode(ids)
            assert row["prompt"] == tokenizer.decode(inputs["prompt_ids"][b][inputs["prompt_mask"][b] == 1])
            assert row["reward"] == pytest.approx(*longer_is_better([tokenizer.decode(ids, skip_special_tokens=True)]))
            assert row["advantage"] == inputs["advantages"][b].item()
            assert row["log_ratio"] == pytest.approx(log_ratio[b, :length].tolist(), abs=1e-5)
            assert row["future_kl"] == pytest.approx(future_kl[b, :length].tolist(), abs=1e-4)
            assert row["weight"] == pytest.approx(weights[b, :length].tolist(), abs=1e-4)
            assert row["state"] == expected_states(row, log_ratio[b, :length], scored[b, :length], args)
            assert row["dropped"] == (args.drop_dual_clipped_sequences and not kept[b].item())
            seen |= TokenState(int(np.bitwise_or.reduce(row["state"])))
    assert next(rows, None) is None
    wanted = set(TokenState) - (set() if rollout_func is with_a_tool else {TokenState.UNSCORED})
    assert set(seen) == wanted  # the case is not trivial


def test_the_last_update_of_every_nth_generation_is_traced(tmp_path):
    settings = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 20, "learning_rate": 0.1}
    make_trainer(tmp_path, keywords=ROLLOUTS, token_credit_every=2, **settings).train()  # 4 updates per generation
    assert sorted(path.name for path in tmp_path.joinpath("token_credit").iterdir()) == [
        "step_000008.parquet",
        "step_000016.parquet",
    ]
    table, stored = read_trace(tmp_path, step=8)
    assert (stored["step"], stored["generation"]) == (8, 2)
    assert len(table) == 4
    assert max(map(abs, table["log_ratio"].to_pylist()[0])) > 0.01  # the policy has moved


@pytest.mark.parametrize("dynamic_sampling", [False, True])
def test_rewards_are_weighted_and_follow_their_completions(tmp_path, dynamic_sampling):
    settings = {"reward_weights": [0.5], "dynamic_sampling": dynamic_sampling, "max_steps": 8}
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, token_credit_every=1, **settings)
    trainer.train()
    rows = read_trace(tmp_path)[0].to_pylist()
    assert len(rows) == 4
    for row in rows:
        text = trainer.processing_class.decode(row["completion_ids"], skip_special_tokens=True)
        assert row["reward"] == pytest.approx(0.5 * longer_is_better([text])[0])


def test_a_completion_without_any_reward_has_none(tmp_path):
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, token_credit_every=1, max_steps=8)
    trainer.reward_funcs[0] = none_for_short
    trainer.train()
    rows = read_trace(tmp_path)[0].to_pylist()
    missing = [math.isnan(row["reward"]) for row in rows]
    assert missing == [len(row["tokens"]) - 1 < 6 for row in rows]
    assert 0 < sum(missing) < len(rows)


def test_a_large_update_is_traced_in_proportion(tmp_path):
    settings = {"per_device_train_batch_size": 144, "num_generations": 144, "steps_per_generation": 2}
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, token_credit_every=1, **settings)
    (inputs,) = generate(trainer)
    last_update(trainer)
    table, _ = read_trace(tmp_path)
    assert len(table) == 48  # every third
    assert len(table) <= MAX_COMPLETIONS
    lengths = inputs["completion_mask"].sum(dim=1)
    assert [len(ids) for ids in table["completion_ids"]] == lengths[::3].tolist()
    assert lengths[0] > lengths[-1]  # from the longest to the shortest


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def test_a_resumed_run_writes_the_trace_of_an_uninterrupted_one(tmp_path):
    settings = {"token_credit_every": 2, "max_steps": 16, "gradient_accumulation_steps": 2}
    make_trainer(tmp_path / "whole", **settings).train()
    interrupted = make_trainer(tmp_path / "parts", **settings)
    interrupted.add_callback(StopAt(15))  # before the update that is traced
    interrupted.train()
    trace = trace_path(tmp_path / "parts", 16)
    trace.parent.mkdir()
    trace.with_suffix(".unfinished").write_bytes(b"PAR1")  # of a process that was killed while it wrote
    resumed = make_trainer(tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-15"))
    assert read_trace(tmp_path / "parts")[0].equals(read_trace(tmp_path / "whole")[0])
    assert [path.name for path in trace.parent.iterdir()] == [trace.name]
    before = trace.read_bytes()
    again = make_trainer(tmp_path / "parts", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-15"))
    assert trace.read_bytes() == before


def test_traces_that_begin_within_a_generation_know_no_reward(tmp_path):
    stopped = make_trainer(tmp_path, max_steps=8)
    stopped.add_callback(StopAt(3))
    stopped.train()
    resumed = make_trainer(tmp_path, max_steps=8, token_credit_every=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    rewards = read_trace(tmp_path)[0]["reward"].to_pylist()
    assert len(rewards) == 4
    assert all(map(math.isnan, rewards))
    write_page(tmp_path)


def test_traces_change_nothing(tmp_path):
    trained = []
    for every in (None, 1):
        settings = {"max_steps": 12, "gradient_accumulation_steps": 2, "steps_per_generation": 8}
        trainer = make_trainer(tmp_path, token_credit_every=every, **settings)
        trainer.train()
        trained.append(parameters(trainer))
    assert len(list(trace_path(tmp_path, 4).parent.iterdir())) == 3
    assert distance(*trained) == 0.0


@pytest.mark.parametrize("every", [None, 0])
def test_without_traces_nothing_is_carried_along(tmp_path, every):
    trainer = make_trainer(tmp_path, keywords=ROLLOUTS, token_credit_every=every)
    traced = make_trainer(tmp_path / "traced", keywords=ROLLOUTS, token_credit_every=1)
    assert generate(traced)[0].keys() - generate(trainer)[0].keys() == {"rewards"}
    last_update(trainer)
    assert not trace_path(tmp_path, 1).parent.exists()


@pytest.mark.slow
def test_only_the_first_process_writes(ranks, tmp_path):
    settings = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "max_steps": 4, "token_credit_every": 1}
    ranks.run("train_on_ranks:cases", tmp_path, {"run": settings}, launch=DDP)
    table, _ = read_trace(tmp_path / "run", step=4)
    assert len(table) == 4  # of 8 in the update
    for row in table.to_pylist():
        completions = ["".join(row["tokens"]).removesuffix("<eos>")]
        expected = longer_is_better(completions)[0] + right_for_some([row["prompt"]], completions)[0]
        assert row["reward"] == pytest.approx(expected)


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match="token_credit_every=-1"):
        make_args(tmp_path, token_credit_every=-1)
    with pytest.warns(UserWarning, match="token_credit_every=3 will store nothing"):
        make_args(tmp_path, token_credit_every=3, max_steps=23)


# The text of tokens


def byte_level():
    """One token per byte, as a byte-level BPE without merges, and a special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_fallback():
    """As Llama's: words with the space before them, bytes for all else, the first space of a text left out."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for word in ["▁", "▁so", "so", "▁it", "."]:
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
def test_texts_of_tokens_join_to_the_text(name, data):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=60)))
    if name == "byte level":  # the other decodes a valid character beside an invalid byte to U+FFFD
        ids += data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=15))
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_a_character_belongs_to_the_token_that_completes_it():
    tokenizer = TOKENIZERS["byte level"]
    assert token_texts(tokenizer, tokenizer.encode("a é字!")) == ["a", " ", "", "é", "", "", "字", "!"]
    assert token_texts(tokenizer, tokenizer.encode("字")[:2]) == ["", "�"]  # cut off
    tokenizer = TOKENIZERS["byte fallback"]
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in ["▁so", "▁it", "▁", "<0xE5>", "<0xAD>", "<0x97>", "▁so", "."]]
    assert token_texts(tokenizer, ids) == ["so", " it", " ", "", "", "字", " so", "."]


def test_endless_parts_of_characters_take_linear_time():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("字")[:1] * 20_480
    began = time.process_time()
    assert len("".join(token_texts(tokenizer, ids))) == 20_480
    assert time.process_time() - began < 5.0


# The page


def make_row(tokens, reward=0.0, advantage=1.0, seed=0, dropped=False, prompt="What is 1 + 1?"):
    generator = np.random.default_rng(seed)
    n = len(tokens)
    log_ratio = generator.normal(0, 0.05, n).astype(np.float32)
    future_kl = np.cumsum(log_ratio[::-1])[::-1].astype(np.float32)
    return {
        "prompt": prompt,
        "tokens": tokens,
        "completion_ids": generator.integers(0, 150_000, n).astype(np.int32),
        "reward": reward,
        "advantage": advantage,
        "weight": np.exp(future_kl).clip(0.8, 1.2),
        "future_kl": future_kl,
        "log_ratio": log_ratio,
        "state": generator.choice([0, 0, 0, 1, 2, 4, 8, 20], n).astype(np.uint8),
        "dropped": dropped,
    }


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    browser = Browser()
    yield browser
    browser.close()


def open_page(browser, run, rows, **settings):
    write_trace(run, 80, rows, SETTINGS | settings)
    browser.open(write_page(run))
    assert not browser.reported("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")


def shown(browser):
    """Completions from top to bottom, by their number."""
    return browser.evaluate(
        "[...document.querySelectorAll('article')].map((a) => Number(a.querySelector('b').textContent.slice(1)))"
    )


def test_completions_are_sorted_by_reward_and_length(browser, tmp_path):
    rewards = [0.5, math.nan, -1.0, 1.0, 0.5]
    lengths = [3, 9, 20, 1, 7]
    open_page(browser, tmp_path, [make_row(["a "] * n, reward) for n, reward in zip(lengths, rewards, strict=True)])
    assert shown(browser) == [4, 1, 5, 3, 2]  # by reward, best first, those without one last
    click = "document.querySelector('[data-key={}]').click()"
    browser.evaluate(click.format("reward"))
    assert shown(browser) == [3, 1, 5, 4, 2]
    browser.evaluate(click.format("length"))
    assert shown(browser) == [3, 2, 5, 1, 4]
    browser.evaluate(click.format("length"))
    assert shown(browser) == [4, 1, 5, 2, 3]
    browser.evaluate(click.format("number"))
    assert shown(browser) == [1, 2, 3, 4, 5]


def tip(browser):
    return browser.evaluate("document.querySelector('#tip.shown')?.innerText.replace(/\\t/g, ' ')")


def number(text):
    return float(text.replace("−", "-").split(" ")[0])


def check_tip(browser, row, i):
    """The tip of a token says what the trace holds."""
    text, *lines = tip(browser).split("\n")
    names = ["weight f", "Future-KL F", "log-ratio d", "advantage A", "A × f", "token"]
    values = {name: line.removeprefix(name).strip() for name, line in zip(names, lines[:6], strict=True)}
    assert text == json.dumps(row["tokens"][i], ensure_ascii=False)
    assert values["weight f"] == f"{row['weight'][i]:.4f}"
    assert number(values["Future-KL F"]) == pytest.approx(row["future_kl"][i], rel=1e-3)
    assert number(values["log-ratio d"]) == pytest.approx(row["log_ratio"][i], rel=1e-3)
    assert number(values["log-ratio d"].split("ratio ")[1].rstrip(")")) == pytest.approx(
        math.exp(row["log_ratio"][i]), rel=1e-3
    )
    assert number(values["advantage A"]) == pytest.approx(row["advantage"], rel=1e-3)
    assert number(values["A × f"]) == pytest.approx(row["advantage"] * row["weight"][i], rel=1e-3)
    assert values["token"] == f"{i + 1:,} of {len(row['tokens']):,}, id {row['completion_ids'][i]}"
    words = ["not scored", "clipped", "masked", "safety cap", "dual clip"]
    assert [line.split(":")[0] for line in lines[6:]] == [
        word for bit, word in enumerate(words) if row["state"][i] & 1 << bit
    ] + ["dropped"] * row["dropped"]


def test_hover_and_arrow_keys_tell_about_a_token(browser, tmp_path):
    row = make_row([f" {i}" for i in range(200)], advantage=-0.7512, dropped=True)
    open_page(browser, tmp_path, [row])
    for i in [0, 1, 57, *(int(np.argmax(row["state"] == state)) for state in (1, 2, 4, 8, 20))]:
        browser.point_at(f"document.querySelectorAll('.tokens .t')[{i}]")
        check_tip(browser, row, i)
    browser.point_at("document.querySelector('h1')")
    assert tip(browser) is None
    for _ in range(30):
        browser.press("Tab")
        if browser.evaluate("document.activeElement.className") == "tokens":
            break
    for _ in range(3):
        browser.press("ArrowRight")
    check_tip(browser, row, 2)
    browser.press("ArrowLeft")
    check_tip(browser, row, 1)
    browser.press("Escape")
    assert tip(browser) is None


def test_true_credit_is_shown_where_it_is_known(browser, tmp_path):
    """A bar below the token, as strong as the credit is large, and a line of its tip."""
    known = [(1, 0.5, 0.0625), (3, -0.25, 0.125)]
    of_tokens = [{"step": 80, "row": 0, "position": i, "credit": c, "error": e} for i, c, e in known]
    of_others = [{"step": 72, "row": 0, "position": 2, "credit": 0.9, "error": 0.1}]
    (tmp_path / "credit_fidelity").mkdir()
    pq.write_table(pa.Table.from_pylist(of_tokens + of_others), tmp_path / "credit_fidelity" / "tokens.parquet")
    open_page(browser, tmp_path, [make_row(list("abcde")), make_row(list("fghij"))])
    browser.point_at("document.querySelectorAll('.tokens .t')[0]")
    assert "true credit" not in tip(browser)
    for i, said in ((1, "+0.5 (standard error 0.0625)"), (3, "\u22120.25 (standard error 0.125)")):
        browser.point_at(f"document.querySelectorAll('.tokens .t')[{i}]")
        assert f"true credit {said}" in tip(browser)
    bars = browser.evaluate("[...document.querySelectorAll('.tokens .t')].map((t) => t.style.boxShadow)")
    assert [i for i, bar in enumerate(bars) if bar] == [1, 3]
    assert "--more" in bars[1]
    assert "--less" in bars[3]
    assert "0.5" in bars[3]


def test_colours_tell_below_from_above_and_text_stays_readable(browser, tmp_path):
    row = make_row(["x"] * 4)
    row["weight"], row["state"] = np.float32([0.8, 1.0, 1.02, 1.2]), np.zeros(4, np.uint8)
    open_page(browser, tmp_path, [row])
    for dark in (False, True):
        browser.dark(dark)
        colours = browser.evaluate(
            """(() => {
              const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
              const blend = (...layers) => {
                for (brush.fillStyle of layers) brush.fillRect(0, 0, 1, 1);
                return [...brush.getImageData(0, 0, 1, 1).data.slice(0, 3)];
              };
              const paper = getComputedStyle(document.querySelector("article")).backgroundColor;
              const styles = [...document.querySelectorAll(".tokens .t")].map((span) => getComputedStyle(span));
              return styles.map((style) => [blend(paper, style.backgroundColor), blend(style.color)]);
            })()"""
        )
        backgrounds = [background for background, _ in colours]
        assert backgrounds[0][2] > backgrounds[0][0] + 50  # blue
        assert backgrounds[3][0] > backgrounds[3][2] + 50  # orange
        assert len({tuple(background) for background in backgrounds}) == 4
        assert all(contrast(*pair) > 4.5 for pair in colours)  # WCAG AA
    browser.dark(False)


def contrast(one, other):
    """WCAG 2.1 contrast ratio of two sRGB colours."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


NASTY = [
    *("</script>", "<script>pwned=1</script>", "<img src=x onerror='pwned=1'>", "<!--", "-->", "]]>", "\\", '"', "'"),
    *("<style>*{display:none}</style>", "<iframe src='https://example.com'></iframe>", "javascript:pwned=1"),
    *("<meta http-equiv=refresh content='0;url=https://example.com'>", "&lt;b&gt;", "{{data}}", "${pwned=1}", ""),
    *("\u2028", "\u2029", "\u202eevil", "\u2066", "\ufeff", "\ufffd", "\U000e0041", "\x00", "\x1b[31m", "\r\n", "\t"),
    *("مرحبا", " שלום", "e\u0301", "👩\u200d👩\u200d👧", "𝔘", "\n\n"),
]


def test_what_the_model_wrote_stays_text(browser, tmp_path):
    run = tmp_path / "<img src=x onerror=pwned=1>&"
    run.mkdir()
    open_page(browser, run, [make_row(NASTY, prompt="".join(NASTY)), make_row(["fine"])])
    time.sleep(0.3)
    assert browser.evaluate("typeof pwned") == "undefined"
    assert (
        browser.evaluate("document.querySelectorAll('img, iframe, article script, article style, main meta').length")
        == 0
    )
    assert browser.evaluate("document.title") == f"Token credit: {run.name}"
    assert run.name in browser.evaluate("document.getElementById('about').textContent")
    texts = browser.evaluate(
        """[...document.querySelector(".tokens").querySelectorAll(".t")].map((span) =>
        [...span.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join(""))"""
    )
    hidden = str.maketrans("", "", "\u2028\u2029\u202e\u2066\x00\x1b\r\ufeff\U000e0041")  # shown by their number
    assert texts == [token.translate(hidden) for token in NASTY]
    assert "U+202Eevil" in browser.evaluate("document.querySelector('.tokens').textContent")
    requests = [event["params"]["request"]["url"] for event in browser.reported("Network.requestWillBeSent")]
    assert requests == [trace_path(run, 80).with_suffix(".html").resolve().as_uri()]


def test_the_policy_of_the_page_stops_scripts_and_requests(browser, tmp_path):
    open_page(browser, tmp_path, [make_row(["fine"])])
    browser.evaluate(
        """document.body.insertAdjacentHTML("beforeend", "<img src=data:,x onerror=pwned=1><b style='color: red'>b");
        document.body.append(Object.assign(document.createElement("script"), { textContent: "pwned = 2" }))"""
    )
    refused = browser.evaluate("fetch('https://example.com').then(() => 'sent', (error) => error.name)")
    assert refused == "TypeError"
    assert browser.evaluate("typeof pwned") == "undefined"
    assert browser.evaluate("document.querySelector('b[style]').style.color") == ""


@pytest.mark.slow
def test_the_paper_s_largest_completions_stay_usable(browser, tmp_path):
    generator = np.random.default_rng(0)
    words = np.array(
        [" the", " sum", " of", "\n", " so", " 12", " wait", ",", " therefore", "=", ".\n\n", " \\frac{a}{b}"]
    )
    length = 20_480
    rows = [make_row(words[generator.integers(0, len(words), length)].tolist(), seed=seed) for seed in range(64)]
    rows[0]["tokens"][-1] = "THE END"
    write_trace(tmp_path, 80, rows, SETTINGS)
    assert trace_path(tmp_path, 80).stat().st_size < 30e6
    began = time.process_time()
    page = write_page(tmp_path)
    made = time.process_time() - began
    browser.open(page)
    opened = browser.cpu_seconds()
    browser.evaluate("document.querySelector('article button').click()")
    browser.wait("document.querySelectorAll('.tokens .t').length > 600")
    expanded = browser.cpu_seconds() - opened
    browser.evaluate(
        """(async () => {
          for (const button of document.querySelectorAll("article button")) {
            button.scrollIntoView();
            while (!button.parentElement.data) await new Promise((done) => setTimeout(done, 10));
            if (button.getAttribute("aria-expanded") === "false") button.click();
          }
        })()"""
    )
    frame, elements, before = 0.0, 0, browser.cpu_seconds()
    for i in range(101):
        seen = browser.evaluate(
            f"""(async () => {{
              scrollTo(0, {i / 100} * document.body.scrollHeight);
              await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
              return document.querySelectorAll("*").length;
            }})()"""
        )
        after = browser.cpu_seconds()
        frame, elements, before = max(frame, after - before), max(elements, seen), after
    browser.evaluate("document.querySelector('.tokens').lastChild.scrollIntoView()")
    browser.wait("document.querySelector('.tokens').textContent.endsWith('THE END')")
    megabytes = page.stat().st_size / 1e6
    print(f"\n{megabytes:.1f} MB; CPU time: made in {made:.1f} s, opened in {opened:.2f} s,")
    print(f"expanded in {expanded:.2f} s, slowest step of scrolling {frame:.2f} s; at most {elements:,} elements")
    assert megabytes < 30
    assert made < 20
    assert opened < 5
    assert expanded < 2
    assert frame < 1
    assert elements < 20_000  # of 1.3 million tokens


@pytest.mark.parametrize(
    "settings", [{"future_kl_half_life": math.inf}, {"influence_weight_min": 1.0, "influence_weight_max": 1.0}]
)
def test_unusual_settings_and_empty_completions_are_shown(browser, tmp_path, settings):
    row = make_row(["a", "b"], reward=math.nan)
    row["weight"], row["state"] = np.ones(2, np.float32), np.ones(2, np.uint8)
    open_page(browser, tmp_path, [row, make_row([])], **settings)
    assert shown(browser) == [2, 1]


# Errors


def test_script_writes_the_page_beside_the_trace(tmp_path, capsys):
    for step in (8, 16):
        write_trace(tmp_path, step, [make_row(["a"])], SETTINGS | {"step": step})
    for arguments, step in [([], 16), (["--step", "8"], 8)]:
        main(["--run", str(tmp_path), *arguments])
        page = trace_path(tmp_path, step).with_suffix(".html")
        assert capsys.readouterr().out == f"{page}: open it in a browser.\n"
        assert page.read_text().startswith("<!doctype html>")


def test_script_refuses_runs_without_traces(tmp_path):
    trace_path(tmp_path, 1).parent.mkdir()
    trace_path(tmp_path, 1).parent.joinpath("step_000001 (copy).parquet").touch()
    with pytest.raises(
        SystemExit, match=r"holds no traces \(token_credit/step_\*.parquet\). Give the output_dir of a run"
    ):
        main(["--run", str(tmp_path)])
    script = [sys.executable, str(ROOT / "scripts" / "token_credit.py"), "--run", str(tmp_path / "none")]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "there is no such folder" in result.stderr


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def overwrite(path):
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("weight"), path)


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        (81, None, "holds no trace of step 81, only of 80"),
        (80, truncate, "cannot be read"),
        (80, overwrite, "is no trace of this version"),
        (80, lambda path: path.write_bytes(b""), "cannot be read"),
    ],
)
def test_errors_say_what_to_do(tmp_path, step, change, message):
    write_trace(tmp_path, 80, [make_row(["a"] * 50)], SETTINGS)
    if change:
        change(trace_path(tmp_path, 80))
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path, step)
