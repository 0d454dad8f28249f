"""Every recipe is parsed as users start it, fits the machines that it names, and is what the paper trained with."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from tiny import distance
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForCausalLM

from fipo_trl.data.sources import load_splits
from fipo_trl.planning import doctor, paper, plan
from fipo_trl.planning import memory as gpu_memory
from fipo_trl.planning.memory import GIB
from fipo_trl.planning.plan import make_plan
from fipo_trl.recipe import model_limits
from fipo_trl.rewards.reasoning_gym import reasoning_gym_accuracy
from fipo_trl.trainer.manifest import faults


FOLDER = ROOT / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*/*.yaml") if path.parent.name != "accelerate")
ACCELERATE_CONFIGS = sorted((FOLDER / "accelerate").glob("*.yaml"))
LAUNCHERS = sorted((FOLDER / "slurm").glob("*.sbatch"))
PAIRS = sorted(path for path in RECIPES if (path.parent / path.name.replace("fipo", "dapo")).is_file())
PAIRS = [path for path in PAIRS if path.name.startswith("fipo")]
OF_THE_PAPER = [
    FOLDER / size / f"{method}.yaml" for size in ("Qwen2.5-32B", "Qwen2.5-Math-7B") for method in ("dapo", "fipo")
]


def name_of(path):
    return f"{path.parent.name}/{path.name}"


def header_of(path):
    text = path.read_text()
    return text[: text.index("\n\n")]


def numbers(pattern, text):
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text!r}"
    return [int(number.replace(",", "")) for number in found.groups()]


def model_flags(path, tmp_path):
    """The model that the recipe's first lines tell to make, if they do: without its weights."""
    edit = re.search(r"^#   (sed -i .*) (models/\S+)/config.json$", header_of(path), re.MULTILINE)
    if not edit:
        return []
    model_limits.public_config(edit[2]).save_pretrained(tmp_path)
    subprocess.run(f"{edit[1]} {tmp_path}/config.json", shell=True, check=True)
    return ["--model_name_or_path", str(tmp_path)]


def accelerate_config_of(text):
    """The file that a launch line names, if it does."""
    found = re.search(r"--config_file (\S+)", text)
    named = re.search(r"--accelerate_config (\w+)", text)
    return found[1] if found else f"recipes/accelerate/{named[1]}.yaml" if named else None


def examine_recipe(path, flags=()):
    """The recipe on the machines that its first lines name."""
    header = header_of(path)
    (processes,) = numbers(r"# (\d+) process", header)
    config = accelerate_config_of(header)
    spread = plan.read_accelerate_config(config) if config else {"world_size": 1}
    given = re.search(r"--num_processes (\d+)", header)
    assert processes == (int(given[1]) if given else spread["world_size"])
    return make_plan(["--config", str(path), *flags], **spread | {"world_size": processes})


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe(path, tmp_path):
    header = header_of(path)
    assert re.search(
        rf"(fipo-trl train|fipo_trl.commands.train) --config {path.relative_to(ROOT)}( --acc\w+ \w+)?\n", header
    )
    run = examine_recipe(path, model_flags(path, tmp_path))
    args = run.training
    # The arithmetic of the header is that of the values
    processes, per_device, steps, sequences, prompts, generations = numbers(
        r"# (\d+) process\w* x (\d+) per device x (\d+) micro-steps = (\d+) completions \((\d+) prompts x (\d+)\)",
        header,
    )
    assert (per_device, steps, generations) == (
        args.per_device_train_batch_size,
        args.steps_per_generation,
        args.num_generations,
    )
    assert processes * per_device * steps == sequences == prompts * generations == args.generation_batch_size
    per_update, updates = numbers(r"# (\d+) completions per update, (\d+) updates per", header)
    assert per_update == processes * per_device * args.gradient_accumulation_steps
    assert per_update % generations == 0
    assert updates == args.updates_per_generation
    rollouts, total = numbers(r", (\d+) generations = (\d+) updates", header)
    assert rollouts * updates == total == args.max_steps
    # Checkpoints and the end of the warm-up fall between two generations
    assert args.save_steps % updates == args.warmup_steps % updates == 0
    # It can work on the GPUs that the header names
    memory = re.search(r"GPUs? of (\d+) GB", header)
    assert bool(memory) != yaml.safe_load(path.read_text()).get("use_cpu", False)
    if memory:
        assert gpu_memory.memory_problems(run, int(memory[1]) * GIB) == []
        assert "may not fit" not in doctor.examine(run, int(memory[1]) * GIB, "32B")
    assert model_limits.impossible(run.recipe, run.config, run.world_size) == []
    if run.sharding == "fsdp2" and args.gradient_accumulation_steps > 1:
        assert gpu_memory.synchronizes_each_batch(args)


