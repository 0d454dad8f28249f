"""The doctor's numbers against what torch, transformers and a real trainer hold, and what it refuses."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import set_seed
from peft import LoraConfig
from tiny import BASE, make_args, make_trainer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.cache_utils import DynamicCache
from trl import ModelConfig

from fipo_trl.commands.doctor import main
from fipo_trl.planning import doctor, memory, paper, plan
from fipo_trl.planning.memory import GIB
from fipo_trl.planning.plan import Plan, make_plan
from fipo_trl.recipe import model_limits
from fipo_trl.recipe.build import trainer_arguments
from fipo_trl.recipe.validate import Recipe, read_and_validate


FIPO_32B = "recipes/Qwen2.5-32B/fipo.yaml"
ON_16_NODES = {"world_size": 128, "sharding": "fsdp2"}


def make_run(config, args, trainer="fipo", max_prompt_length=None, **spread) -> Plan:
    run = SimpleNamespace(
        trainer=trainer, reward_funcs=["dapo_reward"], max_prompt_length=max_prompt_length, dataset_name="data"
    )
    model = spread.pop("model", ModelConfig(dtype="float32"))
    return Plan(Recipe(run, args, model, None, None, {}, ()), config, **spread)


def sizes(parts):
    return {part.name: part.size for part in parts}


# Parameters


@pytest.mark.parametrize(
    ("name", "published"),  # as the Hub shows them, from the safetensors files
    [
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("models/Qwen2.5-Math-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("outputs/not-made/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_shapes_of_public_models(name, published):
    count = plan.count_parameters(plan.meta_model(model_limits.public_config(name)))
    assert count.total == count.trainable == published


def test_parameters_of_a_local_model():
    config = model_limits.find_config(ModelConfig(model_name_or_path=BASE))
    model = AutoModelForCausalLM.from_pretrained(BASE)
    count = plan.count_parameters(plan.meta_model(config))
    assert count.total == model.num_parameters()
    assert count.head == 0  # tied
    assert count.embedding == model.get_input_embeddings().weight.numel()
    assert count.layer == sum(p.numel() for p in model.model.layers[0].parameters())


def test_parameters_of_an_adapter():
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    count = plan.count_parameters(plan.meta_model(config, LoraConfig(r=4, target_modules="all-linear")))
    per_layer = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]  # q k v o, gate up down
    assert count.trainable == 3 * sum(4 * (inputs + outputs) for inputs, outputs in per_layer)


# Memory


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "shape", [(1536, 8960, 12, 2), (1024, 4096, 16, 16)], ids=["Qwen2.5-1.5B", "many-key-value-heads"]
)
def test_activations_are_those_that_torch_tracks(tmp_path, shape, dtype, checkpointing):
    """A backbone without its head, in float32 with autocast and in bf16, on fake tensors."""
    tokens, layers = 16384, 2
    hidden, intermediate, heads, kv_heads = shape
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=128,
    )
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        input_ids = torch.zeros(1, tokens, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
                mask = {"full_attention": None}  # no padding: attention is causal without a mask
                hidden_states = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]
            hidden_states.sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    held = sum(parameter.nbytes for parameter in model.parameters()) * 2  # with gradients
    tracked = peak["Total"] - held

    args = make_args(
        tmp_path, per_device_train_batch_size=1, num_generations=2, max_completion_length=tokens, bf16=True,
        gradient_checkpointing=checkpointing, steps_per_generation=8,
    )  # fmt: skip
    run = make_run(config, args, model=ModelConfig(dtype=dtype))
    parts = sizes(memory.update_memory(run, gpu=80 * GIB))
    estimate = parts["checkpoints" if checkpointing else "activations"] + parts["a layer, backward"]
    if dtype == "float32" and not checkpointing:
        estimate += parts["bf16 copies of the weights"]
    assert estimate == pytest.approx(tracked, rel=0.05)


@pytest.mark.parametrize("lora", [False, True])
def test_states_are_those_of_a_trainer(tmp_path, lora):
    set_seed(0)
    peft = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"} if lora else {}
    keywords = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if lora else {}
    trainer = make_trainer(tmp_path, max_steps=1, keywords=keywords)
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    moments = [
        value for p in trained for name, value in trainer.optimizer.optimizer.state[p].items() if name != "step"
    ]
    run = make_run(trainer.model.config, trainer.args, model=ModelConfig(dtype="float32", **peft))
    weights, gradients, optimizer = memory.state_memory(run)
    assert weights.size == sum(p.nbytes for p in trainer.model.parameters())
    assert gradients.size == sum(p.nbytes for p in trained)
    assert optimizer.size == sum(value.nbytes for value in moments)


def test_keys_and_values_are_those_of_a_cache(tmp_path):
    config = model_limits.find_config(ModelConfig(model_name_or_path=BASE))
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    cache = DynamicCache(config=config)
    model(input_ids=torch.zeros(1, 7, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.kv_bytes(make_run(config, make_args(tmp_path))) * 7 == held


def test_sharding_divides_the_states_and_nothing_else():
    one, many = (make_plan(["--config", FIPO_32B], world_size=n, sharding="fsdp2") for n in (32, 128))
    one, many = (sizes(memory.update_memory(run, 80 * GIB)) for run in (one, many))
    for name in ("weights", "gradients", "optimizer states"):
        assert one[name] == 4 * many[name]
    assert one["checkpoints"] == many["checkpoints"]
    assert sum(many.values()) < sum(one.values()) < 80 * GIB


@pytest.mark.parametrize(
    ("settings", "merged"),
    [([], False), (["--use_dora", "true"], True), (["--lora_modules_to_save", "norm"], True)],
)
def test_an_adapter_that_vllm_serves_is_not_merged(settings, merged):
    """Nor is the model gathered for it, and a sleeping engine keeps its weights."""
    flags = ["--config", "recipes/tiny/fipo_vllm.yaml", "--use_peft", "true", "--lora_target_modules", "all-linear"]
    server = make_plan([*flags, "--vllm_mode", "server", *settings], world_size=2, sharding="zero3")
    run = make_plan([*flags, "--vllm_enable_sleep_mode", "true", *settings], world_size=2, sharding="zero3")
    assert run.merged_adapter is server.merged_adapter is merged
    assert ("weights gathered to merge LoRA" in sizes(memory.rollout_memory(server, 80 * GIB))) is merged
    assert ("weights gathered to merge LoRA" in sizes(memory.rollout_memory(run, 80 * GIB))) is merged
    assert ("vLLM, asleep" in sizes(memory.update_memory(run, 80 * GIB))) is not merged


def test_unsynchronized_gradients_are_counted():
    flags = ["--config", FIPO_32B, "--accelerator_config", "{}"]
    run = make_plan(flags, **ON_16_NODES)
    assert sizes(memory.update_memory(run, 80 * GIB))["gradients accumulated unsharded"] == 2 * run.parameters.total
    assert "an update: 99.2 GiB (74 to 124) of 80: may not fit" in doctor.examine(run, 80 * GIB, "32B")


def test_an_awake_engine_is_counted():
    run = make_plan(["--config", FIPO_32B, "--vllm_enable_sleep_mode", "false"], **ON_16_NODES)
    assert sizes(memory.update_memory(run, 80 * GIB))["vLLM, awake"] == 0.8 * 80 * GIB


def test_offloaded_states_leave_the_gpu():
    run = make_plan(["--config", "recipes/Qwen2.5-1.5B/fipo.yaml"], world_size=1, sharding="fsdp2", offload=True)
    assert [part.size for part in memory.state_memory(run)] == [0, 0, 0]


# Batches, the paper, cost


def test_operations_are_those_that_torch_counts(tmp_path):
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    tokens = 48
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        AutoModelForCausalLM.from_config(config)(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    run = make_run(config, make_args(tmp_path, gradient_checkpointing=True))
    one = doctor.cost(run, mean_length=tokens)
    rows = run.training.generation_batch_size
    # torch counts attention to all positions; half of them are ahead
    causal = 2 * config.num_hidden_layers * config.hidden_size * tokens * tokens
    assert one.old_log_probs / rows == pytest.approx(counter.get_total_flops() - causal, rel=0.01)
    assert one.sampling == one.old_log_probs == one.updates / 4


def test_hours():
    run = make_plan(["--config", FIPO_32B], **ON_16_NODES)
    # 600 generations of 512 prompts x 16, four times as many sampled, 10,000 tokens each, at 100,000 tokens/s
    assert "546.1 hours for the run, at 100,000 tokens/s" in doctor.examine(run, 80 * GIB, "32B", 10_000, 100_000)
    with pytest.raises(ValueError, match="mean_length=20481 is more than max_completion_length=20480"):
        doctor.examine(run, 80 * GIB, "32B", 20_481)


def test_differences_name_setting_paper_and_ours():
    flags = ["--learning_rate", "2e-6", "--reward_weights", "1.0", "0.5", "0.0", "--warmup_steps", "10"]
    run = make_plan(["--config", FIPO_32B, *flags], **ON_16_NODES)
    assert paper.differences(run, "32B") == [
        (
            "rewards",
            {"dapo_reward": 1.0, "overlong_penalty": 1.0},
            {"dapo_reward": 1.0, "overlong_penalty": 0.5},
        ),
        ("learning_rate", 1e-6, 2e-6),
        ("warm-up, generations", 10, 1.25),
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "FIPO acts in 7 of 8 updates"),
        (["--trainer", "dapo"], "trainer=dapo is the control arm"),
        (["--trainer", "recipes.calibrated.controls.OracleTrainer"], "OracleTrainer reads the settings of FIPO. What"),
        (["--influence_weight_max", "1.0"], "both bounds of the influence weight are 1"),
    ],
)
def test_whether_fipo_acts(flags, sentence):
    assert sentence in doctor.acts(make_plan(["--config", "recipes/tiny/fipo.yaml", *flags], world_size=1))


# Refusals


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--reward_weights", "1.0", "1.0"], "2 values for the 3 reward_funcs"),
        (["--vllm_tensor_parallel_size", "16"], "does not divide num_attention_heads=40"),
        (["--vllm_tensor_parallel_size", "5"], "does not divide the 128 processes"),
        (["--vllm_tensor_parallel_size", "5"], "num_key_value_heads=8: one must divide the other"),
        (["--vllm_max_model_length", "22527"], "Set 22528"),
        (["--max_completion_length", "131072", "--vllm_max_model_length", "133120"], "does not hold 133120 tokens"),
        (["--max_completion_length", "131072", "--use_vllm", "false"], "does not hold 133120 tokens"),
        (["--use_peft", "true", "--load_in_4bit", "true"], "use_vllm=True with a base in 4 or 8 bits"),
    ],
)
def test_impossible_settings(flags, reason):
    run = make_plan(["--config", FIPO_32B, *flags], **ON_16_NODES)
    reasons = model_limits.impossible(run.recipe, run.config, run.world_size)
    assert any(reason in found for found in reasons)


def test_possible_settings():
    run = make_plan(["--config", FIPO_32B], **ON_16_NODES)
    assert model_limits.impossible(run.recipe, run.config, run.world_size) == []
    assert memory.memory_problems(run, 80 * GIB) == []


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--vllm_tensor_parallel_size", "3"], "Verdict: it cannot work:\n  vllm_tensor_parallel_size=3"),
        (["--world_size", "0"], "--world_size 0 must be greater than 0"),
        (["--num_generations", "24"], "divisible by num_generations (24)"),
        (["--lerning_rate", "1"], "learning_rate"),
        (["--overlong_buffer", "0"], "overlong buffer=0"),
        (["--model_name_or_path", "no/such-model"], "cannot read the config of 'no/such-model'"),
        (["--accelerate_config", "recipes/none.yaml"], "recipes/none.yaml"),
    ],
)
def test_exit_status_of_what_cannot_work(flags, reason, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spread = ["--accelerate_config", "recipes/accelerate/16_nodes_fsdp2.yaml"]
    with pytest.raises(SystemExit) as exit:
        main(["--config", FIPO_32B, *spread, *flags])
    assert exit.value.code not in (None, 0)
    assert reason in capsys.readouterr().out + str(exit.value.code)


@pytest.mark.parametrize(
    ("flags", "doubt"),
    [
        (["--gpu_memory_gib", "24"], "  An update needs about 38 GiB of a GPU with 24"),
        (["--vllm_tensor_parallel_size", "1"], "  vLLM's cache would hold"),
        (["--world_size", "8", "--per_device_train_batch_size", "4"], "  An update needs"),
    ],
)
def test_memory_informs_and_does_not_decide(flags, doubt, capsys):
    """It is an estimate that no GPU has confirmed."""
    with pytest.raises(SystemExit) as exit:
        main(["--config", FIPO_32B, "--accelerate_config", "16_nodes_fsdp2", *flags])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"Verdict: it can work, but hardly fits:\n{doubt}")


def test_hours_without_a_measured_speed_are_an_assumption():
    plan = make_plan(["--config", FIPO_32B], **ON_16_NODES)
    cost = doctor.cost(plan, 10_000)
    text = doctor.examine(plan, 80 * GIB, "32B", 10_000)
    minutes, hours = re.search(r"([\d.,]+) minutes, ([\d.,]+) hours for the run, if 128 x H100", text).groups()
    seconds = (cost.old_log_probs + cost.updates) / 0.3 + cost.sampling / 0.05
    seconds /= 128 * 989e12
    assert float(minutes.replace(",", "")) == pytest.approx(seconds / 60, rel=0.01)
    assert float(hours.replace(",", "")) == pytest.approx(600 * seconds / 3600, rel=0.01)
    assert "an assumption" in text


def test_exit_status_of_what_can_work(monkeypatch, capsys):
    spread = ["--accelerate_config", "recipes/accelerate/16_nodes_fsdp2.yaml"]
    with pytest.raises(SystemExit) as exit:
        main(["--config", FIPO_32B, *spread])
    assert exit.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("Verdict: it can work.\n")
    assert "128 processes x 1 x 64 micro-steps" in output


def test_training_starts_with_the_checks(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    config = (tmp_path / "base/config.json").read_text()
    assert '"max_position_embeddings": 256' in config
    (tmp_path / "base/config.json").write_text(
        config.replace('"max_position_embeddings": 256', '"max_position_embeddings": 100')
    )
    recipe = read_and_validate(["--config", "recipes/tiny/fipo.yaml", "--model_name_or_path", str(tmp_path / "base")])
    with pytest.raises(ValueError, match=r"max_position_embeddings=100 .* does not hold 128 tokens"):
        trainer_arguments(recipe)
