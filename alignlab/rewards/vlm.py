"""A vision-language model of transformers, on this machine: what it replies to a question about an image, and
how likely a reply is."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from alignlab.fast import freeze
from alignlab.rewards.weights import MODEL, VOCABULARIES
from alignlab.rewards.weights import to_fetch as absent

Precision = Literal["float32", "bfloat16", "float16"]


def locate(path: str, key: str = "path") -> str:
    """What transformers loads it by: a folder, or a name on the hub, which is fetched when it is loaded.

    Raises:
        FileNotFoundError: if it is neither.
    """
    folder = Path(path).expanduser()
    mend = "give a folder in transformers' format, or owner/name of the hub"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{key}={path}: {folder} has no config.json; {mend}")
        return str(folder)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise FileNotFoundError(f"{key}={path}: there is no such folder; {mend}")
    return path


def to_fetch(path: str, revision: str | None = None) -> list[str]:
    """How to get a model, its processor and its tokenizer, if they are not in the hub's cache."""
    readers = ("processor_config.json", "preprocessor_config.json")
    return absent(path, "config.json", MODEL, readers, VOCABULARIES, revision=revision, whole=True)


class Vlm:
    """Any model that AutoModelForImageTextToText and AutoProcessor load, without code of its own (LLaVA,
    Qwen-VL, SmolVLM ...).

    On the meta device (alignlab.plan) its weights are there, but it says nothing: what it would say steers
    its computation.

    Args:
        path: a folder in transformers' format, or owner/name of the hub.
        revision: a commit of the hub.
        dtype: of the weights.
        chat: a question's surroundings where the processor has no chat template; "{}" is replaced by the
            question. The default is LLaVA-1.5's.
        batch_size: images at once. [images]
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        dtype: Precision = "bfloat16",
        chat: str = "USER: <image>\n{} ASSISTANT:",
        batch_size: int = 8,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        where = locate(path)
        self.processor = AutoProcessor.from_pretrained(where, revision=revision)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # replies begin where the questions end
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.dtype = getattr(torch, dtype)
        self.model: Any = freeze(
            AutoModelForImageTextToText.from_pretrained(where, revision=revision, dtype=self.dtype)
        )
        self.chat, self.batch_size = chat, batch_size

    @torch.no_grad()
    def reply(self, images: Tensor, questions: Sequence[str], *, tokens: int = 64) -> list[str]:
        """The most likely reply, greedily, to each image's question; at most `tokens` tokens. Images [B, 3,
        H, W] in [0, 1]."""
        if images.is_meta:
            self.model.to(images.device)
            return [""] * len(questions)
        replies = []
        for inputs, _ in self._batches(images, questions):
            out = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
            new = out if self.model.config.is_encoder_decoder else out[:, inputs["input_ids"].shape[1] :]
            replies += [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return replies

    @torch.no_grad()
    def likelihood(self, images: Tensor, questions: Sequence[str], replies: Sequence[str]) -> Tensor:
        """[B] float32: the probability that the model's reply begins with the given one. For models with a
        decoder only."""
        if images.is_meta:
            self.model.to(images.device)
            return torch.zeros(len(questions), device=images.device)
        coded = [self.tokenizer(text, add_special_tokens=False).input_ids for text in replies]
        chances = []
        for inputs, rows in self._batches(images, questions):
            batch, asked = [coded[row] for row in rows], inputs["input_ids"]
            reply = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
            mask = torch.zeros_like(reply)
            for row, ids in enumerate(batch):
                reply[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
            reply, mask = reply.to(images.device), mask.to(images.device)
            more = {"input_ids": reply, "attention_mask": mask}
            for name, value in inputs.items():
                if value.shape == asked.shape:  # one entry a token: the replies' tokens follow
                    inputs[name] = torch.cat(
                        [value, more.get(name, torch.zeros_like(reply)).to(value.dtype)], 1
                    )
            logits = self.model(**inputs).logits[:, asked.shape[1] - 1 : -1].float()
            each = logits.log_softmax(-1).gather(-1, reply[..., None])[..., 0]
            chances.append((each * mask).sum(1).exp())
        return torch.cat(chances)

    def _batches(self, images: Tensor, questions: Sequence[str]) -> Iterator[tuple[dict[str, Any], range]]:
        """The processor's inputs on the images' device, and the rows that they are of."""
        self.model.to(images.device)
        pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for k in range(0, len(pixels), self.batch_size):
            rows = range(k, min(k + self.batch_size, len(pixels)))
            texts = [self._surrounded(questions[row]) for row in rows]
            pictures = [[Image.fromarray(pixels[row])] for row in rows]
            inputs = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt").to(
                images.device, self.dtype
            )
            yield dict(inputs), rows

    def _surrounded(self, question: str) -> str:
        """A question as the model was taught to be asked, with the place of the image. It can name no place,
        turn or end of its own."""
        for special in self.tokenizer.all_special_tokens:
            question = question.replace(special, " ")
        if getattr(self.processor, "chat_template", None) is None:
            return self.chat.replace("{}", question)
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        return str(self.processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
