"""What leaves a run, for every family: a whole pipeline after full fine-tuning, and one with the LoRA
fused."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from alignlab import export
from alignlab.engine.noise import FIRST
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.models.lora import LoRA
from alignlab.weights.init_from import begin_from
from tests.models.sampling import EVERY, SAMPLERS, images_of_diffusers, key, pipe_of, sampler_of
from tests.running import command_line, configured

EACH = pytest.mark.parametrize("name", EVERY)


def images(policy: Policy, name: str) -> Tensor:
    return rollout(policy, sampler_of(policy, name), key()).images


def policy_on(folder: Path, name: str, **options: Any) -> Policy:
    family, arguments = EVERY[name]
    torch.manual_seed(1)
    return Policy(family(str(folder), **arguments), **options)


@EACH
@torch.no_grad()
def test_full_fine_tuning_leaves_a_pipeline(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Plain `from_pretrained(RUN/model)` draws the policy's images to 1e-4, after the weights were moved by
    more than 100 times that in the images; a policy that starts there (init_from) has them too."""
    policy = policy_on(folders[name], name, full=True)
    for parameter in policy.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    mine = images(policy, name)
    with policy.reference():
        assert (images(policy, name) - mine).abs().max() > 0.01
    policy.save(tmp_path / "model")
    pipe = pipe_of(name, tmp_path / "model")
    torch.testing.assert_close(
        mine, images_of_diffusers(pipe, name, key().normal(FIRST, policy.latent_shape)), rtol=0, atol=1e-4
    )
    again = policy_on(folders[name], name, full=True)
    begin_from(again, str(tmp_path / "model"))
    assert torch.equal(images(again, name), mine)


@EACH
@torch.no_grad()
def test_a_lora_leaves_as_a_pipeline(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """to=pipeline: plain diffusers draws the policy's images to 1e-4 without knowing of a LoRA (alpha is half
    the rank). to=kohya holds the same LoRA, which full fine-tuning can start from."""
    policy = policy_on(folders[name], name, lora=LoRA(rank=4, alpha=2))
    for parameter in policy.parameters():
        parameter.normal_(0, 0.3)
    mine = images(policy, name)
    with policy.reference():
        assert (images(policy, name) - mine).abs().max() > 0.01
    run = tmp_path / "run"
    policy.save(run / "model")
    words = ["model=sd15", "model.variant=null"] if name == "sd" else SAMPLERS[name]
    c = configured(*words, f"model.path_or_id={folders[name]}")
    (run / "config.yaml").write_text(yaml.safe_dump(asdict(c)))
    for to, output in {"pipeline": tmp_path / "whole", "kohya": tmp_path / "lora.safetensors"}.items():
        assert command_line(monkeypatch, f"run={run}", f"to={to}", f"output={output}", command=export) == 0
    pipe = pipe_of(name, tmp_path / "whole")
    first = key().normal(FIRST, policy.latent_shape)
    torch.testing.assert_close(mine, images_of_diffusers(pipe, name, first), rtol=0, atol=1e-4)
    full = policy_on(folders[name], name, full=True)
    begin_from(full, str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(mine, images(full, name), rtol=0, atol=1e-4)
    same = policy_on(folders[name], name, lora=LoRA(rank=4, alpha=2))
    begin_from(same, str(tmp_path / "lora.safetensors"))
    assert torch.equal(mine, images(same, name))
