"""docs/results.md and sections of other pages, from the results files: no figure is typed.

python benchmarks/tables.py
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
OURS = "on-time"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def made_by(results: dict[str, Any]) -> str:
    """How a section's figures were made."""
    meta = results["meta"]
    return f"`{meta['command']}` on {meta['machine']}, seeds {meta['seeds'] or 'none'}."


def prefill(results: dict[str, Any]) -> str:
    """TTFT attainment of `on-time` beside the best other policy and the bound."""
    rows = []
    for cell in results["cells"]:
        d = cell["difference_pp"]
        interval = "too short for an interval" if d["low"] is None else f"{d['low']:+.1f} to {d['high']:+.1f}"
        attained = cell["attained"]
        rows.append(
            (
                cell["trace"],
                cell["target"],
                cell["load"],
                f"{cell['bound']:.1f}",
                f"{attained[OURS]:.1f}",
                f"{attained[cell['best_other']]:.1f} `{cell['best_other']}`",
                f"{d['mean']:+.2f} ({interval})",
                f"{attained['fcfs']:.1f}",
            )
        )
    goals = [(name, f"{results['summary'][name]:.3g}", f"{goal:g}") for name, goal in results["goals"].items()]
    head = ("trace", "target", "load", "bound", "`on-time`", "best other", "difference", "`fcfs`")
    return f"{table(('', 'found', 'goal'), goals)}\n\n{table(head, rows)}"


def decode(results: dict[str, Any]) -> str:
    """TPOT attainment of `envelope` beside `continuous` and `slack`."""
    policies = list(results["cells"][0]["attained"])
    rows = [
        (c["trace"], c["fleet"], c["kind"], c["load"], *(f"{c['attained'][p]:.1f}" for p in policies))
        for c in results["cells"]
    ]
    means = [
        (m["kind"], m["load"], *(f"{points:+.1f}" for points in m["envelope_over_pp"].values()))
        for m in results["means"]
    ]
    over = [f"`envelope` over `{p}`" for p in results["means"][0]["envelope_over_pp"]]
    first = table(("targets", "load", *over), means)
    return f"{first}\n\n{table(('trace', 'profile', 'targets', 'load', *(f'`{p}`' for p in policies)), rows)}"


def paper(results: dict[str, Any]) -> str:
    """The paper's frame."""
    policies = list(results["rows"][0]["attained"])
    rows = [
        (f"{r['load']:.2f}", *(f"{r['attained'][p]:.1f}" for p in policies), r["published"]) for r in results["rows"]
    ]
    return table(("load", *(f"`{p}`" for p in policies), "published for `kairos-paper`"), rows)


def robustness(results: dict[str, Any]) -> str:
    """What errors and the share guard cost."""
    rows = [
        (r["error_sigma"] or "-", r["deferred_share"] or "-", f"{r['cost_pp']:.2f}", f"{r['worst_pp']:.2f}")
        for r in results["rows"]
    ]
    return table(("predictor error, sigma", "deferred share", "costs, points", "at worst"), rows)


def speed(results: dict[str, Any]) -> str:
    """Decision time and simulated requests."""
    rows = [
        (r["waiting"], r["instances"], f"{r['us']['p50']:.0f}", f"{r['us']['p99']:.0f}", f"{r['over_floor']:.1f}")
        for r in results["decisions"]
    ]
    hour = results["simulator"]
    said = (
        f"{hour['requests']:,} requests of {hour['trace']} with {hour['tokens']:,} tokens are simulated in "
        f"{hour['cpu_s']:.1f} s of one core."
    )
    return f"{table(('waiting', 'instances', 'p50, us', 'p99, us', 'over the floor'), rows)}\n\n{said}"


def live(results: dict[str, Any]) -> str:
    """Attainment measured on a live fleet and simulated."""
    rows = []
    for r in results["rows"]:
        measured, simulated = r["live"], r["simulated"]
        shares = (f"{measured[m]:.1f} / {simulated[m]:.1f}" for m in LIVE_METRICS)
        apart = max(r["difference_pp"].values(), key=abs)
        lag = f"{1e3 * r['lag_p99_s']:.1f}{' (void)' if r['void'] else ''}"
        case = (r["trace"], f"`{r['strategy']}`", r["requests"], r["target"])
        rows.append((*case, *shares, f"{apart:+.1f}", f"{r['same_outcome_percent']:.1f}", lag))
    head = ("trace", "prefill", "requests", "target", "TTFT met, live / simulated", "TPOT met", "both met")
    return table((*head, "largest difference, points", "same outcome", "generator late, p99, ms"), rows)


