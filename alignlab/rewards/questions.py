"""Questions about the image whose answers are known, put to a vision-language model: counting, as in DDPO's
code (`llava_counting`)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alignlab.rewards.compose import RewardError
from alignlab.rewards.vlm import Precision, Vlm, locate, to_fetch

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen "
    "nineteen twenty"
).split()
NUMBER = re.compile(rf"(?<![\w-])(?:\d{{1,9}}|{'|'.join(NUMBERS)})(?![\w-])", re.IGNORECASE)


def numbers(text: str) -> set[int]:
    """Those that a text names, in digits or in words up to twenty; parts of compounds, as in "twenty-two",
    are none."""
    return {int(word) if word.isdigit() else NUMBERS.index(word.lower()) for word in NUMBER.findall(text)}


def is_right(reply: str, answer: str) -> bool:
    """Whether a reply gives the answer: of a number, if it is the only one that the reply names; of other
    words, if the reply holds them, whole and in order. Stricter than the published substring, for which
    "none" contains "one" and "sixteen" six."""
    wanted = numbers(answer)
    if wanted:
        return numbers(reply) == wanted
    return re.search(rf"\b{re.escape(answer)}\b", reply, re.IGNORECASE) is not None


def spellings(answer: str) -> list[str]:
    """How a reply may begin that gives the answer: a number in digits and in words, small or capital, after a
    blank or not."""
    (number,) = numbers(answer) if re.fullmatch(NUMBER, answer) else (None,)
    words = [answer] if number is None else [str(number), *NUMBERS[number : number + 1]]
    return [
        blank + word
        for blank in ("", " ")
        for word in dict.fromkeys(w for word in words for w in (word, word.capitalize()))
    ]


class Questions:
    """The share of a prompt's questions that the model answers rightly from the image. Not differentiable.

    Args:
        path, revision, dtype, chat, batch_size: of the `Vlm`.
        pattern: a regular expression of the whole prompt, with a group "answer" and others that the question
            names. The default reads "three cats".
        question: "{group}" is replaced by the pattern's groups.
        file: instead of the two, a .jsonl file with the questions of each prompt, as DDPO's metadata:
            {"prompt": ..., "questions": [...], "answers": [...]}. It may be that of prompts.file.
        score: "strict" compares the reply with the answer (0 or 1, see `is_right`); "probability" is that of
            a reply that begins with the answer (see `spellings`), which also tells images apart that are all
            wrong. Of a number that begins longer ones it holds theirs too: "1" begins "10", "six" may begin
            "sixteen".
        tokens: of a reply, at most.

    Raises:
        FileNotFoundError, ValueError: for a model or a file that is not there, or a pattern without an
            answer.
    """

    differentiable = False
    needs_prompt = True
    unit = "share of right answers"
    typical_range = (0.0, 1.0)
    input_size: int | None = None
    licence = "unstated"

    @staticmethod
    def check(
        path: str, *, pattern: str = "(?P<answer>)", question: str = "", file: str | None = None, **_: Any
    ) -> None:
        locate(path)
        if file is not None:
            _read(file)
            return
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"pattern={pattern} is no regular expression: {error}") from None
        if "answer" not in groups:
            raise ValueError(f"pattern={pattern} has no group (?P<answer>...)")
        unknown = set(re.findall(r"\{(\w*)\}", question)) - set(groups)
        if unknown:
            raise ValueError(
                f"question={question!r} names {{{min(unknown)}}}, which is no group of pattern={pattern}"
            )

    @staticmethod
    def missing(path: str, *, revision: str | None = None, **_: Any) -> list[str]:
        return to_fetch(path, revision)

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        pattern: str = r"(?P<answer>\w+) (?P<noun>.+)",
        question: str = "How many {noun} are there in this image?",
        file: str | None = None,
        score: Literal["strict", "probability"] = "strict",
        dtype: Precision = "bfloat16",
        chat: str = "USER: <image>\n{} ASSISTANT:",
        tokens: int = 64,
        batch_size: int = 8,
    ) -> None:
        self.check(path, pattern=pattern, question=question, file=file)
        self.vlm = Vlm(path, revision=revision, dtype=dtype, chat=chat, batch_size=batch_size)
        self.pattern, self.question, self.score, self.tokens = re.compile(pattern), question, score, tokens
        self.known = None if file is None else _read(file)
        self.unit = "share of right answers" if score == "strict" else "probability of the right answer"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs = [self.asked(prompt) for prompt in prompts]
        asked = [(row, *pair) for row, questions in enumerate(pairs) for pair in questions]
        rows = torch.tensor([row for row, *_ in asked], device=images.device)
        if self.score == "strict":
            replies = self.vlm.reply(images[rows], [question for _, question, _ in asked], tokens=self.tokens)
            right = [
                float(is_right(reply, answer)) for reply, (_, _, answer) in zip(replies, asked, strict=True)
            ]
            values = torch.tensor(right, device=images.device)
        else:
            values = self._probabilities(images, asked)
        total = torch.zeros(len(prompts), device=images.device).index_add(0, rows, values)
        return total / torch.tensor([float(len(questions)) for questions in pairs], device=images.device)

    def asked(self, prompt: str) -> list[tuple[str, str]]:
        """The questions of a prompt, with their answers.

        Raises:
            RewardError: if it has none.
        """
        if self.known is not None:
            if prompt not in self.known:
                raise RewardError(f"prompt {prompt!r} is not in file=; add its questions and answers")
            return self.known[prompt]
        match = self.pattern.fullmatch(prompt)
        if match is None:
            raise RewardError(
                f"prompt {prompt!r} has no question: it does not match pattern={self.pattern.pattern}; give "
                "file=, or other prompts"
            )
        groups = match.groupdict(default="")
        return [(re.sub(r"\{(\w+)\}", lambda place: groups[place[1]], self.question), match["answer"])]

    def _probabilities(self, images: Tensor, asked: Sequence[tuple[int, str, str]]) -> Tensor:
        """[questions]: the spellings are different beginnings, so their probabilities add up; those of the
        same tokens count once."""
        forms = []
        for number, (row, question, answer) in enumerate(asked):
            same = {
                tuple(self.vlm.tokenizer(form, add_special_tokens=False).input_ids): form
                for form in spellings(answer)
            }
            forms += [(number, row, question, form) for form in same.values()]
        which, rows = (
            torch.tensor(column, device=images.device) for column in list(zip(*forms, strict=True))[:2]
        )
        each = self.vlm.likelihood(
            images[rows], [question for *_, question, _ in forms], [form for *_, form in forms]
        )
        return torch.zeros(len(asked), device=images.device).index_add(0, which, each)


def _read(file: str) -> dict[str, list[tuple[str, str]]]:
    """The questions with their answers, by prompt."""
    questions: dict[str, list[tuple[str, str]]] = {}
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"file={file} cannot be read: {error}; give a .jsonl file with prompts, questions and answers"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is not None:
                pairs = list(zip(entry["questions"], entry["answers"], strict=True))
                if not pairs or not all(isinstance(text, str) and text for pair in pairs for text in pair):
                    raise TypeError
                questions[entry["prompt"].strip()] = pairs
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'file={file}, line {number}: write {{"prompt": "two cats", "questions": ["How many cats are '
                f'there?"], "answers": ["two"]}}'
            ) from None
    return questions
