"""kairos.yaml: what is taken, what defaults are, and how a mistake is told."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.domain import Control, Line, Profile
from kairos.scheduler_core.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "kairos.yaml"
SMALL = """
profiles:
  p: {gpu: g, model: m, step_times: {linear: {prefill: {b_s: 1.0e-5}, decode: {a_s: 0.01}}}}
fleet:
  prefill: [{profile: p}]
  decode: [{profile: p}]
"""


def load(folder: Path, text: str, **environ: str) -> Settings:
    path = folder / "kairos.yaml"
    path.write_text(text)
    return load_settings(path, environ)


def refusal(folder: Path, text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load(folder, text, **environ)
    message = str(raised.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder / 'kairos.yaml'}").removeprefix(": ")


# -- what is taken ---------------------------------------------------------------------------------------------------


def test_the_example_is_valid_and_read_as_written() -> None:
    settings = load_settings(EXAMPLE, {})

    profile = settings.profiles["qwen3-32b-b300-tp4"]
    assert profile.as_profile() == Profile("B300-SXM6", "Qwen/Qwen3-32B", "bf16", 4, 1, "vllm")
    assert profile.step_times is not None
    assert profile.step_times.linear is not None
    assert profile.step_times.linear.as_step_times().prefill == Line(0.0082, 1.48e-5, 3.9e-10)
    assert (settings.fleet.prefill[0].count, settings.fleet.prefill[0].max_requests_per_step) == (2, 8)
    assert settings.fleet.kv_transfer.bytes_per_s == 25e9
    assert settings.strategies["tuned"].prefill.params == {"lost_last": True, "preempt": True}
    assert settings.strategies["paper"].admission.name == "accept-all"


def test_profiles_and_a_fleet_are_enough_and_the_rest_has_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path, SMALL)

    prefill, decode = settings.fleet.prefill[0], settings.fleet.decode[0]
    assert (prefill.count, prefill.chunk_tokens, prefill.max_requests_per_step) == (1, None, 1)
    assert (prefill.prefix_cache, prefill.kv_tokens, prefill.kv_held_tokens) == (False, None, None)
    assert (decode.max_batch, decode.batch_limit, decode.kv_tokens, decode.swap_out) == (64, None, None, "free")
    assert (prefill.control, prefill.url, prefill.engine) == (Control.ENGINE, None, None)
    assert settings.fleet.handover.model_dump() == {"first_token": "prefill", "place_decode": "at_ready"}
    assert (settings.slo.classes["default"].ttft_s, settings.slo.classes["default"].tpot_s) == (2.0, 0.05)
    assert (settings.guards.deferred_share, settings.guards.decision_budget_s) == (0.05, 0.05)
    assert set(settings.strategies) == {"engine-default", "tuned", "paper", "kairos"}
    assert settings.active == "kairos"
    assert settings.service.model_dump() == {
        "host": "127.0.0.1",
        "port": 8011,
        "max_requests": 20_000,
        "max_body_bytes": 67_108_864,
        "clock_scale": 1.0,
        "schedule_key": None,
        "client_timeout_s": 30.0,
        "log_format": "json",
        "drain_s": 20.0,
        "drain_notice_s": 2.0,
    }


@pytest.mark.parametrize("notation", ["1e-05", "0.00001", "1.0E-5", "'1e-5'", "+.00001"])
def test_a_number_may_be_written_in_any_notation_that_float_takes(tmp_path: Path, notation: str) -> None:
    settings = load(tmp_path, SMALL.replace("1.0e-5", notation))

    times = settings.profiles["p"].step_times
    assert times is not None
    assert times.linear is not None
    assert times.linear.prefill.b_s == 1e-5


@pytest.mark.parametrize("notation", ["1200000", "1.2e6", "1.2e+6", "1_200_000"])
def test_a_count_may_be_written_in_any_notation_too(tmp_path: Path, notation: str) -> None:
    text = SMALL.replace("decode: [{profile: p}]", f"decode: [{{profile: p, kv_tokens: {notation}}}]")

    assert load(tmp_path, text).fleet.decode[0].kv_tokens == 1_200_000


def test_a_policy_is_a_name_or_a_mapping_with_its_parameters_beside_the_name(tmp_path: Path) -> None:
    mine = "{prefill: my.module:Policy, prefill_placement: late, decode_placement: x, decode: {name: slack, h: 9e-1}}"

    strategy = load(tmp_path, f"{SMALL}\nstrategies: {{mine: {mine}}}\nactive: mine").strategies["mine"]

    assert (strategy.prefill.name, strategy.prefill.params) == ("my.module:Policy", {})
    assert (strategy.decode.name, strategy.decode.params) == ("slack", {"h": 0.9})
    assert strategy.admission.name == "accept-all"


def test_own_strategies_stand_beside_the_shipped_and_may_replace_them(tmp_path: Path) -> None:
    kairos = "{prefill: edf, prefill_placement: late, decode_placement: headroom, decode: continuous}"

    settings = load(tmp_path, f"{SMALL}\nstrategies: {{kairos: {kairos}}}")

    assert settings.strategies["kairos"].prefill.name == "edf"
    assert "tuned" in settings.strategies


def test_the_default_class_is_there_whatever_classes_are_named(tmp_path: Path) -> None:
    classes = load(tmp_path, f"{SMALL}\nslo: {{classes: {{batch: {{ttft_s: 30, tpot_s: null}}}}}}").slo.classes

    assert (classes["default"].ttft_s, classes["batch"].ttft_s, classes["batch"].tpot_s) == (2.0, 30.0, None)


def test_a_group_serves_its_profiles_model_unless_it_names_others_and_its_adapters(tmp_path: Path) -> None:
    text = SMALL.replace(
        "prefill: [{profile: p}]", "prefill: [{profile: p}, {profile: p, serves: [a, b], adapters: [l]}]"
    )
    settings = load(tmp_path, text)

    served = [settings.served_models(group) for group in settings.fleet.prefill]

    assert served == [("m",), ("a", "b", "l")]


def test_settings_survive_being_dumped_and_read_again(tmp_path: Path) -> None:
    settings = load_settings(EXAMPLE, {})

    assert load(tmp_path, yaml.safe_dump(settings.model_dump(mode="json"))) == settings


# -- what is refused -------------------------------------------------------------------------------------------------

LIVE = "{profile: p, url: 'http://10.0.0.1:8000', engine: vllm, control: gateway+priority}"


def test_live_workers_have_an_address_and_an_engine(tmp_path: Path) -> None:
    group = load(tmp_path, SMALL.replace("decode: [{profile: p}]", f"decode: [{LIVE}]")).fleet.decode[0]

    assert (group.url, group.engine, group.control) == ("http://10.0.0.1:8000", "vllm", Control.GATEWAY_PRIORITY)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("gpu: g", "gpuu: g", "profiles.p.gpuu: unknown setting. Did you mean 'gpu'?"),
        ("{profile: p}]\n  decode", "{profile: p, chunk_tokns: 5}]\n  decode", "fleet.prefill[0].chunk_tokns: unknown"),
        (
            "fleet:",
            "guads: {}\nfleet:",
            "guads: unknown setting. Did you mean 'guards'? Known: access, active, decisions",
        ),
        (
            "a_s: 0.01",
            "a_s: -0.01",
            "linear.decode.a_s: input should be greater than or equal to 0, got -0.01",
        ),
        ("a_s: 0.01", "a_s: .nan", "step_times.linear.decode.a_s: input should be a finite number, got nan"),
        ("a_s: 0.01", "a_s: .inf", "step_times.linear.decode.a_s: input should be a finite number, got inf"),
        ("a_s: 0.01", "a_s: 'inf'", "step_times.linear.decode.a_s: input should be a finite number, got 'inf'"),
        ("a_s: 0.01", "a_s: true", "step_times.linear.decode.a_s: a number is expected, got True"),
        ("a_s: 0.01", "a_s: fast", "step_times.linear.decode.a_s: a number is expected, got 'fast'"),
        ("a_s: 0.01", "a_s: 0", "step_times.linear.decode: a step must take time; give at least one of a_s, b_s, c_s"),
        ("decode: [{profile: p}]", "", "fleet.decode: a fleet needs at least one decode instance"),
        ("prefill: [{profile: p}]", "prefill: []", "fleet.prefill: a fleet needs at least one prefill instance"),
        ("decode: [{profile: p}]", "decode: null", "fleet.decode: a fleet needs at least one decode instance"),
        (
            "decode: [{profile: p}]",
            "decode: [{profile: p, count: 0}]",
            "decode[0].count: input should be greater",
        ),
        ("decode: [{profile: p}]", "decode: [{profile: p, count: -2}]", "equal to 1, got -2"),
        ("decode: [{profile: p}]", "decode: [{profile: p, count: 1.5}]", "fleet.decode[0].count: input should be"),
        ("decode: [{profile: p}]", "decode: [{profile: p, count: 1e400}]", "fleet.decode[0].count: input should be"),
        ("decode: [{profile: p}]", "decode: [{count: 1}]", "fleet.decode[0].profile: is missing"),
        ("decode: [{profile: p}]", "decode: [{profile: q}]", "fleet.decode[0].profile: unknown profile 'q'"),
        ("decode: [{profile: p}]", "decode: {profile: p}", "fleet.decode: input should be a valid tuple"),
        ("decode: [{profile: p}]", "decode: [{profile: p, url: 10.0.0.1}]", "fleet.decode[0].url: string should match"),
        ("prefill: [{profile: p}]", "prefill: [{profile: p, prefix_cache: true}]", "prefix_cache needs kv_tokens"),
        ("fleet:", "active: kairo\nfleet:", "active: unknown strategy 'kairo'. Did you mean 'kairos'?"),
        (
            "fleet:",
            "guards: {deferred_share: 1.5}\nfleet:",
            "guards.deferred_share: input should be less",
        ),
        ("fleet:", "strategies: {x: {prefill: fcfs}}\nfleet:", "strategies.x.decode: is missing"),
        ("fleet:", "strategies: 5\nfleet:", "strategies: input should be a valid dictionary, got 5"),
        ("step_times: {linear", "step_times: {model: x, linear", "profiles.p.step_times: give either linear or model"),
        ("gpu: g", "gpu: g, gpu: h", ", line 3, column 15: 'gpu' is given twice"),
        ("profiles:", "profiles: [", "line 4, column 1"),
        ("gpu: g", "gpu: 2001-13-45", "is not YAML"),
        ("gpu: g", "gpu: !!python/object:os.system x", "could not determine a constructor for the tag"),
        ("gpu: g", "[1]: g", "line 3"),
        ("p: {gpu: g", "1: {gpuu: g", "profiles[1].gpuu: unknown setting. Did you mean 'gpu'?"),
    ],
)
def test_a_mistake_is_told_with_the_path_of_its_setting(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in SMALL

    assert told in refusal(tmp_path, SMALL.replace(old, new, 1))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    told = refusal(tmp_path, SMALL.replace("gpu: g", "gpuu: g").replace("a_s: 0.01", "a_s: x")).split("; ")

    assert [problem.split(":")[0] for problem in told] == [
        "profiles.p.gpu",
        "profiles.p.step_times.linear.decode.a_s",
        "profiles.p.gpuu",
    ]


@pytest.mark.parametrize("text", ["", "5", "[profiles]", "just words"])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text).startswith("needs sections (profiles, fleet, ...), holds")


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\); check the path"):
        load_settings(tmp_path / "none.yaml", {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        load_settings(tmp_path / "binary.yaml", {})


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["p", "name", "count", "profile", "x"]) | st.integers(0, 3), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@given(section=st.sampled_from(sorted(Settings.model_fields)), value=json_values)
@hypothesis_settings(max_examples=150, deadline=None)
def test_whatever_a_section_holds_the_answer_is_settings_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, section: str, value: Any
) -> None:
    document = yaml.safe_load(SMALL) | {section: value}
    path = tmp_path_factory.mktemp("config") / "kairos.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")

    told = f"{path}: {section}"
    try:
        load_settings(path, {})
    except ConfigError as error:
        told = str(error)

    assert str(path) in told
    assert section in told or "profile" in told


def test_the_environment_of_the_process_is_used_when_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "KAIROS_ACTIVE", "paper")
    path = tmp_path / "kairos.yaml"
    path.write_text(SMALL)

    assert load_settings(path).active == "paper"


def test_a_model_beside_the_file_is_found_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "model.kairos").write_bytes(b"")
    file = tmp_path / "kairos.yaml"
    file.write_text(
        "profiles: {p: {gpu: g, model: m, step_times: {model: model.kairos}}}\n"
        "fleet: {prefill: [{profile: p}], decode: [{profile: p}]}\n"
    )
    times = load_settings(file, {}).profiles["p"].step_times

    assert times is not None
    assert times.model == str(tmp_path / "model.kairos")
