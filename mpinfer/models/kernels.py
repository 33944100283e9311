"""Kernels in C (kernels.c) for what torch does on a CPU in many small operations: norms, gates, rotary embeddings,
attention over a KV cache; and for linear layers, in float32 and int8.

They are compiled for the CPU they run on by the machine's own C compiler, once, when they are first used; the library
stays in the user's cache directory. Where that cannot be done torch computes the same, slower.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import mmap
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from mpinfer.directories import cache_directory
from mpinfer.spec import AUTO

_SOURCE = Path(__file__).with_name("kernels.c")
_INCLUDED = Path(__file__).with_name("tiles.h")
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"),
)
_COMPILING_TIMEOUT_S = 120
_CHUNK_BYTES, _LINE_BYTES = 32 << 20, 64
_CHUNK_ROWS = 4096  # of a weight that are looked at together, to keep temporaries small
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CannotCompile(Exception):
    """Why there are no kernels."""


class Callback:
    """A Python function for C, which nothing may be raised through: C gets 1 where it has failed, else 0."""

    TYPE = ctypes.CFUNCTYPE(ctypes.c_int)

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._failure: BaseException | None = None
        self.pointer = self.TYPE(self._call)

    def __call__(self) -> None:
        self._function()

    def check(self) -> None:
        """Raise what it has raised in its last call, if anything."""
        if self._failure is not None:
            raise self._failure

    def _call(self) -> int:
        self._failure = None
        try:
            self._function()
        except BaseException as failure:
            self._failure = failure
        return int(self._failure is not None)


_SIGNATURES = {
    "rms_norm": [*[_POINTER] * 3, *[_INT] * 2, _FLOAT],
    "gated": [*[_POINTER] * 2, *[_INT] * 2, ctypes.c_int],
    "rotate_and_store": [*[_POINTER] * 5, _FLOAT, *[_POINTER] * 4, *[_INT] * 5],
    "attend_tokens": [_POINTER, _INT, *[_POINTER] * 5, *[_INT] * 6, _FLOAT],
    "attend_chunk": [_POINTER, _INT, *[_POINTER] * 3, *[_INT] * 7, _FLOAT],
    "linear": [*[_POINTER] * 5, *[_INT] * 4],
    "linear_int8": [_POINTER, _INT, *[_POINTER] * 5, *[_INT] * 3],
    "decoder_layers": [_POINTER, _INT, *[_POINTER] * 5, Callback.TYPE],
    "layer_attention": [_POINTER] * 5,
    "layer_mlp": [_POINTER, _INT, *[_POINTER] * 3],
    "layer_end": [_POINTER, _INT, *[_POINTER] * 2],
    "sum_shards": [_POINTER, _POINTER, _INT],
}


def find_kernels(choice: str, device: str, dtype: torch.dtype) -> "tuple[Kernels | None, str]":
    """The kernels, if they are wanted (`model.kernels`) and fit; why there are none though they would."""
    if choice != AUTO or device != "cpu" or dtype != torch.float32:
        return None, ""
    try:
        return _load(), ""
    except CannotCompile as problem:
        return None, str(problem)


class Norm(NamedTuple):
    """A root mean square norm, as kernels take it."""

    weight: torch.Tensor
    epsilon: float


class PackedWeights(ctypes.Structure):
    """Where a linear layer's weights are (`struct linear` in C). Whoever makes it keeps the tensors."""

    _fields_ = [
        *(("panels", _POINTER), ("bias", _POINTER)),
        *((name, _INT) for name in ("width", "outputs", "parts", "block")),
        ("scales", _POINTER),
    ]


