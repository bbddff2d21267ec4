"""What tests of attention share: inputs, an oracle, and comparisons of results and of programs."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from dropmae_jax.model import fast_asad
from dropmae_jax.model.asad import Logits


@functools.partial(jax.jit, static_argnames=('seed', 'b', 'n', 'm', 'e'))
def tokens(seed, *, b=2, n=16, m=2, e=16, scale=1.0):
  """Queries, keys and values."""
  keys = jax.random.split(jax.random.key(seed), 3)
  return [scale * jax.random.normal(key, (b, 2 * n, m, e)) for key in keys]


def extreme_tokens(n, m, e):
  """Three samples: all logits 0; all 60 or -60; and logits that fall by 60 from key to key."""
  query, key, value = (np.array(each) for each in tokens(7, b=3, n=n, m=m, e=e))
  signs = np.random.default_rng(0).choice([-1.0, 1.0], (2, 2 * n, m))
  query[0] = 0
  query[1:], key[1:] = 0, 0
  query[1, :, :, 0], key[1, :, :, 0] = signs * (60 * e**0.5) ** 0.5
  query[2, :, :, 0], key[2, :, :, 0] = e**0.5, -60.0 * np.arange(2 * n)[:, None]
  return [jnp.asarray(each) for each in (query, key, value)]


@jax.jit
def scaled_logits(query, key):
  logits = fast_asad.products(fast_asad.by_frame(query), fast_asad.by_frame(key))
  return Logits(*(each * query.shape[-1] ** -0.5 for each in logits))


def plain_attention(query, key, value, is_dropped):
  """A masked softmax on whole matrices [l, l], differentiated by JAX."""
  n = query.shape[1] // 2
  logits = jnp.einsum('bime,bjme->bmij', query, key) * query.shape[-1] ** -0.5
  mask = jnp.zeros(logits.shape, bool)
  for frame in range(2):
    own = slice(frame * n, frame * n + n)
    mask = mask.at[:, :, own, own].set(is_dropped[:, frame])
  attention = jax.nn.softmax(jnp.where(mask, -jnp.inf, logits), axis=-1)
  return jnp.einsum('bmij,bjme->bime', attention, value)


def value_and_gradients(attend, arguments):
  """The output, and the gradients of a function of it."""

  def loss(*arguments):
    output = attend(*arguments)
    return jnp.sin(output.astype(jnp.float32)).sum(), output

  (_, output), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
    *arguments
  )
  return output, *gradients


def assert_near(ours, expected, bound):
  """The error is at most `bound` times the expected norm."""
  for one, other in zip(ours, expected, strict=True):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert np.isfinite(one).all()
    assert np.linalg.norm(one - other) <= bound * max(np.linalg.norm(other), 1e-3)


def equations(jaxpr):
  """The equations of a traced program and of all programs inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from equations(inner)
