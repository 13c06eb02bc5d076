"""How far each quantiser moves a model's logits: mean KL divergence from the float32 model.

    python bench/quantizers.py model.gguf

SOURCE is a Hugging Face folder of floats, or a GGUF file, whose codes are then turned to floats
first. The float32 logits are those of tmac_py.converters.llama_forward; the quantised model runs
from its .lut with exact tables. Everything but embedding and lm_head gets the bits of the table;
these have 8. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tmac_py import Model
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.checkpoint import Checkpoint
from tmac_py.converters.llama_forward import LlamaForward
from tmac_py.converters.model_layers import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    as_floats,
    embed,
    find,
    layers_of,
)
from tmac_py.converters.quantizers import METHODS
from tmac_py.lutfile import LutFile
from tmac_py.tokenizer import Tokenizer

TEXT = Path(__file__).parents[1] / "tests" / "golden" / "text-short.txt"
CASES = ((4, 64), (3, 64), (2, 64))

Floats = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="Hugging Face folder of floats, or GGUF file")
    parser.add_argument("--text", type=Path, default=TEXT, help="held-out text")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of it (default: 512)")
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="METHOD, or METHOD+order with act_order (default: %(default)s)",
    )
    parser.add_argument(
        "--cases",
        default=",".join(f"{bits}x{group}" for bits, group in CASES),
        help="BITSxGROUP with an offset per group, BITSxGROUPs without; bpwXxGROUP for a "
        "target_bpw of X (default: %(default)s)",
    )
    parser.add_argument("--calibration", type=Path, help="text file (default: the one shipped)")
    parser.add_argument("--calibration-tokens", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = args.source
        if source.is_file():
            source = write_dense(source, Path(temporary) / source.stem)
        run(source, Path(temporary) / "model.lut", args)


def run(source: Path, out: Path, args: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(source)
    tokenizer = Tokenizer(checkpoint.tokenizer, bos_id=checkpoint.config.bos_token_id)
    ids = np.array(tokenizer.encode(args.text.read_text())[: args.tokens], np.int32)
    reference = log_softmax(dense_logits(checkpoint, ids))
    print(f"{source.name}, {args.text.name}, {len(ids)} tokens\n")
    print("| bits | group | offsets | method | bits per weight | mean KL | same top token | s |")
    print("|---|---|---|---|---|---|---|---|")
    calibration = {
        name: value
        for name in ("calibration", "calibration_tokens")
        if (value := getattr(args, name)) is not None
    }
    for case in args.cases.split(","):
        for method in args.methods.split(","):
            options = case_options(case, method)
            if options is None:
                continue
            start = time.perf_counter()
            calibrated = METHODS[options["quant"]].calibrated
            convert(source, out, **options, **(calibration if calibrated else {}))
            seconds = time.perf_counter() - start
            with Model.load(out, tables="exact") as model:
                ours = log_softmax(model.logits(ids))
            kl = (np.exp(reference) * (reference - ours)).sum(axis=1).mean()
            same = (reference.argmax(axis=1) == ours.argmax(axis=1)).mean()
            bits = options.get("bits", options.get("target_bpw"))
            offsets = "yes" if options["asym"] else "no"
            print(
                f"| {bits} | {options['group_size']} | {offsets} | {method} | "
                f"{bits_per_weight(out):.3f} | {kl:.4f} | {same:.1%} | {seconds:.1f} |",
                flush=True,
            )


def case_options(case: str, method: str) -> dict[str, Any] | None:
    """Keyword arguments of `convert`; None where the method has no such case."""
    bits, _, group = case.partition("x")
    asym = not group.endswith("s")
    quant, _, order = method.partition("+")
    if not asym and METHODS[quant].offsets:
        return None
    options: dict[str, Any] = {
        "quant": quant,
        "group_size": int(group.removesuffix("s")),
        "asym": asym,
    }
    if order:
        options["act_order"] = True
    if bits.startswith("bpw"):
        return {**options, "target_bpw": float(bits.removeprefix("bpw"))}
    return {**options, "bits": int(bits), "head_bits": 8}


def dense_logits(checkpoint: Checkpoint, ids: NDArray[np.int32]) -> Floats:
    """Logits ``[n, vocab]`` of the model in float32."""
    config = checkpoint.config
    forward = LlamaForward(config, len(ids))
    hidden = embed(find(checkpoint, EMBEDDING).load(), ids[None])
    for tensors in layers_of(checkpoint):
        layer = {name: as_floats(tensor.load()) for name, tensor in tensors.items()}
        forward.run_layer(layer, hidden, lambda _stage, _x: None)
    x = forward.normalise(hidden, as_floats(find(checkpoint, FINAL_NORM).load()))[0]
    head = EMBEDDING if config.tie_word_embeddings else LM_HEAD
    logits: Floats = x @ as_floats(find(checkpoint, head).load()).T
    return logits


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def bits_per_weight(path: Path) -> float:
    """Of all packed matrices."""
    with LutFile.open(path, check=False) as file:
        linears = [entry for entry in file.tensors.values() if entry.kind == "linear"]
        weights = sum(entry.shape[0] * entry.shape[1] for entry in linears)
        return sum(entry.nbytes for entry in linears) * 8 / weights


def write_dense(gguf: Path, folder: Path) -> Path:
    """The model of a GGUF file as a Hugging Face folder in float32."""
    checkpoint = open_checkpoint(gguf)
    folder.mkdir()
    for name, content in checkpoint.tokenizer.items():
        (folder / name).write_bytes(content)
    config = checkpoint.config.to_dict()
    eos = config.pop("eos_token_ids")
    config |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }
    config.pop("architecture")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = dict(floats(checkpoint))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def floats(checkpoint: Checkpoint) -> Iterator[tuple[str, Floats]]:
    for tensor in checkpoint.tensors:
        yield tensor.name, as_floats(tensor.load())


if __name__ == "__main__":
    main()
