"""A user's mistake ends in one sentence: the key, the value, the mend. Before a model is loaded, and with
nothing written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignlab.config.build import fits, words
from alignlab.config.checks import SHIPPED_OPTIMIZER, sampler_problems
from alignlab.models.sd import StableDiffusion
from tests.running import command_line, configured, tiny

ROOT = Path(__file__).resolve().parents[2]

MISTAKES = {
    "mistyped key": ("kl_coef=1", "kl_coef is not a known key; did you mean kl_coeff?"),
    "mistyped nested key": (
        "algo.truncatoin=fixed",
        "algo.truncatoin is not a known key; did you mean algo.truncation?",
    ),
    "nested key at the top": ("eta=1", "here it is sampler.eta or eval_sampler.eta"),
    "new key": ("+foo=1", "foo is not a known key; known are algo, "),
    "key that the file leaves out": (
        "algo=ddpo reward=jpeg_compressibility reward.jpeg_compressibility.quality=50",
        "is not in the chosen file; write +reward.jpeg_compressibility.quality=50 to add it",
    ),
    "new nested key": ("+algo.foo=1", "algo.foo is not an argument of alignlab.objectives.draft.DRaFT"),
    "unknown algorithm": ("algo=drafft", "algo=drafft is no option; did you mean algo=draft?"),
    "no algorithm": (
        "algo=null",
        "algo=null is no option; known are ddpo, dpo, dpo_online, draft, draftp, kto, rwr, sft",
    ),
    "a list of numbers for a group": (
        "eval_sampler=[1,2]",
        "eval_sampler=[1,2] is no option; known are ddim, flow",
    ),
    "unknown reward": ("reward=clipp", "reward=clipp is no option; did you mean reward=clip?"),
    "unknown reward among two": ("reward=[clip,jpegg]", "reward=jpegg is no option; known are"),
    "no reward": ("reward=none", "reward is empty; choose one with reward=NAME"),
    "unknown experiment": ("experiment=overoptimization", "did you mean experiment=figure/overoptimisation?"),
    "text for a number": ("kl_coeff=abc", "kl_coeff=abc must be a number"),
    "text for a nested number": ("sampler.steps=abc", "sampler.steps=abc must be a whole number"),
    "fraction for a count": ("steps=1.5", "steps=1.5 must be a whole number"),
    "null for a number": ("seed=null", "seed=null must be a whole number"),
    "text for a list": ("prompts.prompts=cat", "prompts.prompts=cat must be a list of texts or null"),
    "text for a weight": ("reward=clip reward.clip.weight=abc", "reward.clip.weight=abc must be a number"),
    "no epochs": ("steps=0", "steps=0 must be at least 1"),
    "no sampler steps": ("sampler.steps=0", "sampler.steps=0 must be at least 1"),
    "negative eta": ("sampler.eta=-1", "sampler.eta=-1 must be at least 0"),
    "negative learning rate": ("lr=-1", "lr=-1.0 must be positive"),
    "negative KL weight": ("kl_coeff=-1", "kl_coeff=-1.0 must not be negative; 0 leaves the penalty out"),
    "KL weight for RWR": ("algo=rwr kl_coeff=1", "kl_coeff=1.0: RWR has no KL term"),
    "one image a prompt": ("evaluation.images=1", "evaluation.images=1 must be at least 2"),
    "reward without gradient": (
        "algo=draft reward=jpeg_compressibility",
        "reward=jpeg_compressibility is not differentiable, but DRaFT needs its gradient; use algo=ddpo",
    ),
    "a negative eta of one step": (
        "algo=rwr sampler.steps=2 sampler.eta=[1,-1]",
        "sampler.eta=[1, -1] must be at least 0",
    ),
    "too few etas": (
        "algo=ddpo sampler.steps=4 sampler.eta=[1,0]",
        "sampler.eta has 2 numbers for sampler.steps=4; give one number, or one for each step",
    ),
    "no noise in any step for DDPO": (
        "algo=ddpo sampler.steps=2 sampler.eta=[0,0]",
        "this objective needs log-probs; set sampler.eta=1",
    ),
    "no noise for DDPO": (
        "algo=ddpo sampler.eta=0",
        "sampler.eta=0 makes the sampler deterministic, but this objective needs log-probs; set "
        "sampler.eta=1",
    ),
    "K > N": (
        "algo.k=60 sampler.steps=50",
        "algo.k=60 exceeds sampler.steps=50; set algo.k<=50 or raise sampler.steps",
    ),
    "K < 1": ("algo.k=0", "algo.k=0 must be at least 1"),
    "LV with K = 2": ("algo.lv_samples=2 algo.k=2", "algo.lv_samples=2 needs algo.k=1"),
    "micro-batch": (
        "samples_per_step=16 micro_batch=7",
        "samples_per_step=16 is not a multiple of micro_batch=7; set micro_batch=4",
    ),
    "per_prompt": (
        "samples_per_step=16 prompts.per_prompt=3",
        "samples_per_step=16 is not a multiple of prompts.per_prompt=3",
    ),
    "more updates than samples": (
        "algo=rwr algo.updates_per_epoch=3000",
        "algo.updates_per_epoch=3000 exceeds samples_per_step=",
    ),
    "precision": ("precision=fp8", "precision=fp8 is not one of fp32, bf16, fp16"),
    "no GPU": (
        "device=cuda",
        "device=cuda, but this torch sees no such device; set device=cpu or device=auto",
    ),
    "device": ("device=tpu", "device=tpu is not one of auto, cpu, cuda, mps"),
    "tracker not installed": (
        "tracker=wandb",
        "tracker=wandb, but the package wandb is not installed; pip install wandb",
    ),
    "tracker": ("tracker=paper", "tracker=paper is not one of none, wandb, trackio"),
    "missing model": (
        "model.path_or_id=/nowhere",
        "model.path_or_id=/nowhere: there is no such folder and no such shipped model",
    ),
    "folder without a model": (
        "model.path_or_id={tmp}/empty",
        "model.path_or_id={tmp}/empty: {tmp}/empty has no model_index.json",
    ),
    "model without weights": ("model.path_or_id={tmp}/unweighted", "has no weights in unet/"),
    "missing reward model": (
        "reward=clip reward.clip.path=/nowhere",
        "reward.clip.path=/nowhere: there is no such folder",
    ),
    "colour": (
        "reward=colour reward.colour.channel=pink",
        "reward.colour.channel=pink must be one of red, green, blue",
    ),
    "name of a measured number": (
        "+reward.lpips={_target_:alignlab.rewards.brightness.Brightness,weight:1.0,normalize:false}",
        "reward.lpips is also the name of a number that every evaluation reports",
    ),
    "stopping law twice": (
        "algo.refl=true algo.truncation=per_step",
        "algo.refl=true keeps one step, so algo.truncation=per_step means nothing",
    ),
    "quality": (
        "algo=ddpo reward=jpeg_compressibility +reward.jpeg_compressibility.quality=0",
        "quality=0 within 1..95",
    ),
    "missing prompts": ("prompts=file prompts.file=/nowhere.txt", "prompts.file=/nowhere.txt cannot be read"),
    "no prompts file": ("prompts=file", "prompts.file has no value; set prompts.file=..."),
    "empty prompts": ("prompts=file prompts.file={tmp}/empty.txt", "{tmp}/empty.txt holds no prompt"),
    "prompts in another encoding": (
        "prompts=file prompts.file={tmp}/latin1.txt",
        "{tmp}/latin1.txt: the byte 0xf6 in line 1 is not UTF-8",
    ),
    "template": (
        "prompts.template=animal",
        "prompts.template='animal' has no place for the prompt; write {{}} or {{a}}",
    ),
    "estimator": ("algo=ddpo algo.estimator=xx", "algo.estimator=xx must be one of sf, is"),
    "clip scaling": (
        "algo=ddpo algo.clip_scaling=D",
        "algo.clip_scaling=D must be one of 1/D, 1/sqrtD, none",
    ),
    "temperature": ("algo=rwr algo.temperature=0", "algo.temperature=0 must be positive"),
    "timesteps": ("algo=ddpo algo.timestep_fraction=0", "algo.timestep_fraction=0 is outside (0, 1]"),
    "statistics": ("algo=ddpo algo.statistics.buffer_size=1", "exceeds buffer_size=1"),
    "rank": ("policy.lora.rank=0", "policy.lora.rank=0 must be at least 1"),
    "foreign target": (
        "algo._target_=os.system",
        "algo._target_=os.system lies outside alignlab and torch.optim",
    ),
    "hidden foreign target": (
        "optimizer.betas=[{_target_:os.system,command:ls}]",
        "optimizer.betas.0._target_=os.system lies outside alignlab and torch.optim",
    ),
    "your own target": ("algo._target_=my.module.Thing", "if you trust it, add 'allow_targets=[my]'"),
    "your own target, allowed, but not there": (
        "algo._target_=my.module.Thing allow_targets=[my]",
        "algo._target_=my.module.Thing cannot be imported: No module named 'my'",
    ),
    "no such class": (
        "algo._target_=alignlab.objectives.draft.Draft",
        "alignlab.objectives.draft has no Draft; did you mean DRaFT?",
    ),
    "no such optimiser": (
        "optimizer._target_=torch.optim.Adamm",
        "torch.optim has no Adamm; did you mean Adam?",
    ),
    "what a module imports": (
        "algo._target_=alignlab.config.build.resolve",
        "algo._target_=alignlab.config.build.resolve is nothing that a configuration may build",
    ),
    "a class of another kind": (
        "prompts={{_target_:alignlab.rewards.brightness.Brightness}}",
        "is of another kind: it has no draw",
    ),
    "an optimiser with a closure": (
        "optimizer._target_=torch.optim.LBFGS ~optimizer.betas ~optimizer.eps ~optimizer.weight_decay",
        "evaluates the loss several times a step",
    ),
    "an lr that is no number": (
        "optimizer.lr=[1,2]",
        "optimizer.lr=[1, 2] must be a number; leave it out and set lr",
    ),
    "a list in place of a table": (
        "reward.clip_blue=[]",
        "reward.clip_blue=[] would replace a table of keys and values; set the keys in it",
    ),
    "too few betas": ("optimizer.betas=[]", "torch.optim.AdamW does not take lr=1.0, betas=[]"),
    "not a number": ("max_grad_norm=nan", "max_grad_norm=nan must be a finite number"),
    "a long name": (
        "init_from=" + "x" * 3000,
        "init_from has 3000 characters, and no name or path has as many; shorten it",
    ),
    "deleted nested key": ("~evaluation.images", "evaluation.images must not be deleted"),
    "more steps than any scheduler has": (
        "algo.k=null sampler.steps=100000000",
        "sampler.steps=100000000 must be at most 10000",
    ),
    "schedule": ("lr_schedule=cosin", "lr_schedule=cosin is not one of constant, linear, cosine"),
    "warm-up longer than the run": ("steps=5 lr_warmup=5", "lr_warmup=5 leaves none of steps=5"),
    "decay": ("ema=1", "ema=1.0 must be at least 0 and less than 1"),
    "selection by what is not measured": (
        "select=clipp eval_rewards=clip",
        "select=clipp is nothing that evaluations measure; did you mean select=clip?",
    ),
    "split, with random steps": (
        "policy.shard=true policy.full=true algo.truncation=per_rollout",
        "policy.shard=true runs the same steps on every process",
    ),
    "split LoRA": ("policy.shard=true", "policy.shard=true does not go with policy.full=false"),
    "combination for a gradient": (
        "combine=rank",
        "combine=rank, but DRaFT follows the gradient of the weighted sum itself; set combine=sum",
    ),
    "no such combination": (
        "algo=ddpo combine=max",
        "algo.statistics.combine=max must be one of sum, zscore, rank, gdpo",
    ),
    "combination of several epochs": (
        "algo=rwr combine=rank algo.scope=batch algo.standardise=false algo.streaming=9",
        "combine=rank does not go with algo.streaming=9",
    ),
    "advantages not standardised": (
        "algo=rwr combine=gdpo algo.standardise=false",
        "combine=gdpo does not go with algo.standardise=false",
    ),
    "half a group": (
        "reward=clip_diversity prompts.per_prompt=4 samples_per_step=12 micro_batch=6",
        "so micro_batch=6 must be a multiple of prompts.per_prompt=4; set micro_batch=4",
    ),
    "group of one": ("reward=clip_diversity", "but prompts.per_prompt=1; set prompts.per_prompt=4, say"),
    "group of one, evaluated": (
        "eval_rewards=clip_diversity evaluation.final_images=1",
        "but evaluation.final_images=1; set evaluation.final_images=2",
    ),
    "function not allowed": (
        "+reward.mine.function=os.system +reward.mine.differentiable=true +reward.mine.unit=u",
        "reward.mine.function=os.system lies outside alignlab and torch.optim; if you trust it, add "
        "'allow_targets=[os]'",
    ),
    "function that says too little": (
        "+reward.mine.function=tests.running.redness +reward.mine.differentiable=true allow_targets=[tests]",
        "reward.mine.unit is missing",
    ),
    "function in a class's place": (
        "+reward.mine._target_=tests.running.redness allow_targets=[tests]",
        "is a function; write +reward.mine.function=tests.running.redness in its place",
    ),
    "what is no function": (
        "+reward.mine.function=tests.running.TIMING +reward.mine.differentiable=true +reward.mine.unit=u "
        "allow_targets=[tests]",
        "reward.mine.function=tests.running.TIMING is nothing that a configuration may build",
    ),
    "class that says too little": (
        "+reward.mine._target_=tests.running.Silent allow_targets=[tests]",
        "reward.mine: the reward Silent does not say its differentiable; write differentiable = True",
    ),
    "class of another kind": (
        "+reward.mine._target_=alignlab.rewards.clip.Clip +reward.mine.path=emoji_clip",
        "is of another kind: it has no __call__",
    ),
    "function of alignlab's": (
        "+reward.mine.function=alignlab.engine.noise.noise_key +reward.mine.differentiable=true "
        "+reward.mine.unit=u",
        "reward.mine.function=alignlab.engine.noise.noise_key is nothing that a configuration may build",
    ),
    "resume of no run": ("resume={tmp}/empty", "resume={tmp}/empty is no run folder (it has no config.yaml)"),
    "values without -m": ("kl_coeff=0,1", "kl_coeff=0,1 names several values; add -m to run each of them"),
    "no value": ("kl_coeff", "kl_coeff cannot be read; write key=value"),
    "broken syntax": ("prompts.prompts=[cat", "prompts.prompts=[cat cannot be read"),
    "broken reference": (
        "samples_per_step=${{foo}}",
        "samples_per_step cannot be resolved: Interpolation key 'foo' not found",
    ),
    "reference to a table": (
        "precision=${{reward.clip_blue}}",
        "precision cannot be resolved: While dereferencing interpolation '${{reward.clip_blue}}': it leads "
        "to a table",
    ),
    "a name under a list": (
        "+allow_targets._target_=/proc/self/mem",
        "allow_targets is no table of keys and values; write 'allow_targets=[...]' whole",
    ),
    "a place of a list": ("+allow_targets.0=x", "allow_targets is no table of keys and values"),
    "deleted key": ("~steps", "steps must not be deleted"),
    "unknown flag": ("--foo", "--foo is no option; keys are written without dashes: foo=VALUE"),
    "a key with dashes": ("--learning-rate=1", "keys are written without dashes: learning_rate=VALUE"),
    "missing folder of configurations": ("--config-dir=/nowhere", "'/nowhere' not found"),
    "wrong in every job of a sweep": ("-m kl_coef=0,1", "kl_coef is not a known key; did you mean kl_coeff?"),
    "wrong in one job of a sweep": (
        "-m output_dir={tmp}/sweep kl_coeff=abc,1",
        "kl_coeff=abc must be a number",
    ),
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with some unusable files, where loading a model is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for part in ("empty", "unweighted/unet"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "unweighted" / "model_index.json").write_text("{}")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes("ein Löwe\n".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusion, "__init__", refuse)
    return tmp_path


def files(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if p.is_file() and p.name != "multirun.yaml"}


@pytest.mark.parametrize(("words_typed", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake(words_typed: str, said: str, desk: Path, monkeypatch, capsys) -> None:
    """Exit code 2, sentences only, the right words among them, no model, no file."""
    before = files(desk)
    typed = [
        word.replace("{tmp}", str(desk)).replace("{{", "{").replace("}}", "}") for word in words_typed.split()
    ]
    assert command_line(monkeypatch, *typed) == 2
    out, err = capsys.readouterr()
    assert said.replace("{tmp}", str(desk)).replace("{{", "{").replace("}}", "}") in err
    assert all(line.startswith("error: ") for line in err.splitlines()), err
    assert len(err.splitlines()) == 1, err
    assert out == ""
    assert files(desk) == before


def test_all_mistakes_at_once(desk: Path, monkeypatch, capsys) -> None:
    """Mistyped keys, unknown options, bad values and impossible pairs are reported together, one sentence
    each."""
    typed = (
        "algo=drafft rewards=clip steps=abc algo.kk=1 lr=-1 precision=fp8 policy.lora.rank=0 "
        "model.path_or_id=/nowhere eval_every=0"
    )
    assert command_line(monkeypatch, *typed.split()) == 2
    sentences = capsys.readouterr().err.splitlines()
    said = (
        "algo=drafft",
        "rewards is not",
        "steps=abc",
        "algo.kk",
        "lr=-1",
        "precision=fp8",
        "policy.lora.rank=0",
        "path_or_id=/nowhere",
        "eval_every=0",
    )
    assert len(sentences) == len(said)
    for words_ in said:
        assert sum(words_ in sentence for sentence in sentences) == 1, words_


def test_all_impossible_pairs_at_once(desk: Path, monkeypatch, capsys) -> None:
    """What cannot go together is reported beside what is wrong by itself elsewhere."""
    typed = (
        "algo=ddpo sampler.eta=0 samples_per_step=16 micro_batch=5 prompts.per_prompt=3 policy.lora.rank=0 "
        "model.path_or_id=/nowhere"
    )
    assert command_line(monkeypatch, *typed.split()) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 5
    assert all(
        said in err for said in ("sampler.eta=0", "micro_batch=5", "per_prompt=3", "rank=0", "/nowhere")
    )


def test_one_bad_job_does_not_stop_a_sweep(tmp_path, monkeypatch, capsys) -> None:
    """The jobs that can run do; the one that cannot says so in a sentence that names it; the command ends
    with 2."""
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "alignlab.train.train",
        lambda c, folder: ran.append(c.algo["k"]) or {"final": {"reward": 1.0}, "base": {"reward": 0.0}},
    )
    assert (
        command_line(monkeypatch, "algo=draft", "-m", "algo.k=1,60,2", "sampler.steps=20", "output_dir=sweep")
        == 2
    )  # -m in the middle
    out, err = capsys.readouterr()
    assert ran == [1, 2]
    sentence = (
        "error: algo.k=60,algo=draft,sampler.steps=20: algo.k=60 exceeds sampler.steps=20; set algo.k<=20 or "
        "raise sampler.steps"
    )
    assert err.splitlines()[0] == sentence and "Traceback" not in err
    assert "Traceback" not in out


def test_a_mistake_that_only_the_model_shows_is_a_sentence_too(
    tiny_sd: str, tmp_path, monkeypatch, capsys
) -> None:
    """eta beyond DDIM's bound and LoRA targets that the network lacks: exit code 2, one sentence, no run
    folder."""
    for mistake in ("sampler.eta=3", "policy.lora.targets=[attention]"):
        assert command_line(monkeypatch, *tiny(tiny_sd, mistake, f"output_dir={tmp_path}/run")) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err and re.match(
            r"error: .*(sampler\.eta=3|attention)", err.splitlines()[-1]
        )
        assert not (tmp_path / "run").exists()


def test_a_bug_keeps_its_traceback(desk: Path, monkeypatch) -> None:
    """Only users' mistakes are shortened."""
    with pytest.raises(AssertionError, match="a model was loaded"):
        command_line(monkeypatch, "output_dir=run")


