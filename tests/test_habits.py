"""What is said twice is said alike: versions, targets of make, the map of the house."""

import re

import yaml
from conftest import ROOT
from test_architecture import ARROWS


MAKEFILE = (ROOT / "Makefile").read_text()
LOCK = (ROOT / "requirements-cpu.lock").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())


def test_the_makefile_lists_its_targets():
    targets = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[1].split()
    assert "test-fast" in targets
    assert sorted(re.findall(r"^# make (\S+) ", MAKEFILE, re.MULTILINE)) == sorted(targets)
    assert set(targets) <= set(re.findall(r"^(\S+):", MAKEFILE, re.MULTILINE))


def test_ruff_before_a_commit_is_that_of_make_lint():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = (each["rev"] for each in repositories if each["repo"].endswith("/ruff-pre-commit"))
    assert f"\nruff=={revision.removeprefix('v')}\n" in LOCK


def test_the_workflow_calls_make():
    commands = {
        name: [step["run"] for step in job["steps"] if "run" in step] for name, job in WORKFLOW["jobs"].items()
    }
    namespaces = "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"  # for the sandbox of programs
    assert commands["fast"] == [namespaces, "make install", "make lint", "make test-fast"]
    assert commands["whole"] == [namespaces, "make install", "make lint", "make test"]


def test_the_map_for_contributors_is_the_one_that_holds():
    rows = re.findall(r"^\| `(\w+)` \| .* \|(.*)\|$", (ROOT / ".github/CONTRIBUTING.md").read_text(), re.MULTILINE)
    said = {wing: set(re.findall(r"\w+", imports)) for wing, imports in rows}
    assert said.keys() == ARROWS.keys() - {"root"}
    everything = ARROWS.keys() - {"commands", "root", "engines"}
    for wing, imports in said.items():
        meant = everything if imports == {"all"} else imports - {"torch", "only", "and", "vLLM"}
        assert meant == ARROWS[wing] - {"root"}, wing
