"""A packed matrix in place of a ``torch.nn.Linear``: inference on the CPU (docs/linear.md).

Importing this module imports PyTorch, which tmac_py itself neither needs nor installs.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("tmac_py.torch needs PyTorch: pip install torch") from error

from tmac_py import linear
from tmac_py.errors import OptionError
from tmac_py.packing import pack
from tmac_py.quant import QuantTensor, Search
from tmac_py.spec import Tables

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LutLinear(nn.Module):
    """``y = x w^T + bias`` with a packed matrix ``w [out_features, in_features]``.

    Computes in float32 as `tmac_py.LutLinear` does, and answers in the dtype of ``x``. The packed
    bytes are the buffer ``packed`` (uint8), ``order`` (int32) one if the columns are ordered: both
    are part of ``state_dict`` and are read where torch keeps them, without a copy.

    Args:
        weights: codes, scales and offsets of the matrix, and their order.
        bias: ``[out_features]``, or None.
        threads: see `tmac_py.LutLinear`; torch's own setting does not count here.
        tables: see `tmac_py.LutLinear`.

    Raises:
        OptionError: an argument is not allowed.
    """

    packed: Tensor
    order: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weights: QuantTensor,
        bias: Tensor | None = None,
        *,
        threads: int | None = None,
        tables: Tables = "int8",
    ) -> None:
        super().__init__()
        self.spec = weights.spec
        self.in_features, self.out_features = weights.k, weights.m
        self.threads, self.tables = threads, tables
        if bias is not None and tuple(bias.shape) != (weights.m,):
            raise OptionError(f"bias is {list(bias.shape)}; allowed: [{weights.m}]")
        order = None if weights.order is None else torch.from_numpy(weights.order.copy())
        self.register_buffer("packed", torch.from_numpy(pack(weights)))
        self.register_buffer("order", order)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._opened: tuple[Tensor, linear.LutLinear] | None = None
        self._open()

    @classmethod
    def from_linear(
        cls,
        module: nn.Linear,
        *,
        bits: int = 4,
        group_size: int = 32,
        asym: bool = False,
        search: Search = "mse",
        threads: int | None = None,
        tables: Tables = "int8",
    ) -> LutLinear:
        """Quantise the weights of ``module`` by rounding to nearest; it is left as it is.

        The arguments are those of `tmac_py.LutLinear.from_dense`, which also says what is refused.
        """
        weights = linear.quantize(
            module.weight.detach().float().cpu().numpy(),
            bits=bits,
            group_size=group_size,
            asym=asym,
            search=search,
        )
        return cls(weights, module.bias, threads=threads, tables=tables)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: ``x [..., in_features]``, floats on the CPU -> ``[..., out_features]``.

        Raises:
            OptionError: ``x`` does not fit or asks for a gradient; it or the weights are elsewhere.
        """
        if x.device.type != "cpu" or x.dtype not in _DTYPES:
            raise OptionError(f"x is {x.dtype} on {x.device}; allowed: floats on the CPU")
        if x.requires_grad and torch.is_grad_enabled():
            raise OptionError("x requires a gradient; run under torch.no_grad(): inference only")
        y = torch.from_numpy(self._open().forward(x.detach().float().numpy()))
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        spec = self.spec
        return (
            f"in_features={spec.k}, out_features={spec.m}, bias={self.bias is not None}, "
            f"bits={spec.bits}, group_size={spec.group_size}, tables={self.tables!r}"
        )

    def _open(self) -> linear.LutLinear:
        """The matrix in ``packed``, opened again where another tensor has taken its place."""
        if self.packed.device.type != "cpu":
            raise OptionError(f"the weights are on {self.packed.device}; allowed: the CPU")
        if self._opened is None or self._opened[0] is not self.packed:
            opened = linear.LutLinear.from_packed(
                self.packed.numpy(),
                self.spec,
                order=None if self.order is None else self.order.numpy(),
                threads=self.threads,
                tables=self.tables,
            )
            self._opened = self.packed, opened
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}


def replace_linears(
    module: nn.Module,
    *,
    bits: int = 4,
    group_size: int = 32,
    asym: bool = False,
    search: Search = "mse",
    skip: str | Iterable[str] = (),
    threads: int | None = None,
    tables: Tables = "int8",
) -> list[str]:
    """Put a `LutLinear` in the place of every ``nn.Linear`` inside ``module``.

    Subclasses of ``nn.Linear`` are left alone: who made them may read their weights. A matrix
    shared by several names stays shared.

    Args:
        module: what to search; not itself an ``nn.Linear``.
        skip: one or several patterns (``*`` and ``?``) of names to leave alone: ``"lm_head"``.
        bits: this and the rest: see `LutLinear.from_linear`.

    Returns:
        The names of what was replaced, as in ``module.named_modules()``.

    Raises:
        OptionError: an argument is not allowed. Nothing has been replaced then.
    """
    patterns = [skip] if isinstance(skip, str) else list(skip)
    made: dict[nn.Module, LutLinear] = {}
    places: dict[str, nn.Linear] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if type(child) is not nn.Linear or any(fnmatchcase(name, p) for p in patterns):
            continue
        if not name:
            raise OptionError("module is an nn.Linear; allowed: a module that has some inside")
        places[name] = child
        if child not in made:
            made[child] = LutLinear.from_linear(
                child,
                bits=bits,
                group_size=group_size,
                asym=asym,
                search=search,
                threads=threads,
                tables=tables,
            )
    for name, child in places.items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, made[child])
    return list(places)
