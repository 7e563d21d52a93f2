"""From the command line to a checked, plain configuration, and from mistakes to one sentence each, before a
model is loaded.

Nothing below this file knows Hydra or OmegaConf: checks.py says what is wrong with plain values, build.py
makes objects of them.
"""

import atexit
import inspect
import logging
import os
import re
import shlex
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignlab.config.build import ConfigError, nearest, resolve, words
from alignlab.config.checks import groupwise, ignored_problems, leaf_problems, problems, weighed
from alignlab.config.foreign import hydra_problems, yaml_problems
from alignlab.config.job_names import WORDS, folder_of, write_words
from alignlab.config.path_keys import LIST, is_path
from alignlab.config.secrecy import masked
from alignlab.config.typed import as_meant, swept
from alignlab.distributed.ranks import launched, rank, shared
from alignlab.files.safe_folder import RunError, fresh, give_back, refuse_links
from alignlab.rewards.servers import in_a_command, naming
from alignlab.runs.folder import KEPT_CHECKPOINTS, NOT_SCIENCE, read_config
from alignlab.runs.moved_targets import with_moved_targets
from alignlab.runs.pasted import list_word, word

HERE = Path(__file__).resolve().parents[1]  # alignlab/
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
    """What DDPO and RWR make of several rewards: the weighted sum; that of each one's zscore or rank within
    the epoch's batch; or gdpo, the weighted sum of the advantages of each. What is logged as the reward is
    the weighted sum in any case."""
    seed: int = 0
    steps: int = 100
    """Epochs of the run: each samples, scores and updates once, and writes one line of metrics."""
    lr: float = 1e-3
    lr_schedule: str = "constant"
    """constant, linear or cosine: how lr falls after its warm-up, to 0 at the end of the run."""
    lr_warmup: int = 0
    """Epochs in which lr rises from 0."""
    ema: float = 0.0
    """Decay of a moving average of the trained weights, at most (1 + n)/(10 + n) after n updates, which is
    evaluated and saved; 0 keeps none."""
    select: str = "last"
    """Which weights are saved: the last, or the best in an evaluation during training by reward, or by the
    name of a reward, held out or not."""
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
    """stop, or skip: what becomes of a rollout whose reward, and an update whose loss or gradient, is
    infinite or no number."""
    max_ratio: float | None = None
    """Stop where an importance ratio (of log-probs that are means over dimensions) leaves [1/max_ratio,
    max_ratio]; null for any."""
    max_kl: float | None = None
    """Stop where an update's KL term, which kl_coeff weighs, exceeds this; null for any."""
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
    """none, wandb or trackio, beside TensorBoard."""
    quick: bool = False
    """A try in seconds instead of a result: the sizes of QUICK, at most."""
    allow_targets: list[str] = field(default_factory=list)
    """Modules of your own that _target_ may name."""
    allow_servers: list[str] = field(default_factory=list)
    """Addresses of reward servers that only a file names, and that images and prompts may be sent to."""
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
# eval_rewards=NAME chooses among the same files as reward=NAME.
for _file in (CONF / "reward").glob("*.yaml"):
    ConfigStore.instance().store(group="eval_rewards", name=_file.stem, node=OmegaConf.load(_file))
OmegaConf.register_new_resolver("or", lambda *values: next(v for v in values if v is not None), replace=True)
OmegaConf.register_new_resolver("folder", lambda sweep, *typed: job_folder(sweep, *typed), replace=True)
OmegaConf.register_new_resolver(
    "sweep_folder", lambda given, name: sweep_folder(given, name), use_cache=True, replace=True
)
OmegaConf.register_new_resolver("last", lambda path: Path(str(path)).name, replace=True)

SWEEPING = ("train", "make_pairs", "train_reward")
"""The commands whose sweeps have a folder for each job."""
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
            stored = read_config(earlier.parent)
            c = (
                {key: c[key] for key in NOT_SCIENCE}
                | stored
                | {key: c[key] for key in NOT_SCIENCE if key in keys}
            )
        except RunError as error:
            raise ConfigError(str(error)) from None
    for key, most in QUICK.items() if c.get("quick") else ():
        group, _, name = key.rpartition(".")
        node = c.get(group) if group else c
        if isinstance(node, dict) and isinstance(node.get(name), int):
            node[name] = min(node[name], most)
    found = list(
        dict.fromkeys(problems({**c, "allow_targets": allowed} if "allow_targets" in c else c, KEYS))
    )
    upload = c.get("push_to_hub")
    if upload is not None and c.get("resume") is None and not typed("push_to_hub"):
        found.append(
            f"push_to_hub={upload} stands in a file, and the model would be uploaded there; if you want "
            f"that, type push_to_hub={upload}, "
            "and push_to_hub=null if not"
        )
    if not found and not (_given(c) / "config.yaml").is_file():  # a run that began goes on as it is
        found = list(ignored_problems(c, _references(cfg.algo)))
    if found:
        raise ConfigError("\n".join(found))
    if c["quick"] and groupwise(c["reward"]) + groupwise(c["eval_rewards"]):
        c["evaluation"]["final_images"] = max(2, c["evaluation"]["final_images"])
    return c


