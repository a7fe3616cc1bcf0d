"""The data-parallel example: two processes train what one does."""

import numpy as np
from support.processes import run_example


def test_two_processes_train_the_network_of_one(tmp_path):
    """Sums of float32 in another order differ by rounding, which some steps of training make somewhat larger."""
    runs = []
    for processes in 1, 2:
        output = tmp_path / f"{processes}.npz"
        printed = run_example("train_distributed", f"--processes={processes}", "--steps=8", f"--output={output}")
        assert f"{processes} processes, {processes} devices" in printed
        with np.load(output) as file:
            runs.append(dict(file))
    one, two = runs
    assert one.keys() == two.keys()
    assert len(one["losses"]) == 8 and one["losses"][-1] < one["losses"][0]
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-4 * np.abs(one[name]).max(), err_msg=name)
