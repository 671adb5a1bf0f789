"""Runs the compiled CPU kernels on odd sizes, in a separate process for sanitizers."""

import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from operator_cases import make_case  # noqa: E402

from msda_plugin.ops import backend_for  # noqa: E402


def main() -> None:
    assert backend_for('cpu', torch.float32).name == 'cpu', backend_for('cpu', torch.float32)
    sizes = list(
        itertools.product((1, 7, 8, 16, 33, 71), (1, 3, 70, [2, 5, 1], [70, 1, 2]), (0, 1, 50), (0, 1, 2), (2, 4))
    )
    for head_dim, points, queries, batch, reference_size in random.Random(0).sample(sizes, 45):
        for dtype, coordinates in (
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float16),
        ):
            case = make_case(
                head_dim=head_dim, points=points, queries=queries, batch=batch, reference_size=reference_size
            )
            levels = (torch.tensor(case.shapes), torch.tensor([0, 35, 41]))
            value = case.value.to(dtype)
            if case.locations.numel():
                case.locations.view(-1)[0] = float('nan')
            for name, rest in (('ms_deform_attn', case.plain()[1:]), ('ms_deform_attn_fused', case.fused()[1:])):
                rest = [t.to(coordinates) for t in rest]
                rest += [True, case.num_points or []]
                output = getattr(torch.ops.msda, name)(value, *levels, *rest)
                getattr(torch.ops.msda, f'{name}_backward')(output, value, *levels, *rest)


main()
