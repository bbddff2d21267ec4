"""The report of a build, on every video: `build_report.json`, and the same as a table of text."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from tfds_kinetics.configs import DATASET, VideoCollection
from tfds_kinetics.files import write_text
from tfds_kinetics.messages import one_line
from tfds_kinetics.shards import VERSION, ShardJob
from tfds_kinetics.tree import Listing, printable
from tfds_kinetics.video import FrameOptions

NAME = 'build_report.json'
TABLE = 'build_report.txt'
SHOWN = 10


def make_report(
  collection: VideoCollection,
  listing: Listing,
  tables: dict[ShardJob, dict[str, Any]],
  options: FrameOptions,
) -> dict[str, Any]:
  """Returns the report of a build.

  Its entries: `dataset`; `plan` (`plan_fingerprint`); `fingerprint` (a hash of all stored frames
  and the paths of their videos); `options`; `versions`; `totals`; `missing` (annotated clips
  without a file, by split); `videos`, a row for each. A row has `split` (empty outside of all
  splits), `path`, `class`, `outcome` ('kept', 'skipped' or 'outside' of all splits), `reason`,
  `seconds`, `frames`, and `bytes` of its JPEGs.
  """
  rows = []
  for job, table in tables.items():
    rows += [_row(job.split, 'kept', row) for row in table['videos']]
    rows += [_row(job.split, 'skipped', row) for row in table['skipped']]
  for split, path, reason in listing.left_out:
    rows.append(_row(split, 'skipped', {'path': printable(path), 'reason': printable(reason)}))
  for video in listing.outside:
    row = {'path': printable(video.path), 'reason': 'it is in the folder of no split'}
    rows.append(_row('', 'outside', row))
  rows.sort(key=lambda row: (row['split'], row['path']))
  kept = [row for row in rows if row['outcome'] == 'kept']
  contents = sorted(
    (job.split, row['path'], row['sha256'])
    for job, table in tables.items()
    for row in table['videos']
  )
  return {
    'dataset': f'{DATASET}/{collection.name}/{VERSION}',
    'plan': plan_fingerprint(tables),
    'fingerprint': hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
    'options': dataclasses.asdict(options),
    'versions': {'format': VERSION, 'tensorflow_datasets': tfds.__version__},
    'totals': {
      'videos': len(kept),
      'skipped': sum(row['outcome'] == 'skipped' for row in rows),
      'missing': sum(map(len, listing.missing.values())),
      'outside': len(listing.outside),
      'frames': sum(row['frames'] for row in kept),
      'bytes': sum(file['bytes'] for table in tables.values() for file in table['files']),
      'seconds': round(sum(row['seconds'] for row in rows), 3),
      'classes': len({row['class'] for row in kept} - {''}),
      'classes_expected': collection.num_classes,
    },
    'missing': listing.missing,
    'videos': rows,
  }


def plan_fingerprint(jobs: Any) -> str:
  """Returns a hash of the videos' names and sizes and of the options."""
  return hashlib.sha256(''.join(job.fingerprint for job in jobs).encode()).hexdigest()


def _row(split: str, outcome: str, row: dict[str, Any]) -> dict[str, Any]:
  return {
    'split': split,
    'path': row['path'],
    'class': row.get('label', ''),
    'outcome': outcome,
    'reason': row.get('reason', ''),
    'seconds': row.get('seconds', 0.0),
    'frames': row.get('frames', 0),
    'bytes': row.get('bytes', 0),
  }


def write_report(folder: pathlib.Path, report: dict[str, Any]) -> None:
  """Writes both forms; each video is one line of the json, so that grep can be used on it."""
  head = json.dumps(report | {'videos': []}, indent=1)
  rows = ',\n  '.join(one_line(json.dumps(row, ensure_ascii=False)) for row in report['videos'])
  start, videos, end = head.rpartition('"videos": []')
  body = f'{start}{videos[:-1]}\n  {rows}\n ]{end}\n' if rows else f'{head}\n'
  for name, text in ((NAME, body), (TABLE, _table(report))):
    write_text(folder / name, text)


def _table(report: dict[str, Any]) -> str:
  """Returns the table of text: totals, then skipped videos with the reason, then kept ones."""
  lines = [*_totals(report), '']
  columns = f'{"outcome":8} {"frames":>7} {"MB":>8} {"seconds":>8}  video'
  lines += [columns, '-' * len(columns)]
  for row in sorted(report['videos'], key=lambda row: row['outcome'] == 'kept'):
    reason = f': {row["reason"]}' if row['reason'] else ''
    lines.append(
      f'{row["outcome"]:8} {row["frames"]:7} {row["bytes"] / 1e6:8.2f} {row["seconds"]:8.2f}'
      f'  {one_line(row["path"] + reason)}'
    )
  for split, names in report['missing'].items():
    lines += ['', f'annotated in {split}, but not there: {len(names)}', *map(one_line, names)]
  return '\n'.join(lines) + '\n'


def _totals(report: dict[str, Any]) -> list[str]:
  totals = report['totals']
  lines = [
    f'{totals["videos"]} videos, {totals["frames"]} frames, {totals["bytes"] / 1e6:.1f} MB,'
    f' {totals["classes"]} classes; {totals["skipped"]} skipped;'
    f' {totals["seconds"]:.0f} s of work'
  ]
  if totals['missing']:
    lines.append(f'note: {totals["missing"]} clips of the annotations are not there')
  if totals['outside']:
    lines.append(f'note: {totals["outside"]} videos are in the folder of no split, and left out')
  if totals['classes_expected'] not in (None, totals['classes']):
    lines.append(f'note: a complete copy has {totals["classes_expected"]} classes')
  return lines


def summary(target: pathlib.Path) -> str:
  """Returns the closing lines of a build: totals, and the first skipped videos with reasons."""
  report = json.loads((target / NAME).read_text('utf-8'))
  first, *notes = _totals(report)
  skipped = [row for row in report['videos'] if row['outcome'] == 'skipped']
  lines = [one_line(f'{target}: {first}'), *notes]
  lines += [one_line(f'  skipped {row["path"]}: {row["reason"]}') for row in skipped[:SHOWN]]
  if len(skipped) > SHOWN:
    lines.append(f'  and {len(skipped) - SHOWN} more')
  lines.append(one_line(f'  report: {target / TABLE}'))
  return '\n'.join(lines)
