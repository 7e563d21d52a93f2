"""From the command line to a checked, plain configuration, and from mistakes to one sentence each, before a model is loaded.

Nothing below this file knows Hydra or OmegaConf: checks.py says what is wrong with plain values, nodes.py makes objects of them.
"""

import atexit
import hashlib
import inspect
import logging
import os
import re
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignlab.checks import groupwise, leaf_problems, problems, weighed
from alignlab.foreign import hydra_problems
from alignlab.nodes import ConfigError, nearest, resolve, words
from alignlab.ranks import launched, shared
from alignlab.runs import GUARDS, KEPT_CHECKPOINTS, NOT_SCIENCE, RunError, read_config
from alignlab.secrecy import masked

HERE = Path(__file__).resolve().parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"  # in a wheel, or in a checkout


@dataclass
class Evaluation:
    """The evaluation during training and at its end. Its noise is never the training noise."""

    prompts: int = 8
    """Prompts of the evaluations during training."""
    images: int = 8
    """Images of each of them; diversity is measured within a prompt."""
    final_images: int = 4
    """Images of every training prompt, for the base model and at the end (summary.json)."""
    batch: int = 64
    """Images sampled at once; the numbers do not depend on it."""


@dataclass
class TrainConfig:
    """The top-level keys. The groups are typed by the constructors that their _target_ names."""

    kl_coeff: float = 0.0
    """Weight of the distance to the frozen model; each algorithm's page states its unit."""
    combine: str = "sum"
    """What DDPO and RWR make of several rewards: the weighted sum; that of each one's zscore or rank within the epoch's batch; or gdpo,
    the weighted sum of the advantages of each. What is logged as the reward is the weighted sum in any case."""
    seed: int = 0
    steps: int = 100
    """Epochs of the run: each samples, scores and updates once, and writes one line of metrics."""
    lr: float = 1e-3
    lr_schedule: str = "constant"
    """constant, linear or cosine: how lr falls after its warm-up, to 0 at the end of the run."""
    lr_warmup: int = 0
    """Epochs in which lr rises from 0."""
    ema: float = 0.0
    """Decay of a moving average of the trained weights, at most (1 + n)/(10 + n) after n updates, which is evaluated and saved; 0 keeps none."""
    select: str = "last"
    """Which weights are saved: the last, or the best in an evaluation during training by reward, or by the name of a reward, held out or not."""
    samples_per_step: int = 16
    """Images sampled in each epoch."""
    micro_batch: int = 8
    """Images sampled at once, and images or (sample, step) pairs of one backward pass: the memory knob."""
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    """fp32, bf16 or fp16, of the denoiser; trained weights, latents and log-probs stay float32."""
    compile: bool = False
    """The denoiser by torch.compile: minutes at the start, faster steps on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    offload: bool = False
    """Keep stored trajectories in host memory."""
    eval_every: int = 20
    checkpoint_every: int = 20
    """In epochs; 0 writes none but the first and the last."""
    keep: int = KEPT_CHECKPOINTS
    """Checkpoints that stay on the disk; with 1 there is none to fall back to if it goes bad."""
    on_nonfinite: str = "stop"
    """stop, or skip: what becomes of a rollout whose reward, and an update whose loss or gradient, is infinite or no number."""
    max_ratio: float | None = None
    """Stop where an importance ratio (of log-probs that are means over dimensions) leaves [1/max_ratio, max_ratio]; null for any."""
    max_kl: float | None = None
    """Stop where an update's KL term, which kl_coeff weighs, exceeds this; null for any."""
    output_dir: str | None = None
    """The run's folder, or the sweep's; a new one under runs/ or multirun/ if it is null."""
    init_from: str | None = None
    """Where the trained weights start: a run, a LoRA (a folder or .safetensors file, docs/models.md says of whom) or a pipeline folder (with
    policy.full=true). The frozen reference stays the model of model.path_or_id. Null starts at that one."""
    push_to_hub: str | None = None
    """owner/name: upload RUN/model to this repository of the Hugging Face hub (private) at the end, with its model card."""
    resume: str | None = None
    """A run folder to go on with, in its own configuration."""
    tracker: str = "none"
    """none, wandb or trackio, beside TensorBoard."""
    quick: bool = False
    """A try in seconds instead of a result: the sizes of QUICK, at most."""
    allow_targets: list[str] = field(default_factory=list)
    """Modules of your own that _target_ may name."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    algo: Any = None
    optimizer: Any = None
    model: Any = None
    policy: Any = None
    reward: Any = None
    eval_rewards: Any = None
    prompts: Any = None
    sampler: Any = None
    eval_sampler: Any = None
    diversity: Any = None


ConfigStore.instance().store(name="train_schema", node=TrainConfig)
OmegaConf.register_new_resolver("or", lambda *values: next(v for v in values if v is not None), replace=True)
OmegaConf.register_new_resolver("folder", lambda overrides: folder_name(overrides), replace=True)

STAY = ("checkpoint_every", "keep", "offload", *GUARDS)
"""Keys that a resumed run may change, and else has as before."""
KEYS = list(TrainConfig.__dataclass_fields__)
QUICK = {
    "steps": 2, "eval_every": 1, "samples_per_step": 8, "algo.pairs": 8, "algo.images": 8, "micro_batch": 8, "eval_sampler.steps": 3, "evaluation.prompts": 2,
    "evaluation.images": 2, "evaluation.final_images": 1,
}  # fmt: skip


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The plain, resolved configuration; that of the earlier run, if resume= is all that was asked for.

    Raises:
        ConfigError: with every problem that was found.
    """
    c = plain(cfg)
    weighed(c)
    keys, earlier, allowed = asked(), Path(c.get("resume") or "") / "config.yaml", opted_in(c)
    if "resume" in keys <= {*NOT_SCIENCE, "allow_targets"} and earlier.is_file():
        try:
            c = read_config(earlier.parent) | {key: c[key] for key in NOT_SCIENCE if key not in STAY or key in keys}
        except RunError as error:
            raise ConfigError(str(error)) from None
    for key, most in QUICK.items() if c.get("quick") else ():
        group, _, name = key.rpartition(".")
        node = c.get(group) if group else c
        if isinstance(node, dict) and isinstance(node.get(name), int):
            node[name] = min(node[name], most)
    found = list(dict.fromkeys(problems({**c, "allow_targets": allowed} if "allow_targets" in c else c, KEYS)))
    if found:
        raise ConfigError("\n".join(found))
    if c["quick"] and groupwise(c["reward"]) + groupwise(c["eval_rewards"]):
        c["evaluation"]["final_images"] = max(2, c["evaluation"]["final_images"])
    return c


