"""What the doctor says about a plan, as text: batches, the paper's table, memory, cost."""

from typing import Literal, NamedTuple

from fipo_trl.planning.memory import (
    ERROR_BAR,
    GIB,
    Part,
    engine_cache,
    head_size,
    memory_problems,
    rollout_memory,
    update_memory,
)
from fipo_trl.planning.paper import differences, paper_settings
from fipo_trl.planning.plan import Plan
from fipo_trl.recipe.model_limits import impossible


DISTINCT_PROMPTS = 17_000  # in DAPO-Math-17k, about
# What hours are estimated from where no speed was measured. An assumption: none of it was measured here
PEAK = 989e12  # operations per second of an H100 SXM in bf16, without sparsity: NVIDIA's data sheet
SHARE_IN_PASSES = 0.3  # of that peak, in updates and old log-probs
SHARE_IN_SAMPLING = 0.05  # of that peak: sampling a token reads all weights, and waits for memory


class Cost(NamedTuple):
    """Of one generation and its updates, over all GPUs."""

    sampled_tokens: float
    sampling: float  # floating-point operations
    old_log_probs: float
    updates: float


def cost(plan: Plan, mean_length: float) -> Cost:
    """Tokens and operations of one generation, if completions have `mean_length` tokens on average.

    A forward pass takes 2 operations per weight and token, and 2 x layers x heads x head size x tokens for attention.
    Prompts are left out.
    """
    count, config = plan.parameters, plan.config
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_size(config) * mean_length
    forward = 2 * (count.total - (count.embedding if count.head else 0)) + attention
    kept = plan.training.generation_batch_size * mean_length
    sampled = kept * plan.oversampling
    backward = 1 if plan.model.use_peft else 2
    recomputed = 1 if plan.checkpointing or plan.training.gradient_checkpointing else 0
    return Cost(
        sampled,
        sampled * forward,
        kept * forward,
        kept * plan.training.num_iterations * forward * (1 + backward + recomputed),
    )


