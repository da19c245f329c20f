"""Every exception of Kairos, as a tree. What it is says how it ends: exit code 2 or an HTTP status.

KairosError                      500
  InputError                     422  something handed to us cannot be used
    ConfigError                  422  kairos.yaml, KAIROS_* or a command's option
    TraceError                   422  a trace file
    TelemetryError               422  a telemetry file or batch
    SchemaError                  409  a model made for another feature schema
    UnknownNameError             404  a name nobody registered; says what is near and what there is
      UnknownPolicyError
      UnknownProfileError
    TooLargeError                413  more than a limit allows
    FieldsError                  422  fields of a request's body, each with its path
    ConflictError                409  not what is stored under the same id
    NotFoundError                404  nothing of that id
      NotSampledError            404  it may have been there, and was not recorded
  StoreError                     503  the database is away, full, or not at a revision this Kairos runs on
  BusyError                      429  a queue is full; says when to come back
  NotAdmittedError          404,429,503  a request that is not taken; its type is the reason
  PolicyError                    500  a policy answered what cannot be done (the guard catches it)
"""

from collections.abc import Iterable
from difflib import get_close_matches


class KairosError(Exception):
    """Root of all errors that Kairos raises on purpose."""

    http_status = 500
    problem_type = "about:blank"
    """For programs, where the status does not say enough."""


class InputError(KairosError):
    """Input that cannot be used; the message says what, where and how to mend it."""

    http_status = 422


class ConfigError(InputError):
    """A setting that does not exist or does not fit."""


class TraceError(InputError):
    """A trace that cannot be read."""


class TelemetryError(InputError):
    """Telemetry that cannot be read."""


class SchemaError(InputError):
    """A model that was trained on other features than this Kairos makes."""

    http_status = 409


class TooLargeError(InputError):
    """More than a stated limit allows."""

    http_status = 413


class FieldsError(InputError):
    """Fields of a request's body that cannot be used: (path, what is wrong with it)."""

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{path or 'the body'}: {message}" for path, message in self.problems))


class ConflictError(InputError):
    """Other content than what is stored under the same id."""

    http_status = 409


class NotFoundError(InputError):
    """Nothing is known under this id."""

    http_status = 404


class NotSampledError(NotFoundError):
    """Nothing was recorded of this id: its hash does not belong to the sample."""

    problem_type = "not_sampled"


class UnknownNameError(InputError):
    """A name that nothing is registered under.

    >>> print(UnknownNameError("prefill policy", "urgancy", ["edf", "urgency"]))
    unknown prefill policy 'urgancy'. Did you mean 'urgency'? Installed: edf, urgency
    """

    http_status = 404

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        super().__init__(f"unknown {what} '{name}'.{hint} Installed: {', '.join(known) or 'none'}")


class UnknownPolicyError(UnknownNameError):
    """No policy of that kind has this name."""


class UnknownProfileError(UnknownNameError):
    """No profile has this name."""


class StoreError(KairosError):
    """The database cannot be used now; nothing of what was asked is half done."""

    http_status = 503


class BusyError(KairosError):
    """A queue is full; the same again after `retry_after_s` seconds."""

    http_status = 429

    def __init__(self, what: str, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{what}; send it again in {retry_after_s} s")


class NotAdmittedError(KairosError):
    """A request that is not taken; coming back helps after `retry_after_s` (None: it does not)."""

    def __init__(self, status: int, reason: str, retry_after_s: int | None) -> None:
        self.http_status, self.reason, self.retry_after_s = status, reason, retry_after_s
        self.problem_type = reason
        again = "" if retry_after_s is None else f"; announce it again in {retry_after_s} s"
        super().__init__(f"the request is not admitted: {reason}{again}")


class PolicyError(KairosError):
    """A policy answered something that cannot be carried out."""
