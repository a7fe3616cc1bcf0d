"""The data-parallel example: two processes train what one does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_two_processes_train_the_network_of_one(tmp_path):
    """Sums of float32 in another order differ by rounding, which some steps of training make somewhat larger."""
    runs = []
    for processes in 1, 2:
        output = tmp_path / f"{processes}.npz"
        done = subprocess.run(
            [
                sys.executable,
                EXAMPLES / "train_distributed.py",
                f"--processes={processes}",
                "--steps=8",
                f"--output={output}",
            ],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            cwd=Path(sys.executable).parent,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert f"{processes} processes, {processes} devices" in done.stdout
        with np.load(output) as file:
            runs.append(dict(file))
    one, two = runs
    assert one.keys() == two.keys()
    assert len(one["losses"]) == 8 and one["losses"][-1] < one["losses"][0]
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-4 * np.abs(one[name]).max(), err_msg=name)