def examine(
    plan: Plan,
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
    longest = plan.training.max_completion_length
    mean_length = min(4000, longest) if mean_length is None else mean_length
    if mean_length > longest:
        raise ValueError(f"mean_length={mean_length:g} is more than max_completion_length={longest}. Lower it.")
    count = plan.parameters
    reasons, doubts = impossible(plan.recipe, plan.config, plan.world_size), memory_problems(plan, gpu)
    verdict = "it cannot work:" if reasons else "it can work" + (", but hardly fits:" if doubts else ".")
    spread = {"none": "not sharded", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}[plan.sharding]
    offload = ", offloaded to CPU memory" if plan.offload else ""
    title = (
        f"{plan.method} of {plan.model.model_name_or_path}, {count.total:,} parameters, {count.trainable:,} trained"
        f"\n{plan.world_size} x {gpu / GIB:g} GiB, {spread}{offload}"
    )
    sections = [
        "\n".join(["Verdict: " + verdict, *(f"  {reason}" for reason in reasons + doubts)]),
        title,
        "\n".join(["Batches", *batches(plan)]),
        acts(plan),
        "\n".join(comparison(plan, size)),
        "\n".join(memory_table(plan, gpu, "an update", update_memory(plan, gpu))),
        "\n".join([*memory_table(plan, gpu, "sampling", rollout_memory(plan, gpu)), *engines(plan, gpu, mean_length)]),
        "\n".join(costs(plan, mean_length, tokens_per_second)),
    ]
    return "\n\n".join(sections)


def batches(plan: Plan) -> list[str]:
    """The arithmetic of a generation, an update and the run."""
    args, updates = plan.training, plan.training.updates_per_generation
    prompts = args.generation_batch_size / args.num_generations
    per_update = args.generation_batch_size * args.num_iterations / updates
    lines = [
        f"  {args.generation_batch_size:,} completions ({prompts:,g} prompts x {args.num_generations}) per generation"
        f": {plan.world_size} processes x {args.per_device_train_batch_size} x {args.steps_per_generation} "
        "micro-steps",
        f"  {per_update:,g} completions ({per_update / args.num_generations:,g} prompts) per update, {updates:g} "
        "updates per generation",
    ]
    if plan.generations is None:
        return [*lines, f"  max_steps is not set: {args.num_train_epochs:g} epochs"]
    trained = plan.generations * prompts
    lines.append(
        f"  {args.max_steps:,} updates = {plan.generations:,g} generations, "
        f"{plan.generations * args.generation_batch_size:,.0f} completions and {trained:,.0f} prompts trained on"
    )
    if "DAPO-Math-17k" in (plan.run.dataset_name or ""):
        epochs = f"  {trained / DISTINCT_PROMPTS:.1f} epochs of about {DISTINCT_PROMPTS:,} distinct prompts"
        if args.dynamic_sampling:
            sampled = trained * plan.oversampling
            epochs += (
                f" trained on; {sampled / DISTINCT_PROMPTS:.1f} or more sampled: dynamic sampling drops prompts that "
                "are all right or all wrong, and samples more where too few are left"
            )
        lines.append(epochs)
    return lines


def acts(plan: Plan) -> str:
    """Whether FIPO differs from DAPO in this run, in a sentence."""
    updates = plan.training.updates_per_generation
    if "." in plan.run.trainer:
        return f"trainer={plan.run.trainer} reads the settings of {plan.method}. What else it does is not known here."
    if plan.method == "DAPO":
        return f"FIPO does not act: trainer={plan.run.trainer} is the control arm."
    if plan.training.fipo_is_off:
        return "FIPO does not act: both bounds of the influence weight are 1."
    return (
        f"FIPO acts in {updates - 1:g} of {updates:g} updates per generation: in the first, the policy is still the "
        "one that generated."
    )


def comparison(plan: Plan, size: Literal["32B", "7B"]) -> list[str]:
    """The run beside the paper's column for its method."""
    title = f"Beside the paper's {plan.method} of {'Qwen2.5-32B' if size == '32B' else 'Qwen2.5-Math-7B'}"
    rows = [("setting", "paper", "here"), *differences(plan, size)]
    if len(rows) == 1:
        return [f"{title}: no difference in {len(paper_settings(size, plan.method))} settings"]
    return [f"{title}:", *(f"  {name:<24} {paper!s:<28} {ours}" for name, paper, ours in rows)]


def memory_table(plan: Plan, gpu: float, phase: str, parts: list[Part]) -> list[str]:
    """The parts of a memory estimate and their sum, in GiB."""
    needed = sum(part.size for part in parts) / GIB
    low, high = needed * (1 - ERROR_BAR), needed * (1 + ERROR_BAR)
    doubt = ": may not fit" if needed * GIB > gpu else ""
    return [
        f"Memory of a GPU, {phase}: {needed:.1f} GiB ({low:.0f} to {high:.0f}) of {gpu / GIB:g}{doubt}",
        *(f"  {part.size / GIB:7.2f}  {part.name:<32} {part.formula}" for part in parts),
    ]


def engines(plan: Plan, gpu: float, mean_length: float) -> list[str]:
    """How many completions vLLM samples at once."""
    args = plan.training
    if not args.use_vllm:
        return []
    rows = args.generation_batch_size * plan.oversampling / plan.engines
    at_once = ""
    if plan.colocated:  # what TRL sets as max_num_seqs
        most = args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation
        at_once = f", at most {most:,} at once"
    tokens = engine_cache(plan, gpu)
    return [
        f"  vLLM: {plan.engines} x {rows:,g} completions{at_once}; the cache of each holds "
        f"{tokens / plan.longest:,.0f} of the longest, {tokens / mean_length:,.0f} of {mean_length:g} tokens"
    ]


def costs(plan: Plan, mean_length: float, tokens_per_second: float | None) -> list[str]:
    """Tokens, operations and, from a measured speed, hours."""
    one = cost(plan, mean_length)
    lines = [
        f"Cost of a generation at a mean of {mean_length:g} tokens",
        f"  {one.sampled_tokens / 1e6:,.1f} million tokens sampled"
        + (" or more" if plan.training.dynamic_sampling else ""),
        f"  {one.sampling + one.old_log_probs + one.updates:.1e} floating-point operations: sampling "
        f"{one.sampling:.1e}, old log-probs {one.old_log_probs:.1e}, updates {one.updates:.1e}",
    ]
    if tokens_per_second:
        seconds = one.sampled_tokens / tokens_per_second
        speed = f"at {tokens_per_second:,g} tokens/s"
    else:
        passes = (one.old_log_probs + one.updates) / SHARE_IN_PASSES
        seconds = (passes + one.sampling / SHARE_IN_SAMPLING) / (PEAK * plan.world_size)
        speed = (
            f"if {plan.world_size} x H100 (989 TFLOP/s in bf16) reach {SHARE_IN_PASSES:.0%} of their peak in updates "
            f"and {SHARE_IN_SAMPLING:.0%} in sampling: an assumption. Give --tokens_per_second for your own"
        )
    hours = "" if plan.generations is None else f", {seconds * plan.generations / 3600:,.1f} hours for the run"
    lines.append(f"  {seconds / 60:,.1f} minutes{hours}, {speed}")
    return lines
