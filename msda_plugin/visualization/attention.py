"""What the attention layers of a model look at: recorded in a forward pass, then read out for one query.

Covered are deformable attention on several scales or one (ours and mmcv's, hence MMDetection's own detectors as well)
and DAT's, whose samples are points, and Shunted self-attention, whose samples are the cells of two coarser grids. A
model that is not being recorded is untouched: all hangs on forward hooks, which :func:`record_attention` removes again.
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
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from mmdet.models.dense_heads import DETRHead
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from msda_plugin.layers.deformable_attention import DeformableAttention
from msda_plugin.layers.deformable_detr_layers import pixel_centers
from msda_plugin.layers.deformable_multi_head_attention import DeformableMultiHeadAttention, DeformedPoints
from msda_plugin.layers.shunted_self_attention import ShuntedSelfAttention
from msda_plugin.layers.token_layout import map_to_tokens, tokens_to_map

SAMPLED_SIGNATURE = inspect.signature(MultiScaleDeformableAttention.forward)


@dataclass(frozen=True)
class ImageFrame:
    """Where an image lies in the network's input: resized, at the top left, padded at the right and at the bottom.

    All sizes are (width, height).

    Attributes:
        scale: pixels of the input per pixel of the original image.
        resized: the resized image, in pixels of the input.
        padded: the input.
    """

    scale: np.ndarray
    resized: np.ndarray
    padded: np.ndarray

    @classmethod
    def from_sample(cls, sample: DetDataSample) -> 'ImageFrame':
        """The frame of a sample that has been through a test pipeline and the model.

        Raises:
            ValueError: the pipeline flipped the image.
        """
        if sample.get('flip'):
            raise ValueError(
                f'the image was flipped ({sample.get("flip_direction")}), so that places in the network '
                'are not those in the image; use a test pipeline without RandomFlip'
            )
        resized = np.array(sample.img_shape[1::-1], float)
        return cls(
            scale=np.array(sample.get('scale_factor', (1.0, 1.0))[:2], float),
            resized=resized,
            padded=np.array(sample.get('batch_input_shape', sample.img_shape)[1::-1], float),
        )

    @property
    def size(self) -> np.ndarray:
        """The original image, in its own pixels."""
        return self.resized / self.scale

    def from_image(self, points: np.ndarray) -> np.ndarray:
        """(..., 2), 0 to 1 over the resized image -> pixels of the original image, 0 at its left and upper edge."""
        return np.asarray(points, float) * self.size

    def from_input(self, points: np.ndarray) -> np.ndarray:
        """(..., 2), 0 to 1 over the padded input -> pixels of the original image."""
        return np.asarray(points, float) * self.padded / self.scale


@dataclass(frozen=True)
class LayerView:
    """What one query of one layer looks at: N samples, in pixels (x, y) of the original image.

    Attributes:
        name: the layer's path in the model.
        kind: 'encoder' or 'decoder' (multi-scale deformable attention within the keys, and to them), 'shunted', 'dat'.
        query: which query it is, for people.
        at: (2,), where the query is.
        box: (4,) x1 y1 x2 y2, the reference box that the layer starts from; None: it starts from a point.
        head, level: (N,) integers.
        xy: (N, 2), the samples; the centres of the cells where the layer looks at cells.
        weight: (N,); each head's sum to 1.
        level_names: what each level is; of Shunted attention the levels are its granularities, of DAT's its groups.
        cells: (num_levels, 2), width and height of a cell; None: samples are points.
        origin: (N, 2), where the samples were before they were moved; None: nothing moved them.
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
        """Whether the layer looks at few points near its reference, and not at the whole image."""
        return self.kind in ('encoder', 'decoder')

    def merged(self, keep: np.ndarray | None = None) -> 'LayerView':
        """The view with one sample, of the mean weight, for all heads that look at the same place.

        Args:
            keep: (N,) bool, the samples to take; None: all.
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
    """What one query looks at in all layers.

    Attributes:
        label: for people.
        at: (2,), its place in pixels of the original image.
        box: (4,) x1 y1 x2 y2, the detection; None: the query is a place.
        layers: one view a layer, in the order of the forward pass.
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
        locations: (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y), 0 to 1 over the padded level.
        weights: (bs, num_queries, num_heads, num_levels, num_points), sum 1 over levels and points.
        reference_points: (bs, num_queries, num_levels, 2 or 4), 0 to 1 over the padded level.
        spatial_shapes: (h, w) of each level.
        valid_ratios: (bs, num_levels, 2), the share of each level's width and height that is not padding; None: the
            layer was not told.
        within_keys: the queries are the keys (an encoder), not others that look at them (a decoder).
    """

    name: str
    locations: Tensor
    weights: Tensor
    reference_points: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Tensor | None
    within_keys: bool

    def ratios(self, image: int, frame: ImageFrame) -> np.ndarray:
        """(num_levels, 2), the valid share (width, height) of each level in one image of the batch."""
        if self.valid_ratios is None:
            return np.tile(frame.resized / frame.padded, (len(self.spatial_shapes), 1))
        return to_numpy(self.valid_ratios[image])

    def nearest_query(self, at: Sequence[float], image: int, frame: ImageFrame) -> int:
        """The query of an encoder whose pixel centre is nearest to a place in the original image."""
        # A pixel's own centre stands on every level, times that level's valid share.
        centers = to_numpy(self.reference_points[image, :, 0, :2]) / self.ratios(image, frame)[0]
        return int(np.square(frame.from_image(centers) - np.asarray(at)).sum(1).argmin())

    def view(self, query: int, image: int, frame: ImageFrame) -> LayerView:
        """What a query of an image of the batch looks at."""
        ratios = self.ratios(image, frame)
        reference = to_numpy(self.reference_points[image, query, 0])
        reference = reference / np.resize(ratios[0], len(reference))
        at = frame.from_image(reference[:2])
        half = frame.from_image(reference[2:] / 2) if len(reference) == 4 else None
        weights = to_numpy(self.weights[image, query])  # (heads, levels, points)
        head, level, _ = np.indices(weights.shape)
        # Valid shares, not the padded size: a level's size is rounded, and this is how the model relates the two.
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
        raise IndexError(f'there is no query {query}; the levels {self.spatial_shapes} have {start} pixels')


@dataclass(frozen=True)
class ShuntedAttention:
    """One call of a Shunted self-attention layer, on the device and in the dtype of its inputs.

    Attributes:
        name: the layer's path in the model.
        query: (bs, num_heads, H * W, head_dim).
        keys: one tensor a scale, (bs, heads of the scale, number of its cells, head_dim); coarse first.
        rates: side of a cell of each scale, in tokens.
        hw_shape: (H, W) of the map of tokens.
    """

    name: str
    query: Tensor
    keys: tuple[Tensor, ...]
    rates: tuple[int, ...]
    hw_shape: tuple[int, int]

    def nearest_query(self, at: Sequence[float], image: int, frame: ImageFrame) -> int:
        """The token in which a place of the original image lies."""
        return cell_of(at, self.hw_shape, frame)

    def attention(self, query: int, image: int) -> list[Tensor]:
        """The weights that a query gives to the cells: for each scale (heads of the scale, number of its cells)."""
        # The heads of the first scale come first.
        queries = self.query[image, :, query].split([key.shape[1] for key in self.keys])
        return [
            torch.einsum('hd,hkd->hk', q * q.shape[-1] ** -0.5, key[image]).softmax(-1)
            for q, key in zip(queries, self.keys, strict=True)
        ]

    def view(self, query: int, image: int, frame: ImageFrame) -> LayerView:
        """What a query (a token, counted row by row) of an image of the batch looks at."""
        height, width = self.hw_shape
        token = 1 / np.array([width, height])  # of the padded input
        parts, names, cells, first_head = [], [], [], 0
        for level, (rate, weights) in enumerate(zip(self.rates, self.attention(query, image), strict=True)):
            weights = to_numpy(weights)
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
        query: (bs, num_heads, H * W, head_dim).
        key: (bs, num_heads, num_points, head_dim).
        bias: a slice of the queries -> what is added to their logits, (bs or 1, num_heads, slice,
            num_points); None: nothing.
        points: of each group of heads, before and after they were moved.
        hw_shape: (H, W) of the map.
    """

    name: str
    query: Tensor
    key: Tensor
    bias: Callable[[slice], Tensor] | None
    points: DeformedPoints
    hw_shape: tuple[int, int]

    def nearest_query(self, at: Sequence[float], image: int, frame: ImageFrame) -> int:
        """The pixel of the map in which a place of the original image lies."""
        return cell_of(at, self.hw_shape, frame)

    @torch.no_grad()
    def attention(self, query: int, image: int) -> Tensor:
        """The weights that a query gives to the points, (num_heads, num_points)."""
        q = self.query[image, :, query]
        logits = torch.einsum('hd,hkd->hk', q, self.key[image]) * q.shape[-1] ** -0.5
        if self.bias is not None:
            bias = self.bias(slice(query, query + 1))
            logits = logits + bias[image if len(bias) > 1 else 0, :, 0]
        return logits.softmax(-1)

    def view(self, query: int, image: int, frame: ImageFrame) -> LayerView:
        """What a query (a pixel of the map, counted row by row) of an image of the batch looks at."""
        weights = to_numpy(self.attention(query, image))
        heads, groups = len(weights), self.points.positions.shape[1]
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
            xy=self._pixels(self.points.positions[image], heads, frame),
            weight=weights.ravel(),
            level_names=tuple(f'points of group {i}' for i in range(groups)),
            origin=self._pixels(self.points.references[image], heads, frame),
        )

    def _pixels(self, points: Tensor, heads: int, frame: ImageFrame) -> np.ndarray:
        """(num_groups, Hk, Wk, 2), (y, x), -1 and 1 at centres of border pixels -> (heads * Hk * Wk, 2), (x, y)."""
        size = np.array(self.hw_shape[::-1])
        share = ((to_numpy(points)[..., ::-1] + 1) / 2 * (size - 1) + 0.5) / size
        return frame.from_input(share.repeat(heads // len(share), axis=0)).reshape(-1, 2)


Record = SampledAttention | ShuntedAttention | DeformedAttention


def cell_of(at: Sequence[float], hw_shape: tuple[int, int], frame: ImageFrame) -> int:
    """The pixel of a map of the padded input, counted row by row, in which a place of the original image lies."""
    height, width = hw_shape
    column, row = np.asarray(at) * frame.scale / frame.padded * (width, height)
    return int(min(row, height - 1)) * width + int(min(column, width - 1))


def center_of(query: int, hw_shape: tuple[int, int], frame: ImageFrame) -> np.ndarray:
    """(2,), the centre of a map's pixel in the original image."""
    row, column = divmod(query, hw_shape[1])
    return frame.from_input((np.array([column, row]) + 0.5) / hw_shape[::-1])


def name_of(query: int, hw_shape: tuple[int, int]) -> str:
    row, column = divmod(query, hw_shape[1])
    return f'token {query}: row {row}, column {column} of {hw_shape[0]}×{hw_shape[1]}'


@dataclass
class Recording:
    """What :func:`record_attention` collected.

    Attributes:
        records: one a call of an attention layer, in the order of the calls.
        boxes: (bs, num_queries, 4) as (cx, cy, w, h), 0 to 1 over the resized image: what the head made of the
            decoder's queries; None: the model has no such head.
    """

    records: list[Record] = field(default_factory=list)
    boxes: Tensor | None = None

    def at_point(
        self, at: Sequence[float], sample: DetDataSample, layers: Sequence[str] | None = None, image: int = 0
    ) -> QueryView:
        """What the backbone and the encoder look at from a place in the image.

        Args:
            at: (x, y) in pixels of the original image.
            sample: the model's answer, which knows how the image was resized and padded.
            layers: see :func:`choose_layers`.
            image: which image of the batch.

        Raises:
            ValueError: the place is not in the image, the image was flipped, or no layer is left.
        """
        frame = ImageFrame.from_sample(sample)
        if not (np.zeros(2) <= at).all() or not (at < frame.size).all():
            width, height = frame.size.round().astype(int)
            raise ValueError(
                f'the point {at[0]:g},{at[1]:g} is not in the image, which is {width} wide and {height} '
                f'high; x is from 0 to {width - 1} and y from 0 to {height - 1}'
            )
        views = tuple(
            record.view(record.nearest_query(at, image, frame), image, frame)
            for record in self._chosen(layers)
            if not _looks_from_decoder(record)
        )
        if not views:
            raise ValueError(
                'of the layers that are chosen, none looks from places in the image (those of a backbone '
                'or an encoder do); choose a detection, or other layers'
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
        """What the decoder looks at to find an object, and backbone and encoder from the centre of its box.

        Args:
            number: of the detection, from 0, in ``sample.pred_instances``.
            sample, layers, image: as for :meth:`at_point`.
            class_names: of the labels.

        Raises:
            ValueError: there is no such detection, the model has no decoder's queries to choose from, the image was
                flipped, or a name fits no layer.
        """
        frame = ImageFrame.from_sample(sample)
        query = self.query_of(number, sample, image)
        found = sample.pred_instances[number]
        box = to_numpy(found.bboxes[0])
        at = (box[:2] + box[2:]) / 2
        views = tuple(
            record.view(query if _looks_from_decoder(record) else record.nearest_query(at, image, frame), image, frame)
            for record in self._chosen(layers)
        )
        label = f'detection {number}: {class_names[int(found.labels[0])]} {float(found.scores[0]):.2f}'
        return QueryView(label, at, box, views)

    def query_of(self, number: int, sample: DetDataSample, image: int = 0) -> int:
        """The decoder's query that a detection, counted from 0, comes from.

        Raises:
            ValueError: there is no such detection, or the model has no decoder's queries to choose from.
        """
        if self.boxes is None:
            raise ValueError(
                'detections of this model come from no decoder, so that there is no query to show; choose '
                'a point in the image'
            )
        boxes = to_numpy(sample.pred_instances.bboxes)
        if not 0 <= number < len(boxes):
            known = f'they are numbered from 0, the surest, to {len(boxes) - 1}' if len(boxes) else 'there are none'
            raise ValueError(f'there is no detection {number}; {known}')
        # A head sorts and repeats its queries' boxes, and clips them to the image: the box finds its query again.
        frame = ImageFrame.from_sample(sample)
        center, size = np.split(to_numpy(self.boxes[image]), 2, axis=1)
        candidates = np.concatenate([center - size / 2, center + size / 2], 1).clip(0, 1)
        return int(np.abs(candidates - boxes[number] / np.tile(frame.size, 2)).sum(1).argmin())

    def _chosen(self, layers: Sequence[str] | None) -> list[Record]:
        chosen = choose_layers([record.name for record in self.records], layers)
        return [record for record in self.records if record.name in chosen]


def _looks_from_decoder(record: Record) -> bool:
    return isinstance(record, SampledAttention) and not record.within_keys


def choose_layers(names: Sequence[str], patterns: Sequence[str] | None = None) -> list[str]:
    """The layers to show.

    Args:
        names: of all recorded layers, in their order.
        patterns: parts of names, or patterns with ``*``; 'all' means every layer. None: of each sequence of blocks in
            the backbone the last one, and every other layer.

    Raises:
        ValueError: a pattern fits no layer.
    """
    if patterns is None:
        last = {}
        for name in names:
            last[re.sub(r'blocks\.\d+', 'blocks', name)] = name
        return list(last.values())
    for pattern in patterns:
        if pattern != 'all' and not any(_fits(name, pattern) for name in names):
            raise ValueError(f'no layer is called {pattern}; there are {", ".join(names)}')
    return [name for name in names if any(pattern == 'all' or _fits(name, pattern) for pattern in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return fnmatch(name, f'*{pattern}*')


@contextmanager
def record_attention(model: nn.Module) -> Iterator[Recording]:
    """Record what the attention layers of a model look at while the block runs the model.

    The model's results are the same to the bit; offsets, weights and keys are computed once more from the inputs of
    each layer. What is recorded stays on the model's device, without gradients, and lives as long as the recording.

    Raises:
        ValueError: the model has no layer of a kind that can be recorded.

    Example:
        >>> with record_attention(model) as recording:  # doctest: +SKIP
        ...     sample, = model.test_step(data)
        >>> recording.at_detection(0, sample, model.dataset_meta['classes'])  # doctest: +SKIP
    """
    recorders: dict[type, Callable] = {
        MultiScaleDeformableAttention: _record_sampled,
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
            f'{type(model).__name__} has no attention that can be recorded; covered are '
            f'{", ".join(kind.__name__ for kind in recorders)}'
        )
    found += [(name, module, _record_boxes) for name, module in model.named_modules() if isinstance(module, DETRHead)]
    recording = Recording()
    with ExitStack() as hooks:
        for name, module, recorder in found:
            hooks.enter_context(module.register_forward_hook(partial(recorder, recording, name), with_kwargs=True))
        yield recording


@torch.no_grad()
def _record_sampled(
    recording: Recording, name: str, module: MultiScaleDeformableAttention, args: tuple, kwargs: dict, output: Tensor
) -> None:
    inputs = SAMPLED_SIGNATURE.bind(module, *args, **kwargs)
    inputs.apply_defaults()
    inputs = inputs.arguments
    query, value = inputs['query'], inputs['value']
    within_keys = value is None or value is query
    if inputs['query_pos'] is not None:
        query = query + inputs['query_pos']
    shapes, reference_points = inputs['spatial_shapes'], inputs['reference_points']
    if isinstance(module, DeformableAttention):  # one scale, which takes maps and finds its own references
        value = inputs['query'] if value is None else value
        if value.dim() == 4:
            shapes = [value.shape[2:]]
            value = map_to_tokens(value)
        query = map_to_tokens(query) if query.dim() == 4 else query
        shapes = [shapes] if len(shapes) == 2 else shapes
        if reference_points is None:
            reference_points = pixel_centers(shapes, value.new_ones(len(value), 1, 2))[:, :, None]
        elif reference_points.dim() == 3:
            reference_points = reference_points[:, :, None]
    if not module.batch_first:
        query = query.transpose(0, 1)
    shapes = tuple(tuple(shape) for shape in (shapes.tolist() if isinstance(shapes, Tensor) else shapes))
    offsets = module.sampling_offsets(query).unflatten(-1, (module.num_heads, module.num_levels, module.num_points, 2))
    weights = module.attention_weights(query).unflatten(-1, (module.num_heads, -1)).float().softmax(-1)
    recording.records.append(
        SampledAttention(
            name=name,
            locations=sampling_locations(reference_points, offsets, shapes),
            weights=weights.unflatten(-1, (module.num_levels, module.num_points)),
            reference_points=reference_points,
            spatial_shapes=shapes,
            valid_ratios=inputs['kwargs'].get('valid_ratios'),
            within_keys=within_keys,
        )
    )


def sampling_locations(reference_points: Tensor, offsets: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Where deformable attention samples, by the rule of :func:`msda_plugin.ops.ms_deform_attn_fused`.

    Args:
        reference_points: (bs, num_queries, num_levels, 2 or 4), 0 to 1 over the level.
        offsets: (bs, num_queries, num_heads, num_levels, num_points, 2).
        spatial_shapes: (h, w) of each level.

    Returns:
        (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y), 0 to 1 over the level; float32, or wider.
    """
    offsets = offsets.float() if offsets.dtype != torch.float64 else offsets
    points = reference_points[:, :, None, :, None]
    if reference_points.shape[-1] == 2:
        sizes = offsets.new_tensor(spatial_shapes).flip(-1)  # (num_levels, 2), (w, h)
        return points + offsets / sizes[:, None]
    return points[..., :2] + offsets / offsets.shape[-2] * points[..., 2:] * 0.5


@torch.no_grad()
def _record_shunted(
    recording: Recording, name: str, module: ShuntedSelfAttention, args: tuple, kwargs: dict, output: Tensor
) -> None:
    inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    x, hw_shape = inputs['x'], tuple(inputs['hw_shape'])
    head_dim = module.embed_dims // module.num_heads
    if module.sr_ratio > 1:
        rates = (module.sr_ratio, module.sr_ratio // 2)
        keys = [branch(tokens_to_map(x, hw_shape))[0] for branch in module.branches]
    else:
        rates, keys = (1,), [module.kv(x).chunk(2, dim=-1)[0]]
    recording.records.append(
        ShuntedAttention(
            name=name,
            query=split_heads(module.query(x), head_dim),
            hw_shape=hw_shape,
            rates=rates,
            keys=tuple(split_heads(key, head_dim) for key in keys),
        )
    )


@torch.no_grad()
def _record_deformed(
    recording: Recording, name: str, module: DeformableMultiHeadAttention, args: tuple, kwargs: dict, output: Tensor
) -> None:
    x = inspect.signature(module.forward).bind(*args, **kwargs).arguments['x']
    hw_shape, head_dim = tuple(x.shape[2:]), module.embed_dims // module.num_heads
    query = module.query(map_to_tokens(x))
    points = module._deform(tokens_to_map(query, hw_shape))
    key = module.key(module._sample(x, points.positions))
    bias = None
    if module.position_bias is not None:
        bias = module.position_bias(module._grid(hw_shape, 0.0, points.positions), points.positions)
    recording.records.append(
        DeformedAttention(
            name=name,
            query=split_heads(query, head_dim),
            key=split_heads(key, head_dim),
            bias=bias,
            points=points,
            hw_shape=hw_shape,
        )
    )


def split_heads(tokens: Tensor, head_dim: int) -> Tensor:
    """(bs, M, heads * head_dim) -> (bs, heads, M, head_dim)"""
    return tokens.unflatten(2, (-1, head_dim)).transpose(1, 2)


def _record_boxes(
    recording: Recording, name: str, module: DETRHead, args: tuple, kwargs: dict, output: tuple[Tensor, Tensor]
) -> None:
    recording.boxes = output[1][-1].detach()  # of the last decoder layer


def to_numpy(tensor: Tensor) -> np.ndarray:
    """On the host, in double precision."""
    return tensor.detach().double().cpu().numpy()
