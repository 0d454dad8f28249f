"""The memory of a GPU in an update and in sampling, part by part.

Parameter counts are exact. The activations are those of a dense decoder with SwiGLU and RMSNorm (Qwen2, Llama,
Mistral, Qwen3), to a few percent of what torch's memory tracker counts (tests/planning/test_doctor.py). What FSDP2,
ZeRO-3 and vLLM hold is arithmetic from their sources. None of it was measured on a GPU.
"""

from typing import NamedTuple

from transformers import PretrainedConfig

from fipo_trl.planning.plan import Plan
from fipo_trl.trainer.dapo_config import DAPOConfig


GIB = 2**30
ERROR_BAR = 0.25  # of a memory estimate, either way: an estimate beyond the GPU by more than that cannot work
OTHER_MEMORY = 3 * GIB  # CUDA context, NCCL, fragmentation
ENGINE_MEMORY = 2 * GIB  # vLLM's activations for 4,096 tokens, and its CUDA graphs
# Logits that TRL holds at once: tokens times words of the vocabulary. Of TRL 1.16 (TOKEN_CHUNK_SIZE in
# trl.kernels.chunked_logprob, _CHUNKED_LOGPROB_CHUNK_SIZE in trl.trainer.utils); 1.14 has neither
TOKEN_TILE, WORD_TILE = 4096, 32768
SERVER_UTILIZATION = 0.9  # of a vLLM server, by its default


class Part(NamedTuple):
    """One line of a memory estimate, for one GPU."""

    name: str
    formula: str
    size: float  # bytes


def update_memory(plan: Plan, gpu: float) -> list[Part]:
    """What one GPU holds at the peak of an update whose micro-batch is `per_device_train_batch_size` longest rows.

    Args:
        gpu: Memory of one GPU, in bytes.
    """
    args, config, count, states = plan.training, plan.config, plan.parameters, state_memory(plan)
    hidden, intermediate, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens = args.per_device_train_batch_size * plan.longest
    kv = kv_width(config)
    mixed = plan.sharding == "none" and plan.weight_bytes == 4 and args.bf16  # float32 weights under autocast
    stream = 4 if plan.sharding == "none" and plan.weight_bytes == 4 else 2  # bytes per value between layers
    parts = list(states)
    if plan.sharding != "none":
        parts.append(
            Part(
                "gathered weights",
                "(2 layers + embedding + head) x 2 B",
                2 * (2 * count.layer + count.embedding + count.head),
            )
        )
        if not plan.model.use_peft:
            unshared = 2 * count.layer + (count.head or count.embedding)
            parts.append(Part("gradients before they are shared", "(2 layers + head) x 2 B", 2 * unshared))
        if plan.sharding == "fsdp2" and args.gradient_accumulation_steps > 1 and not synchronizes_each_batch(args):
            size = 2 * count.trainable
            parts.append(
                Part("gradients accumulated unsharded", f"{count.trainable:,} x 2 B, see sync_each_batch", size)
            )
    elif plan.world_size > 1:
        parts.append(states[1]._replace(name="gradients in DDP's buckets"))
    copies = Part("bf16 copies of the weights", f"{count.linear:,} x 2 B", 2 * count.linear if mixed else 0)
    if plan.checkpointing or args.gradient_checkpointing:
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
        + ("" if plan.model.use_peft else " + vocabulary x hidden x 4 B"),
        head_memory(plan, tokens),
    )
    parts.append(max(layer, head, copies, key=lambda part: part.size))  # not at the same time
    rows = args.generation_batch_size / plan.world_size
    parts.append(
        Part("completions in use", f"{rows:g} rows x {plan.longest:,} tokens x 32 B", rows * plan.longest * 32)
    )
    if plan.colocated and not args.vllm_enable_sleep_mode:
        parts.append(Part("vLLM, awake", f"{args.vllm_gpu_memory_utilization:g} of the GPU", engine_memory(plan, gpu)))
    elif plan.colocated and plan.model.use_peft and not plan.merged_adapter:
        size = 2 * plan.parameters.total / args.vllm_tensor_parallel_size
        parts.append(Part("vLLM, asleep", f"{size / GIB:.1f} GiB in CPU memory", 0.0))
    parts.append(Part("other", "CUDA context, NCCL, fragmentation", OTHER_MEMORY))
    return parts


def state_memory(plan: Plan) -> list[Part]:
    """Weights, gradients and optimizer states of one GPU."""
    count = plan.parameters
    shards = plan.world_size if plan.sharding != "none" else 1
    # Trained weights: accelerate casts them to float32 for FSDP2, PEFT those of adapters; ZeRO-3 keeps bf16 copies too
    weight = 4 if plan.sharding == "fsdp2" or plan.model.use_peft else plan.weight_bytes
    gradient = 2 if plan.sharding == "zero3" else weight
    weight = 6 if plan.sharding == "zero3" else weight
    adam = 2 if "8bit" in str(plan.training.optim) else min(8, 2 * weight)
    over = f" / {shards}" if shards > 1 else ""
    frozen = count.total - count.trainable
    frozen_formula = f" + {frozen:,} frozen x {plan.weight_bytes:g} B" if frozen else ""
    parts = [
        Part(
            "weights",
            f"({count.trainable:,} x {weight:g} B{frozen_formula}){over}",
            (count.trainable * weight + frozen * plan.weight_bytes) / shards,
        ),
        Part("gradients", f"{count.trainable:,} x {gradient:g} B{over}", count.trainable * gradient / shards),
        Part("optimizer states", f"{count.trainable:,} x {adam:g} B{over}", count.trainable * adam / shards),
    ]
    if plan.offload:
        parts = [Part(part.name, f"{part.size / GIB:.1f} GiB in CPU memory", 0.0) for part in parts]
    return parts


