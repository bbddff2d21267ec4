"""What docs/convert.md tells to copy, run as it stands on files of a ViT-B."""

import re

import jax
import numpy as np
import pytest
from conftest import ROOT

from dropmae_jax.model import mae
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.pytorch import file_checks, layouts, torch_clients, weight_files

TEXT = (ROOT / 'docs' / 'convert.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, flags=re.DOTALL)
BASE = architecture_of_size('B')


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


def test_the_key_lists_are_those_that_an_export_prints():
  rows = {row.split('|')[1].strip(): row for row in TEXT.splitlines() if row.startswith('| ')}
  for client in torch_clients.CLIENTS:
    layout = 'mae' if client.name == 'MAE fine-tuning' else 'full'
    answer = torch_clients.answer_of(client, BASE, layout)
    row = rows['MAE, fine-tuning' if layout == 'mae' else client.name]
    for name in answer.missing:
      assert f'`{name}`' in row, client.name
    if client.new_heads:
      assert f'{client.new_heads + 1}: `cls_token` and {client.new_heads} tensors' in row
    if layout == 'mae':
      assert answer.unexpected == [*layouts.FRAME_IDENTITIES]
      assert torch_clients.GLOBAL_POOL == (
        'with --global_pool, fc_norm.* is missing too and norm.* unexpected'
      )
      missing, unexpected = row.split('|')[3:5]
      assert '(with `--global_pool` also `fc_norm.*`)' in missing
      assert 'the two `temporal_pos_embed_*` (with `--global_pool` also `norm.*`)' in unexpected
    if len(answer.unexpected) == 1:
      assert f'`{answer.unexpected[0]}` (of `full`)' in row
    if client.name == 'OSTrack':
      assert f'{len(answer.unexpected)} (of `full`)' in row


def test_tensor_counts_are_right():
  prose = ' '.join(TEXT.split())
  for layout, pattern in (
    ('full', r"`full` is `\{'model': (\d+) tensors"),
    ('encoder', r"`encoder` is `\{'model': (\d+) tensors"),
    ('timm', r'`timm` is flat, with (\d+) tensors'),
  ):
    (count,) = re.findall(pattern, prose)
    assert int(count) == len(layouts.tensor_shapes(BASE, layout))