def plain(cfg: DictConfig) -> Any:
    """The resolved dictionary.

    Raises:
        ConfigError: if a reference leads nowhere, or a value is one that no key may have.
    """
    try:
        c: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = re.sub(r"^TypeError raised .*", "a resolver in it is given the wrong arguments", _first_line(error))
        reason = re.sub(
            r"Cannot convert '(Dict|List)Config' to string.*", "it leads to a table or a list, not to a value", reason
        )
        raise ConfigError(f"{error.full_key} cannot be resolved: {reason}") from None
    except (RecursionError, ValueError, TypeError) as error:  # a resolver's own, or a reference to itself
        raise ConfigError(f"a reference (${{...}}) of the configuration cannot be resolved: {_first_line(error)}") from None
    unfit = list(leaf_problems(c))
    if unfit:
        raise ConfigError("\n".join(unfit))
    return c


def refuse_deleted(cfg: DictConfig, schema: type) -> None:
    """Raises a ConfigError if a key of the schema was deleted (~key)."""
    # in cfg itself a key without a value ("???") is not
    deleted = [f.name for f in fields(schema) if f.name not in cfg.keys()]
    if not deleted and "evaluation" in cfg and isinstance(cfg.evaluation, DictConfig):
        deleted = [f"evaluation.{f.name}" for f in fields(Evaluation) if f.name not in cfg.evaluation.keys()]
    if deleted:
        raise ConfigError(f"{', '.join(deleted)} must not be deleted")


_TYPED: ContextVar[list[str] | None] = ContextVar("typed", default=None)
"""The overrides of the command that runs in this process."""


def asked() -> set[str]:
    """The keys that the command line names; none outside of a command."""
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return {word.lstrip("+~").partition("=")[0] for word in words}


def opted_in(c: dict[str, Any]) -> list[str]:
    """allow_targets, if the user typed it: a file, of --config-dir or of a run folder, cannot open the door to itself. Outside of a
    command the configuration is the calling program's own."""
    words, given = _TYPED.get(), c.get("allow_targets")
    if words is None and HydraConfig.initialized():  # a launcher's process
        words = list(HydraConfig.get().overrides.task)
    typed = words is None or any(word.lstrip("+").startswith("allow_targets") for word in words)
    return list(given) if typed and isinstance(given, list) else []


