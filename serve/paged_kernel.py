"""Attention over pages by a kernel of Pallas for GPUs: what cuDNN's paged kernels do not compute.

    o = softmax(mask(cap(q k^T scale))) v  over the positions a request's block table lists

Windows, capped scores, sinks, latent keys whose first channels are the values, and pages of float8
with a scale a token and head. One kernel decodes, follows a few guessed tokens, and reads prompts:
its rows are the queries of one key/value head, each with its own position. A request's pages are
shared out among some programs where rows are few, each with a running maximum and sum (Milakov &
Gimelshein, 1805.02867); what they found is joined after them, as FlashDecoding does. Pages before
every row's window are not read. Numbers are widened in registers; scales meet scores and weights.

Legend: B requests, T query tokens of each, W pages of a block table, P pages, S tokens a page, G
key/value heads, R query heads for each, K width of keys, V of values, N = T R rows of a key/value
head, C programs that share a request's pages.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys import float8

LEAST = 16
"""Rows of a program: what tensor cores take at least."""
PROGRAMS = 256
"""Of four warps, enough to keep an H200's 132 multiprocessors reading: below, programs share a
tile's pages."""
MANY = 1024
"""Programs that fill an H200 with one warp each."""
_LOWEST = -1e30


class Tile(NamedTuple):
    """Sizes of a program."""

    rows: int
    warps: int
    stages: int
    tokens: int | None = None
    """Of a page that a turn looks at, a power of two; all of them if None."""


SHARED_BYTES = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
"""What a program may have of a multiprocessor's shared memory, by compute capability (CUDA C++
Programming Guide, technical specifications)."""
OTHER_BYTES = 99 << 10
"""Of other devices of 8.6 and up, the least of which have so much."""
LEAST_CAPABILITY = (8, 0)
"""From which Triton multiplies bfloat16 on tensor cores."""


class Device(NamedTuple):
    """What the kernel needs to know of a GPU."""

    shared_bytes: int
    float8: bool
    """Whether it converts float8."""


def device_of(device: Any) -> Device | None:
    """None where the device is too old."""
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    capability = int(major), int(minor or 0)
    if capability < LEAST_CAPABILITY:
        return None
    return Device(SHARED_BYTES.get(capability, OTHER_BYTES), float8.answer(device).computes)


def tile_for(
    rows: int, keys: jax.Array, apart: bool, device: Device, heads: int = 1
) -> Tile | None:
    """A program's sizes for N rows and pages [P, S, G, K]; None where it does not take them.

    Args:
        apart: whether values are other pages than keys.
        heads: key/value heads of all requests, N rows each.

    It takes powers of two of tokens, and widths in multiples of 16, as long as a page's keys and,
    where they are `apart`, values fit into the device's shared memory.
    """
    page_size, width = keys.shape[1], keys.shape[3]
    narrow = keys.dtype.itemsize == 1
    whole = page_size >= 16 and page_size & (page_size - 1) == 0 and width % 16 == 0
    if not whole or (narrow and keys.dtype == float8.E4M3 and not device.float8):
        return None
    most = 128 if width <= 128 else 64 if width <= 256 else LEAST
    height = LEAST
    while height < min(rows, most):
        height *= 2
    wide = width > 256 or (height == 128 and width <= 64)
    stages = 3 if height == LEAST and width <= 128 else 2
    page_bytes = 2 * page_size * width * (2 if apart else 1)  # float8 is widened on its way
    room = (device.shared_bytes - 2 * height * (width + page_size)) // page_bytes
    if not room:
        return None
    if narrow and height == LEAST and width <= 128:
        # Few rows of few bytes: warps that wait for each other at every turn are the work.
        if heads >= MANY:
            return Tile(height, 1, min(stages, room), min(page_size, 32))
        return Tile(height, 2, min(stages, room))
    return Tile(height, 8 if wide else 4, min(stages, room))


