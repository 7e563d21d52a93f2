"""Which prompts an epoch draws."""

from collections import Counter

import pytest

from alignlab.data.prompts import Prompts

ANIMALS = ["ant", "cat", "dog", "emu", "fox"]


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_all_prompts_are_met_equally_often(per_prompt: int) -> None:
    """Over any five groups in a row each of five prompts comes once, per_prompt images in a row, across the
    borders of epochs."""
    prompts = Prompts(prompts=ANIMALS, template="{a}", per_prompt=per_prompt)
    drawn = [p for epoch in range(10) for p in prompts.draw(4 * per_prompt, seed=0, epoch=epoch)]
    assert set(Counter(drawn).values()) == {8 * per_prompt}
    groups = [drawn[k : k + per_prompt] for k in range(0, len(drawn), per_prompt)]
    assert all(len(set(group)) == 1 for group in groups)
    for lap in range(8):
        assert sorted(group[0] for group in groups[5 * lap : 5 * lap + 5]) == [
            "a cat",
            "a dog",
            "a fox",
            "an ant",
            "an emu",
        ]


def test_a_draw_is_a_pure_function_of_seed_and_epoch() -> None:
    """Epochs may be drawn in any order, by any object; seeds and laps differ in their order."""
    one, other = (Prompts(prompts=[str(k) for k in range(45)]) for _ in range(2))
    forwards = [one.draw(45, seed=3, epoch=e) for e in range(4)]
    backwards = [other.draw(45, seed=3, epoch=e) for e in reversed(range(4))]
    assert forwards == backwards[::-1]
    assert len({*forwards, one.draw(45, seed=4, epoch=0)}) == 5


def test_files(tmp_path) -> None:
    """One prompt a line, UTF-8 with or without a byte-order mark, blank lines skipped, filled into the
    template."""
    (tmp_path / "p.txt").write_text("\ufeffLöwe\n\n  roter Fuchs \r\n", encoding="utf-8")
    prompts = Prompts(file=str(tmp_path / "p.txt"), template="ein Bild: {}", unseen=["Igel"])
    assert prompts.prompts == ("ein Bild: Löwe", "ein Bild: roter Fuchs") and prompts.unseen == (
        "ein Bild: Igel",
    )


def test_product_sets() -> None:
    """Further places of the template are filled with every value; the set is the product."""
    prompts = Prompts(
        prompts=["ant", "lion"],
        template="{a} on {colour} background",
        fill={"colour": ["a red", "an orange"]},
    )
    assert prompts.prompts == (
        "an ant on a red background",
        "an ant on an orange background",
        "a lion on a red background",
        "a lion on an orange background",
    )


def test_the_split_is_a_prompts_own() -> None:
    """About the share is unseen, the two sides do not meet, and a prompt keeps its side when others come."""
    few, many = (Prompts(prompts=[str(k) for k in range(n)], unseen_share=0.2) for n in (500, 1000))
    assert (
        70 < len(few.unseen) < 130
        and not {*few.prompts} & {*few.unseen}
        and len(few.prompts) + len(few.unseen) == 500
    )
    assert {*few.unseen} <= {*many.unseen} and {*few.prompts} <= {*many.prompts}


def test_ranks_share_an_epoch() -> None:
    """Two ranks, or four, draw together what one draws alone, whole groups each."""
    prompts = Prompts(prompts=ANIMALS, per_prompt=2)
    alone = prompts.draw(24, seed=1, epoch=3)
    for ranks in (2, 4):
        parts = [prompts.draw(24, seed=1, epoch=3, rank=r, ranks=ranks) for r in range(ranks)]
        assert sum(parts, ()) == alone and all(len(p) == 24 // ranks for p in parts)


def test_jsonl_keeps_metadata(tmp_path) -> None:
    """Objects with a prompt and whatever else; a line that is none is named."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "count": 2}\n\n{"prompt": " a dog "}\n')
    prompts = Prompts(file=str(tmp_path / "p.jsonl"))
    assert prompts.prompts == ("a cat", "a dog") and prompts.metadata == {"a cat": {"count": 2}, "a dog": {}}
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n"a dog"\n')
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: not an object with a text"):
        Prompts(file=str(tmp_path / "p.jsonl"))


def test_datasets(tmp_path) -> None:
    """A dataset's column, by the library's own loader; a wrong column is answered with the right ones."""
    pytest.importorskip("datasets")
    (tmp_path / "train.csv").write_text("caption,id\na cat,1\na dog,2\n")
    assert Prompts(dataset=str(tmp_path), column="caption").prompts == ("a cat", "a dog")
    with pytest.raises(ValueError, match="has no column prompt; its columns are caption, id"):
        Prompts(dataset=str(tmp_path))
    with pytest.raises(ValueError, match="cannot be loaded"):
        Prompts(dataset=str(tmp_path / "none"))


def test_imagenet_animals() -> None:
    """398 of them, from the tench to the puffer; further classes are no animals."""
    prompts = Prompts(imagenet_animals=398, template="{a}")
    assert len(prompts.prompts) == 398 and (prompts.prompts[0], prompts.prompts[-1]) == (
        "a tench",
        "a puffer",
    )
    with pytest.raises(ValueError, match=r"imagenet_animals=399 is outside"):
        Prompts(imagenet_animals=399)
