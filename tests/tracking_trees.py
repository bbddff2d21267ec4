"""Tiny data sets in the official layouts of tracking benchmarks."""

import numpy as np
from PIL import Image

SIZE = 64, 48  # Width, height.
FRAMES = 5


def boxes(count=FRAMES, shift=0.0):
  """True boxes of a target that moves by a pixel and grows; not all are whole numbers."""
  number = np.arange(count)[:, None]
  return np.array([10 + shift, 8, 12, 9]) + number * np.array([1.5, 1, 0.5, 0])


def save_frames(folder, names):
  """Writes frames; the red of each is 20 times its place."""
  folder.mkdir(parents=True, exist_ok=True)
  for number, name in enumerate(names):
    Image.new('RGB', SIZE, (20 * number, 90, 160)).save(folder / name)


def save_boxes(path, values, separator=','):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(separator.join(f'{x:g}' for x in box) + '\n' for box in values))


def got10k(root, split='val', names=('GOT-10k_Val_000001', 'GOT-10k_Val_000002')):
  for index, name in enumerate(names):
    folder = root / split / name
    save_frames(folder, [f'{number:08d}.jpg' for number in range(1, FRAMES + 1)])
    is_test = split == 'test'
    save_boxes(folder / 'groundtruth.txt', boxes(shift=index)[: 1 if is_test else None])
    if not is_test:
      # In the third frame nothing can be seen; that it is absent is said of the fourth only.
      (folder / 'cover.label').write_text('8\n8\n0\n4\n1\n')
      (folder / 'absence.label').write_text('0\n0\n0\n1\n0\n')
      (folder / 'cut_by_image.label').write_text('0\n' * FRAMES)
      (folder / 'meta_info.ini').write_text(
        f'[METAINFO]\nurl: https://example.org\nresolution: ({SIZE[0]}, {SIZE[1]})\n\n'
      )
  (root / split / 'list.txt').write_text('\n'.join(names) + '\n')
  return list(names)


def lasot(root, names=('airplane-1', 'airplane-15', 'tree-frog-2'), has_list=True):
  for index, name in enumerate(names):
    folder = root / name.rpartition('-')[0] / name
    save_frames(folder / 'img', [f'{number:08d}.jpg' for number in range(1, FRAMES + 1)])
    save_boxes(folder / 'groundtruth.txt', boxes(shift=index))
    (folder / 'full_occlusion.txt').write_text('0,0,1,0,0')
    (folder / 'out_of_view.txt').write_text('0,0,0,1,0\n')
    (folder / 'nlp.txt').write_text('a thing')
  if has_list:
    (root / 'testing_set.txt').write_text('\n'.join(names))
  return list(names)


def trackingnet(root, split='TEST', names=('-LqClgHw3Ys_0', '2xL'), is_withheld=False):
  for index, name in enumerate(names):
    save_frames(root / split / 'frames' / name, [f'{number}.jpg' for number in range(FRAMES)])
    count = 1 if is_withheld else None
    save_boxes(root / split / 'anno' / f'{name}.txt', boxes(shift=index)[:count])
  return list(names)


def otb(root, names=('Basketball', 'Jogging.1', 'Jogging.2', 'Subway')):
  separators = {'Basketball': '\t', 'Subway': ' '}
  for index, name in enumerate(names):
    folder, _, target = name.partition('.')
    save_frames(root / folder / 'img', [f'{number:04d}.jpg' for number in range(1, FRAMES + 1)])
    file = f'groundtruth_rect.{target}.txt' if target else 'groundtruth_rect.txt'
    save_boxes(root / folder / file, boxes(shift=index), separators.get(name, ','))
  return list(names)


def folder(root, names=('mine', 'yours')):
  for index, name in enumerate(names):
    save_frames(root / name, [f'frame{number}.png' for number in range(8, 8 + FRAMES)])
    save_boxes(root / name / 'groundtruth.txt', boxes(shift=index), ' ')
  return list(names)


# By the name of the benchmark: writes sequences with the truth of all frames.
TREES = {
  'got10k': got10k,
  'lasot': lasot,
  'lasot_ext': lasot,
  'trackingnet': trackingnet,
  'otb': otb,
  'folder': folder,
}
# The split that a tree has, where it is not the benchmark's default.
SPLITS = {'got10k': 'val'}
