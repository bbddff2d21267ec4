"""Damaged records are counted once each, however often and by whomever they are met."""

import contextlib

import pytest
from sources import NumberedVideos
from test_data import DamagedVideos

from dropmae_jax import sharding, train
from dropmae_jax.config import Architecture, Config, DataOptions
from dropmae_jax.data import frame_pairs
from dropmae_jax.data.damaged_records import DamagedRecords
from dropmae_jax.data.mixture import mixture_of
from dropmae_jax.data.prefetch import Feed
from dropmae_jax.data.video_source import DamagedRecord


def told(sentence, number, most):
  return f'{sentence} Another video is taken instead; damaged record {number} of at most {most}.'


def test_each_record_is_counted_once_and_the_limit_is_the_last_allowed():
  said = []
  records = DamagedRecords(2, said.append)
  for sentence in ('First.', 'Second.', 'First.', 'Second.'):
    records.tell(sentence)
  assert said == [told('First.', 1, 2), told('Second.', 2, 2)]
  with pytest.raises(DamagedRecord) as ended:
    records.tell('Third.')
  assert str(ended.value) == (
    'Third. It is damaged record 3 of this start, and config.data.max_damaged_records=2.'
  )
  assert len(said) == 2
  DamagedRecords(2, said.append).tell('Third.')
  assert said[2:] == [told('Third.', 1, 2)]


@pytest.mark.parametrize('most', [3, 2])
@pytest.mark.parametrize('num_threads', [0, 2])
def test_a_loader_meets_records_again_and_again(num_threads, most):
  """Of three damaged records, each is met in several pairs, by several threads."""
  damaged, met, said = [(2, 3), (5, 0), (5, 1)], [], []
  records = DamagedRecords(most, said.append)
  stream = frame_pairs.pair_batches(
    DamagedVideos([6] * 8, set(damaged)),
    DataOptions(frame_gap=4, num_threads=num_threads),
    image_size=16,
    batch_size=4,
    seed=7,
    tell_damaged=lambda sentence: (met.append(sentence), records.tell(sentence)),
  )
  enough = contextlib.nullcontext() if most == 3 else pytest.raises(DamagedRecord, match='record 3')
  with contextlib.closing(stream), enough:
    for _ in range(30):
      next(stream)
  sentences = list(dict.fromkeys(met))
  assert set(sentences) == {
    f'video {video} frame {number} is damaged.' for video, number in damaged
  }
  assert said == [told(each, n + 1, most) for n, each in enumerate(sentences[:most])]
  assert len(met) > 10 or most == 2


class KeptFeed(Feed):
  """Keeps what it is made of, and begins nothing."""

  def __init__(self, make_batches, **keywords):
    self.make_batches, self.keywords = make_batches, keywords


def test_a_run_counts_over_all_of_its_loaders(monkeypatch):
  """A loader that is built anew, after a process died, begins no new count; a start does."""
  asked, said = [], []

  def pair_batches(*arguments, **keywords):
    asked.append((arguments, keywords))
    return iter(())

  monkeypatch.setattr(train, 'Feed', KeptFeed)
  monkeypatch.setattr(frame_pairs, 'pair_batches', pair_batches)
  options = DataOptions(max_damaged_records=1, stall_seconds=7.0)
  recipe = Config(data_dir='', num_steps=1, batch_size=8, model=Architecture(), data=options)
  videos, mesh = mixture_of(NumberedVideos([3])), sharding.make_mesh(options=recipe.mesh)
  own = {'first_step': 4, 'say': said.append, 'is_interrupted': lambda: False}
  feed, of_another_start = (
    train.start_loader(recipe, videos, mesh, seed=3, **own) for _ in range(2)
  )
  feed.keywords.pop('to_device')
  assert feed.keywords == {**own, 'stall_seconds': 7.0}
  for of_start, step in ((feed, 4), (feed, 9), (of_another_start, 4)):
    of_start.make_batches(step)
    where, how = asked[-1]
    assert where == (videos, options)
    assert [how[name] for name in ('image_size', 'batch_size', 'seed')] == [224, 8, 3]
    assert [how[name] for name in ('first_step', 'host', 'num_hosts')] == [step, 0, 1]
  first, second, third = (how['tell_damaged'] for _, how in asked)
  first('First.')
  second('First.')
  third('Second.')
  assert said == [told('First.', 1, 1), told('Second.', 1, 1)]
  with pytest.raises(DamagedRecord, match='damaged record 2 of this start'):
    second('Second.')
