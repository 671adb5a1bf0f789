"""Writes the golden files of D-FINE and DEIM from the authors' code.

python tests/golden/make_dfine.py D-FINE DEIM, the folders of clones of github.com/Peterande/D-FINE and
github.com/ShihuaHuang95/DEIM. Weights, inputs and targets follow from `recipe.py`.
"""

import functools
import gzip
import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import recipe


def load(root, source, zoo):
    """The authors' modules, without those of their training loop, which need further packages."""
    name = f'authors_{zoo}'

    def package(path, **members):
        module = types.ModuleType(f'{name}.{path}' if path else name)
        module.__path__ = [str(Path(root, source, *path.split('.')))]
        vars(module).update(members)
        sys.modules[module.__name__] = module

    # All that the authors' losses take from torchvision.
    for part in ('torchvision', 'torchvision.ops', 'torchvision.ops.boxes'):
        sys.modules.setdefault(part, types.ModuleType(part))
    sys.modules['torchvision.ops.boxes'].box_area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    package('')
    package('core', register=lambda *args, **kwargs: lambda cls: cls)
    package('misc')
    package('misc.dist_utils', get_world_size=lambda: 1, is_dist_available_and_initialized=lambda: False)
    if source == 'src':
        for path in ('nn', 'nn.backbone', 'zoo', 'zoo.dfine'):
            package(path)
        backbone, detector = 'nn.backbone', 'zoo.dfine'
    else:
        for path in ('backbone', 'deim'):
            package(path)
        backbone, detector = 'backbone', 'deim'
    return lambda module: importlib.import_module(f'{name}.{backbone if module == "hgnetv2" else detector}.{module}')


N, S = ('B0', True, [512, 1024]), ('B0', True, [256, 512, 1024])
SIZES = {
    'n': (N, dict(hidden_dim=128, dim_feedforward=512, expansion=0.34, depth_mult=0.5), dict(num_layers=3)),
    's': (S, dict(depth_mult=0.34, expansion=0.5), dict(num_layers=3)),
    'm': (('B2', True, [384, 768, 1536]), dict(depth_mult=0.67), dict(num_layers=4)),
    'l': (('B4', False, [512, 1024, 2048]), dict(), dict()),
    'x': (('B5', False, [512, 1024, 2048]), dict(hidden_dim=384, dim_feedforward=2048), dict(reg_scale=8.0)),
}
NUM_QUERIES, NUM_CLASSES, IMAGE = 20, 7, 128


def build(authors, size, num_queries=NUM_QUERIES, num_classes=NUM_CLASSES):
    (arch, lab, channels), neck, decoder = SIZES[size]
    frozen = size in 'lx'
    strides = [8, 16, 32][-len(channels) :]
    levels = len(channels)
    if size == 'n':
        decoder = dict(decoder, hidden_dim=128, dim_feedforward=512, num_points=[6, 6])
    else:
        decoder = dict(decoder, num_points=[3, 6, 3])
    backbone = authors('hgnetv2').HGNetv2(
        arch,
        use_lab=lab,
        return_idx=[1, 2, 3][-levels:],
        freeze_at=0 if frozen else -1,
        freeze_norm=frozen,
        pretrained=False,
    )
    encoder = authors('hybrid_encoder').HybridEncoder(channels, strides, use_encoder_idx=[levels - 1], **neck)
    decoder = authors('dfine_decoder').DFINETransformer(
        num_classes=num_classes,
        num_queries=num_queries,
        feat_channels=[neck.get('hidden_dim', 256)] * levels,
        feat_strides=strides,
        num_levels=levels,
        num_denoising=0,
        **decoder,
    )
    return torch.nn.ModuleDict(dict(backbone=backbone, encoder=encoder, decoder=decoder))


def kept(key):
    """Whether a key keeps the value of the authors' constructor."""
    return key.endswith(('up', 'reg_scale', 'num_points_scale', 'num_batches_tracked'))


def fill(model):
    state = model.state_dict()
    model.load_state_dict({k: v if kept(k) else recipe.parameter(k, v) for k, v in state.items()})
    return model


def targets():
    """Objects of two images as the authors give them; the second one has three."""
    boxes = recipe.tensor('targets', (2, 5, 4)).sigmoid()
    boxes = torch.cat([0.25 + boxes[..., :2] / 2, 0.1 + boxes[..., 2:] / 4], -1)
    labels = torch.arange(10).reshape(2, 5) % NUM_CLASSES
    return [dict(boxes=boxes[0], labels=labels[0]), dict(boxes=boxes[1, :3], labels=labels[1, :3])]


def criterion(authors, name, losses, **options):
    matcher = authors('matcher').HungarianMatcher(
        dict(cost_class=2, cost_bbox=5, cost_giou=2), use_focal_loss=True, alpha=0.25, gamma=2.0
    )
    weights = dict(loss_vfl=1, loss_mal=1, loss_bbox=5, loss_giou=2, loss_fgl=0.15, loss_ddf=1.5)
    module = authors('dfine_criterion' if name == 'DFINECriterion' else 'deim_criterion')
    return getattr(module, name)(matcher, weights, losses, num_classes=NUM_CLASSES, **options)


