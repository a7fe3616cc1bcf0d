"""python -m jax_dcn.mmcv convert IN OUT [--prefix backbone.] [--keep-names]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jax_dcn.mmcv import StateDict, load_checkpoint, save_checkpoint

_LARGE = 100 * 2**20  # bytes of a file that takes long enough for a progress bar


def summary(state_dict: StateDict) -> str:
    """What a state dict holds, and which renaming rules fired."""
    size = sum(array.nbytes for array in state_dict.values()) / 2**20
    dtypes = ", ".join(sorted({array.dtype.name for array in state_dict.values()}))
    lines = [f"{len(state_dict)} arrays, {size:.1f} MiB, {dtypes}"]
    for rule, changes in state_dict.renamed.items():
        lines.append(f"renamed by rule '{rule}': {len(changes)}, for example {changes[0]}")
    if not state_dict.renamed:
        lines.append("no name had to be changed")
    return "\n".join(lines)


def convert(source: Path, target: Path, prefix: str, rules: bool = True) -> None:
    """Reads one file and writes the other, with a progress bar for a large one, and prints what was in it."""
    size = source.stat().st_size
    bar = None
    if size > _LARGE:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            print(f"reading {size / 2**20:.0f} MiB; with tqdm installed there would be a progress bar", file=sys.stderr)
        else:
            bar = tqdm(desc=source.name, total=size, unit="B", unit_scale=True)
    state_dict = load_checkpoint(source, prefix, rules=rules, progress=bar and bar.update)
    if bar is not None:
        bar.close()
    save_checkpoint(state_dict, target)
    print(f"{source} -> {target}: {summary(state_dict)}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line, by default this process's. What cannot be done ends it with a line and the status 1."""
    parser = argparse.ArgumentParser(prog="python -m jax_dcn.mmcv", description="Checkpoints of mmcv's models.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "convert", help="read a checkpoint, bring its names to mmcv's current ones, and write its arrays"
    )
    command.add_argument("source", type=Path, help=".pth, .pt or .safetensors")
    command.add_argument("target", type=Path, help=".safetensors, .pth or .pt")
    command.add_argument("--prefix", default="", help="keep only the names below this one, such as backbone.")
    command.add_argument("--keep-names", dest="rules", action="store_false", help="apply no renaming rules")
    command.set_defaults(run=convert)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    try:
        run(**options)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
