"""What a recipe will do and need, before a GPU is asked for it: batches, the paper's table, memory and cost.

No weight is loaded: models are built on torch's meta device, from their config. Parameter counts are exact. The
activations are those of a dense decoder with SwiGLU and RMSNorm (Qwen2, Llama, Mistral, Qwen3), to a few percent of
what torch's memory tracker counts (tests/test_doctor.py). What FSDP2, ZeRO-3 and vLLM hold is arithmetic from their
sources. None of it was measured on a GPU.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import SchedulerType
from trl import ModelConfig, get_peft_config
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE as TOKEN_TILE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WORD_TILE

from fipo_trl.fipo_config import FIPOConfig


GIB = 2**30
DISTINCT_PROMPTS = 17_000  # in DAPO-Math-17k, about
ERROR_BAR = 0.25  # of a memory estimate, either way: an estimate beyond the GPU by more than that cannot work
OTHER_MEMORY = 3 * GIB  # CUDA context, NCCL, fragmentation
ENGINE_MEMORY = 2 * GIB  # vLLM's activations for 4,096 tokens, and its CUDA graphs
SERVER_UTILIZATION = 0.9  # of a vLLM server, by its default

# Public models, from the config.json of each, so that none must be downloaded to be asked about
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPE += ("vocab_size", "max_position_embeddings", "tie_word_embeddings")
MODELS = {
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 24, 14, 2, 151936, 32768, True),
    "Qwen2.5-1.5B": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936, 131072, True),
    "Qwen2.5-1.5B-Instruct": (Qwen2Config, 1536, 8960, 28, 12, 2, 151936, 32768, True),
    "Qwen2.5-7B": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064, 131072, False),
    "Qwen2.5-7B-Instruct": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064, 32768, False),
    "Qwen2.5-Math-7B": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064, 4096, False),
    "Qwen2.5-32B": (Qwen2Config, 5120, 27648, 64, 40, 8, 152064, 131072, False),
    "SmolLM2-135M": (LlamaConfig, 576, 1536, 30, 9, 3, 49152, 8192, True),
    "SmolLM2-135M-Instruct": (LlamaConfig, 576, 1536, 30, 9, 3, 49152, 8192, True),
}

# The settings that the paper trained with: arXiv 2603.19835, tables 2 and 3, and its official scripts where these are
# silent. `...` stands where neither names a value
PAPER = {
    # setting: ("32B", "DAPO"), ("32B", "FIPO"), ("7B", "DAPO"), ("7B", "FIPO")
    "prompts per generation": (512, 512, 512, 512),
    "num_generations": (16, 16, 16, 32),
    "prompts per update": (32, 64, 32, 64),
    "updates per generation": (16, 8, 16, 8),
    "dynamic sampling": ("dapo_accuracy, 10 rounds", "dapo_accuracy, 10 rounds", None, None),
    "dynamic_sampling_oversample": (3.0, 4.0, ..., ...),
    "max_prompt_length": (2048, 2048, 2048, 2048),
    "max_completion_length": (20480, 20480, 8192, 10240),
    "overlong_buffer": (4096, 4096, 4096, 2048),
    "rewards": ({"dapo_reward": 1.0, "overlong_penalty": 1.0},) * 4,
    "temperature": (1.0, 1.0, 1.0, 1.0),
    "top_p": (1.0, 1.0, 1.0, 1.0),
    "vllm_importance_sampling_correction": (False, False, False, False),
    "loss_type": ("dapo", "dapo", "dapo", "dapo"),
    "epsilon": (0.2, 0.2, 0.2, 0.2),
    "epsilon_high": (0.28, 0.28, 0.28, 0.28),
    "delta": (10.0, 10.0, 10.0, 10.0),
    "beta": (0.0, 0.0, 0.0, 0.0),
    "entropy_coef": (0.0, 0.0, 0.0, 0.0),
    "future_kl_half_life": (..., 32.0, ..., 32.0),
    "influence_weight_min": (..., 1.0, ..., 0.8),
    "influence_weight_max": (..., 1.2, ..., 1.2),
    "influence_safety_ratio": (..., 10.0, ..., 3.0),
    "learning_rate": (1e-6, 1e-6, 1e-6, 1e-6),
    "lr_scheduler_type": ("constant_with_warmup",) * 4,
    "warm-up, generations": (10, 10, 10, 10),
    "weight_decay": (0.1, 0.1, 0.1, 0.1),
    "max_grad_norm": (1.0, 1.0, 1.0, 1.0),
}


def paper_settings(size: Literal["32B", "7B"], method: Literal["DAPO", "FIPO"]) -> dict:
    """One column of `PAPER`, without the settings that have no value there."""
    column = [("32B", "DAPO"), ("32B", "FIPO"), ("7B", "DAPO"), ("7B", "FIPO")].index((size, method))
    return {name: values[column] for name, values in PAPER.items() if values[column] is not ...}


class Part(NamedTuple):
    """One line of a memory estimate, for one GPU."""

    name: str
    formula: str
    size: float  # bytes


class Parameters(NamedTuple):
    """How many parameters a model has; with LoRA, its adapter included."""

    total: int
    trainable: int
    layer: int  # the largest repeated layer, the unit in which FSDP2 and ZeRO-3 gather
    embedding: int
    head: int  # 0 where it is tied to the embedding
    linear: int  # weights of linear layers, which autocast copies


@dataclass
class Run:
    """A parsed recipe and the machines that it is meant for.

    Args:
        script_args, args, model_args: What `scripts/train_fipo.py` parses, for `world_size` processes.
        config: Of the language model.
        world_size: Number of processes, each with one GPU.
        sharding: How accelerate spreads the model over the processes.
        offload: Whether FSDP2 keeps weights, gradients and optimizer states in CPU memory.
        checkpointing: Whether FSDP2 checkpoints activations itself, in place of `gradient_checkpointing`.
    """

    script_args: object
    args: FIPOConfig
    model_args: ModelConfig
    config: PretrainedConfig
    world_size: int = 1
    sharding: Literal["none", "fsdp2", "zero3"] = "none"
    offload: bool = False
    checkpointing: bool = False

    @property
    def method(self) -> Literal["FIPO", "DAPO"]:
        return "FIPO" if self.script_args.trainer == "fipo" else "DAPO"

    @property
    def colocated(self) -> bool:
        """Whether vLLM shares the GPUs of training."""
        return self.args.use_vllm and self.args.vllm_mode == "colocate"

    @property
    def engines(self) -> int:
        """Copies of vLLM that share a generation."""
        return max(1, self.world_size // self.args.vllm_tensor_parallel_size) if self.colocated else 1

    @property
    def oversampling(self) -> float:
        """Generation batches of prompts sampled per round, at least."""
        factor = self.args.dynamic_sampling_oversample
        return float(factor) if self.args.dynamic_sampling and factor != "auto" else 1.0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; prompts count where `max_prompt_length` bounds them."""
        return (self.script_args.max_prompt_length or 0) + self.args.max_completion_length

    @property
    def generations(self) -> float | None:
        """Rollout iterations of the whole run; `None` where epochs, not `max_steps`, bound it."""
        return self.args.max_steps / self.args.updates_per_generation if self.args.max_steps > 0 else None

    @cached_property
    def parameters(self) -> Parameters:
        return count_parameters(self.config, get_peft_config(self.model_args))

    @property
    def weight_bytes(self) -> float:
        """Bytes per parameter as the model is loaded."""
        if self.model_args.load_in_4bit:
            return 0.56  # 4 bits and a scale per block of 64
        if self.model_args.load_in_8bit:
            return 1
        dtype = self.model_args.dtype
        dtype = self.config.dtype if dtype == "auto" else getattr(torch, dtype or "float32")
        return (dtype or torch.float32).itemsize


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


