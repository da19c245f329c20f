"""The live fleet of a configuration: which addresses are engines, and what they are told apart by."""

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

from kairos.adapters.gateway.instances import LiveInstance
from kairos.adapters.http_client import HttpPool
from kairos.scheduler_core.config import Group, InstanceRole, Settings
from kairos.scheduler_core.domain import StepTimes
from kairos.scheduler_core.errors import ConfigError

StepTimesOf = Callable[[Settings, str], StepTimes]
"""The step times of a profile of the configuration, by its name there."""


class Member(NamedTuple):
    """One engine of a configuration."""

    role: InstanceRole
    url: str
    group: Group


async def members_of(settings: Settings, before: Iterable[Member] = ()) -> list[Member]:
    """The engines of the configuration, `dns+` addresses resolved; a name that is unknown now keeps those of `before`.

    Raises:
        ConfigError: there is none, or two are at one address.
    """
    members: list[Member] = []
    for role, _, group in settings.fleet.groups():
        if group.url is None:
            continue
        if group.url.startswith("dns+"):
            found = [Member(role, url, group) for url in await _resolved(group.url.removeprefix("dns+"))]
            members += found or [member for member in before if (member.role, member.group) == (role, group)]
        else:
            members.append(Member(role, group.url.rstrip("/"), group))
    urls = [member.url for member in members]
    if twice := next((url for url in urls if urls.count(url) > 1), None):
        raise ConfigError(f"two instances of the fleet are at {twice}")
    if not any(group.url for _, _, group in settings.fleet.groups()):
        raise ConfigError("no group of the fleet has a url; the gateway needs engines, see docs/gateway.md")
    return members


def instance_of(
    settings: Settings, member: Member, number: int, step_times_of: StepTimesOf, tls: ssl.SSLContext | None
) -> LiveInstance:
    """One engine as the gateway knows it.

    Raises:
        ConfigError: its key's file cannot be read.
        InputError: its step times cannot be loaded.
    """
    group = member.group
    return LiveInstance(
        f"{member.role}-{number}",
        member.role,
        group,
        settings.profiles[group.profile].as_profile(),
        frozenset(settings.served_models(group)),
        step_times_of(settings, group.profile),
        HttpPool(member.url, settings.gateway.timeouts.connect_s, tls if member.url.startswith("https") else None),
        _key_of(group),
    )


def _key_of(group: Group) -> str:
    if group.key is not None:
        return group.key.get_secret_value()
    if group.key_file is None:
        return ""
    try:
        return group.key_file.read_text(encoding="utf-8").strip()
    except OSError as problem:
        raise ConfigError(f"key_file {group.key_file}: {problem.strerror or problem}") from None


async def _resolved(url: str) -> list[str]:
    """The addresses behind a name; none while the name is not known."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    hosts = sorted({str(entry[4][0]) for entry in found})
    return [f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}" for host in hosts]
