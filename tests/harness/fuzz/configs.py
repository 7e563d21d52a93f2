"""Command lines that are wrong in one place or several: mutations of every command's own keys, reproducible
from a seed."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import hydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from alignlab import evaluate, export, figure, make_pairs, plan, report, sample, train, train_reward
from alignlab.config.compose import CONF
from tests.harness.fuzz.outcome import Outcome, attempt, command_line, refuse_work

COMMANDS: dict[str, tuple[ModuleType, str, tuple[str, ...]]] = {
    "train": (train, "train.train", ()),
    "plan": (plan, "plan.footprint", ()),
    "evaluate": (evaluate, "evaluate.run_evaluation", ("run={run}",)),
    "sample": (sample, "sample.policy_of", ("run={run}",)),
    "export": (export, "export.weights", ("run={run}", "output={new}.safetensors")),
    "report": (report, "report.report", ("runs={run}",)),
    "figure": (figure, "figure.make", ("name=draftp_fig3",)),
    "train_reward": (train_reward, "train_reward.train_reward", ("data={table}",)),
    "make_pairs": (make_pairs, "make_pairs.weighted_sum", ()),
}
"""Each command with its work, which is not done, and what it cannot do without."""
SHARE = {
    "train": 10,
    "plan": 2,
    "evaluate": 3,
    "sample": 2,
    "export": 2,
    "report": 1,
    "figure": 1,
    "train_reward": 2,
    "make_pairs": 2,
}
"""How many of the mutations are a command's."""

