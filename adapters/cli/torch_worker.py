"""`kairos worker torch`, and what it shares with `kairos profile torch`: which model, and where."""

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelName = Annotated[
    str,
    typer.Option(help="tiny, small, or a Llama config.json: random weights; or a folder with one and safetensors."),
]
Device = Annotated[str | None, typer.Option(help="As torch writes it; default: cuda where there is one, else cpu.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of weights and KV.")]
Threads = Annotated[int, typer.Option(help="CPU threads of a step.", min=1)]
Seed = Annotated[int, typer.Option(help="Of random weights; prefill and decode workers need the same.")]
Name = Annotated[str | None, typer.Option(help="What clients and telemetry call the model; default: its shape's name.")]


def torch_worker(
    model: ModelName = "small",
    role: Annotated[Literal["prefill", "decode", "mixed"], typer.Option(help="Which part of a request.")] = "mixed",
    name: Name = None,
    device: Device = None,
    dtype: Dtype = "float32",
    threads: Threads = 1,
    seed: Seed = 0,
    slots: Annotated[int, typer.Option(help="Sequences that it holds at a time.", min=1)] = 16,
    slot_tokens: Annotated[int, typer.Option(help="Longest sequence, output included.", min=2)] = 8192,
    chunk_tokens: Annotated[int, typer.Option(help="Most tokens of a step.", min=1)] = 512,
    lease_s: Annotated[float, typer.Option(help="How long KV is held for decode.", min=0.0)] = 30.0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 0,
    strategy: Annotated[str | None, typer.Option(help="In force until the control plane names another.")] = None,
    control_plane: Annotated[str | None, typer.Option(help="Where steps go, strategy and models come from.")] = None,
    control_plane_key: Annotated[
        str, typer.Option(help="Bearer key for it.", envvar="KAIROS_CONTROL_PLANE_KEY", show_envvar=True)
    ] = "",
    telemetry: Annotated[Path | None, typer.Option(help="A folder for its steps, written at its end.")] = None,
) -> None:
    """Run a small real engine on PyTorch that speaks vLLM's HTTP dialect; policies as KAIROS_ENGINE_... variables say.

    Example: kairos worker torch --model small --role prefill --port 8110
    """
    import msgspec

    from kairos.adapters.embedded.settings import load_settings
    from kairos.adapters.torch_engine.build import ModelOptions
    from kairos.adapters.torch_engine.process import TorchOptions, run_torch_worker

    settings = load_settings()
    given = {"strategy": strategy, "control_plane": control_plane}
    settings = msgspec.structs.replace(settings, **{k: v for k, v in given.items() if v is not None})
    run_torch_worker(
        TorchOptions(
            ModelOptions(model, slots, slot_tokens, device, dtype, threads, seed),
            role,
            settings,
            chunk_tokens,
            lease_s,
            name,
            control_plane_key,
            host,
            port,
        ),
        telemetry,
    )
