"""Invalid data is reported in one sentence before training starts."""

import json
import logging
import os
import re

import pytest
from mmengine.config import Config

from msda_plugin.engine.data_check import check_coco, check_config_data


def coco(num_images=3, classes=('cat', 'dog')):
    """Each image but the last holds one box of each class."""
    boxes = [(image, label) for image in range(num_images - 1) for label in range(len(classes))]
    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=64, height=48) for i in range(num_images)],
        annotations=[
            dict(id=k, image_id=image, category_id=10 + label, bbox=[4, 4, 20, 10], area=200, iscrowd=0)
            for k, (image, label) in enumerate(boxes)
        ],
        categories=[dict(id=10 + label, name=name) for label, name in enumerate(classes)],
    )


def write(root, content, images=True):
    (root / 'img').mkdir(exist_ok=True)
    if images:
        for image in content['images']:
            path = root / 'img' / image['file_name']
            path.parent.mkdir(exist_ok=True)
            path.touch()
    (root / 'ann.json').write_text(json.dumps(content))
    return root / 'ann.json', root / 'img'


def test_good_file(tmp_path):
    report = check_coco(*write(tmp_path, coco()), classes=('cat', 'dog'))
    assert (report.num_images, report.num_empty_images, report.num_boxes, report.num_degenerate_boxes) == (3, 1, 4, 0)
    assert report.classes == ('cat', 'dog') and report.warnings == ()
    assert str(report).endswith('3 images (1 of them empty), 4 boxes of 2 classes')


def test_only_boxes_of_the_given_classes_are_counted(tmp_path):
    paths = write(tmp_path, coco())
    assert check_coco(*paths).classes == ('cat', 'dog')
    assert check_coco(*paths, classes=['dog']).num_boxes == 2


def test_images_in_subfolders(tmp_path):
    content = coco()
    content['images'][0]['file_name'] = 'day/0.jpg'
    assert check_coco(*write(tmp_path, content)).num_images == 3


def test_degenerate_boxes_are_counted(tmp_path):
    content = coco()
    for annotation, box in zip(
        content['annotations'], ([4, 4, 0, 9], [4, 4, 9, 0.5], [70, 4, 9, 9], [60, 4, 9, 9]), strict=True
    ):
        annotation['bbox'] = box
    report = check_coco(*write(tmp_path, content))
    assert report.num_degenerate_boxes == 3
    assert any('3 of the 4 boxes' in warning for warning in report.warnings)


def test_missing_annotation_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotation file '.*none.json' does not exist; set data_root and ann_"):
        check_coco(tmp_path / 'none.json', tmp_path)


@pytest.mark.parametrize('text', ['<html>', '', '\x89PNG'])
def test_not_json(tmp_path, text):
    (tmp_path / 'ann.json').write_text(text)
    with pytest.raises(ValueError, match='is not JSON .* COCO format is needed'):
        check_coco(tmp_path / 'ann.json', tmp_path)


