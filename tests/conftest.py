import logging
import os
from pathlib import Path

import pytest
from cpu_ranks import Ranks


ROOT = Path(__file__).parents[1]

# One thread per process: several test processes share the cores, and OpenMP threads that wait for each other are slow
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and says so wherever it is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is how the tests fix the completions
# What tests start as processes of their own may import the helpers, as pytest's `pythonpath` lets the tests do
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True, scope="session")
def in_root():
    """Recipes name files from the root of the repository. A test that goes elsewhere does so with monkeypatch."""
    os.chdir(ROOT)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Forks processes that train together. The first test that asks waits for the imports."""
    forked = Ranks(tmp_path_factory.mktemp("ranks"))
    yield forked
    forked.close()


@pytest.fixture(autouse=True)
def loggers_as_imported():
    """Commands set the level of the package's logger, and some libraries disable loggers, for all of their process."""
    yield
    logging.disable(logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "fipo_trl" and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
