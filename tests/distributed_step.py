"""Run in each process of a group: the gradients of one step on this process's images, written by the first process.

    torchrun --nproc_per_node N distributed_step.py CONFIG IMAGES OUT
"""
import sys

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dist import get_dist_info
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

# The boxes of each image: the second has none.
BOXES = [[[8., 12., 40., 60.], [30., 5., 90., 50.]], [], [[1., 1., 60., 30.]], [[50., 20., 80., 62.]]]


def batch_of(indices):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(BOXES), 3, 64, 96), dtype=torch.uint8, generator=generator)
    meta = dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1., 1.))
    samples = [DetDataSample(metainfo=meta, gt_instances=InstanceData(
        bboxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.arange(len(boxes)))) for boxes in BOXES]
    return dict(inputs=[images[i] for i in indices], data_samples=[samples[i] for i in indices])


def main(config, num_images, out):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # batch statistics are of a process, not of the batch
    torch.distributed.init_process_group('gloo')
    rank, world = get_dist_info()
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    batch = wrapped.module.data_preprocessor(batch_of(range(int(num_images))[rank::world]), training=True)
    loss, _ = model.parse_losses(wrapped(**batch, mode='loss'))
    loss.backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, out)
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
