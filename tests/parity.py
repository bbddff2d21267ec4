"""Runs one recorded case through this package, for comparison with any other implementation.

    python tests/parity.py --case=IN.npz --output=OUT.npz [--checkpoint=DIR]

IN.npz holds a PyTorch-named state dict (`state/<name>`; or --checkpoint gives one of ours, such
as `convert_to_torch.py --from_torch` makes), normalised frames `frames_x` (earlier)
and `frames_z` (later) [b, 3, h, w] float32, `mask_noise` [b, l], one boolean `drop_mask/<block>`
[b, heads, l, l] per decoder block (query, key; True = dropped), and as json under `config`:
img_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth,
decoder_num_heads, mlp_ratio, mask_ratio, P, norm_pix_loss.

OUT.npz holds `loss`, `pred` [b, l, p], `mask` [b, l] (1 = removed) and `grad/<name>` of every
trained tensor, in PyTorch's names and layout. All in float32.
"""

import json
import os
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.config import Architecture, Objective
from dropmae_jax.model import fast_asad, mae, masking, patches
from dropmae_jax.pytorch import layouts
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError


def architecture_of(config: dict) -> Architecture:
  return Architecture(
    image_size=config['img_size'],
    patch_size=config['patch_size'],
    width=config['embed_dim'],
    depth=config['depth'],
    num_heads=config['num_heads'],
    decoder_width=config['decoder_embed_dim'],
    decoder_depth=config['decoder_depth'],
    decoder_num_heads=config['decoder_num_heads'],
    mlp_ratio=float(config['mlp_ratio']),
  )


def within_frame(drop_mask: np.ndarray) -> np.ndarray:
  """[b, m, l, l] to the [b, f, m, i, n] of `asad`; refuses drops that no draw can make."""
  b, m, length, _ = drop_mask.shape
  n = length // 2
  by_frame = drop_mask.reshape(b, m, 2, n, 2, n)
  own = np.stack([by_frame[:, :, f, :, f] for f in range(2)], axis=1)
  if own.sum() != drop_mask.sum() or np.einsum('bfmii->', own.astype(np.int64)):
    raise UserError('a drop mask drops pairs across frames or on the diagonal; ASAD never does.')
  return own


def recorded_loss(params, case, *, graphdef, objective):
  """The loss of a recorded case, and what it was computed from; differentiable in params."""
  model = nnx.merge(graphdef, params)
  a = model.architecture
  frames = jnp.stack([case['frames_x'], case['frames_z']], axis=1).transpose(0, 1, 3, 4, 2)
  patch_vectors = patches.patchify(frames, a.patch_size)
  masked = masking.masking_from_noise(
    case['mask_noise'], masking.num_visible(a.num_tokens, objective.mask_ratio)
  )
  attentions = [
    partial(fast_asad.attention_with_drops, is_dropped=drops) for drops in case['drops']
  ]
  latents = model.encode(patch_vectors, masked)
  loss = mae.reconstruction_loss(
    model.decode(latents, masked, attentions, wanted=masked.masked),
    masking.select(patch_vectors, masked.masked),
    normalise_targets=objective.normalise_targets,
  )
  reconstruction = jax.lax.stop_gradient(model(patch_vectors, masked, attentions))
  return loss, {'pred': reconstruction, 'mask': masking.is_masked(masked).astype(jnp.float32)}


def run_case(case, weights: saved_weights.Weights | None = None) -> dict[str, np.ndarray]:
  """Runs one case; takes and returns what the module's docstring says."""
  config = json.loads(case['config'].item())
  architecture = architecture_of(config)
  if weights is None:
    state = {k.removeprefix('state/'): v for k, v in case.items() if k.startswith('state/')}
    params = layouts.from_torch(state, architecture)
  elif weights.architecture != architecture:
    raise UserError(f'--checkpoint is of {weights.architecture}, and the case of {architecture}.')
  else:
    params = weights.params
  recorded = {
    'frames_x': case['frames_x'],
    'frames_z': case['frames_z'],
    'mask_noise': case['mask_noise'],
    'drops': [within_frame(case[f'drop_mask/{i}']) for i in range(architecture.decoder_depth)],
  }
  objective = Objective(mask_ratio=config['mask_ratio'], normalise_targets=config['norm_pix_loss'])
  loss_fn = partial(
    recorded_loss, graphdef=mae.abstract_model(architecture)[0], objective=objective
  )
  with jax.default_matmul_precision('highest'):
    (loss, out), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, recorded)
  named = layouts.to_torch(gradients, architecture)
  return {
    'loss': np.asarray(loss),
    **{name: np.asarray(value) for name, value in out.items()},
    **{f'grad/{k}': v for k, v in named.items() if k not in layouts.POSITION_TABLES},
  }


def main() -> None:
  parser = cli.Parser(description=__doc__.splitlines()[0])
  parser.add_argument('--case', required=True)
  parser.add_argument('--output', required=True)
  parser.add_argument('--checkpoint', type=pathlib.Path)
  arguments = parser.parse_args()
  if not os.path.isfile(arguments.case):
    raise UserError(f'--case={arguments.case} is not a file; give a recorded .npz.')
  weights = saved_weights.load_weights(arguments.checkpoint) if arguments.checkpoint else None
  try:
    with np.load(arguments.case) as case:
      result = run_case(dict(case), weights)
  except UserError:
    raise
  except (ValueError, KeyError, OSError) as error:
    raise UserError(f'--case={arguments.case} is not a whole recorded case: {error}') from error
  partial_name = f'{arguments.output}.partial.npz'
  np.savez(partial_name, **result)
  os.replace(partial_name, arguments.output)
  print(f'loss {result["loss"]:.7f}; {len(result)} arrays in {arguments.output}')


if __name__ == '__main__':
  cli.run(main)
