"""Where modules have moved that a stored configuration, a user's own yaml or a user's own Python may name."""

from typing import Any

MOVED = {
    "alignlab.policy.LoRA": "alignlab.models.lora.LoRA",
    "alignlab.adamw8bit": "alignlab.training.adamw8bit",
    "alignlab.candidates": "alignlab.runs.candidates",
    "alignlab.collected": "alignlab.training.unfinished_epoch",
    "alignlab.conditioning": "alignlab.engine.conditioning",
    "alignlab.dials": "alignlab.weights.dials",
    "alignlab.drift": "alignlab.engine.distance_to_base",
    "alignlab.failures": "alignlab.training.failures",
    "alignlab.figures": "alignlab.compare.charts",
    "alignlab.forward": "alignlab.engine.forward_process",
    "alignlab.images": "alignlab.compare.image_table",
    "alignlab.judge": "alignlab.models.emoji_judge",
    "alignlab.lab": "alignlab.training.setup",
    "alignlab.lora": "alignlab.models.lora",
    "alignlab.measure": "alignlab.training.evaluation",
    "alignlab.noise": "alignlab.engine.noise",
    "alignlab.nodes": "alignlab.config.build",
    "alignlab.outcomes": "alignlab.compare.outcomes",
    "alignlab.policy": "alignlab.engine.policy",
    "alignlab.probes": "alignlab.paper.probes",
    "alignlab.ranks": "alignlab.distributed.ranks",
    "alignlab.rollout": "alignlab.engine.rollout",
    "alignlab.samplers": "alignlab.engine.samplers",
    "alignlab.schedule": "alignlab.training.lr_schedule",
    "alignlab.scoring": "alignlab.training.scoring",
    "alignlab.sealed": "alignlab.files.checksums",
    "alignlab.sharding": "alignlab.distributed.sharding",
    "alignlab.start": "alignlab.weights.init_from",
    "alignlab.tables": "alignlab.compare.tables",
    "alignlab.tuned": "alignlab.weights.load",
}
"""Modules and classes by their old names; the first that fits counts."""


def with_moved_targets(node: Any) -> Any:
    """A configuration whose `_target_`s are the present names; what is not a table or a list is returned as
    it is."""
    if isinstance(node, dict):
        return {
            key: present(value) if key == "_target_" else with_moved_targets(value)
            for key, value in node.items()
        }
    return [with_moved_targets(item) for item in node] if isinstance(node, list) else node


def present(target: Any) -> Any:
    """The present name of what `target` names; what is no name of old is returned as it is."""
    for old, new in MOVED.items():
        if isinstance(target, str) and (target == old or target.startswith(f"{old}.")):
            return new + target.removeprefix(old)
    return target
