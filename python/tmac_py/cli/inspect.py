"""``tmac inspect``: what a .lut file holds, whether it is sound, and exports of it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmac_py.cli.models import find_model
from tmac_py.cli.tables import format_bytes, format_table
from tmac_py.errors import OptionError

if TYPE_CHECKING:
    from tmac_py.config import ModelConfig
    from tmac_py.lutfile import LutFile
    from tmac_py.lutheader import TensorEntry

_LAYER = re.compile(r"^model\.layers\.\d+\.")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+\.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``tmac inspect``."""
    parser.add_argument(
        "model", metavar="MODEL", help="a .lut file, or the name of a model that was fetched"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--diff",
        metavar="OTHER",
        help="print where MODEL differs from this one instead, and by how much its weights do; "
        "exit status 1 if it does",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="write a new folder: tmac.json with all that --tensors --json prints, the tokenizer's "
        "files, and the tensors of --tensor",
    )
    parser.add_argument(
        "--tensor",
        action="append",
        default=[],
        metavar="NAME",
        help="with --export: dequantised to float32 in NAME.npy; * and ? stand for any characters; "
        "may be given several times",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not read the tensors to verify their checksums"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where fetched models are kept (default: $TMAC_CACHE, else the user's cache)",
    )


def execute(args: argparse.Namespace) -> int:
    """Print the report on stdout; returns the exit status. Raises TmacError for a bad file."""
    from tmac_py.lutfile import LutFile

    if args.tensor and args.export is None:
        raise OptionError("--tensor needs --export DIR")
    if args.export is not None and args.diff is not None:
        raise OptionError("--export and --diff do not go together")
    path = find_model(args.model, cache_dir=args.cache_dir)
    if args.diff is not None:
        from tmac_py.cli.diff import compare, report

        other = find_model(args.diff, cache_dir=args.cache_dir)
        check = not args.no_check
        with LutFile.open(other, check=check) as first, LutFile.open(path, check=check) as second:
            differences = compare(first, second)
        print(json.dumps(differences, indent=2) if args.json else report(differences))
        return 1 if differences else 0
    with LutFile.open(path, check=not args.no_check) as file:
        if args.export is not None:
            from tmac_py.cli.inspect_export import export

            info = collect(file, checked=not args.no_check, tensors=True)
            names = export(file, info, args.export, args.tensor)
            print(json.dumps(names) if args.json else "\n".join(names))
            return 0
        info = collect(file, checked=not args.no_check, tensors=args.tensors)
        print(json.dumps(info, indent=2) if args.json else _report(file, info))
    return 0


def collect(file: LutFile, *, checked: bool, tensors: bool) -> dict[str, Any]:
    """Everything that ``tmac inspect`` shows, as JSON values; sizes in bytes."""
    linears = [entry for entry in file.tensors.values() if entry.kind == "linear"]
    weights = sum(_weights(entry) for entry in linears)
    packed = sum(entry.nbytes for entry in linears)
    floats = [entry for entry in file.tensors.values() if entry.kind == "float"]
    info = {
        "path": str(file.path),
        "format": int(file.metadata["tmac.format"]),
        "file_bytes": file.nbytes,
        "checksums": "verified" if checked else "not checked",
        "config": file.config.to_dict(),
        "source": file.source,
        "parameters": weights + sum(entry.nbytes // 4 for entry in floats),
        "weights": weights,
        "packed_bytes": packed,
        "bits_per_weight": packed * 8 / weights,
        "norm_bytes": sum(entry.nbytes for entry in floats),
        "order_bytes": sum(e.nbytes for e in file.tensors.values() if e.kind == "order"),
        "tokenizer": {name: len(data) for name, data in file.tokenizer.items()},
        "matrices": [_summary(name, group) for name, group in _grouped(linears)],
    }
    if tensors:
        info["tensors"] = [_tensor(entry) for entry in file.tensors.values()]
    return info


def _weights(entry: TensorEntry) -> int:
    return entry.shape[0] * entry.shape[1]


def _grouped(linears: Iterable[TensorEntry]) -> list[tuple[str, list[TensorEntry]]]:
    """Matrices of the same role (the name without layer and expert) and encoding, in file order."""
    groups: dict[tuple[str, object], list[TensorEntry]] = {}
    for entry in linears:
        assert entry.spec is not None
        has_scale = entry.spec.scale is not None
        encoding = (replace(entry.spec, scale=None), has_scale)
        role = _EXPERT.sub("", _LAYER.sub("", entry.name))
        groups.setdefault((role, encoding), []).append(entry)
    return [(name, entries) for (name, _), entries in groups.items()]


def _summary(name: str, entries: list[TensorEntry]) -> dict[str, Any]:
    spec = entries[0].spec
    assert spec is not None
    nbytes = sum(entry.nbytes for entry in entries)
    return {
        "name": name.removesuffix(".weight").removeprefix("model."),
        "count": len(entries),
        "m": spec.m,
        "k": spec.k,
        "encoding": spec.encoding,
        "bits": spec.bits,
        "group_size": spec.group_size,
        "offset_kind": spec.offset_kind,
        "bytes": nbytes,
        "bits_per_weight": nbytes * 8 / (len(entries) * spec.m * spec.k),
    }


def _tensor(entry: TensorEntry) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": entry.name,
        "kind": entry.kind,
        "shape": list(entry.shape),
        "bytes": entry.nbytes,
    }
    if entry.spec is not None:
        result |= {
            "encoding": entry.spec.encoding,
            "bits": entry.spec.bits,
            "group_size": entry.spec.group_size,
            "offset_kind": entry.spec.offset_kind,
            "zero": entry.spec.zero,
            "layout": entry.spec.layout,
        }
        if entry.spec.scale is not None:
            result["scale"] = entry.spec.scale
    return {**result, "xxh3": entry.xxh3}


