"""Damages videos in every way that a download, a disk or a user can; seeded.

    python tests/mutations.py --videos=GOOD --output=FOLDER [--count=1000] [--seed=0]

writes `count` files below FOLDER/train/mutated.
"""

import argparse
import pathlib
import random

JUNK = b'<html><body>This video is private.</body></html>'
SUFFIXES = ('.mp4', '.avi', '.mkv', '.webm', '.ts', '.flv', '.mpg', '.mov', '.wmv')
# What files of other kinds begin with: their demuxers see damage that ours would not.
HEADS = (
  b'RIFF\x10\x00\x00\x00AVI LIST',
  b'\x1aE\xdf\xa3\x93B\x82\x88matroska',
  b'FLV\x01\x05\x00\x00\x00\x09\x00\x00\x00\x00',
  b'\x00\x00\x01\xba\x44\x00\x04\x00\x04\x01',
  b'\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom',
  b'GIF89a\x10\x00\x10\x00',
  b'#EXTM3U\n#EXTINF:9,\n/dev/zero\n',
  b'ffconcat version 1.0\nfile other.mp4\n',
)


def truncated(rng, content):
  return content[: rng.randrange(len(content))]


def bits_flipped(rng, content):
  damaged = bytearray(content)
  for _ in range(rng.choice((1, 10, 100))):
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
  return bytes(damaged)


def header_flipped(rng, content):
  """As above, where it says what everything is: in the moov box of an mp4, or at the start."""
  start = max(content.rfind(b'moov'), 0)
  end = start + 1000
  return content[:start] + bits_flipped(rng, content[start:end]) + content[end:]


def zeroed(rng, content):
  start = rng.randrange(len(content))
  length = rng.randrange(1, 4000)
  return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def torn(rng, content):
  """A piece is missing in the middle."""
  start = rng.randrange(len(content))
  return content[:start] + content[start + rng.randrange(1, 4000) :]


def repeated(rng, content):
  start = rng.randrange(len(content))
  return content[:start] + content


def behind_another_head(rng, content):
  return rng.choice(HEADS) + content[rng.randrange(len(content)) :]


def random_bytes(rng, content):
  return rng.choice((*HEADS, b'')) + rng.randbytes(rng.randrange(5000))


def empty(rng, content):
  return b''


def junk(rng, content):
  return JUNK * rng.randrange(1, 50)


def whole(rng, content):
  """Nothing is wrong but, mostly, the suffix."""
  return content


MUTATIONS = (
  truncated, bits_flipped, header_flipped, zeroed, torn, repeated, behind_another_head,
  random_bytes, empty, junk, whole,
)  # fmt: skip


def write_mutations(videos, output, count, seed):
  """Writes damaged copies of some videos; returns how many."""
  rng = random.Random(seed)
  contents = [path.read_bytes() for path in videos]
  folder = output / 'train' / 'mutated'
  folder.mkdir(parents=True)
  for number in range(count):
    mutation = MUTATIONS[number % len(MUTATIONS)]
    name = f'{mutation.__name__}_{number:05d}{rng.choice(SUFFIXES)}'
    (folder / name).write_bytes(mutation(rng, rng.choice(contents)))
  return count


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--videos', type=pathlib.Path, required=True)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--count', type=int, default=1000)
  parser.add_argument('--seed', type=int, default=0)
  arguments = parser.parse_args()
  good = sorted(path for path in arguments.videos.rglob('*') if path.suffix in SUFFIXES)
  write_mutations(good, arguments.output, arguments.count, arguments.seed)
