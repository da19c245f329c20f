"""A model on a device, from what an operator says of it."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from kairos.adapters.torch_engine.kv import KvSlots
from kairos.adapters.torch_engine.model import Model
from kairos.adapters.torch_engine.shape import SHAPES, shape_of
from kairos.adapters.torch_engine.weights import drawn, loaded
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, where, and how many sequences of what length it holds."""

    model: str
    """A shape that ships or a `config.json` (weights are drawn), or a folder with one and weights."""
    slots: int
    slot_tokens: int
    device: str | None = None
    """As torch writes it; None: cuda where there is one, else cpu."""
    dtype: str = "float32"
    threads: int = 1
    """Of a CPU."""
    seed: int = 0
    """Of drawn weights."""


def build(options: ModelOptions) -> Model:
    """The model with an empty KV cache.

    Raises:
        InputError: there is no such model, or it cannot be had on this device.
    """
    shape, dtype = shape_of(options.model), DTYPES[options.dtype]
    torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = Path(options.model)
        has_weights = options.model not in SHAPES and folder.is_dir()
        weights = loaded(shape, folder, device, dtype) if has_weights else drawn(shape, options.seed, device, dtype)
        cache = KvSlots(shape, options.slots, options.slot_tokens, device, dtype)
    except RuntimeError as problem:  # torch's: no such device, no memory
        raise ConfigError(f"cannot make {options.model} on {options.device or 'this device'}: {problem}") from None
    return Model(shape, weights, cache)


def profile_of(model: Model, name: str) -> Profile:
    """The profile of its steps."""
    return Profile(gpu=device_name(model.device), model=name, precision=_precision(model.dtype), engine="torch")


def device_name(device: torch.device) -> str:
    """What the device calls itself: a GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{_cpu_name()} x{torch.get_num_threads()}"


def _cpu_name() -> str:
    """The CPU's name; Linux tells it in /proc/cpuinfo, Python elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(told, "") or platform.processor() or platform.machine()


def _precision(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)
