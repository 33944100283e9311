"""Modules of decoder layers, and whole layers, whose forward is replaced by compiled kernels.

The small operations of norms, gated MLPs and attention are most of what a step does besides multiplying. What a module
computes is not told from its family's name: it is found out. A module that has the parts of a known kind is run beside
the replacement, and keeps its own forward where the two differ.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mpinfer.models.fused import FusedLinear, FusedMember
from mpinfer.models.kernels import Kernels
from mpinfer.models.layer import Attention, CompiledLayer, LayerCall, LayerStep, Norm, Parts, compute_layers
from mpinfer.models.linear import CompiledLinear
from mpinfer.models.quantize import CompiledInt8Linear

Forward = Callable[..., Any]
_ROWS = 5  # of the inputs that are tried
_TOLERANCE = 2e-5  # of the largest output: sums are rounded in another order
# A layer's norms, as families name those before and after attention, before and after the MLP.
_PLACES = ("before_attention", "after_attention", "before_mlp", "after_mlp")
_NORM_NAMES = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


class Quickened(NamedTuple):
    """What has been replaced."""

    modules: Counter[str]  # how many, by kind
    layers: list[CompiledLayer | None]  # None where a layer keeps its own forward


@torch.inference_mode()
def quicken(
    model: nn.Module, kernels: Kernels, layers: Sequence[nn.Module] = (), last: nn.Module | None = None
) -> Quickened:
    """Replace the forward of every module that a kernel computes, of `layers` as a whole. Of what `last` computes only
    samples are used."""
    norms: dict[nn.Module, Norm] = {}
    gelus: dict[nn.Module, bool] = {}  # gated MLPs: whether by GELU
    attentions: dict[nn.Module, Attention] = {}
    compiled: list[CompiledLayer | None] = []
    modules = list(model.modules())
    for module in modules:
        if (norm := _norm(module, kernels)) is not None:
            norms[module], module.forward = norm, _norm_forward(norm, kernels)
    for module in modules:
        if (gated := _gated(module, kernels)) is not None:
            gelus[module], module.forward = gated
        if (attention := _attention(module, kernels, norms)) is not None:
            attentions[module], module.forward = attention
    for module in layers:
        parts = _parts(module, norms, gelus, attentions)
        layer = None if parts is None else CompiledLayer(kernels, parts, last=module is last)
        if layer is not None and not _same_layer(module, layer, kernels):
            layer = None
        if layer is not None:
            module.forward = _layer_forward(layer, module.forward)
        compiled.append(layer)
    found = {"norm": len(norms), "gated MLP": len(gelus), "attention": len(attentions)}
    return Quickened(+Counter(found), compiled)


def _norm(module: nn.Module, kernels: Kernels) -> Norm | None:
    """A root mean square norm; some families store what is to be added to 1."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor) or epsilon is None:
        return None
    x = _inputs(len(weight))
    expected = module.forward(x)
    tried = (Norm(candidate, epsilon) for candidate in (weight.detach(), 1 + weight.detach()))
    return next((norm for norm in tried if _agree(kernels.rms_norm(x, *norm), expected)), None)


def _norm_forward(norm: Norm, kernels: Kernels) -> Forward:
    return lambda x: kernels.rms_norm(x, *norm)


def _gated(mlp: Any, kernels: Kernels) -> tuple[bool, Forward] | None:
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
        return (gelu, forward) if _agree(forward(x), mlp.forward(x)) else None


def _attention(attention: Any, kernels: Kernels, norms: dict[nn.Module, Norm]) -> tuple[Attention, Forward] | None:
    """Projections as one, norms if there are any, rotary embeddings of whole heads, and attention over a cache."""
    group = _group(attention, "q_proj", "k_proj", "v_proj")
    size = getattr(attention, "head_dim", 0)
    if group is None or not hasattr(attention, "o_proj") or not size or any(width % size for width in group.widths):
        return None
    pair = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    known = [norms[norm] for norm in pair if norm in norms]
    if (known and len(known) < len(pair)) or (not known and any(pair)):
        return None
    own, kv_heads = attention.forward, group.widths[1] // size
    arguments = {"hidden_states": _inputs(group.in_features)[None], **_surroundings(size)}
    seen = _Witness(kernels)
    with _without(attention, "o_proj"):
        try:
            expected, _ = own(**arguments, packed=seen)
        except (TypeError, RuntimeError):  # takes other arguments, or rotates a part of each head
            return None
        if not seen.calls:
            return None
        ((layer, *_, scaling, window, softcap),) = seen.calls
        norms_of_both = (known[0], known[1]) if known else None
        facts = Attention(layer, kv_heads, size, scaling, window, softcap, norms_of_both)

        def forward(*unnamed: Any, attention_mask: Any = None, **named: Any) -> tuple[torch.Tensor, None]:
            cosines, sines = (x[0] for x in named["position_embeddings"])
            if unnamed or attention_mask is not None or cosines.shape[1] != size:  # not what has been tried
                return own(*unnamed, attention_mask=attention_mask, **named)
            projected = group.whole(named["hidden_states"])[0]
            attended = named["packed"].attend_projected(facts, projected, cosines, sines)
            return attention.o_proj(attended.flatten(1)[None]), None

        found, _ = forward(**arguments, packed=seen)
    (_, *wanted, _, _, _), (_, *got, _, _, _) = seen.calls
    agrees = _agree(found, expected) and all(map(_agree, got, wanted))
    return (facts, forward) if agrees else None


