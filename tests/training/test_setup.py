"""What a run is made of says what it cannot use."""

from alignlab.training.setup import warn_of_cut
from tests.conftest import tiny_policy


def test_prompts_that_are_cut_are_counted(tiny_sd: str, capsys) -> None:
    """The tiny tokenizer reads 12 tokens, two of them marks, a byte each: what is longer is counted, the
    first is shown, in one line."""
    policy = tiny_policy(tiny_sd, size=0)
    fits, long = "abcdefghij", "abcdefghijk"
    assert policy.family.cut([fits, long, "x" * 10_000, ""]) == [long, "x" * 10_000]
    warn_of_cut(policy, [fits, long, "x" * 10_000])
    assert capsys.readouterr().err == (
        "warning: 2 of 3 prompts are longer than the model's tokenizer reads, and are cut there; the first: "
        f"{long!r} ...\n"
    )
    warn_of_cut(policy, [fits])
    assert capsys.readouterr().err == ""
