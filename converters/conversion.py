"""From an open checkpoint to a .lut file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.calibration import CalibrationText, read_text, token_texts
from tmac_py.converters.checkpoint import HEADS, Checkpoint, TensorSource
from tmac_py.converters.llama_forward import Layer, LlamaForward, flat
from tmac_py.converters.model_layers import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    as_floats,
    embed,
    find,
    input_sizes,
    layers_of,
    naming_tensor,
)
from tmac_py.converters.options import QuantOptions
from tmac_py.converters.planning import plan_settings
from tmac_py.converters.quantizers import Inputs, Settings, fold_scales
from tmac_py.converters.quantizers.awq import Seen
from tmac_py.lutwriter import LutWriter
from tmac_py.packing import pack
from tmac_py.parallel import single_threaded_blas
from tmac_py.quant import MatrixLike, QuantTensor
from tmac_py.spec import LinearSpec

Progress = Callable[[int, int, str], None]
"""Called with weights done, weights in all, and the name of the tensor that comes next."""


class Writer(Protocol):
    """Where converted tensors go: a LutWriter, or what compares them."""

    def add_linear(
        self,
        name: str,
        packed: NDArray[np.uint8],
        spec: LinearSpec,
        order: NDArray[np.int32] | None = None,
    ) -> None:
        """Take one packed matrix, uint8 ``[packed_nbytes]``, and its order ``[k]``."""

    def add_float(self, name: str, values: NDArray[np.float32]) -> None:
        """Take one float32 vector."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def convert_checkpoint(
    checkpoint: Checkpoint,
    out: str | Path,
    options: QuantOptions,
    *,
    progress: Progress | None = None,
    open_writer: Callable[..., Writer] = LutWriter,
) -> None:
    """Quantise and pack every tensor of an open checkpoint; see `tmac_py.converters.convert`.

    They go to what ``open_writer`` makes, called as LutWriter is.
    """
    text = read_text(options.calibration) if needs_calibration(checkpoint, options) else None
    texts = None
    if text is not None:
        texts = token_texts(
            text, options.calibration_tokens, checkpoint.tokenizer, checkpoint.config
        )
    with single_threaded_blas():
        weighed = texts is not None and options.target_bpw is not None
        mean_squares = input_sizes(checkpoint, texts) if weighed and texts is not None else {}
        plan = plan_settings(checkpoint, options, mean_squares)
        source = dict(checkpoint.source)
        if plan:
            source["quantised"] = _description(options, text)
        with open_writer(
            out,
            config=checkpoint.config,
            tokenizer=checkpoint.tokenizer,
            source=source,
            ordered=_ordered(checkpoint, plan),
        ) as writer:
            conversion = _Conversion(checkpoint, options, plan, writer, progress)
            calibrated = options.method.calibrated and not plan.keys() <= set(HEADS)
            if calibrated and texts is not None:
                conversion.write_calibrated(texts)
            else:
                conversion.write(checkpoint.tensors)
            conversion.finish()


def needs_calibration(checkpoint: Checkpoint, options: QuantOptions) -> bool:
    """Whether activations are looked at: by the method, or by ``target_bpw`` if a text is given."""
    if options.method.calibrated:
        return any(tensor.dense and tensor.name not in HEADS for tensor in checkpoint.tensors)
    return options.target_bpw is not None and options.calibration is not None


def _ordered(checkpoint: Checkpoint, plan: dict[str, Settings]) -> list[str]:
    """The matrices that may get an order."""
    names = [tensor.name for tensor in checkpoint.tensors if tensor.ordered]
    return names + [name for name, s in plan.items() if s.act_order and name != EMBEDDING]


def _description(options: QuantOptions, text: CalibrationText | None) -> str:
    """The options that count, for the file."""
    given = {name: value for name, value in asdict(options).items() if value is not None}
    method = given.pop("quant")
    patterns = given.pop("bits_for")
    tokens = given.pop("calibration_tokens")
    given.pop("calibration", None)
    if not options.act_order:
        del given["act_order"]
    words = [f"{name}={value}" for name, value in given.items()]
    words += [f"bits_for={pattern}={bits}" for pattern, bits in patterns]
    if text is not None:
        words.append(f"calibration_tokens={tokens} calibration={text.description}")
    return " ".join([method, *words])


