"""Full fine-tuning with every weight, gradient and optimiser state split over the processes (torch's
fully_shard, FSDP2).

A state dictionary is whole, on the CPU of process 0 (empty on the others), so checkpoints and saved models
are those of one process, and a run may go on with another number of them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from alignlab.distributed.ranks import world

# torch.distributed's own parts are slow to import, and most runs do without.


def shard(module: nn.Module, device: torch.device) -> None:
    """Splits a denoiser in place, block by block: one block's weights are whole at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    for child in module.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(
        module, mesh=mesh, reshard_after_forward=True
    )  # the root too: its parameters stay those that the optimiser has


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(module, options=_options())
    return state


def load_whole_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """From a state dictionary that every process has."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(module, dict(state), options=_options())


def unsharded(module: Any) -> nn.Module:
    """A copy of a sharded diffusers model in one piece, on process 0; on the others an untrained one."""
    state = whole_state(module)
    copy: nn.Module = type(module).from_config(module.config)
    if state:
        copy.load_state_dict(state)
    return copy


class ShardedOptimizer:
    """The state of an optimiser of sharded weights, whole, under the weights' names."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        if not self.optimizer.state:  # torch would make one, by a step that counts
            return {}
        return get_optimizer_state_dict(self.module, self.optimizer, options=_options())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From one that every process has; also from a plain optimiser's, which numbers the weights."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        if not state or not state["state"]:
            return
        if 0 in state["state"]:
            names = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
            groups = [
                {**group, "params": [names[k] for k in group["params"]]} for group in state["param_groups"]
            ]
            state = {
                "state": {names[k]: moments for k, moments in state["state"].items()},
                "param_groups": groups,
            }
        set_optimizer_state_dict(self.module, self.optimizer, state, options=_options())
