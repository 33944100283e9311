"""The bridge from transformers' attention layers to a packed KV cache.

Every transformers decoder calls its attention through a registered function and hands it the keyword
arguments of the model's forward. Ours asks the `packed` argument, which owns the cache, to attend. No model
code is copied or patched.
"""

from typing import Any, Protocol

import torch

from mpinfer.errors import ModelError

IMPLEMENTATION = "mpinfer_packed"


class PackedAttention(Protocol):
    """Attention of one step's tokens, packed without padding, over their sequences' caches."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [tokens, heads, head_dim]
        key: torch.Tensor,  # [tokens, kv_heads, head_dim]
        value: torch.Tensor,  # [tokens, kv_heads, head_dim]
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor: ...  # [tokens, heads, head_dim]


# Arguments that change what attention computes. The rest (position_ids, use_cache, ...) are for other back ends.
_UNSUPPORTED = ("position_bias", "s_aux", "head_mask")


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, tokens, head_dim]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: PackedAttention | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What a layer calls. Raises `ModelError` for attention of a kind that would be computed wrong."""
    kind = type(module).__name__
    if unsupported := [name for name in _UNSUPPORTED if others.get(name) is not None]:
        raise ModelError(f"{kind}: attention with {unsupported[0]!r} is not built; use another model family")
    if packed is None or attention_mask is not None:
        raise ModelError(f"{kind}: keeps back what packed attention needs; use another model family")
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    output = packed.attend(layer, query, key, value, scaling, sliding_window, softcap)
    return output.unsqueeze(0), None  # [1, tokens, heads, head_dim]


def register() -> str:
    """Make the bridge known to transformers; returns its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    return IMPLEMENTATION
