"""The harness finds the faults it is there for, in small kernels and in the real ones."""

import numpy as np
import on_cpu
import pytest
from cases import Case

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
    "misaligned": "not aligned",
    "beyond_global": "heap-buffer-overflow",
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
