"""The layers of the tree: includes and imports point down, intrinsics stay in one folder."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CSRC_LAYERS = ("core", "layout", "simd", "kernels", "ops", "model", "bindings")
"""Folders of csrc, lowest first."""

PYTHON_LAYERS: dict[str, tuple[str, ...]] = {
    "core": ("tmac_py._core",),
    "data": (
        "tmac_py.blockwriter",
        "tmac_py.checks",
        "tmac_py.config",
        "tmac_py.decoder",
        "tmac_py.errors",
        "tmac_py.families",
        "tmac_py.filelock",
        "tmac_py.generation_defaults",
        "tmac_py.hf_config",
        "tmac_py.json_values",
        "tmac_py.linear",
        "tmac_py.lutfile",
        "tmac_py.lutheader",
        "tmac_py.lutwriter",
        "tmac_py.machine",
        "tmac_py.packing",
        "tmac_py.parallel",
        "tmac_py.pool",
        "tmac_py.quant",
        "tmac_py.rope",
        "tmac_py.sensors",
        "tmac_py.spec",
        "tmac_py.synthetic",
        "tmac_py.tokenizer",
        "tmac_py.tokenizer_backends",
        "tmac_py.torch",
    ),
    "converters": ("tmac_py.converters",),
    "runner": (
        "tmac_py",
        "tmac_py.aio",
        "tmac_py.batch",
        "tmac_py.benchmark",
        "tmac_py.cancelling",
        "tmac_py.chat",
        "tmac_py.completions",
        "tmac_py.constraints",
        "tmac_py.conversation",
        "tmac_py.conversions",
        "tmac_py.decoding",
        "tmac_py.default_model",
        "tmac_py.embedding",
        "tmac_py.evaluation",
        "tmac_py.evaluation_state",
        "tmac_py.generate",
        "tmac_py.model",
        "tmac_py.modelcache",
        "tmac_py.multiple_choice",
        "tmac_py.openai_messages",
        "tmac_py.openai_replies",
        "tmac_py.options",
        "tmac_py.packaged_download",
        "tmac_py.plans",
        "tmac_py.sampling",
        "tmac_py.scoring",
        "tmac_py.seeding",
        "tmac_py.session",
        "tmac_py.sessionfile",
        "tmac_py.speculative",
        "tmac_py.stored_logits",
        "tmac_py.text_methods",
        "tmac_py.tool_calls",
    ),
    "server": ("tmac_py.server",),
    "cli": ("tmac_py.cli", "tmac_py.__main__"),
}
"""Modules of each layer, lowest first; a package stands for everything in it but `tmac_py`."""

INTRINSICS = re.compile(
    r"immintrin\.h|arm_neon\.h|\b_mm\d*_\w+|\b__m\d+[id]?\b|\bv\w+_[fsu](?:8|16|32|64)\b"
    r"|\b__AVX\w*|\b__ARM_\w+"
)

PAUSE = {"immintrin.h", "_mm_pause"}
"""What csrc/core/thread_pool.cc needs to wait politely."""


def csrc_files() -> list[Path]:
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cc", ".inl"}]
    assert len(files) > 20
    return files


def python_modules() -> list[tuple[str, Path]]:
    """(module name, file) of everything that ships."""
    folders = {"tmac_py": ROOT / "python" / "tmac_py", "tmac_py.converters": ROOT / "converters"}
    modules = []
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "tmac_py" and parts[0] == "converters":
                continue
            names = [p for p in parts if p != "__init__"]
            modules.append((".".join([package, *names]), path))
    return modules


def python_layer(module: str) -> int:
    """Index of the layer of a module. Fails for one that the list above does not hold."""
    for i, modules in enumerate(PYTHON_LAYERS.values()):
        for name in modules:
            if module == name or (name != "tmac_py" and module.startswith(f"{name}.")):
                return i
    pytest.fail(f"{module} has no layer: add it to PYTHON_LAYERS")


def imported_modules(path: Path, module: str, known: set[str]) -> set[str]:
    """Modules of tmac_py that a file imports, anywhere in it."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return {name for name in found if name == "tmac_py" or name.startswith("tmac_py.")}


@pytest.mark.parametrize("path", csrc_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_includes_point_down(path: Path) -> None:
    layer = path.relative_to(ROOT / "csrc").parts[0]
    for included in re.findall(r'#\s*include\s+"([^"]+)"', path.read_text()):
        other = included.split("/")[0]
        assert other in CSRC_LAYERS, f"{included}: includes name the folder under csrc"
        assert CSRC_LAYERS.index(other) <= CSRC_LAYERS.index(layer), f"{layer} includes {included}"


@pytest.mark.parametrize("path", csrc_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_intrinsics_stay_in_simd(path: Path) -> None:
    place = path.relative_to(ROOT / "csrc")
    if place.parts[0] == "simd":
        return
    allowed = PAUSE if place == Path("core/thread_pool.cc") else set()
    assert set(INTRINSICS.findall(path.read_text())) <= allowed


def test_the_patterns_find_intrinsics() -> None:
    for path in ("avx2.h", "avx512.h", "neon.h"):
        text = (ROOT / "csrc" / "simd" / path).read_text()
        assert len(INTRINSICS.findall(text)) > 40


@pytest.mark.parametrize(("module", "path"), python_modules(), ids=lambda v: str(v).split("/")[-1])
def test_imports_point_down(module: str, path: Path) -> None:
    known = {name for name, _ in python_modules()} | {"tmac_py._core"}
    layer = python_layer(module)
    for other in imported_modules(path, module, known):
        assert python_layer(other) <= layer, f"{module} imports {other}"


def test_the_layers_name_modules_that_exist() -> None:
    known = {name for name, _ in python_modules()} | {"tmac_py._core"}
    assert {name for names in PYTHON_LAYERS.values() for name in names} <= known
