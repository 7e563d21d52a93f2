"""Scenes of the emoji world: one glyph in some pose, size and place on a light, softly graded background.

Every glyph of the font is rasterised once; a batch of scenes is then drawn with `grid_sample`, so that a
million scenes cost minutes. A scene is 48x48 RGB in [0, 1] with the caption that a person would give it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONT = Path(
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
)  # Debian package fonts-noto-color-emoji (OFL)
SIZE = 48  # pixels of a scene's side
GLYPH = 128  # pixels of a rasterised glyph's side

# The 45 animals of the DDPO prompt set, each with every pose that the font has (full body first).
ANIMALS = {
    "cat": "🐈🐱",
    "dog": "🐕🐶",
    "horse": "🐎🐴",
    "monkey": "🐒🐵",
    "rabbit": "🐇🐰",
    "zebra": "🦓",
    "spider": "🕷",
    "bird": "🐦",
    "sheep": "🐑",
    "deer": "🦌",
    "cow": "🐄🐮",
    "goat": "🐐",
    "lion": "🦁",
    "tiger": "🐅🐯",
    "bear": "🐻",
    "raccoon": "🦝",
    "fox": "🦊",
    "wolf": "🐺",
    "lizard": "🦎",
    "beetle": "🪲",
    "ant": "🐜",
    "butterfly": "🦋",
    "fish": "🐟",
    "shark": "🦈",
    "whale": "🐋🐳",
    "dolphin": "🐬",
    "squirrel": "🐿",
    "mouse": "🐁🐭",
    "rat": "🐀",
    "snake": "🐍",
    "turtle": "🐢",
    "frog": "🐸",
    "chicken": "🐔🐓",
    "duck": "🦆",
    "goose": "🪿",
    "bee": "🐝",
    "pig": "🐖🐷",
    "turkey": "🦃",
    "fly": "🪰",
    "llama": "🦙",
    "camel": "🐪🐫",
    "bat": "🦇",
    "gorilla": "🦍",
    "hedgehog": "🦔",
    "kangaroo": "🦘",
}

# Never prompts of the default training set: kept for the generalisation experiments.
HELD_OUT = {
    "panda": "🐼",
    "koala": "🐨",
    "elephant": "🐘",
    "giraffe": "🦒",
    "penguin": "🐧",
    "owl": "🦉",
    "crocodile": "🐊",
    "octopus": "🐙",
    "crab": "🦀",
    "snail": "🐌",
    "flamingo": "🦩",
    "swan": "🦢",
    "parrot": "🦜",
    "leopard": "🐆",
    "rhinoceros": "🦏",
    "hippopotamus": "🦛",
    "sloth": "🦥",
    "otter": "🦦",
    "seal": "🦭",
    "ladybug": "🐞",
    "apple": "🍎",
    "pear": "🍐",
    "banana": "🍌",
    "strawberry": "🍓",
    "pineapple": "🍍",
    "cherry": "🍒",
    "watermelon": "🍉",
    "carrot": "🥕",
    "pizza": "🍕",
    "cake": "🎂",
    "car": "🚗",
    "bus": "🚌",
    "truck": "🚚",
    "bicycle": "🚲",
    "airplane": "✈",
    "rocket": "🚀",
    "sailboat": "⛵",
    "house": "🏠",
    "tree": "🌳",
    "cactus": "🌵",
    "guitar": "🎸",
    "umbrella": "☂",
    "balloon": "🎈",
    "clock": "⏰",
}

NAMES = (*ANIMALS, *HELD_OUT)

BACKGROUNDS = {
    "white": (248, 248, 248),
    "gray": (168, 170, 174),
    "black": (38, 40, 44),
    "red": (232, 96, 92),
    "orange": (248, 168, 84),
    "yellow": (250, 226, 110),
    "green": (122, 196, 116),
    "teal": (84, 188, 180),
    "blue": (98, 156, 236),
    "purple": (166, 122, 218),
    "pink": (248, 170, 204),
    "brown": (160, 120, 88),
}
COLOURS = tuple(BACKGROUNDS)


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def captions(name: str, colour: str) -> tuple[str, ...]:
    """Every caption that a scene may carry, the shortest first."""
    thing, place = article(name), f"on {article(colour)} background"
    return (
        name,
        thing,
        f"a photo of {thing}",
        f"a picture of {thing}",
        f"{thing} {place}",
        f"{name} {place}",
        f"a photo of {thing} {place}",
    )


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of drawn scenes."""

    images: Tensor
    """[B, 3, 48, 48] in [0, 1]."""
    names: list[int]
    """Index into NAMES, [B]."""
    colours: list[int]
    """Index into COLOURS, [B]."""
    captions: list[str]
    """One caption a scene, drawn uniformly from `captions`, [B]."""


