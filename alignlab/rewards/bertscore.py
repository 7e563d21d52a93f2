"""BERTScore (Zhang et al. 2020, arXiv 1904.09675): how alike two texts are, token by token, in the embeddings
of an encoder.

    P = mean_j max_i cos(x_i, y_j)   over the candidate's tokens y_j
    R = mean_i max_j cos(x_i, y_j)   over the reference's tokens x_i          F1 = 2 P R / (P + R)

The package bert-score is not used: its last release is of 2023 and brings pandas and matplotlib. Its
conventions are kept: the output of one hidden layer, each token matched greedily, special tokens may be
matched but are not counted, an empty text scores 0, RoBERTa and GPT-2 read a text's first word as one within
it (after a blank). Differs in that padding is never matched (there it counts as a cosine of 0), so a score
does not depend on its batch. Weighting by inverse document frequency is left out: a reward does not know its
corpus.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.fast import freeze
from alignlab.rewards.vlm import locate


class Tokens(NamedTuple):
    """Embedded texts."""

    embeddings: Tensor
    """[B, T, D]"""
    present: Tensor
    """[B, T] bool, without the padding."""
    counted: Tensor
    """[B, T] bool, without the special tokens."""


class Alignment(NamedTuple):
    """[B] each, at most 1."""

    precision: Tensor
    recall: Tensor
    f1: Tensor


def align(candidate: Tokens, reference: Tokens) -> Alignment:
    """Greedy matching by cosine."""
    cosine = (
        F.normalize(reference.embeddings, dim=-1) @ F.normalize(candidate.embeddings, dim=-1).mT
    )  # [B, Tx, Ty]
    cosine = cosine.masked_fill(~(reference.present[:, :, None] & candidate.present[:, None, :]), -torch.inf)
    empty = ~(candidate.counted.any(1) & reference.counted.any(1))
    precision = _mean(cosine.amax(1), candidate.counted).masked_fill(empty, 0)
    recall = _mean(cosine.amax(2), reference.counted).masked_fill(empty, 0)
    f1 = torch.where(precision + recall > 0, 2 * precision * recall / (precision + recall), 0)
    return Alignment(precision, recall, f1)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return values.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp(min=1)


class BertScore:
    """BERTScore by any encoder of transformers, in float32.

    Args:
        path: a folder in transformers' format, or owner/name of the hub.
        layer: whose output counts, from 0 (the embeddings); -1 is the last. 40 for
            microsoft/deberta-xlarge-mnli, 17 for roberta-large. [number of a layer]
        revision: a commit of the hub.
        baseline: b of the rescaling (s - b) / (1 - b), by which unrelated texts score about 0. [that of s]

    Raises:
        ValueError: if there is no such layer.
    """

    def __init__(self, path: str, layer: int, *, revision: str | None = None, baseline: float = 0.0) -> None:
        from transformers import AutoModel, AutoTokenizer

        where = locate(path)
        self.tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
        self.model = freeze(AutoModel.from_pretrained(where, revision=revision, dtype=torch.float32))
        layers = self.model.config.num_hidden_layers
        if not -1 <= layer <= layers:
            raise ValueError(f"layer={layer}: {path} has the layers 0 to {layers}")
        self.layer, self.baseline = layer, baseline
        self.before = " " if self.model.config.model_type in ("roberta", "gpt2") else ""
        self.longest = min(
            self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 512), 512
        )

    def __call__(
        self, candidates: Sequence[str], references: Sequence[str], device: torch.device | str = "cpu"
    ) -> Alignment:
        """Of each candidate and its reference, on `device`; without a graph."""
        self.model.to(device)
        alignment = align(self._embedded(candidates, device), self._embedded(references, device))
        return Alignment(*((score - self.baseline) / (1 - self.baseline) for score in alignment))

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str], device: torch.device | str) -> Tokens:
        coded = self.tokenizer(
            [self.before + text.strip() if text.strip() else "" for text in texts],
            padding=True,
            truncation=True,
            max_length=self.longest,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(device)
        special, present = coded.pop("special_tokens_mask").bool(), coded["attention_mask"].bool()
        hidden = self.model(**coded, output_hidden_states=True).hidden_states[self.layer]
        return Tokens(hidden.float(), present, present & ~special)
