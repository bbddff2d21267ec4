"""The code, the lists of keys and the counts in docs/convert.md are right for files of a ViT-B."""

import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import ROOT

from dropmae_jax.model import mae
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.pytorch import file_checks, layouts, weight_files

TEXT = (ROOT / 'docs' / 'convert.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, flags=re.DOTALL)
BASE = architecture_of_size('B')


class Network(NamedTuple):
  """What a program's network has beside a plain encoder, by the program's own loader.

  Its `num_heads` new heads are in no pre-training file. `removes_decoder`: names with 'decoder'
  are removed before loading.
  """

  beside_encoder: set[str]
  num_heads: int = 0
  removes_decoder: bool = False


NETWORKS = {
  'DropTrack': Network({'cls_token', *layouts.FRAME_IDENTITIES}, removes_decoder=True),
  'OSTrack': Network({'cls_token'}),
  'DropSeg': Network({'cls_token', *layouts.FRAME_IDENTITIES}, 36, removes_decoder=True),
  'MAE, fine-tuning': Network({'cls_token', 'head.weight', 'head.bias'}),
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """The files that the document names."""
  folder = tmp_path_factory.mktemp('docs')
  params = jax.jit(mae.init_params, static_argnums=1)(jax.random.key(0), BASE)
  state = layouts.to_torch(params, BASE)
  for name, layout in (
    ('dropmae.pth', 'full'),
    ('dropmae_timm.pth', 'timm'),
    ('dropmae_encoder.safetensors', 'encoder'),
  ):
    weight_files.write(
      folder / name,
      layouts.in_layout(state, layout),
      file_format=file_checks.format_of(folder / name),
      key='' if layout == 'timm' else 'model',
    )
  return folder, state


@pytest.mark.parametrize('block', BLOCKS, ids=lambda block: block.split()[1])
def test_code_can_be_copied(timm, files, monkeypatch, block):
  folder, state = files
  monkeypatch.chdir(folder)
  names = {}
  exec(block, names)
  if 'model' in names:
    found = names['model'].state_dict()['blocks.0.attn.qkv.weight']
  else:
    found = names['encoder']['blocks.0.attn.qkv.weight']
  np.testing.assert_array_equal(found, state['blocks.0.attn.qkv.weight'])


def test_the_key_lists_are_right():
  rows = {row.split('|')[1].strip(): row for row in TEXT.splitlines() if row.startswith('| ')}
  encoder = set(layouts.tensor_shapes(BASE, 'encoder')) - {*layouts.FRAME_IDENTITIES}
  for program, network in NETWORKS.items():
    layout = 'mae' if program == 'MAE, fine-tuning' else 'full'
    offered = set(layouts.tensor_shapes(BASE, layout))
    if network.removes_decoder:
      offered = {name for name in offered if 'decoder' not in name}
    missing = network.beside_encoder - offered
    unexpected = offered - network.beside_encoder - encoder
    missing_cell, unexpected_cell = rows[program].split('|')[3:5]
    for name in missing:
      assert f'`{name}`' in missing_cell, program
    if network.num_heads:
      assert f'{network.num_heads + len(missing)}: `cls_token` and {network.num_heads} tensors' in (
        missing_cell
      )
    if layout == 'mae':
      assert unexpected == {*layouts.FRAME_IDENTITIES}
      assert 'the two `temporal_pos_embed_*`' in unexpected_cell
    elif len(unexpected) == 1:
      assert f'`{min(unexpected)}` (of `full`)' in unexpected_cell
    else:
      assert f'{len(unexpected)} (of `full`)' in unexpected_cell


@pytest.mark.parametrize('layout', ['full', 'encoder', 'mae', 'timm'])
def test_tensor_counts_are_right(layout):
  (count,) = re.findall(rf'\| `{layout}` \| .*?(\d+) tensors', TEXT)
  assert int(count) == len(layouts.tensor_shapes(BASE, layout))