class _Conversion:
    """One file under way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: QuantOptions,
        plan: dict[str, Settings],
        writer: Writer,
        progress: Progress | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._plan = plan
        self._writer = writer
        self._progress = progress
        self._done = 0

    def write(self, tensors: Sequence[TensorSource]) -> None:
        """Write tensors that need no activations; nothing of them stays in memory."""
        for tensor in tensors:
            self._start(tensor)
            with naming_tensor(tensor.name):
                self._add(tensor, self._load(tensor))

    def write_calibrated(self, texts: NDArray[np.int32]) -> None:
        """Layer by layer: each sees the outputs of those before it as they were quantised."""
        config = self._checkpoint.config
        forward = LlamaForward(config, texts.shape[1])
        hidden = self._write_embedding(texts)
        layers = layers_of(self._checkpoint)
        for tensors in layers:
            layer = self._load_layer(tensors)
            if self._options.method.folds:
                self._fold(forward, tensors, layer, hidden)
            for name, tensor in tensors.items():
                if layer[name].ndim == 1:
                    self._start(tensor)
                    self._add(tensor, layer[name])

            def visit(
                stage: tuple[str, ...],
                x: NDArray[np.float32],
                tensors: dict[str, TensorSource] = tensors,
                layer: Layer = layer,
            ) -> None:
                inputs = Inputs(x)
                for name in stage:
                    if tensors[name].dense:
                        self._start(tensors[name])
                        with naming_tensor(tensors[name].name):
                            q = self._quantize(tensors[name], layer[name], inputs)
                        self._add(tensors[name], q)
                        layer[name] = q.dequantize()

            forward.run_layer(layer, hidden, visit)
        inside = {tensor.name for tensors in layers for tensor in tensors.values()}
        for tensor in self._checkpoint.tensors:
            if tensor.name == LM_HEAD and tensor.dense:
                self._write_lm_head(tensor, forward, hidden)
            elif tensor.name not in inside and tensor.name != EMBEDDING:
                self.write([tensor])

    def _load(self, tensor: TensorSource) -> QuantTensor | NDArray[np.float32]:
        loaded = tensor.load()
        if isinstance(loaded, QuantTensor):
            return loaded
        if not tensor.is_matrix:
            return as_floats(loaded)
        return self._quantize(tensor, loaded, None)

    def finish(self) -> None:
        """Tell that all is done."""
        if self._progress is not None:
            self._progress(self._done, self._checkpoint.n_elements, "")

    def _write_embedding(self, texts: NDArray[np.int32]) -> NDArray[np.float32]:
        """Write the embedding; the hidden states that it gives."""
        tensor = find(self._checkpoint, EMBEDDING)
        self._start(tensor)
        with naming_tensor(EMBEDDING):
            loaded = tensor.load()
            if not isinstance(loaded, QuantTensor):
                loaded = self._quantize(tensor, loaded, None)
            hidden = embed(loaded, texts)
        self._add(tensor, loaded)
        return hidden

    def _write_lm_head(
        self, tensor: TensorSource, forward: LlamaForward, hidden: NDArray[np.float32]
    ) -> None:
        norm = find(self._checkpoint, FINAL_NORM)
        with naming_tensor(FINAL_NORM):
            inputs = Inputs(flat(forward.normalise(hidden, as_floats(norm.load()))))
        self._start(tensor)
        with naming_tensor(LM_HEAD):
            loaded = tensor.load()
            assert not isinstance(loaded, QuantTensor)
            quantised = self._quantize(tensor, loaded, inputs)
        self._add(tensor, quantised)

    def _load_layer(self, tensors: dict[str, TensorSource]) -> Layer:
        """The layer in float32; matrices whose codes are kept are written here."""
        layer: Layer = {}
        for name, tensor in tensors.items():
            with naming_tensor(tensor.name):
                loaded = tensor.load()
                layer[name] = as_floats(loaded)
            if isinstance(loaded, QuantTensor):
                self._start(tensor)
                self._add(tensor, loaded)
        return layer

    def _fold(
        self,
        forward: LlamaForward,
        tensors: dict[str, TensorSource],
        layer: Layer,
        hidden: NDArray[np.float32],
    ) -> None:
        seen: dict[tuple[str, ...], Seen] = {}
        forward.run_layer(
            layer, hidden.copy(), lambda stage, x: seen.update({stage: Seen.of(Inputs(x))})
        )
        settings = {
            name: self._plan[tensor.name] for name, tensor in tensors.items() if tensor.dense
        }
        fold_scales(layer, seen, settings, self._checkpoint.config)

    def _quantize(
        self, tensor: TensorSource, matrix: MatrixLike, inputs: Inputs | None
    ) -> QuantTensor:
        method = self._options.method
        quantize = method.quantize if inputs is not None else method.alone or method.quantize
        return quantize(matrix, self._plan[tensor.name], inputs)

    def _start(self, tensor: TensorSource) -> None:
        if self._progress is not None:
            self._progress(self._done, self._checkpoint.n_elements, tensor.name)

    def _add(self, tensor: TensorSource, what: QuantTensor | NDArray[np.float32]) -> None:
        if isinstance(what, QuantTensor):
            self._writer.add_linear(tensor.name, pack(what), what.spec, what.order)
        else:
            self._writer.add_float(tensor.name, what)
        self._done += tensor.n_elements
