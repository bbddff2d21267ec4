"""What each program of the field will say when it loads an exported file, and which cannot.

The facts are those programs' own loaders': DropMAE, DropTrack, OSTrack and DropSeg as published,
MAE's fine-tuning, timm 1.0. `docs/convert.md` tells the same at length.
"""

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from dropmae_jax.config import Architecture
from dropmae_jax.pytorch import layouts
from dropmae_jax.pytorch.layouts import CLASS_TOKEN, FRAME_IDENTITIES

_HEAD = ('head.weight', 'head.bias')
# (width, depth, patch size) of the models that a program has.
_BASE, _LARGE, _HUGE = (768, 12, 16), (1024, 24, 16), (1280, 32, 14)
TIMM_MODELS = {
  (384, 12, 16): 'vit_small_patch16_224',
  _BASE: 'vit_base_patch16_224',
  _LARGE: 'vit_large_patch16_224',
  _HUGE: 'vit_huge_patch14_224',
}


# Of the published code itself, which is not in `CLIENTS`: it resumes strictly.
_DROPMAE_MODELS = (_BASE, _LARGE, _HUGE)
_TRACKERS = ('DropTrack', 'OSTrack', 'DropSeg')
# What MAE's fine-tuning reports besides, where it averages the tokens.
GLOBAL_POOL = 'with --global_pool, fc_norm.* is missing too and norm.* unexpected'


class Client(NamedTuple):
  """A program that loads what lies under 'model' of a .pth, not strictly, and prints the rest.

  Attributes:
    name: of the program.
    models: those that it has.
    beside_encoder: tensors that its network has and plain ViT encoders do not.
    new_heads: how many more it has, which no pre-training file holds.
    drops_decoder: it removes all names with 'decoder' before it loads.
  """

  name: str
  models: tuple[tuple[int, int, int], ...]
  beside_encoder: tuple[str, ...]
  new_heads: int = 0
  drops_decoder: bool = False


CLIENTS = (
  Client('DropTrack', (_BASE,), (CLASS_TOKEN, *FRAME_IDENTITIES), drops_decoder=True),
  Client('OSTrack', (_BASE, _LARGE), (CLASS_TOKEN,)),
  Client('DropSeg', (_BASE,), (CLASS_TOKEN, *FRAME_IDENTITIES), 36, drops_decoder=True),
  Client('MAE fine-tuning', (_BASE, _LARGE, _HUGE), (CLASS_TOKEN, *_HEAD)),
)


class Answer(NamedTuple):
  """The keys that a program misses in a file, and those that it does not expect."""

  missing: list[str]
  unexpected: list[str]


def answer_of(client: Client, architecture: Architecture, layout: str) -> Answer:
  """Returns what a program will print for a file of this layout; its new heads are not named."""
  offered = list(layouts.tensor_shapes(architecture, layout))
  if client.drops_decoder:
    offered = [name for name in offered if 'decoder' not in name]
  network = [
    name for name in layouts.tensor_shapes(architecture, 'encoder') if name not in FRAME_IDENTITIES
  ]
  network = [*client.beside_encoder, *network]
  return Answer(
    missing=[name for name in network if name not in offered],
    unexpected=[name for name in offered if name not in network],
  )


def closing_lines(
  path: pathlib.Path, architecture: Architecture, *, layout: str, file_format: str
) -> list[str]:
  """Says who can load an exported file, what each will print, and what to beware of."""
  if layout == 'timm':
    lines = _timm_lines(path, architecture)
  elif file_format == 'safetensors':
    lines = ['Trackers and MAE read .pth only; give --format=pth for them.']
  else:
    lines = _answer_lines(architecture, layout)
  return lines + _name_warnings(path)


def _shape(architecture: Architecture) -> tuple[int, int, int]:
  return architecture.width, architecture.depth, architecture.patch_size


