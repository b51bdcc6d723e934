"""The files around the code agree with it: one version everywhere, and hooks that run what `make lint` runs."""

import re
import tomllib

import yaml
from tiny import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_and_one_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    released = re.findall(r"^## \[(\d[\d.]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == (citation["version"], citation["date-released"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_hooks_run_this_projects_own_tools():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"  # nothing is fetched
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    programs = {hook["entry"].split()[0] for hook in local["hooks"]}
    assert programs == {".venv/bin/ruff", ".venv/bin/python", ".venv/bin/mypy"}
    development = {re.match(r"[\w-]+", each)[0] for each in PROJECT["optional-dependencies"]["dev"]}
    assert {"ruff", "mypy"} <= development