# What the paper trained with


ON_ONE_NODE = [FOLDER / "Qwen2.5-Math-7B" / f"{method}_one_node.yaml" for method in ("dapo", "fipo")]


@pytest.mark.parametrize("path", OF_THE_PAPER + ON_ONE_NODE, ids=name_of)
def test_nothing_differs_from_the_paper(path, tmp_path):
    run = examine_recipe(path, model_flags(path, tmp_path))
    assert run.method == path.stem[:4].upper()
    assert paper.differences(run, "7B" if "7B" in path.parent.name else "32B") == []


# Tables 2 and 3 of the paper and its scripts, once more, as they write the settings
TABLE = """
                            32B-DAPO  32B-FIPO  7B-DAPO  7B-FIPO
train_batch_size                 512       512      512      512
rollout.n                         16        16       16       32
ppo_mini_batch_size               32        64       32       64
gen_batch_size                  1536      2048        -        -
max_num_gen_batches               10        10        -        -
max_prompt_length               2048      2048     2048     2048
max_response_length            20480     20480     8192    10240
overlong_buffer.len             4096      4096     4096     2048
overlong_buffer.penalty_factor   1.0       1.0      1.0      1.0
lr                              1e-6      1e-6     1e-6     1e-6
lr_warmup_steps                   10        10       10       10
weight_decay                     0.1       0.1      0.1      0.1
grad_clip                        1.0       1.0      1.0      1.0
kl_loss_coef                     0.0       0.0      0.0      0.0
clip_ratio_low                   0.2       0.2      0.2      0.2
clip_ratio_high                 0.28      0.28     0.28     0.28
clip_ratio_c                    10.0      10.0     10.0     10.0
temperature                      1.0       1.0      1.0      1.0
top_p                            1.0       1.0      1.0      1.0
decay_rate                         -      32.0        -     32.0
future_kl_low                      -       1.0        -      0.8
future_kl_high                     -       1.2        -      1.2
safety_thresh                      -      10.0        -      3.0
gen_tp                             4         4        4        4
gpu_memory_utilization          0.80      0.80     0.80     0.80
test_freq                          5         5        5        5
""".strip().splitlines()


@pytest.mark.parametrize(("column", "path"), enumerate(OF_THE_PAPER), ids=[name_of(path) for path in OF_THE_PAPER])
def test_values_in_the_file_are_those_of_the_table(column, path):
    """From the YAML text, without the doctor."""
    paper = {row.split()[0]: row.split()[1 + column] for row in TABLE[1:]}
    paper = {name: None if value == "-" else float(value) for name, value in paper.items()}
    recipe = yaml.safe_load(path.read_text())
    (processes,) = numbers(r"# (\d+) process", header_of(path))
    rows = processes * recipe["per_device_train_batch_size"]
    updates = recipe["steps_per_generation"] // recipe["gradient_accumulation_steps"]
    ours = {
        "train_batch_size": rows * recipe["steps_per_generation"] / recipe["num_generations"],
        "rollout.n": recipe["num_generations"],
        "ppo_mini_batch_size": rows * recipe["gradient_accumulation_steps"] / recipe["num_generations"],
        "max_num_gen_batches": recipe.get("dynamic_sampling_max_rounds"),
        "max_prompt_length": recipe["max_prompt_length"],
        "max_response_length": recipe["max_completion_length"],
        "overlong_buffer.len": recipe["overlong_buffer"],
        "overlong_buffer.penalty_factor": recipe["reward_weights"][recipe["reward_funcs"].index("overlong_penalty")],
        "lr": recipe["learning_rate"],
        "lr_warmup_steps": recipe["warmup_steps"] / updates,
        "weight_decay": recipe["weight_decay"],
        "grad_clip": recipe["max_grad_norm"],
        "kl_loss_coef": recipe["beta"],
        "clip_ratio_low": recipe["epsilon"],
        "clip_ratio_high": recipe["epsilon_high"],
        "clip_ratio_c": recipe["delta"],
        "temperature": recipe["temperature"],
        "top_p": recipe["top_p"],
        "decay_rate": recipe.get("future_kl_half_life"),
        "future_kl_low": recipe.get("influence_weight_min"),
        "future_kl_high": recipe.get("influence_weight_max"),
        "safety_thresh": recipe.get("influence_safety_ratio"),
        "gen_tp": recipe["vllm_tensor_parallel_size"],
        "gpu_memory_utilization": recipe["vllm_gpu_memory_utilization"],
        "test_freq": recipe["save_steps"] / updates,
    }
    oversampling = recipe.get("dynamic_sampling_oversample")
    ours["gen_batch_size"] = None if oversampling is None else oversampling * ours["train_batch_size"]
    assert ours == paper
    assert recipe["vllm_enable_sleep_mode"]
    assert recipe["vllm_max_model_length"] == recipe["max_prompt_length"] + recipe["max_completion_length"]


