"""What `fipo-trl train --help` says, and the flags that start processes."""

import argparse


DESCRIPTION = """Train a language model with FIPO, or with DAPO on the same recipe as the control arm.

    fipo-trl train --config recipes/tiny/fipo.yaml
    fipo-trl train --config recipes/tiny/fipo.yaml --trainer dapo --output_dir outputs/dapo
    fipo-trl train --config recipes/Qwen2.5-7B/fipo_lora.yaml --accelerate_config one_gpu

Every field of `FIPOConfig`, of TRL's `ModelConfig` and of TRL's script arguments is a flag and a key of the YAML file;
flags win. An unknown one is an error. Ctrl-C (or a job scheduler's SIGTERM) saves a checkpoint and stops;
`--resume_from_checkpoint latest` goes on from it.

exit status: 0 when training ran to its end, 130 after a signal, 3 after a collapse with on_collapse: stop (both leave
a checkpoint of the updates made), 1 for what is refused or fails.
"""
EPILOG = "--config RECIPE.yaml reads the settings below from a file."


def launch_parser() -> argparse.ArgumentParser:
    """The flags that go to accelerate. For its others, use `accelerate launch scripts/train_fipo.py`."""
    parser = argparse.ArgumentParser(
        prog="fipo-trl train",
        usage="fipo-trl train --config RECIPE.yaml [--SETTING VALUE ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--accelerate_config",
        metavar="YAML",
        help="how the run is spread: a file of `accelerate config`, or a name in recipes/accelerate such as one_gpu",
    )
    parser.add_argument("--num_processes", help="processes of all machines")
    parser.add_argument("--num_machines", help="machines")
    parser.add_argument("--machine_rank", help="number of this machine, from 0")
    parser.add_argument("--main_process_ip", help="address of machine 0")
    parser.add_argument("--main_process_port", help="a port of machine 0")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU where there is a GPU")
    return parser


def show_help():
    """Print the launcher's flags, and every setting."""
    from fipo_trl.recipe.read import Parser

    launch_parser().print_help()
    print()
    Parser(usage=argparse.SUPPRESS, add_help=False).print_help()
