"""Detections of randomly initialized MMDetection models, to be compared between two installations of mmcv.

``python detections.py OUT.npz [CONFIG ...]`` predicts on one image for each config of MMDetection, by default for one
config of each family, and writes the results, or the error where there is one.
"""

import logging
import re
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

# Six rounds of refinement by random weights magnify a relative error of 2e-7 to other detections.
DOUBLE = ('sparse_rcnn',)
LARGER = ('ddod', 'ssd')  # their last feature would be smaller than a kernel


def configs_folder() -> Path:
    import mmdet

    folder = Path(mmdet.__file__).parent / '.mim' / 'configs'
    return folder if folder.is_dir() else Path(mmdet.__file__).parents[1] / 'configs'


def one_per_family() -> list[str]:
    """Relative paths of one small config in each folder."""

    def size(path: Path) -> tuple:
        unsuitable = bool(re.search('pool|rpn_r50|fast-rcnn|ssdlite|syncbn', path.name))  # need a GPU, proposals …
        preferred = [bool(re.search(pattern, path.name)) for pattern in ('r18|tiny|nano', 'r50', '8xb|1x')]
        return (unsuitable, *(not found for found in preferred), len(path.name), path.name)

    chosen = []
    for family in sorted(configs_folder().iterdir()):
        if family.is_dir() and family.name != '_base_' and (files := list(family.glob('*.py'))):
            chosen.append(f'{family.name}/{min(files, key=size).name}')
    return chosen


def build(name: str) -> torch.nn.Module:
    """A model with random weights, whose detections are few and kept however low their scores are."""
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    def adapt(node: object) -> None:
        if isinstance(node, dict):
            if 'checkpoint' in (node.get('init_cfg') or ()):
                node['init_cfg'] = None
            if 'nms' in node or 'nms_pre' in node:
                values = dict(score_thr=0.0, nms_pre=200, max_per_img=50)
                node.update({key: values[key] for key in node if key in values})
            if 'pretrained' in node:
                node['pretrained'] = None
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            adapt(child)

    config = Config.fromfile(configs_folder() / name).model
    adapt(config)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    for module in model.modules():
        if type(module).__name__ == 'TridentConv':  # MMDetection leaves its weight to a checkpoint
            torch.nn.init.kaiming_normal_(module.weight)
    return model


def predict(name: str) -> dict[str, np.ndarray]:
    """Detections of one model on one image."""
    family = name.partition('/')[0]
    size = (320, 320) if family in LARGER else (224, 256)
    from mmdet.structures import DetDataSample

    dtype = torch.float64 if family in DOUBLE else torch.float32
    torch.set_default_dtype(dtype)
    model = build(name).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 14, 16, generator=generator, dtype=torch.float32)
    image = (torch.nn.functional.interpolate(coarse, size, mode='bilinear')[0] * 255).byte()
    sample = DetDataSample(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
            border=np.array([0, size[0], 0, size[1]]),
        )
    )
    with torch.no_grad():
        data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), training=False)
        (result,) = model.predict(data['inputs'].to(dtype), data['data_samples'])
    if 'pred_panoptic_seg' in result:
        return dict(panoptic=result.pred_panoptic_seg.sem_seg.numpy())
    found = result.pred_instances
    arrays = {key: found[key].float().numpy() for key in ('bboxes', 'scores', 'labels') if key in found}
    if 'masks' in found:
        arrays['mask_areas'] = torch.as_tensor(found.masks).flatten(1).sum(1).float().numpy()
    return arrays


def losses(name: str) -> dict[str, np.ndarray]:
    """Training losses of one model on one image, and the norm of their gradient."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    model = build(name).train()
    boxes = torch.tensor([[20.0, 30, 120, 130], [100, 60, 230, 200], [5, 5, 60, 50]])
    sample = DetDataSample(metainfo=dict(img_shape=(224, 256), pad_shape=(224, 256), batch_input_shape=(224, 256)))
    masks = np.zeros((3, 224, 256), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3, 1, 7]), masks=BitmapMasks(masks, 224, 256))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    image = torch.rand(1, 3, 224, 256, generator=torch.Generator().manual_seed(1))
    total, values = model.parse_losses(model.loss(image, [sample]))
    total.backward()
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    return dict(loss=np.float64(total.item()), gradient=np.float64(norm.item()))


def _give_up(*_) -> None:
    raise TimeoutError('more than 90 seconds of CPU time')


def main(out: str, *names: str) -> None:
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with_losses = bool(names)
    signal.signal(signal.SIGPROF, _give_up)
    results = {}
    for name in names or one_per_family():
        signal.setitimer(signal.ITIMER_PROF, 90)
        try:
            results |= {f'{name}:{key}': value for key, value in predict(name).items()}
            if with_losses:
                results |= {f'{name}:{key}': value for key, value in losses(name).items()}
        except Exception as error:
            results[f'{name}:error'] = np.array(f'{type(error).__name__}: {" ".join(str(error).split())[:300]}')
        signal.setitimer(signal.ITIMER_PROF, 0)
        torch.set_default_dtype(torch.float32)
        print(name, results.get(f'{name}:error', 'done'), flush=True)
    np.savez_compressed(out, **results)


if __name__ == '__main__':
    main(*sys.argv[1:])
