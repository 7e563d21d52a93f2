"""Pictures whose statistics are known: black, flat, chequered, of one pure colour, of all colours."""

import pytest
import torch

from alignlab.metrics.image_statistics import NAMES, image_statistics


def of(image: torch.Tensor) -> dict[str, float]:
    return {name: value.item() for name, value in image_statistics(image[None]).items()}


def test_known_pictures():
    black, white, red = torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.zeros(3, 8, 8)
    red[0] = 1
    chequers = (torch.arange(8)[:, None] + torch.arange(8)).fmod(2).expand(3, 8, 8)
    assert of(black) == pytest.approx(
        {"dark_fraction": 1, "edge_density": 0, "colour_entropy": 0, "saturation": 0}
    )
    assert of(white) == pytest.approx(
        {"dark_fraction": 0, "edge_density": 0, "colour_entropy": 0, "saturation": 0}
    )
    assert of(red) == pytest.approx(
        {"dark_fraction": 0, "edge_density": 0, "colour_entropy": 0, "saturation": 1}
    )
    assert of(chequers) == pytest.approx(
        {"dark_fraction": 0.5, "edge_density": 1, "colour_entropy": 1, "saturation": 0}
    )


def test_every_colour_once():
    """The 64 quantised colours in 64 pixels: 6 bits."""
    levels = (torch.arange(4) + 0.5) / 4
    image = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, 8, 8)
    assert of(image)["colour_entropy"] == pytest.approx(6)


def test_images_do_not_mix():
    torch.manual_seed(0)
    images = torch.rand(5, 3, 16, 16)
    together = image_statistics(images)
    assert tuple(together) == NAMES
    for k in range(5):
        for name, value in image_statistics(images[k : k + 1]).items():
            assert together[name][k] == pytest.approx(value.item(), abs=1e-6)
