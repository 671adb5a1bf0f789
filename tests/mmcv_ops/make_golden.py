"""Write tests/golden/mmcv_ops.npz: the results of mmcv's compiled operators for the cases of operator_cases.py.

Run it where mmcv has compiled operators: ``python tests/mmcv_ops/make_golden.py``.
"""

import importlib.util
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
GOLDEN = HERE.parent / 'golden' / 'mmcv_ops.npz'


def main() -> None:
    import mmcv._ext as ext

    if ext.__file__.endswith('.py'):
        raise SystemExit(f'{ext.__file__} is not compiled; compile mmcv first')
    spec = importlib.util.spec_from_file_location('operator_cases', HERE / 'operator_cases.py')
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    arrays = {}
    for name, run in cases.CASES.items():
        for output, value in run(ext).items():
            # Computed in float64 where mmcv has it; float32 keeps the file small and is exact to 1e-7.
            arrays[f'{name}/{output}'] = (value.float() if value.is_floating_point() else value.int()).numpy()
    np.savez_compressed(GOLDEN, **arrays)
    print(f'{GOLDEN}: {len(cases.CASES)} cases, {GOLDEN.stat().st_size / 1000:.0f} KB')


if __name__ == '__main__':
    main()
