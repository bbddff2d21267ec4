"""Metadata of weight files: what is read, what is unknown, and what is refused."""

import dataclasses

import numpy as np
import pytest
from test_layouts import TINY

from dropmae_jax.config import Objective
from dropmae_jax.pytorch import file_metadata
from dropmae_jax.runtime.errors import UserError

OURS = {
  'architecture': dataclasses.asdict(TINY),
  'objective': dataclasses.asdict(Objective()),
  'step': 8,
  'frame_gap': 50,
  'steps_per_epoch': 3,
  'config': {'batch_size': 4},
  'data_fingerprint': 'abc',
  'source': {'file': 'in.pth', 'fresh': ['mask_token']},
  'epoch': 7,
}
UNKNOWN = dict.fromkeys(dataclasses.asdict(Objective()))


def test_our_files_hold_everything():
  metadata = file_metadata.read({'args': OURS | {'score': 0.25, 'score_steps': 3}})
  assert metadata.is_ours
  assert (metadata.architecture, metadata.step) == (TINY, 8)
  assert Objective(**metadata.objective) == Objective()
  # The score of older files is ignored.
  named = {'architecture', 'objective', 'step'}
  assert metadata.description == {name: value for name, value in OURS.items() if name not in named}


def test_what_a_file_does_not_tell_of_the_objective_is_none():
  published = {'mask_ratio': 0.6, 'P': 0.2, 'norm_pix_loss': False, 'blr': 1e-3}
  metadata = file_metadata.read({'args': published, 'epoch': 399})
  assert not metadata.is_ours
  assert metadata.objective == UNKNOWN | {
    'mask_ratio': 0.6, 'attention_dropout': 0.2, 'normalise_targets': False,
  }  # fmt: skip
  assert (metadata.architecture, metadata.step, metadata.description) == (None, 0, {'epoch': 399})
  # A file of ours stores what is unknown as None.
  partly = OURS | {'objective': UNKNOWN | {'mask_ratio': 0.6}}
  assert file_metadata.read({'args': partly}).objective == UNKNOWN | {'mask_ratio': 0.6}


@pytest.mark.parametrize('entries', [{}, {'args': 3}, {'args': {}}, {'epoch': True}])
def test_files_without_metadata_are_read(entries):
  metadata = file_metadata.read(entries)
  assert metadata == (False, None, UNKNOWN, 0, {})


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('step', -3, 'step=-3, which is not an integer from 0'),
    ('step', 'x', "step='x', which is not an integer"),
    ('step', True, 'step=True, which is not an integer'),
    ('step', 2**40, 'which is not an integer'),
    ('steps_per_epoch', 0, 'steps_per_epoch=0, which is not an integer from 1'),
    ('epoch', 1.5, 'epoch=1.5, which is not an integer'),
    ('config', np.ones(2), 'config=array([1., 1.]), which is not a dict of plain values'),
    ('config', {'a': np.ones((3, 3))}, 'which is not a dict of plain values'),
    ('data_fingerprint', b'abc', "data_fingerprint=b'abc', which is not a string"),
    ('source', 'abc', "source='abc', which is not a dict"),
    ('source', {'fresh': 3}, 'which is not a dict'),
    ('architecture', 'abc', "architecture='abc', which is not a dict"),
    ('architecture', {'width': '64'}, "width='64' in its architecture (the default: 768)"),
    ('architecture', {'width': np.ones(1)}, 'width=array([1.]) in its architecture'),
    ('architecture', {'mlp_ratio': float('nan')}, 'mlp_ratio=nan in its architecture'),
    ('architecture', {'width': 30}, 'width=30 must be a multiple of 4'),
    ('architecture', {'depth': 3_000_000}, 'depth=3000000 is out of range; use at most 256'),
    ('architecture', {'decoder_width': 2**20}, 'decoder_width=1048576 is out of range'),
    ('architecture', {'image_size': 16_384, 'patch_size': 1}, 'make a position table of 268435456'),
    ('architecture', {'mlp_ratio': 1e9}, 'mlp_ratio=1000000000.0 is out of range'),
    ('objective', [1], 'objective=[1], which is not a dict'),
    ('objective', {'mask_ratio': 0.0}, 'mask_ratio=0.0 is out of range'),
    ('objective', {'normalise_targets': 1}, 'normalise_targets=1 in its objective'),
  ],
)
def test_invalid_values_are_refused(name, value, message):
  with pytest.raises(UserError) as caught:
    file_metadata.read({'args': OURS | {name: value}})
  assert message in str(caught.value)
  assert str(caught.value).startswith('the file says ')
  assert '\n' not in str(caught.value)
