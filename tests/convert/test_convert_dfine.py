"""Conversion of the published checkpoints of D-FINE, of its backbone, and of transformers' models."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from msda_plugin.backbones.hgnetv2 import HGNetV2
from msda_plugin.convert import convert, convert_state_dict

ROOT = Path(__file__).resolve().parents[2]
STATE_DICTS = json.loads(gzip.decompress((ROOT / 'tests' / 'golden' / 'dfine_state_dicts.json.gz').read_bytes()))
CONFIGS = {path.stem.split('-')[1].split('_')[0]: path for path in (ROOT / 'configs' / 'dfine').glob('*.py')}
FAMILY = 'dfine'


def upstream(size):
    values = {key: torch.empty(shape, device='meta') for key, shape in STATE_DICTS[size].items()}
    scale = 8.0 if size == 'x' else 4.0
    return {
        key: torch.tensor([0.5]) if key.endswith('.up') else torch.tensor([scale]) if key.endswith('reg_scale') else v
        for key, v in values.items()
    }


def shapes(state_dict):
    # Frozen batch norms of the authors have no counter.
    return {k: tuple(v.shape) for k, v in state_dict.items() if not k.endswith('num_batches_tracked')}


def model_on_meta(size):
    init_default_scope('mmdet')
    with torch.device('meta'):
        return MODELS.build(Config.fromfile(str(CONFIGS[size])).model)


@pytest.mark.parametrize('size', 'nsmlx')
def test_every_key_of_the_published_sizes_is_converted(size):
    checkpoint = upstream(size)
    conversion = convert({'model': checkpoint}, FAMILY)
    assert shapes(conversion.state_dict) == shapes(model_on_meta(size).state_dict())
    assert conversion.taken.keys() | conversion.dropped.keys() == checkpoint.keys()
    assert {key.rpartition('.')[2] for key in conversion.dropped} == {'num_points_scale', 'up', 'reg_scale'}
    assert conversion.state_dict['bbox_head.reg_scale'] == (8 if size == 'x' else 4)


def test_bins_follow_from_the_scales_of_the_checkpoint():
    checkpoint = upstream('n')
    values = convert_state_dict(checkpoint, FAMILY)['bbox_head.bin_values']
    assert values.max() == 4
    checkpoint['decoder.up'] = torch.tensor([1.0])
    assert convert_state_dict(checkpoint, FAMILY)['bbox_head.bin_values'].max() == 8


def test_tables_for_one_size_of_images_are_dropped():
    # The authors' training stores them.
    tables = {key: torch.empty(1) for key in ('decoder.anchors', 'decoder.valid_mask')}
    conversion = convert(upstream('n') | tables, FAMILY)
    assert tables.keys() <= conversion.dropped.keys()


def test_averaged_weights_of_a_training_checkpoint_are_taken():
    model, averaged = upstream('n'), upstream('n')
    averaged['decoder.up'] = torch.tensor([1.0])
    converted = convert_state_dict({'model': model, 'ema': {'module': averaged, 'updates': 3}}, FAMILY)
    assert converted['bbox_head.bin_values'].max() == 8


def test_converted_state_dicts_are_returned_unchanged():
    converted = convert_state_dict(upstream('n'), FAMILY)
    assert convert_state_dict(converted, FAMILY) == converted


def test_missing_and_unexpected_keys_are_named():
    checkpoint = upstream('n')
    checkpoint = {key: value for key, value in checkpoint.items() if not key.startswith('decoder.dec_bbox_head.1.')}
    del checkpoint['decoder.up']
    checkpoint['decoder.extra'] = torch.empty(1)
    with pytest.raises(
        ValueError,
        match=r"missing keys \['decoder.up', 'bbox_head.reg_branches.1.\*'\], unexpected keys \['decoder.extra'\]",
    ):
        convert_state_dict(checkpoint, FAMILY)


def test_backbone_weights_of_the_authors_load(tmp_path):
    weights = {
        key.removeprefix('backbone.'): torch.rand(shape)
        for key, shape in STATE_DICTS['s'].items()
        if key.startswith('backbone.') and not key.endswith('num_batches_tracked')
    }
    torch.save(weights, tmp_path / 'PPHGNetV2_B0_stage1.pth')
    backbone = HGNetV2(
        'B0', use_lab=True, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'PPHGNetV2_B0_stage1.pth'))
    )
    backbone.init_weights()
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items() if key in weights)


def test_model_of_transformers_gives_the_same_outputs():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    backbone = transformers.HGNetV2Config(
        out_indices=[3, 4],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[4, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 40],
        hidden_sizes=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        use_learnable_affine_block=True,
    )
    theirs = transformers.DFineForObjectDetection(
        transformers.DFineConfig(
            backbone_config=backbone,
            num_labels=5,
            num_queries=20,
            encoder_in_channels=[32, 40],
            feat_strides=[16, 32],
            encode_proj_layers=[1],
            encoder_hidden_dim=32,
            encoder_ffn_dim=48,
            encoder_attention_heads=4,
            hidden_expansion=0.5,
            depth_mult=0.34,
            decoder_in_channels=[32, 32],
            d_model=32,
            decoder_ffn_dim=48,
            decoder_attention_heads=4,
            num_feature_levels=2,
            decoder_layers=2,
            decoder_n_points=[3, 5],
        )
    )
    with torch.no_grad():
        for name, value in (*theirs.named_parameters(), *theirs.named_buffers()):
            if name.endswith('running_var'):
                value.uniform_(0.5, 1.5)
            elif not name.endswith(('num_points_scale', '.up', 'reg_scale', 'tracked')):
                value.copy_(torch.randn_like(value) * 0.1 + (value.dim() == 1 and 'bias' not in name))
    conversion = convert(theirs.state_dict(), FAMILY)
    assert conversion.taken.keys() | conversion.dropped.keys() == theirs.state_dict().keys()

    init_default_scope('mmdet')
    cfg = Config.fromfile(str(CONFIGS['n'])).model
    del cfg.backbone['init_cfg'], cfg.data_preprocessor['batch_augments']
    arch = dict(stem=(8, 8), inner=(4, 8, 8, 8), channels=(16, 24, 32, 40), blocks=(1, 1, 2, 1), layers=2)
    cfg.backbone.arch = arch
    cfg.neck.update(
        in_channels=[32, 40], out_channels=32, feedforward_channels=48, num_heads=4, expansion=0.5, num_blocks=1
    )
    cfg.decoder.update(num_layers=2, embed_dims=32, num_heads=4, feedforward_channels=48, num_points=[3, 5])
    cfg.bbox_head.update(num_classes=5, embed_dims=32)
    cfg.update(num_queries=20, test_cfg=dict(max_per_img=20))
    ours = MODELS.build(cfg)
    missing, unexpected = ours.load_state_dict(conversion.state_dict, strict=False)
    assert not unexpected and not [key for key in missing if not key.endswith('num_batches_tracked')]
    image = torch.rand(2, 3, 96, 160).double()
    theirs, ours = theirs.double().eval(), ours.double().eval()
    outs = theirs(image)
    logits, boxes = ours(image, mode='tensor')
    for out, expected in ((logits[-1], outs.logits), (boxes[-1], outs.pred_boxes)):
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    (outs.logits.square().sum() + outs.pred_boxes.sum()).backward()
    (logits.square().sum() + boxes.sum()).backward()
    gradients = dict(theirs.named_parameters())
    compared = 0
    for key, new_key in conversion.taken.items():
        value = dict(ours.named_parameters()).get(new_key)
        if value is None or key not in gradients or gradients[key].grad is None or value.shape != gradients[key].shape:
            continue
        compared += 1
        expected = gradients[key].grad
        assert (value.grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-9, key
    assert compared > 150
