"""LoRA on a base in 4 bits (bitsandbytes, which computes on the CPU, too): trained, saved, resumed, loaded."""

import pytest
import torch
from datasets import Dataset
from four_heads import save_four_heads
from peft import LoraConfig, PeftModel
from tiny import PROMPTS, longer_is_better, make_args
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fipo_trl import FIPOTrainer
from fipo_trl.trainer.engine import check_base


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_four_heads(folder)
    return str(folder)


def load(base):
    quantization = BitsAndBytesConfig(**FOUR_BITS)
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)


def make_trainer(base, folder):
    return FIPOTrainer(
        model=base,
        reward_funcs=longer_is_better,
        args=make_args(
            folder,
            max_steps=6,
            steps_per_generation=4,
            save_strategy="steps",
            save_steps=3,  # in the middle of a generation
            learning_rate=1e-2,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        quantization_config=BitsAndBytesConfig(**FOUR_BITS),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def weights_of(model, trained):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad == trained}


def test_an_adapter_on_four_bits_is_trained_saved_resumed_and_loaded(base, tmp_path):
    trainer = make_trainer(base, tmp_path)
    assert {p.dtype for name, p in trainer.model.named_parameters() if "base_layer.weight" in name} == {torch.uint8}
    frozen, adapter = weights_of(trainer.model, trained=False), weights_of(trainer.model, trained=True)
    assert {weight.dtype for weight in adapter.values()} == {torch.bfloat16}
    trainer.train()
    trained = weights_of(trainer.model, trained=True)
    assert max((trained[name] - adapter[name]).abs().max() for name in adapter) > 1e-2
    for name, weight in weights_of(trainer.model, trained=False).items():
        assert torch.equal(weight, frozen[name])

    resumed = make_trainer(base, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in weights_of(resumed.model, trained=True).items():
        assert torch.equal(weight, trained[name])
        assert weight.dtype == trained[name].dtype

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter"))
    for weight in (weight for name, weight in loaded.named_parameters() if "lora_" in name):
        weight.data = weight.data.to(torch.bfloat16)  # as TRL trains it; PEFT loads float32
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():  # in training mode: else bitsandbytes packs the weights anew for some CPUs
        logits = [model.train()(input_ids=ids).logits for model in (loaded, trainer.model)]
    torch.testing.assert_close(*logits)
    assert not torch.allclose(logits[0], load(base).train()(input_ids=ids).logits, atol=1e-2)


def test_merging_into_four_bits_moves_the_base(base):
    """Why vLLM is refused beside it: each weight sync of TRL's merges the adapter, and takes it out again."""
    model = PeftModel(load(base), LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    before = weights_of(model, trained=False)
    model.merge_adapter()
    model.unmerge_adapter()
    after = weights_of(model, trained=False)
    moved = [
        name for name in before if before[name].dtype == torch.uint8 and not torch.equal(before[name], after[name])
    ]
    assert moved


def test_vllm_is_refused_beside_a_quantized_base(base, tmp_path):
    args = make_args(tmp_path, use_vllm=True)
    load(base).save_pretrained(tmp_path / "saved in 4 bits")
    in_kwargs = make_args(tmp_path, use_vllm=True, model_init_kwargs={"quantization_config": FOUR_BITS})
    for refused in (
        (args, base, BitsAndBytesConfig(**FOUR_BITS)),
        (args, base, BitsAndBytesConfig(load_in_8bit=True)),
        (args, load(base)),
        (args, str(tmp_path / "saved in 4 bits")),
        (in_kwargs, base),
    ):
        with pytest.raises(ValueError, match="use_vllm=True with a base in 4 or 8 bits"):
            check_base(*refused)
    check_base(args, base)
    check_base(args, AutoModelForCausalLM.from_pretrained(base))
    check_base(make_args(tmp_path), base, BitsAndBytesConfig(**FOUR_BITS))
