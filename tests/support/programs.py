"""The programs that XLA's GPU compiler makes, as it dumps them."""

from __future__ import annotations

import re
from pathlib import Path


class Thunks:
    """What a program for GPUs runs, in order: each with its kind, those of a CUDA graph within it, a kCommandBuffer."""

    def __init__(self, text: str):
        self.text = text
        self.captured_kinds, self.other_kinds = [], []
        buffer = None  # how far the lines of the current command buffer are indented, at least
        for indent, kind in re.findall(r"^( *)\d+: (k\w+)", text, re.MULTILINE):
            if buffer is not None and len(indent) <= buffer:
                buffer = None
            (self.other_kinds if buffer is None else self.captured_kinds).append(kind)
            if kind == "kCommandBuffer" and buffer is None:
                buffer = len(indent)
        if not self.kinds():
            raise ValueError(f"these are no thunks: {text!r}")

    @classmethod
    def dumped_to(cls, folder: Path, module: str = "*") -> Thunks:
        """Of the only program there, by --xla_dump_to, of a module of this name."""
        (before,) = folder.glob(f"*.{module}.thunk_sequence.txt")
        # Where XLA makes no command buffers nothing is written after that pass.
        after = before.with_name(before.name.replace("sequence", "sequence_after_thunk_passes"))
        return cls((after if after.exists() else before).read_text())

    def kinds(self) -> set[str]:
        return {*self.captured_kinds, *self.other_kinds}

    def captured(self, kind: str) -> int:
        return self.captured_kinds.count(kind)

    def outside(self, kind: str) -> int:
        return self.other_kinds.count(kind)