def soak(results: dict[str, Any]) -> str:
    """What an hour of requests leaves behind."""
    rows = [
        (
            *(name, f"{of['cores']:.2f}", f"{of['mb_at_a_quarter']:.0f}", f"{of['mb_at_end']:.0f}"),
            *(f"{of['mb_per_hour']:+.1f}", f"{of['files_median']:.0f}", of["files_at_end"], of["threads_at_end"]),
        )
        for name, of in results["programs"].items()
    ]
    problems = sum(results["problems"].values())
    left = ", ".join(f"{value:.0f} {name.replace('_', ' ')}" for name, value in results["held_at_end"].items())
    said = (
        f"{results['requests']:,} requests in {results['seconds']:,.0f} s, {problems} of them failed by the faults "
        f"that the emulated engines make; sent within {1e3 * results['lag_p99_s']:.0f} ms of their time at p99. The "
        f"gateway held at the end: {left} (kept alive, and the reader of its metrics)."
    )
    head = ("program", "cores", "MB after a quarter", "at the end", "MB an hour", "files", "at the end", "threads")
    return f"{table(head, rows)}\n\n{said}"


LIVE_METRICS = ("ttft_attainment", "tpot_attainment", "slo_attainment")


def pairs(results: dict[str, Any]) -> str:
    """Real pairs on two cores, first come, first served and on-time in turns."""
    rows, said = [], []
    for engine in sorted(results.keys() & {"vllm", "torch"}, reverse=True):
        found = results[engine]
        for metric in sorted(found["differences"].keys() & {"ttft", "ttft short", "ttft long"}):
            level, d = found["attainment"][metric], found["differences"][metric]
            points = f"{d['mean']:+.1f} ({d['low']:+.1f} to {d['high']:+.1f})"
            rows.append((engine, metric, f"{100 * level['fcfs']:.1f}", f"{100 * level['on-time']:.1f}", points))
        runs = found["runs"]
        said.append(
            f"{engine}: {len(runs)} runs of {found['seconds']:.0f} s at {results['load']:.0%} of the rate measured "
            f"just before, {sum(r['requests'] for r in runs):,} requests, {sum(r['failed'] for r in runs)} failed; "
            f"sent within {1e3 * max(r['lag_p99_s'] for r in runs):.0f} ms of their time at p99 of the worst run; "
            f"{found['void_pairs']} pairs of runs void and repeated. {found.get('note', '')}".rstrip()
        )
    return "\n\n".join((table(("pair", "met", "`fcfs`", "`on-time`", "difference, points"), rows), *said))


SECTIONS = (
    ("Prefill: first tokens in time", "attainment", prefill),
    ("Decode: output pace kept, at most 256 in a batch of `continuous`", "decode", decode),
    ("Decode: the same with at most 64, the default of a fleet", "decode_batch64", decode),
    ("The paper's frame", "paper_frame", paper),
    ("What errors and the share guard cost `on-time`", "robustness", robustness),
    ("A live fleet of 4 + 4 emulated instances against its simulation", "live_against_simulated", live),
    ("The same with the whole traces", "live_whole", live),
    ("An hour of requests through gateway and service", "soak", soak),
    ("Speed", "speed", speed),
    ("Prefill/decode pairs behind the gateway: first tokens in time", "pair_attainment", pairs),
)


MEASURED = """The whole pipeline on simulated blocks (`benchmarks/experiment_blocks.py`): four traces, one prefill
instance, first tokens within 8 s, 120 pairs, judged after each. Blocks of 300 s between equal strategies;
where there is an effect, as long as a plan makes them from the drain of the champion's queue. Loads are
runs of a stretch's blocks, with ten sequences of coins each. Reduced to what two busy cores do: prefill
alone; 20 loads of 12 h of traffic for equal strategies, of 72 blocks for others, so that loads share blocks.
1 point was left out, and what a trace's champion leaves no room for. A slope fitted on all pairs was
expected to fail, and does not: no coin is in it."""
TITLES = {
    "marks": "Marks",
    "equal": "Equal strategies",
    "gains": "Gains",
    "harm": "Harm: the same policies, the better one as champion",
    "weak null": "A gain in quiet hours, a loss in busy ones, nothing on average",
    "refusals and guards": "Refusals and absolute guards",
    "negative controls": "Methods that must fail",
}


