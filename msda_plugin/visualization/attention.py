"""Records the attention of a model in a forward pass, and returns what one query attends to.

Supported layers are multi-scale and single-scale deformable attention (msda_plugin's and mmcv's, so MMDetection's
detectors as well), DAT's deformable attention and Shunted self-attention. The samples of the first three are points,
those of Shunted self-attention are the cells of two coarser grids. Recording uses forward hooks, which
:func:`record_attention` removes again.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial

import numpy as np
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVMultiScaleDeformableAttention
from mmdet.models.dense_heads import DETRHead
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from msda_plugin.heads.box_ops import box_cxcywh_to_xyxy
from msda_plugin.heads.dfine_head import DFINEHead
from msda_plugin.layers.attention_weights import attention_weights
from msda_plugin.layers.deformable_multi_head_attention import AttentionInputs, DeformableMultiHeadAttention
from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention
from msda_plugin.layers.shunted_self_attention import AttentionScale, ShuntedSelfAttention

SAMPLED_SIGNATURE = inspect.signature(MultiScaleDeformableAttention.forward)


@dataclass(frozen=True)
class ImageFrame:
    """The position of an image in the network's input: resized, at the top left, padded on the right and the bottom.

    All sizes are (width, height).

    Attributes:
        scale: input pixels per pixel of the original image.
        resized: size of the resized image, in input pixels.
        padded: size of the input.
    """

    scale: np.ndarray
    resized: np.ndarray
    padded: np.ndarray

    @classmethod
    def from_sample(cls, sample: DetDataSample) -> 'ImageFrame':
        """The frame of a sample that a test pipeline and the model returned.

        Raises:
            ValueError: If the pipeline flipped the image.
        """
        if sample.get('flip'):
            raise ValueError(
                f'the test pipeline flipped the image ({sample.get("flip_direction")}), so locations in the '
                'network differ from those in the image; use a test pipeline without RandomFlip'
            )
        resized = np.array(sample.img_shape[1::-1], float)
        return cls(
            scale=np.array(sample.get('scale_factor', (1.0, 1.0))[:2], float),
            resized=resized,
            padded=np.array(sample.get('batch_input_shape', sample.img_shape)[1::-1], float),
        )

    @property
    def size(self) -> np.ndarray:
        """Size of the original image, in its pixels."""
        return self.resized / self.scale

    def from_image(self, points: np.ndarray) -> np.ndarray:
        """(..., 2), 0-1 over the resized image -> pixels of the original image, 0 at its left and upper edge."""
        return np.asarray(points, float) * self.size

    def from_input(self, points: np.ndarray) -> np.ndarray:
        """(..., 2), 0-1 over the padded input -> pixels of the original image."""
        return np.asarray(points, float) * self.padded / self.scale


@dataclass(frozen=True)
class LayerView:
    """The N samples that one query of one layer attends to, in pixels (x, y) of the original image.

    Attributes:
        name: the layer's path in the model.
        kind: 'encoder' (deformable self-attention of the keys), 'decoder' (deformable attention to the keys),
            'shunted' or 'dat'.
        query: description of the query.
        at: (2,), location of the query.
        box: (4,) x1 y1 x2 y2, the layer's reference box; None: the reference is a point.
        head, level: (N,) integers. The levels of Shunted attention are its scales, those of DAT its groups.
        xy: (N, 2), the sampled points, or the centers of the cells.
        weight: (N,), attention weights, summing to 1 for each head.
        level_names: description of each level.
        cells: (num_levels, 2), width and height of a cell; None: samples are points.
        origin: (N, 2), the samples before the layer moved them; None: the layer does not move points.
    """

    name: str
    kind: str
    query: str
    at: np.ndarray
    box: np.ndarray | None
    head: np.ndarray
    level: np.ndarray
    xy: np.ndarray
    weight: np.ndarray
    level_names: tuple[str, ...]
    cells: np.ndarray | None = None
    origin: np.ndarray | None = None

    @property
    def is_local(self) -> bool:
        """Whether the layer attends to a few points near its reference instead of the whole image."""
        return self.kind in ('encoder', 'decoder')

    @property
    def uniform(self) -> np.ndarray:
        """(N,), the weight that each sample would have if its head attended to all of its samples equally."""
        return 1 / np.bincount(self.head)[self.head]

    def merged(self, keep: np.ndarray | None = None) -> 'LayerView':
        """Merge samples of different heads at the same location into one sample with their mean weight.

        Args:
            keep: (N,) bool, the samples to use; None: all.
        """
        keep = np.ones(len(self.head), bool) if keep is None else keep
        places = np.column_stack([self.level, self.xy.round(3)])[keep]
        _, first, group, count = np.unique(places, axis=0, return_index=True, return_inverse=True, return_counts=True)
        weight = np.bincount(group.ravel(), self.weight[keep]) / count
        head, level, xy = (part[keep][first] for part in (self.head, self.level, self.xy))
        return replace(
            self,
            head=head,
            level=level,
            xy=xy,
            weight=weight,
            origin=None if self.origin is None else self.origin[keep][first],
        )


@dataclass(frozen=True)
class QueryView:
    """What one query attends to in all layers.

    Attributes:
        label: description of the query.
        at: (2,), location of the query in pixels of the original image.
        box: (4,) x1 y1 x2 y2, the detection; None: the query is a point.
        layers: one view per layer, in the order of the forward pass.
    """

    label: str
    at: np.ndarray
    box: np.ndarray | None
    layers: tuple[LayerView, ...]


@dataclass(frozen=True)
class SampledAttention:
    """One call of a multi-scale deformable attention layer, on the device and in the dtype of its inputs.

    Attributes:
        name: the layer's path in the model.
        locations, weights, reference_points: see :class:`msda_plugin.layers.multi_scale_deformable_attention.Sampling`.
        spatial_shapes: (h, w) of each level.
        valid_ratios: (bs, num_levels, 2), the unpadded share of each level's width and height, 0-1; None: the layer did
            not get them.
        within_keys: whether the queries are the keys, as in an encoder.
    """

    name: str
    locations: Tensor
    weights: Tensor
    reference_points: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Tensor | None
    within_keys: bool

    def ratios(self, image: int, frame: ImageFrame) -> np.ndarray:
        """(num_levels, 2), the unpadded share (width, height) of each level for one image of the batch, 0-1."""
        if self.valid_ratios is None:
            return np.tile(frame.resized / frame.padded, (len(self.spatial_shapes), 1))
        return to_numpy(self.valid_ratios[image])

    def nearest_query(self, at: Sequence[float], image: int, frame: ImageFrame) -> int:
        """The encoder query whose pixel center is nearest to a point of the original image."""
        # An encoder's reference on each level is the pixel center times the level's valid ratio.
        centers = to_numpy(self.reference_points[image, :, 0, :2]) / self.ratios(image, frame)[0]
        return int(np.square(frame.from_image(centers) - np.asarray(at)).sum(1).argmin())

    def view(self, query: int, image: int, frame: ImageFrame) -> LayerView:
        """What a query attends to in an image of the batch."""
        ratios = self.ratios(image, frame)
        reference = to_numpy(self.reference_points[image, query, 0])
        reference = reference / np.resize(ratios[0], len(reference))
        at = frame.from_image(reference[:2])
        half = frame.from_image(reference[2:] / 2) if len(reference) == 4 else None
        weights = to_numpy(self.weights[image, query])  # (heads, levels, points)
        head, level, _ = np.indices(weights.shape)
        # Divided by the valid ratios, as in the model: the padded size is inexact, since a level's size is rounded.
        xy = frame.from_image(to_numpy(self.locations[image, query]) / ratios[:, None])
        return LayerView(
            name=self.name,
            kind='encoder' if self.within_keys else 'decoder',
            query=self._query_name(query),
            at=at,
            box=None if half is None else np.concatenate([at - half, at + half]),
            head=head.ravel(),
            level=level.ravel(),
            xy=xy.reshape(-1, 2),
            weight=weights.ravel(),
            level_names=tuple(f'level {i}, {h}×{w}' for i, (h, w) in enumerate(self.spatial_shapes)),
        )

    def _query_name(self, query: int) -> str:
        if not self.within_keys:
            return f'decoder query {query}'
        start = 0
        for level, (height, width) in enumerate(self.spatial_shapes):
            if query < start + height * width:
                row, column = divmod(query - start, width)
                return f'encoder query {query}: level {level}, row {row}, column {column}'
            start += height * width
        raise IndexError(f'query {query} does not exist: the levels {self.spatial_shapes} have {start} pixels')


@dataclass(frozen=True)
class ShuntedAttention:
    """One call of a Shunted self-attention layer, on the device and in the dtype of its inputs.

    Attributes:
        name: the layer's path in the model.
        scales: queries and keys of each scale; a cell is the window of tokens merged into one key.
        hw_shape: (H, W) of the token map.
    """

    name: str
    scales: Sequence[AttentionScale]
    hw_shape: tuple[int, int]

    def nearest_query(self, at: Sequence[float], image: int, frame: ImageFrame) -> int:
        """The token that contains a point of the original image."""
        return cell_of(at, self.hw_shape, frame)

    def attention(self, query: int, image: int) -> list[Tensor]:
        """The attention weights of a query for each scale, (heads of the scale, number of cells)."""
        return [attention_weights(scale.query[image, :, query, None], scale.key[image])[:, 0] for scale in self.scales]

    def view(self, query: int, image: int, frame: ImageFrame) -> LayerView:
        """What a query (a token, counted row by row) attends to in an image of the batch."""
        height, width = self.hw_shape
        token = 1 / np.array([width, height])  # of the padded input
        parts, names, cells, first_head = [], [], [], 0
        for level, (scale, weights) in enumerate(zip(self.scales, self.attention(query, image), strict=True)):
            weights, rate = to_numpy(weights), scale.rate
            rows, columns = height // rate, width // rate
            y, x = np.divmod(np.arange(rows * columns), columns)
            centers = frame.from_input((np.stack([x, y], 1) + 0.5) * rate * token)
            heads = np.repeat(np.arange(first_head, first_head + len(weights)), rows * columns)
            parts.append((heads, np.full(len(heads), level), np.tile(centers, (len(weights), 1)), weights.ravel()))
            names.append(f'{rate}×{rate} merged, {rows}×{columns}' if rate > 1 else f'not merged, {rows}×{columns}')
            cells.append(frame.from_input(rate * token))
            first_head += len(weights)
        head, level, xy, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
        return LayerView(
            name=self.name,
            kind='shunted',
            query=name_of(query, self.hw_shape),
            at=center_of(query, self.hw_shape, frame),
            box=None,
            head=head,
            level=level,
            xy=xy,
            weight=weight,
            level_names=tuple(names),
            cells=np.array(cells),
        )


@dataclass(frozen=True)
class DeformedAttention:
    """One call of DAT's deformable multi-head attention, on the device and in the dtype of its inputs.

    Attributes:
        name: the layer's path in the model.
        inputs: queries, keys, biases and deformed points of the attention.
        hw_shape: (H, W) of the map.
    """

    name: str
    inputs: AttentionInputs
    hw_shape: tuple[int, int]

    def nearest_query(self, at: Sequence[float], image: int, frame: ImageFrame) -> int:
        """The pixel of the map that contains a point of the original image."""
        return cell_of(at, self.hw_shape, frame)

    @torch.no_grad()
    def attention(self, query: int, image: int) -> Tensor:
        """The attention weights of a query, (num_heads, num_points)."""
        part = slice(query, query + 1)
        bias = None if self.inputs.bias is None else self.inputs.bias(part)
        return attention_weights(self.inputs.query[:, :, part], self.inputs.key, bias)[image, :, 0]

    def view(self, query: int, image: int, frame: ImageFrame) -> LayerView:
        """What a query (a pixel of the map, counted row by row) attends to in an image of the batch."""
        weights = to_numpy(self.attention(query, image))
        points = self.inputs.points
        heads, groups = len(weights), points.positions.shape[1]
        head, _ = np.indices(weights.shape)
        group = head * groups // heads
        return LayerView(
            name=self.name,
            kind='dat',
            at=center_of(query, self.hw_shape, frame),
            box=None,
            query=name_of(query, self.hw_shape),
            head=head.ravel(),
            level=group.ravel(),
            xy=self._pixels(points.positions[image], heads, frame),
            weight=weights.ravel(),
            level_names=tuple(f'points of group {i}' for i in range(groups)),
            origin=self._pixels(points.references[image], heads, frame),
        )

    def _pixels(self, points: Tensor, heads: int, frame: ImageFrame) -> np.ndarray:
        """(num_groups, Hk, Wk, 2), (y, x), -1 and 1 at border pixel centers -> image pixels (heads * Hk * Wk, 2)."""
        size = np.array(self.hw_shape[::-1])
        share = ((to_numpy(points)[..., ::-1] + 1) / 2 * (size - 1) + 0.5) / size
        return frame.from_input(share.repeat(heads // len(share), axis=0)).reshape(-1, 2)


Record = SampledAttention | ShuntedAttention | DeformedAttention


def cell_of(at: Sequence[float], hw_shape: tuple[int, int], frame: ImageFrame) -> int:
    """The pixel of a map of the padded input, counted row by row, that contains a point of the original image."""
    height, width = hw_shape
    column, row = np.asarray(at) * frame.scale / frame.padded * (width, height)
    return int(min(row, height - 1)) * width + int(min(column, width - 1))


def center_of(query: int, hw_shape: tuple[int, int], frame: ImageFrame) -> np.ndarray:
    """(2,), the center of a pixel of the map, in pixels of the original image."""
    row, column = divmod(query, hw_shape[1])
    return frame.from_input((np.array([column, row]) + 0.5) / hw_shape[::-1])


def name_of(query: int, hw_shape: tuple[int, int]) -> str:
    row, column = divmod(query, hw_shape[1])
    return f'token {query}: row {row}, column {column} of {hw_shape[0]}×{hw_shape[1]}'


@dataclass
class Recording:
    """The records of :func:`record_attention`.

    Attributes:
        records: one per call of an attention layer, in the order of the calls.
        boxes: (bs, num_queries, 4) as (cx, cy, w, h), 0-1 over the resized image: the head's boxes for the decoder
            queries; None: the model has no DETR head.
        edge_logits: (bs, num_queries, 4 * num_bins) of each decoder layer of D-FINE, which changes the distributions of
            the edges by them; empty for other detectors.
        edge_distances: (num_bins,), how far each bin moves an edge, as a share of the box.
    """

    records: list[Record] = field(default_factory=list)
    boxes: Tensor | None = None
    edge_logits: list[Tensor] = field(default_factory=list)
    edge_distances: np.ndarray | None = None

    def edges_of(self, number: int, sample: DetDataSample, image: int = 0) -> np.ndarray | None:
        """D-FINE's distributions of the edges of detection ``number``, (num_layers, 4, num_bins); None: no D-FINE.

        Raises:
            ValueError: If the detection does not exist.
        """
        if not self.edge_logits:
            return None
        query = self.query_of(number, sample, image)
        logits = torch.stack([logits[image, query] for logits in self.edge_logits]).cumsum(0)
        return to_numpy(logits.unflatten(-1, (4, -1)).softmax(-1))

    def at_point(
        self, at: Sequence[float], sample: DetDataSample, layers: Sequence[str] | None = None, image: int = 0
    ) -> QueryView:
        """What backbone and encoder attend to from a point of the image.

        Args:
            at: (x, y) in pixels of the original image.
            sample: the model's result, with the metadata of resizing and padding.
            layers: see :func:`choose_layers`.
            image: index of the image in the batch.

        Raises:
            ValueError: If the point is outside the image, the image was flipped, or no chosen layer is in backbone or
                encoder.
        """
        frame = ImageFrame.from_sample(sample)
        if not (np.zeros(2) <= at).all() or not (at < frame.size).all():
            width, height = frame.size.round().astype(int)
            raise ValueError(
                f'the point {at[0]:g},{at[1]:g} is outside the image, which is {width}x{height}; expected x from '
                f'0 to {width - 1} and y from 0 to {height - 1}'
            )
        views = tuple(
            record.view(record.nearest_query(at, image, frame), image, frame)
            for record in self._chosen(layers)
            if not _is_decoder(record)
        )
        if not views:
            raise ValueError(
                'none of the chosen layers is in the backbone or the encoder, and a point has no decoder query; '
                'choose a detection or other layers'
            )
        return QueryView(f'point ({at[0]:g}, {at[1]:g})', np.asarray(at, float), None, views)

    def at_detection(
        self,
        number: int,
        sample: DetDataSample,
        class_names: Sequence[str],
        layers: Sequence[str] | None = None,
        image: int = 0,
    ) -> QueryView:
        """What the decoder attends to for a detection, and backbone and encoder from the center of its box.

        Args:
            number: index of the detection in ``sample.pred_instances``.
            sample, layers, image: as for :meth:`at_point`.
            class_names: name of each label.

        Raises:
            ValueError: If the detection does not exist, the model has no decoder queries, the image was flipped, or a
                pattern matches no layer.
        """
        frame = ImageFrame.from_sample(sample)
        query = self.query_of(number, sample, image)
        found = sample.pred_instances[number]
        box = to_numpy(found.bboxes[0])
        at = (box[:2] + box[2:]) / 2
        views = tuple(
            record.view(query if _is_decoder(record) else record.nearest_query(at, image, frame), image, frame)
            for record in self._chosen(layers)
        )
        label = f'detection {number}: {class_names[int(found.labels[0])]} {float(found.scores[0]):.2f}'
        return QueryView(label, at, box, views)

    def query_of(self, number: int, sample: DetDataSample, image: int = 0) -> int:
        """The decoder query of detection ``number``.

        Raises:
            ValueError: If the detection does not exist, or the model has no decoder queries.
        """
        if self.boxes is None:
            raise ValueError('this model has no decoder queries to show for a detection; choose a point of the image')
        boxes = to_numpy(sample.pred_instances.bboxes)
        if not 0 <= number < len(boxes):
            known = f'expected 0 (highest score) to {len(boxes) - 1}' if len(boxes) else 'nothing was detected'
            raise ValueError(f'detection {number} does not exist; {known}')
        # A head sorts, repeats and clips the boxes of its queries, so the query is found by its box.
        frame = ImageFrame.from_sample(sample)
        candidates = to_numpy(box_cxcywh_to_xyxy(self.boxes[image])).clip(0, 1)
        return int(np.abs(candidates - boxes[number] / np.tile(frame.size, 2)).sum(1).argmin())

    def _chosen(self, layers: Sequence[str] | None) -> list[Record]:
        chosen = choose_layers([record.name for record in self.records], layers)
        return [record for record in self.records if record.name in chosen]


def _is_decoder(record: Record) -> bool:
    return isinstance(record, SampledAttention) and not record.within_keys


def choose_layers(names: Sequence[str], patterns: Sequence[str] | None = None) -> list[str]:
    """Choose the layers to show.

    Args:
        names: all recorded layers, in the order of the forward pass.
        patterns: parts of names, or patterns with ``*``; 'all' means every layer. None: the last layer of each sequence
            of backbone blocks, and every other layer.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    if patterns is None:
        last = {}
        for name in names:
            last[re.sub(r'blocks\.\d+', 'blocks', name)] = name
        return list(last.values())
    for pattern in patterns:
        if pattern != 'all' and not any(_matches(name, pattern) for name in names):
            raise ValueError(f'no layer matches {pattern}; the layers are {", ".join(names)}')
    return [name for name in names if any(pattern == 'all' or _matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, f'*{pattern}*')


@contextmanager
def record_attention(model: nn.Module) -> Iterator[Recording]:
    """Record the attention of a model while the ``with`` block runs it.

    The model's results stay bitwise the same; each layer's offsets, weights and keys are computed a second time. The
    records stay on the model's device, without gradients.

    Raises:
        ValueError: If the model has no supported attention layer.

    Example:
        >>> with record_attention(model) as recording:  # doctest: +SKIP
        ...     sample, = model.test_step(data)
        >>> recording.at_detection(0, sample, model.dataset_meta['classes'])  # doctest: +SKIP
    """
    recorders: dict[type, Callable] = {
        MMCVMultiScaleDeformableAttention: _record_sampled,
        DeformableMultiHeadAttention: _record_deformed,
        ShuntedSelfAttention: _record_shunted,
    }
    found = [
        (name, module, recorder)
        for name, module in model.named_modules()
        for kind, recorder in recorders.items()
        if isinstance(module, kind)
    ]
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no attention layer that can be recorded; supported are '
            f'{", ".join(kind.__name__ for kind in recorders)}'
        )
    found += [(name, module, _record_boxes) for name, module in model.named_modules() if isinstance(module, DETRHead)]
    for head in (module for module in model.modules() if isinstance(module, DFINEHead)):
        # The last branch is that of the proposals.
        found += [('', branch, partial(_record_edges, head)) for branch in head.reg_branches[:-1]]
    recording = Recording()
    with ExitStack() as hooks:
        for name, module, recorder in found:
            hooks.enter_context(module.register_forward_hook(partial(recorder, recording, name), with_kwargs=True))
        yield recording


