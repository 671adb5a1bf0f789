"""``benchmark backbone``: a backbone against a plain implementation of the published arithmetic, side by side."""

import argparse
import platform
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from msda_plugin.backbones.shunted_transformer import ShuntedTransformer
from msda_plugin.layers.shunted_self_attention import ShuntedSelfAttention
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement
from msda_plugin.tools.benchmarks.fresh_process import in_a_process, peak_bytes
from msda_plugin.tools.benchmarks.op import Timer

IMPLEMENTATIONS = ('plain', 'msda_plugin')
# (what, (batch, 3, H, W), with a backward pass): the cases that are run unless --size asks for one.
CASES = (('forward', (1, 3, 800, 1280), False), ('forward + backward', (1, 3, 512, 640), True))


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``backbone``; its namespace goes to `run`."""
    parser = subparsers.add_parser('backbone', help='Shunted Transformer against the plain published arithmetic')
    parser.add_argument('--arch', default='tiny', choices=('tiny', 'small', 'base'))
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='time forward, and forward + backward, at this size (default: forward at 800 1280, '
        'forward + backward at 512 640)',
    )
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--device', default='cpu', help='default: %(default)s')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=5, help='timed runs, after one that is not counted')
    return parser


def conditions(args: argparse.Namespace) -> str:
    """Under what the figures are measured."""
    where = 'memory of the GPU' if torch.device(args.device).type == 'cuda' else 'resident memory of the process'
    return (
        f'Shunted Transformer {args.arch}, float32, {args.device}, {args.threads} threads, {platform.machine()}, '
        f'torch {torch.__version__}; median of {args.repeats} runs; peak {where}'
    )


def run(args: argparse.Namespace) -> int:
    """Time every case in a process of its own, so that peak memory is honest, and print one line each."""
    print(conditions(args))
    print(f'{"case":<36}{"implementation":<16}{"seconds":>9}{"MB":>8}{"speed":>8}{"memory":>8}')
    for row in comparisons(args):
        for side, own, speed, memory in (
            (row.sides[0], row.stock, 1.0, 1.0),
            (row.sides[1], row.ours, row.speed, row.memory),
        ):
            print(
                f'{f"{row.run} {row.case}":<36}{side:<16}{own.seconds:>9.3f}{own.peak / 1e6:>8.0f}{speed:>7.2f}x'
                f'{memory:>8.0%}',
                flush=True,
            )
    return 0


def comparisons(args: argparse.Namespace) -> Iterator[Comparison]:
    """Time every case, each implementation in a process of its own."""
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
    """One implementation in a fresh process."""
    return in_a_process(_measure_here, implementation, arch, shape, backward, threads, repeats, device)


def _measure_here(implementation, arch, shape, backward, threads, repeats, device):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = ShuntedTransformer(arch).train(backward)
    model.init_weights()
    model, image = model.to(device), torch.rand(shape, device=device)
    forward = model if implementation == 'msda_plugin' else lambda image: plain_forward(model, image)
    gpu = torch.device(device).type == 'cuda'

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            outs = forward(image)
            if backward:
                sum(out.mean() for out in outs).backward()

    seconds = Timer(torch.device(device), repeats).median(step)
    return Measurement(seconds, torch.cuda.max_memory_allocated(device) if gpu else peak_bytes())


def plain_forward(model: ShuntedTransformer, image: Tensor) -> tuple[Tensor, ...]:
    """The model's forward with softmax(q k^T) in memory and every step a layer of its own, on (B, C, H, W) maps."""
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
    """The layer's forward, (B, H * W, C) -> the same, with softmax(q k^T) in memory."""
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