NUMBERS = (
    "-1",
    "0",
    "1e308",
    "1e400",
    "99999999999999999999",
    "1000000007",
    "nan",
    "inf",
    "-inf",
    "-0.0",
    "0.5",
    "1e-320",
    "true",
    "abc",
    "null",
    "''",
)
TEXTS = (
    "''",
    "' '",
    "null",
    "7",
    "1.5",
    "true",
    "[]",
    "[1,2]",
    "{a:1}",
    "{a:{b:{c:[1]}}}",
    "Löwe-\u2603\U0001f981",
    "'\u202eabc'",
    "../../etc/passwd",
    "/dev/null",
    "/proc/self/mem",
    "~",
    ".",
    "..",
    "{huge}",
    "'a\tb'",
    "'%s%n'",
    "-",
    "'[unclosed'",
    "a/b/c/d",
    "owner/name",
    "/root/x",
)
LISTS = ("[]", "[[]]", "[null]", "[1]", "[{a:1}]", "['']", "x", "5", "{a:1}", "null", "[a,a,a]", "['\u0000']")
REFERENCES = (
    "${foo}",
    "${steps}",
    "${algo}",
    "${.}",
    "${..seed}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${oc.env:HOME}",
    "${oc.decode:'[1'}",
    "${oc.env:}",
    "${nothing:1}",
    "${or:null}",
    "${folder:1,2}",
    "${hydra:job.name}",
    "${now:%Y}",
    "${",
    "$",
    "${a${b}}",
    "???",
    "${reward.clip_blue}",
)
TARGETS = (
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "builtins.exec",
    "torch.load",
    "pickle.loads",
    "alignlab.files.writing.os.system",
    "alignlab.config.build.importlib",
    "alignlab.config.build.importlib.import_module",
    "alignlab.runs.provenance.subprocess.run",
    "alignlab.runs.provenance.subprocess",
    "alignlab.config.build.resolve",
    "alignlab.config.build.build",
    "alignlab.files.writing.write_aside",
    "alignlab.plan.largest",
    "alignlab.export.to_folder",
    "alignlab.runs.folder.shutil",
    "alignlab",
    "alignlab.",
    "alignlab.train",
    "alignlab..nodes.build",
    ".alignlab.runs.folder",
    "torch.optim",
    "torch.optim.",
    "torch.optim.lr_scheduler.StepLR",
    "torch.optim.LBFGS",
    "torch.optim.SparseAdam",
    "torch.optim.optimizer.functools",
    "torch.optim.optimizer.Optimizer",
    "alignlab.rewards.heads.save",
    "alignlab.models.kohya.write",
    "5",
    "null",
    "[]",
    "''",
    "alignlab.rewards.brightness.Brightness",
    "alignlab.data.prompts.Prompts",
    "alignlab.engine.samplers.ddim",
    "alignlab.models.pipeline.importlib",
    "alignlab.rewards.clip.Clip",
    "alignlab.objectives.draft.DRaFT",
    "alignlab.metrics.diversity.PerceptualDistance",
    "alignlab.objectives.ddpo.Pairs",
    "alignlab.models.Family",
    "alignlab.rewards.Reward",
    "alignlab.rewards.clip.torch.load",
    "alignlab.rewards.heads._x",
    "alignlab.models.sd.StableDiffusion.check",
    "__main__.x",
    "alignlab.models.lora.LoRA",
    "alignlab.Löwe",
)
GARBAGE = (
    "=",
    "a",
    "a==",
    "=1",
    "steps=1=2",
    "[",
    "algo=[",
    "'",
    "steps='",
    "+",
    "~",
    "++",
    "~nope",
    "+algo",
    "@x=1",
    "algo@x=draft",
    "--nope",
    "-x",
    "--config-dir=/nowhere",
    "--cfg",
    "--multirun-x",
    "steps=1,2",
    "-m steps=1,abc",
    "-m kl_coef=1,2",
    "-m lr=nan,-1",
    "hydra.job.num=abc",
    "hydra/launcher=nope",
    "hydra/launcher=ray_cluster",
    "hydra.sweep.dir=",
    "hydra/job_logging=nope",
    "Löwe=1",
    "\u2603",
    "a b=c",
    "steps= 1",
    " steps=0",
    "steps:1",
    "algo.=1",
    ".algo=1",
    "algo..k=1",
    "algo.k.x=1",
    "steps.x=1",
    "reward.=1",
    "evaluation=5",
    "evaluation={}",
    "~evaluation",
    "~evaluation.images",
    "evaluation={images:a}",
    "+evaluation.x=1",
    "allow_targets=x",
    "allow_targets=[os]",
    "allow_targets=['']",
    "allow_targets=[5]",
    "model={}",
    "model=5",
    "+model=5",
    "policy=5",
    "~policy",
    "~model",
    "~reward",
    "~algo",
    "~prompts",
    "~eval_rewards",
    "~optimizer",
    "~sampler",
    "reward=[]",
    "reward=[clip,clip]",
    "reward={}",
    "eval_rewards=[]",
    "reward=clip_blue,clip",
    "algo=draft/../ddpo",
    "algo=../algo/draft",
    "algo=/etc/passwd",
    "reward=../../pyproject",
    "+reward.x=5",
    "+reward.x={}",
    "+reward.x={_target_:alignlab.rewards.brightness.Brightness}",
    "+reward.reward={_target_:alignlab.rewards.brightness.Brightness,weight:1.0,normalize:false}",
    "+reward.x.y.z=1",
)
PAIRS = (
    "algo=ddpo sampler.eta=0",
    "algo=draft reward=jpeg_compressibility",
    "algo=rwr kl_coeff=1",
    "algo=draft algo.k=99",
    "algo=draft algo.k=null sampler.steps=100000000",
    "samples_per_step=1000000007 micro_batch=999999999",
    "samples_per_step=7 prompts.per_prompt=2 micro_batch=7",
    "policy.shard=true",
    "policy.shard=true policy.full=true ema=0.9",
    "algo=dpo",
    "algo=dpo algo.data=/nowhere",
    "algo=dpo algo.data=.",
    "sampler=flow",
    "model=sdxl",
    "model=flux",
    "eval_sampler=flow",
    "prompts=file",
    "prompts=dataset",
    "prompts=file prompts.file=.",
    "prompts=file prompts.file=/dev/zero",
    "prompts=imagenet_animals prompts.imagenet_animals=0",
    "steps=1 lr_warmup=1",
    "select=nope",
    "prompts.unseen_share=0.5 prompts.unseen=[a]",
    "prompts.unseen_share=0.999999",
    "prompts.template=x",
    "prompts.template='{a} {b}' +prompts.fill={b:3}",
    "prompts.template='{} {b}' +prompts.fill={b:[]}",
    "+prompts.fill=3",
    "+prompts.fill={b:[1]}",
    "reward=clip reward.clip.template='{} {} {0.__class__}'",
    "algo=ddpo algo.statistics=null",
    "algo=ddpo algo.statistics=5",
    "algo=ddpo algo.statistics.buffer_size=-1",
    "algo=ddpo algo.statistics={}",
    "policy.lora=null",
    "policy.lora=5",
    "policy.lora={}",
    "policy.lora.targets=[]",
    "policy.lora.targets=[1]",
    "policy.lora.targets=x",
    "policy.lora.alpha=nan",
    "policy.lora.rank=1.5",
    "optimizer.lr=nan",
    "optimizer.betas=[2,2]",
    "optimizer.betas=[]",
    "optimizer.betas=[a]",
    "optimizer.betas=0.9",
    "optimizer=adamw8bit",
    "diversity=alex",
    "diversity=alex diversity.weights=/etc/passwd",
    "init_from=.",
    "init_from=/etc/passwd",
    "init_from={run}",
    "init_from=''",
    "resume=.",
    "resume=/nowhere",
    "resume=''",
    "push_to_hub=x",
    "push_to_hub=a/b/c",
    "output_dir={run}",
    "output_dir=/proc/x",
    "output_dir=''",
    "output_dir={file}",
    "output_dir={file}/x",
    "model.path_or_id=.",
    "model.path_or_id=''",
    "model.path_or_id=../..",
    "model.path_or_id={file}",
    "model.path_or_id=emoji_clip",
    "model.config=x",
    "model.revision=5",
    "model.lora_targets=[]",
    "model.lora_targets=x",
    "tracker=wandb",
    "device=cuda:0",
    "device=''",
    "reward=clip reward.clip.path={run}",
    "reward=preference reward.preference.path=emoji_aesthetic",
    "reward=preference reward.preference.path=.",
    "reward=clip reward.clip.path=''",
    "reward=clip reward.clip.weight=nan",
    "reward=clip reward.clip.normalize=2",
    "eval_rewards=[clip,nope]",
    "ema=0.9999999",
    "ema=nan",
    "precision=null",
)


