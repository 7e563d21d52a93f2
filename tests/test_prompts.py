"""Which prompts an epoch draws."""

from collections import Counter

import pytest

from alignlab.data.prompts import Prompts

ANIMALS = ["ant", "cat", "dog", "emu", "fox"]


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_all_prompts_are_met_equally_often(per_prompt: int) -> None:
    """Over any five groups in a row each of five prompts comes once, per_prompt images in a row, across the borders of epochs."""
    prompts = Prompts(prompts=ANIMALS, template="{a}", per_prompt=per_prompt)
    drawn = [p for epoch in range(10) for p in prompts.draw(4 * per_prompt, seed=0, epoch=epoch)]
    assert set(Counter(drawn).values()) == {8 * per_prompt}
    groups = [drawn[k : k + per_prompt] for k in range(0, len(drawn), per_prompt)]
    assert all(len(set(group)) == 1 for group in groups)
    for lap in range(8):
        assert sorted(group[0] for group in groups[5 * lap : 5 * lap + 5]) == ["a cat", "a dog", "a fox", "an ant", "an emu"]


def test_a_draw_is_a_pure_function_of_seed_and_epoch() -> None:
    """Epochs may be drawn in any order, by any object; seeds and laps differ in their order."""
    one, other = (Prompts(prompts=[str(k) for k in range(45)]) for _ in range(2))
    forwards = [one.draw(45, seed=3, epoch=e) for e in range(4)]
    backwards = [other.draw(45, seed=3, epoch=e) for e in reversed(range(4))]
    assert forwards == backwards[::-1]
    assert len({*forwards, one.draw(45, seed=4, epoch=0)}) == 5


def test_files(tmp_path) -> None:
    """One prompt a line, UTF-8 with or without a byte-order mark, blank lines skipped, filled into the template."""
    (tmp_path / "p.txt").write_text("\ufeffLöwe\n\n  roter Fuchs \r\n", encoding="utf-8")
    prompts = Prompts(file=str(tmp_path / "p.txt"), template="ein Bild: {}", unseen=["Igel"])
    assert prompts.prompts == ("ein Bild: Löwe", "ein Bild: roter Fuchs") and prompts.unseen == ("ein Bild: Igel",)