def _report(file: LutFile, info: dict[str, Any]) -> str:
    sections = [
        format_table(_facts(file.config, info), indent=""),
        _matrix_table(info),
        "other\n" + format_table(_other(info), right="lr"),
    ]
    if info["source"]:
        sections.append("source\n" + format_table(list(info["source"].items())))
    if "tensors" in info:
        sections.append("tensors\n" + _tensor_table(info["tensors"]))
    return "\n\n".join(sections)


def _facts(config: ModelConfig, info: dict[str, Any]) -> list[tuple[str, str]]:
    scaling = (config.rope_scaling or {}).get("rope_type")
    rope = f"RoPE base {config.rope_theta:,.0f}" + (f", scaling {scaling}" if scaling else "")
    window = f", sliding window {config.sliding_window:,}" if config.sliding_window else ""
    ties = "tied with the output matrix" if config.tie_word_embeddings else "separate lm_head"
    eos = ", ".join(map(str, config.eos_token_ids)) or "none"
    bos = "none" if config.bos_token_id is None else config.bos_token_id
    checksums = f"{info['checksums']} (xxh3-128 of the header and each tensor)"
    return [
        ("file", f"{info['path']}, {format_bytes(info['file_bytes'])}, format {info['format']}"),
        ("checksums", checksums),
        (
            "model",
            f"{config.architecture}, {config.num_hidden_layers} layers, "
            f"hidden {config.hidden_size:,}, feed-forward {config.intermediate_size:,}",
        ),
        (
            "attention",
            f"{config.num_attention_heads} heads, {config.num_key_value_heads} KV heads, "
            f"head dimension {config.head_dim}{window}",
        ),
        ("context", f"{config.max_position_embeddings:,} tokens, {rope}"),
        ("vocabulary", f"{config.vocab_size:,} tokens, embeddings {ties}"),
        ("tokens", f"begin {bos}, end {eos}"),
        ("parameters", f"{info['parameters']:,}"),
        (
            "weights",
            f"{info['bits_per_weight']:.3f} bits per weight "
            f"({format_bytes(info['packed_bytes'])} packed, scales included)",
        ),
    ]


def _matrix_table(info: dict[str, Any]) -> str:
    rows = [("matrix", "count", "m x k", "bits", "group", "offsets", "bits/weight", "size")]
    rows += [
        (
            item["name"],
            str(item["count"]),
            f"{item['m']} x {item['k']}",
            _codes(item),
            str(item["group_size"]),
            item["offset_kind"],
            f"{item['bits_per_weight']:.3f}",
            format_bytes(item["bytes"]),
        )
        for item in info["matrices"]
    ]
    return format_table(rows, right="lrrrrlrr", indent="")


_TYPES = {"float": "f32", "order": "i32"}


def _codes(item: dict[str, Any]) -> str:
    """The bits of a matrix's codes and the name of their encoding, where it is needed."""
    names = {"uniform": f"{item['bits']}", "bcq": f"{item['bits']} bcq", "ternary": "ternary"}
    return names[item["encoding"]]


def _other(info: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("norms (float32)", format_bytes(info["norm_bytes"]))]
    if info["order_bytes"]:
        rows.append(("orders (int32)", format_bytes(info["order_bytes"])))
    rows += [(name, format_bytes(size)) for name, size in info["tokenizer"].items()]
    return rows


def _tensor_table(tensors: list[dict[str, Any]]) -> str:
    rows = [("name", "shape", "bits", "group", "bytes", "xxh3-128")]
    rows += [
        (
            item["name"],
            " x ".join(map(str, item["shape"])),
            _codes(item) if "bits" in item else _TYPES.get(item["kind"], "-"),
            str(item.get("group_size", "-")),
            f"{item['bytes']:,}",
            item["xxh3"],
        )
        for item in tensors
    ]
    return format_table(rows, right="lrrrrl")
