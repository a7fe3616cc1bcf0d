"""The Python of the README and of the documentation runs, block after block, as a reader would run it."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a page needs besides Flax, and what it says that it prints.
PACKAGES = {
    "docs/detection.md": ("optax",),
    "docs/onnx.md": ("jax2onnx",),
    "docs/porting.md": ("safetensors", "optax"),
}
PRINTED = {"docs/porting.md": "344 (27, 16, 3, 3) {}"}


def pages():
    """Those that have any."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page.relative_to(ROOT).as_posix() for page in found if BLOCK.search(page.read_text())]


def test_these_have_some():
    assert {"README.md", "docs/porting.md"} <= set(pages())


# jax2onnx's own, for a BatchNorm.
@pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning")
@pytest.mark.parametrize("page", pages())
def test_page(page, monkeypatch, capsys):
    for package in PACKAGES.get(page, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    names = {}
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], page, "exec"), names)
    assert PRINTED.get(page, "") in capsys.readouterr().out