def _references(node: Any) -> set[str]:
    """The top-level keys that a part of the configuration refers to."""
    return set(re.findall(r"\$\{\.*(\w+)\}", str(OmegaConf.to_container(node, resolve=False))))


def plain(cfg: DictConfig) -> Any:
    """The resolved dictionary.

    Raises:
        ConfigError: if a reference leads nowhere, or a value is one that no key may have.
    """
    try:
        c: Any = with_moved_targets(OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        reason = re.sub(
            r"^TypeError raised .*", "a resolver in it is given the wrong arguments", _first_line(error)
        )
        reason = re.sub(
            r"Cannot convert '(Dict|List)Config' to string.*",
            "it leads to a table or a list, not to a value",
            reason,
        )
        raise ConfigError(f"{error.full_key} cannot be resolved: {reason}") from None
    except (RecursionError, ValueError, TypeError) as error:  # a resolver's own, or a reference to itself
        raise ConfigError(
            f"a reference (${{...}}) of the configuration cannot be resolved: {_first_line(error)}"
        ) from None
    c = _at_home(c)
    unfit = list(leaf_problems(c))
    if unfit:
        raise ConfigError("\n".join(unfit))
    return c


def _at_home(node: Any, where: str = "") -> Any:
    """The configuration with `~` in front of a path as the user's home, which a shell replaces in some places
    only."""
    if isinstance(node, dict):
        return {key: _at_home(value, f"{where}.{key}" if where else str(key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_at_home(value, f"{where}.{k}") for k, value in enumerate(node)]
    return os.path.expanduser(node) if isinstance(node, str) and is_path(where) else node


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
    """allow_targets, if the user typed it: a file, of --config-dir or of a run folder, cannot open the door
    to itself. Outside of a command the configuration is the calling program's own."""
    given = c.get("allow_targets")
    return list(given) if typed("allow_targets") and isinstance(given, list) else []


def typed(key: str) -> bool:
    """Whether the user typed the key for the command that runs. Outside of a command everything is the
    calling program's own."""
    words = _TYPED.get()
    if words is None and HydraConfig.initialized():  # a launcher's process
        words = list(HydraConfig.get().overrides.task)
    return words is None or any(word.lstrip("+").startswith(key) for word in words)


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
    """`hydra.main` for a function of the composed configuration, with sentences in place of tracebacks for
    users' mistakes.

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
                logging.getLogger("bitsandbytes").setLevel(
                    logging.ERROR
                )  # it warns of a kernel that nothing here calls
                at = HydraConfig.get()
                try:
                    refuse_deleted(cfg, schema)
                    with (
                        nullcontext() if in_a_command() else naming(at.overrides.task),
                        _own_folder(at, name),
                    ):  # a launcher's process
                        return function(cfg)
                except (ConfigError, RunError) as error:
                    if (
                        at.mode == RunMode.MULTIRUN and launched() == 1
                    ):  # the launcher lets the other jobs go on, perhaps in other processes
                        _say(error, f"{at.job.override_dirname}: ")
                        raise _Said from None
                    sys.exit(_say(error))
                except Exception:
                    if launched() == 1:
                        raise
                    # Hydra would go on with a sweep's next job, and the other processes wait in this one
                    traceback.print_exc()
                    os._exit(1)
                finally:
                    logging.disable(logging.NOTSET)

            sys.argv[1:] = sorted(
                sys.argv[1:], key=lambda word: word not in ("-m", "--multirun")
            )  # argparse wants it first
            if _silent() and sys.argv[1:2] in (["-m"], ["--multirun"]):  # a sweep's own files are process 0's
                aside = tempfile.TemporaryDirectory()
                atexit.register(aside.cleanup)
                sys.argv.append(f"hydra.sweep.dir={aside.name}")
            parser: Any = get_args_parser()
            parser.error = lambda message: sys.exit(_say(f"{message}; --help shows how to call this"))
            arguments = parser.parse_args()
            meant = {text: as_meant(text, sweep=arguments.multirun) for text in arguments.overrides}
            sys.argv[1:] = [meant.get(text, text) for text in sys.argv[1:]]
            arguments.overrides = [meant[text] for text in arguments.overrides]
            if arguments.multirun and name in SWEEPING:
                sys.argv += _naming(arguments.overrides)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing
            before, scope = _TYPED.set(list(arguments.overrides)), ExitStack()
            scope.enter_context(naming(arguments.overrides))
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
                lost = _launcher_sentence(error)
                if lost is not None:
                    code, sentence = lost
                    _say(sentence)
                    sys.exit(code)
                refused = (
                    HydraException,
                    OmegaConfBaseException,
                    ValueError,
                    TypeError,
                    OSError,
                    AssertionError,
                    IndexError,
                )
                if started or not isinstance(error, refused):
                    raise
                sys.exit(_say(_diagnosis(name, arguments, schema, check) or _first_line(error)))
            finally:
                _TYPED.reset(before)
                scope.close()
                give_back()

        return run

    return decorate


def _naming(overrides: list[str]) -> list[str]:
    """What tells the jobs of a sweep which keys have several values: for `job_folder`, in whatever process it
    is asked."""
    if any(text.lstrip("+").startswith("hydra.sweep.subdir") for text in overrides):
        return []
    several, single = (" ".join(keys) for keys in swept(overrides))
    return [f"hydra.sweep.subdir=\"${{folder:${{hydra.sweep.dir}},'{several}','{single}'}}\""]


@contextmanager
def _own_folder(at: Any, name: str) -> Iterator[None]:
    """Around a job of a sweep: its folder says from the beginning whose it is. A mistake leaves none
    behind."""
    if at.mode != RunMode.MULTIRUN or name not in SWEEPING:
        yield
        return
    folder = folder_of_job()
    try:
        write_words(folder, list(at.overrides.task))
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); choose another output_dir"
        ) from None
    try:
        yield
    except (ConfigError, RunError):
        if [path.name for path in folder.iterdir()] == [WORDS]:
            (folder / WORDS).unlink()
            folder.rmdir()
        raise


def job_folder(sweep: str, several: str = "", single: str = "") -> str:
    """The name of the folder of the job that begins here: the resolver of hydra.sweep.subdir.

    Args:
        sweep: the sweep's folder.
        several: the typed keys that have several values, between blanks; a file (hydra.sweeper.params) may
            name more.
        single: the typed keys that have one.
    """
    at = HydraConfig.get()
    words: Any = OmegaConf.to_container(at.overrides.task)
    sweeper: Any = OmegaConf.to_container(at.sweeper)
    of_file = swept([f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()])[0]
    keys = {*several.split(), *(key for key in of_file if key not in single.split())}
    return folder_of(Path(sweep), words, keys, list(at.job.config.override_dirname.exclude_keys))


LAUNCHERS = {
    "joblib": "alignlab[sweeps]",
    "submitit_slurm": "alignlab[sweeps]",
    "submitit_local": "alignlab[sweeps]",
} | {"ray": "hydra-ray-launcher"}
"""Where Hydra's launchers come from."""


HYDRAS = ("multirun.yaml", "optimization_results.yaml", ".submitit")
"""What Hydra, its sweepers and launchers write in the folder of a sweep."""


def sweep_folder(given: str | None, name: str) -> str:
    """The folder of a sweep: the one that was given, or a new one. Hydra writes there before the first job
    begins, so what is wrong with it ends the command here."""
    try:
        folder = Path(given).expanduser() if given else fresh(name)
        refuse_links(folder, *HYDRAS)
    except RunError as error:
        sys.exit(_say(error))
    return str(folder)


def folder_of_job() -> Path:
    """The folder of this job of a sweep, which must lie in the sweep's.

    Raises:
        RunError: if a link leads elsewhere.
    """
    at = HydraConfig.get()
    sweep, job = Path(at.sweep.dir), Path(at.runtime.output_dir)
    if job.is_relative_to(sweep.absolute()):
        refuse_links(sweep, str(job.relative_to(sweep.absolute())), inside=False)
    return job


def run_folder(c: dict[str, Any]) -> Path:
    """resume=, or the job's folder in a sweep, or output_dir=, or a new one: that of process 0.

    Says where the run sends what it makes: a resumed one has that from its folder, which may be somebody
    else's.
    """
    at = HydraConfig.get()
    given = c["resume"] or (folder_of_job() if at.mode == RunMode.MULTIRUN else c["output_dir"])
    if not given and rank() == 0:
        given = fresh(f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-{at.runtime.choices['algo']}")
    folder = Path(shared(str(given)))
    whose = f" (as {folder / 'config.yaml'} has it)" if c["resume"] else ""
    sent = {"push_to_hub": "uploads its model at the end to", "tracker": "logs to the tracker"}
    for key, what in sent.items() if not _silent() else ():
        if c[key] not in (None, "none"):
            off = "null" if key == "push_to_hub" else "none"
            print(
                f"this run {what} {c[key]}{'' if key in asked() else whose}; {key}={off} leaves that out",
                flush=True,
            )
    return folder


def _given(c: dict[str, Any]) -> Path:
    """The run's folder if the command line says which: resume=, the job's in a sweep, or output_dir=; else
    `Path()`."""
    at = HydraConfig.get() if HydraConfig.initialized() else None
    sweep = at is not None and at.mode == RunMode.MULTIRUN
    return Path(c["resume"] or (at.runtime.output_dir if at is not None and sweep else c["output_dir"]) or "")


def notice() -> float:
    """Seconds between a launcher's warning that a job's time is over and its end (submitit's)."""
    launcher: Any = HydraConfig.get().launcher
    return float(launcher.get("signal_delay_s", 30) if launcher is not None else 0)


def _say(sentences: object, job: str = "") -> int:
    for line in masked(str(sentences)).splitlines():
        if not _silent() or line.startswith("process "):
            line = line if len(line) <= 1200 else f"{line[:800]} [...] {line[-300:]}"
            print(f"error: {job}{line}", file=sys.stderr)
    return 2


def _silent() -> bool:
    """Whether another process says the same (ranks.signed: what only this one has to say)."""
    return launched() > 1 and os.environ.get("RANK", "0") != "0"


def _launcher_sentence(error: Exception) -> tuple[int, str] | None:
    """What an error of submitit's means, and the exit code; None if it is none of submitit's."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "submitit" in Path(frame.filename).parts
    ]
    if not frames:
        return None
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if any(frame.name == "results" for frame in frames):  # a job was taken, and has none
        again = (
            "type the same command again: what is finished is skipped, and the others go on from their "
            "checkpoints"
        )
        return (
            1,
            f"a job ended before it was done ({said[0]}; its log is in .submitit in the sweep's folder); "
            f"{again}",
        )
    if "srun" in said[0]:
        return (
            2,
            "hydra/launcher=slurm needs Slurm, and there is no srun here; choose "
            "hydra/launcher=submitit_local or workers",
        )
    mend = "set what it names, hydra.launcher.partition=NAME for example, and type the command again"
    return 2, f"hydra/launcher: the jobs were refused ({said[-1]}); {mend}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _foreign(name: str, arguments: Namespace) -> list[str]:
    """What files found by --config-dir or hydra.searchpath make of Hydra itself, before it does as they say;
    nothing without them."""
    paths = [word for word in arguments.overrides if word.startswith("hydra.searchpath=")]
    bombs = [problem for folder in _folders(paths, arguments) for problem in yaml_problems(folder)]
    if bombs:
        return bombs
    if arguments.config_dir:
        paths.append(f"hydra.searchpath=[file://{Path(arguments.config_dir).resolve()}]")
    if not paths:
        return []
    others = [
        _singles(word) if arguments.multirun else [word] for word in arguments.overrides if word not in paths
    ]
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


def _folders(searchpaths: list[str], arguments: Namespace) -> list[Path]:
    """The folders that the command line adds to the configuration."""
    listed = [Path(given) for given in (arguments.config_dir, arguments.config_path) if given]
    for text in searchpaths:
        try:
            value: Any = OverridesParser.create().parse_override(text).value()
        except HydraException:  # which has its own sentence
            continue
        listed += [
            Path(str(place).removeprefix("file://"))
            for place in (value if isinstance(value, list) else [value])
        ]
    return listed


def _hydra_node(name: str, overrides: list[str]) -> dict[str, Any]:
    node: Any = OmegaConf.to_container(
        hydra.compose(name, overrides, return_hydra_config=True).hydra, resolve=False
    )
    return node


def _diagnosis(name: str, arguments: Namespace, schema: type, check: Callable[[DictConfig], Any]) -> str:
    """Why a command line composes no configuration: each override that is wrong by itself, and what the
    others get wrong."""
    extra = Path(arguments.config_dir or "").resolve()
    good, found = (
        [f"hydra.searchpath=[file://{extra}]"] if arguments.config_dir and extra.is_dir() else [],
        [],
    )
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for text in sorted(
            arguments.overrides, key=lambda text: "." in text.partition("=")[0]
        ):  # groups decide which keys exist
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
        return (
            f"{text} cannot be read; write key=value, with quotes around blanks and "
            f"brackets{_as_text(text, cfg)}"
        )
    if "Ambiguous value" in str(error) or "requires --multirun" in str(error):
        return f"{text} names several values; add -m to run each of them{_as_list(key, value, cfg)}"
    missing = str(getattr(error, "missing_cfg_file", None) or "").rpartition("/")[2]
    if key == "hydra/launcher" and missing in LAUNCHERS:
        return f"{text} needs a plugin of Hydra's; pip install '{LAUNCHERS[missing]}'"
    group = CONF / ("reward" if key == "eval_rewards" else key)
    if group.is_dir():
        options = getattr(error, "options", None) or sorted(p.stem for p in group.glob("*.yaml"))
        value = (getattr(error, "missing_cfg_file", None) or value).rpartition("/")[2]
        return f"{key}={value} is no option; {nearest(value, options, f'{key}=')}{_own_reward(key, value)}"
    if isinstance(cause, (AttributeError, KeyError)):  # a key that is not there
        parent, _, name = key.rpartition(".")
        target = str(OmegaConf.select(cfg, f"{parent}._target_"))
        if target.startswith("alignlab.") and name in inspect.signature(resolve(target)).parameters:
            return f"{key} is not in the chosen file; write +{text} to add it"
        known = list(_dotted(OmegaConf.to_container(cfg)))
        inner = [k for k in known if k.endswith(f".{key}")]
        return f"{key} is not a known key; " + (
            f"did you mean {' or '.join(inner)}?" if inner else nearest(key, known)
        )
    if text.startswith("~"):
        return f"{key} must not be deleted"
    typed = {f.name: f for f in fields(schema)} | {f"evaluation.{f.name}": f for f in fields(Evaluation)}
    if key in typed and value.startswith("[") and is_path(key):
        one = word(key, value.strip("[]"))
        return (
            f"{text} is a list, and one name is wanted; write {one}, or {word(key, value)} if the brackets "
            "are part of the name"
        )
    if key in typed:
        return f"{text} must be {words(typed[key].type)}"
    if isinstance(cause, (AssertionError, IndexError)) or "is not an int" in str(
        cause
    ):  # a name under a list
        parent = key.rpartition(".")[0]
        return f"{text}: {parent} is no table of keys and values; write '{parent}=[...]' whole"
    if "Cannot merge" in str(cause):  # OmegaConf's own words name its classes
        return f"{text} would replace a table of keys and values; set the keys in it, {key}.NAME=..."
    return f"{text}: {_first_line(cause)}"


def _own_reward(key: str, value: str) -> str:
    """How to name a reward that is a function of the user's own (docs/rewards.md), if that may be what was
    meant."""
    if (
        key not in ("reward", "eval_rewards")
        or not re.fullmatch(r"[A-Za-z]\w*", value, re.ASCII)
        or value in ("null", "none")
    ):
        return ""
    words = (
        f"+{key}.{value}.function=my_module.score +{key}.{value}.differentiable=false "
        f"+{key}.{value}.unit=points"
    )
    return f" (a function of your own, my_module.score: {key}=none {words} 'allow_targets=[my_module]')"


def _as_text(text: str, cfg: DictConfig) -> str:
    """How to write one text at a key whose value Hydra cannot read; nothing where a number is wanted."""
    key, _, value = text.partition("=")
    if not value or not re.fullmatch(r"\+{0,2}[A-Za-z_][\w.]*", key, re.ASCII):
        return ""
    name = key.lstrip("+")
    now = OmegaConf.select(cfg, name, throw_on_missing=False)
    if isinstance(now, ListConfig) or LIST.fullmatch(name):
        return "" if value.startswith("[") else f": {list_word(key, [value])}"
    return "" if isinstance(now, (bool, int, float, DictConfig)) else f": {word(key, value)}"


def _as_list(key: str, value: str, cfg: DictConfig) -> str:
    """How to write a list instead of several values, where a key takes one."""
    listed = isinstance(OmegaConf.select(cfg, key, throw_on_missing=False), ListConfig)
    several = key in ("reward", "eval_rewards") or listed or key.startswith("prompts.")
    return f", or write a list: {shlex.quote(f'{key}=[{value}]')}" if several else ""


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of nested dictionaries, but for the private ones."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if not key.startswith("_"):
            yield prefix + key
            yield from _dotted(value, f"{prefix}{key}.")
