"""Run in each process of a group: MMEngine's FSDP strategy trains the detector of a config on this process's images.

torchrun --nproc_per_node N sharded_training.py CONFIG WORK_DIR
"""

import sys
from functools import partial

import torch
from mmdet.models.layers import DeformableDetrTransformerDecoderLayer, DeformableDetrTransformerEncoderLayer
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import FlexibleRunner
from mmengine.structures import InstanceData
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.data import Dataset

LAYERS = {DeformableDetrTransformerEncoderLayer, DeformableDetrTransformerDecoderLayer}


class Images(Dataset):
    """Noise; every second image has no object."""

    metainfo = dict(classes=())

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        boxes = torch.tensor([[8.0, 12.0, 40.0, 60.0]][: 1 - index % 2]).reshape(-1, 4)
        return dict(
            inputs=image,
            data_samples=DetDataSample(
                metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0)),
                gt_instances=InstanceData(bboxes=boxes, labels=torch.zeros(len(boxes), dtype=torch.long)),
            ),
        )


def main(config, work_dir):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')  # MMEngine's launcher presumes a GPU for each process
    init_default_scope('mmdet')
    # Without a GPU the parts are on the CPU already: torch frees what it is told to move there (offload_to_cpu).
    whole = dict(rank0_only=True, offload_to_cpu=False)
    runner = FlexibleRunner(
        model=Config.fromfile(config).model,
        work_dir=work_dir,
        default_scope='mmdet',
        launcher='pytorch',
        strategy=dict(
            type='FSDPStrategy',
            model_wrapper=dict(
                type='MMFullyShardedDataParallel',
                device_id=torch.device('cpu'),
                auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls=LAYERS),
            ),
            state_dict_cfg=dict(
                state_dict_type='FULL_STATE_DICT',
                state_dict_config=dict(type='FullStateDictConfig', **whole),
                optim_state_dict_config=dict(type='FullOptimStateDictConfig', **whole),
            ),
        ),
        train_dataloader=dict(
            batch_size=1,
            num_workers=0,
            dataset=Images(),
            collate_fn=dict(type='pseudo_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
    )
    runner.train()
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
