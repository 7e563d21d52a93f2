"""A device that computes nothing: tensors on `meta` have a shape and a size, the host is real.

    Ledger     counts the bytes of every living tensor on the device, and the floating-point operations
    Kernels    fused attention and torch.autocast, which the meta device lacks

What the host asks of the device has no answer, so it is given a plausible one: a copy is noise in [0, 1), a
single number is 0, nothing is nonzero. So control flow goes the usual way, rewards on the host (JPEG, say)
run on noise, and random rewards select as many samples as real ones would.

Not seen: scratch memory inside one kernel (convolution workspaces), rounding and fragmentation of a caching
allocator.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
aten = torch.ops.aten


class _Form(tuple[Any, ...]):
    """Shape, stride and dtype of a tensor; a leaf of its own."""


class Ledger(TorchDispatchMode):
    """The books of the device while this mode is on.

    `live` are the bytes of all living tensors, `peaks` the largest that `live` was in each phase, `flops` the
    multiplications and additions of each phase (matrix products and convolutions only).
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.phase = 0, ""
        self.peaks: dict[str, int] = defaultdict(int)
        self.flops: dict[str, int] = defaultdict(int)
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._known: dict[Any, Any] = {}
        self._noise = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        if "meta" in devices:
            if func in ANSWERS:
                return ANSWERS[func](*args, **kwargs)
            if func is aten._to_copy.default and torch.device(kwargs.get("device") or META).type == "cpu":
                return self.noise(args[0], kwargs.get("dtype"))
            if func is aten.copy_.default and args[0].device.type == "cpu":
                return args[0].copy_(self.noise(args[1]))
            if (
                "cpu" in devices and func is not aten.copy_.default
            ):  # the tables of samplers, which stay on the host
                args, kwargs = tree_map_only(Tensor, lambda t: t.to(META) if t.dim() else t, (args, kwargs))
            out, flops = self._run(func, args, kwargs, leaves)
            self.flops[self.phase] += flops
        else:
            out = func(*args, **kwargs)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self.enter(leaf)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, leaves: list[Any]) -> tuple[Any, int]:
        """The result on the device, and the operations. Both are remembered: to ask for a shape is slow, and
        a network repeats itself."""
        key: Any = (
            func,
            *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in leaves),
        )
        known = self._known.get(key)
        if known is not None:
            form, flops = known
            return tree_map(
                lambda x: torch.empty_strided(*x[:2], dtype=x[2], device=META) if isinstance(x, _Form) else x,
                form,
            ), flops
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count is not None else 0
        given, made = (
            {x.untyped_storage()._cdata for x in some if isinstance(x, Tensor)}
            for some in (leaves, tree_leaves(out))
        )
        if made and not given & made and not func._schema.is_mutable:  # no view, nothing in place
            self._known[key] = (
                tree_map_only(Tensor, lambda x: _Form((x.shape, x.stride(), x.dtype)), out),
                flops,
            )
        return out, flops

    def enter(self, tensor: Tensor) -> None:
        """Takes a tensor into the books, whose storage may be there already."""
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name in self._alive:
            return

        def leaves(_: object) -> None:
            del self._alive[name]
            self.live -= size

        self._alive[name] = weakref.ref(storage, leaves)
        self.live += size
        self.touch()

    def touch(self, more: int = 0) -> None:
        """Notes that `more` bytes live beside those in the books at this moment."""
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live + more)

    def noise(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What a copy to the host gives."""
        values = torch.rand(tensor.shape, generator=self._noise)
        return values.to(dtype or tensor.dtype)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def within(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a phase of its own."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return function(*args, **kwargs)

        return run

    def remembered(self, function: Callable[..., Tensor], state: Callable[[], Any]) -> Callable[..., Tensor]:
        """A function of tensors that is run once for each shape of its arguments and each `state()`: later
        calls only enter its peak, its operations and its result. Where a graph is wanted it is run every
        time."""
        known: dict[Any, tuple[int, int, Tensor]] = {}

        def run(*args: Any) -> Tensor:
            if torch.is_grad_enabled():
                return function(*args)
            key = (*((t.shape, t.dtype) for t in tree_leaves(args)), state())
            if key in known:
                more, flops, like = known[key]
                self.touch(more)
                self.flops[self.phase] += flops
                return torch.empty_like(like)
            live, peak, flops = self.live, self.peaks[self.phase], self.flops[self.phase]
            self.peaks[self.phase] = 0
            out = function(*args)
            with torch._C._DisableTorchDispatch():
                like = torch.empty_like(out)
            known[key] = self.peaks[self.phase] - live, self.flops[self.phase] - flops, like
            self.peaks[self.phase] = max(self.peaks[self.phase], peak)
            return out

        return run


def _number(tensor: Tensor) -> bool | int | float:
    return torch.zeros((), dtype=tensor.dtype).item()


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _number,
    aten.nonzero.default: lambda tensor: torch.empty(0, tensor.dim(), dtype=torch.long, device=META),
    aten.equal.default: lambda *_: False,
}


class Kernels(TorchFunctionMode):
    """What the meta device lacks while this mode is on: fused attention, and autocast with the casts of the
    device that is meant.

    Args:
        device: its type. A CPU keeps norms and softmax in 16 bits under autocast, others take them to
            float32.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.low: torch.dtype | None = None
        self.full = frozenset[str]() if device == "cpu" else FULL_PRECISION

    @contextmanager
    def autocast(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> Iterator[None]:
        """Stands for torch.autocast. Weights are cast for each call, as without a cache."""
        before, self.low = self.low, (dtype or torch.bfloat16) if enabled else None
        try:
            yield
        finally:
            self.low = before

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function under this mode, wherever it is called: a checkpoint calls it again in a backward
        pass, where torch has put the mode aside."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.low is not None and (name in LOW_PRECISION or name in self.full):
            to = self.low if name in LOW_PRECISION else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(to) if t.dtype in CAST else t, (args, kwargs))
        if name == "scaled_dot_product_attention" and args[0].device == META and args[0].dim() == 4:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that keeps no [tokens, tokens] matrix; all fused kernels keep its output and one number a
    token."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
    kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
    return kernel(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


CAST = (torch.float32, torch.float16, torch.bfloat16)
LOW_PRECISION = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d prelu addmm addmv addr matmul "
    "__matmul__ __rmatmul__ einsum mm mv linear addbmm baddbmm bmm chain_matmul "
    "scaled_dot_product_attention multi_head_attention_forward".split()
)
FULL_PRECISION = frozenset(
    "group_norm layer_norm rms_norm softmax log_softmax pow __pow__ __rpow__ rsqrt exp log norm normalize "
    "cosine_similarity cumsum prod sum "
    "softplus mse_loss cdist logsumexp".split()
)
"""The casts of torch.autocast (the "Autocast Op Reference" of its documentation), of what networks are made
of."""
