"""The keys of a training run: their types, their defaults and what each one means.

The commands that do not train have a dataclass of their own keys, beside their code.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from alignlab.config.build import ConfigError
from alignlab.config.record import Keys, record
from alignlab.runs.stored_config import KEPT_CHECKPOINTS, read_config


@dataclass
class Evaluation(Keys):
    """The evaluation during training and at its end. Its noise is never the training noise."""

    prompts: int = 8
    """Prompts of the evaluations during training. [prompts]"""
    images: int = 8
    """Images of each of them; diversity is measured within a prompt. [images]"""
    final_images: int = 4
    """Images of every training prompt, for the base model and at the end (summary.json). [images]"""
    batch: int = 64
    """Images sampled at once; the numbers do not depend on it. [images]"""


@dataclass
class Tracking(Keys):
    """How wandb or trackio shows the run, with tracker=."""

    project: str = "alignlab"
    """The project that the run belongs to."""
    name: str | None = None
    """Of the run; null takes its folder's name, with the sweep's in front: SWEEP/JOB."""
    group: str | None = None
    """What the run belongs to; null takes the sweep's folder's name, or none."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by; trackio shows them in its configuration."""


@dataclass
class TrainConfig(Keys):
    """The top-level keys. A group is a node, or several nodes by name. What the node's _target_ names types
    its arguments."""

    kl_coeff: float = 0.0
    """Weight of the distance to the frozen model; each algorithm's page states its unit.
    [per unit of the distance]"""
    combine: str = "sum"
    """What DDPO and RWR make of several rewards: the weighted sum; that of each one's zscore or rank within
    the epoch's batch; or gdpo, the weighted sum of the advantages of each. What is logged as the reward is
    the weighted sum in any case. [sum | zscore | rank | gdpo]"""
    seed: int = 0
    """Fixes every random draw: the same seed, configuration and machine give the same run. [any whole number
    from 0]"""
    steps: int = 100
    """Epochs of the run: each samples, scores and updates once, and writes one line of metrics. [epochs]"""
    lr: float = 1e-3
    """The optimiser's learning rate, at the top of its schedule. [per optimiser step]"""
    lr_schedule: str = "constant"
    """constant, linear or cosine: how lr falls after its warm-up, to 0 at the end of the run.
    [constant | linear | cosine]"""
    lr_warmup: int = 0
    """Epochs in which lr rises from 0. [epochs]"""
    ema: float = 0.0
    """Decay of a moving average of the trained weights, at most (1 + n)/(10 + n) after n updates, which is
    evaluated and saved; 0 keeps none. [share that is kept at each update]"""
    select: str = "last"
    """Which weights are saved: the last, or the best in an evaluation during training by reward, or by the
    name of a reward, held out or not."""
    samples_per_step: int = 16
    """Images sampled in each epoch. [images]"""
    micro_batch: int = 8
    """Images sampled at once, and images or (sample, step) pairs of one backward pass: the memory knob.
    [images]"""
    max_grad_norm: float = 1.0
    """Longest gradient of an optimiser step, over all trained weights; a longer one is scaled down to it.
    [norm of the gradient]"""
    precision: str = "fp32"
    """fp32, bf16 or fp16, of the denoiser; trained weights, latents and log-probs stay float32.
    [fp32 | bf16 | fp16]"""
    compile: bool = False
    """The denoiser by torch.compile: minutes at the start, faster steps on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or mps. [auto | cpu | cuda | mps]"""
    offload: bool = False
    """Keep stored trajectories in host memory."""
    eval_every: int = 20
    """Epochs from one evaluation to the next; the base model and the end are evaluated in any case.
    [epochs]"""
    checkpoint_every: int = 20
    """In epochs; 0 writes none but the first and the last. [epochs]"""
    keep: int = KEPT_CHECKPOINTS
    """Checkpoints that stay on the disk; with 1 there is none to fall back to if it goes bad.
    [checkpoints]"""
    on_nonfinite: str = "stop"
    """stop, or skip: what becomes of a rollout whose reward, and an update whose loss or gradient, is
    infinite or no number. [stop | skip]"""
    max_ratio: float | None = None
    """Stop where an importance ratio (of log-probs that are means over dimensions) leaves [1/max_ratio,
    max_ratio]; null for any. [ratio of probabilities]"""
    max_kl: float | None = None
    """Stop where an update's KL term, which kl_coeff weighs, exceeds this; null for any.
    [that of the KL term]"""
    output_dir: str | None = None
    """The run's folder, or the sweep's; a new one under runs/ or multirun/ if it is null."""
    init_from: str | None = None
    """Where the trained weights start: a run, a LoRA (a folder or .safetensors file, docs/models.md says of
    whom) or a pipeline folder (with policy.full=true). The frozen reference stays the model of
    model.path_or_id. Null starts at that one."""
    push_to_hub: str | None = None
    """owner/name: upload RUN/model to this repository of the Hugging Face hub (private) at the end, with its
    model card."""
    resume: str | None = None
    """A run folder to go on with, in its own configuration."""
    tracker: str = "none"
    """none, wandb or trackio, beside TensorBoard. [none | wandb | trackio]"""
    quick: bool = False
    """A try in seconds instead of a result: the sizes of QUICK, at most."""
    allow_targets: list[str] = field(default_factory=list)
    """Modules of your own that _target_ may name."""
    allow_servers: list[str] = field(default_factory=list)
    """Addresses of reward servers that only a file names, and that images and prompts may be sent to."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """How much is measured, and when."""
    tracking: Tracking = field(default_factory=Tracking)
    """How a tracker shows the run."""
    algo: Any = None
    """The algorithm that is trained with, and its own keys."""
    optimizer: Any = None
    """What makes steps of gradients."""
    model: Any = None
    """The pretrained model, which is also the frozen reference."""
    policy: Any = None
    """Which weights are trained, and how much memory that takes."""
    reward: Any = None
    """What is trained on. Several: 'reward=[NAME,NAME]'."""
    eval_rewards: Any = None
    """What is measured at evaluations and not trained on. Several: 'eval_rewards=[NAME,NAME]'."""
    prompts: Any = None
    """The prompts that training draws, and those that it never sees."""
    sampler: Any = None
    """How training samples."""
    eval_sampler: Any = None
    """How evaluations sample."""
    diversity: Any = None
    """The distance between images that diversity is measured with."""


TABLES: dict[str, Any] = {"evaluation": Evaluation, "tracking": Tracking}
"""The keys of TrainConfig that are tables of keys, and the dataclass of each."""
ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def stored_record(run: Path) -> TrainConfig:
    """Reads the configuration of a run folder as a record.

    Raises:
        RunError: if RUN/config.yaml cannot be read, or is no configuration.
        ConfigError: if a key or a value in it is none that a run may have.
    """
    try:
        return record(TrainConfig, read_config(run))
    except ConfigError as error:
        raise ConfigError(f"{run / 'config.yaml'}: {error}") from None


KEYS = list(TrainConfig.__dataclass_fields__)
QUICK = {
    "steps": 2,
    "eval_every": 1,
    "samples_per_step": 8,
    "algo.pairs": 8,
    "algo.images": 8,
    "micro_batch": 8,
    "eval_sampler.steps": 3,
    "evaluation.prompts": 2,
    "evaluation.images": 2,
    "evaluation.final_images": 1,
}
