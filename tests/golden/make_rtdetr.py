"""Golden numbers of RT-DETR, computed with the authors' code (https://github.com/lyuwenyu/RT-DETR).

    python tests/golden/make_rtdetr.py CLONE

writes ``rtdetr_CASE.npz`` and ``rtdetr_state_dict.json`` next to this file. Weights, images and objects follow from
``recipe.py``. The models run in double precision, the losses in single. ``torchvision`` is not needed: the code uses
only ``box_area`` of it.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import recipe
import torch

HERE = Path(__file__).parent
SIDE = 128  # square: on other maps, the authors' position embedding orders the pixels by column
COUNTS = (3, 1)
NUM_CLASSES, NUM_QUERIES = 7, 30
# Version of the code, depth of the backbone, width of the fusion blocks, decoder layers, fields of the v2 decoder.
CASES = {
    'r18': (1, 18, 0.5, 3, {}),
    'r50': (1, 50, 1.0, 6, {}),
    'v2_s': (2, 18, 0.5, 3, {}),
    'v2_s_discrete': (2, 18, 0.5, 3, dict(num_points=[3, 2, 1], cross_attn_method='discrete')),
}
GRADIENTS = {  # of our names: the parameters whose gradients are stored
    'backbone.layer2.0.conv1.weight',
    'neck.input_proj.1.conv.weight',
    'neck.encoder.0.0.self_attn.attn.in_proj_weight',
    'neck.fpn_blocks.0.bottlenecks.1.conv1.conv.weight',
    'neck.pan_blocks.1.conv2.bn.weight',
    'input_proj.2.conv.weight',
    'memory_trans_fc.weight',
    'decoder.layers.0.cross_attn.attention_weights.weight',
    'decoder.layers.1.ffn.layers.1.weight',
    'decoder.ref_point_head.layers.0.weight',
    'bbox_head.cls_branches.1.weight',
    'bbox_head.reg_branches.0.2.weight',
    'bbox_head.denoising.label_embedding.weight',
}


def images():
    return recipe.tensor('rtdetr_images', (len(COUNTS), 3, SIDE, SIDE)).double()


def objects():
    """Labels (n,) and boxes (n, 4) as (cx, cy, w, h), 0 to 1, of each image."""
    result = []
    for i, count in enumerate(COUNTS):
        numbers = recipe.tensor(f'rtdetr_objects{i}', (count, 5)).sigmoid()
        center, size = numbers[:, :2] * 0.5 + 0.25, numbers[:, 2:4] * 0.4 + 0.05
        result.append(((numbers[:, 4] * NUM_CLASSES).long(), torch.cat([center, size], 1)))
    return result


def fill(state_dict):
    """Values of all entries of the authors' state dict; constants keep their value."""
    constants = ('num_points_scale', 'anchors', 'valid_mask')
    return {
        key: value.clone() if key.endswith(constants) else recipe.parameter(key, value)
        for key, value in state_dict.items()
    }


