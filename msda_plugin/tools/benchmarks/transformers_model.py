"""Models of Hugging Face transformers for ``benchmark model hf:NAME``: random weights, images and objects."""

import torch
from torch import Tensor, nn

NUM_OBJECTS = 10  # per image of a training step
DETECTION = ('deformable_detr', 'grounding_dino')
NAMES = (*DETECTION, 'mask2former')
# Token ids of '[CLS] a cat . a remote control . [SEP]' in BERT's vocabulary.
PROMPT = (101, 1037, 4937, 1012, 1037, 6556, 2491, 1012, 102)


def build(name: str) -> nn.Module:
    """The model of a family in its default size, with a ResNet-50 or a Swin-T.

    Raises:
        ValueError: If there is no such name.
        ImportError: If transformers is not installed.
    """
    if name not in NAMES:
        raise ValueError(f'hf:{name} is unknown; choose one of {", ".join(f"hf:{known}" for known in NAMES)}')
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'hf:{name} needs transformers ({error}): pip install transformers') from error
    swin = dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7)
    if name == 'deformable_detr':
        config = transformers.DeformableDetrConfig(
            backbone_config=transformers.ResNetConfig(out_features=['stage2', 'stage3', 'stage4'])
        )
        return transformers.DeformableDetrForObjectDetection(config)
    if name == 'grounding_dino':
        config = transformers.GroundingDinoConfig(
            backbone_config=transformers.SwinConfig(**swin, out_indices=[2, 3, 4])
        )
        return transformers.GroundingDinoForObjectDetection(config)
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**swin, out_features=['stage1', 'stage2', 'stage3', 'stage4'])
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def make_batch(name: str, height: int, width: int, batch: int, training: bool) -> dict[str, object]:
    """Seeded, normalized images; in training with boxes (cx, cy, w, h), or masks for a segmentation model."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, object] = dict(
        pixel_values=torch.randn(batch, 3, height, width, generator=generator),
        pixel_mask=torch.ones(batch, height, width, dtype=torch.long),
    )
    if name == 'grounding_dino':
        inputs['input_ids'] = torch.tensor([PROMPT] * batch)
        inputs['attention_mask'] = torch.ones_like(inputs['input_ids'])
        inputs['token_type_ids'] = torch.zeros_like(inputs['input_ids'])
    if not training:
        return inputs
    objects = [torch.rand(NUM_OBJECTS, 2, 2, generator=generator).sort(1).values for _ in range(batch)]
    classes = torch.zeros(NUM_OBJECTS, dtype=torch.long)
    if name in DETECTION:
        boxes = [torch.cat([corners.mean(1), corners[:, 1] - corners[:, 0]], 1) for corners in objects]
        return inputs | dict(labels=[dict(class_labels=classes, boxes=t) for t in boxes])
    masks = [_masks(corners, height, width) for corners in objects]
    return inputs | dict(mask_labels=masks, class_labels=[classes] * batch)


def to_device(inputs: object, device: torch.device) -> object:
    """The same nested lists and dicts, with tensors on the device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {key: to_device(value, device) for key, value in inputs.items()}
    return [to_device(value, device) for value in inputs]


def _masks(corners: Tensor, height: int, width: int) -> Tensor:
    """(n, 2, 2) corners (x, y), 0-1 -> (n, height, width), 1 within the boxes."""
    x, y = (torch.arange(size).add(0.5) / size for size in (width, height))
    (x1, y1), (x2, y2) = corners.transpose(0, 2)[:, 0], corners.transpose(0, 2)[:, 1]
    inside_x = (x >= x1[:, None]) & (x < x2[:, None])
    inside_y = (y >= y1[:, None]) & (y < y2[:, None])
    return (inside_y[:, :, None] & inside_x[:, None]).float()
