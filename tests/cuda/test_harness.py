"""The harness finds the faults it is there for, in small kernels and in the real ones."""

import on_cpu
import pytest
from support.cases import Case

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
# of it. A dropped barrier is one of several kernels' in the backward.
UNORDERED = "without a barrier between|never written|while a CopyAsync16|not all threads come"
PLANTED = {
    **{f"barrier_{n}": ((1, n), UNORDERED) for n in range(6)},
    "barrier_of_one": ((2, 1), UNORDERED),
    **{f"wait_{n}": ((3, n), "while a CopyAsync16") for n in range(2)},
    "shared_address": ((4, 1), "are outside the .* bytes of shared memory"),
    "global_address": ((5, 0), "heap-buffer-overflow"),
}


@pytest.mark.parametrize("mode", ["tf32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", PLANTED)
def test_faults_in_the_kernels_are_found(programs, name, backward, mode):
    fault, message = PLANTED[name]
    case = Case("planted", c_in=32, c_out=32, size=(9, 11))
    operands = case.operands(on_cpu.dtype_of(mode))
    cotangent = case.cotangent(on_cpu.dtype_of(mode)) if backward else None
    with pytest.raises(on_cpu.Failure, match=message):
        on_cpu.run(programs, case, mode, operands, cotangent, fault=fault)