def _answer_lines(architecture: Architecture, layout: str) -> list[str]:
  """Says which keys those programs will report that have a model of this size."""
  takers = [client for client in CLIENTS if _shape(architecture) in client.models]
  if layout != 'mae':
    takers = [client for client in takers if client.name in _TRACKERS]
  answers = [f'  {_line(client, architecture, layout)}' for client in takers]
  if layout == 'full' and _shape(architecture) in _DROPMAE_MODELS:
    answers.append('  DropMAE, to resume: missing none; unexpected none')
  names = {client.name for client in takers}
  lines = []
  if names.isdisjoint(_TRACKERS):
    lines = ['Note: no tracker has a model of this size.']
  if answers and architecture.image_size != layouts.PUBLISHED_IMAGE_SIZE:
    return [
      *lines,
      f'Its position tables are of {architecture.image_size} pixels, and those that load it want'
      f' the ones of {layouts.PUBLISHED_IMAGE_SIZE}, which trackers resample themselves:'
      ' export it without --image_size.',
    ]
  if answers:
    lines += ['These lists of keys will be printed, and they are right:', *answers]
  return lines + _tracker_notes(names, layout)


def _line(client: Client, architecture: Architecture, layout: str) -> str:
  answer = answer_of(client, architecture, layout)
  missing = _listed(answer.missing)
  if client.new_heads:
    total = client.new_heads + len(answer.missing)
    also = f', {missing}' if answer.missing else ''
    missing = f'{total}: {client.new_heads} new heads of its own{also}'
  silent = ' (it prints neither)' if client.name == 'OSTrack' else ''
  pooled = f'; {GLOBAL_POOL}' if client.name == 'MAE fine-tuning' else ''
  return (
    f'{client.name}: missing {missing}; unexpected {_listed(answer.unexpected)}{pooled}{silent}'
  )


def _listed(names: Iterable[str]) -> str:
  """Names keys; those of the decoder are counted."""
  names = list(names)
  decoder = [name for name in names if 'decoder' in name]
  others = [name for name in names if name not in decoder]
  if decoder:
    return f'{len(names)}: {", ".join(others)} and {len(decoder)} with "decoder"'
  return ', '.join(others) or 'none'


def _timm_lines(path: pathlib.Path, architecture: Architecture) -> list[str]:
  model, image_size = TIMM_MODELS.get(_shape(architecture)), architecture.image_size
  if model is None:
    return ['timm has no model of this size under a name; build a VisionTransformer of it.']
  is_usual = image_size == layouts.PUBLISHED_IMAGE_SIZE
  size = '' if is_usual else f' img_size={image_size},'
  return [
    'timm 1.0 loads it strictly, with no key missing and none unexpected:',
    f"  timm.create_model('{model}', num_classes=0, class_token=False, global_pool='avg',",
    f"                   {size} fc_norm=False, checkpoint_path='{path}')",
    'It has no frame identities: both frames of a pair look alike to it.',
  ]


def _tracker_notes(takers: set[str], layout: str) -> list[str]:
  lines = []
  if 'OSTrack' in takers:
    lines.append(
      'Note: OSTrack has no frame identities and drops temporal_pos_embed_x and _z in silence;'
      ' DropTrack uses them.'
    )
  if takers and 'DropTrack' not in takers:
    lines.append('Note: DropTrack and DropSeg take ViT-B/16 only.')
  if layout == 'mae':
    lines.append(
      'Note: the class token is zero and was never trained; it still takes part in attention.'
    )
  return lines


def _name_warnings(path: pathlib.Path) -> list[str]:
  lines = []
  if 'OSTrack' in path.name:
    lines.append(
      'Warning: trackers take a file with "OSTrack" in its name for one of their own checkpoints;'
      f' rename {path.name}.'
    )
  if 'npz' in str(path.absolute()):
    lines.append(
      f'Warning: trackers take a path with "npz" in it for a file of another format; move {path}.'
    )
  return lines
