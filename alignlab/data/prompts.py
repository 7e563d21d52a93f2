"""Sets of prompts, and which of them an epoch draws: a pure function of (seed, epoch)."""

from pathlib import Path

import numpy as np


class Prompts:
    """A prompt set.

    Args:
        prompts: the prompts themselves; or
        file: a UTF-8 text file, one prompt a line (empty lines are skipped).
        template: "{}" is replaced by each prompt; "{a}" by the prompt with its article ("a lion", "an ant").
        per_prompt: images drawn of each chosen prompt, in a row.
        unseen: prompts held out of training, for the generalisation experiments.

    Raises:
        ValueError: if neither or both are given, the set is empty, the template has no place, or the file cannot be read.
    """

    def __init__(
        self,
        *,
        prompts: list[str] | None = None,
        file: str | None = None,
        template: str = "{}",
        per_prompt: int = 1,
        unseen: list[str] | None = None,
    ) -> None:
        if (prompts is None) == (file is None):
            raise ValueError(
                "prompts: give either prompts.prompts (a list) or prompts=file prompts.file=NAME (one prompt a line)"
            )
        if "{}" not in template and "{a}" not in template:
            raise ValueError(f"prompts.template={template!r} has no place for the prompt; write {{}} or {{a}}")
        if per_prompt < 1:
            raise ValueError(f"prompts.per_prompt={per_prompt} must be at least 1")
        words = _read(file) if prompts is None else prompts
        if not words:
            raise ValueError(f"prompts: {file or 'prompts.prompts'} holds no prompt")
        self.prompts = tuple(_fill(template, w) for w in words)
        self.unseen = tuple(_fill(template, w) for w in unseen or ())
        self.per_prompt = per_prompt

    def draw(self, n: int, *, seed: int, epoch: int) -> tuple[str, ...]:
        """n prompts: groups of per_prompt, from shuffled passes over the set, so that all are met equally often."""
        groups = n // self.per_prompt
        chosen = [self._pick(seed, epoch * groups + k) for k in range(groups)]
        return tuple(p for p in chosen for _ in range(self.per_prompt))

    def _pick(self, seed: int, index: int) -> str:
        lap, place = divmod(index, len(self.prompts))
        return self.prompts[np.random.default_rng([seed, lap]).permutation(len(self.prompts))[place]]


def _read(file: str | None) -> list[str]:
    assert file is not None
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts.file={file} cannot be read: {error}; give a UTF-8 text file, one prompt a line") from None
    return [line.strip() for line in lines if line.strip()]


def _fill(template: str, word: str) -> str:
    article = "an" if word[:1].lower() in set("aeiou") else "a"
    return template.replace("{a}", f"{article} {word}").replace("{}", word)