def device_of(name: str) -> torch.device:
    """auto is the best there is. The jobs of a sweep take the GPUs of the machine in turn."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and launched() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if name == "cuda" and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return torch.device("cuda", HydraConfig.get().job.num % torch.cuda.device_count())
    return torch.device(name)


# -- the command line


class _Said(Exception):
    """A job of a sweep ended with sentences that are already on the screen."""


def command(
    name: str, *, schema: type = TrainConfig, check: Callable[[DictConfig], Any] = checked
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """`hydra.main` for a function of the composed configuration, with sentences in place of tracebacks for users' mistakes.

    Args:
        name: of the primary file in conf/.
        schema: the dataclass of its keys.
        check: raises a ConfigError for a composed configuration that will not do.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def run() -> None:
            started = []

            def task(cfg: DictConfig) -> Any:
                started.append(True)
                logging.disable(logging.INFO)  # of the libraries; the run has a journal of its own
                logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel that nothing here calls
                try:
                    refuse_deleted(cfg, schema)
                    return function(cfg)
                except ConfigError as error:
                    at = HydraConfig.get()
                    if (
                        at.mode == RunMode.MULTIRUN and launched() == 1
                    ):  # the launcher lets the other jobs go on, perhaps in other processes
                        _say(error, f"{at.job.override_dirname}: ")
                        raise _Said from None
                    sys.exit(_say(error))
                except Exception:
                    if launched() == 1:
                        raise
                    traceback.print_exc()  # Hydra would go on with a sweep's next job, and the other processes wait in this one
                    os._exit(1)
                finally:
                    logging.disable(logging.NOTSET)

            sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # argparse wants it first
            if _silent() and sys.argv[1:2] in (["-m"], ["--multirun"]):  # a sweep's own files are process 0's
                aside = tempfile.TemporaryDirectory()
                atexit.register(aside.cleanup)
                sys.argv.append(f"hydra.sweep.dir={aside.name}")
            parser: Any = get_args_parser()
            parser.error = lambda message: sys.exit(_say(f"{message}; --help shows how to call this"))
            arguments = parser.parse_args()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing
            before = _TYPED.set(list(arguments.overrides))
            try:
                foreign = _foreign(name, arguments)
                if foreign:
                    sys.exit(_say("\n".join(foreign)))
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
            except _Said:
                sys.exit(2)
            except KeyboardInterrupt:
                print("ended at once; what was saved before is intact", file=sys.stderr)
                sys.exit(130)  # as a shell says it
            except Exception as error:
                refused = (HydraException, OmegaConfBaseException, ValueError, TypeError, OSError, AssertionError, IndexError)
                if started or not isinstance(error, refused):
                    raise
                sys.exit(_say(_diagnosis(name, arguments, schema, check) or _first_line(error)))
            finally:
                _TYPED.reset(before)

        return run

    return decorate


def folder_name(overrides: str) -> str:
    """The folder of one job of a sweep: its overrides, as one name that any file system takes."""
    name = overrides.replace("/", "_")
    return name if len(name) <= 180 else f"{name[:160]}-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"


LAUNCHERS = {"joblib": "alignlab[sweeps]", "submitit_slurm": "alignlab[sweeps]", "submitit_local": "alignlab[sweeps]"} | {
    "ray": "hydra-ray-launcher"
}
"""Where Hydra's launchers come from."""


