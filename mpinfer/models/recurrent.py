"""Recurrent modules, layer by layer, so that a cut can fall between layers.

A stacked `nn.LSTM` is one operation to torch, with all of its layers inside; to its tracer it is every step of the
sequence on its own. A layer is an operation of ours, whose shape the tracer is told.
"""

from typing import Any

import torch
from torch import nn

_KINDS: dict[str, Any] = {"lstm": torch.lstm, "gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}


@torch.library.custom_op("mpinfer::recurrent_layer", mutates_args=())
def recurrent_layer(
    kind: str,
    x: torch.Tensor,
    state: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[torch.Tensor]:
    """One layer, in both directions if it has two: the sequence of its states, then its last hidden state [directions,
    batch, size], of an LSTM also the last cell. `state`: the same before the first step."""
    first = tuple(state) if kind == "lstm" else state[0]
    settings = (biases, 1, 0.0, False, bidirectional, batch_first)
    # What an operation gives may not be what it got.
    return [result.clone() if result is x else result for result in _KINDS[kind](x, first, weights, *settings)]


@recurrent_layer.register_fake
def _(
    kind: str,
    x: torch.Tensor,
    state: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[torch.Tensor]:
    directions, _, size = state[0].shape
    return [x.new_empty(x.shape[0], x.shape[1], directions * size), *(part.new_empty(part.shape) for part in state)]


def unstack_recurrent(model: nn.Module) -> nn.Module:
    """The model with every LSTM, GRU and RNN replaced by the same one as a chain of layers; names of weights stay."""
    if isinstance(model, nn.RNNBase):
        return LayeredRecurrent(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.RNNBase):
            model.set_submodule(name, LayeredRecurrent(module))
    return model


class LayeredRecurrent(nn.Module):
    """An LSTM, GRU or RNN that calls torch once a layer. Batched input only; in inference, so without dropout."""

    def __init__(self, stack: nn.RNNBase) -> None:
        super().__init__()
        self._kind: str = stack.nonlinearity if isinstance(stack, nn.RNN) else type(stack).__name__.lower()
        self._layers, self._bidirectional, self._biases = stack.num_layers, stack.bidirectional, stack.bias
        self._batch_first, self._is_lstm = stack.batch_first, isinstance(stack, nn.LSTM)
        self._hidden_sizes = (stack.proj_size or stack.hidden_size, stack.hidden_size)  # of the output, of the cell
        self._names = stack._all_weights
        for name, parameter in stack.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, input: torch.Tensor, hx: Any = None) -> tuple[torch.Tensor, Any]:
        """`input`: [batch, steps, features], or [steps, batch, features] unless `batch_first`."""
        if not isinstance(input, torch.Tensor) or input.dim() != 3:
            raise ValueError("recurrent modules take batches here: [batch, steps, features], not packed")
        directions = 2 if self._bidirectional else 1
        batch = input.shape[0 if self._batch_first else 1]
        sizes = self._hidden_sizes if self._is_lstm else self._hidden_sizes[:1]
        given = (hx if self._is_lstm else [hx]) if hx is not None else None
        finals = []
        x = input
        for layer in range(self._layers):
            own = slice(layer * directions, (layer + 1) * directions)
            if given is None:
                state = [input.new_zeros(directions, batch, size) for size in sizes]
            else:
                state = [part[own].contiguous() for part in given]
            weights = [getattr(self, name) for direction in self._names[own] for name in direction]
            settings = (self._biases, self._bidirectional, self._batch_first)
            x, *final = recurrent_layer(self._kind, x, state, weights, *settings)
            finals.append(final)
        joined = [torch.cat(parts) for parts in zip(*finals, strict=True)]
        return x, tuple(joined) if self._is_lstm else joined[0]
