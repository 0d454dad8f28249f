"""Every recipe is parsed by the command that users run, and its first lines say what it needs."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from train_fipo import parse  # noqa: E402


RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script_args, args, model_args, _ = parse(["--config", str(path)])
    text = path.read_text()
    header = text[: text.index("\n\n")]
    assert f"scripts/train_fipo.py --config {path.relative_to(ROOT)}" in header
    assert model_args.model_name_or_path
    assert script_args.reward_funcs
    # The arithmetic of the header is that of the values
    processes, per_device, steps, sequences, prompts, generations = map(
        int,
        re.search(
            r"# (\d+) process\w* x (\d+) per device x (\d+) micro-steps = (\d+) completions \((\d+) prompts x (\d+)\)",
            header,
        ).groups(),
    )
    assert (per_device, steps, generations) == (
        args.per_device_train_batch_size,
        args.steps_per_generation,
        args.num_generations,
    )
    assert processes * per_device * steps == sequences == prompts * generations
    per_update, updates = map(int, re.search(r"# (\d+) completions per update, (\d+) updates per", header).groups())
    assert per_update == processes * per_device * args.gradient_accumulation_steps
    assert updates == args.updates_per_generation
    rollouts, total = map(int, re.search(r", (\d+) generations = (\d+) updates", header).groups())
    assert rollouts * updates == total == args.max_steps
    assert args.save_steps % args.updates_per_generation == 0


def test_lora_recipe_differs_only_in_lora(monkeypatch):
    tiny = ROOT / "recipes" / "tiny"
    full = yaml.safe_load((tiny / "fipo.yaml").read_text())
    lora = yaml.safe_load((tiny / "fipo_lora.yaml").read_text())
    differing = {key for key in full.keys() | lora.keys() if full.get(key) != lora.get(key)}
    lora_keys = {"use_peft", "lora_r", "lora_alpha", "lora_target_modules"}
    assert differing == {*lora_keys, "output_dir", "learning_rate"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == int(yaml.safe_load(path.read_text())["num_processes"])