def run_folder(c: dict[str, Any]) -> Path:
    """resume=, or the job's folder in a sweep, or output_dir=, or a new one: that of process 0."""
    at = HydraConfig.get()
    given = c["resume"] or (at.runtime.output_dir if at.mode == RunMode.MULTIRUN else c["output_dir"])
    return Path(shared(given or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-{at.runtime.choices['algo']}"))


def _say(sentences: object, job: str = "") -> int:
    for line in masked(str(sentences)).splitlines():
        if not _silent() or line.startswith("process "):
            line = line if len(line) <= 1200 else f"{line[:800]} [...] {line[-300:]}"
            print(f"error: {job}{line}", file=sys.stderr)
    return 2


def _silent() -> bool:
    """Whether another process says the same (ranks.signed: what only this one has to say)."""
    return launched() > 1 and os.environ.get("RANK", "0") != "0"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _foreign(name: str, arguments: Namespace) -> list[str]:
    """What files found by --config-dir or hydra.searchpath make of Hydra itself, before it does as they say; nothing without them."""
    paths = [word for word in arguments.overrides if word.startswith("hydra.searchpath=")]
    if arguments.config_dir:
        paths.append(f"hydra.searchpath=[file://{Path(arguments.config_dir).resolve()}]")
    if not paths:
        return []
    others = [_singles(word) if arguments.multirun else [word] for word in arguments.overrides if word not in paths]
    found: list[str] = []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        plain_hydra = _hydra_node(name, [])
        for k in range(max(map(len, others), default=1)):
            typed = [one[min(k, len(one) - 1)] for one in others]
            try:
                its = _hydra_node(name, [*paths, *typed])
            except Exception:  # it does not compose, which has its own sentence
                return []
            found += hydra_problems(its, plain_hydra, [word.lstrip("+~").partition("=")[0] for word in typed])
    return list(dict.fromkeys(found))


def _hydra_node(name: str, overrides: list[str]) -> dict[str, Any]:
    node: Any = OmegaConf.to_container(hydra.compose(name, overrides, return_hydra_config=True).hydra, resolve=False)
    return node


def _diagnosis(name: str, arguments: Namespace, schema: type, check: Callable[[DictConfig], Any]) -> str:
    """Why a command line composes no configuration: each override that is wrong by itself, and what the others get wrong."""
    extra = Path(arguments.config_dir or "").resolve()
    good, found = [f"hydra.searchpath=[file://{extra}]"] if arguments.config_dir and extra.is_dir() else [], []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for text in sorted(arguments.overrides, key=lambda text: "." in text.partition("=")[0]):  # groups decide which keys exist
            for one in _singles(text) if arguments.multirun else [text]:
                try:
                    hydra.compose(name, [*good, one])
                    good.append(one)
                except Exception as error:
                    found.append(_sentence(one, error, hydra.compose(name, good), schema))
        try:
            composed = hydra.compose(name, good)
            refuse_deleted(composed, schema)
            check(composed)
        except ConfigError as error:
            found.append(str(error))
    return "\n".join(dict.fromkeys(found))


def _singles(text: str) -> list[str]:
    """An override of a sweep as the overrides of its jobs."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return [text]
    values = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
    return [f"{override.get_key_element()}={value}" for value in values] or [text]


def _sentence(text: str, error: Exception, cfg: DictConfig, schema: type) -> str:
    """What is wrong with one override, given the configuration without it."""
    key, _, value = text.lstrip("+~").partition("=")
    cause = error.__cause__ or error
    if isinstance(error, OverrideParseException) or not key:
        return f"{text} cannot be read; write key=value, with quotes around blanks and brackets"
    if "Ambiguous value" in str(error) or "requires --multirun" in str(error):
        return f"{text} names several values; add -m to run each of them, or write a list as '{key}=[{value}]'"
    missing = str(getattr(error, "missing_cfg_file", None) or "").rpartition("/")[2]
    if key == "hydra/launcher" and missing in LAUNCHERS:
        return f"{text} needs a plugin of Hydra's; pip install '{LAUNCHERS[missing]}'"
    if (CONF / key).is_dir():
        options = getattr(error, "options", None) or sorted(p.stem for p in (CONF / key).glob("*.yaml"))
        value = (getattr(error, "missing_cfg_file", None) or value).rpartition("/")[2]
        return f"{key}={value} is no option; {nearest(value, options, f'{key}=')}"
    if isinstance(cause, (AttributeError, KeyError)):  # a key that is not there
        parent, _, name = key.rpartition(".")
        target = str(OmegaConf.select(cfg, f"{parent}._target_"))
        if target.startswith("alignlab.") and name in inspect.signature(resolve(target)).parameters:
            return f"{key} is not in the chosen file; write +{text} to add it"
        known = list(_dotted(OmegaConf.to_container(cfg)))
        inner = [k for k in known if k.endswith(f".{key}")]
        return f"{key} is not a known key; " + (f"did you mean {' or '.join(inner)}?" if inner else nearest(key, known))
    if text.startswith("~"):
        return f"{key} must not be deleted"
    typed = {f.name: f for f in fields(schema)} | {f"evaluation.{f.name}": f for f in fields(Evaluation)}
    if key in typed:
        return f"{text} must be {words(typed[key].type)}"
    if isinstance(cause, (AssertionError, IndexError)) or "is not an int" in str(cause):  # a name under a list
        parent = key.rpartition(".")[0]
        return f"{text}: {parent} is no table of keys and values; write '{parent}=[...]' whole"
    if "Cannot merge" in str(cause):  # OmegaConf's own words name its classes
        return f"{text} would replace a table of keys and values; set the keys in it, {key}.NAME=..."
    return f"{text}: {_first_line(cause)}"


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of nested dictionaries, but for the private ones."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if not key.startswith("_"):
            yield prefix + key
            yield from _dotted(value, f"{prefix}{key}.")
