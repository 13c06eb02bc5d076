"""libggml in a process of its own: holds copies of one matrix in several types and times products.

Started by kernels.py and models.py with the interpreter of an environment that has
llama-cpp-python or ik-llama-cpp-python; needs NumPy besides. Commands and answers are lines of JSON
on standard input and output; between commands the process sleeps.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peer_ggml import F32, Context, Ggml, GgmlError
from peer_types import TERNARY_TYPES, TYPE_IDS

DISTINCT_ROWS = 64  # the others repeat them: quantizing takes long, and the time does not depend
WORST_NMSE = 2e-3  # of a product; activations are rounded to 8 bits, some types round weights again


class NoOtherLayout(Exception):  # noqa: N818
    """The library would use the plain layout."""


class Matrices:
    """Copies of one matrix in one layout, in one buffer."""

    def __init__(
        self, ggml: Ggml, type_name: str, *, repacked: bool, m: int, k: int, nbytes: int
    ) -> None:
        self.m, self.k = m, k
        self._ggml = ggml
        type_id = TYPE_IDS[ggml.package][type_name]
        weights = _weights(type_name, min(m, DISTINCT_ROWS), k)
        rows = ggml.quantize(type_id, weights)
        exact = type_name in TERNARY_TYPES
        self._distinct = weights if exact else ggml.dequantize(type_id, rows, k)
        plain = np.ascontiguousarray(np.resize(rows, (m, rows.shape[1])))
        self.layout, tensor_type, buffer_type = "plain", type_id, ggml.host_buffer_type
        if repacked and ggml.is_ik:
            tensor_type = self._repacked_type(type_id)
            self.layout = ggml.call("ggml_type_name", tensor_type).decode().upper()
        elif repacked:
            found = ggml.repack_buffer_type(type_id, m, k)
            if found is not None:
                buffer_type = found
                self.layout = ggml.call("ggml_backend_buft_name", buffer_type).decode()
        if repacked and self.layout == "plain":
            raise NoOtherLayout
        self.nbytes = plain.nbytes
        self.copies = max(1, -(-nbytes // plain.nbytes))
        self._context = Context(ggml, tensors=self.copies + 1)
        self._tensors = [self._context.new_tensor(tensor_type, k, m) for _ in range(self.copies)]
        self._context.place(self._tensors, buffer_type)
        self._fill(plain, type_id, tensor_type)
        self._turn = 0

    def time(self, *, n: int, threads: int, calls: int) -> float:
        """Seconds of a product with n vectors, of ``calls`` in one graph after one to warm up."""
        warm_up = Products(self._ggml, self, [self._pick()], n)
        products = Products(self._ggml, self, [self._pick() for _ in range(calls)], n)
        self._ggml.call("ggml_backend_cpu_set_n_threads", self._ggml.backend, threads)
        try:
            warm_up.compute()
            start = time.perf_counter()
            products.compute()
            return (time.perf_counter() - start) / calls
        finally:
            products.free()
            warm_up.free()

    def nmse(self, n: int) -> float:
        """Of the products of the first and the last copy against NumPy on the same weights."""
        worst = 0.0
        for tensor in (self._tensors[0], self._tensors[-1]):
            products = Products(self._ggml, self, [tensor], n)
            products.compute()
            wanted = products.x @ self._distinct.T
            got = products.result()
            products.free()
            wanted = np.resize(wanted.T, (self.m, n)).T
            worst = max(worst, float(np.square(got - wanted).sum() / np.square(wanted).sum()))
        return worst

    def free(self) -> None:
        self._context.free()

    def _pick(self) -> int:
        self._turn = (self._turn + 1) % len(self._tensors)
        return self._tensors[self._turn]

    def _repacked_type(self, type_id: int) -> int:
        context = Context(self._ggml, tensors=1)
        tensor = context.new_tensor(type_id, self.k, self.m)
        found: int = self._ggml.call("iqk_repacked_type", tensor)
        context.free()
        if found == type_id:
            raise NoOtherLayout
        return found

    def _fill(self, plain: NDArray[np.uint8], type_id: int, tensor_type: int) -> None:
        call, first = self._ggml.call, self._tensors[0]
        if tensor_type == type_id:  # llama.cpp changes the layout while it copies
            call("ggml_backend_tensor_set", first, plain.ctypes.data, 0, plain.nbytes)
        else:
            context = Context(self._ggml, tensors=1)
            tensor = context.new_tensor(type_id, self.k, self.m)
            context.place([tensor], self._ggml.host_buffer_type)
            call("ggml_backend_tensor_set", tensor, plain.ctypes.data, 0, plain.nbytes)
            call("iqk_repack_tensor", tensor)
            data = call("ggml_get_data", tensor)
            call("ggml_backend_tensor_set", first, data, 0, call("ggml_nbytes", first))
            context.free()
        source = _bytes_at(call("ggml_get_data", first), call("ggml_nbytes", first))
        for tensor in self._tensors[1:]:
            _bytes_at(call("ggml_get_data", tensor), source.nbytes)[:] = source


class Products:
    """A graph that multiplies matrices in turn with the same number of vectors."""

    def __init__(self, ggml: Ggml, matrices: Matrices, tensors: list[int], n: int) -> None:
        call, m, k = ggml.call, matrices.m, matrices.k
        nodes = len(tensors) + 8
        self._ggml = ggml
        self._context = Context(ggml, tensors=len(tensors) + 8, nodes=nodes)
        # Two inputs in turn: nothing of one product can serve the next.
        inputs = [self._context.new_tensor(F32, k, n) for _ in range(2)]
        outputs = [
            call("ggml_mul_mat", self._context.handle, tensor, inputs[index % 2])
            for index, tensor in enumerate(tensors)
        ]
        self._output, self._shape = outputs[0], (n, m)
        self._context.place([*inputs, outputs[0]], ggml.host_buffer_type)
        for output in outputs[1:]:
            self._context.share(output, call("ggml_get_data", outputs[0]))
        self.x = np.random.default_rng(1).standard_normal((n, k), dtype=np.float32)
        for tensor in inputs:
            call("ggml_backend_tensor_set", tensor, self.x.ctypes.data, 0, self.x.nbytes)
        self._graph = call("ggml_new_graph_custom", self._context.handle, nodes, False)
        for output in outputs:
            call("ggml_build_forward_expand", self._graph, output)

    def compute(self) -> None:
        status = self._ggml.call("ggml_backend_graph_compute", self._ggml.backend, self._graph)
        if status != 0:
            raise GgmlError(f"the product ended with status {status}")

    def result(self) -> NDArray[np.float32]:
        """Of the last product, [n, m]."""
        values = np.empty(self._shape, dtype=np.float32)
        data = self._ggml.call("ggml_get_data", self._output)
        ctypes.memmove(values.ctypes.data, data, values.nbytes)
        return values

    def free(self) -> None:
        self._context.free()


class Server:
    """The commands."""

    def __init__(self) -> None:
        self._ggml = Ggml()
        self._loaded: dict[str, Matrices] = {}
        self.facts = {
            "package": self._ggml.package,
            "version": self._ggml.version,
            "features": self._ggml.features,
        }

    def load(
        self, *, type_name: str, repacked: bool, m: int, k: int, nbytes: int, check_n: list[int]
    ) -> dict[str, Any]:
        """Copies of a matrix; or "missing" with the reason, and whether it was to be expected."""
        type_id = TYPE_IDS[self._ggml.package].get(type_name)
        if type_id is None or not self._ggml.has_type(type_name, type_id):
            return _missing("not in this library")
        if k % self._ggml.call("ggml_blck_size", type_id):
            return _missing(f"k = {k} is no multiple of its blocks")
        try:
            matrices = Matrices(self._ggml, type_name, repacked=repacked, m=m, k=k, nbytes=nbytes)
        except NoOtherLayout:
            return _missing("no other layout")
        except GgmlError as error:
            return _missing(str(error), expected=False)
        key = f"{type_name} {matrices.layout}"
        nmse = max(matrices.nmse(n) for n in check_n)
        if not nmse <= WORST_NMSE:
            matrices.free()
            return _missing(f"its product is wrong (NMSE {nmse:.2g})", expected=False)
        self._loaded[key] = matrices
        return {
            "key": key,
            "layout": matrices.layout,
            "nbytes": matrices.nbytes,
            "copies": matrices.copies,
            "nmse": nmse,
        }

    def time(self, *, key: str, **options: Any) -> dict[str, Any]:
        return {"seconds": self._loaded[key].time(**options)}

    def quantize(self, *, type_name: str, k: int, path: str) -> dict[str, Any]:
        """Random rows of a type, written to a .npy file [rows, bytes of a row]."""
        type_id = TYPE_IDS[self._ggml.package][type_name]
        if not self._ggml.has_type(type_name, type_id):
            return _missing("not in this library")
        if k % self._ggml.call("ggml_blck_size", type_id):
            return _missing(f"k = {k} is no multiple of its blocks")
        np.save(path, self._ggml.quantize(type_id, _weights(type_name, DISTINCT_ROWS, k)))
        return {}

    def unload(self) -> dict[str, Any]:
        for matrices in self._loaded.values():
            matrices.free()
        self._loaded.clear()
        return {}


def _missing(reason: str, *, expected: bool = True) -> dict[str, Any]:
    return {"missing": reason, "expected": expected}


def _weights(type_name: str, rows: int, k: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    if type_name in TERNARY_TYPES:
        return (rng.integers(-1, 2, size=(rows, k)) * 0.02).astype(np.float32)
    weights: NDArray[np.float32] = rng.standard_normal((rows, k), dtype=np.float32)
    weights *= 0.02
    return weights


def _bytes_at(address: int, nbytes: int) -> NDArray[np.uint8]:
    """A view of memory of the library."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def main() -> None:
    """Serve commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints does not mix with the answers
    try:
        server = Server()
    except GgmlError as error:
        sys.exit(f"error: {error}")
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "load": server.load,
        "time": server.time,
        "quantize": server.quantize,
        "unload": server.unload,
    }
    print(json.dumps(server.facts), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(commands[command.pop("command")](**command)), file=answers)


if __name__ == "__main__":
    main()
