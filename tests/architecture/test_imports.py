"""What may import what, and what comes along when Kairos is imported."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kairos
from kairos.policies.checks import IMPURE_MODULES

ROOT = Path(kairos.__file__).parents[2]
FOLDERS = ("adapters", "migrations", "policies", "predictors", "scheduler_core")
RULES = sorted((ROOT / "policies").glob("*/*.py"))


def python(program: str, cwd: Path, *arguments: str) -> str:
    """What a fresh Python prints, away from the checkout."""
    ended = subprocess.run([sys.executable, "-c", program, *arguments], cwd=cwd, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_importing_all_of_kairos_leaves_no_bare_name_behind(tmp_path: Path) -> None:
    program = """
import importlib, pkgutil, sys, kairos
for found in pkgutil.walk_packages(kairos.__path__, "kairos."):
    importlib.import_module(found.name)
print(sorted(name for name in sys.modules if name.partition(".")[0] in sys.argv[1:]))
print(len([name for name in sys.modules if name.startswith("kairos.")]) > 60)
"""
    assert python(program, tmp_path, *FOLDERS) == "[]\nTrue\n"


def test_the_contracts_of_the_layers_hold() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 broken" in ended.stdout


# What `pip install kairos-scheduler` alone does not bring, and lightgbm, which comes along but is loaded late.
ABSENT = (
    *("fastapi", "httpx", "jinja2", "joblib", "lightgbm", "pyarrow", "pydantic", "pydantic_settings", "rich"),
    *("scipy", "sklearn", "sqlalchemy", "starlette", "torch", "typer", "uvicorn"),
)

CORE = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
from kairos.scheduler_core.decider import Decider, decode_view
from kairos.scheduler_core.domain import DecodeInstance, Line, LinearStepTimes, PrefillInstance, Resident, Waiting
from kairos.scheduler_core.plugins import POLICY_KINDS, installed, policy_class
from kairos.scheduler_core.strategy import parse_strategy
from kairos.policies.checks import check_policy

for kind in POLICY_KINDS:
    for name, point in installed(kind).items():
        if point.module.startswith("kairos."):
            check_policy(policy_class(kind, name), kind)

times = LinearStepTimes(Line(0.01, 1e-5, 0.0), Line(0.01, 1e-4, 0.0))
decider = Decider(parse_strategy("on-time+late+headroom+envelope"))
lane = decider.prefill_lane(PrefillInstance("p", times), decider.prefill_rule())
lane.own.add(Waiting("a", 0.0, 1000, 2.0, 2.0, 0.02, 0.02), 0.0)
instance = DecodeInstance("d", times)
decode = decider.next_decode(
    decider.decode_policy(instance), decode_view(0.0, instance, [], [Resident("b", 1000, 1, 0.0, 0.05, 0.05)])
)
print(decider.next_prefill(lane, 0.0).request_ids, list(decode.plan.admit), decode.reason)
"""


def test_the_core_and_every_policy_decide_where_only_the_base_is_installed(tmp_path: Path) -> None:
    assert python(CORE, tmp_path, *ABSENT) == "['a'] ['b'] policy\n"


def test_a_missing_library_would_be_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="msgspec is not installed"):
        python(CORE, tmp_path, *ABSENT, "msgspec")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "policies").glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_policy_imports_only_the_core_msgspec_and_what_is_pure(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add(str(node.module))

    pure = sys.stdlib_module_names - IMPURE_MODULES
    core = {f"kairos.scheduler_core.{name}" for name in ("domain", "policy", "queue", "slo")}
    strangers = {name for name in imported if name.partition(".")[0] not in pure | {"msgspec"}} - core

    assert not strangers


def test_check_policy_forbids_at_least_what_the_contract_of_the_layers_forbids() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    pure = next(contract for contract in contracts if contract["name"] == "Policies are pure")

    assert set(pure["forbidden_modules"]) - {"torch", "pydantic"} <= IMPURE_MODULES


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_package_is_a_link_in_the_import_name(folder: str) -> None:
    link = Path(kairos.__file__).parent / folder

    assert link.resolve() == (ROOT / folder).resolve()
    assert (Path(kairos.__file__).parent / "py.typed").exists()
