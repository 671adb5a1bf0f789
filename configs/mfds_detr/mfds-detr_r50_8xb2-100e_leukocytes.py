# MFDS-DETR: Deformable DETR with the high-level screening pyramid, for leukocytes.
_base_ = '../deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'

data_root = 'data/leukocytes/'
metainfo = dict(classes=('neutrophil', 'eosinophil', 'basophil', 'lymphocyte', 'monocyte'))

model = dict(
    num_queries=100,
    neck=dict(_delete_=True, type='msda_plugin.MFDSHSFPN', in_channels=[512, 1024, 2048], out_channels=256),
    bbox_head=dict(num_classes=5),
)

dataset = dict(data_root=data_root, metainfo=metainfo, data_prefix=dict(img='images/'))
train_dataloader = dict(dataset=dict(dataset, ann_file='train.json'))
val_dataloader = dict(dataset=dict(dataset, ann_file='val.json'))
test_dataloader = dict(dataset=dict(dataset, ann_file='test.json'))
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = dict(ann_file=data_root + 'test.json')

max_epochs = 100
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[80], gamma=0.1)]
auto_scale_lr = dict(base_batch_size=16)
