"""Every config builds, agrees with its classes, takes a training step that reaches every parameter, and predicts."""
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('[!_]*/*.py'))
# Trainable parameters, as built.
PARAMETERS = {
    'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes': 3_517_086,
    'deformable-detr-two-stage_shunted-nano_1xb4-50e_bccd': 3_765_148,
    'mmdet-deformable-detr-two-stage_r18_1xb4-4e_shapes': 16_875_870,
}


def sample(height, width, num_boxes, num_classes):
    size = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
    boxes = torch.tensor([[8.0, 12.0, 40.0, 60.0], [30.0, 5.0, 90.0, 50.0]])[:num_boxes]
    labels = torch.tensor([0, num_classes - 1])[:num_boxes]
    return DetDataSample(metainfo=size, gt_instances=InstanceData(bboxes=boxes, labels=labels))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_builds_trains_and_predicts(path):
    cfg = Config.fromfile(str(path))
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    num_classes = model.bbox_head.num_classes
    assert num_classes == len(cfg.train_dataloader.dataset.metainfo.classes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PARAMETERS[path.stem]

    batch = {'inputs': [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8) for _ in range(2)],
             'data_samples': [sample(96, 128, 2, num_classes), sample(96, 128, 0, num_classes)]}
    loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, training=True), mode='loss'))
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

    model.eval()
    with torch.no_grad():
        results = model.test_step(batch)
    assert all(result.pred_instances.bboxes.isfinite().all() for result in results)


def test_every_config_is_listed_in_its_metafile():
    for path in CONFIGS:
        assert f'Config: {path.relative_to(ROOT)}' in (path.parent / 'metafile.yml').read_text()
        assert path.name in (path.parent / 'README.md').read_text()
