"""Folders and files of weights, damaged: pipelines, LoRAs, learned rewards, CLIPs, run folders. A copy is
damaged in one place each."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.harness.fuzz.outcome import Outcome, attempt, command_line, refuse_work

Damage = Callable[[Path], None]
"""What is done to a copy of a folder."""


def text(path: str, content: str) -> Damage:
    """Another content."""
    return lambda folder: (folder / path).write_bytes(content.encode("utf-8", "surrogatepass")) and None


def gone(path: str) -> Damage:
    def damage(folder: Path) -> None:
        at = folder / path
        shutil.rmtree(at) if at.is_dir() else at.unlink()

    return damage


def cut(path: str, share: float) -> Damage:
    """The first part of a file alone."""

    def damage(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (folder / path).unlink()
        (folder / path).write_bytes(content[: int(share * len(content))])

    return damage


def tensors(
    path: str, change: Callable[[dict[str, torch.Tensor]], None], metadata: dict[str, str] | None = None
) -> Damage:
    """Other tensors in a .safetensors file."""

    def damage(folder: Path) -> None:
        state = {key: value.clone() for key, value in load_file(folder / path).items()}
        with safe_open(folder / path, "pt") as opened:
            about = opened.metadata() if metadata is None else metadata
        change(state)
        (folder / path).unlink()
        save_file(state, folder / path, metadata=about)

    return damage


def first(state: dict[str, torch.Tensor], part: str = "") -> str:
    return min(key for key in state if part in key)


def without(part: str = "") -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state[first(state, part)]

    return change


def reshaped(part: str = "") -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        key = first(state, part)
        state[key] = torch.zeros(*(n + 1 for n in state[key].shape)) if state[key].dim() else torch.zeros(3)

    return change


def renamed(state: dict[str, torch.Tensor]) -> None:
    state["nonsense"] = state.pop(first(state))


def poisoned(state: dict[str, torch.Tensor]) -> None:
    state[first(state)].fill_(float("nan"))


def zeroed(state: dict[str, torch.Tensor]) -> None:
    for value in state.values():
        value.zero_()


def changed(path: str, **more: Any) -> Damage:
    """Other values in a JSON object; ... takes a key away."""

    def damage(folder: Path) -> None:
        its = json.loads((folder / path).read_text())
        its |= {k: v for k, v in more.items() if v is not ...}
        (folder / path).unlink()
        (folder / path).write_text(json.dumps({k: v for k, v in its.items() if more.get(k) is not ...}))

    return damage


def weights_of(folder: Path, part: str) -> str:
    return next(str(path.relative_to(folder)) for path in (folder / part).glob("*.safetensors"))


def pipeline_damages(folder: Path) -> Iterator[tuple[str, Damage]]:
    """Of a Stable Diffusion pipeline folder."""
    yield from _json_damages("model_index.json")
    yield "index names no text encoder", changed("model_index.json", text_encoder=...)
    yield (
        "index names code in the folder",
        _all(
            changed("model_index.json", unet=["evil", "Evil"]),
            text("unet/evil.py", "raise SystemExit('ran')"),
        ),
    )
    yield "index names another library", changed("model_index.json", unet=["subprocess", "Popen"])
    yield (
        "index has a class of a file",
        _all(
            changed("model_index.json", _class_name=["evil", "Evil"]),
            text("evil.py", "raise SystemExit('ran')"),
        ),
    )
    yield "index has an unknown class", changed("model_index.json", unet=["diffusers", "UNetOfNobody"])
    yield "index has a strange value", changed("model_index.json", unet=5)
    yield "another family", changed("model_index.json", _class_name="FluxPipeline")
    for part in ("unet", "vae", "text_encoder"):
        file = weights_of(folder, part)
        yield f"{part} gone", gone(part)
        yield f"{part} without weights", gone(file)
        for share in (0.0, 0.001, 0.5, 0.999):
            yield f"{part} cut to {share:.1%}", cut(file, share)
        yield f"{part} is text", text(file, "not a tensor\n" * 100)
        yield f"{part} has a header without end", text(file, "\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f{}")
        yield f"{part} lacks a tensor", tensors(file, without("weight"))
        yield f"{part} lacks a bias", tensors(file, without("bias"))
        yield f"{part} has a wrong shape", tensors(file, reshaped("weight"))
        yield f"{part} has a wrong name", tensors(file, renamed)
        yield f"{part} has a further tensor", tensors(file, lambda state: state.update(more=torch.zeros(3)))
        yield f"{part} is empty", tensors(file, dict.clear)
        yield (
            f"{part} is a pickle",
            _all(gone(file), lambda at, to=file: torch.save({"x": Bomb()}, (at / to).with_suffix(".bin"))),
        )
        yield from ((f"{part}: {name}", damage) for name, damage in _json_damages(f"{part}/config.json"))
    yield "unet wider", changed("unet/config.json", block_out_channels=[24, 48])
    yield "unet of another context", changed("unet/config.json", cross_attention_dim=7)
    yield "vae of other channels", changed("vae/config.json", latent_channels=7)
    yield "vae without scale", changed("vae/config.json", scaling_factor=0)
    yield "text of other width", changed("text_encoder/config.json", hidden_size=20)
    yield from (
        (f"scheduler: {name}", damage) for name, damage in _json_damages("scheduler/scheduler_config.json")
    )
    yield "scheduler clips", changed("scheduler/scheduler_config.json", clip_sample=True)
    yield "scheduler of 0 steps", changed("scheduler/scheduler_config.json", num_train_timesteps=0)
    yield (
        "scheduler of an unknown prediction",
        changed("scheduler/scheduler_config.json", prediction_type="dream"),
    )
    yield "scheduler of unknown betas", changed("scheduler/scheduler_config.json", beta_schedule="none")
    yield "tokenizer gone", gone("tokenizer")
    for file_name in sorted(path.name for path in (folder / "tokenizer").iterdir()):
        yield f"tokenizer without {file_name}", gone(f"tokenizer/{file_name}")
        yield f"tokenizer with a broken {file_name}", text(f"tokenizer/{file_name}", "{broken")
        yield f"tokenizer with an empty {file_name}", text(f"tokenizer/{file_name}", "")


class Bomb:
    """Code, once it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a pickle ran')",)


