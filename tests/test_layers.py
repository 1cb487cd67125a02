"""Dependencies run one way (design, section 3), and importing starts nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lasgd
from lasgd.algorithms import registry

ROOT = Path(lasgd.__file__).parent

CORE = {"errors", "health", "layout", "merge", "tally", "fences", "pace", "window", "latest_mean", "replica", "wire"}

MAY_IMPORT = {
    "errors": set(),
    "tally": set(),
    "merge": {"errors"},
    "momentum": set(),
    "fences": set(),
    "stalls": set(),
    "wire": {"errors"},
    "layout": {"errors"},
    "health": {"layout"},
    "pace": {"algorithms.requests", "errors", "health", "tally"},
    "window": {"layout"},
    "latest_mean": {"window"},
    "replica": {
        "algorithms.requests",
        "errors",
        "fences",
        "health",
        "latest_mean",
        "layout",
        "merge",
        "tally",
        "window",
    },
    "algorithms": {"algorithms", "pace", "replica", "errors", "momentum"},
    "group": {"group", "errors"},
    "runtime": {"runtime", "group", "algorithms.registry", "algorithms.requests", *CORE},
    "virtual": {"virtual", "group.cost", "algorithms.requests", "stalls", *CORE},
}
"""By module or package: what it may import of lasgd, each name standing for all that is below it."""


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts), path)
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0].removesuffix(".py") in MAY_IMPORT
    ]


def imports_of_lasgd(path: Path) -> set[str]:
    """What a module imports of lasgd, without the leading `lasgd.`; functions' own imports too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT.parent / Path(*full.split("."))).with_suffix(".py").exists()
                found.add(full if is_module else node.module)
    return {name.removeprefix("lasgd.") for name in found if name.split(".")[0] == "lasgd"}


@pytest.mark.parametrize("name, path", modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_what_its_layer_may(name, path):
    allowed = MAY_IMPORT[name.split(".")[0]]
    strangers = {
        found
        for found in imports_of_lasgd(path)
        if not any(found == entry or found.startswith(entry + ".") for entry in allowed)
    }
    assert not strangers


def test_every_rule_of_the_table_is_about_something_that_exists():
    for name in MAY_IMPORT:
        assert (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()


@pytest.mark.parametrize("package", ["group", "runtime", "virtual"])
def test_drivers_know_no_algorithm_by_name(package):
    # attach's default value is an option like any other; no code may depend on it.
    names = set(registry.names())
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not constants & names, f"{path}:{node.lineno}"


def test_importing_lasgd_starts_no_thread_and_imports_nothing_it_may_not_need():
    code = (
        "import sys, threading, lasgd\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "heavy = {'rich', 'kornia', 'sklearn', 'cyclopts', 'PIL', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["compute_models", "step_times", "network_models", "schedules", "flows"])
def test_models_of_virtual_time_need_no_torch(name):
    assert "torch" not in (ROOT / "virtual" / f"{name}.py").read_text()


def test_public_names_exist():
    assert all(hasattr(lasgd, name) for name in lasgd.__all__)
