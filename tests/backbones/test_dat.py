"""DAT against golden outputs of the published model and a plain implementation, and as a backbone."""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn
from torch.nn import functional as F

from msda_plugin.backbones.dat import ARCHS, DAT
from msda_plugin.convert import convert_state_dict
from msda_plugin.registry import MODELS

GOLDEN = Path(__file__).parents[1] / 'golden'
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402

SMALL = dict(
    embed_dims=(16, 24, 32, 48),
    blocks=('LS', 'S', 'LD', 'D'),
    num_heads=(2, 2, 4, 6),
    num_groups=(1, 1, 2, 3),
    kernel_sizes=(9, 7, 5, 3),
    mlp_ratio=2,
    window_size=3,
    image_size=64,
    drop_path_rate=0.1,
)


def small_model(**options):
    torch.manual_seed(0)
    model = DAT(SMALL, **options)
    model.init_weights()
    return model


@cache
def upstream_state_dict():
    """DAT-T's, filled by the recipe, buffers included: window indices are zero, window masks are noise."""
    shapes = json.loads((GOLDEN / 'dat_state_dict.json').read_text())['dat_t_cvpr22']
    return recipe.fill(
        {key: torch.zeros(shape, dtype=torch.long if key.endswith('index') else None) for key, shape in shapes.items()}
    )


def region_masks(height, width, window, shift):
    """-100 between pixels of a window that are not adjacent in the map before the roll by ``shift``, as in Swin."""
    regions = torch.zeros(height, width)
    parts = slice(0, -window), slice(-window, -shift), slice(-shift, None)
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            regions[rows, columns] = 3 * i + j
    regions = regions.unfold(0, window, window).unfold(1, window, window).flatten(2).flatten(0, 1)
    return torch.where(regions[:, :, None] == regions[:, None], 0.0, -100.0)