def lora_damages(file: str) -> Iterator[tuple[str, Damage]]:
    """Of a LoRA folder in diffusers' format."""
    for share in (0.0, 0.01, 0.5, 0.999):
        yield f"cut to {share:.1%}", cut(file, share)
    yield "text", text(file, "x" * 1000)
    yield "gone", gone(file)
    yield "lacks one side", tensors(file, without("lora_A"))
    yield "lacks the other side", tensors(file, without("lora_B"))
    yield "wrong shape", tensors(file, reshaped())
    yield "wrong name", tensors(file, renamed)
    yield "empty", tensors(file, dict.clear)
    yield "not a number", tensors(file, poisoned)
    for name, about in {
        "broken metadata": {"lora_adapter_metadata": "{broken"},
        "metadata that is a list": {"lora_adapter_metadata": "[1]"},
        "metadata without rank": {"lora_adapter_metadata": '{"unet.lora_alpha": 8}'},
        "metadata with a text for a rank": {
            "lora_adapter_metadata": '{"unet.r": "x", "unet.lora_alpha": "y", "unet.target_modules": 5}'
        },
        "metadata of another rank": {
            "lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 1, "unet.target_modules": ["to_q"]}'
        },
        "metadata with strange targets": {
            "lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 8, "unet.target_modules": [".*", 5]}'
        },
        "metadata nested deeply": {"lora_adapter_metadata": "[" * 50_000},
        "metadata of a rank of -1": {
            "lora_adapter_metadata": '{"unet.r": -1, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"]}'
        },
        "metadata of a rank of 10**9": {
            "lora_adapter_metadata": '{"unet.r": 1000000000, "unet.lora_alpha": 8, '
            '"unet.target_modules": ["to_q"]}'
        },
    }.items():
        yield name, tensors(file, lambda state: None, about)


def kohya_damages(file: str) -> Iterator[tuple[str, Damage]]:
    """Of a kohya file, in a folder."""
    yield "cut", cut(file, 0.5)
    yield "lacks an up", tensors(file, without("lora_up"))
    yield "lacks a down", tensors(file, without("lora_down"))
    yield "wrong shape", tensors(file, reshaped("lora_up"))
    yield (
        "wrong shape of alpha",
        tensors(file, lambda state: state.update({first(state, "alpha"): torch.zeros(2, 2)})),
    )
    yield (
        "alpha that is no number",
        tensors(file, lambda state: state.update({first(state, "alpha"): torch.tensor(float("nan"))})),
    )
    yield "of another network", tensors(file, renamed)
    yield "zero everywhere", tensors(file, zeroed)


def reward_damages(folder: Path) -> Iterator[tuple[str, Damage]]:
    """Of a learned reward's folder."""
    yield from _json_damages("reward.json")
    yield "no kind", changed("reward.json", kind=...)
    yield "no clip", changed("reward.json", clip=...)
    yield "a clip that is a number", changed("reward.json", clip=5)
    yield "another clip", changed("reward.json", clip="/nowhere")
    yield "an unknown kind", changed("reward.json", kind="nonsense")
    for file in ("head.safetensors", "clip.safetensors"):
        if (folder / file).is_file():
            yield f"{file} cut", cut(file, 0.5)
            yield f"{file} lacks a tensor", tensors(file, without())
            yield f"{file} has a wrong shape", tensors(file, reshaped())
            yield f"{file} has a wrong name", tensors(file, renamed)
            yield f"{file} is empty", tensors(file, dict.clear)
            yield f"{file} holds nan", tensors(file, poisoned)
    yield "no head", gone("head.safetensors")


