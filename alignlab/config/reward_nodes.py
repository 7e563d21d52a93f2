"""The nodes of rewards: what they say of themselves, and the keys that are the weighted sum's."""

from collections.abc import Iterator, Sequence
from typing import Any

from alignlab.config.build import ChecksArguments, build, fits, node_problems, resolve, words
from alignlab.rewards import Declared

OFFERS = ("__call__",)
"""What makes a class a reward."""

WEIGHING = {"weight": float, "normalize": bool}
"""Keys of a reward that are the weighted sum's, not its constructor's."""
WEIGHED = {"weight": 1.0, "normalize": False}
FUNCTION = "alignlab.rewards.function.Function"
MEASURED = ("reward", "lpips", "mean", "std", "kl_eps_guided", "kl_eps_conditional", "kl_trajectory")
"""Names that no reward may have."""


def reward_problems(group: str, nodes: Any, allowed: Sequence[str]) -> Iterator[str]:
    """Says what is wrong with a group of rewards, a sentence each.

    Args:
        group: its key: reward or eval_rewards.
        nodes: by name; None is no reward.
        allowed: modules that _target_ may name beside our own.
    """
    if not isinstance(nodes, dict | None):
        yield f"{group}={nodes} names no reward; choose one with {group}=NAME"
        return
    for name, node in (nodes or {}).items():
        if name in MEASURED or name.endswith("_std"):
            yield (
                f"{group}.{name} is also the name of a number that every evaluation reports; call it "
                "something else"
            )
        yield from _reward_problems(f"{group}.{name}", node, allowed)


def _reward_problems(where: str, node: Any, allowed: Sequence[str]) -> Iterator[str]:
    """Says what is wrong with one reward."""
    problems = list(node_problems(where, without_weighing(node), allowed=allowed, offers=OFFERS))
    if any(sentence.startswith(f"{where}.images is missing") for sentence in problems):
        target = node["_target_"]
        problems = [
            f"{where}._target_={target} is a function; write +{where}.function={target} in its place, and "
            "its differentiable and unit"
        ]
    yield from problems
    if not isinstance(node, dict):
        return
    if not problems:
        try:
            declared(node)
        except ValueError as error:
            yield f"{where}: {error}"
    for key, kind in WEIGHING.items():
        if not fits(node.get(key), kind):
            yield f"{where}.{key}={node.get(key)} must be {words(kind)}"


def declared(node: dict[str, Any]) -> Declared:
    """What a reward's checked node says of itself, without weights.

    Raises:
        ValueError: if it says too little.
    """
    own = without_weighing(node)
    made = resolve(own["_target_"])
    try:
        return Declared.by(made)
    except ValueError:
        if isinstance(made, ChecksArguments):
            raise
        return Declared.by(build(own))  # the instance knows


def groupwise(nodes: dict[str, Any] | None) -> list[str]:
    """Those of checked rewards that see all images of a prompt at once."""
    return [name for name, node in (nodes or {}).items() if declared(node).groupwise]


def without_weighing(node: Any) -> Any:
    """A reward's own node; one that has a `function` in place of a _target_ is that function."""
    if not isinstance(node, dict):
        return node
    target = {"_target_": FUNCTION} if "function" in node else {}
    return {**target, **{k: v for k, v in node.items() if k not in WEIGHING}}


def weighed(values: dict[str, Any]) -> None:
    """Gives rewards without a weight the weight 1, and without a `normalize` none."""
    for group in ("reward", "eval_rewards"):
        for name, node in (values.get(group) or {}).items():
            if isinstance(node, dict):
                values[group][name] = {
                    **node,
                    **{key: value for key, value in WEIGHED.items() if key not in node},
                }