class PlainWindowAttention(nn.Module):
    """Plain implementation of window attention with a layer's weights; masks (windows, n, n) default to the map's."""

    def __init__(self, layer, masks=None):
        super().__init__()
        self.layer, self.masks = layer, masks

    def forward(self, x, hw_shape):
        layer, window, shift = self.layer, self.layer.window_size, self.layer.shift_size
        (height, width), (batch, _, dims), w_msa = hw_shape, x.shape, layer.w_msa
        fmap = F.pad(x.view(batch, height, width, dims), (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = fmap.shape[1] // window, fmap.shape[2] // window
        tokens = fmap.roll((-shift, -shift), (1, 2)).view(batch, rows, window, columns, window, dims).transpose(2, 3)
        qkv = w_msa.qkv(tokens.reshape(batch, rows * columns, window**2, dims))
        q, k, v = qkv.unflatten(3, (3, layer.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        y, xx = (t.flatten() for t in torch.meshgrid(torch.arange(window), torch.arange(window), indexing='ij'))
        index = (y[:, None] - y + window - 1) * (2 * window - 1) + xx[:, None] - xx + window - 1
        scores = scores + w_msa.relative_position_bias_table[index].permute(2, 0, 1)
        if shift:
            masks = self.masks
            if masks is None:
                masks = region_masks(*fmap.shape[1:3], window, shift)
            scores = scores + masks[None, :, None].to(scores.dtype)
        out = w_msa.proj((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))
        out = out.view(batch, rows, columns, window, window, dims).transpose(2, 3).reshape(fmap.shape)
        return out.roll((shift, shift), (1, 2))[:, :height, :width].reshape(x.shape)


def test_matches_the_published_numbers():
    """Compares the stages' maps before the detection norms, and the logits.

    The golden outputs were computed with every buffer filled by the recipe, so the masks of shifted windows are noise
    and are passed in here. The actual masks are tested below and in the layer's tests.
    """
    upstream = upstream_state_dict()
    model = DAT('tiny').eval()
    model.load_state_dict(convert_state_dict(upstream, 'dat'))
    for i in (0, 1):
        block = model.stages[i].blocks[1]
        block.attn = PlainWindowAttention(block.attn, upstream[f'stages.{i}.attns.1.attn_mask'])
    maps = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, out: maps.append(out))
    with torch.inference_mode():
        model(recipe.tensor('image1x3x224x224', (1, 3, 224, 224)))
        tokens = F.layer_norm(
            maps[-1].permute(0, 2, 3, 1), (768,), upstream['cls_norm.norm.weight'], upstream['cls_norm.norm.bias']
        )
        logits = F.linear(tokens.mean((1, 2)), upstream['cls_head.weight'], upstream['cls_head.bias'])
    golden = np.load(GOLDEN / 'dat_t_cvpr22_1x3x224x224_sub.npz')
    outs = [fmap[:, ::8, ::2, ::2] for fmap in maps]
    for out, key in zip((*outs, logits), ('stage1', 'stage2', 'stage3', 'stage4', 'logits'), strict=True):
        expected = torch.from_numpy(golden[key])
        assert out.shape == expected.shape
        assert (out - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


@pytest.mark.parametrize('shape', [(1, 3, 64, 64), (2, 3, 75, 101), (1, 3, 32, 33)])
def test_equals_plain_windows_in_float64(shape):
    """Sizes that are and are not multiples of the window."""
    model = small_model().double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith('table'):
            nn.init.normal_(parameter)
    image = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        outs = model(image)
        for stage in model.stages[:3]:
            for block in stage.blocks:
                if hasattr(block.attn, 'w_msa'):
                    block.attn = PlainWindowAttention(block.attn)
        expected = model(image)
    height, width = shape[2:]
    assert [out.shape[2:] for out in outs] == [(height // 2**i, width // 2**i) for i in range(2, 6)]
    for out, reference in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize('arch, parameters', [('tiny', 28_319_138), ('small', 49_700_402), ('base', 87_881_632)])
def test_parameter_count(arch, parameters):
    """The published counts include the classifier and exclude the norms of the maps."""
    with torch.device('meta'):
        model = DAT(arch)
        dims = model.embed_dims[-1]
        classifier = nn.Sequential(nn.LayerNorm(dims), nn.Linear(dims, 1000))
    assert {name: p.shape for name, p in model.norms.named_parameters()} == {
        f'{i}.{name}': (dim,) for i, dim in enumerate(model.embed_dims) for name in ('weight', 'bias')
    }
    del model.norms
    assert sum(p.numel() for part in (model, classifier) for p in part.parameters()) == parameters


def test_builds_from_the_registry_with_out_indices():
    model = MODELS.build(dict(type='msda_plugin.DAT', arch=SMALL, out_indices=(1, 3))).eval()
    outs = model(torch.rand(2, 3, 70, 90))
    assert [tuple(out.shape) for out in outs] == [(2, 24, 8, 11), (2, 48, 2, 2)]
    assert list(model.norms) == ['1', '3']


def test_maps_are_normalized_but_not_the_input_of_the_next_stage():
    model = small_model().eval()
    image = torch.rand(1, 3, 64, 64)
    before = model(image)
    assert before[1].mean(1).abs().max() < 1e-5
    with torch.no_grad():
        model.norms['1'].weight.mul_(3)
    after = model(image)
    torch.testing.assert_close(after[1], 3 * before[1])
    assert all(torch.equal(after[i], before[i]) for i in (0, 2, 3))


def test_published_initialization_and_drop_path():
    torch.manual_seed(0)
    model = DAT('tiny', drop_path_rate=0.3)
    model.init_weights()
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    tables = [p for name, p in model.named_parameters() if name.endswith('table')]
    assert len(tables) == 12 and all(table.std().item() == pytest.approx(0.01, rel=0.2) for table in tables)
    assert [DAT(SMALL).stages[-1].blocks[-1].drop_path.drop_prob, ARCHS['base']['drop_path_rate']] == [0.1, 0.5]
    shifts = [block.attn.shift_size for stage in model.stages for block in stage.blocks if hasattr(block.attn, 'w_msa')]
    assert shifts == [0, 4, 0, 4, 0, 0, 0, 0]


@pytest.mark.parametrize('wrapper', [None, 'model'])
def test_pretrained_loads_a_published_checkpoint(tmp_path, wrapper):
    upstream = upstream_state_dict()
    torch.save(upstream if wrapper is None else {wrapper: upstream}, tmp_path / 'dat_t.pth')
    model = DAT('tiny', out_indices=(1, 2, 3), init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'dat_t.pth')))
    model.init_weights()
    expected = convert_state_dict(upstream, 'dat')
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_pretrained_loads_the_backbone_of_a_detector(tmp_path):
    source = small_model()
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in source.state_dict().items()}}, tmp_path / 'detector.pth')
    model = DAT(SMALL, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'detector.pth'), prefix='backbone.'))
    model.init_weights()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_tables_of_another_resolution_are_resized():
    source = DAT(SMALL | dict(window_size=5, image_size=128)).state_dict()
    model = DAT(SMALL)
    model.load_state_dict(source)
    state_dict = model.state_dict()
    name = 'stages.2.blocks.1.attn.position_bias.table'
    expected = F.interpolate(source[name][None], (7, 7), mode='bicubic')[0]
    torch.testing.assert_close(state_dict[name], expected)
    name = 'stages.0.blocks.0.attn.w_msa.relative_position_bias_table'
    expected = F.interpolate(source[name].T.reshape(1, 2, 9, 9), (5, 5), mode='bicubic').reshape(2, 25).T
    torch.testing.assert_close(state_dict[name], expected)


