"""Pictures of D-FINE's distributions of box edges, and the distributions that are recorded for them."""

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

from msda_plugin.heads.dfine_head import move_edges
from msda_plugin.visualization import draw_edges, record_attention

CONFIG = 'configs/shapes/dfine_hgnetv2-n_1xb4-8e_shapes.py'


def small_model(root):
    init_default_scope('mmdet')
    cfg = Config.fromfile(str(root / CONFIG)).model
    arch = dict(stem=(4, 4), inner=(4, 4, 8, 8), channels=(8, 16, 24, 32), blocks=(1, 1, 1, 1), layers=2)
    cfg.backbone.arch = arch
    cfg.neck.update(in_channels=[16, 24, 32], out_channels=32, num_heads=4, feedforward_channels=32)
    cfg.decoder.update(embed_dims=32, num_heads=4, feedforward_channels=32)
    cfg.bbox_head.embed_dims = 32
    torch.manual_seed(0)
    model = MODELS.build(cfg).eval()
    for branch in model.bbox_head.reg_branches[:-1]:
        torch.nn.init.normal_(branch[-1].weight)
    return model


def test_recorded_distributions_give_the_boxes_of_the_detections(pytestconfig):
    model = small_model(pytestconfig.rootpath)
    initial = []
    model.decoder.register_forward_hook(lambda _, __, out: initial.append(out[3]))
    meta = dict(img_shape=(64, 96), ori_shape=(64, 96), batch_input_shape=(64, 96), scale_factor=(1.0, 1.0))
    with record_attention(model) as recording, torch.no_grad():
        (sample,) = model.predict(torch.rand(1, 3, 64, 96), [DetDataSample(metainfo=meta)])
    probabilities = recording.edges_of(0, sample)
    assert probabilities.shape == (3, 4, 33) and np.allclose(probabilities.sum(-1), 1)
    query = recording.query_of(0, sample)
    distances = torch.from_numpy(probabilities[-1] @ recording.edge_distances).float() * model.bbox_head.reg_scale
    box = move_edges(initial[0][0, query], distances, model.bbox_head.reg_scale)
    assert torch.allclose(box, recording.boxes[0, query], atol=1e-5)
    # The sampling points of the decoder are recorded as well.
    assert [record.name for record in recording.records] == [f'decoder.layers.{i}.cross_attn' for i in range(3)]


def test_picture_shows_every_layer():
    distances = np.linspace(-1, 1, 9)
    flat = np.full((1, 4, 9), 1 / 9)
    sharp = np.zeros((1, 4, 9))
    sharp[..., 2] = 1
    one, two = draw_edges(flat, distances), draw_edges(np.concatenate([flat, sharp]), distances, title='a box')
    assert one.shape[2] == 3 and one.dtype == np.uint8
    assert one.shape == two.shape and (one != two).any()


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r'expected \(num_layers, 4, num_bins\) and \(num_bins,\)'):
        draw_edges(np.zeros((2, 4, 9)), np.zeros(8))