def _parts(
    layer: Any,
    norms: dict[nn.Module, Norm],
    gelus: dict[nn.Module, bool],
    attentions: dict[nn.Module, Attention],
) -> Parts | None:
    """What a layer seems to be made of, if all of it is compiled."""
    attention, mlp = (getattr(layer, name, None) for name in ("self_attn", "mlp"))
    if attention not in attentions or mlp not in gelus or attentions[attention].softcap is not None:
        return None
    products = attention.q_proj.group.whole, attention.o_proj, mlp.gate_proj.group.whole, mlp.down_proj
    if not all(isinstance(product, CompiledLinear | CompiledInt8Linear) for product in products):
        return None
    own = {name: norms[module] for name, module in layer.named_children() if module in norms}
    for names in _NORM_NAMES:
        if own.keys() == {name for name in names if name}:
            around: dict[str, Any] = {place: own[name] for place, name in zip(_PLACES, names, strict=True) if name}
            return Parts(attentions[attention], *products, gelus[mlp], **around)
    return None


def _layer_forward(layer: CompiledLayer, own: Forward) -> Forward:
    def forward(hidden_states: torch.Tensor, *unnamed: Any, attention_mask: Any = None, **named: Any) -> torch.Tensor:
        cosines, sines = (x[0] for x in named["position_embeddings"])
        usual = not unnamed and attention_mask is None and cosines.shape[1] == layer.attention.head_dim
        if not usual or not layer.whole:
            layer.progress()
            hidden_states = named["packed"].catch_up(hidden_states[0])[None]
            return own(hidden_states, *unnamed, attention_mask=attention_mask, **named)
        return named["packed"].compute(layer, hidden_states[0], cosines, sines)[None]

    return forward


def _same_layer(module: nn.Module, layer: CompiledLayer, kernels: Kernels) -> bool:
    """Whether both compute the same of a few tokens, alone of their sequences."""
    x = _inputs(layer.products[0].in_features)[None]
    arguments = {"packed": _Alone(kernels, layer.attention), **_surroundings(layer.attention.head_dim)}
    try:
        expected = module.forward(x, **arguments)
    except (TypeError, RuntimeError):  # takes other arguments
        return False
    return isinstance(expected, torch.Tensor) and _agree(
        _layer_forward(layer, module.forward)(x, **arguments), expected
    )


def _surroundings(head_dim: int) -> dict[str, Any]:
    """What a model's forward hands to its layers along with hidden states."""
    angles = _inputs(head_dim)
    return {"position_embeddings": (angles.cos()[None], angles.sin()[None]), "attention_mask": None}


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
        self, facts: Attention, projected: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        keys, values = (projected.new_empty(1, facts.kv_heads, len(projected), facts.head_dim) for _ in range(2))
        places = torch.arange(len(projected))
        query = self._kernels.rotate_and_store(projected, cosines, sines, facts.norms, keys, values, places)
        key, value = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        return self.attend(facts.layer, query, key, value, facts.scaling, facts.window, facts.softcap)


class _Alone:
    """Attention of a sequence's tokens one by one, over a cache with room for them."""

    def __init__(self, kernels: Kernels, facts: Attention) -> None:
        self._kernels = kernels
        self._cache = torch.zeros(2, 1, facts.kv_heads, _ROWS, facts.head_dim)
        self._places = torch.arange(_ROWS)

    def attend_projected(
        self, facts: Attention, projected: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self._cache
        query = self._kernels.rotate_and_store(projected, cosines, sines, facts.norms, keys, values, self._places)
        output = torch.empty_like(query)
        self._kernels.attend_tokens(
            query, keys, values, self._places, self._places, output, facts.scaling, facts.window
        )
        return output

    def compute(
        self, layer: CompiledLayer, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        step = LayerStep(self._places, self._places, _ROWS, torch.empty(0, 4, dtype=torch.int64), None)
        keys, values = self._cache
        return compute_layers([LayerCall(layer, step, keys, values, cosines.contiguous(), sines.contiguous())], x)


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
