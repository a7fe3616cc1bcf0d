"""What the compiler makes of the CUDA kernels, as a table in Markdown: needs nvcc and nvdisasm, and no GPU.

Blocks are those of 256 threads that the registers let a multiprocessor hold. Instructions are counted in the whole
kernel and, by class, in the loops that should take the most time: of products, which is the loop with the most tensor
core instructions, or multiply-adds in a kernel without any, and of atomics. Loops are those that hold no other one with
such instructions. "+1" is the loop around it without it, "+2" the one around that, and so on. Every instruction of a
loop's body counts once, whether or not it is run each time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from report import markdown

TOP = Path(__file__).resolve().parents[1]

TENSOR_CORES, MULTIPLY_ADDS = {"HMMA"}, {"FFMA", "DFMA"}
ATOMICS = {"RED", "REDG", "ATOM", "ATOMG"}

# Classes of instructions by the first part of their names; all others are "other".
CLASSES = {
    "HMMA": TENSOR_CORES,
    "LDSM": {"LDSM"},
    "LDS": {"LDS"},
    "STS": {"STS"},
    "LDGSTS": {"LDGSTS"},
    "LDG": {"LDG", "LD"},
    "STG": {"STG", "ST"},
    "RED": ATOMICS,
    "FP": MULTIPLY_ADDS | {"FADD", "FMUL", "DADD", "DMUL", "HFMA2", "HADD2", "HMUL2"},
    "BAR": {"BAR"},
}

THREADS = 256
REGISTERS, REGISTER_UNIT = 65536, 256  # of a multiprocessor, and how many a warp gets at a time


class Kernel(NamedTuple):
    properties: str  # ptxas's report
    code: str  # nvdisasm's


class ToolMissing(Exception):
    """A compiler or disassembler that is not installed."""


def tools() -> tuple[str, str]:
    """nvcc and nvdisasm."""
    packaged = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm")
    nvcc = shutil.which("nvcc")
    nvdisasm = shutil.which("nvdisasm") or next(map(str, packaged), None)
    if nvcc is None:
        raise ToolMissing("no nvcc")
    if nvdisasm is None:
        raise ToolMissing("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return nvcc, nvdisasm


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiled(architecture: str, tree: Path = TOP) -> dict[str, Kernel]:
    """The kernels of a checkout by mangled name."""
    nvcc, nvdisasm = tools()

    def kernels_of(source: Path) -> dict[str, Kernel]:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernels.cubin")
            options = ["-std=c++17", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas=-v"]
            return parse(run(nvcc, *options, source, "-o", cubin), run(nvdisasm, "-c", cubin))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        sources = sorted((tree / "csrc" / "cuda").glob("*.cu"))
        return {name: kernel for kernels in pool.map(kernels_of, sources) for name, kernel in kernels.items()}


def parse(report: str, disassembly: str) -> dict[str, Kernel]:
    sections = re.split(r"\.section\s+\.text\.(\w+)", disassembly)
    code = dict(zip(sections[1::2], sections[2::2], strict=True))
    properties = re.findall(r"entry function '(\w+)'(.*?Used \d+ registers)", report, re.DOTALL)
    return {name: Kernel(text, code[name]) for name, text in properties}


def short_name(demangled: str) -> str:
    """A kernel's name without result, namespaces and parameters."""
    return re.sub(r"\w+::|^void ", "", demangled).split("(")[0]


def short_names(mangled: list[str]) -> list[str]:
    return [short_name(name) for name in run("c++filt", *mangled).splitlines()]


# --- loops ---


def instructions_of(code: str) -> tuple[list[str], dict[str, int]]:
    """The instructions, each with its predicate, and the labels' places among them."""
    instructions: list[str] = []
    labels = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(re.sub(r"\s+", " ", instruction[1]) + line[instruction.end() :])
    return instructions, labels


def name_of(instruction: str) -> str:
    """Its first part: LDG of "@P0 LDG.E.128 R4, [R2.64]"."""
    return re.sub(r"^@\S+ ", "", instruction).split(" ")[0].split(".")[0]


class Block(NamedTuple):
    instructions: list[str]
    next: list[int]  # the blocks that may follow


