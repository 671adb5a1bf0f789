"""Vision Transformer against a plain implementation and torch's encoder layer, and as a backbone."""

import math

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn import functional as F

from msda_plugin.backbones import vision_transformer
from msda_plugin.backbones.vision_transformer import VisionTransformer
from msda_plugin.registry import MODELS

ARCH = dict(embed_dims=24, depth=4, num_heads=3, mlp_ratio=2)
WINDOWED = dict(with_cls_token=False, window_size=3, final_norm=False)
PLAIN_MODELS = {
    'class token': dict(),
    'no class token': dict(with_cls_token=False),
    'no qkv bias': dict(qkv_bias=False),
    'windows': WINDOWED,
    'windows by index': WINDOWED | dict(global_indices=(1,)),
    'ViTDet': WINDOWED | dict(use_rel_pos=True),
    'only relative positions': dict(with_cls_token=False, use_rel_pos=True),
    'non-square': dict(img_size=(64, 48), patch_size=8),
}


def small_model(**options):
    torch.manual_seed(0)
    model = VisionTransformer(**dict(arch=ARCH, img_size=64) | options)
    model.init_weights()
    return model


def random_model(**options):
    """Random parameters, so that each of them affects the output."""
    model = small_model(**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.2
            parameter.copy_(noise + 1 if 'norm' in name and name.endswith('weight') else noise)
    return model


def plain_forward(model, image):
    """Plain implementation: full score matrices, windows and distances by index."""
    weights = model.state_dict()
    patch, heads = model.patch_size, ARCH['num_heads']
    dims = ARCH['embed_dims']
    height, width = (math.ceil(side / patch) for side in image.shape[2:])
    padded = image.new_zeros(*image.shape[:2], height * patch, width * patch)
    padded[:, :, : image.shape[2], : image.shape[3]] = image
    patches = padded.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3)
    x = patches @ weights['patch_embed.proj.weight'].flatten(1).T + weights['patch_embed.proj.bias']
    num_extra = int('cls_token' in weights)
    positions = weights['pos_embed'][:, num_extra:].unflatten(1, model.grid).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, (height, width), mode='bicubic').permute(0, 2, 3, 1)
    x = (x + positions).flatten(1, 2)
    if num_extra:
        first = weights['cls_token'] + weights['pos_embed'][:, :1]
        x = torch.cat([first.expand(len(x), -1, -1), x], 1)

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-6).sqrt() * weights[f'{name}.weight'] + weights[f'{name}.bias']

    def attend(x, name, sides):
        qkv = x @ weights[f'{name}.qkv.weight'].T + weights.get(f'{name}.qkv.bias', 0)
        out = torch.empty_like(x)
        for head in range(heads):
            d = dims // heads
            q, k, v = (qkv[..., i * dims + head * d :][..., :d] for i in range(3))
            scores = q @ k.transpose(1, 2) / d**0.5
            if f'{name}.rel_pos_h' in weights:
                index = torch.arange(sides[0] * sides[1])
                for axis, side, place in (('h', sides[0], index // sides[1]), ('w', sides[1], index % sides[1])):
                    table = weights[f'{name}.rel_pos_{axis}']
                    if len(table) != 2 * side - 1:
                        table = F.interpolate(table.T[None], 2 * side - 1, mode='linear')[0].T
                    scores = scores + (q[:, :, None] * table[place[:, None] - place + side - 1]).sum(-1)
            out[..., head * d :][..., :d] = scores.softmax(-1) @ v
        return out @ weights[f'{name}.proj.weight'].T + weights[f'{name}.proj.bias']

    for i, block in enumerate(model.blocks):
        y = norm(x, f'blocks.{i}.norm1')
        size = block.window_size
        if size:
            y, attended = y.unflatten(1, (height, width)), torch.empty_like(y).unflatten(1, (height, width))
            for top in range(0, height, size):
                for left in range(0, width, size):
                    inside = y[:, top : top + size, left : left + size]
                    window = y.new_zeros(len(y), size, size, dims)
                    window[:, : inside.shape[1], : inside.shape[2]] = inside
                    window = attend(window.flatten(1, 2), f'blocks.{i}.attn', (size, size)).unflatten(1, (size, size))
                    attended[:, top : top + size, left : left + size] = window[:, : inside.shape[1], : inside.shape[2]]
            y = attended.flatten(1, 2)
        else:
            y = attend(y, f'blocks.{i}.attn', (height, width))
        x = x + y
        y = norm(x, f'blocks.{i}.norm2') @ weights[f'blocks.{i}.mlp.fc1.weight'].T + weights[f'blocks.{i}.mlp.fc1.bias']
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        x = x + y @ weights[f'blocks.{i}.mlp.fc2.weight'].T + weights[f'blocks.{i}.mlp.fc2.bias']
    if 'norm.weight' in weights:
        x = norm(x, 'norm')
    return x[:, num_extra:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


@pytest.fixture(params=[True, False], ids=['bias of pairs', 'bias in the vectors'])
def both_forms(request, monkeypatch):
    """Runs both implementations of relative positions; the size of the map selects one."""
    monkeypatch.setattr(vision_transformer, 'SMALL_MAP', 10**6 if request.param else 0)


@pytest.mark.parametrize('shape', [(2, 3, 64, 64), (1, 3, 75, 101), (1, 3, 5, 40)], ids=str)
@pytest.mark.parametrize('name', PLAIN_MODELS)
@pytest.mark.usefixtures('both_forms')
def test_equals_the_plain_implementation(name, shape):
    model = random_model(**PLAIN_MODELS[name]).double().eval()
    image = torch.rand(shape, dtype=torch.float64)
    with torch.inference_mode():
        (out,) = model(image)
        expected = plain_forward(model, image)
    assert out.shape[2:] == tuple(math.ceil(side / model.patch_size) for side in shape[2:])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_block_equals_torchs_encoder_layer():
    block = random_model().double().blocks[0]
    dims = ARCH['embed_dims']
    layer = nn.TransformerEncoderLayer(
        dims,
        ARCH['num_heads'],
        dims * ARCH['mlp_ratio'],
        dropout=0.0,
        activation='gelu',
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    ).double()
    names = {
        'self_attn.in_proj_': 'attn.qkv.',
        'self_attn.out_proj.': 'attn.proj.',
        'linear1.': 'mlp.fc1.',
        'linear2.': 'mlp.fc2.',
        'norm1.': 'norm1.',
        'norm2.': 'norm2.',
    }
    layer.load_state_dict(
        {
            theirs + name: block.state_dict()[ours + name]
            for theirs, ours in names.items()
            for name in ('weight', 'bias')
        }
    )
    x = torch.randn(2, 17, dims, dtype=torch.float64)
    torch.testing.assert_close(block(x, (4, 4)), layer(x), rtol=0, atol=1e-12)


@pytest.mark.usefixtures('both_forms')
def test_low_precision_error_is_at_most_twice_that_of_plain_pytorch():
    model = random_model(**PLAIN_MODELS['ViTDet']).eval()
    image = torch.rand(1, 3, 75, 101)
    with torch.inference_mode():
        exact = plain_forward(model.double(), image.double())
        plain = (plain_forward(model.bfloat16(), image.bfloat16()) - exact).abs().max()
        ours = (model(image.bfloat16())[0] - exact).abs().max()
    assert ours <= 2 * plain


@pytest.mark.parametrize(
    'arch, dims, depth, published',
    [
        ('tiny', 192, 12, 5_717_416),
        ('small', 384, 12, 22_050_664),
        ('base', 768, 12, 86_567_656),
        ('large', 1024, 24, 304_326_632),
    ],
)
def test_parameter_count(arch, dims, depth, published):
    """The published counts include a classifier of 1000 classes."""
    with torch.device('meta'):
        model, vitdet = (
            VisionTransformer(arch),
            VisionTransformer(arch, with_cls_token=False, window_size=14, use_rel_pos=True, final_norm=False),
        )
    count, vitdet_count = (sum(p.numel() for p in m.parameters()) for m in (model, vitdet))
    norm, patch_embed, cls_token, pos_embed = 2 * dims, (16 * 16 * 3 + 1) * dims, dims, (1 + 14 * 14) * dims
    block = (dims + 1) * 3 * dims + (dims + 1) * dims + 2 * norm + (dims + 1) * 4 * dims + (4 * dims + 1) * dims
    assert count == patch_embed + cls_token + pos_embed + depth * block + norm
    assert count + (dims + 1) * 1000 == published
    assert vitdet_count == count - cls_token - dims - norm + depth * 2 * 27 * 64
    assert [i for i, b in enumerate(vitdet.blocks) if not b.window_size] == [depth * k // 4 - 1 for k in (1, 2, 3, 4)]


def test_builds_from_the_registry_with_out_indices():
    model = MODELS.build(dict(type='msda_plugin.VisionTransformer', arch=ARCH, out_indices=(1, 3))).eval()
    model.init_weights()
    outs = model(torch.rand(2, 3, 75, 101))
    assert [tuple(out.shape) for out in outs] == [(2, 24, 5, 7)] * 2
    # The final norm applies only to the last map.
    assert (outs[1].mean(1).abs() < 1e-4).all() and not (outs[0].mean(1).abs() < 1e-4).all()


def test_initialization():
    torch.manual_seed(0)
    model = VisionTransformer('tiny', drop_path_rate=0.1)
    model.init_weights()
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.blocks[3].attn.qkv.bias.any() and not model.patch_embed.proj.bias.any()
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.05)
    assert 0 < model.cls_token.abs().max() < 1e-4
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])


def save_pretrained(tmp_path, **options):
    source = random_model(**options)
    state_dict = source.state_dict() | {'head.weight': torch.zeros(5, 24), 'head.bias': torch.zeros(5)}
    torch.save({'model': state_dict}, tmp_path / 'vit.pth')
    return source, dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth'))


def test_pretrained_loads_a_published_checkpoint(tmp_path):
    source, init_cfg = save_pretrained(tmp_path)
    model = small_model(init_cfg=init_cfg)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_pretrained_at_another_resolution_as_vitdet(tmp_path):
    source, init_cfg = save_pretrained(tmp_path)
    model = small_model(img_size=96, use_rel_pos=True, **WINDOWED, init_cfg=init_cfg)
    expected = F.interpolate(source.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2), (6, 6), mode='bicubic')
    torch.testing.assert_close(model.pos_embed, expected.permute(0, 2, 3, 1).flatten(1, 2))
    assert torch.equal(model.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    assert not any(value.any() for key, value in model.state_dict().items() if 'rel_pos' in key)


@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict], ids=['torch', 'mmengine'])
def test_loading_a_detector_adapts_the_backbone(load):
    """Strict loading, as by ``load_from`` and ``--resume``, with a class token and another resolution."""
    source = random_model()
    wanted = small_model(img_size=80, with_cls_token=False)
    detector = nn.ModuleDict(dict(backbone=wanted))
    state_dict = {f'backbone.{key}': value for key, value in source.state_dict().items()}
    load(detector, state_dict, strict=True)
    assert torch.equal(wanted.norm.weight, source.norm.weight) and wanted.pos_embed.shape == (1, 25, 24)
    assert wanted.pos_embed.any()
    assert state_dict['backbone.pos_embed'].shape == (1, 17, 24)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(arch=ARCH | dict(depth=3)), r"unexpected keys \['blocks.3.norm1.weight'"),
        (
            dict(arch=ARCH | dict(mlp_ratio=3)),
            r'another size: blocks.0.mlp.fc1.weight has shape \(48, 24\), expected '
            r'\(72, 24\).*12 in total',
        ),
        (dict(patch_size=8), 'patch_embed.proj.weight'),
        (dict(qkv_bias=False), r"unexpected keys \['blocks.0.attn.qkv.bias'"),
    ],
)
def test_pretrained_of_another_model_is_refused(tmp_path, options, message):
    _, init_cfg = save_pretrained(tmp_path)
    model = VisionTransformer(**dict(arch=ARCH, img_size=64, init_cfg=init_cfg) | options)
    with pytest.raises(ValueError, match=message):
        model.init_weights()


