"""The benchmark of the operator compares like with like."""
import pytest
import torch

from msda_plugin.tools.benchmarks import op

SHAPE = op.Shape('', ((5, 6), (3, 2)), 2, 7, heads=2, head_dim=8)


@pytest.fixture
def inputs():
    return op.make_inputs(SHAPE, torch.device('cpu'))


def test_both_sides_of_the_table_compute_the_same(inputs):
    stock, ours = (op.call(form, SHAPE, inputs, True) for form in (op.mmcv_path(torch.device('cpu')), op.plain))
    assert len(ours) == 4
    for a, b in zip(stock, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_parts_and_the_fused_form_compute_the_same(inputs):
    levels = torch.tensor(SHAPE.levels)
    tensors = [inputs[name] for name in ('value', 'points', 'offsets', 'logits')]
    torch.testing.assert_close(op._parts(levels, *tensors), op._fused(levels, *tensors))


def test_the_first_of_the_calls_is_not_counted():
    calls = []
    timer = op.Timer(torch.device('cpu'), 3)
    seconds = timer(lambda: calls.append('a'), lambda: calls.append('b'))
    assert ''.join(calls) == 'aaaabbbb'
    assert len(seconds) == 2


def test_corner_bytes():
    # 2 images, 7 queries, 2 heads, 2 levels, 4 points, 4 corners, 8 channels of 4 bytes
    assert SHAPE.corner_bytes == 2 * 7 * 2 * 2 * 4 * 4 * 8 * 4
