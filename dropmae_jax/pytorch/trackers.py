"""How trackers open our files: by the name of a file, and with two position tables."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from dropmae_jax.model import position_embedding
from dropmae_jax.pytorch import layouts
from dropmae_jax.runtime.errors import UserError
from dropmae_jax.runtime.paths import Path, absolute

# A tracker that finds its own name in a file's (OSTrack, HIPTrack; HIPTrack and others DropTrack
# too; STTrack SOT) takes it for a checkpoint of its own, and reads 'net' instead of 'model'.
OWN_NAMES = re.compile(r'[A-Za-z0-9]+Track|SOT')


def name_warnings(path: Path, *, is_folded: bool) -> Iterator[str]:
  """Yields what is wrong with the name of an exported file.

  Args:
    path: of the file.
    is_folded: whether it holds what `fold_identities` returns, under 'net'.
  """
  tracker_names = OWN_NAMES.findall(path.name)
  if tracker_names and not is_folded:
    names = '" or "'.join(tracker_names)
    yield (
      f'Warning: trackers take a file with "{names}" in its name for one of their own checkpoints,'
      f' and then fail or load nothing; rename {path.name}.'
    )
  if is_folded and not tracker_names:
    yield (
      f'Warning: OSTrack and ARTrack read such a file only if it has their own name in its name;'
      f' rename {path.name} for them.'
    )
  if 'npz' in str(absolute(path)):
    yield (
      f'Warning: trackers take a path with "npz" in it for a file of another format; move {path}.'
    )


def fold_identities(
  encoder: Mapping[str, np.ndarray], sizes: tuple[int, int]
) -> dict[str, np.ndarray]:
  """Returns an encoder as trackers save theirs, with the frame identities in the position tables.

  A tracker that knows no frame identities then gives every token the same embedding as one that
  adds them: z to the template, x to the search image.

  Args:
    encoder: in the layout of that name.
    sizes: of template and search image, in pixels.

  Raises:
    UserError: a size is not a multiple of the patch size.
  """
  patch_size = encoder['patch_embed.proj.weight'].shape[-1]
  tensors = {name: each for name, each in encoder.items() if name not in layouts.FRAME_IDENTITIES}
  for frame, size in zip('zx', sizes, strict=True):
    if size < patch_size or size % patch_size:
      raise UserError(
        f'--fold_identities={sizes[0]},{sizes[1]}: {size} is not a multiple of the patch size'
        f' {patch_size}; give the sizes of the template and search images of your tracker.'
      )
    table = position_embedding.resample_table(encoder['pos_embed'], size // patch_size)[:, 1:]
    # After pos_embed, which SFETrack reads as pos_embed_x.
    tensors[f'pos_embed_{frame}'] = table + encoder[f'temporal_pos_embed_{frame}']
  return {f'backbone.{name}': each for name, each in tensors.items()}