def programs_of(tiles: int, pages: int, warps: int = 4) -> int:
    """Programs that share the pages which a tile sees, of `tiles` in all.

    At most 16 of a short table, whose pages most requests do not fill: what more of them find is
    more to join.
    """
    count, wanted = 1, PROGRAMS * max(1, 4 // warps)
    while count < min(pages, max(16, pages // 4)) and tiles * count < wanted:
        count *= 2
    return count


def parts_of(width: int) -> list[tuple[int, int]]:
    """Where channels are cut into powers of two: start and size of each, the largest first."""
    found, start = [], 0
    for size in (1 << bit for bit in range(width.bit_length(), -1, -1)):
        if width & size:
            found.append((start, size))
            start += size
    return found


def attend(
    q: Float[Array, "B T G R K"],
    keys: Float[Array, "P S G K"],
    values: Float[Array, "P S G K"] | None,
    tables: Int[Array, "B W"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    value_channels: int | None = None,
    sinks: Float[Array, "G R"] | None = None,
    scales: tuple[jax.Array, jax.Array | None] | None = None,
    tile: Tile,
    programs: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T G R V"]:
    """Each query sees the positions up to its own, or a window of them.

    Args:
        values: None where `value_channels` says which channels of the keys they are.
        tables: page numbers; entries past a request's pages, or before its windows, may be
            anything.
        scale: of the scores.
        window: keys that a query sees, its own the last of them.
        softcap: c: scores become c tanh(scores / c).
        sinks: scores that take part in each head's softmax and add nothing.
        scales: of keys and of values [P, S, G], where pages are float8.
        tile: as `tile_for` has it.
        programs: that share a tile's pages; a power of two.
        interpret: run it without a GPU, operation by operation.

    Returns:
        [B, T, G, R, V] in the dtype of `q`; softmax in float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, steps, groups, heads, width = q.shape
    page_count, page_size = keys.shape[:2]
    channels = width if value_channels is None else value_channels
    tiles = -(-steps * heads // tile.rows)
    seen_pages = tables.shape[1]
    if window is not None:
        longest = window + -(-tile.rows // heads) - 1
        seen_pages = min(seen_pages, -(-longest // page_size) + 1)
    parts = programs or programs_of(batch * groups * tiles, seen_pages, tile.warps)

    of_queries = pl.BlockSpec((None, steps, None, heads, width), lambda b, g, n, c: (b, 0, g, 0, 0))
    pool = pl.BlockSpec((page_count, page_size, None, width), lambda b, g, n, c: (0, 0, g, 0))
    of_scales = pl.BlockSpec((page_count, page_size, None), lambda b, g, n, c: (0, 0, g))
    of_sinks = pl.BlockSpec((None, heads), lambda b, g, n, c: (g, 0))
    given = {
        "q": (q, of_queries),
        "positions": (positions, pl.BlockSpec((None, steps), lambda b, g, n, c: (b, 0))),
        "tables": (
            jnp.clip(tables, 0, page_count - 1),
            pl.BlockSpec((None, tables.shape[1]), lambda b, g, n, c: (b, 0)),
        ),
        "sinks": (sinks if parts == 1 else None, of_sinks),
        "keys": (keys, pool),
        "values": (values, pool),
        "key_scales": (scales and scales[0], of_scales),
        "value_scales": (scales and scales[1], of_scales),
    }
    given = {name: one for name, one in given.items() if one[0] is not None}

    def shape_of(*last: int, dtype: Any = jnp.float32) -> tuple[Any, Any]:
        """Of a result by row and program, and where a program's part of it is."""
        block = (None, None, steps, None, heads, *last)
        shape = (batch, parts, steps, groups, heads, *last)
        rest = (0,) * len(last)
        spec = pl.BlockSpec(block, lambda b, g, n, c: (b, c, 0, g, 0, *rest))
        return jax.ShapeDtypeStruct(shape, dtype), spec

    if parts == 1:
        results = [shape_of(channels, dtype=q.dtype)]
    else:
        results = [shape_of(channels), shape_of(), shape_of()]

    def kernel(*refs: Any) -> None:
        _kernel(
            dict(zip(given, refs, strict=False)), refs[len(given) :], tile.rows,
            tile.tokens or page_size, parts, scale, window, softcap, channels, interpret,
        )  # fmt: skip

    output, *sums = pl.pallas_call(
        kernel,
        grid=(batch, groups, tiles, parts),
        in_specs=[spec for _, spec in given.values()],
        out_specs=[spec for _, spec in results],
        out_shape=[shape for shape, _ in results],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="paged_attention",
    )(*(array for array, _ in given.values()))
    if parts == 1:
        return output[:, 0]
    highest, total = sums
    return _joined(output, highest, total, sinks, q.dtype, interpret)


def _joined(
    output: Float[Array, "B C T G R V"],
    highest: Float[Array, "B C T G R"],
    total: Float[Array, "B C T G R"],
    sinks: Float[Array, "G R"] | None,
    dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "B T G R V"]:
    """What programs found of a row, as one: a kernel, where XLA would make four of it."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, parts, steps, groups, heads, channels = output.shape

    def part(*last: int) -> Any:
        rest = (0,) * len(last)
        block = (None, parts, None, None, None, *last)
        return pl.BlockSpec(block, lambda b, t, g, r: (b, 0, t, g, r, *rest))

    of_sinks = pl.BlockSpec((None, None), lambda b, t, g, r: (g, r))
    return pl.pallas_call(
        functools.partial(_join_kernel, channels=channels),
        grid=(batch, steps, groups, heads),
        in_specs=[part(channels), part(), part(), *([] if sinks is None else [of_sinks])],
        out_specs=pl.BlockSpec(
            (None, None, None, None, channels), lambda b, t, g, r: (b, t, g, r, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((batch, steps, groups, heads, channels), dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="join_attention",
    )(output, highest, total, *([] if sinks is None else [sinks]))


def _join_kernel(output_ref: Any, highest_ref: Any, total_ref: Any, *refs: Any, channels: int):
    from jax.experimental import pallas as pl

    *of_sinks, result_ref = refs
    highest = highest_ref[...]
    sunk = [ref[...].astype(jnp.float32) for ref in of_sinks]
    top = functools.reduce(jnp.maximum, sunk, jnp.max(highest))
    share = jnp.exp(highest - top)
    whole = functools.reduce(
        jnp.add, [jnp.exp(one - top) for one in sunk], jnp.sum(total_ref[...] * share)
    )
    for at, wide in parts_of(channels):
        found = jnp.sum(output_ref[:, pl.ds(at, wide)] * share[:, None], axis=0) / whole
        result_ref[pl.ds(at, wide)] = found.astype(result_ref.dtype)


def _kernel(
    refs: dict[str, Any], results: Any, rows: int, size: int, parts: int, scale: float,
    window: int | None, softcap: float | None, channels: int, interpret: bool,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    q_ref, k_ref, table_ref = refs["q"], refs["keys"], refs["tables"]
    v_ref = refs.get("values", k_ref)
    k_scale_ref = refs.get("key_scales")
    v_scale_ref = refs.get("value_scales", k_scale_ref)
    steps, heads, width = q_ref.shape
    turns_of_page = k_ref.shape[1] // size
    # Float8 becomes float16 by one instruction for two numbers, bfloat16 by several for one.
    dtype = q_ref.dtype if k_scale_ref is None else jnp.float16
    by_bits = k_ref.dtype == jnp.int8 and not interpret

    def widened(numbers: jax.Array) -> jax.Array:
        return _by_bits(numbers) if by_bits else numbers.astype(dtype)

    row = pl.program_id(2) * rows + jnp.arange(rows, dtype=jnp.int32)
    there = row < steps * heads
    token, head = row // heads, row % heads
    # A row that pads a tile stands where the last one does.
    position = triton.load(refs["positions"].at[jnp.minimum(token, steps - 1)])
    furthest, nearest = jnp.max(position), jnp.min(position)
    start = jnp.int32(0) if window is None else jnp.maximum(nearest - (window - 1), 0) // size
    stop = jnp.minimum(furthest // size + 1, table_ref.shape[0] * turns_of_page)
    share = (stop - start + parts - 1) // parts
    first = start + pl.program_id(3) * share
    last = jnp.minimum(first + share, stop)
    of_keys, of_values = parts_of(width), parts_of(channels)
    offsets = jnp.arange(size, dtype=jnp.int32)

    def place(ref: Any, at: int, wide: int) -> Any:
        channel = at + jnp.arange(wide, dtype=jnp.int32)
        return ref.at[token[:, None], head[:, None], channel[None, :]]

    q = [
        triton.load(place(q_ref, at, wide), mask=there[:, None], other=0.0).astype(dtype)
        for at, wide in of_keys
    ]

    def turn(masked: bool, index: jax.Array, carry: tuple[jax.Array, ...]):
        highest, total, *outputs = carry
        page, inside = table_ref[index // turns_of_page], pl.ds(index % turns_of_page * size, size)
        where = index * size + offsets
        k = [widened(k_ref[page, inside, pl.ds(at, wide)]) for at, wide in of_keys]
        scores = functools.reduce(
            jnp.add, [_dot(mine, part, 1) for mine, part in zip(q, k, strict=True)]
        )
        scores *= scale if k_scale_ref is None else (k_scale_ref[page, inside] * scale)[None]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if masked:
            seen = where[None] <= position[:, None]
            if window is not None:
                seen &= where[None] > position[:, None] - window
            scores = jnp.where(seen, scores, _LOWEST)
        # Behind a request's last token, and before its windows, a page may hold anything, NaN too.
        written = where <= furthest
        if window is not None:
            written &= where > nearest - window
        raised = jnp.maximum(highest, scores.max(axis=1))
        weights = jnp.exp(scores - raised[:, None])
        fade = jnp.exp(highest - raised)
        total = total * fade + weights.sum(axis=1)
        whole = None
        if v_scale_ref is not None:
            # Over the largest of the page, so that weights stay within float16's numbers.
            v_scale = v_scale_ref[page, inside]
            v_scale = jnp.where(written, v_scale, 0.0) if masked else v_scale
            whole = jnp.max(v_scale)
            weights *= (v_scale / jnp.where(whole > 0, whole, 1.0))[None]
        weights = weights.astype(dtype)
        held = dict(zip(of_keys, k, strict=True)) if v_ref is k_ref else {}
        for n, (at, wide) in enumerate(of_values):
            v = held.get((at, wide))
            v = widened(v_ref[page, inside, pl.ds(at, wide)]) if v is None else v
            fresh = _dot(weights, jnp.where(written[:, None], v, 0) if masked else v, 0)
            fresh = fresh if whole is None else fresh * whole
            outputs[n] = outputs[n] * fade[:, None] + fresh
        return raised, total, *outputs

    carry = (
        jnp.full((rows,), _LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        *(jnp.zeros((rows, wide), jnp.float32) for _, wide in of_values),
    )
    # Turns that every row sees whole need no mask: those within all windows, up to all positions.
    begin, end = first, jnp.clip((nearest + 1) // size, first, last)
    if window is not None:
        begin = jnp.clip((jnp.maximum(furthest - window, -1) + size) // size, first, last)
        end = jnp.maximum(begin, end)
        carry = jax.lax.fori_loop(first, begin, functools.partial(turn, True), carry)
    carry = jax.lax.fori_loop(begin, end, functools.partial(turn, False), carry)
    highest, total, *outputs = jax.lax.fori_loop(end, last, functools.partial(turn, True), carry)
    if parts == 1:
        if "sinks" in refs:
            sunk = triton.load(refs["sinks"].at[head]).astype(jnp.float32)
            top = jnp.maximum(highest, sunk)
            fade = jnp.exp(highest - top)
            total = total * fade + jnp.exp(sunk - top)
            outputs = [output * fade[:, None] for output in outputs]
        outputs = [output / total[:, None] for output in outputs]
    else:
        for ref, value in zip(results[1:], (highest, total), strict=True):
            triton.store(ref.at[token, head], value, mask=there)
    for (at, wide), output in zip(of_values, outputs, strict=True):
        value = output.astype(results[0].dtype)
        triton.store(place(results[0], at, wide), value, mask=there[:, None])


def _by_bits(numbers: jax.Array) -> jax.Array:
    """int8 as float16, four at a time: a byte behind the point of 1024 is 1024 and that byte."""
    from jax.experimental.pallas import triton

    return triton.elementwise_inline_asm(
        """{
        .reg .b32 over, less;
        xor.b32 over, $2, 0x80808080; mov.b32 less, 0x64806480;
        prmt.b32 $0, over, 0x64646464, 0x4140; sub.f16x2 $0, $0, less;
        prmt.b32 $1, over, 0x64646464, 0x4342; sub.f16x2 $1, $1, less;
        }""",
        args=[numbers],
        constraints="=&r,=&r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(numbers.shape, jnp.float16)],
    )[0]


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
