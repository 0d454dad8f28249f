"""What a user types: arguments and printing. The work is done elsewhere."""

import argparse
import importlib
import sys

from fipo_trl import __version__


# command: module, summary. A module is imported when its command is called
COMMANDS = {
    "train": ("launch", "train a model by a recipe, on this machine's processes or on several machines"),
    "evaluate": ("evaluate", "sample answers of a saved model, and report avg@n, cons@n and pass@k with intervals"),
    "doctor": ("doctor", "what a recipe will do and need: batches, the paper's table, memory, cost"),
    "report": ("report", "draw the paper's figures of finished runs, side by side"),
    "compare": ("compare", "train and evaluate several arms and seeds, or compare finished runs, with intervals"),
    "token-credit": ("token_credit", "make one HTML page of the weights that tokens got"),
    "credit-fidelity": ("credit_fidelity", "sample the true credit of tokens, and correlate their weights with it"),
    "vllm-server-command": ("vllm_server_command", "print how to start the vLLM server that a recipe needs"),
    "recipes": ("recipes", "list the recipes that come with this package, or copy one"),
}


def main(arguments: list[str] | None = None):
    """Run a command. Its exit status is that of the process; 1 with a message for what is refused."""
    summaries = "\n".join(f"  {name:21}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fipo-trl",
        usage="fipo-trl COMMAND ...",
        description=f"FIPO and DAPO for Hugging Face TRL.\n\ncommands:\n{summaries}",
        epilog="fipo-trl COMMAND --help says more, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments[:1] or ["--help"])
    module = importlib.import_module(f"fipo_trl.commands.{COMMANDS[options.command][0]}")
    module.main(arguments[1:])