def rasterise(glyph: str) -> np.ndarray:
    """One glyph, centred, RGBA premultiplied, [128, 128, 4] in [0, 1]."""
    font = ImageFont.truetype(str(FONT), 109)  # the only bitmap size of the font
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 16), glyph, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font at {FONT} has no glyph for {glyph!r}; install fonts-noto-color-emoji")
    cut = canvas.crop(box)
    scale = (GLYPH - 4) / max(cut.size)
    cut = cut.resize((round(cut.width * scale), round(cut.height * scale)), Image.LANCZOS)
    square = Image.new("RGBA", (GLYPH, GLYPH))
    square.paste(cut, ((GLYPH - cut.width) // 2, (GLYPH - cut.height) // 2))
    rgba = np.asarray(square, dtype=np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba


class World:
    """Draws random scenes. Two sets of draws with the same seed are identical.

    Args:
        seed: of the scene parameters.
        animal_share: probability that a scene shows one of the 45 animals rather than a held-out glyph.
    """

    def __init__(self, seed: int = 0, animal_share: float = 0.75) -> None:
        self.rng = np.random.default_rng(seed)
        self.animal_share = animal_share
        poses = {**ANIMALS, **HELD_OUT}
        self.first = np.cumsum([0, *(len(poses[n]) for n in NAMES)])  # first pose of each name
        flat = np.stack([rasterise(g) for n in NAMES for g in poses[n]])
        self.glyphs = torch.from_numpy(flat).permute(0, 3, 1, 2).contiguous()  # [P, 4, 128, 128]

    def draw(self, n: int, names: list[int] | None = None, colours: list[int] | None = None) -> Scenes:
        """`n` scenes; `names` and `colours` fix what they show, [n] each."""
        rng = self.rng
        if names is None:
            animal = rng.random(n) < self.animal_share
            names = np.where(
                animal, rng.integers(len(ANIMALS), size=n), rng.integers(len(ANIMALS), len(NAMES), size=n)
            ).tolist()
        if colours is None:
            colours = rng.integers(len(COLOURS), size=n).tolist()
        poses = [int(rng.integers(self.first[k], self.first[k + 1])) for k in names]

        # Scene pixel -> glyph pixel: undo place, turn, size and mirror. Drawn at 2x and pooled against
        # aliasing.
        size = rng.uniform(0.55, 0.92, n)
        room = 1 - size
        x, y = rng.uniform(-1, 1, n) * room, rng.uniform(-1, 1, n) * room
        turn = np.deg2rad(rng.normal(0, 9, n).clip(-25, 25))
        mirror = rng.choice([-1.0, 1.0], n)
        cos, sin = np.cos(turn) / size, np.sin(turn) / size
        theta = np.stack(
            [mirror * cos, mirror * sin, mirror * (-cos * x - sin * y), -sin, cos, sin * x - cos * y], -1
        )
        grid = F.affine_grid(
            torch.from_numpy(theta.reshape(n, 2, 3)).float(), [n, 4, 2 * SIZE, 2 * SIZE], align_corners=False
        )
        sprite = F.avg_pool2d(F.grid_sample(self.glyphs[poses], grid, align_corners=False), 2)

        base = torch.tensor([BACKGROUNDS[COLOURS[c]] for c in colours], dtype=torch.float32) / 255
        base = base + torch.from_numpy(rng.normal(0, 0.02, (n, 3))).float()
        tilt = torch.from_numpy(rng.uniform(-0.07, 0.07, (n, 2))).float()  # a light linear gradient
        line = torch.linspace(-1, 1, SIZE)
        shade = tilt[:, 0, None, None] * line[None, :, None] + tilt[:, 1, None, None] * line[None, None, :]
        background = base[:, :, None, None] + shade[:, None]
        images = (sprite[:, :3] + (1 - sprite[:, 3:]) * background).clamp(0, 1)
        texts = [str(rng.choice(captions(NAMES[k], COLOURS[c]))) for k, c in zip(names, colours, strict=True)]
        return Scenes(images=images, names=names, colours=colours, captions=texts)
