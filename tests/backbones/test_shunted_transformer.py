"""Shunted Transformer against golden outputs of the published model, and as a backbone."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from msda_plugin.backbones.shunted_transformer import ShuntedTransformer
from msda_plugin.convert import convert_state_dict
from msda_plugin.registry import MODELS

GOLDEN = Path(__file__).parents[1] / 'golden'
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402

TINY_ARCH = dict(
    embed_dims=(16, 32, 48, 64),
    depths=(1, 2, 1, 1),
    num_heads=(2, 2, 4, 1),
    mlp_ratios=(2, 2, 2, 2),
    sr_ratios=(4, 4, 2, 1),
    stem_convs=1,
)


def upstream_state_dict(size):
    shapes = json.loads((GOLDEN / f'shunted_{size}_state_dict.json').read_text())
    return recipe.fill(
        {
            key: torch.zeros(shape, dtype=torch.long if key.endswith('num_batches_tracked') else None)
            for key, shape in shapes.items()
        }
    )


def small_model(**options):
    torch.manual_seed(0)
    model = ShuntedTransformer(TINY_ARCH, **options)
    model.init_weights()
    return model


@pytest.mark.parametrize(
    'arch, shape', [('tiny', (1, 3, 64, 96)), ('tiny', (2, 3, 75, 101)), ('small', (1, 3, 64, 64))]
)
def test_matches_the_published_numbers(arch, shape):
    upstream = upstream_state_dict(arch[0])
    model = ShuntedTransformer(arch).eval()
    model.load_state_dict(convert_state_dict(upstream, 'shunted_transformer'))
    name = 'x'.join(map(str, shape))
    with torch.inference_mode():
        outs = model(recipe.tensor(f'image{name}', shape))
    # The classifier is a linear layer on the mean over the tokens of the last normalized map.
    logits = nn.functional.linear(outs[-1].mean((2, 3)), upstream['head.weight'], upstream['head.bias'])
    golden = np.load(GOLDEN / f'shunted_{arch[0]}_{name}.npz')
    for out, key in zip((*outs, logits), ('stage1', 'stage2', 'stage3', 'stage4', 'logits'), strict=True):
        expected = torch.from_numpy(golden[key])
        assert out.shape == expected.shape
        assert (out - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


@pytest.mark.parametrize('arch, parameters', [('tiny', 11_040_576), ('small', 21_888_256), ('base', 39_101_376)])
def test_parameter_count(arch, parameters):
    with torch.device('meta'):
        model = ShuntedTransformer(arch)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_builds_from_the_registry_with_out_indices():
    model = MODELS.build(dict(type='msda_plugin.ShuntedTransformer', arch=TINY_ARCH, out_indices=(1, 3))).eval()
    outs = model(torch.rand(2, 3, 70, 90))
    assert [tuple(out.shape) for out in outs] == [(2, 32, 9, 11), (2, 64, 3, 3)]


def test_published_initialization():
    torch.manual_seed(0)
    model = ShuntedTransformer('tiny')
    model.init_weights()
    stage = model.stages[0]
    assert stage.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not stage.blocks[0].mlp.fc1.bias.any()
    assert stage.patch_embed.convs[0].conv.weight.std().item() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.05)
    assert stage.blocks[0].mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert not stage.blocks[0].mlp.dwconv.bias.any()
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])


@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict'])
def test_pretrained_loads_a_published_checkpoint(tmp_path, wrapper):
    upstream = upstream_state_dict('t')
    torch.save(upstream if wrapper is None else {wrapper: upstream}, tmp_path / 'shunted_t.pth')
    model = ShuntedTransformer('tiny', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'shunted_t.pth')))
    model.init_weights()
    expected = convert_state_dict(upstream, 'shunted_transformer')
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_pretrained_loads_the_backbone_of_a_detector(tmp_path):
    source = small_model()
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in source.state_dict().items()}}, tmp_path / 'detector.pth')
    model = ShuntedTransformer(
        TINY_ARCH, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'detector.pth'), prefix='backbone.')
    )
    model.init_weights()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


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
    sum(out.square().mean() for out in model(torch.rand(1, 3, 64, 64))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2])
def test_frozen_stages(frozen_stages):
    model = small_model(frozen_stages=frozen_stages).train()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    prefixes = {-1: (), 0: ('stages.0.patch_embed',), 2: ('stages.0', 'stages.1')}[frozen_stages]
    assert frozen == [name for name, _ in model.named_parameters() if prefixes and name.startswith(prefixes)]
    assert model.stages[0].patch_embed.convs[0].norm.training == (frozen_stages < 0)
    assert model.stages[2].training
    before = model.stages[0].patch_embed.convs[0].norm.running_mean.clone()
    sum(out.mean() for out in model(torch.rand(2, 3, 64, 64))).backward()
    assert torch.equal(model.stages[0].patch_embed.convs[0].norm.running_mean, before) == (frozen_stages >= 0)


def test_norm_eval_keeps_running_statistics():
    model = small_model(norm_eval=True).train()
    norm = model.stages[0].patch_embed.convs[0].norm
    before = norm.running_mean.clone()
    model(torch.rand(2, 3, 64, 64))
    assert not norm.training and model.stages[0].blocks[0].training
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_finite(dtype):
    model = small_model().train()
    with torch.autocast('cpu', dtype):
        outs = model(torch.rand(2, 3, 64, 64))
    sum(out.float().square().mean() for out in outs).backward()
    assert all(out.isfinite().all() for out in outs)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiles_in_one_graph():
    model = small_model().eval()
    image = torch.rand(1, 3, 64, 80)
    torch._dynamo.reset()
    with torch.inference_mode():
        expected = model(image)
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')(image)
    for out, reference in zip(compiled, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-4)


def test_smallest_image_and_one_pixel_less():
    model = small_model().eval()
    side = model.min_image_side
    model(torch.rand(1, 3, side, side))
    with pytest.raises(ValueError, match=f'smaller than its reduction .* at least {side}x{side} pixels'):
        model(torch.rand(1, 3, side, side - 1))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(arch='huge'), "unknown arch 'huge'; known: \\['base', 'small', 'tiny'\\]"),
        (dict(arch={k: v for k, v in TINY_ARCH.items() if k != 'depths'}), "missing keys \\['depths'\\]"),
        (dict(arch=TINY_ARCH | dict(window=7)), "unknown keys \\['window'\\]"),
        (dict(arch=TINY_ARCH | dict(depths=(1, 2))), 'depths=\\(1, 2\\); expected 4 positive values'),
        (dict(arch=TINY_ARCH | dict(depths=2)), 'depths=2; expected a tuple'),
        (dict(arch=TINY_ARCH | dict(num_heads=(1, 2, 4, 1))), 'stage 0: num_heads=1 is odd'),
        (
            dict(arch=TINY_ARCH | dict(num_heads=(2, 3, 4, 1))),
            'stage 1: embed_dims=32 is not a multiple of num_heads=3',
        ),
        (dict(arch=TINY_ARCH | dict(sr_ratios=(4, 3, 2, 1))), 'stage 1: sr_ratio=3 does not fit'),
        (dict(arch=TINY_ARCH | dict(stem_convs=-1)), 'stem_convs=-1'),
        (dict(out_indices=(0, 4)), 'out_indices=\\(0, 4\\) is invalid'),
        (dict(out_indices=(1, 0)), 'increasing'),
        (dict(frozen_stages=5), 'frozen_stages=5 is out of range'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ShuntedTransformer(**options)


def test_wrong_channels():
    with pytest.raises(ValueError, match='expected \\(B, 3, H, W\\)'):
        small_model()(torch.rand(1, 1, 64, 64))