def test_pretrained_without_class_token_is_refused_by_a_model_with_one(tmp_path):
    _, init_cfg = save_pretrained(tmp_path, with_cls_token=False)
    with pytest.raises(ValueError, match=r"missing keys \['cls_token'\].*with_cls_token"):
        small_model(init_cfg=init_cfg)


def test_positions_of_a_non_square_grid_are_refused(tmp_path):
    _, init_cfg = save_pretrained(tmp_path, img_size=(64, 48))
    with pytest.raises(ValueError, match=r'pos_embed has shape \(1, 13, 24\), expected \(1, 17, 24\).*img_size'):
        small_model(init_cfg=init_cfg)


@pytest.mark.parametrize('options', [dict(), WINDOWED | dict(use_rel_pos=True)], ids=['plain', 'ViTDet'])
@pytest.mark.usefixtures('both_forms')
def test_checkpointing_changes_nothing_but_memory(options):
    image = torch.rand(2, 3, 64, 80)
    grads = []
    for with_cp in (False, True):
        model = small_model(with_cp=with_cp, drop_path_rate=0.3, **options).train()
        torch.manual_seed(1)
        model(image)[0].square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and grad.any(), name
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize(
    'frozen_stages, prefixes',
    [
        (-1, ()),
        (0, ('patch_embed.', 'pos_embed', 'cls_token')),
        (2, ('patch_embed.', 'pos_embed', 'cls_token', 'blocks.0.', 'blocks.1.')),
        (4, ('patch_embed.', 'pos_embed', 'cls_token', 'blocks.', 'norm.')),
    ],
)
def test_frozen_stages(frozen_stages, prefixes):
    model = small_model(frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    assert [block.training for block in model.blocks] == [i >= frozen_stages for i in range(4)]
    if frozen_stages < 4:
        model(torch.rand(2, 3, 64, 64))[0].mean().backward()


@pytest.mark.parametrize('options', [dict(), WINDOWED | dict(use_rel_pos=True)], ids=['plain', 'ViTDet'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures('both_forms')
def test_autocast_is_finite(dtype, options):
    model = small_model(**options).train()
    with torch.autocast('cpu', dtype):
        (out,) = model(torch.rand(2, 3, 75, 101))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    'options', [dict(), WINDOWED | dict(use_rel_pos=True, global_indices=(1,))], ids=['plain', 'ViTDet']
)
def test_compiles_in_one_graph(options):
    model = random_model(arch=ARCH | dict(depth=2), **options).eval()
    image = torch.rand(1, 3, 75, 101)
    torch._dynamo.reset()
    with torch.inference_mode():
        (expected,) = model(image)
        (compiled,) = torch.compile(model, fullgraph=True, backend='aot_eager')(image)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(arch='huge'), "unknown arch 'huge'; known: \\['base', 'large', 'small', 'tiny'\\]"),
        (dict(arch={k: v for k, v in ARCH.items() if k != 'depth'}), "missing keys \\['depth'\\]"),
        (dict(arch=ARCH | dict(window=7)), "unknown keys \\['window'\\]"),
        (dict(arch=ARCH | dict(depth=0)), "'depth': 0.*expected positive numbers"),
        (dict(arch=ARCH | dict(num_heads=5)), 'embed_dims a multiple of num_heads'),
        (dict(arch=ARCH, out_indices=(0, 4)), 'out_indices=\\(0, 4\\) is invalid; expected increasing .* 0 to 3'),
        (dict(arch=ARCH, out_indices=(1, 0)), 'increasing'),
        (dict(arch=ARCH, out_indices=()), r'out_indices=\(\) is invalid'),
        (dict(arch=ARCH, global_indices=(4,), **WINDOWED), 'global_indices=\\(4,\\) is invalid'),
        (dict(arch=ARCH, global_indices=(3,)), 'window_size=0 makes every block global'),
        (dict(arch=ARCH, frozen_stages=5), 'frozen_stages=5 is out of range'),
        (dict(arch=ARCH, window_size=14), 'set with_cls_token=False to use window_size=14'),
        (dict(arch=ARCH, use_rel_pos=True), 'set with_cls_token=False'),
        (dict(arch=ARCH, img_size=(64, 64, 3)), 'img_size=\\(64, 64, 3\\)'),
        (dict(arch=ARCH, patch_size=0), 'patch_size=0'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**options)


@pytest.mark.parametrize('shape', [(1, 1, 64, 64), (3, 64, 64)], ids=str)
def test_wrong_channels(shape):
    with pytest.raises(ValueError, match='expected \\(B, 3, H, W\\)'):
        small_model()(torch.rand(shape))
