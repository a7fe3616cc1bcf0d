"""The package's rooms: imports go down, and only some may enter the operator."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jax_dcn"
SUFFIXES = (".py", ".pyi")  # of the native modules there are stubs

# From the top. A module may import what stands on a line below its own, and from its own room, which is what a line
# names: a package, a module, or one of the operator's modules. The package itself, "", imports from everywhere.
ROOMS = (
    ("",),
    ("models",),
    ("mmcv",),
    ("linen", "nnx"),
    ("_layers",),
    ("functional", "onnx", "plot"),
    ("_checks",),
    ("_operator",),
    ("_operator.unweighted",),
    ("_operator.differentiation",),
    ("_operator.primitives",),
    ("_operator.batching", "_operator.partitioning", "_operator.lowering"),
    ("_operator.native", "_operator.reference"),
    ("_operator.operands",),
    ("_operator.geometry", "_operator.compat", "_operator._native", "_operator._native_cuda", "version"),
)
LINE = {room: line for line, rooms in enumerate(ROOMS) for room in rooms}

# What rooms above the operator may import from it, besides the geometry.
ENTRANCES = {
    "": {"_operator.native"},  # show_config
    "functional": {"_operator.differentiation", "_operator.unweighted"},
    "onnx": {"_operator.primitives"},
}


def modules():
    """The files by the names of their modules, "jax_dcn" left out."""
    files = {
        path.relative_to(PACKAGE).with_suffix("").parts: path
        for path in PACKAGE.rglob("*.py*")
        if path.suffix in SUFFIXES
    }
    return {".".join(part for part in parts if part != "__init__"): path for parts, path in files.items()}


MODULES = modules()


def room_of(module):
    return module if module.startswith("_operator") else module.split(".")[0]


def imported(module, source):
    """All that the source of a module imports, by its whole name, inside of functions too."""
    package = ["jax_dcn", *MODULES[module].relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*relative, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def modules_imported(module, source):
    """Those of this package."""
    for name in imported(module, source):
        first, *rest = name.split(".")
        if first == "jax_dcn":
            # What is no module is in one.
            while ".".join(rest) not in MODULES:
                rest.pop()
            yield ".".join(rest)


def not_allowed(module, source):
    """The imports of a module that go up, or past an entrance."""
    room = room_of(module)
    wrong = []
    for other in modules_imported(module, source):
        there = room_of(other)
        enters = there.startswith("_operator") and not room.startswith("_operator")
        allowed = {"_operator.geometry", *ENTRANCES.get(room, ())}
        if there != room and (LINE[there] <= LINE[room] or (enters and there not in allowed)):
            wrong.append(f"{module or 'jax_dcn'} imports {other or 'jax_dcn'}")
    return wrong


def private(module, source):
    """The imports from JAX's private modules."""
    return [name for name in imported(module, source) if f"{name}.".startswith("jax._src.")]


def test_every_module_has_a_room():
    assert {room_of(module) for module in MODULES} == LINE.keys()


def test_imports_go_down():
    assert [wrong for module, path in MODULES.items() for wrong in not_allowed(module, path.read_text())] == []


def test_what_is_private_to_jax_is_compats():
    assert [module for module, path in MODULES.items() if private(module, path.read_text())] == ["_operator.compat"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("_operator.geometry", "from jax_dcn import _checks"),
        ("_operator.operands", "import jax_dcn._operator.native"),
        ("_operator.lowering", "from jax_dcn._operator.partitioning import partitioned"),
        ("_operator.reference", "from jax_dcn._operator import geometry, native"),
        ("_checks", "def check():\n    from jax_dcn.functional import deform_conv2d"),
        ("_layers.conv", "from .. import nnx"),
        ("plot", "import jax_dcn"),
        ("linen", "from jax_dcn import deform_conv2d"),
        ("nnx", "from jax_dcn.linen import DeformConv2d"),
        ("mmcv.tree", "if TYPE_CHECKING:\n    from jax_dcn.models.fpn import FPN"),
        ("models.fpn", "from jax_dcn._operator import primitives"),
        ("_layers.conv", "from jax_dcn._operator.native import show_config"),
    ],
)
def test_an_import_that_is_not_allowed_is_found(module, source):
    assert len(not_allowed(module, source)) == 1


@pytest.mark.parametrize("source", ["import jax._src.core", "from jax import _src", "from jax._src import core"])
def test_an_import_of_a_private_module_is_found(source):
    assert private("functional", source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("", "from . import linen"),
        ("mmcv.__main__", "from jax_dcn.mmcv import load_checkpoint"),
        ("mmcv", "from jax_dcn.mmcv.convert import load_into"),
        ("models.fpn", "from .common import conv\nfrom ..nnx import DeformConv2d"),
        ("_operator.native", "from jax_dcn.version import __version__"),
        ("functional", "from jax_dcn._operator import differentiation"),
    ],
)
def test_what_is_allowed(module, source):
    assert [*modules_imported(module, source)]
    assert not_allowed(module, source) == []