def command_lines(seed: int, count: int, places: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """`count` mutated command lines with the command each is for: the lists above whole, and random ones of
    each command's own keys.

    Args:
        places: what {run}, {table}, {file}, {new} and {huge} stand for.
    """
    draw = random.Random(seed)
    for words in (*PAIRS, *GARBAGE):
        yield "train", _filled(words.split(" ") if words in PAIRS else _parted(words), places)
    keys = {name: list(_keys(name)) for name in COMMANDS}
    names = [name for name, share in SHARE.items() for _ in range(share)]
    for _ in range(max(0, count - len(PAIRS) - len(GARBAGE))):
        name = draw.choice(names)
        base = list(COMMANDS[name][2])
        wrong = [_mutation(draw, keys[name]) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        if base and draw.random() < 0.1:
            base.pop(draw.randrange(len(base)))
        yield name, _filled([*base, *wrong], places)


def tried(name: str, words: list[str], home: Path, stop_at: str | None = None) -> Outcome:
    """One command line up to the point where the work would begin."""
    command, work, _ = COMMANDS[name]
    mode = (
        RunMode.MULTIRUN if {"-m", "--multirun"} & {*words} else RunMode.RUN
    )  # which Hydra would compose everything for
    with (
        patch(f"alignlab.{stop_at or work}", refuse_work),
        patch("hydra._internal.hydra.Hydra.get_mode", lambda *_, **__: mode),
        contextlib.chdir(home),
    ):
        return attempt(
            "configuration", f"{name}: {' '.join(words)[:300]}", lambda: command_line(command, words), home
        )


def _parted(words: str) -> list[str]:
    return words.split(" ") if words.startswith("-m ") else [words]


def _filled(words: list[str], places: dict[str, str]) -> list[str]:
    for place, what in places.items():
        words = [word.replace(f"{{{place}}}", what) for word in words]
    return words


def _keys(name: str) -> Iterator[tuple[str, Any]]:
    """A command's dotted keys with their values, and its groups with the value "group"."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        c: Any = OmegaConf.to_container(hydra.compose(name), resolve=False)

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            yield prefix + key, value
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    yield from walk(c, "")
    yield from ((group, "group") for group in c if (CONF / group).is_dir())


def _mutation(draw: random.Random, keys: list[tuple[str, Any]]) -> str:
    key, value = draw.choice(keys)
    kind = draw.random()
    if kind < 0.08:
        return f"{_misspelt(draw, key)}={draw.choice(('1', 'a'))}"
    if kind < 0.14:
        return f"~{key}"
    if kind < 0.20:
        return f"+{key}.{draw.choice(('x', '_target_', '0', 'Löwe'))}={draw.choice((*TEXTS, *NUMBERS))}"
    if kind < 0.30:
        return f"{draw.choice((key, key, f'++{key}'))}={draw.choice(REFERENCES)}"
    if value == "group":
        words = "nope null 5 [] drafft ../x emoji [clip,colour] {a:1} none draft ddpo flow"
        return f"{key}={draw.choice(words.split())}"
    if key.endswith("_target_") or kind < 0.34:
        at = key if key.endswith("_target_") else f"++{key}._target_" if isinstance(value, dict) else key
        return f"{at}={draw.choice(TARGETS)}"
    if isinstance(value, dict):
        return f"{key}={draw.choice((*TEXTS, *NUMBERS, '{_target_:os.system}', '{_target_:5}', '{}'))}"
    if isinstance(value, list):
        return f"{key}={draw.choice(LISTS)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{key}={draw.choice((*NUMBERS, *NUMBERS, *TEXTS))}"
    return f"{key}={draw.choice((*TEXTS, *TEXTS, *NUMBERS, *LISTS))}"


def _misspelt(draw: random.Random, key: str) -> str:
    at = draw.randrange(len(key))
    return (
        draw.choice(
            (
                key[:at] + key[at + 1 :],
                key[:at] + "q" + key[at:],
                key.upper(),
                key.replace("_", "-"),
                f"{key}s",
                f"algo.{key}",
            )
        )
        or "q"
    )
