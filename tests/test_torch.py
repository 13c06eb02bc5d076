"""tmac_py.torch: the numbers of the NumPy class, in torch's types, modules and state."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tmac_py
from tmac_py import LutLinear as NumpyLinear
from tmac_py.errors import OptionError

torch = pytest.importorskip("torch")
nn = torch.nn

from tmac_py.torch import LutLinear, replace_linears  # noqa: E402  (needs torch)

DOCS = Path(__file__).parents[1] / "docs/linear.md"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def dense() -> Any:
    return nn.Linear(96, 70)


def answer(module: Any, x: Any) -> Any:
    with torch.no_grad():
        return module(x)


@pytest.mark.parametrize("options", [{}, {"bits": 2, "group_size": 16, "asym": True}])
def test_the_numbers_are_those_of_numpy(dense: Any, options: dict[str, Any]) -> None:
    lut = LutLinear.from_linear(dense, threads=2, **options)
    w = dense.weight.detach().numpy()
    ours = NumpyLinear.from_dense(w, threads=2, **{"bits": 4, **options})
    x = torch.randn(2, 3, 96)
    want = ours(x.numpy()) + dense.bias.detach().numpy()
    assert np.array_equal(answer(lut, x).numpy(), want)
    assert lut.packed.numpy().nbytes == ours.nbytes
    q = tmac_py.quantize(w, **{"bits": 4, **options})
    exact = x @ torch.from_numpy(q.dequantize()).T + dense.bias.detach()
    assert torch.linalg.norm(answer(lut, x) - exact) < 0.01 * torch.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_answers_have_the_type_of_the_activations(dense: Any, dtype: Any) -> None:
    lut = LutLinear.from_linear(dense.to(dtype), threads=1)
    x = torch.randn(5, 96).to(dtype)
    y = answer(lut, x)
    assert y.dtype == dtype
    assert torch.equal(y, answer(lut, x.float()).to(dtype))


def test_views_without_a_copy(dense: Any) -> None:
    lut = LutLinear.from_linear(dense, threads=1)
    x = torch.randn(96, 5)
    assert torch.equal(answer(lut, x.T), answer(lut, x.T.contiguous()))
    assert lut._open().packed.ctypes.data == lut.packed.data_ptr()


def test_state_goes_to_another_module_and_back(dense: Any, tmp_path: Path) -> None:
    lut, x = LutLinear.from_linear(dense, threads=1), torch.randn(3, 96)
    other = LutLinear.from_linear(nn.Linear(96, 70), threads=1)
    want = answer(lut, x)
    assert not torch.equal(answer(other, x), want)
    torch.save(lut.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(answer(other, x), want)
    third = LutLinear.from_linear(nn.Linear(96, 70), threads=1)
    third.load_state_dict(lut.state_dict(), assign=True)
    assert torch.equal(answer(third, x), want)
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        LutLinear.from_linear(dense, bits=2).load_state_dict(lut.state_dict())


def test_copies_and_casts_keep_the_matrix(dense: Any) -> None:
    lut, x = LutLinear.from_linear(dense, threads=1), torch.randn(3, 96)
    want = answer(lut, x)
    twin = copy.deepcopy(lut)
    lut.packed.zero_()
    assert torch.equal(answer(twin, x), want)
    twin.bias.zero_()
    without = answer(twin, x)
    assert torch.equal(answer(twin.to(torch.bfloat16), x), without)
    assert twin.packed.dtype == torch.uint8


def test_ordered_columns(dense: Any) -> None:
    q = tmac_py.quantize(dense.weight.detach().numpy(), bits=4)
    order = np.random.default_rng(0).permutation(96).astype(np.int32)
    ordered, x = LutLinear(replace(q, order=order), threads=1), torch.randn(3, 96)
    want = NumpyLinear(replace(q, order=order), threads=1)(x.numpy())
    assert np.array_equal(answer(ordered, x).numpy(), want)
    assert set(ordered.state_dict()) == {"packed", "order"}


def test_all_of_a_module_is_replaced() -> None:
    shared = nn.Linear(32, 32)
    module = nn.ModuleDict(
        {
            "body": nn.Sequential(shared, nn.GELU(), shared, nn.Linear(32, 32, bias=False)),
            "attention": nn.MultiheadAttention(32, 4),
            "lm_head": nn.Linear(32, 64),
        }
    )
    x = torch.randn(4, 32)
    want = answer(module["body"], x)
    names = replace_linears(module, bits=8, skip=["lm_*"], threads=1)
    assert names == ["body.0", "body.2", "body.3"]
    assert module["body"][0] is module["body"][2]
    assert type(module["lm_head"]) is nn.Linear
    assert type(module["attention"].out_proj) is not LutLinear  # a subclass, whose weight is read
    error = torch.linalg.norm(answer(module["body"], x) - want)
    assert 0 < error < 0.02 * torch.linalg.norm(want)


def test_nothing_is_replaced_if_one_cannot_be() -> None:
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        module[1].weight[0, 0] = float("nan")
    with pytest.raises(OptionError, match="not finite"):
        replace_linears(module)
    assert all(type(child) is nn.Linear for child in module)
    with pytest.raises(OptionError, match=r"module is an nn\.Linear"):
        replace_linears(module[0])


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.ones(3, 95), r"x is \[3, 95\]; allowed: \[\.\.\., 96\]"),
        (torch.ones(3, 96, dtype=torch.int32), "x is torch.int32 on cpu"),
        (torch.ones(3, 96, device="meta"), "x is torch.float32 on meta"),
        (torch.ones(3, 96, requires_grad=True), "inference only"),
    ],
)
def test_what_does_not_fit_is_refused(dense: Any, x: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        LutLinear.from_linear(dense, threads=1)(x)


def test_arguments_are_checked(dense: Any) -> None:
    with pytest.raises(OptionError, match="bits is 9"):
        LutLinear.from_linear(dense, bits=9)
    q = tmac_py.quantize(np.ones((4, 8)), bits=4)
    with pytest.raises(OptionError, match=r"bias is \[5\]; allowed: \[4\]"):
        LutLinear(q, torch.ones(5))
    with pytest.raises(OptionError, match="threads is 0"):
        LutLinear(q, threads=0)


def test_the_blocks_in_the_docs_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in (b for b in blocks if "torch" in b):
        exec(block, names)
    assert isinstance(names["model"][0], LutLinear)


def test_one_pattern_to_skip() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 4))
    assert replace_linears(model, skip="*1") == ["0"]


def test_weights_that_were_moved() -> None:
    layer = LutLinear.from_linear(nn.Linear(64, 32)).to("meta")
    with torch.no_grad(), pytest.raises(OptionError, match="the weights are on meta; allowed"):
        layer(torch.ones(1, 64))
