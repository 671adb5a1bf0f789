"""Importing msda_plugin.auto, as custom_imports in a config do, makes mmcv's layer run msda_plugin's operator."""

import importlib
import subprocess
import sys

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention as StockAttention
from mmengine.logging import MMLogger

import msda_plugin
from msda_plugin.acceleration import mmcv_models
from msda_plugin.layers import MultiScaleDeformableAttention

FIELDS = dict(embed_dims=32, num_heads=4, num_levels=2, num_points=2, batch_first=True)


class RenamedAttention(StockAttention):
    """A subclass that inherits mmcv's forward."""


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: said.append(record.getMessage()))
    return said


@pytest.fixture
def auto(lines):
    module = importlib.import_module('msda_plugin.auto')
    module.install()
    yield module
    module.uninstall()


def inputs():
    generator = torch.Generator().manual_seed(1)
    return dict(
        query=torch.rand(2, 7, 32, generator=generator),
        value=torch.rand(2, 60, 32, generator=generator),
        reference_points=torch.rand(2, 7, 2, 2, generator=generator),
        spatial_shapes=torch.tensor([(6, 8), (3, 4)]),
        level_start_index=torch.tensor([0, 48]),
    )


@pytest.mark.parametrize('layer_class', [StockAttention, RenamedAttention])
def test_mmcv_layer_runs_the_operator_until_uninstalled(auto, layer_class, monkeypatch):
    torch.manual_seed(0)
    layer = layer_class(**FIELDS).eval()
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
    calls = []
    fused = torch.ops.msda.ms_deform_attn_fused
    monkeypatch.setattr(
        'msda_plugin.layers.multi_scale_deformable_attention.ms_deform_attn_fused',
        lambda *args: calls.append(1) or fused(*args, False, []),
    )
    output = layer(**inputs())
    assert calls == [1]
    auto.uninstall()
    assert StockAttention.forward is mmcv_models.STOCK_FORWARD
    torch.testing.assert_close(output, layer(**inputs()), rtol=1e-5, atol=1e-5)
    assert calls == [1]


def test_logs_once(auto, lines):
    auto.install()
    importlib.reload(auto)
    assert len(lines) <= 1  # none if it had been imported before this test
    auto.uninstall()
    lines.clear()
    auto.install()
    [line] = lines
    assert "now runs msda_plugin's operator" in line and 'backend on cpu: cpu (compiled kernels' in line


def test_works_with_accelerate_and_restore(auto):
    layer = StockAttention(**FIELDS).eval()
    expected = layer(**inputs())
    assert msda_plugin.accelerate(layer) == 1 and isinstance(layer, MultiScaleDeformableAttention)
    assert torch.equal(layer(**inputs()), expected)
    assert msda_plugin.restore(layer) == 1 and type(layer) is StockAttention


def test_custom_imports_of_a_config(tiny_stock_config):
    """A stock config with MMDetection's inferencer, which runs no hooks, in a new process."""
    tiny_stock_config.write_text(
        "custom_imports = dict(imports=['msda_plugin.auto'])\n" + tiny_stock_config.read_text()
    )
    code = f"""
import numpy, torch
torch.set_num_threads(1)
from mmdet.apis import DetInferencer
inferencer = DetInferencer({str(tiny_stock_config)!r}, device='cpu', show_progress=False)
calls = []
from msda_plugin.layers import multi_scale_deformable_attention as layer
fused = layer.ms_deform_attn_fused
layer.ms_deform_attn_fused = lambda *args: calls.append(1) or fused(*args)
inferencer(numpy.zeros((64, 64, 3), numpy.uint8))
print('layers that ran the operator:', len(calls))
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'layers that ran the operator: 4' in done.stdout
    assert (done.stdout + done.stderr).count("now runs msda_plugin's operator") == 1
