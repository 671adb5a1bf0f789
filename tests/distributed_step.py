"""Run in each process of a group, or in one process: the gradients of one step on this process's images.

    torchrun --nproc_per_node N distributed_step.py CONFIG IMAGES OUT [WRAPPER …]

The first process writes {wrapper: {parameter: gradient}}. Wrappers: ``ddp`` and ``fsdp``, MMEngine's, and
``fully_shard``, torch's second FSDP; without a group: ``alone``.
"""

import os
import sys
from functools import partial

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dist import get_dist_info
from mmengine.model import MMDistributedDataParallel, MMFullyShardedDataParallel
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

# The boxes of each image: the second has none.
BOXES = [[[8.0, 12.0, 40.0, 60.0], [30.0, 5.0, 90.0, 50.0]], [], [[1.0, 1.0, 60.0, 30.0]], [[50.0, 20.0, 80.0, 62.0]]]


def batch_of(indices):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(BOXES), 3, 64, 96), dtype=torch.uint8, generator=generator)
    meta = dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0))
    samples = [
        DetDataSample(
            metainfo=meta,
            gt_instances=InstanceData(bboxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.arange(len(boxes))),
        )
        for boxes in BOXES
    ]
    return dict(inputs=[images[i] for i in indices], data_samples=[samples[i] for i in indices])


def build(config):
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # batch statistics are of a process, not of the batch
    return model


def gradients(model, wrapper, indices):
    """The gradients of all processes together, by name; whole also where the parameters are sharded."""
    layers = [*model.encoder.layers, *model.decoder.layers]
    forward = model
    if wrapper == 'ddp':
        forward = MMDistributedDataParallel(model, broadcast_buffers=False)
    elif wrapper == 'fsdp':
        forward = MMFullyShardedDataParallel(
            model,
            device_id=torch.device('cpu'),
            auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in layers),
        )
    elif wrapper == 'fully_shard':
        mesh = init_device_mesh('cpu', (torch.distributed.get_world_size(),))
        for module in [*layers, model]:
            fully_shard(module, mesh=mesh)
    batch = model.data_preprocessor(batch_of(indices), training=True)
    loss, _ = model.parse_losses(forward(**batch, mode='loss'))
    loss.backward()
    if wrapper == 'fsdp':
        with FullyShardedDataParallel.summon_full_params(forward, with_grads=True):
            return {
                name.replace('_fsdp_wrapped_module.', ''): p.grad.clone()
                for name, p in forward.named_parameters()
                if p.requires_grad
            }
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() for name, grad in grads.items()} if wrapper == 'fully_shard' else grads


def main(config, num_images, out, *wrappers):
    torch.set_num_threads(1)
    init_default_scope('mmdet')
    if 'RANK' in os.environ:
        torch.distributed.init_process_group('gloo')
    rank, world = get_dist_info()
    indices = range(int(num_images))[rank::world]
    results = {wrapper: gradients(build(config), wrapper, indices) for wrapper in wrappers or ['alone']}
    if rank == 0:
        torch.save(results, out)
    if 'RANK' in os.environ:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
