"""DDPO's vision-language reward (arXiv 2305.13301, section 5.1): a model describes the image, and BERTScore
says how much of the prompt the description contains.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from alignlab.rewards import weights
from alignlab.rewards.bertscore import BertScore
from alignlab.rewards.vlm import Precision, Vlm, locate, to_fetch
from alignlab.rewards.weights import MODEL, VOCABULARIES


class Description:
    """BERTScore of the description with the reference text. Not differentiable. With recall, as published,
    what the prompt does not ask for costs nothing; most scores lie within a few hundredths of each other, so
    standardise them.

    Differs from the published server: the model sees the image in 8 bits, not as a JPEG of quality 80.

    Args:
        path, revision, dtype, chat, batch_size: of the `Vlm`.
        question: that asks for the description, as published.
        reference: what it should say; "{}" is replaced by the prompt. As published.
        tokens: of a description, at most. As published.
        encoder, layer, encoder_revision, baseline: of the `BertScore`; the published encoder, and the layer
            that bert-score takes of it.
        score: which of its numbers; published is recall.
    """

    differentiable = False
    needs_prompt = True
    unit = "BERTScore recall"
    typical_range = (0.0, 1.0)
    input_size: int | None = None
    licence = "unstated"

    @staticmethod
    def check(
        path: str,
        *,
        encoder: str = "microsoft/deberta-xlarge-mnli",
        reference: str = "{}",
        baseline: float = 0.0,
        **_: Any,
    ) -> None:
        locate(path)
        locate(encoder, "encoder")
        if "{}" not in reference:
            raise ValueError(f"reference={reference!r} has no place for the prompt; write {{}}")
        if not baseline < 1:
            raise ValueError(f"baseline={baseline} must be less than 1")

    @staticmethod
    def missing(
        path: str,
        *,
        revision: str | None = None,
        encoder: str = "microsoft/deberta-xlarge-mnli",
        encoder_revision: str | None = None,
        **_: Any,
    ) -> list[str]:
        return [
            *to_fetch(path, revision),
            *weights.to_fetch(
                encoder, "config.json", MODEL, VOCABULARIES, revision=encoder_revision, whole=True
            ),
        ]

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        question: str = "Answer concisely: what is going on in this image?",
        reference: str = "The image contains {}",
        encoder: str = "microsoft/deberta-xlarge-mnli",
        layer: int = 40,
        encoder_revision: str | None = None,
        score: Literal["recall", "precision", "f1"] = "recall",
        baseline: float = 0.0,
        dtype: Precision = "bfloat16",
        chat: str = "USER: <image>\n{} ASSISTANT:",
        tokens: int = 64,
        batch_size: int = 8,
    ) -> None:
        self.check(path, encoder=encoder, reference=reference, baseline=baseline)
        self.vlm = Vlm(path, revision=revision, dtype=dtype, chat=chat, batch_size=batch_size)
        self.bertscore = BertScore(encoder, layer, revision=encoder_revision, baseline=baseline)
        self.question, self.reference, self.score, self.tokens = question, reference, score, tokens
        self.unit = f"BERTScore {score}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        descriptions = self.vlm.reply(images, [self.question] * len(prompts), tokens=self.tokens)
        agreement = self.bertscore(
            descriptions, [self.reference.replace("{}", prompt) for prompt in prompts], images.device
        )
        return getattr(agreement, self.score)
