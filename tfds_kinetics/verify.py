"""Reads a whole dataset, and compares it with the digests that were written when it was built."""

import concurrent.futures
import pathlib
import zipfile
import zlib

import numpy as np
import tqdm

from tfds_kinetics.digests import file_digest
from tfds_kinetics.messages import BadInput
from tfds_kinetics.publish import shard_path


def verify(folder: pathlib.Path, workers: int) -> str:
  """Returns a sentence on what was compared.

  Args:
    folder: of the dataset.
    workers: number of threads.

  Raises:
    BadInput: a file is missing or not the one that was written, or there are no digests.
  """
  expected: dict[pathlib.Path, str] = {}
  for index in sorted(folder.glob('index-*.npz')):
    digests = _stored_digests(index)
    split = index.stem.removeprefix('index-')
    for number, digest in enumerate(digests):
      expected[shard_path(folder, split, number, len(digests))] = digest
  if not expected:
    raise BadInput(f'there is no dataset in {folder}; give the --config and --data_dir of one.')
  with concurrent.futures.ThreadPoolExecutor(workers) as threads:
    found = threads.map(_digest, expected)
    bar = tqdm.tqdm(found, total=len(expected), unit='shard', disable=None)
    wrong = [path for path, digest in zip(expected, bar, strict=True) if digest != expected[path]]
  wrong += sorted(set(folder.glob('*.array_record-*')) - expected.keys())
  if wrong:
    raise _damaged(
      folder, f'{len(wrong)} shards are missing or not those that were written, as {wrong[0].name}'
    )
  size = sum(path.stat().st_size for path in expected)
  return f'{folder}: all {len(expected)} shards ({size / 1e6:.1f} MB) are as they were written'


def _stored_digests(index: pathlib.Path) -> list[str]:
  try:
    with np.load(index) as arrays:
      if 'shard_sha256' in arrays:
        return arrays['shard_sha256'].tolist()
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise _damaged(index.parent, f'{index.name}: {error}') from error
  raise BadInput(
    f'{index.parent} was built before datasets had digests, so there is nothing to compare with;'
    ' remove it and build it again to have them.'
  )


def _damaged(folder: pathlib.Path, what: str) -> BadInput:
  return BadInput(f'{folder} is damaged ({what}); copy it again, or remove it and build it again.')


def _digest(path: pathlib.Path) -> str | None:
  """Returns the digest of a file, or None if it is missing."""
  try:
    return file_digest(path)
  except FileNotFoundError:
    return None
