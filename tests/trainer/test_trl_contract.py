"""What the trainers assume of TRL, one test per assumption: after an upgrade of TRL these say which one broke."""

import ast
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
import transformers
import trl
from conftest import ROOT
from packaging.specifiers import SpecifierSet
from tiny import PROMPTS, fixed_rollouts, generate, longer_is_better, make_trainer, token_logps
from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

import fipo_trl
from fipo_trl import DAPOTrainer, FIPOTrainer
from fipo_trl.trainer import lora_sync, trl_contract
from fipo_trl.trainer.lora_sync import AdapterGeneration
from fipo_trl.trainer.trl_contract import check_attributes, check_client, check_contract, check_generation
from fipo_trl.trainer.vllm_server import ServerClient


@pytest.fixture
def trainer(tmp_path):
    trainer = make_trainer(tmp_path, GRPOTrainer, keywords={"rollout_func": fixed_rollouts})
    generate(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter *= 1.1
    return trainer


def test_loss_computes_log_probs_once_and_then_reads_advantages(trainer, monkeypatch):
    events = []
    original = trainer._get_per_token_logps_and_entropies

    def log_probs(*args, **kwargs):
        events.append("log-probs")
        return original(*args, **kwargs)

    class Inputs(dict):
        def __getitem__(self, key):
            if key == "advantages":
                events.append("advantages")
            return super().__getitem__(key)

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", log_probs)
    trainer._compute_loss(trainer.model, Inputs(trainer._buffered_inputs[0]))
    assert events == ["log-probs", "advantages"]


def test_log_probs_are_the_first_output_and_differentiable(trainer):
    inputs = trainer._buffered_inputs[0]
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    outputs = trainer._get_per_token_logps_and_entropies(
        trainer.model, input_ids, mask, inputs["completion_ids"].shape[1], compute_entropy=True
    )
    assert outputs[0].requires_grad
    scored = inputs["completion_mask"] == 1
    torch.testing.assert_close(outputs[0][scored], token_logps(trainer.model, inputs)[scored], rtol=1e-4, atol=1e-5)


def test_advantages_may_differ_per_token(trainer):
    inputs = trainer._buffered_inputs[0]
    per_token = dict(inputs, advantages=inputs["advantages"].unsqueeze(1).expand_as(inputs["completion_ids"]).clone())
    assert torch.equal(trainer._compute_loss(trainer.model, inputs), trainer._compute_loss(trainer.model, per_token))
    per_token["advantages"][:, 0] *= 2
    assert not torch.equal(
        trainer._compute_loss(trainer.model, inputs), trainer._compute_loss(trainer.model, per_token)
    )


def test_delta_is_the_dual_clip(trainer):
    inputs = dict(trainer._buffered_inputs[0])
    inputs["advantages"] = -torch.ones_like(inputs["advantages"])
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] - 3.0  # every ratio is near 20, above delta = 10
    loss = trainer._compute_loss(trainer.model, inputs)
    mask = inputs["completion_mask"]
    log_ratio = token_logps(trainer.model, inputs) - inputs["old_per_token_logps"]
    losses = reference.token_losses(log_ratio, inputs["advantages"].unsqueeze(1), 0.2, 0.28, 10.0)
    assert ((losses == 10) & (mask == 1)).any()
    normalizer = inputs["num_items_in_batch"] / trainer.args.updates_per_generation
    torch.testing.assert_close(loss, (losses * mask).sum() / normalizer, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_old_log_probs_come_with_several_updates_per_generation(trainer):
    for inputs in trainer._buffered_inputs:
        assert inputs["old_per_token_logps"].shape == inputs["completion_ids"].shape == inputs["completion_mask"].shape
        assert inputs["advantages"].shape == inputs["completion_ids"].shape[:1]


def test_inputs_are_prepared_once_per_generation(trainer):
    assert len(trainer._buffered_inputs) == trainer.args.steps_per_generation
    first = trainer._buffered_inputs
    for step in range(1, trainer.args.steps_per_generation):
        trainer._step = step
        assert trainer._prepare_inputs(None) is first[step]


def test_a_generation_is_begun_when_its_uses_are_over(tmp_path):
    trainer = make_trainer(
        tmp_path, GRPOTrainer, keywords={"rollout_func": fixed_rollouts}, steps_per_generation=2, num_iterations=2
    )
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert [len(batch), set(batch[0])] == [trainer.args.per_device_train_batch_size * 2, {"prompt"}]
    generations, used = [], []
    for step in range(8):
        trainer._step = step
        used.append(trainer._prepare_inputs(batch))
        if not any(trainer._buffered_inputs is generation for generation in generations):
            generations.append(trainer._buffered_inputs)
    assert len(generations) == 2
    for step, inputs in enumerate(used):
        assert inputs is generations[step // 4][step % 2]
    trainer.model.eval()
    inputs = trainer._prepare_inputs(batch)
    assert trainer._buffered_inputs is generations[1]
    assert len(inputs["completion_ids"]) == len(batch)


# Rollouts and rewards


def with_extras(prompts, trainer):
    rollouts = fixed_rollouts(prompts, trainer)
    rollouts["logprobs"] = [[-1.0] * len(ids) for ids in rollouts["completion_ids"]]
    rollouts["env_mask"] = [[1] * len(ids) for ids in rollouts["completion_ids"]]
    return rollouts | {"number": list(range(len(prompts)))}


@pytest.mark.parametrize("rollout_func", [None, fixed_rollouts, with_extras])
def test_generate_returns_eight_values(tmp_path, rollout_func):
    trainer = make_trainer(tmp_path, GRPOTrainer, keywords={"rollout_func": rollout_func})
    trainer.model.train()
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(4)]
    metrics = trainer._metrics["train"]
    metrics["mine"].append(1.0)
    prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images = (
        trainer._generate(prompts)
    )
    tokenizer = trainer.processing_class
    assert prompt_ids == [tokenizer.encode(prompt) for prompt in prompts]
    assert completions == tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    assert {type(ids) for ids in completion_ids} == {list}
    assert not images
    assert not any(tool_images)
    if rollout_func is with_extras:
        assert tool_mask == [[1] * len(ids) for ids in completion_ids]  # `env_mask`
        assert logprobs == [[-1.0] * len(ids) for ids in completion_ids]
        assert extra_fields == {"number": list(range(8))}
    else:
        assert tool_mask is logprobs is None
        assert extra_fields == {}
    # It leaves metrics, and counts tokens
    assert metrics.pop("mine") == [1.0]
    assert metrics["num_tokens"] == [trainer.state.num_input_tokens_seen]
    assert trainer.state.num_input_tokens_seen == sum(map(len, prompt_ids + completion_ids))
    assert not trainer._metrics["eval"]


def test_completions_of_given_prompts(tmp_path):
    trainer = make_trainer(tmp_path, GRPOTrainer)
    prompt_ids = trainer._tokenize_prompts(PROMPTS[:4])[0]
    assert prompt_ids == [trainer.processing_class.encode(prompt) for prompt in PROMPTS[:4]]
    completion_ids = trainer._generate_single_turn(prompt_ids, None, {}, num_generations=1)[0]
    assert len(completion_ids) == 4
    assert trainer.eos_token_ids == [trainer.processing_class.eos_token_id]
    for ids in completion_ids:  # without padding
        assert len(ids) == 16 or ids[-1] in trainer.eos_token_ids
        assert not set(ids[:-1]) & set(trainer.eos_token_ids)
    # What is in `generation_kwargs` wins
    assert trainer.generation_kwargs["max_new_tokens"] == trainer.max_completion_length == 16
    assert trainer.generation_config.max_new_tokens == 16


@pytest.mark.slow
def test_rewards_are_those_of_all_processes_by_function(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    launch += [str(ROOT / "recipes" / "accelerate" / "two_cpu_processes.yaml")]
    run = subprocess.run(
        [*launch, str(ROOT / "tests" / "trainer" / "rewards_on_ranks.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    expected = torch.tensor([[1.0, 99.0], [2.0, 99.0], [3.0, torch.nan], [4.0, 100.0]])
    for rank in (0, 1):
        rewards = torch.load(tmp_path / f"rewards_{rank}.pt", weights_only=True)
        torch.testing.assert_close(rewards, expected, equal_nan=True)


def test_extra_columns_wait_for_the_log(tmp_path):
    def logging_reward(prompts, completions, log_extra, log_metric, number, **kwargs):
        log_extra("length", [len(completion) for completion in completions])
        log_metric("calls", 1.0)
        return [float(value) for value in number]

    functions = [logging_reward, longer_is_better]
    trainer = make_trainer(tmp_path, GRPOTrainer, keywords={"reward_funcs": functions, "rollout_func": fixed_rollouts})
    trainer.model.train()
    assert trainer.reward_func_names == ["logging_reward", "longer_is_better"]
    assert trainer.reward_weights.tolist() == [1.0, 1.0]
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate(PROMPTS[:2]) for _ in range(4)]
    _, completion_ids, _, completions, *_ = trainer._generate([row["prompt"] for row in rows])
    rewards = trainer._calculate_rewards(rows, [row["prompt"] for row in rows], completions, completion_ids)
    lengths = [len(completion) for completion in completions]
    assert rewards.tolist() == [
        [row["number"], pytest.approx(longer_is_better([completion])[0])]
        for row, completion in zip(rows, completions, strict=True)
    ]
    assert trainer._pending_extra_logs == {"length": lengths}
    assert not trainer._logs["completion"]
    assert not trainer._logs["extra"]

    # The next generation takes along what waits, and a row's other columns reach the rewards
    trainer._pending_extra_logs.clear()
    trainer._pending_extra_logs["mine"] = [*"abcdefg", None]
    outputs = trainer._generate_and_score_completions([dict(row) for row in rows])
    assert not trainer._pending_extra_logs
    logs = trainer._logs
    assert list(logs["extra"]["mine"]) == [*"abcdefg", None]
    assert list(logs["extra"]["length"]) == lengths
    assert list(logs["prompt"]) == [row["prompt"] for row in rows]
    assert list(logs["completion"]) == completions
    assert list(logs["rewards"]["logging_reward"]) == [0.0] * 4 + [1.0] * 4
    assert list(logs["advantages"]) == outputs["advantages"].tolist()
    logs["advantages"][-1] = 7.0
    assert list(logs["advantages"])[-1] == 7.0
    # and the table keeps one generation batch
    assert logs["advantages"].maxlen == trainer.args.generation_batch_size


def test_metrics_are_averaged_and_forgotten_when_they_are_logged(trainer):
    trainer._metrics["train"]["mine"] += [1.0, 3.0]
    trainer._metrics["eval"]["mine"].append(5.0)
    trainer.log({"loss": 0.5})
    assert trainer.state.log_history[-1]["mine"] == 2.0
    assert not trainer._metrics["train"]
    assert trainer._metrics["eval"]["mine"] == [5.0]


def test_training_steps_are_counted(trainer):
    trainer._step = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.training_step(trainer.model, None, None)
    assert trainer._step == 2


def test_dataset_without_the_columns_that_the_trainer_does_not_read(trainer):
    assert trainer.shuffle_dataset is True
    assert not trainer.args.remove_unused_columns  # so that rewards may read them
    dataset = trainer.train_dataset.add_column("answer", ["1"] * len(PROMPTS))
    assert trainer._remove_unused_columns(dataset)[0] == {"prompt": PROMPTS[0], "answer": "1"}


def test_order_of_prompts_is_drawn_from_the_sampler(trainer):
    sampler = trainer._get_train_sampler()
    expected = list(sampler)
    again = trainer._get_train_sampler()
    order = torch.randperm(again.num_samples, generator=again.generator)
    assert expected[0] == order[0]
    assert list(again) != expected  # the second epoch's


# The table of what is relied on


def methods_of_trl():
    return {name for name in dir(GRPOTrainer) if inspect.isfunction(getattr(GRPOTrainer, name))}


def names_used():
    """Names that the package reads, sets or calls on a trainer of TRL."""
    names = set()
    for path in Path(fipo_trl.__file__).parent.rglob("*.py"):
        module = ast.parse(path.read_text())
        trainers = [node for node in module.body if getattr(node, "name", None) in ("DAPOTrainer", "FIPOTrainer")]
        for scope, owners in [
            (module, ("trainer", "self.trainer", "super()")),
            *((node, ("self",)) for node in trainers),
        ]:
            names |= {
                node.attr
                for node in ast.walk(scope)
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners
            }
    return names


def test_this_trl_has_the_client_that_is_extended():
    check_client(VLLMClient)
    methods = {name for name in vars(ServerClient) if not name.startswith("__") and hasattr(VLLMClient, name)}
    assert methods <= trl_contract.OF_CLIENT.keys()
    assert '"model": self.model,' in inspect.getsource(VLLMClient.generate)  # the adapter's name

    class Other(VLLMClient):
        def update_named_params(self, named_params):
            pass

    expected = (
        r"In VLLMClient:\n  update_named_params\(metadata, named_params\) is update_named_params\(named_params\)"
    )
    with pytest.raises(RuntimeError, match=expected):
        check_client(Other)


def test_this_trl_samples_with_vllm_as_adapters_are_given_to_it():
    check_generation(VLLMGeneration)
    methods = {name for name in vars(AdapterGeneration) if hasattr(VLLMGeneration, name) and name[:2] != "__"}
    assert methods == trl_contract.OF_GENERATION.keys()
    assert grpo_trainer.VLLMGeneration is VLLMGeneration  # as it is outside of `adapter_sync`
    source = inspect.getsource(VLLMGeneration)
    assert set(re.findall(r"self\.llm\.(\w+)\(", source)) == trl_contract.OF_LLM
    assert "self.llm = LLM(\n" in source
    assert "self.vllm_client = VLLMClient(\n" in source
    uses = "".join(map(inspect.getsource, (AdapterGeneration, lora_sync.why_merged, lora_sync.unserved_model)))
    used = set(re.findall(r"\b(?:self|generation)\.(\w+)", uses))
    own = {"merge", "serves_adapter", "_has_base", "_adapter_dtype", *vars(AdapterGeneration)}
    assert [name for name in sorted(used - own) if not re.search(rf"self\.{name} = ", source)] == []

    class Chats(VLLMGeneration):
        def generate(self, prompts):
            return self.llm.chat(prompts)

    with pytest.raises(RuntimeError, match=r"In VLLMGeneration:\n  self\.llm\.chat is called\n"):
        check_generation(Chats)


@pytest.mark.parametrize("method", sorted(trl_contract.OVERRIDDEN.keys() | trl_contract.CALLED.keys()))
def test_overridden_and_called_methods_exist(method):
    assert inspect.isfunction(getattr(GRPOTrainer, method))


def test_the_table_names_each_method_that_is_overridden():
    own = {name for trainer in (DAPOTrainer, FIPOTrainer) for name in vars(trainer)}
    assert trl_contract.OVERRIDDEN.keys() == own & methods_of_trl()


def test_the_table_names_all_that_is_used():
    source = "".join(inspect.getsource(owner) for owner in GRPOTrainer.__mro__ if owner.__module__.startswith("trl."))
    of_trl = {name for name in names_used() if re.search(rf"(self\.|def ){name}\b", source)}
    of_transformers = {
        name
        for name in names_used()
        if not name.startswith("_") and re.search(rf"(self\.|def ){name}\b", inspect.getsource(transformers.Trainer))
    }
    private = {name for name in names_used() & methods_of_trl() if name.startswith("_")}
    own = {"_name", "_tag_names", "_paper"}  # what a subclass of TRL's says of itself
    attributes = {*trl_contract.ATTRIBUTES, *trl_contract.WITH_VLLM, *trl_contract.WITHOUT_VLLM}
    table = trl_contract.OVERRIDDEN.keys() | trl_contract.CALLED.keys() | attributes
    assert (of_trl - of_transformers - own) | private <= table
    assert attributes | trl_contract.CALLED.keys() <= of_trl | {"_remove_unused_columns"}  # nothing that nobody uses


def test_this_trl_keeps_the_contract(trainer):
    check_contract()
    check_attributes(trainer)
    for name in trl_contract.WITH_VLLM:  # no engine here
        assert re.search(rf"self\.{name} = ", inspect.getsource(GRPOTrainer.__init__))


class NoSingleTurn(GRPOTrainer):
    _generate_single_turn = None


class OtherSingleTurn(GRPOTrainer):  # that of TRL 1.14.0
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        pass


class OtherNames(GRPOTrainer):
    def _calculate_rewards(self, prompts, inputs, completions, completion_ids_list):
        pass


class MoreForTheLoss(GRPOTrainer):
    def _compute_loss(self, model, inputs, extra=None):
        return super()._compute_loss(model, inputs)


class AdvantagesFirst(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        advantages = inputs["advantages"]
        logps, _, _ = self._get_per_token_logps_and_entropies(model, inputs, None, 1)
        return -(advantages * logps).sum()


class NineValues(GRPOTrainer):
    def _generate(self, prompts):
        return (*super()._generate(prompts), None)


@pytest.mark.parametrize(
    ("trainer_class", "fault"),
    [
        (NoSingleTurn, "  _generate_single_turn is missing\n"),
        (
            OtherSingleTurn,
            "  _generate_single_turn(prompt_ids, images, multimodal_fields, num_generations=) is "
            "_generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images) now\n",
        ),
        (OtherNames, "is _calculate_rewards(prompts, inputs, completions, completion_ids_list) now\n"),
        (MoreForTheLoss, "  _compute_loss(model, inputs) is _compute_loss(model, inputs, extra) now\n"),
        (AdvantagesFirst, "  _compute_loss does not ask _get_per_token_logps_and_entropies"),
        (NineValues, "  _generate does not return 8 values: (*super()._generate(prompts), None)\n"),
    ],
)
def test_another_contract_is_refused_by_name(trainer_class, fault):
    with pytest.raises(RuntimeError) as error:
        check_contract(trainer_class)
    message = str(error.value)
    assert message.startswith(f"TRL {trl.__version__} ")
    assert fault in message
    assert message.count("\n") == 2  # this one fault
    assert message.endswith(
        f'Tested are TRL {", ".join(trl_contract.TESTED)}: pip install "trl=={trl_contract.TESTED[-1]}"'
    )


def test_several_faults_are_named_at_once():
    class Two(NoSingleTurn):
        get_train_dataloader = None

    with pytest.raises(RuntimeError, match=r"(?s)get_train_dataloader is missing.*_generate_single_turn is missing"):
        check_contract(Two)


def test_missing_attributes_are_refused_by_name(trainer):
    del trainer._pending_extra_logs, trainer.eos_token_ids
    with pytest.raises(RuntimeError, match=r"(?s)attribute _pending_extra_logs is missing.*eos_token_ids is missing"):
        check_attributes(trainer)


def test_an_untested_trl_that_keeps_the_contract_is_warned_of_once(trainer, monkeypatch, caplog):
    monkeypatch.setattr(trl, "__version__", "99.0.0")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check_contract()
            check_attributes(trainer)
    (record,) = [record for record in caplog.records if "99.0.0" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert "\n" not in record.getMessage()


def test_tested_releases_are_those_that_setup_cfg_admits():
    (requirement,) = re.findall(r"^    trl(\S+)$", (ROOT / "setup.cfg").read_text(), re.M)
    specifiers = SpecifierSet(requirement)
    assert all(release in specifiers for release in trl_contract.TESTED)
    assert "99.0.0" in specifiers  # a newer one is met by the check
    assert not any(release in specifiers for release in ("1.13.0", "1.14.0", "1.14.1", "1.15.0"))