def read_accelerate_config(path: str) -> dict:
    """`world_size`, `sharding`, `offload` and `checkpointing` of a YAML file of `accelerate config`."""
    with open(path) as file:
        config = yaml.safe_load(file)
    fsdp, deepspeed = config.get("fsdp_config") or {}, config.get("deepspeed_config") or {}
    kind = config.get("distributed_type")
    if kind == "FSDP" and fsdp.get("fsdp_version") != 2:
        raise ValueError(f"{path}: fsdp_version must be 2, got {fsdp.get('fsdp_version')}.")
    if kind == "DEEPSPEED" and deepspeed.get("zero_stage") != 3:
        raise ValueError(f"{path}: of DeepSpeed only zero_stage 3 is known here, got {deepspeed.get('zero_stage')}.")
    return {
        "world_size": config["num_processes"],
        "sharding": {"FSDP": "fsdp2", "DEEPSPEED": "zero3"}.get(kind, "none"),
        "offload": bool(fsdp.get("fsdp_offload_params", False)),
        "checkpointing": bool(fsdp.get("fsdp_activation_checkpointing", False)),
    }


def count_parameters(config: PretrainedConfig, peft_config=None) -> Parameters:
    """Build the model (with its adapter) on the meta device, and count."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        names = set(model._no_split_modules or [])
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return Parameters(
        total=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layer=max(
            (sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names), default=0
        ),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        linear=sum(m.weight.numel() for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D))),
    )


def impossible(
    script_args, args: FIPOConfig, model_args: ModelConfig, config: PretrainedConfig, world_size: int
) -> list[str]:
    """Why training would fail or cut answers short, as far as the settings and the model's config tell.

    What `FIPOConfig` refuses is not repeated. Each reason names the setting, its value and the fix.
    """
    reasons = []
    names = script_args.reward_funcs or []
    if args.reward_weights is not None and len(args.reward_weights) != len(names):
        reasons.append(
            f"reward_weights={args.reward_weights} has {len(args.reward_weights)} values for the {len(names)} "
            f"reward_funcs {', '.join(names)}. Give one for each."
        )
    context = getattr(config, "max_position_embeddings", None)
    longest = (script_args.max_prompt_length or 0) + args.max_completion_length
    wanted = max(longest, (args.vllm_max_model_length or 0) if args.use_vllm else 0)
    if context is not None and wanted > context:
        reasons.append(
            f"max_position_embeddings={context} of {model_args.model_name_or_path} does not hold {wanted} tokens "
            f"(max_prompt_length={script_args.max_prompt_length}, max_completion_length={args.max_completion_length}"
            f", vllm_max_model_length={args.vllm_max_model_length}). Raise max_position_embeddings in the config.json "
            "of a local copy of the model: vLLM reads that file only. Or lower the lengths."
        )
    if not args.use_vllm:
        return reasons
    if args.vllm_max_model_length is not None and args.vllm_max_model_length < longest:
        reasons.append(
            f"vllm_max_model_length={args.vllm_max_model_length} is less than max_prompt_length="
            f"{script_args.max_prompt_length} + max_completion_length={args.max_completion_length}: vLLM would cut "
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


def refuse_impossible(script_args, args: FIPOConfig, model_args: ModelConfig):
    """Raise for what would fail once the model is loaded, or cut answers short; see `impossible`.

    Raises:
        ValueError: with all reasons.
    """
    config = find_config(model_args, args.trust_remote_code)
    if reasons := impossible(script_args, args, model_args, config, args.world_size):
        raise ValueError("\n".join(reasons))


def settings(run: Run) -> dict:
    """The run's values under the names of `PAPER`."""
    args, script_args = run.args, run.script_args
    prompts = args.generation_batch_size / args.num_generations
    values = {name: getattr(args, name) for name in PAPER if hasattr(args, name)}
    sampling = None
    if args.dynamic_sampling:
        reward = args.dynamic_sampling_reward or (script_args.reward_funcs or [None])[0]
        sampling = f"{reward}, {args.dynamic_sampling_max_rounds} rounds"
    names = script_args.reward_funcs or []
    weights = dict(zip(names, args.reward_weights or [1.0] * len(names), strict=False))
    return values | {
        "prompts per generation": prompts,
        "prompts per update": prompts * args.num_iterations / args.updates_per_generation,
        "updates per generation": args.updates_per_generation,
        "dynamic sampling": sampling,
        "max_prompt_length": script_args.max_prompt_length,
        "overlong_buffer": script_args.overlong_buffer,
        "rewards": {name: weight for name, weight in weights.items() if weight},
        "lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value,
        "warm-up, generations": args.warmup_steps / args.updates_per_generation,
    }