METHOD = {"trainer", "output_dir"}
METHOD |= {"future_kl_half_life", "influence_weight_min", "influence_weight_max", "influence_safety_ratio"}
BATCH = {"gradient_accumulation_steps", "max_steps", "warmup_steps", "save_steps", "eval_steps"}  # 16 updates, not 8
LENGTH = {
    "num_generations",
    "steps_per_generation",
    "max_completion_length",
    "vllm_max_model_length",
    "overlong_buffer",
}
ARMS_DIFFER_IN = {
    "Qwen2.5-32B/fipo.yaml": METHOD | BATCH | {"dynamic_sampling_oversample"},
    "Qwen2.5-Math-7B/fipo.yaml": METHOD | BATCH | LENGTH,
    "Qwen2.5-32B/fipo_lora.yaml": METHOD,
    "Qwen2.5-Math-7B/fipo_one_node.yaml": METHOD | BATCH | LENGTH,
    "Qwen2.5-7B/fipo_lora.yaml": METHOD,
    "Qwen2.5-7B/fipo_lora_one_node.yaml": METHOD,
    "Qwen2.5-1.5B/fipo.yaml": METHOD,
    "Qwen2.5-Coder-1.5B/fipo.yaml": METHOD,
    "Qwen3-1.7B/fipo.yaml": METHOD,
    "Qwen3-4B/fipo.yaml": METHOD,
    "SmolLM2-135M/fipo_lora.yaml": METHOD,
}


@pytest.mark.parametrize("path", PAIRS, ids=name_of)
def test_arms_differ_only_where_the_paper_does(path):
    fipo = yaml.safe_load(path.read_text())
    dapo = yaml.safe_load((path.parent / path.name.replace("fipo", "dapo")).read_text())
    assert {key for key in fipo.keys() | dapo.keys() if fipo.get(key) != dapo.get(key)} == ARMS_DIFFER_IN[
        name_of(path)
    ]


def test_the_control_with_8_updates_differs_in_the_method_only():
    folder = FOLDER / "Qwen2.5-32B"
    fipo, dapo = (yaml.safe_load((folder / name).read_text()) for name in ("fipo.yaml", "dapo_8_updates.yaml"))
    assert {key for key in fipo.keys() | dapo.keys() if fipo.get(key) != dapo.get(key)} == METHOD


def test_every_pair_is_compared():
    assert {name_of(path) for path in PAIRS} == ARMS_DIFFER_IN.keys()