def head_memory(plan: Plan, tokens: int) -> float:
    """Bytes of TRL's fused output head: logits exist in tiles only, but its gradients whole, in float32."""
    hidden = plan.config.hidden_size
    weight_gradient = 0 if plan.model.use_peft else 4 * plan.config.vocab_size * hidden
    return min(tokens, TOKEN_TILE) * WORD_TILE * 2 + 6 * tokens * hidden + weight_gradient


def head_size(config: PretrainedConfig) -> int:
    """Values of an attention head. In Qwen3, heads together may be wider than the hidden state."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_width(config: PretrainedConfig) -> int:
    """Values per layer and token in the keys."""
    return (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size(config)


def synchronizes_each_batch(args: DAPOConfig) -> bool:
    """Whether gradients are reduced in every micro-step, not only in the last one of an update."""
    return bool((args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch"))


def kv_bytes(plan: Plan, tensor_parallel: int = 1) -> float:
    """Bytes of keys and values per token on one GPU, in bf16."""
    heads = getattr(plan.config, "num_key_value_heads", None) or plan.config.num_attention_heads
    return 4 * plan.config.num_hidden_layers * kv_width(plan.config) / min(tensor_parallel, heads)


def engine_memory(plan: Plan, gpu: float) -> float:
    """Bytes of one GPU that vLLM takes for itself."""
    return gpu * (plan.training.vllm_gpu_memory_utilization if plan.colocated else SERVER_UTILIZATION)


def engine_cache(plan: Plan, gpu: float) -> float:
    """Tokens that the key-value cache of one engine holds, over the GPUs of its tensor parallelism."""
    weights = 2 * plan.parameters.total / plan.training.vllm_tensor_parallel_size
    left = engine_memory(plan, gpu) - weights - ENGINE_MEMORY
    return max(0.0, left / kv_bytes(plan, plan.training.vllm_tensor_parallel_size))


def rollout_memory(plan: Plan, gpu: float) -> list[Part]:
    """What one training GPU holds while completions are sampled."""
    args, count = plan.training, plan.parameters
    weights, _, optimizer = state_memory(plan)
    parts = [weights, optimizer]
    rows = args.generation_batch_size / plan.world_size * plan.oversampling
    if plan.colocated:
        cache = f"{engine_cache(plan, gpu):,.0f}"
        taken = f"{args.vllm_gpu_memory_utilization:g} of the GPU: weights, cache for {cache} tokens"
        parts.append(Part("vLLM", taken, engine_memory(plan, gpu)))
    if args.use_vllm:
        if plan.merged_adapter and plan.sharding == "zero3":
            parts.append(Part("weights gathered to merge LoRA", f"{count.total:,} x 2 B", 2 * count.total))
        elif plan.sharding != "none":
            parts.append(Part("a weight gathered for vLLM", f"{count.embedding:,} x 4 B", 4 * count.embedding))
    else:
        cache = rows * plan.longest * kv_bytes(plan)
        parts.append(
            Part("keys and values", f"{rows:g} rows x {plan.longest:,} tokens x {kv_bytes(plan):,.0f} B", cache)
        )
        words = plan.config.vocab_size
        parts.append(Part("scores of the next word", f"{rows:g} rows x {words:,} x 4 B", rows * words * 4))
    parts.append(Part("other", "CUDA context, NCCL, fragmentation", OTHER_MEMORY))
    return parts


def memory_problems(plan: Plan, gpu: float) -> list[str]:
    """Why a phase cannot fit: an estimate beyond the GPU by more than its error bar, or no room for a sequence."""
    reasons = []
    for phase, parts in [("An update", update_memory(plan, gpu)), ("Sampling", rollout_memory(plan, gpu))]:
        needed = sum(part.size for part in parts)
        if needed * (1 - ERROR_BAR) > gpu:
            reasons.append(
                f"{phase} needs about {needed / GIB:.0f} GiB of a GPU with {gpu / GIB:.0f}, far more than the error "
                f"of the estimate. The largest part: {max(parts, key=lambda part: part.size).name}."
            )
    if plan.training.use_vllm and engine_cache(plan, gpu) < plan.longest:
        reasons.append(
            f"vLLM's cache would hold {engine_cache(plan, gpu):,.0f} tokens, fewer than one sequence of "
            f"{plan.longest:,}: it would not start. Raise vllm_tensor_parallel_size or vllm_gpu_memory_utilization."
        )
    return reasons
