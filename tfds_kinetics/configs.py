"""The builder configs, and the names of folders and files that videos are found by."""

import dataclasses

DATASET = 'kinetics_frames'
VIDEO_SUFFIXES = frozenset(
  (
    '.3g2 .3gp .asf .avi .f4v .flv .m2ts .m4v .mkv .mov .mp4 .mpe .mpeg .mpg .mts .mxf'
    ' .ogv .ts .vob .webm .wmv'
  ).split()
)
# Names of split folders in the public mirrors of Kinetics, and the split of each.
SPLITS = {
  form.format(name): split
  for name, split in (
    ('train', 'train'),
    ('val', 'val'),
    ('validate', 'val'),
    ('validation', 'val'),
    ('test', 'test'),
  )
  for form in ('{}', '{}_256', 'videos_{}')
}


@dataclasses.dataclass(frozen=True)
class VideoCollection:
  """A builder config.

  Attributes:
    name: of the TFDS config.
    description: what the collection is.
    num_classes: of a complete copy of Kinetics; None for other collections, whose file names mean
      nothing.
    homepage: of the collection.
    citation: BibTeX.
  """

  name: str
  description: str
  num_classes: int | None = None
  homepage: str = ''
  citation: str = ''


def _kinetics(classes: int, arxiv: str, title: str, authors: str, year: int) -> VideoCollection:
  return VideoCollection(
    name=f'kinetics{classes}',
    description=f'Frames of the clips of Kinetics-{classes}.',
    num_classes=classes,
    homepage=f'https://arxiv.org/abs/{arxiv}',
    citation=(
      f'@article{{kinetics{classes}, title={{{title}}}, author={{{authors}}},'
      f' journal={{arXiv:{arxiv}}}, year={{{year}}}}}'
    ),
  )


COLLECTIONS = {
  collection.name: collection
  for collection in (
    VideoCollection(
      name='folder',
      description='Frames of any folder tree of videos, with or without class folders.',
    ),
    _kinetics(
      400, '1705.06950', 'The Kinetics Human Action Video Dataset', 'Kay, Will and others', 2017
    ),
    _kinetics(
      600, '1808.01340', 'A Short Note about Kinetics-600', 'Carreira, Joao and others', 2018
    ),
    _kinetics(
      700,
      '1907.06987',
      'A Short Note on the Kinetics-700 Human Action Dataset',
      'Carreira, Joao and others',
      2019,
    ),
  )
}