def test_lora_recipe_differs_only_in_lora():
    tiny = FOLDER / "tiny"
    full = yaml.safe_load((tiny / "fipo.yaml").read_text())
    lora = yaml.safe_load((tiny / "fipo_lora.yaml").read_text())
    differing = {key for key in full.keys() | lora.keys() if full.get(key) != lora.get(key)}
    lora_keys = {"use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
    assert differing == {*lora_keys, "output_dir", "learning_rate"}


# The table of recipes/README.md


def table_rows():
    rows = re.findall(r"^\| \[([^\]]+\.yaml)\]\(\1\) (.*)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in rest.strip("| ").split("|")] for name, rest in rows}


FIRST_TABLE = [
    [*(cell.strip() for cell in cells.split("|")), name]
    for cells, name in re.findall(
        r"(?m)^\| (.*) \| \[(.*\.yaml)\]\(recipes/\2\) \|$", (ROOT / "README.md").read_text()
    )
    if " GB " in cells
]


def test_every_recipe_is_in_the_table():
    assert {name_of(path) for path in RECIPES} <= table_rows().keys()


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name != "tiny"], ids=name_of)
def test_arithmetic_of_the_table(path, tmp_path):
    _, hardware, batch, memory, command, *_ = table_rows()[name_of(path)]
    run = examine_recipe(path, model_flags(path, tmp_path))
    args = run.training
    assert numbers(r"([\d,]+) x (\d+); (\d+) updates of ([\d,]+); (\d+) generations", batch) == [
        args.generation_batch_size / args.num_generations,
        args.num_generations,
        args.updates_per_generation,
        args.generation_batch_size / args.updates_per_generation,
        run.generations,
    ]
    assert str(path.relative_to(ROOT)) in command
    if args.use_cpu and "CPU" in hardware:
        return
    gpus, gib = numbers(r"(\d+) x (\d+) GB", hardware)
    assert gpus == run.world_size
    estimates = [gpu_memory.update_memory(run, gib * GIB), gpu_memory.rollout_memory(run, gib * GIB)]
    assert numbers(r"(\d+), (\d+)", memory) == [round(sum(part.size for part in parts) / GIB) for parts in estimates]
    header = header_of(path)
    if "sbatch" in command:
        launcher, nodes = re.search(r"sbatch --nodes (\d+) (\S+)", command).group(2, 1)
        assert Path(launcher).is_file()
        assert int(nodes) * 8 == run.world_size
    else:
        assert accelerate_config_of(command) == accelerate_config_of(header)


@pytest.mark.parametrize("row", FIRST_TABLE, ids=lambda row: row[-1])
def test_table_of_the_first_page(row, tmp_path):
    """Memory is that of the index. Hours are the doctor's for 4,000 tokens, where it knows the GPU."""
    *_, hardware, memory, hours, name = row
    path = FOLDER / name
    _, in_index, _, memory_in_index, *_ = table_rows()[name]
    assert (hardware, memory) == (in_index, memory_in_index)
    if hours != "-":
        run = examine_recipe(path, model_flags(path, tmp_path))
        text = doctor.examine(run, 80 * GIB, "32B", mean_length=4000)
        assert round(float(re.search(r"([\d.]+) hours for the run", text)[1])) == int(hours)


# How runs are spread


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.name)
def test_accelerate_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == int(yaml.safe_load(path.read_text())["num_processes"])


