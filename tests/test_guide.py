"""The guide's code runs, block after block, as a reader would run it."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]


def test_porting_guide(monkeypatch, capsys):
    for package in "safetensors", "optax":
        pytest.importorskip(package)
    monkeypatch.chdir(ROOT)
    guide = (ROOT / "docs" / "porting.md").read_text()
    names = {}
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        for match in re.finditer(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
            line = guide.count("\n", 0, match.start(1))
            exec(compile("\n" * line + match[1], "porting.md", "exec"), names)
    assert "344 (27, 16, 3, 3) {}" in capsys.readouterr().out
