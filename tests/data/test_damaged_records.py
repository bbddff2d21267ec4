"""Each damaged record is counted once, however often it is read, and too many end the run."""

import contextlib
import logging

import pytest
from sources import DamagedVideos, NumberedVideos

from dropmae_jax import sharding, train
from dropmae_jax.config import Architecture, Config, DataOptions
from dropmae_jax.data import frame_pairs
from dropmae_jax.data.frame_pairs import DamagedRecords
from dropmae_jax.data.loader import Loader
from dropmae_jax.data.mixture import mixture_of
from dropmae_jax.data.video_source import DamagedRecord


def line(message, number, most):
  return f'{message} Another video is taken instead; damaged record {number} of at most {most}.'


def test_each_record_is_counted_once_up_to_the_limit(caplog):
  records = DamagedRecords(2)
  for message in ('First.', 'Second.', 'First.', 'Second.'):
    records.add(message)
  assert caplog.record_tuples == [
    ('dropmae_jax', logging.WARNING, line('First.', 1, 2)),
    ('dropmae_jax', logging.WARNING, line('Second.', 2, 2)),
  ]
  with pytest.raises(DamagedRecord) as ended:
    records.add('Third.')
  assert str(ended.value) == (
    'Third. It is damaged record 3 of this start, and config.data.max_damaged_records=2.'
  )
  DamagedRecords(2).add('Third.')
  assert caplog.messages[2:] == [line('Third.', 1, 2)]


@pytest.mark.parametrize('most', [3, 2])
@pytest.mark.parametrize('num_threads', [1, 2])
def test_a_loader_meets_the_same_records_again(num_threads, most, caplog):
  """Three damaged records, each in several pairs, read by several threads."""
  damaged, met = [(2, 3), (5, 0), (5, 1)], []
  records = DamagedRecords(most)
  stream = frame_pairs.pair_batches(
    DamagedVideos([6] * 8, set(damaged)),
    DataOptions(frame_gap=4, num_threads=num_threads),
    image_size=16,
    batch_size=4,
    seed=7,
    report_damaged=lambda message: (met.append(message), records.add(message)),
  )
  enough = contextlib.nullcontext() if most == 3 else pytest.raises(DamagedRecord, match='record 3')
  with contextlib.closing(stream), enough:
    for _ in range(30):
      next(stream)
  messages = list(dict.fromkeys(met))
  assert set(messages) == {f'video {video} frame {number} is damaged.' for video, number in damaged}
  logged = [each.getMessage() for each in caplog.records if each.name == 'dropmae_jax']
  assert logged == [line(each, n + 1, most) for n, each in enumerate(messages[:most])]
  assert len(met) > 10 or most == 2


def test_every_start_counts_from_zero(monkeypatch, caplog):
  reports = []

  def pair_batches(*_, report_damaged, **__):
    reports.append(report_damaged)
    return Loader.__new__(Loader)

  monkeypatch.setattr(frame_pairs, 'pair_batches', pair_batches)
  options = DataOptions(max_damaged_records=1)
  config = Config(data_dir='', num_steps=1, batch_size=8, model=Architecture(), data=options)
  videos, mesh = mixture_of(NumberedVideos([3])), sharding.make_mesh(options=config.mesh)
  for _ in range(2):
    train.start_loader(config, videos, mesh, seed=3, first_step=4, is_interrupted=lambda: False)
  first, second = reports
  first('First.')
  second('Second.')
  assert caplog.messages == [line('First.', 1, 1), line('Second.', 1, 1)]
  with pytest.raises(DamagedRecord, match='damaged record 2 of this start'):
    first('Second.')