def differences(run: Run, size: Literal["32B", "7B"]) -> list[tuple[str, object, object]]:
    """Where the run departs from the paper's column for its method: (setting, paper's value, ours)."""
    ours = settings(run)
    return [
        (name, value, ours[name]) for name, value in paper_settings(size, run.method).items() if ours[name] != value
    ]


def update_memory(run: Run, gpu: float) -> list[Part]:
    """What one GPU holds at the peak of an update whose micro-batch is `per_device_train_batch_size` longest rows.

    Args:
        gpu: Memory of one GPU, in bytes.
    """
    args, config, count, states = run.args, run.config, run.parameters, state_memory(run)
    hidden, intermediate, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens = args.per_device_train_batch_size * run.longest
    kv = kv_width(config)
    mixed = run.sharding == "none" and run.weight_bytes == 4 and args.bf16  # float32 weights under autocast
    stream = 4 if run.sharding == "none" and run.weight_bytes == 4 else 2  # bytes per value between layers
    parts = list(states)
    if run.sharding != "none":
        parts.append(
            Part(
                "gathered weights",
                "(2 layers + embedding + head) x 2 B",
                2 * (2 * count.layer + count.embedding + count.head),
            )
        )
        if not run.model_args.use_peft:
            unshared = 2 * count.layer + (count.head or count.embedding)
            parts.append(Part("gradients before they are shared", "(2 layers + head) x 2 B", 2 * unshared))
        if run.sharding == "fsdp2" and args.gradient_accumulation_steps > 1 and not synchronizes_each_batch(args):
            size = 2 * count.trainable
            parts.append(
                Part("gradients accumulated unsharded", f"{count.trainable:,} x 2 B, see sync_each_batch", size)
            )
    elif run.world_size > 1:
        parts.append(states[1]._replace(name="gradients in DDP's buckets"))
    copies = Part("bf16 copies of the weights", f"{count.linear:,} x 2 B", 2 * count.linear if mixed else 0)
    if run.checkpointing or args.gradient_checkpointing:
        formula = f"{layers} layers x {tokens:,} tokens x {hidden} x {stream} B"
        parts.append(Part("checkpoints", formula, layers * tokens * hidden * stream))
        across, inside = (36, 12) if mixed else (24, 12)
    else:
        saved = 30 if mixed else 20
        formula = f"{layers} layers x {tokens:,} tokens x ({saved} hidden + 8 intermediate + 4 kv) B"
        parts.append(Part("activations", formula, layers * tokens * (saved * hidden + 8 * intermediate + 4 * kv)))
        parts += [copies] if mixed else []  # the backward pass multiplies by them
        across, inside = (32, 0) if mixed else (28, 0)
    layer = Part(
        "a layer, backward",
        f"{tokens:,} tokens x ({across} hidden + {inside} intermediate + 4 kv) B",
        tokens * (across * hidden + inside * intermediate + 4 * kv),
    )
    head = Part(
        "the head, backward",
        f"tile {min(tokens, TOKEN_TILE):,} x {WORD_TILE:,} x 2 B + {tokens:,} x hidden x 6 B"
        + ("" if run.model_args.use_peft else " + vocabulary x hidden x 4 B"),
        head_memory(run, tokens),
    )
    parts.append(max(layer, head, copies, key=lambda part: part.size))  # not at the same time
    rows = args.generation_batch_size / run.world_size
    parts.append(Part("completions in use", f"{rows:g} rows x {run.longest:,} tokens x 32 B", rows * run.longest * 32))
    if run.colocated and not args.vllm_enable_sleep_mode:
        parts.append(Part("vLLM, awake", f"{args.vllm_gpu_memory_utilization:g} of the GPU", engine_memory(run, gpu)))
    parts.append(Part("other", "CUDA context, NCCL, fragmentation", OTHER_MEMORY))
    return parts


