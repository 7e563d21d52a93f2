"""Other programs' keys are answered with ours."""

import pytest

from alignlab.config import outline
from alignlab.config.synonyms import SYNONYMS, synonym
from tests.running import command_line

ALGORITHMS = ("ddpo", "dpo", "draft", "draftp", "kto", "rwr", "sft")
MODELS = ("emoji", "flux", "sd15")


def every_key() -> set[str]:
    """The keys of a training run, whatever algorithm, model and prompts are chosen."""
    chosen = [[f"algo={name}"] for name in ALGORITHMS] + [[f"model={name}"] for name in MODELS]
    chosen += [["prompts=file"], ["prompts=dataset"], ["reward=clip"]]
    train = outline.command_of("train")
    return {key.name for words in chosen for key in outline.outline(train, words).all_keys()}


def test_ours_exist() -> None:
    """Each key that is named is one that a run can have, each group has the option, and no key of ours is
    taken for another program's."""
    known = every_key()
    groups = {key.partition(".")[0] for key in known}
    wrong = [
        (theirs, key)
        for theirs, ours in SYNONYMS.items()
        for key in ours.keys
        if (key.partition("=")[0] not in groups if "=" in key else key not in known)
    ]
    assert not wrong, wrong
    assert not {*SYNONYMS} & {key for key in known if "." not in key}


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("learning_rate=1e-4", "here it is lr"),
        ("train.learning_rate=1e-4", "here it is lr"),
        (
            "per-device-train-batch-size=4",
            "here it is micro_batch or samples_per_step (micro_batch is how many",
        ),
        ("cfg=7", "here it is sampler.guidance_scale or eval_sampler.guidance_scale"),
        ("num_inference_steps=20", "here it is sampler.steps or eval_sampler.steps"),
        ("wandb=true", "here it is tracker (none, wandb or trackio)"),
        ("wandb_project=x", "here it is tracking.project"),
        ("rank=8", "here it is policy.lora.rank"),
        ("model_name_or_path=x", "here it is model.path_or_id or model=NAME"),
        ("clip_range=0.1", "it would be algo.clip, which the chosen options do not have"),
    ],
)
def test_what_is_told(typed: str, ours: str, monkeypatch, capsys) -> None:
    """One sentence, code 2, nothing loaded."""
    assert command_line(monkeypatch, typed) == 2
    key = typed.partition("=")[0]
    assert f"error: {key} is not a known key; {ours}" in capsys.readouterr().err


def test_a_name_of_nobody() -> None:
    """It is left to the nearest key."""
    assert synonym("kl_coef", ["kl_coeff"]) is None
