"""The GPU list on a CPU: the real architectures have the published sizes, and the numbers that it writes
agree with each other."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from alignlab.engine.rollout import Gradients, rollout
from alignlab.engine.samplers import ddim
from alignlab.models.sd import StableDiffusion
from tests import warm
from tests.conftest import key, tiny_policy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import gpu_check
from gpu import architectures
from gpu.architectures import ARCHITECTURES, parts_of, pipeline_folder, unet_flops
from gpu.items import configuration, items_of
from gpu.page import page, peak_tflops
from gpu.unet_time import UNetTime

CPU = torch.device("cpu")


def check(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
    gpu_check.main()


@pytest.mark.parametrize(
    ("size", "unet", "texts", "tflop", "shared"),
    [
        ("sd15", 859_520_964, (123_060_480,), 0.80, 0.026),
        ("sdxl", 2_567_463_684, (123_060_480, 694_659_840), 5.98 + 0.78, 0),
    ],
)
def test_the_architectures_are_the_published_ones(
    size: str, unet: int, texts: tuple[int, ...], tflop: float, shared: float
) -> None:
    """By their parameters, and by the operations of one forward pass (XL's 5.98 T are often quoted, without
    the 0.78 T of attention's products); with a LoRA a backward pass costs about as much, not twice.
    Guidance's branches share their start in 1.5 alone."""
    tokenizer = CLIPTokenizer.from_pretrained(
        str(Path(gpu_check.ROOT) / "alignlab" / "assets" / "emoji" / "tokenizer")
    )
    with torch.device("meta"):
        parts = parts_of(ARCHITECTURES[size], tokenizer)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    names = ("text_encoder", "text_encoder_2")[: len(texts)]
    assert counts == {"unet": unet, "vae": 83_653_863, **dict(zip(names, texts, strict=True))}
    flops = unet_flops(ARCHITECTURES[size], parts["unet"], ("to_q", "to_k", "to_v", "to_out.0"), rank=8)
    for its in flops.values():
        assert (
            its["forward"] / 1e12 == pytest.approx(tflop, rel=0.02)
            and 1 < its["backward"] / its["forward"] < 1.3
        )
    assert 1 - flops[True]["forward"] / flops[False]["forward"] == pytest.approx(shared, abs=0.001)
    assert flops[True]["backward"] <= flops[False]["backward"] if shared else flops[True] == flops[False]


def test_a_pipeline_with_one_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 1.5's form is written, loaded by our family and encodes prompts of the real length; it
    is made once."""
    small = ARCHITECTURES["tiny"]
    names = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    unet = {k: v for k, v in small.unet.items() if k not in names} | {"cross_attention_dim": 16}
    monkeypatch.setitem(
        architectures.ARCHITECTURES, "small", replace(small, model="sd15", unet=unet, texts=small.texts[:1])
    )
    folder = pipeline_folder("small", tmp_path, CPU)
    made = folder.stat().st_mtime_ns
    assert pipeline_folder("small", tmp_path, CPU) == folder and folder.stat().st_mtime_ns == made
    family = StableDiffusion(str(folder))
    text = family.encode(["a lion", ""])
    assert (
        text["prompt_embeds"].shape == (2, 77, 16)
        and family.denoise(torch.randn(2, 4, 8, 8), torch.ones(2), text).isfinite().all()
    )


@pytest.mark.parametrize("size", ["sd15", "sdxl"])
def test_every_item_of_the_real_sizes_composes(size: str) -> None:
    """Checked as a training run's configuration is: at 50 steps, in bf16, guided but for RWR."""
    its = ARCHITECTURES[size]
    for item in items_of(size):
        c = configuration(its, item.overrides, **{"model.path_or_id": "owner/name", "precision": "bf16"})
        assert c.sampler["steps"] == 50 and c.precision == "bf16" and c.samples_per_step in (1, its.images)
        assert (c.sampler["guidance_scale"] > 1) == (item.name != "rwr")


class Slow(nn.Module):
    """Takes its time, in both directions, each time."""

    def __init__(self, module: nn.Module, seconds: float) -> None:
        super().__init__()
        self.module, self.seconds = module, seconds

    def forward(self, *arguments: Any, **named: Any) -> Any:
        time.sleep(self.seconds)
        out = self.module(*arguments, **named)
        if out.requires_grad:
            out.register_hook(lambda gradient: time.sleep(2 * self.seconds))
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_time_inside_the_unet(checkpointing: bool, tiny_sd: str) -> None:
    """A delay in the U-Net is counted, forward and backward, once a call, a checkpoint's recomputation as
    backward; one in the decoder is not. Two of three steps keep their graph."""
    policy = tiny_policy(tiny_sd, checkpointing=checkpointing)
    unet: Any = policy.family.denoiser
    delay = 0.05
    unet.mid_block.resnets[0] = Slow(unet.mid_block.resnets[0], delay)
    decode = policy.family.decode
    policy.family.decode = lambda x0: (time.sleep(10 * delay), decode(x0))[1]  # type: ignore[method-assign]
    sampler = ddim(policy.family.scheduler, steps=3, eta=0.0, guidance_scale=3.0)
    with UNetTime(unet, CPU) as clock:
        rollout(policy, sampler, key(2), gradients=Gradients.last(2, 3)).images.mean().backward()
    seconds = clock.seconds()
    assert {kind: len(spans) for kind, spans in clock.spans.items()} == {"forward": 3, "backward": 2}
    assert 3 * delay <= seconds["forward"] and 2 * (2 + checkpointing) * delay <= seconds["backward"]
    assert seconds["forward"] + seconds["backward"] <= seconds["total"] - 10 * delay
    assert not unet._forward_hooks and not unet._forward_pre_hooks


def passes(name: str, images: int, steps: int) -> tuple[int, int]:
    """Forward and backward passes of single latents, by hand; w = 3 but for RWR, whose epoch has one pass
    over the images."""
    if name == "rwr":
        return images * steps + images, images
    sampled = 2 * images * steps
    k = int(name.partition("k=")[2].partition(",")[0] or 1)
    trained = {"rollout": 0, "ddpo_sf": sampled, "ddpo_is": sampled, "draft_lv": 3 * 2 * images}.get(
        name, 2 * images * k
    )
    again = {
        "ddpo_sf": trained,
        "ddpo_is": trained,
        "draft": trained,
        "draft_lv": trained + 2 * 2 * images,
        "draftp": 2 * trained,
    }
    return sampled + again.get(name, trained if "checkpointing=true" in name else 0), trained


def test_a_list_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every item is measured in a process of its own, with numbers that agree with each other and with what
    the objectives must do; asked again, nothing is measured twice; a failure is named and the list goes
    on."""
    words = [
        "--sizes",
        "tiny",
        "--device",
        "cpu",
        "--results",
        str(tmp_path),
        "--pipelines",
        str(tmp_path / "pipelines"),
    ]
    monkeypatch.setattr(gpu_check.subprocess, "run", warm.run)
    check(monkeypatch, *words, "--only", "rollout", "ddpo_sf", "draft", "draftp", "memory/k=4*")
    file = tmp_path / "cpu-fp32.json"
    results = json.loads(file.read_text())
    items = {name.removeprefix("tiny/"): item for name, item in results["items"].items()}
    memory = [f"memory/k={k},checkpointing={kept}" for k in (4,) for kept in ("true", "false")]
    assert [*items] == ["rollout", "ddpo_sf", "draft", "draftp", *memory]
    for name, item in items.items():
        images = 1 if name in memory else 4
        assert item["status"] == "measured", (name, item)
        assert (item["passes"]["forward"], item["passes"]["backward"]) == passes(name, images, 4), name
        assert (item["images"], item["steps"], item["peak_memory_mb"]) == (images, 4, None)
        assert 0 < item["unet_fraction"] <= 1 and item["unet_tflop"] > 0
        assert (item["unet_seconds"]["backward"] > 0) == (item["passes"]["backward"] > 0)
        assert (
            item["images_per_second"] == pytest.approx(images / item["seconds"])
            and item["seconds"] <= item["host_seconds"]
        )
    shown = file.with_suffix(".md").read_text()
    assert shown == page(results) and "| n/a | n/a |" in shown  # no peak and no memory of a CPU
    assert all(f"\n| {name} | " in shown for name in items if name not in memory) and "\n| 4 | n/a (" in shown

    results["items"]["tiny/draft"] = {"status": "failed", "torch": "", "commit": None, "why": "as a try"}
    results["items"]["tiny/ddpo_sf"]["status"] = "out of memory"
    file.write_text(json.dumps(results))
    assert "\n| ddpo_sf | out of memory |" in page(results)
    check(
        monkeypatch, *words, "--budget-seconds", "0"
    )  # no time to measure: what is done stays, what failed is to be done again
    after = json.loads(file.read_text())["items"]
    assert after == {name: item for name, item in results["items"].items() if name != "tiny/draft"}


def test_a_process_that_dies_takes_one_item_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recorded, and another process measures the rest; one that outlasts the budget leaves its item for
    the next call."""
    ends: list[Any] = [3, None]

    def fake(command: list[str], timeout: float | None) -> Any:
        file = Path(command[-1])
        results = json.loads(file.read_text())
        results["items"][f"tiny/{len(ends)}"] = {"status": gpu_check.STARTED, "torch": "", "commit": None}
        file.write_text(json.dumps(results))
        code = ends.pop(0)
        if code is None:
            raise gpu_check.subprocess.TimeoutExpired(command, 1.0)
        return type("Done", (), {"returncode": code})

    monkeypatch.setattr(gpu_check.subprocess, "run", fake)
    check(monkeypatch, "--sizes", "tiny", "--device", "cpu", "--results", str(tmp_path))
    items = json.loads((tmp_path / "cpu-fp32.json").read_text())["items"]
    assert not ends and items == {
        "tiny/2": {"status": "failed", "torch": "", "commit": None, "why": "its process ended with code 3"}
    }


def test_utilisation_needs_a_known_peak() -> None:
    """Of dense 16-bit products, by the device's name; an unknown one has none. The share is the U-Net's
    operations over the peak's."""
    found = {
        name: peak_tflops(name)
        for name in (
            "NVIDIA H200",
            "NVIDIA H100 80GB HBM3",
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA L40S",
            "NVIDIA GeForce RTX 4090",
        )
    }
    assert [*found.values()] == [989, 989, 312, 362, 165] and peak_tflops("Tesla T4") is None
    item = {
        "status": "measured",
        "torch": "2",
        "commit": None,
        "images": 8,
        "micro_batch": 4,
        "steps": 50,
        "guidance_scale": 3.0,
        "seconds": 2.0,
        "images_per_second": 4.0,
        "updates_per_second": 0.5,
        "passes": {"forward": 800, "backward": 0},
        "unet_fraction": 0.9,
        "unet_tflop": 312.0,
        "peak_memory_mb": 2048.0,
    }
    results = {
        "device": "NVIDIA A100",
        "command": "",
        "peak_tflops": 312.0,
        "precision": "bf16",
        "memory_gb": 80.0,
        "items": {"sd15/draft": item},
    }
    assert "| 800, 0 | 90.0 % | 50.0 % | 2.0 |" in page(results) and "target" not in page(results)
    results["items"] |= {"sd15/rollout": item, "sd15/rollout, compiled": item | {"seconds": 1.5}}
    assert "inside the U-Net: 90.0 %, target ≥ 90 %: reached." in page(results)
    assert "\nrollout, compiled: 0.75 of its time without.\n" in page(results)
    results["items"]["sd15/rollout"] = item | {"unet_fraction": 0.89}
    assert "inside the U-Net: 89.0 %, target ≥ 90 %: not reached." in page(results)


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, also for a device without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        SystemExit, match="torch sees no CUDA device; --sizes tiny --device cpu tries this without one"
    ):
        check(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(
        SystemExit,
        match=r"Tesla T4 \(compute capability 7.5\) has no bfloat16 arithmetic; set --precision fp16",
    ):
        check(monkeypatch)
