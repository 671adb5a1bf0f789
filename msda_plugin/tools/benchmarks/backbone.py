"""``benchmark backbone``: Shunted Transformer against a plain implementation of the published arithmetic."""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from msda_plugin.backbones.shunted_transformer import ShuntedTransformer
from msda_plugin.layers.shunted_self_attention import ShuntedSelfAttention
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement
from msda_plugin.tools.benchmarks.fresh_process import in_a_process, peak_bytes
from msda_plugin.tools.benchmarks.options import add_options, describe_machine, describe_memory
from msda_plugin.tools.benchmarks.timing import Timer

IMPLEMENTATIONS = ('plain', 'msda_plugin')
# (run, (batch, 3, H, W), with a backward pass); --size replaces H and W.
CASES = (('forward', (1, 3, 800, 1280), False), ('forward + backward', (1, 3, 512, 640), True))


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``backbone``, whose namespace `run` takes."""
    parser = subparsers.add_parser('backbone', help='Shunted Transformer against the plain published arithmetic')
    parser.add_argument('--arch', default='tiny', choices=('tiny', 'small', 'base'))
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='image size of both runs (default: 800 1280 for forward, 512 640 for forward + backward)',
    )
    parser.add_argument('--batch', type=int, default=1)
    add_options(parser, repeats=5)
    return parser


def conditions(args: argparse.Namespace) -> str:
    """The conditions of the measurements."""
    return (
        f'Shunted Transformer {args.arch}, {describe_machine(args)}; median of {args.repeats} runs; peak '
        f'{describe_memory(args.device)}'
    )


def run(args: argparse.Namespace) -> int:
    """Print one line for each implementation of every case, each measured in a fresh process for its peak memory."""
    print(conditions(args))
    print(f'{"case":<36}{"implementation":<16}{"seconds":>9}{"MB":>8}{"speed":>8}{"memory":>8}')
    for row in comparisons(args):
        for side, columns, _ in row.lines():
            print(f'{f"{row.run} {row.case}":<36}{side:<16}{columns}', flush=True)
    return 0


def comparisons(args: argparse.Namespace) -> Iterator[Comparison]:
    """Measure every case, each implementation in a fresh process."""
    for what, shape, backward in CASES:
        shape = (args.batch, 3, *(args.size or shape[2:]))
        plain, ours = (
            measure(implementation, args.arch, shape, backward, args.threads, args.repeats, args.device)
            for implementation in IMPLEMENTATIONS
        )
        yield Comparison('x'.join(map(str, shape)), what, IMPLEMENTATIONS, plain, ours)


def measure(
    implementation: str,
    arch: str | dict,
    shape: tuple[int, int, int, int],
    backward: bool,
    threads: int,
    repeats: int,
    device: str = 'cpu',
) -> Measurement:
    """Measure one implementation in a fresh process."""
    return in_a_process(_measure_here, implementation, arch, shape, backward, threads, repeats, device)


def _measure_here(implementation, arch, shape, backward, threads, repeats, device):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = ShuntedTransformer(arch).train(backward)
    model.init_weights()
    model, image = model.to(device), torch.rand(shape, device=device)
    forward = model if implementation == 'msda_plugin' else lambda image: plain_forward(model, image)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            outs = forward(image)
            if backward:
                sum(out.mean() for out in outs).backward()

    return Measurement(Timer(torch.device(device), repeats).median(step), peak_bytes(device))


def plain_forward(model: ShuntedTransformer, image: Tensor) -> tuple[Tensor, ...]:
    """The model's forward with softmax(q k^T) in memory and one layer for each step, on (B, C, H, W) maps."""
    x, outs = image, []
    for i, stage in enumerate(model.stages):
        embed = stage.patch_embed
        if i == 0:
            for layer in embed.convs:
                x = F.relu(layer.norm(layer.conv(x)))
        x = embed.proj(x)
        hw_shape = x.shape[2:]
        x = embed.norm(x.flatten(2).transpose(1, 2))
        for block in stage.blocks:
            x = x + block.drop_path(plain_attention(block.attn, block.norm1(x), hw_shape))
            mlp = block.mlp
            hidden = mlp.fc1(block.norm2(x))
            hidden = F.gelu(hidden + _plain_depthwise(mlp.dwconv, hidden, hw_shape))
            x = x + block.drop_path(mlp.fc2(hidden))
        x = _plain_map(stage.norm(x), hw_shape).contiguous()
        if i in model.out_indices:
            outs.append(x)
    return tuple(outs)


def _plain_map(x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *hw_shape)


def _plain_depthwise(conv: torch.nn.Conv2d, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    return conv(_plain_map(x, hw_shape)).flatten(2).transpose(1, 2)


def plain_attention(attn: ShuntedSelfAttention, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    """The layer's forward with softmax(q k^T) in memory, (B, H * W, C) -> (B, H * W, C)."""
    batch, num_tokens, dims = x.shape
    head_dim = dims // attn.num_heads

    def heads(t: Tensor) -> Tensor:
        return t.reshape(batch, t.shape[1], -1, head_dim).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ heads(key).transpose(2, 3)) * head_dim**-0.5
        return (scores.softmax(-1) @ heads(value)).transpose(1, 2).reshape(batch, num_tokens, -1)

    query = heads(attn.query(x))
    if attn.sr_ratio == 1:
        key, value = attn.kv(x).chunk(2, dim=-1)
        out = attend(query, key, value) + _plain_depthwise(attn.local_enhancement, value, hw_shape)
        return attn.proj(out)
    outs = []
    for part, branch in zip(query.chunk(2, dim=1), attn.branches, strict=True):
        reduced = branch.reduction(_plain_map(x, hw_shape))
        key, value = branch.kv(F.gelu(branch.norm(reduced.flatten(2).transpose(1, 2)))).chunk(2, dim=-1)
        outs.append(attend(part, key, value + _plain_depthwise(branch.local_enhancement, value, reduced.shape[2:])))
    return attn.proj(torch.cat(outs, dim=-1))
