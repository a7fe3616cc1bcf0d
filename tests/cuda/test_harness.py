"""The harness finds the faults it is there for, in small kernels and in the real ones."""

import on_cpu
import pytest
from support.cases import OPERANDS, Case

FAULTS = {
    "no_barrier": "without a barrier between|never written",
    "no_warp_barrier": "without a barrier between|never written",
    "warp_barrier_between_warps": "without a barrier between|never written",
    "no_barrier_before_write": "without a barrier between",
    "beyond_shared": "outside the 256 bytes of shared memory",
    "never_written": "never written",
    "no_wait": "while a CopyAsync16 writes it",
    "ended_thread": "thread 5 has ended",
    "divergent_barrier": r"is at SyncThreads, .* waits at SyncThreads",
    "divergent_shuffle": "waits at ShuffleXor.* waits at SyncThreads",
    "two_shuffles": "Shuffle.* waits at Shuffle",
    "two_barriers": "SyncWarp.* SyncThreads",
    "bank_conflict": "bank conflict",
    "misaligned": "not aligned",
    "beyond_global": "heap-buffer-overflow",
    "not_loaded": "that was not loaded",
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(programs, name, seed):
    with pytest.raises(on_cpu.Failure, match=FAULTS[name]):
        on_cpu.execute(programs / "harness_test", name, seed)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["sound", "products", "launches"])
def test_sound_kernels_pass(programs, name, seed):
    on_cpu.execute(programs / "harness_test", name, seed)


# Faults planted into the facilities while the real kernels run: the number of a Fault in device_on_cpu.h, which call
# of it in every block.
UNORDERED = "without a barrier between|never written|while a CopyAsync16|not all threads come"
PLANTED = {
    **{f"barrier_{n}": ((1, n), UNORDERED) for n in range(6)},
    "barrier_of_one": ((2, 1), f"{UNORDERED}|waits at SyncThreads"),
    **{f"wait_{n}": ((3, n), "while a CopyAsync16") for n in range(2)},
    "shared_address": ((4, 1), "are outside the .* bytes of shared memory"),
    "global_address": ((5, 0), "heap-buffer-overflow"),
}

# Where they are planted: a case, the wanted gradients, or None for the result, and the device. In "backward" it is one
# of several kernels that a fault is found in; the gradients of samples are of one kernel with barriers, which goes
# through its stages in a way of its own where shared memory is for all, for two or for one.
PLAIN = Case("plain", c_in=32, c_out=32, size=(9, 11))
SEVERAL_TABLES = Case("several_tables", c_in=8, c_out=32, kernel=(5, 5), padding=(2, 2), size=(9, 11))
GROUPS_OF_8 = Case("groups_of_8", c_in=128, c_out=128, groups=16, size=(9, 11))
SAMPLES = ("x", "offset", "mask")
PLACES = {
    "forward": (PLAIN, None, 0),
    "forward_several_tables": (SEVERAL_TABLES, None, 0),
    "forward_bundles": (GROUPS_OF_8, None, 0),
    "backward": (PLAIN, OPERANDS, 0),
    "samples_all_stages": (Case("all_stages", c_in=128, c_out=64, size=(9, 11)), SAMPLES, 0),
    "samples_two_stages": (Case("two_stages", c_in=32, c_out=288, size=(9, 11)), SAMPLES, 0),
    "samples_one_stage": (Case("one_stage", c_in=128, c_out=128, size=(9, 11)), SAMPLES, 1),
    "samples_bundles": (GROUPS_OF_8, SAMPLES, 0),
}