ENGINE_METRICS = {
    "ttft": ("ttft", "ttft short", "ttft long"),
    "tpot": ("tpot", "tpot tight", "tpot relaxed", "ttft"),
}
GAINS = """vLLM {vllm} on a CPU: the same requests on stock vLLM (first come, first served) and on the plugin, in turns,
at {load:.0f} % of the capacity that was measured just before. A pair is four runs, A B B A, and gives one difference;
the interval is Student's over {pairs} pairs. Workload `ttft`: 85 % short prompts (20 to 150 tokens, 1 s), 15 % long
ones (1,500 to 3,000 tokens, 10 s)."""
TWO_PACES = """Workload `tpot`, {pairs} pairs: prompts of 50 to 900 tokens and 30 to 60 of output, half of them with a
TPOT target of 0.75 times the pace of the stock engine when it is full ({low:.0f} to {high:.0f} ms), half with one of
20 times."""
COSTS = """What the plugin costs a step, in vLLM's scheduler alone: in every step one prompt starts, one request ends
and one arrives. Processor time of the engine's thread; with 1,000 waiting the goal is 500 us, 1,200 us at p99, and
5 % of the step of a whole engine on a CPU."""


def page() -> str:
    """The whole page."""
    parts = ["# Results", "Made by `python benchmarks/tables.py` from `benchmarks/results/`; figures are percent."]
    for title, name, made in SECTIONS:
        results = json.loads((RESULTS / f"{name}.json").read_text())
        parts += [f"## {title}", made_by(results), made(results)]
    return "\n\n".join(parts) + "\n"


def measured() -> str:
    """The section of docs/statistics.md: the pass marks, then a table for each part of the benchmark."""
    results = json.loads((RESULTS / "experiments_validity.json").read_text())
    parts = ["## Measured", MEASURED, made_by(results)]
    for name in ("marks", "equal", "gains", "harm", "weak null", "refusals and guards", "negative controls"):
        rows = results[name]
        body = [["-" if value is None else _said(value) for value in row.values()] for row in rows]
        parts += [f"### {TITLES[name]}", table(list(rows[0]), body)]
    return "\n\n".join(parts) + "\n\n"