ENGINES = {  # the engine, and what each of two processes, or a single one, holds of the weights
    "one_gpu": ("NO", 1, 1.0),
    "one_gpu_offload": ("FSDP", 1, 1.0),
    "one_node_fsdp2": ("FSDP", 2, 0.5),
    "one_node_zero3": ("DEEPSPEED", 2, 0.5),
    "16_nodes_fsdp2": ("FSDP", 2, 0.5),
    "two_cpu_processes": ("MULTI_CPU", 2, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_trains(ranks, path, tmp_path):
    """With its own engine and precision; of one machine, two processes and CPUs. It leaves a model to load."""
    engine, processes, share = ENGINES[path.stem]
    arguments = ["--config", "recipes/tiny/fipo.yaml", "--max_steps", "2", "--steps_per_generation", "2"]
    arguments += ["--per_device_train_batch_size", "8", "--save_steps", "2", "--output_dir", str(tmp_path / "run")]
    if yaml.safe_load(path.read_text())["mixed_precision"] == "bf16":
        arguments += ["--bf16", "true"]  # as for the recipes for GPUs
    launch = ("--config_file", str(path))
    for rank in ranks.run("train_on_ranks:command", arguments, launch=launch, processes=processes):
        assert rank["status"] == 0
        assert rank["held"]["engine"] == engine
        assert rank["held"]["DTensor"] is (engine == "FSDP")
        assert rank["held"]["weights"] == pytest.approx(share, abs=0.01)
    trained, base = (AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "run", "recipes/tiny/base"))
    assert trained.dtype == (torch.bfloat16 if engine == "DEEPSPEED" else torch.float32)
    assert distance(dict(trained.named_parameters()), dict(base.named_parameters())) > 0
    assert faults(tmp_path / "run" / "checkpoint-2") == {}


@pytest.mark.parametrize(
    ("name", "processes", "offload"),
    [("one_node_fsdp2", 8, False), ("16_nodes_fsdp2", 128, False), ("one_gpu_offload", 1, True)],
)
def test_fsdp2_plugin(name, processes, offload, monkeypatch):
    """What `accelerate launch` hands to its processes makes the plugin that the file describes."""
    path = f"recipes/accelerate/{name}.yaml"
    # Port 0: whether the file's own is free on this machine is not asked
    words = ["--config_file", path, "--main_process_port", "0", "train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) is offload
    assert not plugin.activation_checkpointing
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    read = plan.read_accelerate_config(path)
    assert read == {"world_size": processes, "sharding": "fsdp2", "offload": offload, "checkpointing": False}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launcher(path, tmp_path):
    """The script itself, with stand-ins for Slurm's commands that say what they were called with."""
    stubs = {
        "scontrol": "printf 'node1\\nnode2\\nnode3\\n'",
        "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 SLURM_PROCID=1 SLURM_NNODES=3 "$@"',
        "accelerate": 'printf "accelerate"; printf " [%s]" "$@"; echo',
        "python": 'echo "VLLM_SERVER_DEV_MODE=1 vllm serve"',
        "vllm": 'echo "vllm $VLLM_SERVER_DEV_MODE $*"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    recipe = "recipes/Qwen2.5-32B/fipo.yaml"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_NUM_NODES": "3"}
    command = ["bash", str(path), recipe, "--output_dir", "a b"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    server = path.stem == "server"
    nodes = 2 if server else 3
    assert f"[--num_machines] [{nodes}] [--num_processes] [{8 * nodes}] [--machine_rank] [1]" in output
    assert "[--main_process_ip] [node1]" in output
    assert f"[--module] [fipo_trl.commands.train] [--config] [{recipe}] [--output_dir] [a b]" in output
    assert ("[--vllm_mode] [server] [--vllm_server_base_url] [http://node3:8000]" in output) is server
    without_recipe = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True)
    assert without_recipe.returncode != 0
    assert "usage: sbatch --nodes N" in without_recipe.stderr


# Beyond math


@pytest.mark.parametrize("path", sorted((FOLDER / "reasoning-gym").glob("*.yaml")), ids=name_of)
def test_tasks_can_be_made_as_the_recipe_says(path):
    """Of fewer problems than there, and with prompts that its limits hold: a token has at least two characters."""
    recipe = yaml.safe_load(path.read_text())
    settings = recipe["dataset_settings"] | {"size": 100, "test_size": 10}
    splits = load_splits(recipe["dataset_name"], task_settings=settings)
    texts = [prompt[0]["content"] for split in splits.values() for prompt in split["prompt"]]
    assert max(map(len, texts)) < 2 * recipe["max_prompt_length"]
    assert recipe["vllm_max_model_length"] == recipe["max_prompt_length"] + recipe["max_completion_length"]
    assert recipe["eval_problems"] == [recipe["dataset_name"]]
    rows = splits["train"].to_dict()
    rewards = reasoning_gym_accuracy([f"<answer>{answer}</answer>" for answer in rows["solution"]], rows["problem"])
    assert set(rewards) == {1.0}


def test_doctor_knows_wrong_settings_of_a_task():
    flags = ["--dataset_settings", '{"people": 3}']
    with pytest.raises(ValueError, match="has no setting 'people'"):
        examine_recipe(FOLDER / "reasoning-gym" / "knights_knaves.yaml", flags)
