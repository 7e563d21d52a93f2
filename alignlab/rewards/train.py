"""Fits a reward head on a frozen CLIP, or its last blocks too: ratings by least squares, choices by the
Bradley-Terry model.

    aesthetic    L = mean (head(E(x)) - rating)^2
                 LAION's predictor
    preference   L = -mean [y log s(r_0 - r_1) + (1 - y) log s(r_1 - r_0)],  y = label_0
                 Kirstain et al. 2023, section 3

With no block of the CLIP trained every image is encoded once and the head is fitted on the embeddings.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from alignlab.rewards.clip import Clip
from alignlab.rewards.heads import Agreement, Mlp

Kind = Literal["aesthetic", "preference"]


class Fit:
    """A head, its CLIP, and their training.

    Args:
        kind: "aesthetic" (items: image, rating) or "preference" (items: image, image, caption, label).
        clip: what the head stands on.
        blocks: how many of the image tower's last transformer blocks are trained with the head.
        hidden: widths of the aesthetic head's hidden layers; relu between them, or none as LAION publishes.
        seed: of the head's first weights and of the order of the data.

    Raises:
        ValueError: if the image tower has no such blocks.
    """

    def __init__(
        self,
        kind: Kind,
        clip: Clip,
        *,
        blocks: int = 0,
        hidden: tuple[int, ...] = (),
        relu: bool = True,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.kind, self.clip, self.seed = kind, clip, seed
        self.head: nn.Module = (
            Agreement(clip.width) if kind == "preference" else Mlp([clip.width, *hidden, 1], relu=relu)
        )
        self.tuned = _last_blocks(clip.model.visual, blocks) if blocks else {}

    def run(
        self,
        data: Dataset[Any],
        held_out: Dataset[Any],
        *,
        epochs: int,
        lr: float,
        batch_size: int,
        weight_decay: float,
        device: torch.device,
        tell: Callable[[dict[str, float]], None] = lambda line: None,
    ) -> dict[str, float]:
        """Trains with AdamW and a cosine to zero; tells one line an epoch; returns the held-out numbers at
        the end."""
        self.clip.model.to(device)
        self.head.to(device)
        if not self.tuned:
            data, held_out = (
                self._encoded(data, batch_size, device),
                self._encoded(held_out, batch_size, device),
            )
        if isinstance(self.head, Mlp):  # begin at the mean rating
            ratings = torch.tensor([float(item[-1]) for item in data])  # type: ignore[attr-defined]
            bias: Any = self.head.layers[-1].bias
            bias.data.fill_(ratings.mean())
        weights = [*self.head.parameters(), *self.tuned.values()]
        for weight in self.tuned.values():
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
        loader = DataLoader(
            data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(self.seed)
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
        numbers: dict[str, float] = {}
        for epoch in range(1, epochs + 1):
            total, count = 0.0, 0
            for batch in loader:
                loss = self._loss(*self._scored(batch, device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                total, count = total + loss.item() * len(batch[-1]), count + len(batch[-1])
            numbers = self.measure(held_out, batch_size, device)
            tell({"epoch": epoch, "loss": total / count, **numbers})
        for weight in self.tuned.values():
            weight.requires_grad_(False)
        return numbers

    @torch.no_grad()
    def measure(self, held_out: Dataset[Any], batch_size: int, device: torch.device) -> dict[str, float]:
        """preference: pair accuracy (ties left out) and loss. aesthetic: Spearman's rank correlation and mean
        absolute error."""
        pairs = [self._scored(batch, device) for batch in DataLoader(held_out, batch_size)]
        score, truth = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
        if self.kind == "preference":
            clear = truth != 0.5
            right = (score[clear] > 0) == (truth[clear] > 0.5)
            return {
                "held_out/accuracy": right.float().mean().item(),
                "held_out/loss": self._loss(score, truth).item(),
            }
        correlation = float(spearmanr(score.numpy(), truth.numpy()).statistic)
        return {"held_out/spearman": correlation, "held_out/error": (score - truth).abs().mean().item()}

    def _loss(self, score: Tensor, truth: Tensor) -> Tensor:
        if self.kind == "preference":
            return F.binary_cross_entropy_with_logits(score, truth)
        return (score - truth).square().mean()

    def _scored(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """What the head says of a batch, [B], and what people said: r_0 - r_1 of pairs, the rating of single
        images."""
        if self.tuned:
            batch = self._embeddings(batch, device)
        *embeddings, truth = (part.to(device) for part in batch)
        if self.kind == "preference":
            first, second, text = embeddings
            return self.head(first, text) - self.head(second, text), truth
        return self.head(embeddings[0]), truth

    def _embeddings(self, batch: Any, device: torch.device) -> tuple[Tensor, ...]:
        if self.kind == "preference":
            first, second, captions, label = batch
            texts = self.clip.texts(captions, device)
            return (
                self.clip.images(first.to(device)),
                self.clip.images(second.to(device)),
                texts,
                label.float(),
            )
        images, rating = batch
        return self.clip.images(images.to(device)), rating.float()

    @torch.no_grad()
    def _encoded(self, data: Dataset[Any], batch_size: int, device: torch.device) -> TensorDataset:
        """Every item as embeddings, on the host."""
        parts = [
            [part.cpu() for part in self._embeddings(batch, device)] for batch in DataLoader(data, batch_size)
        ]
        return TensorDataset(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _last_blocks(visual: nn.Module, blocks: int) -> dict[str, nn.Parameter]:
    """The weights behind the last `blocks` transformer blocks of an open_clip image tower, by their names in
    the CLIP."""
    tower: Any = visual
    try:
        known = len(tower.transformer.resblocks)
    except AttributeError:
        raise ValueError(
            f"blocks={blocks}: the image tower of this CLIP is no open_clip ViT; set blocks=0"
        ) from None
    if blocks > known:
        raise ValueError(
            f"blocks={blocks}: the image tower has {known} transformer blocks; set blocks<={known}"
        )

    def named() -> Iterator[tuple[str, nn.Parameter]]:
        for k in range(known - blocks, known):
            for name, weight in tower.transformer.resblocks[k].named_parameters():
                yield f"visual.transformer.resblocks.{k}.{name}", weight
        for name, weight in tower.ln_post.named_parameters():
            yield f"visual.ln_post.{name}", weight
        if isinstance(tower.proj, nn.Parameter):
            yield "visual.proj", tower.proj

    return dict(named())