def _said(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def gains(results: dict[str, Any]) -> str:
    """Stock vLLM and the plugin on the same requests."""
    rows = []
    measured = [workload for workload in ENGINE_METRICS if workload in results]
    for workload in measured:
        found, metrics = results[workload], ENGINE_METRICS[workload]
        for metric in metrics:
            level, d = found["attainment"][metric], found["differences"][metric]
            points = f"{d['mean']:+.1f} ({d['low']:+.1f} to {d['high']:+.1f})"
            rows.append((workload, metric, f"{100 * level['stock']:.1f}", f"{100 * level['plugin']:.1f}", points))
    late = {w: 1e3 * max(run["lag_p99_s"] for run in results[w]["runs"]) for w in measured}
    runs = [run for workload in measured for run in results[workload]["runs"]]
    lasting = ", ".join(f"{results[w]['seconds']:.0f} s ({w})" for w in measured)
    said = (
        f"{len(runs)} runs of {lasting}, {sum(r['requests'] for r in runs):,} requests, "
        f"{sum(r['failed'] for r in runs)} failed. In the worst run 99 % were sent within so many ms of their time: "
        f"{', '.join(f'{ms:,.0f} ({workload})' for workload, ms in late.items())}."
    )
    return f"{table(('workload', 'met, %', 'stock', 'plugin', 'difference, points'), rows)}\n\n{said}"


def costs(results: dict[str, Any]) -> str:
    """What a step costs more, in the scheduler alone and in a whole engine."""
    alone = [
        (
            *(f"{r['waiting']:,}", r["decoding"], f"{r['stock_us']['p50']:.0f}", f"{r['plugin_us']['p50']:.0f}"),
            *(f"{r['hooks_us']['p50']:.0f}", f"{r['hooks_us']['p99']:.0f}"),
        )
        for r in results["alone"]
    ]
    real = [
        (
            *(f"{r['waiting']:,.0f}", f"{r['step_p50_ms']:.1f}", f"{r['hooks_p50_us']:.0f}"),
            *(f"{r['hooks_p99_us']:.0f}", f"{100 * r['share']:.1f}"),
        )
        for r in results["real"]
    ]
    first = table(("waiting", "decoding", "stock, us", "plugin, us", "in the hooks, us", "p99"), alone)
    second = table(("waiting", "step, ms", "in the hooks, us", "p99", "share of a step, %"), real)
    return f"{first}\n\nIn a whole engine with 8 that decode, by the clock:\n\n{second}"


def gains_and_costs() -> str:
    """The section of docs/engines.md."""
    attained, overhead = (json.loads((RESULTS / f"engine_{n}.json").read_text()) for n in ("attainment", "overhead"))
    pairs = 1 + max(run["pair"] for run in attained["ttft"]["runs"])
    setup = GAINS.format(vllm=attained["vllm"], load=100 * attained["load"], pairs=pairs)
    if "tpot" in attained:
        runs = attained["tpot"]["runs"]
        paces_ms = [1e3 * run["full_pace_s"] for run in runs]
        setup += "\n" + TWO_PACES.format(pairs=1 + runs[-1]["pair"], low=min(paces_ms), high=max(paces_ms))
    parts = ("## What it gains and costs", f"{setup}\n{made_by(attained)}", gains(attained))
    return "\n\n".join((*parts, f"{COSTS}\n{made_by(overhead)}", costs(overhead)))


RELAYED = """One core, the engine a stub; Kairos predicts, decides by its policies and logs every request. Requests and
streams per second of CPU, medians of the rounds, in each mode: not disaggregated, both PD legs at once (SGLang's), one
PD leg after the other (NIXL's)."""
RELAY_FIGURES = (
    ("requests", "whole", "requests_per_cpu_s"),
    ("streams of 32 tokens", "stream", "requests_per_cpu_s"),
    ("requests of 220 KB", "220 KB", "requests_per_cpu_s"),
    ("CPU a paced token, us", "paced", "cpu_us_per_token"),
    ("first byte, one connection, p50, us", "first byte", "first_byte_p50_us"),
)


def relay_costs() -> str:
    """The section of docs/gateway.md: what the gateway costs beside its peers."""
    results = json.loads((RESULTS / "gateway.json").read_text())
    tables = [
        table(
            (mode, *beside),
            [
                (what, *(f"{figures[case][key]:,.0f}" for figures in beside.values()))
                for what, case, key in RELAY_FIGURES
            ],
        )
        for mode, beside in results["results"].items()
    ]
    return "\n\n".join(("## What it costs", f"{RELAYED}\n{made_by(results)}", *tables))


def gateway_page() -> str:
    """docs/gateway.md with that section as the results say now."""
    return with_section(DOCS / "gateway.md", relay_costs())


def with_section(page: Path, made: str) -> str:
    """A page with the section of that title as it was made."""
    title = made.split("\n", 1)[0]
    before, rest = page.read_text().split(f"{title}\n", 1)
    _, found, after = rest.partition("\n## ")
    return f"{before}{made.rstrip()}\n{found}{after}"


def statistics_page() -> str:
    """docs/statistics.md with that section as the results say now."""
    return with_section(DOCS / "statistics.md", measured())


def engines_page() -> str:
    """docs/engines.md with its figures as the results say now."""
    return with_section(DOCS / "engines.md", gains_and_costs())


SIZES = (
    ("service", "idle_mb", "memory of the service, SQLite, after its start", "{:.0f} MB"),
    ("service", "after_mb", "the same after {steps:,} steps of telemetry", "{:.0f} MB"),
    ("service", "training_mb", "memory of its training process, at most", "{:.0f} MB"),
    ("service", "ingest_us_per_row", "CPU of the service for a row of telemetry", "{:.1f} us"),
    (
        "service",
        "schedule_us_per_call",
        "for a `POST /schedule` of `examples/schedule.json`, HTTP included",
        "{:.0f} us",
    ),
    ("gateway", "idle_mb", "memory of the gateway after its start", "{:.0f} MB"),
    ("gateway", "waiting_kb_per_request", "for each request that waits in it, {prompt_tokens:,} tokens", "{:.0f} kB"),
    (
        "gateway",
        "arrival_us_per_request",
        "CPU of the gateway until such a request waits, its connection new",
        "{:.0f} us",
    ),
)


def sizes() -> str:
    """The section of docs/deployment.md: what Kairos takes of a machine."""
    results = json.loads((RESULTS / "sizing.json").read_text())
    rows = [(what.format(**results["about"]), shown.format(results[of][name])) for of, name, what, shown in SIZES]
    return f"## How large\n\n{made_by(results)}\n\n{table(('', ''), rows)}\n\n"


def deployment_page() -> str:
    """docs/deployment.md with that section as the results say now."""
    text = (DOCS / "deployment.md").read_text()
    before, rest = text.split("## How large\n", 1)
    return before + sizes() + "### In the chart\n" + rest.split("### In the chart\n", 1)[1]


if __name__ == "__main__":
    (DOCS / "results.md").write_text(page())
    (DOCS / "statistics.md").write_text(statistics_page())
    (DOCS / "deployment.md").write_text(deployment_page())
    (DOCS / "engines.md").write_text(engines_page())
    (DOCS / "gateway.md").write_text(gateway_page())
