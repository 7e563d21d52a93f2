"""Secrets of the environment (tokens, passwords, keys): no configuration, model card or sentence of a run may
hold one."""

import os
import re
from collections.abc import Sequence

NAMES = re.compile(r"token|secret|passw|api_?key|access_?key|private_?key|credential", re.IGNORECASE)
"""Of environment variables whose values are secret."""
FORMS = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})")
"""Tokens that are known by their form: Hugging Face's, OpenAI's, GitHub's."""
SHORTEST = 8
"""A shorter value, or a number, or a path, is no secret."""


def secret_in(text: str, secrets: Sequence[tuple[str, str]] | None = None) -> str | None:
    """What secret a text holds, by name; never its value. `secrets` saves a look at the environment for each
    of many texts."""
    for name, value in environment_secrets() if secrets is None else secrets:
        if value in text:
            return f"the value of the environment variable {name}"
    return "an access token" if FORMS.search(text) else None


def masked(text: str) -> str:
    """The text with *** for every secret."""
    for _, value in environment_secrets():
        text = text.replace(value, "***")
    return FORMS.sub("***", text)


def environment_secrets() -> list[tuple[str, str]]:
    """Name and value of each variable of the environment that is a secret by its name."""
    every = [(name, value.strip()) for name, value in os.environ.items() if NAMES.search(name)]
    return [
        (name, v)
        for name, v in every
        if len(v) >= SHORTEST and not v.isdigit() and not v.startswith(("/", "~"))
    ]