def state_memory(run: Run) -> list[Part]:
    """Weights, gradients and optimizer states of one GPU."""
    count = run.parameters
    shards = run.world_size if run.sharding != "none" else 1
    # Trained weights: accelerate casts them to float32 for FSDP2, PEFT those of adapters; ZeRO-3 keeps bf16 copies too
    weight = 4 if run.sharding == "fsdp2" or run.model_args.use_peft else run.weight_bytes
    gradient = 2 if run.sharding == "zero3" else weight
    weight = 6 if run.sharding == "zero3" else weight
    adam = 2 if "8bit" in str(run.args.optim) else min(8, 2 * weight)
    over = f" / {shards}" if shards > 1 else ""
    frozen = count.total - count.trainable
    frozen_formula = f" + {frozen:,} frozen x {run.weight_bytes:g} B" if frozen else ""
    parts = [
        Part(
            "weights",
            f"({count.trainable:,} x {weight:g} B{frozen_formula}){over}",
            (count.trainable * weight + frozen * run.weight_bytes) / shards,
        ),
        Part("gradients", f"{count.trainable:,} x {gradient:g} B{over}", count.trainable * gradient / shards),
        Part("optimizer states", f"{count.trainable:,} x {adam:g} B{over}", count.trainable * adam / shards),
    ]
    if run.offload:
        parts = [Part(part.name, f"{part.size / GIB:.1f} GiB in CPU memory", 0.0) for part in parts]
    return parts


