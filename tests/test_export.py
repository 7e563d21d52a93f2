"""python -m alignlab.export: what a run learned, in every form, by the real command."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from alignlab import export
from alignlab.engine.noise import FIRST, noise_key
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import ddim
from alignlab.train import train
from alignlab.weights.load import policy_of
from tests.running import command_line, configured, tiny

PROMPTS = ["a cat", "a dog", "a fish"]


@pytest.fixture(scope="module")
def runs(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    train(
        configured(*tiny(tiny_sd, "steps=3", "lr=0.1", "policy.lora.rank=4", "policy.lora.alpha=8")),
        home / "lora",
    )
    train(configured(*tiny(tiny_sd, "steps=3", "lr=0.01", "policy.full=true")), home / "full")
    return {"lora": home / "lora", "full": home / "full"}


def policy_on(run: Path, tiny_sd: str, *words: str) -> Policy:
    c = configured(*tiny(tiny_sd, *words))
    return policy_of(c.model, run=str(run), precision=c.precision, device=c.device)


@torch.no_grad()
def images(policy: Policy) -> torch.Tensor:
    sampler = ddim(policy.family.scheduler, steps=4, eta=0.0, guidance_scale=3.0)
    return rollout(policy, sampler, noise_key(PROMPTS, seed=5, stream="look")).images


def theirs(pipe: StableDiffusionPipeline, policy: Policy) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    first = noise_key(PROMPTS, seed=5, stream="look").normal(FIRST, policy.latent_shape)
    return pipe(
        PROMPTS,
        latents=first,
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images


@pytest.mark.parametrize(
    ("name", "to"), [("lora", "kohya"), ("lora", "diffusers"), ("lora", "pipeline"), ("full", "pipeline")]
)
def test_plain_diffusers_draws_the_policys_images(
    name: str,
    to: str,
    runs: dict[str, Path],
    tiny_sd: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    """To 1e-4 after real training, alpha twice the rank; the base model's are further than 100 times that."""
    output = tmp_path / "deep" / ("lora.safetensors" if to == "kohya" else "folder")
    assert command_line(monkeypatch, f"run={runs[name]}", f"to={to}", f"output={output}", command=export) == 0
    assert f"written: {output}" in capsys.readouterr().out
    policy = policy_on(runs[name], tiny_sd, *(["policy.full=true"] if name == "full" else []))
    pipe = StableDiffusionPipeline.from_pretrained(
        output if to == "pipeline" else tiny_sd, safety_checker=None
    )
    if to != "pipeline":
        pipe.load_lora_weights(str(output))
    mine = images(policy)
    torch.testing.assert_close(mine, theirs(pipe, policy), rtol=0, atol=1e-4)
    with policy.reference():
        assert (images(policy) - mine).abs().max() > 0.01
    if to == "kohya":
        with safe_open(output, "pt") as file:
            assert {file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")} == {8.0}
            assert file.metadata()["ss_network_alpha"] == "8" and file.metadata()["ss_network_dim"] == "4"


def test_a_pipeline_is_a_reference(
    runs: dict[str, Path], tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to make a tuned model the reference: exported as a pipeline, it is the next run's base
    model."""
    assert (
        command_line(
            monkeypatch, f"run={runs['lora']}", "to=pipeline", f"output={tmp_path}/base", command=export
        )
        == 0
    )
    summary = train(configured(*tiny(f"{tmp_path}/base", "steps=1")), tmp_path / "next")
    ended = train(
        configured(*tiny(tiny_sd, "steps=3", "lr=0.1", "policy.lora.rank=4", "policy.lora.alpha=8")),
        runs["lora"],
    )["final"]
    assert summary["base"]["reward"] == pytest.approx(ended["reward"], abs=1e-5)


def test_mistakes(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A sentence each, exit code 2, nothing written."""
    (tmp_path / "there").mkdir()
    for words, said in (
        (
            "to=kohya output=a.safetensors",
            "run=None is no run folder (it has no config.yaml); give the folder of a finished run",
        ),
        (f"run={runs['lora']}", "output has no value; set output=FILE.safetensors"),
        (f"run={runs['lora']} to=kohia output=a.safetensors", "to=kohia is no form; did you mean to=kohya?"),
        (
            f"run={runs['lora']} output={tmp_path}/a.ckpt",
            f"output={tmp_path}/a.ckpt must end in .safetensors",
        ),
        (
            f"run={runs['lora']} to=pipeline output={tmp_path}/there",
            f"output={tmp_path}/there is there already; choose another",
        ),
        (
            f"run={runs['lora']} to=hub output=mine",
            "output=mine is no repository of the hub; write owner/name",
        ),
        (f"run={runs['full']} output={tmp_path}/a.safetensors", "trained every weight; use to=pipeline"),
        (
            f"run={runs['lora'].parent}/* to=diffusers output={tmp_path}/a",
            "names 2 runs; give the folder of a finished run",
        ),
    ):
        assert command_line(monkeypatch, *words.split(), command=export) == 2
        err = capsys.readouterr().err
        assert said in err and "Traceback" not in err and len(err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
