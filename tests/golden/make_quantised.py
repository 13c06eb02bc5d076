"""Write tests/golden/quantised-*.npz: single modules as the tools of the quantised formats store
them, with the weights that these tools read back.

    python make_quantised.py gptqmodel | auto-round | compressed-tensors | hqq

The files were made with gptqmodel 7.7.0, auto-round 0.16.1, compressed-tensors 0.20.0 and 0.9.4
(once each: the file names tell), hqq 0.2.8.post1, all on the CPU with torch 2.13.0.

A file holds for every case ``CASE/settings`` (the quantisation settings, JSON),
``CASE/tensors/NAME`` and ``CASE/weight`` ``[m, k]``. Weights lie on a grid that fp16 holds exactly,
steps of a few significant bits, so that the tools' half-precision arithmetic does not round. HQQ
finds its own grid; its weights are float32.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"

import numpy as np
import torch

HERE = Path(__file__).parent
Case = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]


class Grid:
    """Random codes ``[m, k]``, scales and zero points ``[m, groups]``, and what they stand for."""

    def __init__(
        self,
        bits: int,
        group_size: int,
        *,
        symmetric: bool,
        m: int = 64,
        k: int = 96,
        act_order: bool = False,
        negative: bool = False,
        lowest_zero: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(1000 * bits + group_size + 7 * symmetric + k)
        size = k if group_size == -1 else group_size
        groups = -(-k // size)
        self.codes = torch.randint(0, 2**bits, (m, k), generator=rng)
        steps = torch.randint(1, 8, (m, groups), generator=rng).float()
        self.scales = steps * 2.0 ** torch.randint(-10, -6, (m, groups), generator=rng)
        if negative:
            self.scales *= torch.randint(0, 2, (m, groups), generator=rng) * 2 - 1
        self.zeros = torch.randint(lowest_zero, 2**bits, (m, groups), generator=rng)
        if symmetric:
            self.zeros[:] = 2 ** (bits - 1)
        self.group = torch.arange(k) // size
        if act_order:
            self.group = self.group[torch.randperm(k, generator=rng)]
        self.weight = self.scales[:, self.group] * (self.codes - self.zeros[:, self.group])

    @property
    def linear(self) -> torch.nn.Linear:
        linear = torch.nn.Linear(*reversed(self.weight.shape), bias=False)
        linear.weight.data = self.weight.clone()
        return linear


def buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def gptqmodel_cases() -> dict[str, Case]:
    from types import SimpleNamespace

    from gptqmodel.nn_modules.qlinear.gemm_awq import AwqGEMMLinear
    from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
    from gptqmodel.nn_modules.qlinear.gemv_fast_awq import AwqGEMVFastLinear, LLMAwqLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    cases: dict[str, Case] = {}
    for bits in (2, 3, 4, 8):
        for name, group_size, symmetric, act_order, m, k in (
            ("sym", 32, True, False, 32, 96),
            ("asym", 32, False, False, 64, 96),
            ("asym-ragged", 64, False, False, 32, 96),
            ("asym-channel", -1, False, False, 32, 64),
            ("asym-act-order", 16, False, True, 32, 96),
        ):
            grid = Grid(bits, group_size, symmetric=symmetric, act_order=act_order, m=m, k=k)
            module = TorchLinear(
                bits=bits,
                group_size=group_size,
                sym=symmetric,
                desc_act=act_order,
                in_features=k,
                out_features=m,
                bias=False,
                register_buffers=True,
            )
            module.pack_original(grid.linear, grid.scales, grid.zeros, grid.group.to(torch.int32))
            settings = {
                "quant_method": "gptq",
                "bits": bits,
                "group_size": group_size,
                "desc_act": act_order,
                "sym": symmetric,
            }
            tensors = {name: t for name, t in buffers(module).items() if not name.startswith("wf")}
            weight = module.dequantize_weight().T.float()
            assert torch.equal(weight, grid.weight), (bits, name)
            settings["checkpoint_format"] = "gptq_v2"
            cases[f"gptq-{bits}bit-{name}-v2"] = (dict(settings), tensors, weight)
            convert_gptq_v2_to_v1_format_module(
                module, SimpleNamespace(bits=bits, pack_dtype=torch.int32)
            )
            settings["checkpoint_format"] = "gptq"
            tensors = {**tensors, "qzeros": module.qzeros.clone()}
            cases[f"gptq-{bits}bit-{name}-v1"] = (settings, tensors, weight)

    for kind, version_name, m, k, group_size in (
        (AwqGEMMLinear, "gemm", 64, 96, 32),
        (AwqGEMVLinear, "gemv", 64, 128, 32),
        (AwqGEMVLinear, "gemv", 32, 128, 64),
        (AwqGEMVFastLinear, "gemv_fast", 64, 128, 64),
        (AwqGEMVFastLinear, "gemv_fast", 32, 256, 128),
        (LLMAwqLinear, "llm-awq", 32, 128, 32),
    ):
        grid = Grid(4, group_size, symmetric=False, m=m, k=k)
        # Their constructors want a GPU, though packing does not.
        module = kind.__new__(kind)
        torch.nn.Module.__init__(module)
        module.bits, module.group_size = 4, group_size
        module.in_features, module.out_features = k, m
        module.pack(grid.linear, grid.scales, grid.zeros)
        settings = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": version_name,
        }
        cases[f"awq-{version_name}-g{group_size}"] = (settings, buffers(module), grid.weight)
    return cases


def auto_round_cases() -> dict[str, Case]:
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    cases: dict[str, Case] = {}
    for packing, module_of in (
        ("auto_round:auto_gptq", qlinear_torch_zp.QuantLinear),
        ("auto_round", qlinear_torch.QuantLinear),
    ):
        for bits in (2, 3, 4, 8):
            for symmetric, group_size in ((True, 32), (False, 32), (False, 64)):
                grid = Grid(
                    bits, group_size, symmetric=symmetric, m=32, negative=symmetric, lowest_zero=1
                )
                module = module_of(bits, group_size, 96, 32, False)
                module.device = "cpu"
                module.pack(grid.linear, grid.scales, grid.zeros.float(), None)
                settings = {
                    "quant_method": "auto-round",
                    "packing_format": packing,
                    "bits": bits,
                    "group_size": group_size,
                    "sym": symmetric,
                    "data_type": "int",
                }
                name = f"{packing.replace(':', '-')}-{bits}bit-{symmetric}-g{group_size}"
                cases[name] = (settings, buffers(module), grid.weight)
    grid = Grid(4, 32, symmetric=False)
    module = WQLinear_GEMM.from_linear(
        grid.linear,
        4,
        32,
        scales=grid.scales.T.contiguous(),
        zeros=grid.zeros.float().T.contiguous(),
    )
    settings = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_awq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
    }
    cases["auto_round-auto_awq"] = (settings, buffers(module), grid.weight)
    return cases


def compressed_tensors_cases() -> dict[str, Case]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if version("compressed-tensors") == "0.9.4":
        from compressed_tensors.compressors import PackedQuantizationCompressor

        def compress(
            state: dict[str, torch.Tensor], args: QuantizationArgs
        ) -> dict[str, torch.Tensor]:
            packed = PackedQuantizationCompressor().compress_weight(
                state["weight"],
                state["weight_scale"],
                args,
                state["weight_zero_point"],
                state.get("weight_g_idx"),
            )
            kept = {n: t for n, t in state.items() if n in ("weight_scale", "weight_g_idx")}
            return {**kept, **packed}
    else:
        from compressed_tensors.compressors import PackedQuantizationCompressor

        def compress(
            state: dict[str, torch.Tensor], args: QuantizationArgs
        ) -> dict[str, torch.Tensor]:
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            packed = PackedQuantizationCompressor.compress(state, scheme)
            back = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
            assert torch.equal(back.float(), state["weight"]), args
            return packed

    old = version("compressed-tensors") == "0.9.4"
    cases: dict[str, Case] = {}
    for bits in (2, 3, 4, 5, 6, 7, 8):
        for name, group_size, symmetric, act_order in (
            ("sym", 32, True, False),
            ("asym", 32, False, False),
            ("asym-channel", -1, False, False),
            *([("asym-act-order", 32, False, True)] if old and bits in (3, 4) else []),
        ):
            m = 6 * (32 // bits)  # 0.9.4 packs zero points of whole words only
            grid = Grid(bits, group_size, symmetric=symmetric, m=m, act_order=act_order)
            weights = {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group_size == -1 else "group",
                "group_size": None if group_size == -1 else group_size,
                **({"actorder": "group"} if act_order else {}),
            }
            state = {
                "weight": grid.weight,
                "weight_scale": grid.scales,
                "weight_zero_point": (grid.zeros - 2 ** (bits - 1)).to(torch.int8),
            }
            if act_order:
                state["weight_g_idx"] = grid.group.to(torch.int32)
            tensors = compress(dict(state), QuantizationArgs(**weights))
            settings = {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "ignore": ["lm_head"],
            }
            cases[f"{bits}bit-{name}"] = (settings, tensors, grid.weight)
    return cases


def hqq_cases() -> dict[str, Case]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    torch.manual_seed(0)
    cases: dict[str, Case] = {}
    for bits in (8, 6, 5, 4, 3, 2, 1):
        for group_size, as_float, kind in (
            (32, False, torch.float16),
            (96, False, torch.float32),
            (32, True, torch.float16),
        ):
            config = BaseQuantizeConfig(
                nbits=bits, group_size=group_size, axis=1, view_as_float=as_float
            )
            linear = torch.nn.Linear(96, 24, bias=False)
            module = HQQLinear(linear, config, compute_dtype=kind, device="cpu")
            state = {n: t for n, t in module.state_dict().items() if t is not None}
            module.meta["compute_dtype"] = torch.float32
            for name in ("scale", "zero"):
                module.meta[name] = module.meta[name].float()
            settings = {"quant_method": "hqq", "quant_config": config}
            settings["quant_config"] = {"weight_quant_params": config["weight_quant_params"]}
            name = f"{bits}bit-g{group_size}" + ("-as-float" if as_float else "")
            cases[name] = (settings, state, module.dequantize().float())
    return cases


MAKERS = {
    "gptqmodel": gptqmodel_cases,
    "auto-round": auto_round_cases,
    "compressed-tensors": compressed_tensors_cases,
    "hqq": hqq_cases,
}


def main() -> None:
    tool = sys.argv[1]
    arrays: dict[str, np.ndarray] = {}
    for name, (settings, tensors, weight) in MAKERS[tool]().items():
        arrays[f"{name}/settings"] = np.frombuffer(json.dumps(settings).encode(), np.uint8)
        half = weight.detach().half()
        exact = torch.equal(half.float(), weight.float())
        arrays[f"{name}/weight"] = (half if exact else weight.detach().float()).numpy()
        for part, tensor in tensors.items():
            arrays[f"{name}/tensors/{part}"] = tensor.detach().contiguous().numpy()
    np.savez_compressed(HERE / f"quantised-{tool}-{version(tool)}.npz", **arrays)


if __name__ == "__main__":
    main()