def sample(gradient):
    """Every n-th value, about 64 of them."""
    flat = gradient.flatten()
    return flat[:: max(1, len(flat) // 64)]


def to_float(outputs):
    """Outputs of the model in single precision."""
    if isinstance(outputs, dict):
        return {name: to_float(value) for name, value in outputs.items()}
    if isinstance(outputs, list):
        return [to_float(value) for value in outputs]
    return outputs.float() if torch.is_tensor(outputs) and outputs.is_floating_point() else outputs


def authors_code(clone, version):
    """Import function for the authors' modules, without the packages' own imports."""
    for name in [name for name in sys.modules if name == 'src' or name.startswith('src.')]:
        del sys.modules[name]
    root = Path(clone) / ('rtdetr_pytorch' if version == 1 else 'rtdetrv2_pytorch') / 'src'
    for package in ('', '.zoo', '.zoo.rtdetr', '.nn', '.nn.backbone', '.misc'):
        module = types.ModuleType(f'src{package}')
        module.__path__ = [str(root / package.strip('.').replace('.', '/'))]
        sys.modules[f'src{package}'] = module

    def register(cls=None, **_):
        return cls if isinstance(cls, type) else lambda cls: cls

    core, dist = types.ModuleType('src.core'), types.ModuleType('src.misc.dist')
    core.register = register
    dist.get_world_size, dist.is_dist_available_and_initialized = lambda: 1, lambda: False
    sys.modules.update({'src.core': core, 'src.misc.dist': dist, 'src.misc.dist_utils': dist})
    boxes = types.ModuleType('torchvision.ops.boxes')
    boxes.box_area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    for name in ('torchvision', 'torchvision.ops'):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules['torchvision.ops.boxes'] = boxes
    return lambda name: importlib.import_module(f'src.{name}')


def authors_model(clone, case):
    version, depth, expansion, num_layers, fields = CASES[case]
    load = authors_code(clone, version)
    is_basic = depth < 50
    model = torch.nn.Module()
    model.backbone = load('nn.backbone.presnet').PResNet(
        depth, return_idx=[1, 2, 3], freeze_at=-1 if is_basic else 0, freeze_norm=not is_basic
    )
    model.encoder = load('zoo.rtdetr.hybrid_encoder').HybridEncoder(model.backbone.out_channels, expansion=expansion)
    common = dict(num_classes=NUM_CLASSES, num_queries=NUM_QUERIES, feat_channels=[256] * 3, num_denoising=8)
    matcher = load('zoo.rtdetr.matcher').HungarianMatcher(
        dict(cost_class=2, cost_bbox=5, cost_giou=2), use_focal_loss=True
    )
    losses = dict(
        matcher=matcher,
        weight_dict=dict(loss_vfl=1, loss_bbox=5, loss_giou=2),
        losses=['vfl', 'boxes'],
        alpha=0.75,
        gamma=2.0,
        num_classes=NUM_CLASSES,
    )
    if version == 1:
        decoder = load('zoo.rtdetr.rtdetr_decoder').RTDETRTransformer
        model.decoder = decoder(num_decoder_layers=num_layers, **common)
        criterion = load('zoo.rtdetr.rtdetr_criterion').SetCriterion(**losses)
    else:
        decoder = load('zoo.rtdetr.rtdetrv2_decoder').RTDETRTransformerv2
        model.decoder = decoder(num_layers=num_layers, **common, **fields)
        criterion = load('zoo.rtdetr.rtdetrv2_criterion').RTDETRCriterionv2(**losses)
    return model, criterion


def main(clone):
    sys.path.insert(0, str(HERE.parents[1]))
    from msda_plugin.convert.rtdetr import convert

    shapes = {}
    for case in CASES:
        model, criterion = authors_model(clone, case)
        state_dict = model.state_dict()
        shapes[case] = {key: list(value.shape) for key, value in state_dict.items()}
        model.load_state_dict(fill(state_dict))
        model.double()

        def run(targets=None, model=model):
            return model.decoder(model.encoder(model.backbone(images())), targets)

        golden = {}
        with torch.no_grad():
            outputs = run() if model.eval() else None
        golden['logits'], golden['boxes'] = outputs['pred_logits'], outputs['pred_boxes']
        model.train()
        targets = [dict(labels=labels, boxes=boxes) for labels, boxes in objects()]
        torch.manual_seed(0)
        losses = criterion(to_float(run(targets)), targets)
        golden |= {f'loss.{name}': value for name, value in losses.items()}
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        names = {name: ours for name, ours in convert(state_dict).taken.items() if ours in GRADIENTS}
        golden |= {f'grad.{names[name]}': sample(grad) for name, grad in gradients.items() if name in names}
        np.savez_compressed(
            HERE / f'rtdetr_{case}.npz', **{name: value.detach().float().numpy() for name, value in golden.items()}
        )
    (HERE / 'rtdetr_state_dict.json').write_text(json.dumps(shapes, separators=(',', ':')) + '\n')


if __name__ == '__main__':
    main(sys.argv[1])
