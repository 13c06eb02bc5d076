"""ggml through ctypes: the CPU backend of libggml as llama-cpp-python and ik-llama-cpp-python ship.

Both libraries know the functions used here. Where they differ: llama.cpp keeps its faster layouts
in buffer types of their own, ik_llama.cpp has types for them ("run-time repack").
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKAGES = {"llama_cpp": "llama-cpp-python", "ik_llama_cpp": "ik-llama-cpp-python"}
F32 = 0
BUFFER_ALIGNMENT = 64
FEATURES = ("avx2", "fma", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "neon", "dotprod")

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_type_name": (c_char_p, (c_int,)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buft_get_alloc_size": (c_size_t, (c_void_p, c_void_p)),
    "ggml_backend_buffer_get_base": (c_void_p, (c_void_p,)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
}
_LLAMA_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_get_device": (c_void_p, (c_void_p,)),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
}
_IK_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "iqk_repacked_type": (c_int, (c_void_p,)),
    "iqk_repack_tensor": (None, (c_void_p,)),
}

_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_ToFloat = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _LlamaTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", _ToFloat),
        ("from_float_ref", c_void_p),
    )


class _IkTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", _ToFloat),
        ("from_float", c_void_p),
        ("from_float_ref", c_void_p),
        ("from_float_to_mat", c_void_p),
        ("vec_dot", c_void_p),
        ("vec_dot_type", c_int),
        ("nrows", c_int64),
        ("ncols", c_int64),
        ("gemv", c_void_p),
        ("gemm", c_void_p),
        ("row_meta_size", c_int64),
    )


class GgmlError(RuntimeError):
    """The library is missing or refuses something."""


class Context:
    """Tensors and graphs without their data; the data lie in buffers."""

    def __init__(self, ggml: Ggml, *, tensors: int, nodes: int = 0) -> None:
        size = (tensors + 1) * ggml.call("ggml_tensor_overhead")
        if nodes:
            size += ggml.call("ggml_graph_overhead_custom", nodes, False)
        self._ggml = ggml
        self.handle = ggml.init(_InitParams(size + 1024, None, True))
        self.buffers: list[int] = []

    def new_tensor(self, type_id: int, columns: int, rows: int) -> int:
        """A tensor of ``rows`` rows, without data."""
        tensor: int = self._ggml.call("ggml_new_tensor_2d", self.handle, type_id, columns, rows)
        return tensor

    def place(self, tensors: list[int], buffer_type: int) -> None:
        """Give each tensor its data in one new buffer of ``buffer_type``."""
        call = self._ggml.call
        sizes = [
            _aligned(call("ggml_backend_buft_get_alloc_size", buffer_type, tensor))
            for tensor in tensors
        ]
        buffer = call("ggml_backend_buft_alloc_buffer", buffer_type, sum(sizes) + BUFFER_ALIGNMENT)
        if not buffer:
            raise GgmlError(f"no memory for {sum(sizes)} bytes")
        self.buffers.append(buffer)
        address = _aligned(call("ggml_backend_buffer_get_base", buffer))
        for tensor, size in zip(tensors, sizes, strict=True):
            call("ggml_backend_tensor_alloc", buffer, tensor, address)
            address += size

    def share(self, tensor: int, address: int) -> None:
        """Let the data of ``tensor`` lie at ``address`` in the newest buffer."""
        self._ggml.call("ggml_backend_tensor_alloc", self.buffers[-1], tensor, address)

    def free(self) -> None:
        """Free the tensors and their buffers."""
        for buffer in self.buffers:
            self._ggml.call("ggml_backend_buffer_free", buffer)
        self._ggml.call("ggml_free", self.handle)


class Ggml:
    """The library of the installed package, with one CPU backend."""

    def __init__(self) -> None:
        packages = [name for name in PACKAGES if find_spec(name) is not None]
        if len(packages) != 1:
            wanted = " or ".join(PACKAGES.values())
            raise GgmlError(f"{sys.executable}: expected {wanted} (one of them) to be installed")
        self.package = packages[0]
        self.version = version(PACKAGES[self.package])
        self._library = ctypes.CDLL(str(_library_path(self.package)))
        self._functions: dict[str, Callable[..., Any]] = {}
        self._declare(_SIGNATURES)
        self._declare(_IK_SIGNATURES if self.is_ik else _LLAMA_SIGNATURES)
        self.init = self._library.ggml_init
        self.init.restype, self.init.argtypes = c_void_p, (_InitParams,)
        self._log = _Log(lambda *_: None)
        if set_log := getattr(self._library, "ggml_log_set", None):
            set_log(self._log, None)
        Context(self, tensors=1).free()  # the first one fills the library's tables
        self.backend = self.call("ggml_backend_cpu_init")
        self.host_buffer_type: int = self.call("ggml_backend_cpu_buffer_type")

    @property
    def is_ik(self) -> bool:
        return self.package == "ik_llama_cpp"

    @property
    def features(self) -> list[str]:
        """Instruction sets that the library was built for."""
        return [name for name in FEATURES if self._has(name)]

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a function of the library."""
        return self._functions[name](*arguments)

    def has_type(self, name: str, type_id: int) -> bool:
        """Whether the library has the type under this number."""
        found = self.call("ggml_type_name", type_id)
        return found is not None and found.decode().upper() == name.upper()

    def repack_buffer_type(self, type_id: int, m: int, k: int) -> int | None:
        """llama.cpp's buffer type for products with such a matrix, None if it has none."""
        for buffer_type in self._extra_buffer_types():
            context = Context(self, tensors=3)
            w, x = context.new_tensor(type_id, k, m), context.new_tensor(F32, k, 1)
            context.place([w], buffer_type)
            context.place([x], self.host_buffer_type)
            product = self.call("ggml_mul_mat", context.handle, w, x)
            usable = self.call("ggml_backend_supports_op", self.backend, product)
            context.free()
            if usable:
                return buffer_type
        return None

    def quantize(self, type_id: int, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rows of ``weights`` [rows, k] in the type's plain layout, [rows, bytes of a row]."""
        rows, k = weights.shape
        out = np.empty((rows, self.call("ggml_row_size", type_id, k)), dtype=np.uint8)
        weights = np.ascontiguousarray(weights)
        importance = np.ones(k, dtype=np.float32)  # some types insist on it
        written = self.call(
            "ggml_quantize_chunk",
            type_id,
            weights.ctypes.data,
            out.ctypes.data,
            0,
            rows,
            k,
            importance.ctypes.data,
        )
        if written != out.nbytes:
            raise GgmlError(f"quantized to {written} bytes where {out.nbytes} were expected")
        return out

    def dequantize(self, type_id: int, rows: NDArray[np.uint8], k: int) -> NDArray[np.float32]:
        """Weights [rows, k] of rows in the plain layout."""
        if self.is_ik:
            by_value = self._library.ggml_internal_get_type_traits
            by_value.restype, by_value.argtypes = _IkTraits, (c_int,)
            to_float = by_value(type_id).to_float
        else:
            pointer = self._library.ggml_get_type_traits
            pointer.restype, pointer.argtypes = POINTER(_LlamaTraits), (c_int,)
            to_float = pointer(type_id).contents.to_float
        out = np.empty((len(rows), k), dtype=np.float32)
        for source, target in zip(rows, out, strict=True):
            to_float(source.ctypes.data, target.ctypes.data, k)
        return out

    def _declare(self, signatures: dict[str, tuple[Any, tuple[Any, ...]]]) -> None:
        for name, (result, arguments) in signatures.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function

    def _has(self, feature: str) -> bool:
        function = getattr(self._library, f"ggml_cpu_has_{feature}", None)
        return function is not None and bool(function())

    def _extra_buffer_types(self) -> list[int]:
        if self.is_ik:
            return []
        name = b"ggml_backend_dev_get_extra_bufts"
        registry = self.call("ggml_backend_cpu_reg")
        address = self.call("ggml_backend_reg_get_proc_address", registry, name)
        if not address:
            return []
        get = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)
        found = get(self.call("ggml_backend_get_device", self.backend))
        types: list[int] = []
        while found and found[len(types)]:
            types.append(found[len(types)])
        return types


def _aligned(value: int) -> int:
    return -(-value // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


def _library_path(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    for folder in spec.submodule_search_locations or []:
        for name in ("libggml.so", "libggml.dylib", "ggml.dll"):
            path = Path(folder) / "lib" / name
            if path.exists():
                return path
    raise GgmlError(f"{package} has no libggml in its folder lib")