class Kernels:
    """Functions of float32 tensors on the CPU, whose last dimensions are contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = signature, None
        for name in ("panel_columns", "layer_scratch", "linear_scratch", "int8_group", "int8_scratch"):
            getattr(library, name).restype = _INT
        library.linear_scratch.argtypes = library.int8_scratch.argtypes = [_INT]
        library.decoder_layers.restype = library.sum_shards.restype = ctypes.c_int
        self.library, self._panel = library, library.panel_columns()
        self.int8_group = library.int8_group()  # inputs that share a scale; 0 where a CPU has no instructions

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """`weight * x / sqrt(mean(x * x) + epsilon)` of the last dimension; of the shape of x."""
        x = x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        self.library.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, epsilon)
        return y

    def gated(self, gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
        """`activation(gate) * up`, [..., width], of both side by side, [..., 2 * width]. The activation is SiLU, or
        GELU as tanh approximates it."""
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], width)
        self.library.gated(gate_up.data_ptr(), y.data_ptr(), y.numel() // width, width, gelu)
        return y

    def rotate_and_store(
        self,
        projected: torch.Tensor,  # [tokens, (heads + 2 * kv_heads) * head_dim]
        cosines: torch.Tensor,  # [tokens, head_dim]
        sines: torch.Tensor,
        norms: tuple[Norm, Norm] | None,  # of each head of queries and keys, with the same epsilon
        keys: torch.Tensor,  # [slots, kv_heads, capacity, head_dim]
        values: torch.Tensor,
        places: torch.Tensor,  # [tokens]: slot * kv_heads * capacity + position
    ) -> torch.Tensor:
        """Apply rotary embeddings, after norms, and store keys and values. Queries [tokens, heads, head_dim]."""
        (tokens, width), (_, kv_heads, capacity, head_dim) = projected.shape, keys.shape
        heads = width // head_dim - 2 * kv_heads
        query = projected.new_empty(tokens, heads, head_dim)
        query_norm, key_norm = norms or (None, None)
        projected, cosines, sines = projected.contiguous(), cosines.contiguous(), sines.contiguous()
        self.library.rotate_and_store(
            *(x.data_ptr() for x in (projected, cosines, sines)),
            *(None if norm is None else norm.weight.data_ptr() for norm in (query_norm, key_norm)),
            0.0 if query_norm is None else query_norm.epsilon,
            *(x.data_ptr() for x in (query, keys, values, places)),
            *(capacity, tokens, heads, kv_heads, head_dim),
        )
        return query

    def attend_tokens(
        self,
        query: torch.Tensor,  # [tokens, heads, head_dim], of which only the first dimension may be strided
        keys: torch.Tensor,  # [slots, kv_heads, capacity, head_dim]
        values: torch.Tensor,
        places: torch.Tensor,  # [tokens]: slot * kv_heads * capacity + position
        positions: torch.Tensor,  # [tokens]
        output: torch.Tensor,  # [tokens, heads, head_dim]
        scaling: float,
        window: int | None,
    ) -> None:
        """Attention of every token to itself and those before it in its slot, at most `window` of them all."""
        (tokens, heads, head_dim), (_, kv_heads, capacity, _) = query.shape, keys.shape
        self.library.attend_tokens(
            *(query.data_ptr(), query.stride(0)),
            *(x.data_ptr() for x in (keys, values, places, positions, output)),
            *(tokens, heads, kv_heads, head_dim, capacity, window or 0),
            scaling,
        )

    def attend_chunk(
        self,
        query: torch.Tensor,  # [tokens, heads, head_dim], of which only the first dimension may be strided
        keys: torch.Tensor,  # [kv_heads, capacity, head_dim]
        values: torch.Tensor,
        start: int,  # position of the first token
        output: torch.Tensor,  # [tokens, heads, head_dim]
        scaling: float,
        window: int | None,
    ) -> None:
        """The same for tokens that follow each other in one slot."""
        (tokens, heads, head_dim), (kv_heads, capacity, _) = query.shape, keys.shape
        self.library.attend_chunk(
            *(query.data_ptr(), query.stride(0)),
            *(x.data_ptr() for x in (keys, values, output)),
            *(start, tokens, heads, kv_heads, head_dim, capacity, window or 0),
            scaling,
        )

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Weights [outputs, inputs] as panels of columns [panels, inputs, columns], and the bias [panels * columns],
        both padded with zeros; and of how many parts of eight bits the weights are: 1 where they were bfloat16."""
        packed = _arena.copy(self.in_panels(weight).transpose(1, 2))
        takes_parts = self.library.linear_scratch(weight.shape[1])  # else none are needed
        bits = weight.contiguous().view(torch.int32).split(_CHUNK_ROWS)
        parts = 1 + sum(any(bool((rows & low).any()) for rows in bits) for low in (0xFFFF, 0xFF)) if takes_parts else 3
        return packed, self.in_panels(weight.new_zeros(len(weight)) if bias is None else bias).flatten(), parts

    def pack_int8(self, codes: torch.Tensor) -> torch.Tensor:
        """int8 codes [outputs, inputs] as panels [panels, inputs / 4, columns, 4], padded with zeros; plus 128."""
        return _arena.copy(self.in_panels(codes).unflatten(2, (-1, 4)).transpose(1, 2).view(torch.uint8) ^ 0x80)

    def in_panels(self, rows: torch.Tensor) -> torch.Tensor:
        """As many rows a panel as a kernel computes together, padded with zeros: [panels, rows of a panel, ...]."""
        if missing := -len(rows) % self._panel:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        return rows.unflatten(0, (-1, self._panel))

    def linear(
        self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, parts: int, outputs: int
    ) -> torch.Tensor:
        """The product of x [..., inputs] and what `pack` has made of a layer; [..., outputs]."""
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        y, scratch = x.new_empty(*x.shape[:-1], outputs), x.new_empty(rows * self.library.linear_scratch(width))
        tensors = (x, packed, bias, y, scratch)
        self.library.linear(*(tensor.data_ptr() for tensor in tensors), rows, width, outputs, parts)
        return y

    def linear_int8(
        self,
        x: torch.Tensor,  # [rows, inputs]
        block: int,
        packed: torch.Tensor,  # of `pack_int8`
        scales: torch.Tensor,  # [panels * groups of inputs * columns]
        bias: torch.Tensor,  # [panels * columns]
        outputs: int,
    ) -> torch.Tensor:
        """The product, [rows, outputs], of weights and x as integers, of which `int8_group` in a row share a scale.
        Both are multiplied with Hadamard matrices of `block` rows before, the weights by the caller. Needs
        `int8_group`."""
        x = x.contiguous()
        rows, width = x.shape
        y, scratch = x.new_empty(rows, outputs), x.new_empty(rows * self.library.int8_scratch(width))
        weights = (tensor.data_ptr() for tensor in (packed, scales, bias, y, scratch))
        self.library.linear_int8(x.data_ptr(), block, *weights, rows, width, outputs)
        return y