def head_memory(run: Run, tokens: int) -> float:
    """Bytes of TRL's fused output head: logits exist in tiles only, but its gradients whole, in float32."""
    hidden = run.config.hidden_size
    weight_gradient = 0 if run.model_args.use_peft else 4 * run.config.vocab_size * hidden
    return min(tokens, TOKEN_TILE) * WORD_TILE * 2 + 6 * tokens * hidden + weight_gradient


def kv_width(config: PretrainedConfig) -> int:
    """Values per layer and token in the keys."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return (getattr(config, "num_key_value_heads", None) or heads) * width


def synchronizes_each_batch(args: FIPOConfig) -> bool:
    """Whether gradients are reduced in every micro-step, not only in the last one of an update."""
    return bool((args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch"))


def kv_bytes(run: Run, tensor_parallel: int = 1) -> float:
    """Bytes of keys and values per token on one GPU, in bf16."""
    heads = getattr(run.config, "num_key_value_heads", None) or run.config.num_attention_heads
    return 4 * run.config.num_hidden_layers * kv_width(run.config) / min(tensor_parallel, heads)


def engine_memory(run: Run, gpu: float) -> float:
    """Bytes of one GPU that vLLM takes for itself."""
    return gpu * (run.args.vllm_gpu_memory_utilization if run.colocated else SERVER_UTILIZATION)


def engine_cache(run: Run, gpu: float) -> float:
    """Tokens that the key-value cache of one engine holds, over the GPUs of its tensor parallelism."""
    weights = 2 * run.parameters.total / run.args.vllm_tensor_parallel_size
    left = engine_memory(run, gpu) - weights - ENGINE_MEMORY
    return max(0.0, left / kv_bytes(run, run.args.vllm_tensor_parallel_size))


def rollout_memory(run: Run, gpu: float) -> list[Part]:
    """What one training GPU holds while completions are sampled."""
    args, count = run.args, run.parameters
    weights, _, optimizer = state_memory(run)
    parts = [weights, optimizer]
    rows = args.generation_batch_size / run.world_size * run.oversampling
    if run.colocated:
        taken = (
            f"{args.vllm_gpu_memory_utilization:g} of the GPU: weights, cache for {engine_cache(run, gpu):,.0f} tokens"
        )
        parts.append(Part("vLLM", taken, engine_memory(run, gpu)))
        if run.model_args.use_peft and run.sharding == "zero3":
            parts.append(Part("weights gathered to merge LoRA", f"{count.total:,} x 2 B", 2 * count.total))
        elif run.sharding != "none":
            parts.append(Part("a weight gathered for vLLM", f"{count.embedding:,} x 4 B", 4 * count.embedding))
    elif not args.use_vllm:
        cache = rows * run.longest * kv_bytes(run)
        parts.append(
            Part("keys and values", f"{rows:g} rows x {run.longest:,} tokens x {kv_bytes(run):,.0f} B", cache)
        )
        words = run.config.vocab_size
        parts.append(Part("scores of the next word", f"{rows:g} rows x {words:,} x 4 B", rows * words * 4))
    parts.append(Part("other", "CUDA context, NCCL, fragmentation", OTHER_MEMORY))
    return parts


class Cost(NamedTuple):
    """Of one generation and its updates, over all GPUs."""

    sampled_tokens: float
    sampling: float  # floating-point operations
    old_log_probs: float
    updates: float


def cost(run: Run, mean_length: float) -> Cost:
    """Tokens and operations of one generation, if completions have `mean_length` tokens on average.

    A forward pass takes 2 operations per weight and token, and 2 x layers x heads x head size x tokens for attention.
    Prompts are left out.
    """
    count, config = run.parameters, run.config
    attention = 2 * config.num_hidden_layers * config.hidden_size * mean_length
    forward = 2 * (count.total - (count.embedding if count.head else 0)) + attention
    kept = run.args.generation_batch_size * mean_length
    sampled = kept * run.oversampling
    backward = 1 if run.model_args.use_peft else 2
    recomputed = 1 if run.checkpointing or run.args.gradient_checkpointing else 0
    return Cost(
        sampled,
        sampled * forward,
        kept * forward,
        kept * run.args.num_iterations * forward * (1 + backward + recomputed),
    )


def memory_problems(run: Run, gpu: float) -> list[str]:
    """Why a phase cannot fit: an estimate beyond the GPU by more than its error bar, or no room for a sequence."""
    reasons = []
    for phase, parts in [("An update", update_memory(run, gpu)), ("Sampling", rollout_memory(run, gpu))]:
        needed = sum(part.size for part in parts)
        if needed * (1 - ERROR_BAR) > gpu:
            reasons.append(
                f"{phase} needs about {needed / GIB:.0f} GiB of a GPU with {gpu / GIB:.0f}, far more than the error "
                f"of the estimate. The largest part: {max(parts, key=lambda part: part.size).name}."
            )
    if run.args.use_vllm and engine_cache(run, gpu) < run.longest:
        reasons.append(
            f"vLLM's cache would hold {engine_cache(run, gpu):,.0f} tokens, fewer than one sequence of {run.longest:,}"
            ": it would not start. Raise vllm_tensor_parallel_size or vllm_gpu_memory_utilization."
        )
    return reasons


def report(
    run: Run,
    gpu: float,
    size: Literal["32B", "7B"],
    mean_length: float | None = None,
    tokens_per_second: float | None = None,
) -> str:
    """All that the doctor has to say about a run, as text.

    Args:
        gpu: Memory of one GPU, in bytes.
        size: The model of the paper to compare with.
        mean_length: Of completions, in tokens; 4,000 if not given, or `max_completion_length` where that is less.
        tokens_per_second: Completion tokens sampled per second by all GPUs, as a mean over whole generations with
            their updates; `None` if not measured.

    Raises:
        ValueError: if `mean_length` is more than `max_completion_length`.
    """
    longest = run.args.max_completion_length
    mean_length = min(4000, longest) if mean_length is None else mean_length
    if mean_length > longest:
        raise ValueError(f"mean_length={mean_length:g} is more than max_completion_length={longest}. Lower it.")
    count = run.parameters
    spread = {"none": "not sharded", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}[run.sharding]
    offload = ", offloaded to CPU memory" if run.offload else ""
    title = (
        f"{run.method} of {run.model_args.model_name_or_path}, {count.total:,} parameters, {count.trainable:,} trained"
        f"\n{run.world_size} x {gpu / GIB:g} GiB, {spread}{offload}"
    )
    sections = [
        title,
        "\n".join(["Batches", *batches(run)]),
        acts(run),
        "\n".join(comparison(run, size)),
        "\n".join(memory_table(run, gpu, "an update", update_memory(run, gpu))),
        "\n".join([*memory_table(run, gpu, "sampling", rollout_memory(run, gpu)), *engines(run, gpu, mean_length)]),
        "\n".join(costs(run, mean_length, tokens_per_second)),
    ]
    return "\n\n".join(sections)


def batches(run: Run) -> list[str]:
    """The arithmetic of a generation, an update and the run."""
    args, updates = run.args, run.args.updates_per_generation
    prompts = args.generation_batch_size / args.num_generations
    per_update = args.generation_batch_size * args.num_iterations / updates
    lines = [
        f"  {args.generation_batch_size:,} completions ({prompts:,g} prompts x {args.num_generations}) per generation"
        f": {run.world_size} processes x {args.per_device_train_batch_size} x {args.steps_per_generation} micro-steps",
        f"  {per_update:,g} completions ({per_update / args.num_generations:,g} prompts) per update, {updates:g} "
        "updates per generation",
    ]
    if run.generations is None:
        return [*lines, f"  max_steps is not set: {args.num_train_epochs:g} epochs"]
    trained = run.generations * prompts
    lines.append(
        f"  {args.max_steps:,} updates = {run.generations:,g} generations, "
        f"{run.generations * args.generation_batch_size:,.0f} completions and {trained:,.0f} prompts trained on"
    )
    if "DAPO-Math-17k" in (run.script_args.dataset_name or ""):
        epochs = f"  {trained / DISTINCT_PROMPTS:.1f} epochs of about {DISTINCT_PROMPTS:,} distinct prompts"
        if args.dynamic_sampling:
            sampled = trained * run.oversampling
            epochs += (
                f" trained on; {sampled / DISTINCT_PROMPTS:.1f} or more sampled: dynamic sampling drops prompts that "
                "are all right or all wrong, and samples more where too few are left"
            )
        lines.append(epochs)
    return lines


def acts(run: Run) -> str:
    """Whether FIPO differs from DAPO in this run, in a sentence."""
    updates = run.args.updates_per_generation
    if run.method == "DAPO":
        return "FIPO does not act: trainer=grpo is the control arm (DAPO)."
    if run.args.fipo_is_off:
        return "FIPO does not act: both bounds of the influence weight are 1."
    return (
        f"FIPO acts in {updates - 1:g} of {updates:g} updates per generation: in the first, the policy is still the "
        "one that generated."
    )


def comparison(run: Run, size: Literal["32B", "7B"]) -> list[str]:
    """The run beside the paper's column for its method."""
    title = f"Beside the paper's {run.method} of {'Qwen2.5-32B' if size == '32B' else 'Qwen2.5-Math-7B'}"
    rows = [("setting", "paper", "here"), *differences(run, size)]
    if len(rows) == 1:
        return [f"{title}: no difference in {len(paper_settings(size, run.method))} settings"]
    return [f"{title}:", *(f"  {name:<24} {paper!s:<28} {ours}" for name, paper, ours in rows)]


