"""Modules of decoder layers whose forward is replaced by compiled kernels.

The small operations of norms, gated MLPs and attention are most of what a step does besides multiplying. What a module
computes is not told from its family's name: it is found out. A module that has the parts of a known kind is run beside
the replacement, and keeps its own forward where the two differ.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mpinfer.models.fused import FusedLinear, FusedMember
from mpinfer.models.kernels import Kernels

Forward = Callable[..., Any]
Norms = dict[nn.Module, tuple[torch.Tensor, float]]  # weights and epsilon, as the kernel takes them
_ROWS = 5  # of the inputs that are tried
_TOLERANCE = 2e-5  # of the largest output: sums are rounded in another order


@torch.inference_mode()
def quicken(model: nn.Module, kernels: Kernels) -> Counter[str]:
    """Replace the forward of every module that a kernel computes; how many, by kind."""
    replaced: Counter[str] = Counter()
    norms: Norms = {}
    modules = list(model.modules())
    for module in modules:
        if (norm := _norm(module, kernels)) is not None:
            norms[module] = norm
            module.forward = _norm_forward(*norm, kernels)
            replaced["norm"] += 1
    for module in modules:
        found = {"gated MLP": _gated(module, kernels), "attention": _attention(module, kernels, norms)}
        for kind, forward in found.items():
            if forward is not None:
                module.forward = forward
                replaced[kind] += 1
    return replaced


def _norm(module: nn.Module, kernels: Kernels) -> tuple[torch.Tensor, float] | None:
    """Weights and epsilon of a root mean square norm; some families store what is to be added to 1."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor) or epsilon is None:
        return None
    x = _inputs(len(weight))
    expected = module.forward(x)
    tried = ((candidate, epsilon) for candidate in (weight.detach(), 1 + weight.detach()))
    return next((norm for norm in tried if _agree(kernels.rms_norm(x, *norm), expected)), None)


def _norm_forward(weight: torch.Tensor, epsilon: float, kernels: Kernels) -> Forward:
    return lambda x: kernels.rms_norm(x, weight, epsilon)


def _gated(mlp: Any, kernels: Kernels) -> Forward | None:
    """`down(activation(gate(x)) * up(x))`, where gate and up are computed as one."""
    group, activation = _group(mlp, "gate_proj", "up_proj"), getattr(mlp, "act_fn", None)
    if group is None or activation is None or not hasattr(mlp, "down_proj"):
        return None
    gates = torch.linspace(-4, 4, 513)[None]
    both = torch.cat([gates, torch.ones_like(gates)], 1)
    gelu = next((gelu for gelu in (False, True) if _agree(kernels.gated(both, gelu), activation(gates))), None)
    if gelu is None:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(kernels.gated(group.whole(x), gelu))

    x = _inputs(group.in_features)
    with _without(mlp, "down_proj"):
        return forward if _agree(forward(x), mlp.forward(x)) else None


def _attention(attention: Any, kernels: Kernels, norms: Norms) -> Forward | None:
    """Projections as one, norms if there are any, rotary embeddings of whole heads, and attention over a cache."""
    group = _group(attention, "q_proj", "k_proj", "v_proj")
    size = getattr(attention, "head_dim", 0)
    if group is None or not hasattr(attention, "o_proj") or not size or any(width % size for width in group.widths):
        return None
    pair = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    known = [norms[norm] for norm in pair if norm in norms]
    if (known and len(known) < len(pair)) or (not known and any(pair)):
        return None
    both = (known[0][0], known[1][0], known[0][1]) if known else None
    own, kv_heads = attention.forward, group.widths[1] // size
    angles = _inputs(size)
    arguments: dict[str, Any] = {
        "hidden_states": _inputs(group.in_features)[None],
        "position_embeddings": (angles.cos()[None], angles.sin()[None]),
        "attention_mask": None,
    }
    seen = _Witness(kernels)
    with _without(attention, "o_proj"):
        try:
            expected, _ = own(**arguments, packed=seen)
        except (TypeError, RuntimeError):  # takes other arguments, or rotates a part of each head
            return None
        if not seen.calls:
            return None
        ((layer, *_, scaling, window, softcap),) = seen.calls

        def forward(*unnamed: Any, attention_mask: Any = None, **named: Any) -> tuple[torch.Tensor, None]:
            cosines, sines = (x[0] for x in named["position_embeddings"])
            if unnamed or attention_mask is not None or cosines.shape[1] != size:  # not what has been tried
                return own(*unnamed, attention_mask=attention_mask, **named)
            projected = group.whole(named["hidden_states"])[0]
            attended = named["packed"].attend_projected(
                layer, projected, cosines, sines, both, kv_heads, size, scaling, window, softcap
            )
            return attention.o_proj(attended.flatten(1)[None]), None

        found, _ = forward(**arguments, packed=seen)
    (_, *wanted, _, _, _), (_, *got, _, _, _) = seen.calls
    agrees = _agree(found, expected) and all(map(_agree, got, wanted))
    return forward if agrees else None


@contextlib.contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """The module as it is but for its last product, which may round to int8: two of nearly the same inputs differ."""
    last = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, last)


class _Witness:
    """Attention that only notes what it is asked."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.calls: list[tuple[Any, ...]] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        self.calls.append((layer, query, key, value, scaling, sliding_window, softcap))
        return query.contiguous()

    def attend_projected(
        self,
        layer: int,
        projected: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        norms: Any,
        kv_heads: int,
        head_dim: int,
        *others: Any,
    ) -> torch.Tensor:
        keys, values = (projected.new_empty(1, kv_heads, len(projected), head_dim) for _ in range(2))
        places = torch.arange(len(projected))
        query = self._kernels.rotate_and_store(projected, cosines, sines, norms, keys, values, places)
        return self.attend(layer, query, keys[0].transpose(0, 1), values[0].transpose(0, 1), *others)


def _group(module: nn.Module, *names: str) -> FusedLinear | None:
    """What computes these layers of a module as one."""
    members = [getattr(module, name, None) for name in names]
    first = members[0]
    if not isinstance(first, FusedMember) or any(
        getattr(member, "group", None) is not first.group for member in members
    ):
        return None
    return first.group


def _inputs(width: int) -> torch.Tensor:
    """Some rows, [_ROWS, width], the same on every rank."""
    return torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(0))


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