def clip_damages(folder: Path) -> Iterator[tuple[str, Damage]]:
    """Of a CLIP's folder."""
    file = weights_of(folder, ".")
    yield from ((f"config: {name}", damage) for name, damage in _json_damages("open_clip_config.json"))
    yield "weights cut", cut(file, 0.5)
    yield "lacks a tensor", tensors(file, without())
    yield "wrong shape", tensors(file, reshaped("weight"))
    yield "wrong name", tensors(file, renamed)
    yield "broken tokenizer", text("tokenizer.json", "{broken")
    yield "model_cfg is text", changed("open_clip_config.json", model_cfg="x")
    yield (
        "tokenizer of its own code",
        _all(
            lambda at: _set(
                at / "open_clip_config.json",
                ["model_cfg", "text_cfg", "tokenizer_kwargs"],
                {"trust_remote_code": True},
            ),
            changed(
                "tokenizer_config.json",
                tokenizer_class="Evil",
                auto_map={"AutoTokenizer": ["evil.Evil", None]},
            ),
            text("evil.py", "raise SystemExit('ran')"),
        ),
    )


def run_damages(config: dict[str, Any]) -> Iterator[tuple[str, Damage]]:
    """Of a finished run's folder; `config` is its configuration."""
    for name, content in {
        "empty": "",
        "text": "hello",
        "list": "[1, 2]",
        "tabs": "a:\n\t- b",
        "unsafe": "!!python/object/apply:os.system ['false']",
        "anchors": "a: &a [*a]",
        "bombs": "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\n",
        "NUL": "a: \0",
        "deep": "[" * 5000,
        "half": json.dumps(config)[:300],
    }.items():
        yield f"config.yaml is {name}", text("config.yaml", content)
    for key in (
        "algo",
        "allow_targets",
        "eval_rewards",
        "eval_sampler",
        "evaluation",
        "model",
        "policy",
        "precision",
        "reward",
        "seed",
        "steps",
    ):
        yield f"config.yaml lacks {key}", _config({k: v for k, v in config.items() if k != key})
    for key in (
        "model",
        "policy",
        "algo",
        "reward",
        "prompts",
        "eval_sampler",
        "diversity",
        "eval_rewards",
        "sampler",
        "optimizer",
    ):
        yield f"config.yaml has a number for {key}", _config({**config, key: 5})
        yield (
            f"config.yaml has hostile {key}",
            _config({**config, key: {"_target_": "os.system", "command": "touch ran"}}),
        )
    yield (
        "config.yaml lets itself in",
        _config(
            {**config, "allow_targets": ["os"], "model": {"_target_": "os.system", "command": "touch ran"}}
        ),
    )
    yield (
        "config.yaml lets itself in deeply",
        _config(
            {
                **config,
                "allow_targets": ["os"],
                "algo": {**config["algo"], "k": {"_target_": "os.system", "command": "touch ran"}},
            }
        ),
    )
    yield "summary.json is broken", text("summary.json", "{broken")
    yield "summary.json is a list", text("summary.json", "[]")
    yield "summary.json is empty", text("summary.json", "{}")
    yield "metrics.jsonl is broken", text("metrics.jsonl", '{"step": 0}\n{broken\n')
    yield "metrics.jsonl is empty", text("metrics.jsonl", "")
    yield (
        "metrics.jsonl has texts",
        text("metrics.jsonl", '{"step": "x", "eval/reward": "y", "eval/lpips": null}\n'),
    )
    yield "model/ gone", gone("model")
    yield "model/ empty", _all(gone("model"), lambda at: (at / "model").mkdir())


def damaged(
    kind: str,
    source: Path,
    name: str,
    damage: Damage,
    home: Path,
    runs: Sequence[tuple[ModuleType, str | None, list[str]]],
) -> list[Outcome]:
    """The commands `runs` on a copy of `source`, damaged, at home/copy. Each with the work that is not done;
    None lets it write."""
    copy = home / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    damage(copy)
    out = []
    for command, stop, words in runs:
        with contextlib.ExitStack() as stack:
            if stop:
                stack.enter_context(patch(f"alignlab.{stop}", refuse_work))
            stack.enter_context(contextlib.chdir(home))
            case = f"{command.__name__.rpartition('.')[2]}: {name}"
            out.append(
                attempt(kind, case, lambda c=command, w=words: command_line(c, w), home, writes=stop is None)
            )
        for new in home.glob("written*"):
            shutil.rmtree(new) if new.is_dir() else new.unlink()
    return out


def _json_damages(path: str) -> Iterator[tuple[str, Damage]]:
    yield f"{path} gone", gone(path)
    for name, content in {
        "empty": "",
        "broken": "{broken",
        "a list": "[]",
        "an empty object": "{}",
        "a number": "5",
        "deep": "[" * 100_000,
        "not text": "\udcff",
    }.items():
        yield f"{path} is {name}", text(path, content)


def _all(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def _set(path: Path, keys: list[str], value: Any) -> None:
    its = json.loads(path.read_text())
    node = its
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(its))


def _config(config: dict[str, Any]) -> Damage:
    return text("config.yaml", json.dumps(config))