@pytest.mark.parametrize(
    'content, message',
    [
        ([], 'needs the lists images, annotations, categories, and is a list'),
        (dict(images=[], shapes=[]), 'needs the lists annotations, categories, and is an object with the keys images,'),
        ({**coco(), 'annotations': {}}, 'needs the lists annotations,'),
        ({**coco(), 'images': [dict(id=1)]}, r'images\[0\] lacks file_name, width, height'),
        ({**coco(), 'categories': ['cat']}, r'categories\[0\] lacks id, name'),
        ({**coco(), 'images': coco()['images'][:1] * 2}, 'the ids of its images are not unique'),
        (
            {**coco(), 'annotations': [dict(id=7, image_id=0, category_id=10, bbox=[1, 2], area=2)]},
            r'bbox of the annotation with id 7 must be \[x, y, width, height\], got \[1, 2\]',
        ),
        ({**coco(), 'images': []}, 'lists no images'),
    ],
)
def test_not_coco(tmp_path, content, message):
    (tmp_path / 'ann.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        check_coco(tmp_path / 'ann.json', tmp_path)


def test_unknown_classes_list_both_sides(tmp_path):
    with pytest.raises(ValueError, match='the classes bird, fish of the config; it has cat, dog, the config cat, b'):
        check_coco(*write(tmp_path, coco()), classes=('cat', 'bird', 'fish'))


def test_missing_images_are_counted_and_named(tmp_path):
    ann_file, root = write(tmp_path, coco(num_images=9), images=False)
    (root / '4.jpg').touch()
    with pytest.raises(FileNotFoundError, match=r'8 of the 9 images .* 0.jpg, 1.jpg, 2.jpg, 3.jpg, 5.jpg and 3 more;'):
        check_coco(ann_file, root)
    with pytest.raises(FileNotFoundError, match='image folder .* does not exist'):
        check_coco(ann_file, root / 'nowhere')


def test_warnings(tmp_path):
    content = coco()
    content['annotations'][0]['image_id'] = 99
    warnings = ' '.join(check_coco(*write(tmp_path, content), classes=('dog', 'cat')).warnings)
    assert 'the order cat, dog, the config in the order dog, cat' in warnings
    assert '1 annotation in' in warnings and 'belongs to an image that it does not list' in warnings
    content['annotations'] = []
    assert 'holds no box of the classes cat, dog' in check_coco(*write(tmp_path, content)).warnings[0]


def test_annotations_of_unlisted_categories_are_counted(tmp_path):
    content = coco()
    for annotation, category in zip(content['annotations'], (9, 7, 9), strict=False):
        annotation['category_id'] = category
    report = check_coco(*write(tmp_path, content))
    assert report.num_boxes == 1
    assert any(
        '3 of the 4 annotations' in warning and '(id 7, 9), and are left out' in warning for warning in report.warnings
    )


def test_a_test_file_without_annotations(tmp_path):
    content = coco()
    del content['annotations']
    paths = write(tmp_path, content)
    report = check_coco(*paths, annotated=False)
    assert (report.num_images, report.num_boxes, report.warnings) == (3, 0, ())
    with pytest.raises(ValueError, match='needs the lists annotations'):
        check_coco(*paths)


def test_evaluation_needs_iscrowd(tmp_path):
    content = coco()
    del content['annotations'][0]['iscrowd']
    paths = write(tmp_path, content)
    assert check_coco(*paths).num_boxes == 4
    with pytest.raises(ValueError, match=r'annotations\[0\] lacks iscrowd'):
        check_coco(*paths, evaluated=True)


def test_a_box_of_nan_is_refused(tmp_path):
    content = coco()
    content['annotations'][2]['bbox'][0] = float('nan')
    with pytest.raises(ValueError, match='with id 2 must be .* got .*nan'):
        check_coco(*write(tmp_path, content))


def test_folders_are_listed_once_each(tmp_path, monkeypatch):
    content = coco(num_images=300)
    for index, image in enumerate(content['images']):
        image['file_name'] = f'{index % 3}/{index}.jpg'
    paths = write(tmp_path, content)
    listed = []
    monkeypatch.setattr(os, 'listdir', lambda folder, real=os.listdir: listed.append(folder) or real(folder))
    check_coco(*paths)
    assert sorted(listed) == [f'{tmp_path}/img/{folder}' for folder in range(3)]


# ---- configs --------------------------------------------------------------------------------------------------------
def config(root, classes=('cat', 'dog'), num_classes=2):
    dataset = dict(
        type='CocoDataset',
        data_root=f'{root}/',
        ann_file='ann.json',
        data_prefix=dict(img='img/'),
        metainfo=dict(classes=classes),
    )
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(type='X', bbox_head=dict(type='Y', num_classes=num_classes)),
            train_dataloader=dict(dataset=dataset),
            val_dataloader=dict(dataset=dataset),
            val_evaluator=dict(type='CocoMetric', ann_file=f'{root}/ann.json'),
        )
    )


def test_config(tmp_path):
    write(tmp_path, coco())
    reports = check_config_data(config(tmp_path))
    assert [report.num_images for report in reports] == [3, 3]
    assert len(check_config_data(config(tmp_path), splits=['val'])) == 1


