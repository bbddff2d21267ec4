"""docs/convert.md: its code runs as it stands, and its table of keys is what loaders print."""

import re

import jax
import numpy as np
import pytest
from conftest import ROOT, torch

from dropmae_jax.model import mae
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.pytorch import layouts, weight_files

TEXT = (ROOT / 'docs' / 'convert.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, flags=re.DOTALL)
BASE = architecture_of_size('B')


@pytest.fixture(scope='module')
def params():
  """Of the size of initial ones; no program is compiled for them."""
  rng = np.random.default_rng(0)
  _, shapes = mae.abstract_model(BASE)

  def draw(path, x):
    return 0.04 * rng.standard_normal(x.shape, np.float32) + np.float32("'scale'" in str(path[-1]))

  return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope='module')
def files(params, tmp_path_factory):
  """The files that the document names."""
  folder = tmp_path_factory.mktemp('docs')
  state = layouts.to_torch(params, BASE)
  for name, layout in (
    ('dropmae.pth', 'full'),
    ('dropmae_timm.pth', 'timm'),
    ('dropmae_encoder.safetensors', 'encoder'),
  ):
    weight_files.write(
      folder / name,
      layouts.in_layout(state, layout),
      file_format=weight_files.format_of(folder / name),
      key='' if layout == 'timm' else 'model',
    )
  return folder


@pytest.mark.parametrize('block', BLOCKS, ids=lambda block: block.split()[1])
def test_code_can_be_copied(timm, files, params, monkeypatch, block):
  monkeypatch.chdir(files)
  names = {}
  exec(block, names)
  state = layouts.to_torch(params, BASE)
  if 'encoder' in names:
    array = names['encoder']['blocks.0.attn.qkv.weight']
    np.testing.assert_array_equal(array, state['blocks.0.attn.qkv.weight'])
    return
  from dropmae_jax.pytorch import reference

  images = reference.fixed_images(224)
  with torch.inference_mode():
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    theirs = names['model'].eval().forward_features(pixels).numpy()
  (ours,) = reference.jax_outputs(params, images, BASE, as_pair=False, with_decoder=False)
  assert np.abs(theirs - ours).max() / np.abs(ours).max() < reference.TOLERANCE


def network(timm, program):
  """A network with the tensors of a program's: timm's ViT-B without memory, and additions."""
  options = {
    'MAE, fine-tuning': {'num_classes': 10},
    'MAE, fine-tuning --global_pool': {'num_classes': 10, 'global_pool': 'avg'},
    'timm 1.0': {'class_token': False, 'global_pool': 'avg', 'fc_norm': False},
  }
  with torch.device('meta'):
    net = timm.create_model(
      'vit_base_patch16_224', **{'num_classes': 0, **options.get(program, {})}
    )
    if program in ('DropTrack', 'HIPTrack', 'DropSeg'):
      for name in layouts.FRAME_IDENTITIES:
        net.register_parameter(name, torch.nn.Parameter(torch.zeros(1, 1, 768)))
    if program == 'DropSeg':
      net.new_heads = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(1)) for _ in range(36))
  return net


def keys_of(timm, program, layout):
  """The missing and the unexpected keys, as a program's loader would print them."""
  offered = {
    name: torch.empty(shape, device='meta')
    for name, shape in layouts.tensor_shapes(BASE, layout).items()
    if not (program in ('DropTrack', 'DropSeg') and 'decoder' in name)
  }
  return network(timm, program).load_state_dict(offered, strict=False)


def as_written(keys):
  heads = [key for key in keys if key.startswith('new_heads.')]
  if heads:
    (other,) = set(keys) - set(heads)
    return f'{len(keys)}: `{other}` and {len(heads)} tensors of its own new heads'
  if set(keys) == set(layouts.FRAME_IDENTITIES):
    return 'the two `temporal_pos_embed_*`'
  return str(len(keys)) if len(keys) > 9 else ', '.join(f'`{key}`' for key in keys) or 'none'


@pytest.mark.parametrize(
  ('program', 'layout'),
  [
    ('DropTrack', 'full'),
    ('DropTrack', 'encoder'),
    ('OSTrack', 'full'),
    ('OSTrack', 'encoder'),
    ('HIPTrack', 'full'),
    ('HIPTrack', 'encoder'),
    ('ARTrack', 'full'),
    ('ODTrack', 'encoder'),
    ('DropSeg', 'full'),
    ('MAE, fine-tuning', 'mae'),
    ('timm 1.0', 'timm'),
  ],
)
def test_the_table_of_keys_is_what_loaders_print(timm, program, layout):
  table = TEXT.partition('## Options')[0]
  (row,) = [line for line in table.splitlines() if line.startswith(f'| {program} |')]
  in_layouts, missing, unexpected = (cell.strip() for cell in row.split('|')[2:5])
  assert f'`{layout}`' in in_layouts
  loaded = keys_of(timm, program, layout)
  assert missing.startswith(as_written(loaded.missing_keys))
  listed = as_written(loaded.unexpected_keys)
  assert f'{listed} (of `{layout}`)' in unexpected or unexpected.startswith(listed)


def test_global_pool_of_mae_changes_the_norm(timm):
  plain, pooled = (
    keys_of(timm, f'MAE, fine-tuning{option}', 'mae') for option in ('', ' --global_pool')
  )
  missing = set(pooled.missing_keys) - set(plain.missing_keys)
  assert missing == {'fc_norm.weight', 'fc_norm.bias'}
  unexpected = set(pooled.unexpected_keys) - set(plain.unexpected_keys)
  assert unexpected == {'norm.weight', 'norm.bias'}
  assert '(with `--global_pool` also `fc_norm.*`)' in TEXT
  assert '(with `--global_pool` also `norm.*`)' in TEXT


@pytest.mark.parametrize(
  ('model', 'size', 'image_size'),
  [
    ('vit_small_patch16_224', 'S', 224),
    ('vit_large_patch16_224', 'L', 224),
    ('vit_huge_patch14_224', 'H', 224),
    ('vit_base_patch16_224', 'B', 256),
  ],
)
def test_timm_has_models_of_our_sizes(timm, model, size, image_size):
  architecture = architecture_of_size(size, image_size=image_size)
  with torch.device('meta'):
    net = timm.create_model(
      model, num_classes=0, class_token=False, global_pool='avg', fc_norm=False, img_size=image_size
    )
  theirs = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
  assert theirs == layouts.tensor_shapes(architecture, 'timm')
  assert net.blocks[0].attn.num_heads == architecture.num_heads


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
def test_tensor_counts_are_right(layout):
  (count,) = re.findall(rf'\| `{layout}` \| .*?(\d+) tensors', TEXT)
  assert int(count) == len(layouts.tensor_shapes(BASE, layout))