def predictions():
    """Random predictions of three layers, the initial boxes and the proposals, with denoising queries first."""
    num_layers, num_dn = 3, 30
    queries = num_dn + NUM_QUERIES

    def make(name, *shape):
        return recipe.tensor(name, shape)

    boxes = make('boxes', num_layers + 1, 2, queries, 4).sigmoid()
    return dict(
        logits=make('logits', num_layers + 1, 2, queries, NUM_CLASSES) - 2,
        boxes=torch.cat([boxes[..., :2], 0.1 + boxes[..., 2:] / 3], -1),
        distributions=make('distributions', num_layers, 2, queries, 4 * 33),
        enc_logits=make('enc_logits', 2, NUM_QUERIES, NUM_CLASSES) - 2,
        enc_boxes=0.2 + make('enc_boxes', 2, NUM_QUERIES, 4).sigmoid() / 3,
    )


def loss_outputs(given):
    """The predictions in the authors' format."""
    dn, num = 30, NUM_QUERIES
    split = {name: given[name].split([dn, num], 2) for name in ('logits', 'boxes', 'distributions')}

    def layers(part, with_teacher):
        logits, boxes, corners = (split[name][part] for name in ('logits', 'boxes', 'distributions'))
        refs = boxes[-1]
        teacher = dict(teacher_corners=corners[-1], teacher_logits=logits[2]) if with_teacher else {}
        return [
            dict(pred_logits=a, pred_boxes=b, pred_corners=c, ref_points=refs, **teacher)
            for a, b, c in zip(logits[:3], boxes[:3], corners, strict=True)
        ]

    # Two images, at most five objects, three groups of five positive and five negative queries.
    positive = [torch.cat([10 * g + torch.arange(n) for g in range(3)]) for n in (5, 3)]
    scale = dict(up=torch.tensor([0.5]), reg_scale=torch.tensor([4.0]))
    return dict(
        layers(1, False)[-1],
        **scale,
        aux_outputs=layers(1, True)[:-1],
        dn_outputs=layers(0, True),
        enc_aux_outputs=[dict(pred_logits=given['enc_logits'], pred_boxes=given['enc_boxes'])],
        pre_outputs=dict(pred_logits=split['logits'][1][-1], pred_boxes=split['boxes'][1][-1]),
        dn_pre_outputs=dict(pred_logits=split['logits'][0][-1], pred_boxes=split['boxes'][0][-1]),
        enc_meta=dict(class_agnostic=False),
        dn_meta=dict(dn_positive_idx=positive, dn_num_group=3, dn_num_split=[dn, num]),
    )


def main(dfine, deim):
    folder = Path(__file__).parent
    keys = {}
    for size in SIZES:
        model = build(dfine, size, 300, 80)
        model['decoder'].denoising_class_embed = torch.nn.Embedding(81, model['decoder'].hidden_dim)
        keys[size] = {key: list(value.shape) for key, value in model.state_dict().items()}
    (folder / 'dfine_state_dicts.json.gz').write_bytes(gzip.compress(json.dumps(keys).encode(), mtime=0))

    golden = {}
    image = recipe.tensor('image', (2, 3, IMAGE, IMAGE))
    for size in 'nsl':
        model = fill(build(dfine, size)).eval().double()
        with torch.no_grad():
            out = model['decoder'](model['encoder'](model['backbone'](image.double())))
        golden[f'{size}_logits'], golden[f'{size}_boxes'] = out['pred_logits'], out['pred_boxes']
    # A training step of the smallest model, without denoising queries.
    model = fill(build(dfine, 'n')).train()
    out = model['decoder'](model['encoder'](model['backbone'](image)), targets())
    losses = criterion(dfine, 'DFINECriterion', ['vfl', 'boxes', 'local'], alpha=0.75)(out, targets())
    sum(losses.values()).backward()
    golden |= {f'step_{name}': loss for name, loss in losses.items()}
    # By the order of the authors' names.
    gradients = {name: p.grad.abs().sum() for name, p in model.named_parameters() if p.grad is not None}
    golden['step_gradients'] = torch.stack([gradients[name] for name in sorted(gradients)])
    np.savez_compressed(folder / 'dfine.npz', **{k: v.detach().numpy() for k, v in golden.items()})

    golden = {}
    for authors, name, classes, options in (
        (dfine, 'DFINECriterion', 'vfl', dict(alpha=0.75, gamma=2.0)),
        (deim, 'DEIMCriterion', 'mal', dict(alpha=0.75, gamma=1.5)),
    ):
        given = {key: value.requires_grad_() for key, value in predictions().items()}
        losses = criterion(authors, name, [classes, 'boxes', 'local'], **options)(loss_outputs(given), targets())
        sum(losses.values()).backward()
        golden |= {f'{classes}_{key}': value for key, value in losses.items()}
        golden |= {f'{classes}_grad_{key}': value.grad.flatten()[::97] for key, value in given.items()}
    np.savez_compressed(folder / 'dfine_losses.npz', **{k: v.detach().numpy() for k, v in golden.items()})


if __name__ == '__main__':
    # The union of the matches sorts pairs by their number; torch leaves the order of equal numbers open.
    torch.argsort = functools.partial(torch.argsort, stable=True)
    main(load(sys.argv[1], 'src', 'dfine'), load(sys.argv[2], 'engine', 'deim'))
