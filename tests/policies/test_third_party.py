"""A policy in a package of its own is found, simulated, compared and served by name; docs/write-a-policy.md is true."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import kairos

ROOT = Path(kairos.__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_policy"
PAGE = (ROOT / "docs" / "write-a-policy.md").read_text()


def blocks(language: str) -> list[str]:
    """The page's blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def installed_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example as an install leaves it: its module and its metadata."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copy(EXAMPLE / "my_policy.py", folder)
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def run(arguments: list[str], site_packages: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command in a process that has the package, with this Python's programs on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PYTHONPATH": str(site_packages), "PATH": path}
    return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_page_shows_the_package_as_it_is() -> None:
    assert blocks("python")[0] == (EXAMPLE / "my_policy.py").read_text()
    assert blocks("toml")[0] in (EXAMPLE / "pyproject.toml").read_text()


def test_the_policy_has_less_than_fifty_lines() -> None:
    assert len((EXAMPLE / "my_policy.py").read_text().splitlines()) < 50


def test_every_block_of_the_page_runs_in_order(installed_in: Path, tmp_path: Path) -> None:
    for block in blocks("python"):
        ended = run([sys.executable, "-c", block], installed_in, tmp_path)
        assert ended.returncode == 0, ended.stderr
    printed = ""
    for block in blocks("bash"):
        ended = run(["bash", "-euo", "pipefail", "-c", block], installed_in, tmp_path)
        assert ended.returncode == 0, ended.stderr
        printed += ended.stdout

    assert "rescue-short" in printed
    assert (tmp_path / "run" / "summary.json").exists()
    assert "rescue-short" in (tmp_path / "comparison" / "results.json").read_text()
    assert (tmp_path / "comparison" / "report.html").exists()


SERVED = """
import sys
from pathlib import Path

from fastapi.testclient import TestClient
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.service.app import create_app

snapshot = {
    "now_s": 0.0,
    "instances": [
        {"instance_id": "p", "role": "prefill", "profile": "qwen3-32b-b300-tp4"},
        {"instance_id": "d", "role": "decode", "profile": "qwen3-32b-b300-tp4"},
    ],
    "waiting": [
        {"request_id": "due", "arrival_s": 0.0, "prompt_tokens": 9000, "ttft_target_s": 2.0},
        {"request_id": "late", "arrival_s": 0.0, "prompt_tokens": 9000, "ttft_target_s": 9.0},
        {"request_id": "short", "arrival_s": 0.0, "prompt_tokens": 100, "ttft_target_s": 0.3},
        {"request_id": "long", "arrival_s": 0.0, "prompt_tokens": 9000, "ttft_target_s": 0.25},
    ],
}
answer = TestClient(create_app(load_settings(Path(sys.argv[1])))).post("/schedule", json=snapshot)
assert answer.status_code == 200, answer.text
decisions = sorted(answer.json()["prefill"], key=lambda decision: decision["order"])
print(answer.json()["strategy"], [decision["request_id"] for decision in decisions])
"""


def test_the_service_answers_with_it_by_name(installed_in: Path, tmp_path: Path) -> None:
    yours = (ROOT / "examples" / "kairos.yaml").read_text()
    before, _, _ = yours.partition("\nstrategies:")
    (tmp_path / "kairos.yaml").write_text(f"{before}\n{blocks('yaml')[0]}")

    ended = run([sys.executable, "-c", SERVED, "kairos.yaml"], installed_in, tmp_path)

    # margins of long and short are under 0.5 s, short is shorter; due and late follow by deadline
    assert ended.stdout.split(" ", 1) == ["rescue", "['short', 'long', 'due', 'late']\n"], ended.stderr


def builds_offline() -> bool:
    """Whether pip and a setuptools that builds wheels by itself are here."""
    try:
        return bool(version("pip")) and tuple(map(int, version("setuptools").split(".")[:2])) >= (70, 1)
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not builds_offline(), reason="needs pip and setuptools 70.1 or later in the environment")
def test_pip_installs_it_and_kairos_finds_it(tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "my_policy")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    install = [sys.executable, "-m", "pip", "install", *options, "--target", "installed", str(source)]
    ended = run(install, tmp_path, tmp_path)
    assert ended.returncode == 0, ended.stderr
    shutil.rmtree(source)

    listed = run(["kairos", "policies", "--json"], tmp_path / "installed", tmp_path)

    assert '"rescue-short"' in listed.stdout