def test_config_of_a_test_server(tmp_path):
    """Its file has no annotations, and its evaluator only writes results; a validation file must have them."""
    content = coco()
    del content['annotations']
    write(tmp_path, content)
    cfg = config(tmp_path)
    cfg.test_dataloader = cfg.val_dataloader.copy()
    cfg.test_evaluator = dict(type='CocoMetric', format_only=True)
    assert [report.num_images for report in check_config_data(cfg, splits=['test'])] == [3]
    cfg.test_evaluator = cfg.val_evaluator
    for split in ('test', 'val'):
        with pytest.raises(ValueError, match='needs the lists annotations'):
            check_config_data(cfg, splits=[split])


def test_config_evaluation_needs_iscrowd(tmp_path):
    content = coco()
    del content['annotations'][0]['iscrowd']
    write(tmp_path, content)
    assert check_config_data(config(tmp_path), splits=['train'])
    with pytest.raises(ValueError, match='lacks iscrowd'):
        check_config_data(config(tmp_path), splits=['val'])


def test_config_with_wrapped_datasets(tmp_path):
    write(tmp_path, coco())
    cfg = config(tmp_path)
    one = cfg.train_dataloader.dataset
    repeated = dict(type='RepeatDataset', times=2, dataset={**one, 'ann_file': 'b'})
    cfg.train_dataloader.dataset = dict(
        type='ClassBalancedDataset', oversample_thr=0.1, dataset=dict(type='ConcatDataset', datasets=[one, repeated])
    )
    with pytest.raises(FileNotFoundError, match=f"annotation file '{tmp_path}/b' does not exist"):
        check_config_data(cfg)
    cfg.train_dataloader.dataset.dataset.datasets.pop()
    assert len(check_config_data(cfg)) == 2


def test_config_missing_data_root(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"data root '.*nowhere/' of train_dataloader.dataset does not exist .* "
        'name its folder with --cfg-options data_root=DIR',
    ):
        check_config_data(config(tmp_path / 'nowhere'))


def test_config_number_of_classes(tmp_path):
    write(tmp_path, coco())
    with pytest.raises(
        ValueError,
        match=re.escape(
            'model.bbox_head.num_classes is 80, but train_dataloader.dataset has 2 classes (cat, dog); set '
            'model.bbox_head.num_classes=2'
        ),
    ):
        check_config_data(config(tmp_path, num_classes=80))
    cfg = config(tmp_path)
    cfg.model = dict(roi_head=dict(bbox_head=[dict(num_classes=2), dict(num_classes=3)]))
    with pytest.raises(ValueError, match=re.escape('model.roi_head.bbox_head.1.num_classes is 3')):
        check_config_data(cfg)


def test_config_without_classes_uses_those_of_the_dataset_class(tmp_path):
    write(tmp_path, coco())
    cfg = config(tmp_path, num_classes=80)
    del cfg.train_dataloader.dataset['metainfo']
    with pytest.raises(ValueError, match='does not have the classes person, bicycle, .* it has cat, dog'):
        check_config_data(cfg)


def test_config_class_without_comma(tmp_path):
    write(tmp_path, coco(classes=('cat',)))
    with pytest.raises(ValueError, match=re.escape("is the string 'cat'; a tuple of one class needs a comma")):
        check_config_data(config(tmp_path, classes=('cat'), num_classes=1))


def test_config_evaluator(tmp_path):
    write(tmp_path, coco())
    cfg = config(tmp_path)
    cfg.val_evaluator.ann_file = f'{tmp_path}/old.json'
    with pytest.raises(FileNotFoundError, match='old.json.* of val_evaluator does not exist'):
        check_config_data(cfg)


def test_config_other_datasets_are_skipped(tmp_path):
    cfg = config(tmp_path / 'nowhere')
    cfg.train_dataloader.dataset = dict(type='VOCDataset', data_root='nowhere')
    cfg.val_dataloader.dataset.backend_args = dict(backend='petrel')
    cfg.val_evaluator = None
    assert check_config_data(cfg) == []


def test_config_warnings_are_logged(tmp_path, caplog):
    from mmengine.logging import MMLogger

    write(tmp_path, coco())
    MMLogger.get_instance('check').addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        check_config_data(config(tmp_path, classes=('dog', 'cat')))
    assert 'names will be swapped' in caplog.text