class _Arena:
    """Memory for weights, in large pages where the system gives them: they are read from end to end in every step, and
    a CPU looks up one small page after the other. A chunk is given back with the last tensor in it."""

    def __init__(self) -> None:
        self._chunk, self._used = mmap.mmap(-1, mmap.PAGESIZE), mmap.PAGESIZE

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy."""
        start = -(-self._used // _LINE_BYTES) * _LINE_BYTES
        if start + tensor.nbytes > len(self._chunk):
            self._chunk, start = mmap.mmap(-1, max(_CHUNK_BYTES, tensor.nbytes), flags=_PRIVATE), 0
            with contextlib.suppress(OSError):  # it gives none
                self._chunk.madvise(mmap.MADV_HUGEPAGE)
        self._used = start + tensor.nbytes
        own = torch.frombuffer(self._chunk, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return own.view(tensor.shape).copy_(tensor)


_arena = _Arena()


@functools.cache
def _load() -> Kernels:
    """Raises `CannotCompile`."""
    compiler = os.environ.get("CC", "cc")
    facts = repr((_SOURCE.read_text(), _INCLUDED.read_text(), _FLAGS, compiler, platform.machine(), _cpu()))
    directory = cache_directory()
    if not directory.is_absolute():
        raise CannotCompile("this user has no home directory to keep them in; set XDG_CACHE_HOME")
    library = directory / f"kernels-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.so"
    try:
        if not library.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(library.with_suffix(".lock"), "w", encoding="utf-8") as lock:
                _wait_for(lock.fileno())
                if not library.exists():  # else another rank has compiled it meanwhile
                    _compile(compiler, library)
        return Kernels(ctypes.CDLL(str(library)))
    except OSError as error:
        raise CannotCompile(f"{library} cannot be made or loaded ({error.strerror or error}); remove it") from None


def _wait_for(lock: int) -> None:
    """One rank at a time, where the file system has locks; else several do the same work."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        return


def _compile(compiler: str, library: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix="kernels-", suffix=".tmp", dir=library.parent)
    os.close(descriptor)
    try:
        command = [*shlex.split(compiler), *_FLAGS, str(_SOURCE), "-o", temporary, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILING_TIMEOUT_S)
        if done.returncode:
            said = (done.stderr.strip() or "no words").splitlines()[0]
            raise CannotCompile(f"{compiler} failed: {said}; name another compiler in CC")
        os.replace(temporary, library)
    except FileNotFoundError:
        raise CannotCompile(f"there is no C compiler {compiler!r}; install one, or name it in CC") from None
    except subprocess.TimeoutExpired:
        raise CannotCompile(
            f"{compiler} took more than {_COMPILING_TIMEOUT_S} s; name another compiler in CC"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def _cpu() -> str:
    """What distinguishes CPUs for a compiler: a home directory may be shared by several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in names}))