def test_the_real_command(desk: Path) -> None:
    """In a process of its own: exit code 2, nothing but sentences, nothing written, in the time it takes to
    import torch."""
    before = files(desk)
    code = (
        "import sys; from alignlab.train import main; sys.argv[1:] = ['lr=-1', 'kl_coef=1']\ntry: "
        "main()\nfinally: print(*({'diffusers', 'transformers', 'peft'} & {*sys.modules}))"
    )
    for call in (["-m", "alignlab.train", "lr=-1", "kl_coef=1"], ["-c", code]):
        done = subprocess.run([sys.executable, *call], capture_output=True, text=True, cwd=desk)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            "error: kl_coef is not a known key; did you mean kl_coeff?",
            "error: lr=-1.0 must be positive",
        ]
        assert done.stdout.strip() == ""
    assert files(desk) == before


def test_the_shipped_optimiser_needs_no_trial() -> None:
    """What the check takes for granted is conf/optimizer/adamw.yaml, and torch takes it; so a start does not
    import torch's compiler."""
    shipped = {**configured("algo=ddpo").optimizer, "lr": 1.0}
    assert shipped == SHIPPED_OPTIMIZER
    torch.optim.AdamW(
        [torch.nn.Parameter(torch.zeros(2))], **{k: v for k, v in shipped.items() if k != "_target_"}
    )
    code = (
        "import sys; from tests.running import configured; configured('algo=ddpo'); print('torch._dynamo' in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False"], done.stderr[-300:]


