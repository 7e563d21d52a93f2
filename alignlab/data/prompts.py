"""Sets of prompts, and which of them an epoch draws: a pure function of (seed, epoch, rank)."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignlab.data import prompt_files


class Prompts:
    """A prompt set, split into those that training draws and those that it never sees.

    Args:
        prompts: the prompts themselves; or
        file: a file that prompt_files.py reads by its kind: one prompt a line (.txt), a list (.json, .yaml),
            objects or a table (.jsonl, .json, .yaml, .csv, .tsv, .parquet) with the prompt under `column`
            (None: "prompt"). Other values are kept as metadata. A prompt that stands there twice counts once;
            or
        dataset: a Hugging Face dataset by name or folder, with `split` and `column`; or
        split: of the dataset.
        column: of the prompt, in a table or a dataset, or the key of it in objects; None is "prompt".
        imagenet_animals: the first that many classes of ImageNet (398 are all of its animals). [classes]
        template: "{}" is replaced by each word; "{a}" by the word with its article ("a lion", "an ant");
            "{key}" by each value of `fill`. Braces within a word or a value are left alone.
        fill: values for further places of the template: the set is the product of words and values.
        per_prompt: images drawn of each chosen prompt, in a row. [images]
        unseen: prompts that training never draws; or
        unseen_share: this share of the prompts, chosen by their own hash, so that a prompt stays on its side
            when others come. [share of the prompts]

    Raises:
        ValueError: unless exactly one source is given; if it cannot be read, is empty, or the template has no
            place for a word.
    """

    def __init__(
        self,
        *,
        prompts: list[str] | None = None,
        file: str | None = None,
        dataset: str | None = None,
        split: str = "train",
        column: str | None = None,
        imagenet_animals: int | None = None,
        template: str = "{}",
        fill: Mapping[str, list[str]] | None = None,
        per_prompt: int = 1,
        unseen: list[str] | None = None,
        unseen_share: float = 0.0,
    ) -> None:
        given = [s for s in (prompts, file, dataset, imagenet_animals) if s is not None]
        if len(given) != 1:
            raise ValueError(
                "prompts: give exactly one of prompts.prompts (a list), prompts=file prompts.file=NAME and "
                "prompts=dataset prompts.dataset=NAME"
            )
        fill = fill or {}
        _refuse_unfit_template(template, fill)
        if per_prompt < 1:
            raise ValueError(f"prompts.per_prompt={per_prompt} must be at least 1")
        if not 0 <= unseen_share < 1 or (unseen and unseen_share):
            raise ValueError(
                f"prompts.unseen_share={unseen_share} must be in [0, 1), and 0 beside a list prompts.unseen"
            )
        self.metadata: dict[str, dict[str, Any]] = {}
        """The other values that a file has for a prompt, by prompt."""
        if imagenet_animals is not None:
            texts: Sequence[str] = _imagenet(imagenet_animals)
        elif dataset is not None:
            texts = _dataset(dataset, split, column or "prompt")
        elif file is not None:
            rows = prompt_files.read(file, column or "prompt")
            self.metadata = {prompt: more for prompt, more in rows if more is not None}
            texts = [prompt for prompt, _ in rows]
        else:
            texts = prompts or []
        if not texts:
            raise ValueError(f"prompts: {file or dataset or 'prompts.prompts'} holds no prompt")
        where = (
            f"prompts.file={file}" if file else f"prompts.dataset={dataset}" if dataset else "prompts.prompts"
        )
        _refuse_no_text(texts, where)
        parts = _parts(template, fill)
        every = list(dict.fromkeys(p for text in texts for p in _filled(parts, text, fill)))
        self.unseen = tuple(p for text in unseen or () for p in _filled(parts, text, fill))
        if unseen_share:
            self.unseen = tuple(p for p in every if _share_of(p) < unseen_share)
        kept = set(self.unseen)
        self.prompts = tuple(p for p in every if p not in kept)
        if not self.prompts:
            raise ValueError(
                "prompts: every prompt is unseen, so there is none to train on; lower prompts.unseen_share"
            )
        self.per_prompt = per_prompt

    def draw(self, n: int, *, seed: int, epoch: int, rank: int = 0, ranks: int = 1) -> tuple[str, ...]:
        """Rank's share of an epoch's n prompts, n / ranks of them: groups of per_prompt, from shuffled passes
        over the set, so that all are met equally often. The ranks' shares together are the epoch's prompts
        whatever the number of ranks."""
        groups = n // self.per_prompt
        mine = range(rank * groups // ranks, (rank + 1) * groups // ranks)
        chosen = [self._pick(seed, epoch * groups + k) for k in mine]
        return tuple(p for p in chosen for _ in range(self.per_prompt))

    def _pick(self, seed: int, index: int) -> str:
        lap, place = divmod(index, len(self.prompts))
        return self.prompts[_shuffled(seed, lap, len(self.prompts))[place]]


@lru_cache(maxsize=2)
def _shuffled(seed: int, lap: int, n: int) -> NDArray[np.int64]:
    """The order of one pass over the set; a draw of a million prompts would else shuffle them for each
    image."""
    return np.random.default_rng([seed, lap]).permutation(n)


def _refuse_unfit_template(template: str, fill: Mapping[str, list[str]]) -> None:
    """Raises a ValueError unless the template has a place for the prompt and for each key of `fill`."""
    if "{}" not in template and "{a}" not in template:
        raise ValueError(f"prompts.template={template!r} has no place for the prompt; write {{}} or {{a}}")
    absent = [key for key in fill if f"{{{key}}}" not in template]
    if absent:
        raise ValueError(
            f"prompts.fill.{absent[0]} has no place in prompts.template={template!r}; write {{{absent[0]}}}"
        )
    for key, values in fill.items():
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"prompts.fill.{key}={values} must be a list of texts, one at least")


def _refuse_no_text(texts: Sequence[str], where: str) -> None:
    """Raises a ValueError if a prompt cannot be UTF-8, or has a NUL, as UTF-16 read as UTF-8 has."""
    for text in texts:
        if "\0" in text or not _is_text(text):
            raise ValueError(
                f"{where}: {text[:40]!r} holds a character that is no text (NUL, or half of a pair); "
                "save it as UTF-8"
            )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _imagenet(n: int) -> list[str]:
    if not 1 <= n <= 398:
        raise ValueError(
            f"prompts.imagenet_animals={n} is outside 1..398, the animals among ImageNet's classes"
        )
    from torchvision.models import AlexNet_Weights

    return list(AlexNet_Weights.DEFAULT.meta["categories"][:n])


def _dataset(name: str, split: str, column: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"prompts.dataset={name} needs the package datasets; pip install 'alignlab[data]'"
        ) from None
    try:
        table = load_dataset(name, split=split)
    except Exception as error:  # of many kinds: the hub's, the file system's, the formats'
        raise ValueError(
            f"prompts.dataset={name}, split={split}, cannot be loaded: {str(error).splitlines()[0]}"
        ) from None
    if column not in table.column_names:
        raise ValueError(
            f"prompts.dataset={name} has no column {column}; its columns are {', '.join(table.column_names)}"
        )
    return [str(text).strip() for text in table[column] if text is not None and str(text).strip()]


def _parts(template: str, fill: Mapping[str, list[str]]) -> list[str]:
    """Texts of the template and the names of places between them, in turn."""
    names = "|".join(re.escape(name) for name in (*fill, "a", ""))
    return re.split(f"{{({names})}}", template)


def _filled(parts: Sequence[str], word: str, fill: Mapping[str, list[str]]) -> list[str]:
    """A template with the word, once for each combination of the values."""
    article = "an" if word[:1].lower() in set("aeiou") else "a"
    out = []
    for values in product(*fill.values()):
        said = {"": word, "a": f"{article} {word}", **dict(zip(fill, values, strict=True))}
        out.append("".join(said[part] if k % 2 else part for k, part in enumerate(parts)))
    return out


def _share_of(prompt: str) -> float:
    """A fixed number in [0, 1) of a prompt."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") / 2**64


def thinned(prompts: tuple[str, ...], most: int) -> tuple[str, ...]:
    """At most `most` of them, evenly spaced."""
    if len(prompts) <= most:
        return prompts
    return tuple(prompts[k * len(prompts) // most] for k in range(most))
