"""Every masking scheme partitions the tokens; restoring undoes selecting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropmae_jax.model import masking

pytestmark = pytest.mark.filterwarnings('error')


@pytest.mark.parametrize('scheme', masking.MASKING_SCHEMES.values(), ids=masking.MASKING_SCHEMES)
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 20]), st.sampled_from([0.05, 0.5, 0.7, 0.95]))
def test_schemes_partition_the_tokens(scheme, seed, half, ratio):
  length = 2 * half
  keys = jax.random.split(jax.random.key(seed), 3)
  if not 0 < int(length * (1 - ratio)) < length:
    with pytest.raises(ValueError, match='mask_ratio='):
      scheme(keys, num_tokens=length, mask_ratio=ratio)
    return
  masked = scheme(keys, num_tokens=length, mask_ratio=ratio)
  assert masked.visible.shape == (3, masking.num_visible(length, ratio))
  both = np.concatenate([masked.visible, masked.masked], axis=1)
  np.testing.assert_array_equal(np.sort(both, axis=1), np.tile(np.arange(length), (3, 1)))
  expected = np.zeros((3, length), bool)
  np.put_along_axis(expected, np.asarray(masked.masked), True, axis=1)
  np.testing.assert_array_equal(masking.is_masked(masked), expected)


@pytest.mark.parametrize(('ratio', 'visible'), [(0.75, 98), (0.7, 117), (0.9, 39), (0.95, 19)])
def test_number_visible_is_the_published_truncation(ratio, visible):
  assert masking.num_visible(392, ratio) == visible


@pytest.mark.parametrize('ratio', [0.0, 1.0, 0.9999])
def test_a_ratio_that_leaves_nothing_to_do_is_refused(ratio):
  with pytest.raises(ValueError, match=r'mask_ratio=.* leaves \d+ of 32 tokens visible'):
    masking.num_visible(32, ratio)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 5, 15]))
def test_restore_undoes_select(seed, visible):
  key = jax.random.key(seed)
  tokens = jax.random.normal(key, (2, 16, 4))
  masked = masking.masking_from_noise(jax.random.uniform(key, (2, 16)), visible)
  filler = jnp.full((1, 1, 4), 7.0)
  restored = masking.restore(masking.select(tokens, masked.visible), filler, masked)
  expected = jnp.where(masking.is_masked(masked)[..., None], filler, tokens)
  np.testing.assert_array_equal(restored, expected)


def test_random_masking_is_joint_over_both_frames():
  """The number of the first frame is hypergeometric: mean 49, deviation 4.3, of 98 visible."""
  keys = jax.random.split(jax.random.key(0), 4_000)
  masked = masking.random_masking(keys, num_tokens=392, mask_ratio=0.75)
  share = np.asarray((masked.visible < 196).sum(axis=1))
  assert share.mean() == pytest.approx(49.0, abs=0.25)
  assert share.std() == pytest.approx(4.3, abs=0.15)


def test_visible_tokens_come_in_the_order_of_their_noise():
  noise = jnp.array([[0.9, 0.1, 0.5, 0.3]])
  masked = masking.masking_from_noise(noise, 3)
  np.testing.assert_array_equal(masked.visible, [[1, 3, 2]])
  np.testing.assert_array_equal(masked.masked, [[0]])
