"""python -m alignlab.serve_reward reward=jpeg_compressibility port=8000

Serves a reward to runs on other machines or in other environments. They take `reward=remote
reward.remote.url=http://HOST:8000`.
"""

import hashlib
import ipaddress
import json
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from alignlab.config.build import ConfigError, build
from alignlab.config.checks import bench_problems
from alignlab.config.command import command
from alignlab.config.compose import opted_in, plain
from alignlab.config.jobs import device_of
from alignlab.config.record import Keys, record
from alignlab.config.reward_nodes import declared, weighed, without_weighing
from alignlab.rewards.server import RewardServer
from alignlab.rewards.servers import TOKEN, token
from alignlab.rewards.wire import Limits


@dataclass
class ServeRewardConfig(Keys):
    """The keys of conf/serve_reward.yaml."""

    host: str = "127.0.0.1"
    """127.0.0.1 is this machine only; 0.0.0.0 everyone who can reach it, which needs a secret in
    ALIGNLAB_REWARD_TOKEN."""
    port: int = 8000
    """0 takes a free one. [number of a port]"""
    device: str = "auto"
    """auto, cpu, cuda or mps. [auto | cpu | cuda | mps]"""
    max_megabytes: float = 64.0
    """The longest body of a request, in MiB. [MiB]"""
    max_megapixels: float = 64.0
    """The most pixels of a request's images together, in units of 2^20: 64 images of 1024 px. They count as
    the reward resizes them. [2^20 pixels]"""
    max_images: int = 64
    """The most images of a request, however small; runs ask for no more at once. [images]"""
    allow_targets: list[str] | None = None
    """Modules of your own that _target_ may name."""
    allow_servers: list[str] | None = None
    """Addresses of reward servers that only a file names, and that images and prompts may be sent to."""
    reward: Any = None
    """The reward that is served."""


ConfigStore.instance().store(name="serve_reward_schema", node=ServeRewardConfig)


def checked(cfg: DictConfig) -> ServeRewardConfig:
    """The configuration as a record.

    Raises:
        ConfigError: with every problem that was found.
    """
    given: Any = plain(cfg)
    weighed(given)
    c = record(ServeRewardConfig, {**given, "allow_targets": opted_in(given)})
    problems, names = [], list(c.reward or {})
    if len(names) != 1:
        what = f"names {len(names)} rewards" if names else "is empty"
        problems.append(f"reward {what}; choose one with reward=NAME, and start a server for each")
    elif str(c.reward[names[0]].get("_target_")).endswith(".Remote"):
        problems.append(f"reward={names[0]} is a server's already; give runs its url")
    else:
        problems += bench_problems({"reward": c.reward}, opted_in(given), ())
        if not problems and declared(c.reward[names[0]]).groupwise:
            problems.append(
                f"reward={names[0]} compares the images of a prompt with each other, which runs do "
                "themselves; choose another"
            )
    if not 0 <= c.port <= 65535:
        problems.append(f"port={c.port} is outside 0..65535")
    problems += [
        f"{key}={value} must be positive"
        for key, value in {
            "max_megabytes": c.max_megabytes,
            "max_megapixels": c.max_megapixels,
            "max_images": c.max_images,
        }.items()
        if not value > 0
    ]
    if c.device not in ("auto", "cpu", "cuda", "mps"):
        problems.append(f"device={c.device} is not one of auto, cpu, cuda, mps")
    try:
        secret = token()
    except ValueError as error:
        secret = ""
        problems.append(str(error))
    if not _is_loopback(c.host) and secret is None:
        problems.append(
            f"host={c.host} is open to other machines; set the environment variable {TOKEN} to a secret, "
            "here and there"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return c


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def server(c: ServeRewardConfig) -> RewardServer:
    """The server of a checked configuration; it listens, but does not serve yet.

    Raises:
        ConfigError: if the reward cannot be built, or the address not be had.
    """
    ((name, node),) = c.reward.items()
    node = without_weighing(node)
    digest = hashlib.blake2b(json.dumps(node, sort_keys=True).encode(), digest_size=6).hexdigest()
    limits = Limits(megabytes=c.max_megabytes, megapixels=c.max_megapixels, images=c.max_images)
    reward, device = build(node), device_of(c.device)
    try:
        return RewardServer(
            (c.host, c.port), name, reward, digest=digest, device=device, token=token(), limits=limits
        )
    except OSError as error:
        raise ConfigError(
            f"host={c.host} port={c.port} cannot be had ({error.strerror or error}); choose another"
        ) from None


@command("serve_reward", schema=ServeRewardConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    with server(checked(cfg)) as serving:
        url = f"http://{serving.server_name}:{serving.server_port}"
        print(
            f"{serving.name} ({serving.reward.unit}) on {serving.device}: {url}; Ctrl-C ends it", flush=True
        )
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    main()
