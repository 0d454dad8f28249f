"""What a checkpoint says of itself: its files and their sizes, and the settings, rewards and data of its run.

`checkpoint.json` is written last, by rename. A checkpoint is whole if all that it lists is there, and what resuming
reads can be read. Checkpoints of TRL, and of versions of this package before there was such a file, have none: they
are whole if the files that transformers writes are there and can be read.
"""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import sort_checkpoints

from fipo_trl.trainer.sharding import who_saves


if TYPE_CHECKING:
    from fipo_trl.trainer.dapo_config import DAPOConfig
    from fipo_trl.trainer.dapo_trainer import DAPOTrainer

logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint.json"
TRAINER_STATE_NAME = "trainer_state.json"  # transformers' name
NEEDED = {  # names that the state may have: with one process or several, adapters, FSDP, DeepSpeed
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),
    "model.safetensors": (
        *(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")),
        *(f"{place}adapter_model.{end}" for place in ("", "*/") for end in ("safetensors", "bin")),
        "pytorch_model_fsdp*",
        "global_step*",
    ),
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer_*", "rank*-of-*-optimizer.pt", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}
ALSO_READ = ("model-*.safetensors", "pytorch_model-*.bin", "scaler.pt", "generation_state_*.pt")


# Whole or not


def faults(folder: str | Path) -> dict[str, str]:
    """What keeps a checkpoint from being whole: the name of a file below `folder`, and what is wrong with it.

    Tensors are not read: a file that is cut short or empty is found, one with other bytes of the same number is not.
    The size of trainer_state.json is not compared: people edit it, and it tells by itself whether it is complete.
    """
    folder = Path(folder)
    found = {}
    try:
        manifest = read_manifest(folder)
    except ValueError:
        manifest = None
        found[MANIFEST_NAME] = "is cut short or damaged"
    for name, size in manifest["files"].items() if manifest else ():
        path = folder / name
        if not path.is_file():
            found[name] = "is missing"
        elif name != TRAINER_STATE_NAME and path.stat().st_size != size:
            found[name] = f"has {path.stat().st_size} bytes of {size}"
    for usual_name, patterns in NEEDED.items():
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            found.setdefault(usual_name, "is missing")
    patterns = (*(pattern for names in NEEDED.values() for pattern in names), *ALSO_READ)
    for path in (path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        if not is_readable(path):
            found.setdefault(str(path.relative_to(folder)), "is cut short or damaged")
        elif path.name.endswith(".index.json"):
            shards = set(json.loads(path.read_text()).get("weight_map", {}).values())
            found |= {name: "is missing" for name in sorted(shards) if not (folder / name).is_file()}
    return found


def is_readable(path: Path) -> bool:
    """Whether the table of contents of a file agrees with its size; JSON is read."""
    if path.suffix == ".json":
        try:
            return isinstance(json.loads(path.read_text()), dict)
        except ValueError:
            return False
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except SafetensorError:
            return False
    return zipfile.is_zipfile(path)  # what torch.save writes


def describe(found: dict[str, str]) -> str:
    """One line for people: `optimizer.pt is missing, ...`."""
    words = [f"{name} {what}" for name, what in found.items()]
    return ", ".join(words[:3]) + (f", and {len(words) - 3} more files" if len(words) > 3 else "")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What [`write_manifest`] wrote, or `None` if there is none.

    Raises:
        ValueError: if it is not what was written.
    """
    path = Path(folder, MANIFEST_NAME)
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{path} holds no list of files.")
    return manifest


# Saving


def begin_checkpoint(trainer: "DAPOTrainer", folder: Path):
    """Remove what another run or a save cut short left in `folder`, and broken checkpoints that rotation would count.

    transformers deletes the oldest ones, whole or not; where the limit is reached, broken ones go first.
    """
    limit = trainer.args.save_total_limit
    if trainer.args.should_save:
        shutil.rmtree(folder, ignore_errors=True)
        others = [Path(path) for path in sort_checkpoints(str(folder.parent), use_mtime=True)]
        too_many = len(others) + 1 - limit if limit and limit > 0 else 0
        for path in [path for path in others if faults(path)][: max(too_many, 0)]:
            logger.warning(f"save_total_limit={limit}: {path} is deleted first, because it is not whole.")
            shutil.rmtree(path, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def write_manifest(trainer: "DAPOTrainer", folder: Path):
    """Say that a checkpoint is complete, when all processes have written their files."""
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        manifest = {
            "files": dict(sorted(files.items())),
            **run_of_trainer(trainer),
            "inside_generation": trainer.inside_generation,
        }
        unfinished = folder / f"{MANIFEST_NAME}.unfinished"
        with unfinished.open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / MANIFEST_NAME)


def run_of(trainer: str, args: "DAPOConfig", rewards: list[str], data: dict[str, Any] | None) -> dict[str, Any]:
    """What makes a run the one that it is, as JSON would hold it.

    Args:
        trainer: Name of its class.
        args: Of the trainer.
        rewards: Names of the reward functions.
        data: [`fingerprint`] of the training data.
    """
    run = {
        "trainer": trainer,
        "saved_by": who_saves(args),
        "rewards": rewards,
        "data": data,
        "settings": args.to_dict() | {"world_size": args.world_size},
    }
    return json.loads(json.dumps(run, default=str))


def run_of_trainer(trainer: "DAPOTrainer") -> dict[str, Any]:
    """[`run_of`] a trainer."""
    return run_of(type(trainer).__name__, trainer.args, list(trainer.reward_func_names), trainer.data_fingerprint)


def fingerprint(dataset: Any) -> dict[str, Any] | None:
    """Number of rows and hash of their content in their order, 3 s per million rows. `None` for iterable datasets.

    Images and other binary columns are left out.
    """
    if not isinstance(dataset, Dataset):
        return None
    schema = dataset.data.schema
    names = sorted(name for name in dataset.column_names if "binary" not in str(schema.field(name).type))
    digest = hashlib.sha256()
    for table in dataset.select_columns(names).with_format("arrow").iter(1000):
        digest.update(json.dumps(table.select(names).to_pylist(), default=repr).encode())
    return {"rows": len(dataset), "sha256": digest.hexdigest()}


# What resuming changes

# They say where and how often something is written, measured or loaded, not what is trained
NOT_TRAINED: tuple[str, ...] = ("output_dir", "run_name", "project", "resume_from_checkpoint", "disable_tqdm")
NOT_TRAINED += ("report_to", "debug")
NOT_TRAINED += ("save_", "log", "eval_", "do_", "hub_", "push_to_hub", "trackio", "include_", "dataloader_", "ddp_")
NOT_TRAINED += ("per_device_eval_batch_size", "num_completions_to_print", "vllm_server_", "token_credit", "local_rank")
LENGTHS = ("max_steps", "num_train_epochs")  # may be raised; a falling learning rate depends on them
CONSTANT = ("constant", "constant_with_warmup")
OF_OPTIMIZER = ("adam_", "weight_decay", "optim_args")  # it restores its own


class Changes(NamedTuple):
    """How a run differs from the one that saved its checkpoint.

    Attributes:
        impossible: What cannot go on from this checkpoint, as sentences.
        data: What another dataset means, or "".
        learning_rate: The checkpoint's, where it was another one.
        settings: Other settings that are in force from here on, as `name: old -> new`.
        kept: Settings that the checkpoint's optimizer overrules, likewise.
    """

    impossible: list[str]
    data: str
    learning_rate: float | None
    settings: list[str]
    kept: list[str]


def changes(run: dict[str, Any], checkpoint: str | Path) -> Changes:
    """Compare what [`run_of`] says of a run with the one that saved a checkpoint. The main process does, for all."""
    state, found = PartialState(), [Changes([], "", None, [], [])]
    if state.is_main_process and (manifest := read_manifest(checkpoint)):
        found = [compare(manifest, run)]
    return broadcast_object_list(found)[0] if state.num_processes > 1 else found[0]


def compare(manifest: dict[str, Any], run: dict[str, Any]) -> Changes:
    """Compare a manifest with what [`run_of`] says of a run. Settings that only one of them has are left out."""
    before, now = manifest["settings"], run["settings"]
    names = [name for name in before if name in now and before[name] != now[name]]
    impossible = []
    if manifest["trainer"] != run["trainer"]:
        impossible.append(f"It was saved by {manifest['trainer']}, not by {run['trainer']}.")
    saved_by = manifest.get("saved_by", run["saved_by"])  # older versions did not say
    if saved_by != run["saved_by"]:
        impossible.append(f"It was saved by {saved_by}, not by {run['saved_by']}.")
    elif "world_size" in names and saved_by.startswith("DeepSpeed"):
        impossible.append(
            f"It was saved by {before['world_size']} processes, whose shards DeepSpeed cannot give to "
            f"{now['world_size']}. Start as many as then."
        )
    if "optim" in names and not all(each["optim"].startswith("adamw_torch") for each in (before, now)):
        impossible.append(f"Its optimizer is {before['optim']}, not {now['optim']}.")
    if "beta" in names and before["beta"] == 0 and manifest["inside_generation"]:
        impossible.append(reference_is_missing(now["beta"]))
    data = ""
    if manifest["data"] != run["data"]:
        rows = [f"{each['rows']} rows" if each else "an iterable dataset" for each in (manifest["data"], run["data"])]
        data = (
            f"the training data are others, or in another order ({rows[0]} -> {rows[1]}): the checkpoint's place in "
            "them means nothing"
        )
    constant = all(each["lr_scheduler_type"] in CONSTANT for each in (before, now))
    skipped = (*NOT_TRAINED, "learning_rate", *(LENGTHS if constant else ()))
    words = {name: f"{name}: {before[name]} -> {now[name]}" for name in names if not name.startswith(skipped)}
    settings = [text for name, text in words.items() if not name.startswith(OF_OPTIMIZER)]
    if manifest["rewards"] != run["rewards"]:
        settings.append(f"rewards: {', '.join(manifest['rewards'])} -> {', '.join(run['rewards'])}")
    kept = [text for name, text in words.items() if name.startswith(OF_OPTIMIZER)]
    return Changes(impossible, data, before["learning_rate"] if "learning_rate" in names else None, settings, kept)


def reference_is_missing(beta: float) -> str:
    """A buffered generation without log-probs of the reference model cannot be continued with a KL penalty."""
    return (
        f"It stands inside a generation that was sampled with beta=0, without log-probs of the reference model, which "
        f"beta={beta} needs. Keep beta=0, or go on from a checkpoint between two generations."
    )


def refuse_changes(run: dict[str, Any], checkpoint: str | Path):
    """For a command, which has no reason to go on with other data.

    Args:
        run: What [`run_of`] says of it.

    Raises:
        ValueError: if the run cannot be the one that saved the checkpoint.
    """
    found = changes(run, checkpoint)
    data = [found.data[0].upper() + found.data[1:] + "."] if found.data else []
    if found.impossible or data:
        raise ValueError(
            f"The run cannot go on from {checkpoint}. {' '.join([*found.impossible, *data])} To train its model in "
            f"another run, give model_name_or_path={checkpoint} and another output_dir."
        )


def announce_changes(trainer: "DAPOTrainer", checkpoint: str | Path) -> Changes:
    """Say in one warning what resuming changes.

    Raises:
        ValueError: for what is impossible.
    """
    found = changes(run_of_trainer(trainer), checkpoint)
    if found.impossible:
        raise ValueError(f"The run cannot go on from {checkpoint}. {' '.join(found.impossible)}")
    new = []
    if found.learning_rate is not None:
        new = [f"learning_rate: {found.learning_rate} -> {trainer.args.learning_rate}"]
    sentences = []
    if new := [*new, *found.settings, *([found.data] if found.data else [])]:
        sentences.append(f"From here on: {'; '.join(new)}.")
    if found.kept:
        sentences.append(f"The optimizer keeps what it had: {'; '.join(found.kept)} is not applied.")
    if sentences and trainer.accelerator.is_main_process:
        logger.warning(f"This run is not the one that saved {checkpoint}. {' '.join(sentences)}")
    return found


def set_learning_rate(trainer: "DAPOTrainer", before: float):
    """Scale what the checkpoint's optimizer and scheduler restored to the learning rate of this run."""

    def scaled(rate):
        if before == 0 or rate == before:
            return trainer.args.learning_rate
        return rate * trainer.args.learning_rate / before

    for group in trainer.optimizer.param_groups:
        for name in {"lr", "initial_lr"} & set(group):
            group[name] = scaled(group[name])
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)  # accelerate wraps it
    for name in {"base_lrs", "_last_lr"} & set(vars(scheduler)):
        setattr(scheduler, name, [scaled(rate) for rate in getattr(scheduler, name)])
