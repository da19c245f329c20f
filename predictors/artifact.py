"""A trained model in one file: numbers of many profiles, no code in it.

Two lines of text (what it is, and its feature schema), then zlib-compressed MessagePack.
"""

import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kairos.predictors.baselines import Baselines
from kairos.predictors.features import SCHEMA_HASH
from kairos.predictors.roofline import closest, reference_s, roofline
from kairos.predictors.step_model import StepModel, mixed_of, model_of_line
from kairos.predictors.step_time import StepTimePredictor
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import InputError, SchemaError, UnknownProfileError
from kairos.scheduler_core.telemetry import STEP_KINDS, StepKind

_MAGIC = b"kairos predictors\n"


class ProfileModels(msgspec.Struct, frozen=True):
    """What was learned of one profile: one to three kinds of steps."""

    profile: Profile
    models: dict[StepKind, StepModel]
    baselines: dict[StepKind, Baselines]
    """What else could be made of the same rows, for `kairos evaluate --model`."""


class Predictors:
    """The predictors of many profiles; what one profile lacks comes from the closest that has it, and is said so."""

    def __init__(self, learned: Sequence[ProfileModels]) -> None:
        self.learned = {entry.profile.profile_id: entry for entry in learned}
        self._made: dict[str, StepTimePredictor] = {}

    @property
    def profile_ids(self) -> list[str]:
        """Ids of the profiles that were trained."""
        return sorted(self.learned)

    def profile(self, wanted: Profile | str) -> StepTimePredictor:
        """The predictor of a profile, by id or in full; `source` of it tells what is borrowed.

        Raises:
            UnknownProfileError: an id that names no trained profile and is not six parts joined by '_'.
        """
        profile = wanted if isinstance(wanted, Profile) else self._named(wanted)
        key = profile.profile_id
        if key not in self._made:
            known = self.learned[key].models if key in self.learned else {}
            self._made[key] = StepTimePredictor(
                profile, {k: known.get(k) or self._borrow(profile, k) for k in STEP_KINDS}
            )
        return self._made[key]

    def _named(self, profile_id: str) -> Profile:
        if profile_id in self.learned:
            return self.learned[profile_id].profile
        parts = profile_id.split("_")
        if len(parts) != 6 or not all(re.fullmatch("[1-9][0-9]{0,3}", degree) for degree in parts[3:5]):
            raise UnknownProfileError("profile", profile_id, self.profile_ids)
        gpu, model, precision, tp, ep, engine = parts
        return Profile(gpu, model, precision, int(tp), int(ep), engine)

    def _borrow(self, profile: Profile, kind: StepKind) -> StepModel:
        """A kind of step that was not measured for this profile."""
        own = self.learned.get(profile.profile_id)
        if kind == "mixed" and own is not None and {"prefill", "decode"} <= set(own.models):
            return mixed_of(own.models["prefill"], own.models["decode"])
        having = [entry for entry in self.learned.values() if kind in entry.models]
        if not having:
            line = roofline(profile).decode if kind == "decode" else roofline(profile).prefill
            return model_of_line(kind, line, "nothing measured, from bandwidth, FLOPs and model size")
        near = closest(profile, [entry.profile for entry in having])
        place = 1 if kind == "decode" else 0
        factor = reference_s(profile)[place] / reference_s(near)[place]
        model = self.learned[near.profile_id].models[kind]
        return model.scaled(factor, f"closest profile {near.profile_id}, scaled by {factor:.2f}")


def save(learned: Sequence[ProfileModels], path: Path) -> None:
    """Write the file, whole or not at all.

    Raises:
        InputError: the place cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(dump(learned))
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write the model {path}: {error.strerror or error}; choose another place") from None


def load(path: Path) -> Predictors:
    """The predictors in a file that `save` wrote.

    Raises:
        InputError: there is no such file, or it is damaged or something else.
        SchemaError: it was trained on other features.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the model {path}: {error.strerror or error}; train one with kairos train"
        ) from None
    return parse(content, str(path))


def dump(learned: Sequence[ProfileModels]) -> bytes:
    """The content of the file."""
    return _MAGIC + SCHEMA_HASH.encode() + b"\n" + zlib.compress(msgspec.msgpack.encode(list(learned)), 6)


def parse(content: bytes, name: str) -> Predictors:
    """The predictors in bytes that `dump` made; `name` is what errors call them.

    Raises:
        InputError: they are damaged or something else.
        SchemaError: they were trained on other features.
    """
    magic, schema, body = content[: len(_MAGIC)], *content[len(_MAGIC) :].partition(b"\n")[::2]
    if magic != _MAGIC:
        raise InputError(f"{name} is not a Kairos model; train one with kairos train")
    if schema != SCHEMA_HASH.encode():
        found = schema[:32].decode(errors="replace")
        raise SchemaError(f"model {name} was trained on features {found}, this Kairos makes {SCHEMA_HASH}; retrain it")
    try:
        learned = msgspec.msgpack.decode(_unzipped(body), type=list[ProfileModels])
    except (zlib.error, msgspec.MsgspecError) as error:
        raise InputError(f"the model {name} is damaged ({error}); train it again or restore the file") from None
    return Predictors(learned)


_MOST_BYTES = 2**28
"""Of an artifact, unzipped: more is no model, whatever a small file claims."""


def _unzipped(body: bytes) -> bytes:
    unzip = zlib.decompressobj()
    content = unzip.decompress(body, _MOST_BYTES)
    if not unzip.eof:
        raise zlib.error("it is cut short, or too large")
    return content