def memory_table(run: Run, gpu: float, phase: str, parts: list[Part]) -> list[str]:
    """The parts of a memory estimate and their sum, in GiB."""
    needed = sum(part.size for part in parts) / GIB
    low, high = needed * (1 - ERROR_BAR), needed * (1 + ERROR_BAR)
    doubt = ": may not fit" if needed * GIB > gpu else ""
    return [
        f"Memory of a GPU, {phase}: {needed:.1f} GiB ({low:.0f} to {high:.0f}) of {gpu / GIB:g}{doubt}",
        *(f"  {part.size / GIB:7.2f}  {part.name:<32} {part.formula}" for part in parts),
    ]


def engines(run: Run, gpu: float, mean_length: float) -> list[str]:
    """How many completions vLLM samples at once."""
    args = run.args
    if not args.use_vllm:
        return []
    rows = args.generation_batch_size * run.oversampling / run.engines
    at_once = ""
    if run.colocated:  # what TRL sets as max_num_seqs
        most = args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation
        at_once = f", at most {most:,} at once"
    tokens = engine_cache(run, gpu)
    return [
        f"  vLLM: {run.engines} x {rows:,g} completions{at_once}; the cache of each holds {tokens / run.longest:,.0f} "
        f"of the longest, {tokens / mean_length:,.0f} of {mean_length:g} tokens"
    ]


def costs(run: Run, mean_length: float, tokens_per_second: float | None) -> list[str]:
    """Tokens, operations and, from a measured speed, hours."""
    one = cost(run, mean_length)
    lines = [
        f"Cost of a generation at a mean of {mean_length:g} tokens",
        f"  {one.sampled_tokens / 1e6:,.1f} million tokens sampled"
        + (" or more" if run.args.dynamic_sampling else ""),
        f"  {one.sampling + one.old_log_probs + one.updates:.1e} floating-point operations: sampling "
        f"{one.sampling:.1e}, old log-probs {one.old_log_probs:.1e}, updates {one.updates:.1e}",
    ]
    if tokens_per_second:
        seconds = one.sampled_tokens / tokens_per_second
        run_hours = "" if run.generations is None else f", {seconds * run.generations / 3600:,.1f} hours for the run"
        lines.append(f"  {seconds / 60:,.1f} minutes at {tokens_per_second:,g} tokens/s{run_hours}")
    return lines
