"""What a file says of itself: read as far as it is known, refused where it cannot be."""

import dataclasses

import numpy as np
import pytest
from test_torch_export import TINY

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
  'score': 0.25,
  'score_steps': 3,
  'epoch': 7,
}
UNKNOWN = dict.fromkeys(dataclasses.asdict(Objective()))


def test_ours_say_everything():
  said = file_metadata.read({'args': OURS})
  assert said.is_ours
  assert (said.architecture, said.step) == (TINY, 8)
  assert Objective(**said.objective) == Objective()
  named = {'architecture', 'objective', 'step'}
  assert said.kept == {name: value for name, value in OURS.items() if name not in named}


def test_of_the_objective_only_what_is_said_is_known():
  published = {'mask_ratio': 0.6, 'P': 0.2, 'norm_pix_loss': False, 'blr': 1e-3}
  said = file_metadata.read({'args': published, 'epoch': 399})
  assert not said.is_ours
  assert said.objective == UNKNOWN | {
    'mask_ratio': 0.6, 'attention_dropout': 0.2, 'normalise_targets': False,
  }  # fmt: skip
  assert (said.architecture, said.step, said.kept) == (None, 0, {'epoch': 399})
  # It stays unknown on the way through a file of ours.
  partly = OURS | {'objective': UNKNOWN | {'mask_ratio': 0.6}}
  assert file_metadata.read({'args': partly}).objective == UNKNOWN | {'mask_ratio': 0.6}


@pytest.mark.parametrize('entries', [{}, {'args': 3}, {'args': {}}, {'epoch': True}])
def test_files_may_say_nothing(entries):
  said = file_metadata.read(entries)
  assert said == (False, None, UNKNOWN, 0, {})


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('step', -3, 'step=-3 and not a whole number from 0'),
    ('step', 'x', "step='x' and not a whole number"),
    ('step', True, 'step=True and not a whole number'),
    ('step', 2**40, 'and not a whole number'),
    ('steps_per_epoch', 0, 'steps_per_epoch=0 and not a whole number from 1'),
    ('epoch', 1.5, 'epoch=1.5 and not a whole number'),
    ('config', np.ones(2), 'config=array([1., 1.]) and not a dict of plain values'),
    ('config', {'a': np.ones((3, 3))}, 'and not a dict of plain values'),
    ('data_fingerprint', b'abc', "data_fingerprint=b'abc' and not a text"),
    ('source', 'abc', "source='abc' and not a dict"),
    ('source', {'fresh': 3}, 'and not a dict'),
    ('score', b'1', "score=b'1' and not a number"),
    ('architecture', 'abc', "architecture='abc' and not a dict"),
    ('architecture', {'width': '64'}, "width='64' in its architecture, where 768 is usual"),
    ('architecture', {'width': np.ones(1)}, 'width=array([1.]) in its architecture'),
    ('architecture', {'mlp_ratio': float('nan')}, 'mlp_ratio=nan in its architecture'),
    ('architecture', {'width': 30}, 'width=30 must be a multiple of 4'),
    ('objective', [1], 'objective=[1] and not a dict'),
    ('objective', {'mask_ratio': 0.0}, 'mask_ratio=0.0 is not between 0 and 1'),
    ('objective', {'normalise_targets': 1}, 'normalise_targets=1 in its objective'),
  ],
)
def test_what_it_says_must_make_sense(name, value, message):
  with pytest.raises(UserError) as caught:
    file_metadata.read({'args': OURS | {name: value}})
  assert message in str(caught.value)
  assert str(caught.value).startswith('the file says ')
  assert '\n' not in str(caught.value)
