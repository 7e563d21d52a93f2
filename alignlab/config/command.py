"""The decorator that makes a command of a function: it reads the words, lets Hydra compose, and turns
mistakes into sentences."""

import atexit
import logging
import os
import re
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from alignlab.config import help
from alignlab.config.build import ConfigError
from alignlab.config.compose import CONF, checked, first_line, refuse_deleted, typing_of
from alignlab.config.diagnosis import diagnosis, foreign_problems, launcher_sentence, say, silent
from alignlab.config.jobs import SWEEPING, own_folder, subdir_words
from alignlab.config.newest import named
from alignlab.config.schema import TrainConfig
from alignlab.config.typed import as_meant
from alignlab.distributed.ranks import launched
from alignlab.files.safe_folder import RunError, give_back
from alignlab.rewards.servers import in_a_command, naming

REFUSALS = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    TypeError,
    OSError,
    AssertionError,
    IndexError,
)
"""What Hydra and OmegaConf raise for words that compose no configuration."""


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
    return lambda function: Command(name, function, schema, check).run


class _Said(Exception):
    """A job of a sweep ended with sentences that are already on the screen."""


@dataclass
class Command:
    """A function that can be typed. `run` is called once by the user, `task` by Hydra, for each job."""

    name: str
    function: Callable[[DictConfig], Any]
    schema: type
    check: Callable[[DictConfig], Any]
    started: bool = False
    """Whether a configuration was composed: what is raised afterwards is no mistake in the words."""

    def run(self) -> None:
        """Reads the command line, runs its job or jobs, and ends the process where something is wrong."""
        self.started = False
        if help.wanted(sys.argv[1:]):
            help.show(help.text(self.name, sys.argv[1:]))
            return
        try:
            arguments = _arguments(self.name)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing
            with typing_of(arguments.overrides), naming(arguments.overrides):
                self._compose_and_run(arguments)
        finally:
            give_back()

    def _compose_and_run(self, arguments: Namespace) -> None:
        try:
            foreign = foreign_problems(self.name, arguments)
            if foreign:
                sys.exit(say("\n".join(foreign)))
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=self.name)(self.task)()
        except _Said:
            sys.exit(2)
        except KeyboardInterrupt:
            print("ended at once; what was saved before is intact", file=sys.stderr)
            sys.exit(130)  # as a shell says it
        except Exception as error:
            known = launcher_sentence(error) or self._mistake(error, arguments)
            if known is None:
                raise
            code, sentence = known
            say(sentence)
            sys.exit(code)

    def _mistake(self, error: Exception, arguments: Namespace) -> tuple[int, str] | None:
        """What the words of the command line get wrong, and the exit code; None for any other error."""
        if self.started or not isinstance(error, REFUSALS):
            return None
        return 2, diagnosis(self.name, arguments, self.schema, self.check) or first_line(error)

    def task(self, cfg: DictConfig) -> Any:
        """Runs one job, in this process or in one that a launcher started."""
        self.started = True
        at = HydraConfig.get()
        try:
            with _quiet_libraries(), nullcontext() if in_a_command() else naming(at.overrides.task):
                refuse_deleted(cfg, self.schema)
                with own_folder(at, self.name):
                    return self.function(cfg)
        except (ConfigError, RunError) as error:
            # the launcher lets the other jobs go on, perhaps in other processes
            if at.mode == RunMode.MULTIRUN and launched() == 1:
                say(error, f"{at.job.override_dirname}: ")
                raise _Said from None
            sys.exit(say(error))
        except Exception:
            if launched() == 1:
                raise
            # Hydra would go on with a sweep's next job, and the other processes wait in this one
            traceback.print_exc()
            os._exit(1)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Inside, libraries log warnings only; the run has a journal of its own."""
    logging.disable(logging.INFO)
    # it warns of a kernel that nothing here calls
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _newest(text: str) -> str:
    """A word with the newest folder in the place of `last`, which is told; ends the process where none
    fits."""
    try:
        meant, said = named(text)
    except ConfigError as error:
        sys.exit(say(error))
    if said is not None and not silent():
        print(said, flush=True)
    return meant


def _unread(message: str) -> str:
    """What argparse says of words that it cannot read, and how to write them."""
    dashed = re.findall(r"(?<!\S)--([A-Za-z][\w.-]*)", message)
    if message.startswith("unrecognized arguments") and dashed:
        key = dashed[0].replace("-", "_")
        return f"--{dashed[0]} is no option; keys are written without dashes: {key}=VALUE"
    return f"{message}; --help shows how to call this"


def _arguments(name: str) -> Namespace:
    """The words of the command line as the user means them. They stand in sys.argv afterwards, where Hydra
    reads them, with those that a sweep needs beside.

    Args:
        name: of the command.
    """
    # argparse wants it first
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    if silent() and sys.argv[1:2] in (["-m"], ["--multirun"]):  # a sweep's own files are process 0's
        aside = tempfile.TemporaryDirectory()
        atexit.register(aside.cleanup)
        sys.argv.append(f"hydra.sweep.dir={aside.name}")
    parser: Any = get_args_parser()
    parser.error = lambda message: sys.exit(say(_unread(message)))
    arguments: Namespace = parser.parse_args()
    meant = {text: as_meant(_newest(text), sweep=arguments.multirun) for text in arguments.overrides}
    sys.argv[1:] = [meant.get(text, text) for text in sys.argv[1:]]
    arguments.overrides = [meant[text] for text in arguments.overrides]
    if arguments.multirun and name in SWEEPING:
        sys.argv += subdir_words(arguments.overrides)
    return arguments
