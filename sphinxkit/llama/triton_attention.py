"""A Triton kernel of attention for one token per row over a cache, each row's keys divided among programs.

Decoding reads the cache once and does little with it. With one row there are as many heads as programs in a kernel that
gives each head to one (40 for LLaMA 13B, on 132 processors of an H100), and a long row is read one block after another;
divided, all of the device reads. Source of the division: Flash-Decoding (Dao et al. 2023), as in arXiv:2205.14135 the
parts' softmaxes are brought to a common maximum at the end.

Importing this module imports Triton; see ``triton_kernels``.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_KEYS = 64  # that a program reads in one go; our choice
PROGRAMS = 512  # that rows and heads are divided into, about four for each processor of an H100; our choice
MAX_SHARES = 32  # of a row; our choice


def attend_token(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """Attention of one query a row to the cache's slots up to its own position.

    Scores, softmax and sums are float32. How many slots are read depends on ``starts`` alone, which the host need not
    know: the call can be replayed as part of a CUDA graph.

    Args:
        q: Rotated queries, their last axis contiguous.
        keys: Of a layer's cache, their last axis contiguous.
        values: Likewise, laid out as ``keys``.
        starts: Position of each row's query.
    Shape:
        q: (B, H, 1, D)
        keys, values: (B, Hkv, T, D); query heads h*H/Hkv ... (h+1)*H/Hkv - 1 share key head h
        starts: (B,) int64
        return: (B, H, 1, D), in the memory order (B, 1, H, D) and the dtype of ``keys``
    """
    rows, heads, _, head_dim = q.shape
    groups, slots = keys.shape[1:3]
    shares = min(MAX_SHARES, triton.cdiv(PROGRAMS, rows * groups), triton.cdiv(slots, BLOCK_KEYS))
    out = keys.new_empty(rows, heads, head_dim)
    parts = q.new_empty(rows, heads, shares, head_dim, dtype=torch.float32)
    sums = q.new_empty(rows, heads, shares, 2, dtype=torch.float32)
    channels = max(16, triton.next_power_of_2(head_dim))
    each = heads // groups
    _attend_share[(shares, groups, rows)](
        q,
        keys,
        values,
        starts,
        parts,
        sums,
        *q.stride()[:2],
        *keys.stride()[:3],
        head_dim**-0.5,
        shares,
        head_dim=head_dim,
        each=each,
        block_heads=1 if each == 1 else max(16, triton.next_power_of_2(each)),
        block_channels=channels,
        block_keys=BLOCK_KEYS,
    )
    _join_shares[(rows * heads,)](
        parts,
        sums,
        out,
        shares,
        head_dim=head_dim,
        block_shares=triton.next_power_of_2(shares),
        block_channels=channels,
        num_warps=2,
    )
    return out.unsqueeze(1).transpose(1, 2)


@triton.jit
def _attend_share(
    q,
    keys,
    values,
    starts,
    parts,
    sums,
    q_row_stride,
    q_head_stride,
    row_stride,
    head_stride,
    slot_stride,
    scale,
    shares,
    head_dim: tl.constexpr,
    each: tl.constexpr,
    block_heads: tl.constexpr,
    block_channels: tl.constexpr,
    block_keys: tl.constexpr,
):
    share = tl.program_id(0)
    group = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(starts + row).to(tl.int32) + 1
    size = tl.cdiv(tl.cdiv(length, shares), block_keys) * block_keys
    begin = share * size
    end = tl.minimum(begin + size, length)
    own = tl.arange(0, block_heads)
    channels = tl.arange(0, block_channels)
    inside = (channels < head_dim)[None, :]
    real = (own < each)[:, None] & inside
    head = group * each + own
    query = tl.load(q + row * q_row_stride + head[:, None] * q_head_stride + channels[None, :], mask=real, other=0.0)
    base = row * row_stride + group * head_stride
    most = tl.full((block_heads,), -float("inf"), tl.float32)
    total = tl.zeros((block_heads,), tl.float32)
    mixed = tl.zeros((block_heads, block_channels), tl.float32)
    for first in range(begin, end, block_keys):
        slots = first + tl.arange(0, block_keys)
        seen = slots < end
        place = base + slots.to(tl.int64)[:, None] * slot_stride + channels[None, :]
        key = tl.load(keys + place, mask=seen[:, None] & inside, other=0.0)
        value = tl.load(values + place, mask=seen[:, None] & inside, other=0.0)
        if each == 1:
            scores = tl.sum(key.to(tl.float32) * query.to(tl.float32), axis=1)[None, :]
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        fade = tl.exp(most - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        if each == 1:
            found = tl.sum(tl.trans(weights) * value.to(tl.float32), axis=0)[None, :]
        else:
            found = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        mixed = mixed * fade[:, None] + found
        most = higher
    target = (row * tl.num_programs(1) * each + head) * shares + share
    tl.store(parts + target[:, None] * head_dim + channels[None, :], mixed, mask=real)
    tl.store(sums + 2 * target, most, mask=own < each)
    tl.store(sums + 2 * target + 1, total, mask=own < each)


@triton.jit
def _join_shares(
    parts, sums, out, shares, head_dim: tl.constexpr, block_shares: tl.constexpr, block_channels: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    share = tl.arange(0, block_shares)
    channels = tl.arange(0, block_channels)
    there, inside = share < shares, channels < head_dim
    place = head * shares + share
    most = tl.load(sums + 2 * place, mask=there, other=-float("inf"))
    total = tl.load(sums + 2 * place + 1, mask=there, other=0.0)
    weight = tl.exp(most - tl.max(most, axis=0))  # 0 for a share without keys
    mixed = tl.load(
        parts + place[:, None] * head_dim + channels[None, :], mask=there[:, None] & inside[None, :], other=0.0
    )
    joined = tl.sum(weight[:, None] * mixed, axis=0) / tl.sum(weight * total, axis=0)
    tl.store(out + head * head_dim + channels, joined.to(out.dtype.element_ty), mask=inside)
