"""Makes parts.npz with torch: python tests/data/make_parts.py"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import parts_golden, torch_parts


def main():
    arrays, shapes = {}, {}
    for case in parts_golden.CASES:
        results, shapes[case] = torch_parts.compute(case)
        arrays.update({f"{case}/{key}": array for key, array in results.items()})
    np.savez_compressed(parts_golden.PATH, shapes=np.array(json.dumps(shapes)), **arrays)


if __name__ == "__main__":
    main()
