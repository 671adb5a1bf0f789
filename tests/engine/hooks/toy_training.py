"""A toy detector, dataset and metric, and a runner that trains it on drawn shapes in a second."""

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData
from PIL import Image
from pycocotools.coco import COCO

from msda_plugin.tools.shapes import CLASSES, draw_image

AP = (0.1, 0.4, 0.3)  # what the toy metric reports, validation by validation


class ToyData(BaseDataset):
    METAINFO = dict(classes=CLASSES)

    def load_data_list(self):
        items = []
        for index in range(3):
            image, annotations = draw_image((9, index), (64, 48))
            path = f'{self.data_root}/{index}.png'
            Image.fromarray(image).save(path)
            boxes = [(a.box[0], a.box[1], a.box[0] + a.box[2], a.box[1] + a.box[3]) for a in annotations]
            items.append(
                dict(
                    img_path=path,
                    instances=[
                        dict(bbox=box, bbox_label=a.label, ignore_flag=0)
                        for box, a in zip(boxes, annotations, strict=True)
                    ],
                )
            )
        return items


class ToyDetector(BaseModel):
    """Learns one number; predicts one box with a high and one with a low score."""

    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.tensor(3.0))
        self.seen = []

    def forward(self, sample_idx, mode='tensor', data_samples=None, **kwargs):
        if mode == 'loss':
            return dict(loss_cls=self.number**2, loss_bbox=self.number.abs())
        self.seen.append((self.training, float(self.number), torch.is_grad_enabled()))
        found = InstanceData(
            bboxes=torch.tensor([[4.0, 4, 30, 30], [1, 1, 9, 9]]),
            labels=torch.tensor([2, 3]),
            scores=torch.tensor([0.9, 0.1]),
        )
        for sample in data_samples or []:
            sample.pred_instances = found
        return data_samples or [BaseDataElement(pred_instances=found) for _ in sample_idx]


class ToyMetric(BaseMetric):
    default_prefix = 'coco'
    calls = 0
    further = {}

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        COCO().createIndex()  # prints
        value = AP[ToyMetric.calls % len(AP)]
        ToyMetric.calls += 1
        return dict(bbox_mAP=value, bbox_mAP_50=value + 0.2, bbox_mAP_l=float('nan'), **ToyMetric.further)


def make_runner(folder, by_epoch=True, hook=None, custom_hooks=(), resume=False, epochs=3, kind=Runner, **cfg):
    ToyMetric.calls = 0
    (folder / 'images').mkdir(exist_ok=True)

    def loader():
        return dict(
            batch_size=1,
            num_workers=0,
            dataset=ToyData(data_root=str(folder / 'images'), lazy_init=False),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=pseudo_collate,
        )

    train_cfg = (
        dict(by_epoch=True, max_epochs=epochs)
        if by_epoch
        else dict(by_epoch=False, max_iters=3 * epochs, val_interval=3)
    )
    return kind(
        ToyDetector(),
        str(folder / 'work'),
        train_dataloader=loader(),
        val_dataloader=loader(),
        train_cfg=train_cfg,
        val_cfg=dict(),
        val_evaluator=[ToyMetric()],
        resume=resume,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_scope='mmengine',
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                interval=1 if by_epoch else 3,
                by_epoch=by_epoch,
                max_keep_ckpts=1,
                save_param_scheduler=False,
                save_best='coco/bbox_mAP',
                rule='greater',
            )
        ),
        custom_hooks=[hook or dict(type='msda_plugin.TrainingReportHook'), *custom_hooks],
        cfg=Config(dict(model='toy', **cfg), filename=None),
        experiment_name=f'{folder.name}-{by_epoch}-{resume}-{epochs}-{kind.__name__}',
    )
