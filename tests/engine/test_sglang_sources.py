"""SGLang's own sources, as far as a GPU is not needed: its hook registry at work, the hooked functions read.

SGLang itself cannot be installed here (its kernel package has no build for CPUs); it has not been run.
"""

import ast
import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from engine.engines import ENGINES, ROOT
from fake_sglang import Req, SchedulePolicy, Scheduler

from kairos.adapters import sglang as plugin
from kairos.adapters.sglang import hooks

pytestmark = pytest.mark.engine

VERSION = hooks.TESTED[-1]
FOLDER = ENGINES / f"sources-sglang-{VERSION}"


@pytest.fixture(scope="module")
def sources() -> Path:
    """The folder `sglang/srt` of the unpacked wheel."""
    if not (FOLDER / "sglang" / "srt" / "managers").exists():
        subprocess.run([ROOT / "tests" / "engine" / "sources", "sglang", VERSION, FOLDER], check=True)
    return FOLDER / "sglang" / "srt"


@pytest.fixture
def registry(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's hook registry, with the fake scheduler where its own would be."""
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.managers"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    name = "sglang.srt.plugins.hook_registry"
    spec = importlib.util.spec_from_file_location(name, sources / "plugins" / "hook_registry.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    for owner, path in ((Scheduler, plugin.SCHEDULER), (SchedulePolicy, plugin.POLICY)):
        holder = types.ModuleType(path.rpartition(".")[0])
        monkeypatch.setitem(sys.modules, holder.__name__, holder)
        monkeypatch.setattr(
            sys.modules["sglang.srt.managers"], holder.__name__.rpartition(".")[2], holder, raising=False
        )
        copy = type(owner.__name__, (owner,), dict(vars(owner)))
        setattr(holder, owner.__name__, copy)
    return module.HookRegistry


def test_sglangs_registry_takes_every_hook_and_they_take_effect(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other,kairos")
    monkeypatch.setenv("KAIROS_ENGINE_STRATEGY", "edf+late+headroom+continuous")
    monkeypatch.setattr(hooks, "installed_version", lambda name: VERSION)
    plugin.register()
    registry.apply_hooks()
    managers: Any = sys.modules["sglang.srt.managers"]
    monkeypatch.setattr("fake_sglang.SchedulePolicy", managers.schedule_policy.SchedulePolicy)
    scheduler = managers.scheduler.Scheduler()
    waiting = [Req("slow", 100, kairos_ttft_s=9.0), Req("urgent", 100, kairos_ttft_s=1.0)]

    scheduler.policy.calc_priority(waiting)

    assert registry._patched == {target for target in registry._hooks}
    assert len(registry._patched) == 5
    assert [req.rid for req in waiting] == ["urgent", "slow"]


@pytest.mark.parametrize(
    ("file", "function", "arguments"),
    [
        (
            "managers/schedule_policy.py",
            "calc_priority",
            ["self", "waiting_queue", "running_batch", "processed_tokens"],
        ),
        (
            "managers/schedule_policy.py",
            "shortest_prefill_chunk_limit",
            ["self", "chunked_req", "waiting_queue", "budget", "page_size"],
        ),
        ("managers/scheduler.py", "init_schedule_policy", ["self"]),
        ("managers/scheduler.py", "process_batch_result", ["self", "batch", "result"]),
        ("disaggregation/decode.py", "_get_new_prebuilt_batch", ["self", "running_batch"]),
    ],
)
def test_the_hooked_functions_are_there_with_the_arguments_the_hooks_take(
    sources: Path, file: str, function: str, arguments: list[str]
) -> None:
    tree = ast.parse((sources / file).read_text())

    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]

    assert [argument.arg for argument in found.args.args] == arguments


@pytest.mark.parametrize(
    ("file", "names"),
    [
        (
            "managers/schedule_batch.py",
            ["rid", "origin_input_ids", "output_ids", "num_matched_prefix_tokens", "sampling_params"],
        ),
        ("managers/scheduler.py", ["tp_size", "page_size", "chunked_prefill_size", "waiting_queue", "policy"]),
        ("sampling/sampling_params.py", ["custom_params"]),
    ],
)
def test_the_attributes_that_are_read_are_set(sources: Path, file: str, names: list[str]) -> None:
    tree = ast.parse((sources / file).read_text())

    stored = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }

    declared = {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert set(names) <= stored | declared