@torch.no_grad()
def _record_sampled(
    recording: Recording,
    name: str,
    module: MMCVMultiScaleDeformableAttention,
    args: tuple,
    kwargs: dict,
    output: Tensor,
) -> None:
    inputs = SAMPLED_SIGNATURE.bind(module, *args, **kwargs).arguments
    inputs |= inputs.pop('kwargs', {})
    # mmcv's layer lacks this method but has all the attributes that it uses.
    method = getattr(type(module), 'sampling', MultiScaleDeformableAttention.sampling)
    sampling = method(**inputs)
    shapes = sampling.spatial_shapes
    shapes = shapes.tolist() if isinstance(shapes, Tensor) else shapes
    recording.records.append(
        SampledAttention(
            name=name,
            locations=sampling.locations,
            weights=sampling.weights,
            reference_points=sampling.reference_points,
            spatial_shapes=tuple(tuple(shape) for shape in shapes),
            valid_ratios=inputs.get('valid_ratios'),
            within_keys=inputs.get('value') is None or inputs['value'] is inputs['query'],
        )
    )


@torch.no_grad()
def _record_shunted(
    recording: Recording, name: str, module: ShuntedSelfAttention, args: tuple, kwargs: dict, output: Tensor
) -> None:
    inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    scales = module.scales(inputs['x'], inputs['hw_shape'])
    recording.records.append(ShuntedAttention(name, scales, tuple(inputs['hw_shape'])))


@torch.no_grad()
def _record_deformed(
    recording: Recording, name: str, module: DeformableMultiHeadAttention, args: tuple, kwargs: dict, output: Tensor
) -> None:
    x = inspect.signature(module.forward).bind(*args, **kwargs).arguments['x']
    recording.records.append(DeformedAttention(name, module.attention_inputs(x), tuple(x.shape[2:])))


def _record_boxes(
    recording: Recording, name: str, module: DETRHead, args: tuple, kwargs: dict, output: tuple[Tensor, Tensor]
) -> None:
    recording.boxes = output[1][-1].detach()  # of the last decoder layer


def _record_edges(
    head: DFINEHead, recording: Recording, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor
) -> None:
    recording.edge_logits.append(output.detach())
    recording.edge_distances = to_numpy(head.bin_values / head.reg_scale)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Copy to the CPU, as float64."""
    return tensor.detach().double().cpu().numpy()