@pytest.mark.parametrize("mode", ["tf32", "bfloat16"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PLANTED)
def test_faults_in_the_kernels_are_found(programs, name, place, mode):
    fault, message = PLANTED[name]
    case, wanted, device = PLACES[place]
    operands = case.operands(on_cpu.dtype_of(mode))
    cotangent = case.cotangent(on_cpu.dtype_of(mode)) if wanted else None
    with pytest.raises(on_cpu.Failure, match=message):
        on_cpu.run(programs, case, mode, operands, cotangent, wanted or (), fault=fault, device=device)


# An access of a warp (what it does, the bytes of an element, the elements from one lane's to the next's, and how many
# lanes take part) and what is counted of it.
ACCESSES = {
    "16_bytes": (("write", 16, 1, 32), "shared", "Write16", (1, 4, 4)),
    "16_bytes_64_apart": (("write", 16, 4, 32), "shared", "Write16", (1, 16, 4)),
    "16_bytes_64_apart_8_lanes": (("write", 16, 4, 8), "shared", "Write16", (1, 4, 1)),
    "16_bytes_64_apart_2_lanes": (("write", 16, 4, 2), "shared", "Write16", (1, 1, 1)),
    "16_bytes_80_apart": (("write", 16, 5, 32), "shared", "Write16", (1, 4, 4)),
    "16_bytes_128_apart": (("read", 16, 8, 32), "shared", "Read16", (1, 32, 4)),
    "16_bytes_of_all": (("read", 16, 0, 32), "shared", "Read16", (1, 4, 4)),
    "8_bytes": (("write", 8, 1, 32), "shared", "Write8", (1, 2, 2)),
    "8_bytes_16_apart": (("read", 8, 2, 32), "shared", "Read8", (1, 4, 2)),
    "8_bytes_of_all": (("read", 8, 0, 32), "shared", "Read8", (1, 2, 2)),
    "4_bytes": (("write", 4, 1, 32), "shared", "Write4", (1, 1, 1)),
    "4_bytes_8_apart": (("read", 4, 2, 32), "shared", "Read4", (1, 2, 1)),
    "4_bytes_128_apart": (("write", 4, 32, 32), "shared", "Write4", (1, 32, 1)),
    "4_bytes_132_apart": (("write", 4, 33, 32), "shared", "Write4", (1, 1, 1)),
    "4_bytes_of_all": (("read", 4, 0, 32), "shared", "Read4", (1, 1, 1)),
    "2_bytes": (("write", 2, 1, 32), "shared", "Write2", (1, 1, 1)),
    "2_bytes_128_apart": (("write", 2, 64, 3), "shared", "Write2", (1, 3, 1)),
    "matrix": (("matrix", 16, 5, 32), "shared", "LoadMatrix4", (1, 4, 4)),
    "copy": (("copy", 16, 1, 32), "shared", "CopyAsync16", (1, 4, 4)),
    "copied_rows_64_apart": (("rows", 16, 4, 32), "shared", "CopyAsync16", (1, 4, 4)),
    "copied_rows_80_apart": (("rows", 16, 5, 32), "shared", "CopyAsync16", (1, 8, 4)),
    "copied_rows": (("rows", 16, 5, 32), "global", "CopyAsync16", (1, 4, 16)),
    "global": (("global", 16, 1, 32), "global", "LoadGlobal16", (1, 4, 16)),
    "global_128_apart": (("global", 16, 8, 32), "global", "LoadGlobal16", (1, 32, 32)),
    "global_64_apart": (("global", 8, 8, 32), "global", "LoadGlobal8", (1, 16, 32)),
    "atomic": (("atomic", 16, 0, 32), "global", "AtomicAdd4", (1, 1, 1)),
    "atomic_of_8_lanes": (("atomic", 16, 2, 8), "global", "AtomicAdd4", (1, 2, 8)),
    # Even lanes, odd ones; then eight, and all of them twice.
    "lanes_apart": (("apart", 4, 1, 32), "shared", "Write4", (5, 5, 5)),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ACCESSES)
def test_accesses_are_counted(programs, name, seed):
    (kind, *numbers), memory, counted, expected = ACCESSES[name]
    (kernel,) = on_cpu.counts(on_cpu.execute, programs / "harness_test", kind, seed, *numbers).values()
    assert kernel[memory][counted] == expected
