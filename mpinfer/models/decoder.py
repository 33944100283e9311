"""Decoder language models from transformers, as blocks that can be cut between ranks.

The model class of transformers is built once on the meta device. A rank keeps the modules of its own
blocks, replaces the rest by place-holders without weights, and calls the model's own forward: embedding
scale, rotary embeddings, per-layer quirks and logit soft caps stay transformers' business. Where to cut
comes from the model's own pipeline plan.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpinfer.errors import ModelError
from mpinfer.models import attention
from mpinfer.models.checkpoint import Checkpoint
from mpinfer.models.fake import fake_sources
from mpinfer.models.fused import FusedLinear, FusedMember, concatenated, find_group
from mpinfer.models.kernels import Callback, Kernels, find_kernels
from mpinfer.models.layer import CompiledLayer, ShardSums
from mpinfer.models.linear import LayerTuner, packed_bytes
from mpinfer.models.meta import parameters_on_meta
from mpinfer.models.quick import quicken
from mpinfer.models.sources import Slice, Source, computed_buffers, find_sources
from mpinfer.models.tensor_parallel import (
    LayerSplit,
    NotShardable,
    RowParallel,
    Shard,
    VocabularyParallelEmbedding,
    cut_embedding,
    cut_layer,
    plan_layer,
    row_parallel,
)
from mpinfer.plan.block import Block, ModelSummary, vocabulary_share
from mpinfer.spec import AUTO, FAKE

# Pipeline plans of families for which transformers has none: modules of the base model before its layers, the
# layers, modules after them, in the order in which its forward calls them.
_PLANS = {
    "gpt2": (["wte", "wpe"], "h", ["ln_f"]),
    "opt": (
        ["decoder.embed_tokens", "decoder.project_in", "decoder.embed_positions"],
        "decoder.layers",
        ["decoder.final_layer_norm", "decoder.project_out"],
    ),
}
# Rotary scalings that look at the longest sequence of a batch: in a packed batch one sequence would change another.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


class DecoderSkeleton:
    """A decoder language model without weights, and where it can be cut.

    Blocks are `embed`, one per layer, and `head` (final norm and output embedding). Raises `ModelError` when
    the directory is damaged or holds a model that cannot be run this way.
    """

    def __init__(
        self, directory: Path, dtype: str, quantize: str = "none", weights: str = AUTO, kernels: str = AUTO
    ) -> None:
        self.directory = directory
        self._quantize, self._kernels = quantize, kernels
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.checkpoint = Checkpoint.of(directory, {}) if weights == FAKE else Checkpoint(directory)
        self.config = _load_config(directory)
        self.model = _build_without_weights(self.config, self.dtype)
        self.base = self.model.base_model
        self.final_size: int = self.model.get_output_embeddings().in_features  # of final hidden states
        self._before, self._layers_name, self._after = _pipeline_plan(self.base, self.config)
        names = [name for name, _ in _named_tensors(self.model)]
        self._sources: dict[str, Source] = (
            fake_sources(self.model, names) if weights == FAKE else find_sources(self.model, names, self.checkpoint)
        )

    def summary(self, with_head: bool) -> ModelSummary:
        """Blocks with their weights and costs, for the planner; without the output embedding when no task needs it."""
        embedding, final = self._weights_of(self._before, self.base), self._weights_of(self._after, self.base)
        layers = []
        for index, layer in enumerate(self.layers):
            flops = 2.0 * sum(p.numel() for p in layer.parameters() if p.dim() > 1)
            weights, kv_bytes = self._weights(layer), self._kv_bytes_per_token()
            layers.append(Block(f"layer.{index}", weights, flops, 0.0, kv_bytes, reductions=2))
        first = Block("embed", embedding, 0.0, 0.0, reductions=1)
        most_shards, problem = self._most_shards()
        summary = functools.partial(ModelSummary, most_shards=most_shards, shards_problem=problem)
        if not with_head:
            return summary((first, *layers, Block("head", final, 0.0, 0.0)))
        module = self.model.get_output_embeddings()
        head, flops = self._weights(module), 2.0 * module.weight.numel()
        whole = Block("head", tuple(dict(final + head).items()), 0.0, flops)

        def with_share(block: Block, share: range) -> Block:
            parts = ((f"{n}[{share.start}:{share.stop}]", size // self.vocabulary * len(share)) for n, size in head)
            return Block(block.name, (*block.weights, *parts), 0.0, flops / self.vocabulary * len(share))

        shares = [vocabulary_share(self.vocabulary, stage, stages=2) for stage in range(2)]
        ends = with_share(first, shares[0]), with_share(Block("head", final, 0.0, 0.0), shares[1])
        return summary((first, *layers, whole), ends)

    def _most_shards(self) -> tuple[int, str]:
        """How many ranks can hold a stage together, and why not more."""
        try:
            plans = self._layer_plans(range(len(self.layers)))
        except NotShardable as problem:
            return 1, str(problem)
        most = min(min(plan.kv_heads, plan.columns) for plan in plans)
        return most, f"it has {most} KV heads" if most > 1 else "it has a single KV head"

    def _layer_plans(self, layers: range) -> list[LayerSplit]:
        """How layers are divided over shards; raises `NotShardable`."""
        return [plan_layer(self.layers[index], self._layers_name, self.config) for index in layers]

    def _kv_bytes_per_token(self) -> int:
        """Of one layer's keys and values."""
        config = self.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 2 * kv_heads * head_dim * self.dtype.itemsize

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def vocabulary(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def max_length(self) -> int:
        """Tokens of a sequence, prompt and new."""
        return self.config.get_text_config().max_position_embeddings

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.get_submodule(self._layers_name)

    def load_part(
        self,
        start: int,
        stop: int,
        device: str,
        rows: int,
        on_layer: Callable[[], None],
        vocabulary: range,
        shard: Shard | None = None,
    ) -> "DecoderPart":
        """Keep blocks [start, stop), fill them from the checkpoint and return them ready to run.

        The skeleton is used up: what other ranks hold is dropped from it. `rows` is the typical number of
        tokens in a step, for which linear layers are tuned. `on_layer` is called before each layer (the
        transport makes progress there). `vocabulary` is the part's share of the output embedding, whatever its
        blocks: head is only the final norm here. `shard`: the part is held by several ranks together. Raises
        `ModelError`.
        """
        head = len(self.layers) + 1
        first, last = start == 0, stop == head + 1
        own_layers = [layer for block, layer in enumerate(self.layers, start=1) if start <= block < stop]
        entry = None if first else _Entry(own_layers[0] if own_layers else self.base.get_submodule(self._after[0]))
        body = self.base.get_submodule(self._layers_name.rpartition(".")[0])
        self._drop_others(start, stop)
        joints = {} if shard is None else self._keep_shard(start, stop, shard)
        self._keep_vocabulary(vocabulary)
        kernels, problem = find_kernels(self._kernels, device, self.dtype)
        tuner = LayerTuner(rows, self._quantize, kernels)
        read_bytes = self._fill(device, tuner)
        compiled: list[CompiledLayer | None] = [None] * len(own_layers)
        if kernels is not None:
            sampling = own_layers[-1] if last and own_layers else None
            replaced, compiled = quicken(self.model, kernels, own_layers, last=sampling)
            tuner.used.update(replaced)
        sums = None if shard is None or shard.memory is None else ShardSums(shard.memory)
        progress = Callback(on_layer)
        for layer, whole in zip(own_layers, compiled, strict=True):
            if whole is None:
                layer.register_forward_pre_hook(lambda *_: on_layer())
                continue
            whole.progress, whole.sums = progress, sums
            whole.reduce = None if shard is None else shard.reduce
        for path, join in joints.items():  # around what the tuner made of them
            self.model.set_submodule(path, join(self.model.get_submodule(path)))
        self.model.to(device)  # the buffers that are computed, not loaded
        shortcut = _Shortcut(body)
        return DecoderPart(
            self.model,
            entry,
            shortcut,
            vocabulary,
            self.final_size,
            first,
            last,
            read_bytes,
            kernels,
            compiled,
            shard,
            tuner.used,
            problem,
        )

    def _fill(self, device: str, tuner: LayerTuner) -> int:
        """Load and tune one module after the other, so that no two are in memory in both forms; bytes read."""
        uses = Counter(self._sources[name].key for name, _ in _named_tensors(self.model))
        shared: dict[Hashable, torch.Tensor] = {}  # by what is stored: tied tensors of a part share memory
        read_bytes = 0
        for path in [path for path, _ in self.model.named_modules()]:  # names only: a list would keep what is replaced
            module = self.model.get_submodule(path)
            for leaf, tensor in list(_named_tensors(module, recurse=False)):
                source = self._sources[f"{path}.{leaf}".lstrip(".")]
                key = source.key
                filled = shared.get(key)
                if filled is None:
                    filled = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    read_bytes += source.load(self.checkpoint, filled)
                    if isinstance(tensor, nn.Parameter):
                        filled = nn.Parameter(filled, requires_grad=False)
                if uses[key] > 1:
                    shared[key] = filled
                (module._parameters if isinstance(tensor, nn.Parameter) else module._buffers)[leaf] = filled
            self._tune(path, tuner)
            if self.model.get_submodule(path) is not module:  # what is replaced is not kept for a tied module
                for leaf, _ in _named_tensors(module, recurse=False):
                    shared.pop(self._sources[f"{path}.{leaf}".lstrip(".")].key, None)
        return read_bytes

    def _tune(self, path: str, tuner: LayerTuner) -> None:
        """Replace a module that is loaded by what computes it faster; with its group, once all of that is loaded."""
        parent, _, name = path.rpartition(".")
        names = find_group(self.model.get_submodule(parent), name)
        if not names:
            module = self.model.get_submodule(path)
            tuned = tuner.tune(module)
            if tuned is not module:
                self.model.set_submodule(path, tuned)
            return
        layers = [self.model.get_submodule(f"{parent}.{other}") for other in names]
        if any(layer.weight.is_meta for layer in layers):
            return
        widths = [layer.out_features for layer in layers]
        group = FusedLinear(tuner.tune(concatenated(layers)), layers[0].in_features, widths)
        for member, other in enumerate(names):
            self.model.set_submodule(f"{parent}.{other}", FusedMember(group, member))

    def _drop_others(self, start: int, stop: int) -> None:
        """Put place-holders without weights where the modules of other ranks stand."""
        head = len(self.layers) + 1
        if start > 0:
            for name in self._before:
                self.base.set_submodule(name, _NoEmbedding(self.dtype))
        for index in range(len(self.layers)):
            if not start <= index + 1 < stop:
                self.layers[index] = _Bypass()
        if stop <= head:
            for name in self._after:
                self.base.set_submodule(name, _Bypass())

    def _keep_vocabulary(self, vocabulary: range) -> None:
        """Leave only these rows of the output embedding."""
        whole = self.model.get_output_embeddings()
        if len(vocabulary) == whole.out_features:
            return
        if not vocabulary:
            self.model.set_output_embeddings(nn.Identity())
            return
        path = next(name for name, module in self.model.named_modules() if module is whole)
        share = nn.Linear(whole.in_features, len(vocabulary), whole.bias is not None, "meta", self.dtype)
        self.model.set_output_embeddings(share)
        for leaf, tensor in whole.named_parameters():
            self._keep_slice(f"{path}.{leaf}", Slice(0, (vocabulary,), tuple(tensor.shape)))

    def _keep_shard(self, start: int, stop: int, shard: Shard) -> dict[str, Callable[[nn.Module], nn.Module]]:
        """Leave only a shard's part of the layers and the input embedding; returns what to put around modules, by
        path, once they are filled."""
        paths = {module: path for path, module in self.model.named_modules()}
        joints: dict[str, Callable[[nn.Module], nn.Module]] = {}
        own = range(max(start, 1) - 1, min(stop, len(self.layers) + 1) - 1)
        try:
            plans = self._layer_plans(own)
        except NotShardable as problem:
            raise ModelError(f"{self.directory}: cannot be sharded ({problem}); use parallel.shards=1") from None
        for layer, plan in zip((self.layers[index] for index in own), plans, strict=True):
            for name, part in cut_layer(layer, plan, shard).items():
                self._keep_slice(f"{paths[layer]}.{name}", part)
            for name in row_parallel(plan):
                joints[f"{paths[layer]}.{name}"] = functools.partial(RowParallel, reduce=shard.reduce)
        if start == 0:
            embedding = self.model.get_input_embeddings()
            part = cut_embedding(embedding, shard)
            self._keep_slice(f"{paths[embedding]}.weight", part)
            (entries,) = part.ranges
            joints[paths[embedding]] = functools.partial(VocabularyParallelEmbedding, own=entries, reduce=shard.reduce)
        return joints

    def _keep_slice(self, name: str, part: Slice) -> None:
        self._sources[name] = replace(self._sources[name], part=part)

    def _weights(self, module: nn.Module) -> tuple[tuple[str, int], ...]:
        """(name, bytes held) of a module's tensors; tied ones have one name, whichever module they are seen from."""
        own = {id(t) for _, t in _named_tensors(module)}
        small: set[int] = set()  # of these a byte is held for each number
        if self._quantize == "int8":
            small = {id(m.weight) for m in self.model.modules() if type(m) in (nn.Linear, nn.Embedding)}
        tensors = ((n, t) for n, t in _named_tensors(self.model) if id(t) in own)
        sizes = {self._sources[n].names[0]: t.numel() if id(t) in small else t.nbytes for n, t in tensors}
        return tuple(sizes.items())

    def _weights_of(self, names: list[str], parent: nn.Module) -> tuple[tuple[str, int], ...]:
        return tuple(pair for name in names for pair in self._weights(parent.get_submodule(name)))


class DecoderPart(nn.Module):
    """Consecutive blocks of a decoder, with weights."""

    def __init__(
        self,
        model: Any,
        entry: "_Entry | None",
        shortcut: "_Shortcut",
        vocabulary: range,
        final_size: int,
        first: bool,
        last: bool,
        read_bytes: int,
        kernels: Kernels | None,
        compiled: Sequence[CompiledLayer | None],
        shard: Shard | None,
        used: Mapping[str, int],
        problem: str,
    ) -> None:
        super().__init__()
        self.model = model
        self._entry, self._shortcut = entry, shortcut
        self.vocabulary = vocabulary  # tokens of which this part computes logits
        self.final_size = final_size  # of the hidden states that logits are computed from
        self.first, self.last = first, last
        self.read_bytes = read_bytes
        self.kernels, self.kernels_problem = kernels, problem
        self._layers, self._shard = compiled, shard
        self._used = dict(used)

    def agree(self) -> None:
        """Compute no layer whole that another shard of the stage does not: it would sum other rows, in another way. All
        shards call it before their first step."""
        if self._shard is not None:
            shards = self._shard.reduce(torch.tensor([float(layer is not None) for layer in self._layers]))
            for layer, number in zip(self._layers, shards.tolist(), strict=True):
                if layer is not None:
                    layer.whole = number == self._shard.count

    @property
    def compiled(self) -> list[CompiledLayer]:
        """Layers that are computed whole."""
        return [layer for layer in self._layers if layer is not None and layer.whole]

    @property
    def used(self) -> dict[str, int]:
        """Modules by the kernel they use."""
        return {**self._used, **({"layer": len(self.compiled)} if self.compiled else {})}

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that this part holds; a tied tensor that is also held packed counts twice."""
        plain = {id(t): t.nbytes for _, t in _named_tensors(self.model)}
        return sum(plain.values()) + packed_bytes(self.model)

    @torch.inference_mode()
    def forward(
        self,
        x: torch.Tensor,  # first part: token ids [tokens]; others: activations [tokens, hidden]
        positions: torch.Tensor,  # [tokens]
        packed: attention.PackedAttention,
    ) -> torch.Tensor:
        """Activations [tokens, hidden]; of the last part final hidden states, ready for the output embedding, of all
        tokens or of samples only (`packed` tells which)."""
        arguments: dict[str, Any] = {"position_ids": positions[None], "use_cache": False, "packed": packed}
        if self._entry is None:
            arguments["input_ids"] = x[None]
        else:
            arguments["inputs_embeds"] = self._entry.activation = x[None]
        return self.model.base_model(**arguments).last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [samples, len(vocabulary)] of final hidden states [samples, hidden], computed here or elsewhere.

        By the model's own forward, which may scale or cap them, past all that comes before its output embedding.
        """
        hidden = hidden.to(next(self.model.parameters()))[None]
        with self._shortcut.to(hidden):
            return self.model(inputs_embeds=hidden, use_cache=False).logits[0]


class _Entry:
    """Hands the received activation to the first module of a part: whatever the model's forward computed on
    the way there (an embedding scale, say) was done by the rank that sent it."""

    activation: torch.Tensor

    def __init__(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._replace_input, with_kwargs=True)

    def _replace_input(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (self.activation, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.activation}


class _Shortcut:
    """Makes a module give what it is told to, instead of computing."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @contextlib.contextmanager
    def to(self, output: torch.Tensor) -> Iterator[None]:
        self._module.forward = lambda *_, **__: _Output(output)
        try:
            yield
        finally:
            del self._module.forward


class _Output:
    """The output of a base model, of which only one thing is known."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None  # past keys and values, attentions, router logits: nobody asked for them


class _Bypass(nn.Module):
    """Stands where another rank's module stands; passes the hidden states on."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class _NoEmbedding(nn.Module):
    """An embedding that another rank holds: adds nothing to the received activation."""

    zero: torch.Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(1, dtype=dtype), persistent=False)

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.zero


def _load_config(directory: Path) -> Any:
    try:
        from transformers import AutoConfig
        from transformers.utils import logging
    except ImportError:
        raise ModelError(
            "task generate: needs transformers, which is not installed; pip install 'mpinfer[hf]'"
        ) from None

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"{directory / 'config.json'}: transformers refuses it ({first}); install a newer "
            f"transformers or fetch the model again"
        ) from None
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds: set[Any] = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    if refused := sorted(kinds & set(_BATCH_DEPENDENT_ROPE)):
        raise ModelError(
            f"{directory / 'config.json'}: rope_type {refused[0]!r} depends on the longest sequence of a "
            f"batch and cannot be packed; use a model with default, linear, yarn or llama3 rotary embeddings"
        )
    return config


def _build_without_weights(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention.register(), trust_remote_code=False
            )
    except (ValueError, KeyError, ImportError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model_type={getattr(config, 'model_type', None)!r}: transformers has no causal language model for it "
            f"({first[:120]}); give a decoder language model for task generate"
        ) from None
    except RuntimeError as error:  # of torch: sizes that no memory has
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"config.json: its model cannot be built ({first[:120]}); fetch the model again") from None
    return model.eval()


def _pipeline_plan(base: nn.Module, config: Any) -> tuple[list[str], str, list[str]]:
    """Names of the base model's modules before its layers, of its layers, and of those after them."""
    modules = dict(base.named_modules())
    plan = list(config.get_text_config().base_model_pp_plan or ())
    layers = [name for name in plan if isinstance(modules.get(name), nn.ModuleList)]
    if len(layers) == 1:
        cut = plan.index(layers[0])
        before, own_layers, after = plan[:cut], layers[0], plan[cut + 1 :]
    elif config.model_type in _PLANS:
        before, own_layers, after = _PLANS[config.model_type]
    else:
        raise ModelError(
            f"model_type={config.model_type!r}: transformers has no pipeline plan for it, so it cannot be cut safely; "
            f"use a family that has one (Llama, Mistral, Qwen2, Qwen3, Gemma, Phi, OLMo2, ...), GPT-2 or OPT"
        )
    return [name for name in before if name in modules], own_layers, [name for name in after if name in modules]


def _named_tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a module that a checkpoint stores, tied ones under each of their names."""
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    computed = set(computed_buffers(module))
    yield from ((n, b) for n, b in module.named_buffers(recurse=recurse, remove_duplicate=False) if n not in computed)
