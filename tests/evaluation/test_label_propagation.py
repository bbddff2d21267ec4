"""Propagation of labels: numbers recorded from the published evaluators, and known answers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from dropmae_jax.evaluation import label_propagation
from dropmae_jax.evaluation.protocols import PROTOCOLS, Geometry
from dropmae_jax.evaluation.readouts import FrameFeatures

GOLDEN = ROOT / 'tests' / 'golden' / 'evaluation'
GEOMETRY = Geometry(pixels=(96, 112), grid=(6, 7))


@pytest.fixture(scope='module')
def recorded():
  names = 'cropmae', 'dino', 'dinov3'
  return {name: np.load(GOLDEN / f'propagation_{name}.npz') for name in names}


def soft_labels(features, labels, propagation):
  """Labels of all frames, from features that are not of unit length."""
  tokens = jnp.asarray(features.reshape(len(features), -1, features.shape[-1]))
  affinities = FrameFeatures(
    lambda frame, identity: frame, lambda number: tokens[number], len(tokens), propagation
  )
  return np.stack(list(label_propagation.propagate(affinities, len(tokens), labels, propagation)))


CASES = {
  'cropmae': {
    f'n{n}_r{radius}_k{k}': {'num_previous': n, 'radius': radius, 'top_k': k}
    for n in (2, 20)
    for radius in (2, 20)
    for k in (3, 7)
  }
  | {'n20_r20_k7_t005': {'temperature': 0.05}},
  'dino': {
    'dino_n7_s12_k5': {},
    'rsp_n30_s30_k7': {'num_previous': 30, 'radius': 30, 'top_k': 7},
    'dino_n2_s1_k3': {'num_previous': 2, 'radius': 1, 'top_k': 3},
    'dino_n2_s0_k3': {'num_previous': 2, 'radius': None, 'top_k': 3},
    'rsp_n2_s1_k3_t07': {'num_previous': 2, 'radius': 1, 'top_k': 3, 'temperature': 0.7},
  },
  'dinov3': {
    'n7_s12_k5': {},
    'n2_s2_k3': {'num_previous': 2, 'radius': 2, 'top_k': 3},
    'n2_s1.5_k3': {'num_previous': 2, 'radius': 1.5, 'top_k': 3},
  },
}


@pytest.mark.parametrize(
  ('family', 'case'), [(family, case) for family, cases in CASES.items() for case in cases]
)
def test_labels_and_masks_are_those_of_the_published_evaluators(recorded, family, case):
  golden = recorded[family]
  protocol = dataclasses.replace(PROTOCOLS[family].propagation, **CASES[family][case])
  labels, ids = PROTOCOLS[family].encode(golden['first_label'], GEOMETRY)
  soft = soft_labels(golden['features'], labels, protocol)
  expected = golden[f'{case}/soft']
  np.testing.assert_allclose(soft[-len(expected) :], expected, atol=2e-6)
  size = golden['first_label'].shape
  decode = PROTOCOLS[family].decode
  predicted = np.stack([decode(each, ids, GEOMETRY, size, 'davis') for each in soft])
  expected = golden[f'{case}/mask']
  first = 0 if family == 'cropmae' else 1
  sure = np.ones(expected[first:].shape, bool)
  if f'{case}/sure' in golden:
    sure = np.unpackbits(golden[f'{case}/sure'], axis=-1)[..., : size[1]].astype(bool)
  np.testing.assert_array_equal(predicted[first:][sure], expected[first:][sure])
  if family == 'dino':
    # CropMAE's masks are those of labels that are not scaled.
    decode = PROTOCOLS['cropmae'].decode
    unscaled = [decode(each, ids, GEOMETRY, size, 'davis') for each in soft[1:]]
    changed = (predicted[1:] != unscaled).sum(axis=(1, 2))
    unsure = (~sure).sum(axis=(1, 2))
    assert (abs(changed - golden[f'{case}/changed_by_norm_mask']) <= unsure).all()


def test_the_first_labels_are_those_of_the_published_evaluators(recorded):
  for family, name in (
    ('cropmae', 'first_soft'),
    ('dino', 'first_small'),
    ('dinov3', 'first_small'),
  ):
    labels, ids = PROTOCOLS[family].encode(recorded[family]['first_label'], GEOMETRY)
    expected = recorded[family][name]
    encoded = labels if family == 'cropmae' else ids[labels.argmax(-1)]
    np.testing.assert_allclose(encoded, expected, atol=1e-6)


@pytest.mark.parametrize('n', [2, 20])
def test_a_frame_looks_at_the_recorded_frames(recorded, n):
  protocol = dataclasses.replace(PROTOCOLS['cropmae'].propagation, num_previous=n)
  expected = recorded['cropmae'][f'context/n{n}']
  for number in range(1, 8):
    context = label_propagation.make_context(number, protocol)
    np.testing.assert_array_equal(context.frames, expected[number])
    slots = [label_propagation.slot(frame, protocol) for frame in context.frames.tolist()]
    np.testing.assert_array_equal(context.slots, slots)


def test_neighbourhoods_are_the_recorded_ones(recorded):
  for family, radius, name in (
    ('cropmae', 2, 'radius2_neighbours'), ('cropmae', 3, 'radius3_neighbours'),
    ('dino', 1, 'square1_neighbours'),
  ):  # fmt: skip
    propagation = dataclasses.replace(PROTOCOLS[family].propagation, radius=radius)
    near = [label_propagation.neighbourhood(cell, (6, 7), propagation) for cell in jnp.arange(42)]
    np.testing.assert_array_equal(near, recorded[family][name])


def test_affinities_that_are_given_count_like_those_of_features(recorded):
  rng = np.random.default_rng(0)
  protocol = PROTOCOLS['cropmae'].propagation
  query, features = rng.normal(size=(42, 8)), rng.normal(size=(21, 42, 8))
  labels = rng.random((21, 42, 3)).astype(np.float32)
  context = label_propagation.make_context(30, protocol)
  query, features = query.astype(np.float32), features.astype(np.float32)
  one = label_propagation.from_features(
    query, features, labels, *context, grid=(6, 7), propagation=protocol
  )
  affinities = np.einsum('id,sjd->isj', query, features)
  other = label_propagation.from_affinities(
    jnp.asarray(affinities), labels, *context, grid=(6, 7), propagation=protocol
  )
  np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_moving_square_with_coded_positions_is_followed_exactly():
  """Each cell's feature says which point of the scene it shows; the scene moves in a circle."""
  grid, size = (8, 9), (64, 72)
  codes = np.random.default_rng(0).normal(size=(*grid, 16)).astype(np.float32)
  truth = np.zeros((6, *size), np.uint8)
  features = np.empty((6, *grid, 16), np.float32)
  for number in range(6):
    features[number] = np.roll(codes, (number, number), axis=(0, 1))
    truth[number, 8 * number : 8 * number + 24, 8 * number : 8 * number + 24] = 1
  protocol = dataclasses.replace(PROTOCOLS['dinov3'].propagation, top_k=1)
  geometry = Geometry(size, grid)
  labels, ids = PROTOCOLS['dinov3'].encode(truth[0], geometry)
  soft = soft_labels(features, labels, protocol)
  decode = PROTOCOLS['dinov3'].decode
  predicted = [decode(each, ids, geometry, size, 'davis') for each in soft]
  np.testing.assert_array_equal(predicted, truth)


def test_more_neighbours_than_there_are_count_all():
  protocol = dataclasses.replace(PROTOCOLS['cropmae'].propagation, num_previous=1, top_k=1000)
  features = np.ones((3, 2, 2, 4), np.float32)
  labels = np.eye(4, dtype=np.float32).reshape(2, 2, 4)
  np.testing.assert_allclose(soft_labels(features, labels, protocol)[1:], 0.25, atol=1e-6)


def test_dinov3_enlarges_masks_by_the_nearest_of_pytorch():
  """floor(i * old / new), at a ratio that is no whole number."""
  labels = np.random.default_rng(0).random((5, 7, 3)).astype(np.float32)
  ids, geometry = np.arange(3, dtype=np.uint8), Geometry((40, 56), (5, 7))
  mask = PROTOCOLS['dinov3'].decode(labels, ids, geometry, (48, 85), 'davis')
  span = (labels - labels.min((0, 1))) / (labels.max((0, 1)) - labels.min((0, 1)))
  rows, columns = np.arange(48) * 5 // 48, np.arange(85) * 7 // 85
  np.testing.assert_array_equal(mask, span.argmax(-1)[rows][:, columns])
