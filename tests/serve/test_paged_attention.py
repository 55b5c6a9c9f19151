"""Paged attention against a softmax over each request's own tokens, laid out plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.serve.paged_attention import attend_pages


def plain(q, keys, values, table, position):
    """One query over positions 0..position of one request, head by head, float64."""
    heads, width = q.shape
    page_size, groups = keys.shape[1:3]
    output = np.zeros((heads, width))
    where = [(table[p // page_size], p % page_size) for p in range(position + 1)]
    for head in range(heads):
        group = head // (heads // groups)
        k = np.array([keys[page, offset, group] for page, offset in where], np.float64)
        v = np.array([values[page, offset, group] for page, offset in where], np.float64)
        scores = k @ q[head] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        output[head] = weights @ v / weights.sum()
    return output


@pytest.mark.parametrize(("page_size", "width"), [(16, 20), (4, 100), (256, 2)])
@pytest.mark.parametrize("steps", [1, 3])
def test_against_the_plain_softmax(page_size, width, steps):
    generator = np.random.default_rng(page_size + steps)
    pages = 3 * width + 1
    pool = (pages, page_size, 2, 8)
    keys, values = generator.normal(size=(2, *pool)).astype(np.float32)
    q = generator.normal(size=(3, steps, 2, 3, 8)).astype(np.float32)
    tables = generator.permutation(pages)[: 3 * width].reshape(3, width).astype(np.int32)
    longest = page_size * width
    starts = np.array([0, longest // 2 - 3, longest - steps])
    positions = (starts[:, None] + np.arange(steps)).astype(np.int32)
    # What lies past a request's last page must not matter.
    for row, start in enumerate(starts):
        tables[row, (start + steps - 1) // page_size + 1 :] = pages + 7
    found = jax.jit(attend_pages)(*(jnp.asarray(a) for a in (q, keys, values, tables, positions)))
    for row in range(3):
        for step in range(steps):
            wanted = plain(
                q[row, step].reshape(6, 8), keys, values, tables[row], positions[row, step]
            )
            # float32 sums of some 500 terms.
            np.testing.assert_allclose(found[row, step].reshape(6, 8), wanted, atol=3e-5)
