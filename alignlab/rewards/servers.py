"""Decides which reward servers a command may speak to: those that its user named.

What a file says is somebody else's until it is typed. A reward server is sent images, prompts and the secret
of the environment. An address counts as named where it is typed (as a reward's url, or in `allow_servers`),
or stands in the environment variable ALIGNLAB_REWARD_URL. Addresses in stored configurations, recipes and
files of --config-dir are none of these. Outside of a command a program's configuration is its own.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

TOKEN = "ALIGNLAB_REWARD_TOKEN"
"""The environment variable that holds the secret of a server, if it asks for one. It stands in no
configuration and no log."""
BOUND = "ALIGNLAB_REWARD_URL"
"""The environment variable with the addresses that the secret is for; without it, those that are typed."""
SHIPPED = "http://127.0.0.1:8000"
"""The address in conf/reward/remote.yaml: who types reward=remote has named it."""
MEND = "if you trust it, type 'allow_servers=["
"""Part of the sentence that asks for an address."""
KEYS = ("reward", "eval_rewards", "allow_servers")
"""Keys of the command line that can name a server; beside them every key that ends in .url."""
_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>\d{1,5}))?(?P<path>(?:/[a-z0-9._~%+-]*)*)"
    r"(?![\w.~%+/:@\\?#-])",
    re.IGNORECASE | re.ASCII,
)
_named: frozenset[str] | None = None
"""The addresses that the running command's user typed; None outside of a command. A global, for a thread has
no context of its own."""


def address(url: str) -> str:
    """Writes a server's url in the one way by which two are compared.

    That is in small letters but for the path, with its port, and without a slash at the end.

    Raises:
        ValueError: if it is no plain http:// or https:// url (no user, no query, no fragment).
    """
    match = _ADDRESS.fullmatch(url) if isinstance(url, str) else None
    if match is None or int(match["port"] or 0) > 65535:
        raise ValueError(
            f"{url} is no server; write http://127.0.0.1:8000 (a secret goes into the variable {TOKEN})"
        )
    scheme = match["scheme"].lower()
    port = int(match["port"] or (443 if scheme == "https" else 80))
    return f"{scheme}://{match['host'].lower()}:{port}{match['path'].rstrip('/')}"


def named_by(overrides: Iterable[str]) -> frozenset[str]:
    """Finds the addresses that overrides name.

    Of interpolations those of the environment count, which is the user's own.
    """
    addresses: set[str] = set()
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        key = key.partition("@")[0].replace("/", ".")
        if key.partition(".")[0] not in KEYS and not key.endswith(".url"):
            continue
        value = re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", value)  # as Hydra hands overrides to a sweep's jobs
        value = re.sub(r"\$\{oc\.env:(\w+)(?:,[^{}]*)?\}", lambda name: os.environ.get(name[1], ""), value)
        addresses |= {
            address(match[0]) for match in _ADDRESS.finditer(value) if int(match["port"] or 0) <= 65535
        }
        if key in KEYS[:2] and "remote" in re.split(r"[^\w-]+", value):
            addresses.add(address(SHIPPED))
    return frozenset(addresses)


def bound() -> frozenset[str]:
    """Reads the addresses in the environment.

    Raises:
        ValueError: if one of them is no address.
    """
    try:
        return frozenset(address(word) for word in re.split(r"[\s,]+", os.environ.get(BOUND, "")) if word)
    except ValueError as error:
        raise ValueError(f"the environment variable {BOUND} names servers, and {error}") from None


@contextmanager
def naming(overrides: Iterable[str]) -> Iterator[None]:
    """Inside, a command runs whose user typed these overrides."""
    global _named
    before, _named = _named, named_by(overrides)
    try:
        yield
    finally:
        _named = before


def in_a_command() -> bool:
    """Whether a command runs, whose configuration may come from files of others."""
    return _named is not None


def refuse_unnamed(url: str) -> None:
    """Lets a server pass that the user named, or that no command asks for.

    Raises:
        ValueError: with what to type, if the address stands in a file alone.
    """
    at = address(url)
    if _named is None or at in _named | bound():
        return
    sent = (
        "images and prompts" if token() is None or bound() else f"images, prompts and the secret in {TOKEN}"
    )
    raise ValueError(f"url={url} stands in a file, and {sent} would go there; {MEND}{url}]'")


def token() -> str | None:
    """Reads the secret in the environment, if there is one.

    Raises:
        ValueError: if it cannot stand in a header.
    """
    secret = os.environ.get(TOKEN) or None
    if secret is not None and not (secret.isascii() and secret.isprintable() and " " not in secret):
        raise ValueError(
            f"the environment variable {TOKEN} holds something else than ASCII letters, digits and signs"
        )
    return secret


def token_for(url: str) -> str | None:
    """Gives the secret, if it is for this server.

    It is for those of ALIGNLAB_REWARD_URL, or, where that is not set, for every one that the user named.

    Raises:
        ValueError: if the user did not name it, or the environment's values are none.
    """
    refuse_unnamed(url)
    trusted = bound()
    return token() if not trusted or address(url) in trusted else None