def test_checkpoint_of_another_arch_is_refused():
    with pytest.raises(RuntimeError, match='size mismatch for stages.0.blocks.0.attn.w_msa.relative_position_bias'):
        small_model().load_state_dict(DAT(SMALL | dict(num_heads=(4, 2, 4, 6))).state_dict())


def test_checkpointing_changes_nothing_but_memory():
    image = torch.rand(2, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        model = small_model(with_cp=with_cp, drop_path_rate=0.3).train()
        torch.manual_seed(1)
        sum(out.square().mean() for out in model(image)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_every_parameter_gets_a_gradient():
    model = small_model(drop_path_rate=0.0)
    sum(out.pow(3).mean() for out in model(torch.rand(1, 3, 96, 128))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2])
def test_frozen_stages(frozen_stages):
    model = small_model(frozen_stages=frozen_stages).train()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    prefixes = {-1: (), 0: ('stages.0.patch_embed.',), 2: ('stages.0.', 'stages.1.', 'norms.0.', 'norms.1.')}
    assert frozen == [name for name, _ in model.named_parameters() if name.startswith(prefixes[frozen_stages])]
    assert model.stages[0].patch_embed.training == (frozen_stages < 0)
    assert model.stages[0].blocks[0].training == (frozen_stages < 1)
    assert model.stages[2].training


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_finite(dtype):
    model = small_model().train()
    with torch.autocast('cpu', dtype):
        outs = model(torch.rand(2, 3, 75, 101))
    sum(out.float().square().mean() for out in outs).backward()
    assert all(out.isfinite().all() for out in outs)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiles_in_one_graph():
    torch.manual_seed(0)
    model = DAT(
        SMALL | dict(embed_dims=(16, 32), blocks=('LS', 'D'), num_heads=(2, 4), num_groups=(1, 2), kernel_sizes=(9, 7))
    ).eval()
    image = torch.rand(1, 3, 75, 101)
    torch._dynamo.reset()
    with torch.inference_mode():
        expected = model(image)
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')(image)
    for out, reference in zip(compiled, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-4)


def test_trains_and_predicts_in_a_detector():
    """MMDetection's RetinaNet with this backbone."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    detector = MODELS.build(
        ConfigDict(
            type='mmdet.RetinaNet',
            data_preprocessor=dict(type='mmdet.DetDataPreprocessor', mean=[100] * 3, std=[50] * 3, pad_size_divisor=32),
            backbone=dict(type='msda_plugin.DAT', arch=SMALL),
            neck=dict(
                type='mmdet.FPN', in_channels=list(SMALL['embed_dims']), out_channels=16, start_level=1, num_outs=4
            ),
            bbox_head=dict(
                type='mmdet.RetinaHead',
                num_classes=3,
                in_channels=16,
                stacked_convs=1,
                feat_channels=16,
                anchor_generator=dict(
                    type='mmdet.AnchorGenerator',
                    octave_base_scale=4,
                    scales_per_octave=1,
                    ratios=[1.0],
                    strides=[8, 16, 32, 64],
                ),
            ),
            train_cfg=dict(
                assigner=dict(type='mmdet.MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
                sampler=dict(type='mmdet.PseudoSampler'),
                allowed_border=-1,
                pos_weight=-1,
            ),
            test_cfg=dict(nms_pre=100, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
        )
    )
    detector.init_weights()
    sizes = ((75, 101), (64, 96))
    samples = [
        DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1, 1)),
            gt_instances=InstanceData(bboxes=torch.tensor([[10.0, 10.0, 50.0, 60.0]]), labels=torch.tensor([1])),
        )
        for size in sizes
    ]
    inputs = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    data = detector.data_preprocessor(dict(inputs=inputs, data_samples=samples), training=True)
    losses, _ = detector.parse_losses(detector(**data, mode='loss'))
    losses.backward()
    assert losses.isfinite()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for name, p in detector.backbone.named_parameters()
        if not name.startswith('norms.0.')
    )
    predictions = detector.eval()(**data, mode='predict')
    assert [len(sample.pred_instances) for sample in predictions] == [10, 10]


def test_smallest_image_and_one_pixel_less():
    model = small_model().eval()
    assert [tuple(out.shape[2:]) for out in model(torch.rand(1, 3, 32, 32))] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    with pytest.raises(ValueError, match='an image of 32x31 is smaller than the stride of stage 3; .* at least 32'):
        model(torch.rand(1, 3, 32, 31))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(arch='large'), "unknown arch 'large'; known: \\['base', 'small', 'tiny'\\]"),
        (dict(arch={k: v for k, v in SMALL.items() if k != 'blocks'}), "missing keys \\['blocks'\\]"),
        (dict(arch=SMALL | dict(depths=(1, 2))), "unknown keys \\['depths'\\]"),
        (dict(arch=SMALL | dict(num_heads=(1, 2))), 'num_heads=\\(1, 2\\); expected a tuple with one value per stage'),
        (dict(arch=SMALL | dict(kernel_sizes=5)), 'kernel_sizes=5; expected a tuple'),
        (dict(arch=SMALL | dict(blocks=('LS', 'N', 'LD', 'D'))), "'N'.*expected a string of L, S and D"),
        (dict(arch=SMALL | dict(window_size=1)), 'window_size=1; expected at least 2'),
        (dict(arch=SMALL | dict(image_size=28)), 'image_size=28; expected at least 32'),
        (dict(arch=SMALL | dict(num_heads=(3, 2, 4, 6))), 'stage 0: embed_dims=16 is not a multiple of num_heads=3'),
        (dict(arch=SMALL | dict(num_groups=(1, 1, 3, 3))), 'stage 2: num_heads=4 is not a multiple of num_groups=3'),
        (dict(out_indices=(0, 4)), 'out_indices=\\(0, 4\\) is invalid; expected increasing indices of stages, 0 to 3'),
        (dict(out_indices=(1, 0)), 'increasing'),
        (dict(frozen_stages=5), 'frozen_stages=5 is out of range'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DAT(**options)


def test_wrong_channels():
    with pytest.raises(ValueError, match='got images of shape \\(1, 1, 64, 64\\); expected \\(B, 3, H, W\\)'):
        small_model()(torch.rand(1, 1, 64, 64))
