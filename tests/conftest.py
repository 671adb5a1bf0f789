import pytest
import torch

# The tensors of the tests are small: more threads only wait for each other, very long on a machine that is busy.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        '--long',
        action='store_true',
        help='the long form of tests/reliability: more cases, kills and iterations, hours instead of minutes',
    )


@pytest.fixture
def long_run(request):
    """Whether the long form was asked for; a test has a number for each and prints what it did (see it with -s)."""
    return request.config.getoption('--long')


TINY_STOCK_CONFIG = """
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
model = dict(
    num_queries=20,
    backbone=dict(depth=18, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64], out_channels=32),
    encoder=dict(num_layers=2, layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32), ffn_cfg=dict(embed_dims=32, feedforward_channels=64))),
    decoder=dict(num_layers=2, layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32), cross_attn_cfg=dict(embed_dims=32),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=64))),
    positional_encoding=dict(num_feats=16),
    bbox_head=dict(embed_dims=32, num_classes=6),
    test_cfg=dict(max_per_img=10))
"""


@pytest.fixture
def tiny_stock_config(tmp_path):
    """The path of MMDetection's Deformable DETR config, made small: 4 attention layers of 32 channels, 6 classes."""
    path = tmp_path / 'tiny_stock.py'
    path.write_text(TINY_STOCK_CONFIG)
    return path
