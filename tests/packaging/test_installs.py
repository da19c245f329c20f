"""What is built holds what is needed and nothing else, and works where it is installed."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("scheduler_core", "predictors", "policies", "adapters", "migrations")
PYTHON_FILES = {
    f"kairos/{path.relative_to(ROOT).as_posix()}"
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
}
DATA_FILES = {
    f"kairos/{path.relative_to(ROOT).as_posix()}"
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".html", ".css", ".js", ".yaml", ".json", ".mako")
}

pytestmark = pytest.mark.packaging


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    ended = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it, in an isolated environment, as for a release."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment with the wheel; its dependencies are those of this environment."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    (wheel,) = built.glob("*.whl")
    python = environment / "bin" / "python"
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    run(*command, cwd=environment, env=outside())  # a source tree on the path would count as installed
    (packages,) = environment.glob("lib/python*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(f"{ours}\n")
    return environment / "bin"


def outside(**more: str) -> dict[str, str]:
    """An environment in which nothing leads to the source tree."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "KAIROS_"))} | more


def test_the_wheel_holds_all_packages_templates_fleets_and_statistics_and_no_tests(built: Path) -> None:
    (wheel,) = built.glob("kairos_scheduler-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    assert names >= PYTHON_FILES | DATA_FILES | {"kairos/__init__.py", "kairos/py.typed"}
    assert {name.split("/")[0] for name in names} == {"kairos", wheel.name.partition("-py3")[0] + ".dist-info"}
    assert not [name for name in names if "test_" in name or "/tests/" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_sources_as_files(built: Path) -> None:
    (sdist,) = built.glob("kairos_scheduler-*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}

    for name in (*PYTHON_FILES, *DATA_FILES):
        assert members[f"src/{name}"].isfile(), name
    assert not [name for name in members if name.startswith((".venv", "demo-out"))]


def test_an_installed_wheel_runs_without_the_source_tree(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import kairos; print(kairos.__file__)", cwd=tmp_path, env=outside())
    (tmp_path / "trace.csv").write_text(
        "arrival_s,input_tokens,output_tokens\n" + "".join(f"{n / 4},{500 * (n % 5 + 1)},9\n" for n in range(60))
    )

    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "compare" in run(installed / "kairos", "--help", cwd=tmp_path, env=outside())
    policies = json.loads(run(installed / "kairos", "policies", "--json", cwd=tmp_path, env=outside()))
    assert {"on-time", "envelope", "late", "headroom", "kairos-paper"} <= {policy["name"] for policy in policies}
    compare = ("compare", "trace.csv", "--fleet", "b300", "--strategies", "engine-default,kairos", "--seeds", "1")
    shown = run(installed / "kairos", *compare, "--jobs", "1", "--out", "out", cwd=tmp_path, env=outside())
    assert "no scheduler exceeds" in shown
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    run(installed / "kairos", "trace", "generate", "--duration", "30", "-o", "made.csv", cwd=tmp_path, env=outside())


def test_an_installed_wheel_finds_its_migrations(installed: Path, tmp_path: Path) -> None:
    database = ("--url", "sqlite:///kairos.db")
    upgraded = run(installed / "kairos", "db", "upgrade", *database, cwd=tmp_path, env=outside())
    known = json.loads(run(installed / "kairos", "db", "current", *database, "--json", cwd=tmp_path, env=outside()))

    assert "empty -> " in upgraded
    assert known["current"] == known["head"]


def test_the_editable_install_of_this_environment_is_the_source_tree_itself(tmp_path: Path) -> None:
    ask = "import importlib.metadata as m; print(m.distribution('kairos-scheduler').read_text('direct_url.json'))"
    told = run(Path(sys.executable), "-c", ask, cwd=tmp_path, env=outside())
    if json.loads(told)["url"] != ROOT.as_uri():
        pytest.skip(f"this environment has another checkout installed: {told}")
    found = run(
        Path(sys.executable), "-c", "import kairos.policies.prefill as p; print(p.__file__)", cwd=tmp_path,
        env=outside(),
    )  # fmt: skip

    assert Path(found.strip()).resolve() == ROOT / "policies" / "prefill" / "__init__.py"


def test_the_base_install_decides_and_predicts_without_the_extras(tmp_path: Path) -> None:
    base = ("msgspec", "numpy", "yaml")
    program = f"""
import importlib, sys, types

class Only:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {(*base, "kairos")!r}:
            raise ModuleNotFoundError(f"{{name}} is no dependency of the base install", name=name)

sys.meta_path.insert(0, Only())
from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.plugins import POLICY_KINDS, installed, policy_class
from kairos.scheduler_core.strategy import parse_strategy
for kind in POLICY_KINDS:
    for name in installed(kind):
        policy_class(kind, name)
Decider(parse_strategy("on-time+late+headroom+envelope").check(), 0.05)
for name in ("telemetry", "guards", "decision", "slo"):
    importlib.import_module("kairos.scheduler_core." + name)
from kairos.predictors.artifact import load, save
save([], __import__("pathlib").Path("model.kairos"))
print(len(load(__import__("pathlib").Path("model.kairos")).profile_ids))
"""

    assert run(sys.executable, "-c", program, cwd=tmp_path) == "0\n"


def test_no_name_of_ours_but_kairos_is_taken_in_other_programs(tmp_path: Path) -> None:
    program = "import sys, kairos.adapters.cli, kairos.scheduler_core.decider; print(*sys.modules, sep='\\n')"

    names = {name.partition(".")[0] for name in run(sys.executable, "-c", program, cwd=tmp_path).split()}

    assert names.isdisjoint(FOLDERS)