def blocks_of(code: str) -> list[Block]:
    """The kernel's basic blocks, its first one first. Calls return, and BSYNC goes on below it."""
    instructions, labels = instructions_of(code)
    ends = [i + 1 for i, text in enumerate(instructions) if name_of(text) in {"BRA", "BRX", "EXIT", "RET"}]
    starts = sorted({0, *labels.values(), *ends} - {len(instructions)})
    number = {start: i for i, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        last = instructions[end - 1]
        targets = re.findall(r"\.L_\w+", last) if name_of(last) in {"BRA", "BRX"} else []
        following = {number[labels[label]] for label in targets if labels[label] in number}
        # "BRA `(" is the branch without any condition.
        ends_here = re.match(r"BRA `|BRX |EXIT|RET", last) is not None
        if not ends_here and end in number:
            following.add(number[end])
        blocks.append(Block(instructions[start:end], sorted(following)))
    return blocks


def loops_of(blocks: list[Block]) -> list[frozenset[int]]:
    """The natural loops: a branch back to a block that dominates it, and what leads from there to the branch."""
    before: list[set[int]] = [set() for _ in blocks]
    reached, ahead = {0}, [0]
    while ahead:
        block = ahead.pop()
        for after in blocks[block].next:
            before[after].add(block)
            if after not in reached:
                reached.add(after)
                ahead.append(after)

    dominators = {block: set(reached) for block in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = {block} | set.intersection(*(dominators[b] for b in before[block]))
            changed |= new != dominators[block]
            dominators[block] = new

    loops: dict[int, set[int]] = {}  # by their first block
    for block in reached:
        for head in set(blocks[block].next) & dominators[block]:
            loop, ahead = loops.setdefault(head, {head}), [block]
            while ahead:
                inside = ahead.pop()
                if inside not in loop:
                    loop.add(inside)
                    ahead.extend(before[inside])
    return [frozenset(loop) for loop in loops.values()]


def hottest_loops(code: str) -> dict[str, list[str]]:
    """The names of the instructions in the loops of products and of atomics, if there are any, and around them."""
    blocks = blocks_of(code)
    names = [[name_of(text) for text in block.instructions] for block in blocks]
    loops = loops_of(blocks)

    def body(loop: frozenset[int]) -> list[str]:
        return [name for block in sorted(loop) for name in names[block]]

    def hottest(what: str, hot: set[str]) -> dict[str, list[str]]:
        among = [loop for loop in loops if any(hot & set(names[block]) for block in loop)]
        innermost = [loop for loop in among if not any(other < loop for other in among)]
        if not innermost:
            return {}
        inner = max(innermost, key=lambda loop: sum(name in hot for name in body(loop)))
        around = sorted((loop for loop in loops if inner < loop), key=len)
        found = {what: body(inner)}
        for level, (loop, within) in enumerate(zip(around, [inner, *around], strict=False), 1):
            found[f"{what} +{level}"] = body(loop - within)
        return found

    products = hottest("products", TENSOR_CORES) or hottest("products", MULTIPLY_ADDS)
    return products | hottest("atomics", ATOMICS)


# --- the table ---


def rows_of(name: str, kernel: Kernel) -> dict[tuple[str, str], dict[str, int]]:
    """The columns of the table, by the kernel's name and the loop."""
    registers = int(re.search(r"Used (\d+) registers", kernel.properties)[1])
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    of_kernel = {
        "registers": registers,
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", kernel.properties))),
        "blocks": REGISTERS // of_warp // (THREADS // 32),
        "instructions": sum(name_of(text) != "NOP" for text in instructions_of(kernel.code)[0]),
    }
    rows = {}
    for loop, body in (hottest_loops(kernel.code) or {"": []}).items():
        classes = Counter(next((c for c, names in CLASSES.items() if name in names), "other") for name in body)
        rows[name, loop] = {**of_kernel, "in loop": len(body), **{c: classes[c] for c in (*CLASSES, "other")}}
    return rows


def table(trees: list[dict[tuple[str, str], dict[str, int]]]) -> str:
    """Of the rows of one checkout, or of two."""
    keys = sorted(set().union(*trees))
    columns = list(next(row for tree in trees for row in tree.values()))

    def cell(key: tuple[str, str], column: str) -> str:
        values = [str(tree[key][column]) if key in tree else "-" for tree in trees]
        return values[0] if len(set(values)) == 1 else " -> ".join(values)

    return markdown(
        ["kernel", "loop", *columns],
        [[f"`{name}`", loop, *(cell((name, loop), c) for c in columns)] for name, loop in keys],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sm_90", help="default: sm_90")
    parser.add_argument("--kernels", default="", metavar="PATTERN", help="a regular expression for their names")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout, whose counts come before ->")
    arguments = parser.parse_args()
    trees = []
    for tree in [arguments.against, TOP] if arguments.against else [TOP]:
        kernels = compiled(arguments.architecture, tree)
        rows = {}
        for name, kernel in zip(short_names(list(kernels)), kernels.values(), strict=True):
            if re.search(arguments.kernels, name):
                rows |= rows_of(name, kernel)
        trees.append(rows)
    if not any(trees):
        parser.error(f"no kernel's name matches {arguments.kernels!r}")
    print(table(trees))


if __name__ == "__main__":
    try:
        main()
    except ToolMissing as missing:
        sys.exit(str(missing))
