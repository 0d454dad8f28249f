"""What the trainers rely on in TRL's GRPOTrainer, by name. A TRL that keeps to it is welcome, tested or not.

`tests/trainer/test_trl_contract.py` holds that nothing is missing here, and what the methods do.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import trl
from accelerate.logging import get_logger
from trl import GRPOTrainer


logger = get_logger(__name__)

TESTED = ("1.14.2", "1.16.0")  # tests/trainer and tests/objective pass with them

# Methods that the trainers override: all the parameters with which TRL may call them. "...": they are passed on
OVERRIDDEN = {
    "__init__": "...",
    "_generate_and_score_completions": "inputs",
    "_calculate_rewards": "...",
    "_prepare_inputs": "generation_batch",
    "_compute_loss": "model, inputs",
    "_get_per_token_logps_and_entropies": "...",
    "training_step": "...",
    "log": "...",
    "get_train_dataloader": "",
    "_get_train_sampler": "dataset",
    "_save_optimizer_and_scheduler": "output_dir",
    "_load_from_checkpoint": "resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_maybe_log_save_evaluate": "...",
    "_run_epoch": "...",
    "_save_checkpoint": "model, trial",
    "_save_rng_state": "output_dir",
    "create_model_card": "...",
    "train": "...",
}
# Methods that are called: the arguments that are passed, in order; with a "=", by name
CALLED = {
    "__init__": "model, reward_funcs, args, train_dataset=, eval_dataset=, processing_class=, peft_config=",
    "_get_per_token_logps_and_entropies": "model, input_ids, attention_mask, logits_to_keep, batch_size=",
    "_generate": "prompts",
    "_calculate_rewards": "inputs, prompts, completions, completion_ids_list",
    "_tokenize_prompts": "prompts",
    "_generate_single_turn": "prompt_ids, images, multimodal_fields, num_generations=",
    "_remove_unused_columns": "dataset",
    "_get_output_dir": "trial",
    "_save_checkpoint": "model, trial",
    "create_model_card": "model_name, dataset_name",
}
# Methods of TRL's client of a vLLM server, which `vllm_server.py` overrides or calls: all their parameters
OF_CLIENT = {
    "__init__": "...",
    "init_communicator": "device",
    "update_named_params": "metadata, named_params",
    "reset_prefix_cache": "",
    "generate": "...",
    "get_world_size": "",
    "_get": "url, kwargs",
    "_post": "url, kwargs",
    "get_server_info": "",
    "_start_weight_update": "",
    "_finish_weight_update": "",
}
# Methods of what samples with vLLM, which `lora_sync.py` overrides or calls: all their parameters
OF_GENERATION = {"_init_vllm": "", "sync_weights": ""}
OF_LLM = {"generate", "reset_prefix_cache", "sleep", "wake_up"}  # all that it asks vLLM's `LLM` for, to sample
GENERATED = 8  # values that `_generate` returns
# Attributes of every trainer
ATTRIBUTES = (
    "_buffered_inputs",
    "_entropy_bonus_enabled",
    "_is_vlm",
    "_last_world_entropy",
    "_logs",
    "_metrics",
    "_pending_extra_logs",
    "_step",
    "_tokenizer",
    "aux_loss_enabled",
    "beta",
    "entropy_coef",
    "environment_factories",
    "eos_token_ids",
    "loss_type",
    "max_completion_length",
    "num_generations",
    "num_iterations",
    "reward_func_names",
    "reward_funcs",
    "reward_weights",
    "rollout_func",
    "shuffle_dataset",
    "tools",
    "top_entropy_quantile",
    "use_vllm",
)
WITH_VLLM = ("_last_loaded_step", "vllm_generation", "vllm_mode")
WITHOUT_VLLM = ("generation_config", "generation_kwargs")


def check_contract(trainer_class: type = GRPOTrainer):
    """Refuse a TRL in which a method is missing, has other parameters, or does its steps in another order.

    Raises:
        RuntimeError: naming each, the TRL that is installed, and those that are tested.
    """
    faults = _changed(trainer_class, OVERRIDDEN)
    for name, arguments in CALLED.items():
        method = getattr(trainer_class, name, None)
        if not callable(method):
            faults += [f"{name} is missing"] * (name not in OVERRIDDEN)  # else it has been said
        elif not _takes(method, arguments):
            faults.append(f"{name}({arguments}) is {name}({_names(method)}) now")
    if not faults:
        faults = _faults_within(trainer_class)
    _refuse(faults)


def check_client(client_class: type):
    """Refuse a TRL whose client of a vLLM server is another.

    Raises:
        RuntimeError: as `check_contract`.
    """
    _refuse(_changed(client_class, OF_CLIENT), "VLLMClient")


def check_generation(generation_class: type):
    """Refuse a TRL that samples with vLLM otherwise, where an adapter is to be given to the engine.

    Raises:
        RuntimeError: as `check_contract`.
    """
    faults = _changed(generation_class, OF_GENERATION)
    try:
        source = inspect.getsource(generation_class)
    except OSError:
        source = ""
    asked = set(re.findall(r"self\.llm\.(\w+)\(", source))  # which the base would answer, without the adapter
    faults += [f"self.llm.{name} is called" for name in sorted(asked - OF_LLM)]
    _refuse(faults, "VLLMGeneration")


def check_attributes(trainer: GRPOTrainer):
    """Refuse a trainer without an attribute that is read or set. Call it when TRL's `__init__` is through.

    Warns, once, of a TRL that is not tested.

    Raises:
        RuntimeError: as `check_contract`.
    """
    names = ATTRIBUTES + (WITH_VLLM if getattr(trainer, "use_vllm", False) else WITHOUT_VLLM)
    _refuse([f"the attribute {name} is missing" for name in names if not hasattr(trainer, name)])
    if trl.__version__ not in TESTED:
        logger.warning_once(
            f"fipo_trl is not tested with TRL {trl.__version__}, which has all that is relied on by name. Tested are "
            f"{', '.join(TESTED)}."
        )


def _changed(owner: type, parameters_of: dict[str, str]) -> list[str]:
    """Methods that are missing, or have other parameters."""
    faults = []
    for name, parameters in parameters_of.items():
        method = getattr(owner, name, None)
        if not callable(method):
            faults.append(f"{name} is missing")
        elif parameters != "..." and _names(method) != parameters:
            faults.append(f"{name}({parameters}) is {name}({_names(method)}) now")
    return faults


def _refuse(faults: list[str], owner: str = "GRPOTrainer"):
    if faults:
        raise RuntimeError(
            f"TRL {trl.__version__} is not what fipo_trl relies on. In {owner}:\n"
            + "".join(f"  {fault}\n" for fault in faults)
            + f'Tested are TRL {", ".join(TESTED)}: pip install "trl=={TESTED[-1]}"'
        )


def _names(method: Callable) -> str:
    """The parameters of a method without its first, `self`."""
    return ", ".join(list(inspect.signature(method).parameters)[1:])


def _takes(method: Callable, arguments: str) -> bool:
    """Whether these arguments arrive, each under its own name. `*args` and `**kwargs` take any."""
    names = arguments.split(", ")
    positional = [name for name in names if not name.endswith("=")]
    by_name = {name[:-1]: name[:-1] for name in names if name.endswith("=")}
    try:
        bound = inspect.signature(method).bind("self", *positional, **by_name).arguments
    except TypeError:
        return False
    return all(value in (name, "self") for name, value in bound.items() if isinstance(value, str))


def _faults_within(trainer_class: Any) -> list[str]:
    """What can be seen of two methods without running them; nothing, where their source is not there."""
    try:
        loss = inspect.getsource(trainer_class._compute_loss)
        generate = ast.parse(textwrap.dedent(inspect.getsource(trainer_class._generate)))
    except OSError:
        return []
    faults = []
    log_probs, advantages = loss.find("self._get_per_token_logps_and_entropies("), loss.find('inputs["advantages"]')
    if not 0 <= log_probs < advantages:
        faults.append(
            "_compute_loss does not ask _get_per_token_logps_and_entropies for the log-probabilities and read "
            'inputs["advantages"] after that'
        )
    returned = [node.value for node in ast.walk(generate) if isinstance(node, ast.Return)]
    if not all(isinstance(value, ast.Tuple) and len(value.elts) == GENERATED for value in returned):
        values = ", ".join(ast.unparse(value) for value in returned if value)
        faults.append(f"_generate does not return {GENERATED} values: {values}")
    return faults