def test_help_lists_groups_and_keys(desk: Path, monkeypatch, capsys) -> None:
    """--help shows commands, the options of every group and the top-level keys."""
    assert command_line(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for word in (
        "algo: ddpo, dpo, dpo_online, draft, draftp, kto, rwr, sft",
        "python -m alignlab.train algo=draftp kl_coeff=0.25",
        "samples_per_step",
        "prompts: ",
    ):
        assert word in shown


def test_the_command_line_wins() -> None:
    """Command line over experiment, experiment over algorithm, algorithm over train.yaml."""
    assert configured("algo=draftp").kl_coeff == 0.25
    assert configured("algo=draftp", "kl_coeff=0.5").algo["kl_coeff"] == 0.5
    assert configured("experiment=figure/ddpo_fig4", "evaluation.final_images=7").evaluation.final_images == 7


def test_types() -> None:
    """What fits an annotation, and how a user would call it."""
    assert fits(1, float) and not fits(True, float) and not fits(1.5, int) and not fits(None, int)
    assert fits(None, int | None) and fits(["a"], list[str] | None) and not fits([1], list[str])
    assert words(int | None) == "a whole number or null"


def test_a_sampler_of_ones_own_may_fit_any_model() -> None:
    """Only the package's samplers are known to be of diffusion models or of rectified flows."""
    flow_model = {"_target_": "alignlab.models.sd3.StableDiffusion3"}
    ours = {"_target_": "alignlab.engine.samplers.ddim", "steps": 4, "eta": 1.0}
    assert list(sampler_problems(flow_model, {"sampler": {**ours, "_target_": "my_sampler.mine"}})) == []
    (sentence,) = sampler_problems(flow_model, {"sampler": ours})
    assert "which is a rectified flow" in sentence
