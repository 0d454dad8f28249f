"""What a model's config says before its weights are loaded, and which recipes it rules out."""

import os

from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from trl import ModelConfig

from fipo_trl.recipe.validate import Recipe
from fipo_trl.trainer.engine import QUANTIZED_BASE


# Public models, from the config.json of each, so that none must be downloaded to be asked about
SHAPE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)
MODELS = {
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 24, 14, 2, 151936, 32768, True),
    "Qwen2.5-1.5B": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936, 131072, True),
    "Qwen2.5-1.5B-Instruct": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936, 32768, True),
    "Qwen2.5-Coder-1.5B-Instruct": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936, 32768, True),
    "Qwen2.5-7B": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064, 131072, False),
    "Qwen2.5-7B-Instruct": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064, 32768, False),
    "Qwen2.5-Math-7B": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064, 4096, False),
    "Qwen2.5-32B": (Qwen2Config, 5120, 27648, 64, 40, 8, 152064, 131072, False),
    "Qwen3-1.7B-Base": (Qwen3Config, 2048, 6144, 28, 16, 8, 151936, 32768, True),
    "Qwen3-4B-Base": (Qwen3Config, 2560, 9728, 36, 32, 8, 151936, 32768, True),
    "SmolLM2-135M": (LlamaConfig, 576, 1536, 30, 9, 3, 49152, 8192, True),
    "SmolLM2-135M-Instruct": (LlamaConfig, 576, 1536, 30, 9, 3, 49152, 8192, True),
}


def name_of_model(model: ModelConfig) -> str:
    """The folder of a recipe's model, or its id on the Hub; a `ValueError` if there is none."""
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: give a local folder or the id of a model on the Hub.")
    return model.model_name_or_path


def config_of(model: ModelConfig, trust_remote_code: bool = False) -> PretrainedConfig:
    """That of [`find_config`], which is not asked about the models of `MODELS`."""
    return public_config(name_of_model(model)) or find_config(model, trust_remote_code)


def public_config(name: str) -> PretrainedConfig | None:
    """The config of a model of `MODELS`, by the last part of its name; `None` for others and for local folders."""
    name_alone = os.path.basename(name.rstrip("/"))
    if name_alone not in MODELS or os.path.isdir(name):
        return None
    config_class, *shape = MODELS[name_alone]
    return config_class(**dict(zip(SHAPE, shape, strict=True)), dtype="bfloat16")


def find_config(model_args: ModelConfig, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model's language part, from its folder, from the Hub or from the cache.

    Raises:
        ValueError: if there is none.
    """
    name = model_args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path: cannot read the config of '{name}' ({str(error).splitlines()[0]}). Give a local "
            "folder (relative to the directory you start from) or the id of a model on the Hub. The doctor also knows "
            f"{', '.join(MODELS)} without a network."
        ) from error
    return config.get_text_config()


def impossible(recipe: Recipe, config: PretrainedConfig, world_size: int) -> list[str]:
    """Why training would fail or cut answers short, as far as the settings and the model's config tell.

    What the configuration refuses is not repeated. Each reason names the setting, its value and the fix.

    Args:
        config: Of the language model.
        world_size: Number of processes.
    """
    run, args, reasons = recipe.run, recipe.training, []
    names = run.reward_funcs or []
    if args.reward_weights is not None and len(args.reward_weights) != len(names):
        reasons.append(
            f"reward_weights={args.reward_weights} has {len(args.reward_weights)} values for the {len(names)} "
            f"reward_funcs {', '.join(names)}. Give one for each."
        )
    context = getattr(config, "max_position_embeddings", None)
    longest = (run.max_prompt_length or 0) + args.max_completion_length
    wanted = max(longest, (args.vllm_max_model_length or 0) if args.use_vllm else 0)
    if context is not None and wanted > context:
        reasons.append(
            f"max_position_embeddings={context} of {recipe.model.model_name_or_path} does not hold {wanted} tokens "
            f"(max_prompt_length={run.max_prompt_length}, max_completion_length={args.max_completion_length}"
            f", vllm_max_model_length={args.vllm_max_model_length}). Raise max_position_embeddings in the config.json "
            "of a local copy of the model: vLLM reads that file only. Or lower the lengths."
        )
    if not args.use_vllm:
        return reasons
    if recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        reasons.append(QUANTIZED_BASE)
    if args.vllm_max_model_length is not None and args.vllm_max_model_length < longest:
        reasons.append(
            f"vllm_max_model_length={args.vllm_max_model_length} is less than max_prompt_length="
            f"{run.max_prompt_length} + max_completion_length={args.max_completion_length}: vLLM would cut "
            f"long completions short. Set {longest}."
        )
    if args.vllm_mode == "colocate" and world_size % args.vllm_tensor_parallel_size:
        reasons.append(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} does not divide the {world_size} "
            "processes. Start a multiple of it."
        )
    tensor_parallel, heads = args.vllm_tensor_parallel_size, getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads and heads % tensor_parallel:
        reasons.append(
            f"vllm_tensor_parallel_size={tensor_parallel} does not divide num_attention_heads={heads}. Set a divisor."
        )
    elif heads and kv_heads % tensor_parallel and tensor_parallel % kv_heads:
        reasons.append(
            f"vllm_tensor_parallel_size={tensor_parallel} and num_key_value_heads={kv_heads}: one must divide the "
            "other. Set a divisor."
        )
    return reasons
