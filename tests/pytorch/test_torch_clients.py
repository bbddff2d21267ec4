"""What the programs of the field answer: their loading rules on networks of their names."""

import pathlib

import jax
import numpy as np
import pytest
from conftest import torch

from dropmae_jax.model import mae
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.pytorch import layouts, torch_clients, weight_files

BASE = architecture_of_size('B')
CLIENTS = {client.name: client for client in torch_clients.CLIENTS}


def network(timm, client, **options):
  """A network with the tensors that a program's has: timm's ViT-B, on no device, and additions."""
  with torch.device('meta'):
    net = timm.create_model('vit_base_patch16_224', **({'num_classes': 0} | options))
    if client in ('DropTrack', 'DropSeg'):
      for name in layouts.FRAME_IDENTITIES:
        net.register_parameter(name, torch.nn.Parameter(torch.zeros(1, 1, 768)))
    if client == 'DropSeg':
      net.new_heads = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(1)) for _ in range(36))
  return net


def load(net, layout, *, drops_decoder):
  """Not strict, as the trackers do it; on shapes alone."""
  offered = {
    name: torch.empty(shape, device='meta')
    for name, shape in layouts.tensor_shapes(BASE, layout).items()
    if not (drops_decoder and 'decoder' in name)
  }
  return net.load_state_dict(offered, strict=False)


@pytest.mark.parametrize('layout', ['full', 'encoder', 'mae'])
@pytest.mark.parametrize('name', ['DropTrack', 'OSTrack', 'DropSeg'])
def test_trackers_print_what_we_say(timm, name, layout):
  client = CLIENTS[name]
  answer = torch_clients.answer_of(client, BASE, layout)
  loaded = load(network(timm, name), layout, drops_decoder=client.drops_decoder)
  new_heads = [key for key in loaded.missing_keys if 'new_heads' in key]
  assert len(new_heads) == client.new_heads
  assert set(answer.missing) == set(loaded.missing_keys) - set(new_heads)
  assert set(answer.unexpected) == set(loaded.unexpected_keys)


def test_the_full_layout_gives_the_published_answers():
  """Counts and names that the trackers' own loaders printed for a file of the published code."""
  answers = {name: torch_clients.answer_of(CLIENTS[name], BASE, 'full') for name in CLIENTS}
  assert answers['DropTrack'] == (['cls_token'], ['mask_token'])
  assert answers['DropSeg'] == (['cls_token'], ['mask_token'])
  assert CLIENTS['DropSeg'].new_heads + 1 == 37
  assert answers['OSTrack'].missing == ['cls_token']
  assert len(answers['OSTrack'].unexpected) == 108


def test_mae_misses_its_head_alone(timm):
  """Its fine-tuning asserts that the missing keys are those of the head."""
  loaded = load(network(timm, 'MAE', num_classes=10), 'mae', drops_decoder=False)
  assert set(loaded.missing_keys) == {'head.weight', 'head.bias'}
  answer = torch_clients.answer_of(CLIENTS['MAE fine-tuning'], BASE, 'mae')
  assert answer == (['head.weight', 'head.bias'], [*layouts.FRAME_IDENTITIES])
  loaded = load(network(timm, 'MAE', num_classes=10), 'full', drops_decoder=False)
  assert 'cls_token' in loaded.missing_keys


@pytest.mark.parametrize('size', ['S', 'L', 'H'])
def test_timm_has_models_of_our_sizes(timm, size):
  architecture = architecture_of_size(size)
  shape = (architecture.width, architecture.depth, architecture.patch_size)
  with torch.device('meta'):
    net = timm.create_model(
      torch_clients.TIMM_MODELS[shape], num_classes=0, class_token=False, global_pool='avg',
      fc_norm=False,
    )  # fmt: skip
  theirs = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
  assert theirs == layouts.tensor_shapes(architecture, 'timm')
  assert net.blocks[0].attn.num_heads == architecture.num_heads


def test_mae_misses_more_where_it_averages_the_tokens(timm):
  net = network(timm, 'MAE', num_classes=10, global_pool='avg')
  loaded = load(net, 'mae', drops_decoder=False)
  answer = torch_clients.answer_of(CLIENTS['MAE fine-tuning'], BASE, 'mae')
  missing = set(loaded.missing_keys) - set(answer.missing)
  unexpected = set(loaded.unexpected_keys) - set(answer.unexpected)
  assert missing == {'fc_norm.weight', 'fc_norm.bias'}
  assert unexpected == {'norm.weight', 'norm.bias'}
  assert torch_clients.GLOBAL_POOL in lines_of('B', 'mae')


def test_timm_loads_tables_of_other_pixels_as_it_is_told(timm, tmp_path):
  architecture = architecture_of_size('B', image_size=256)
  zero = np.zeros((), np.float32)
  shapes = layouts.tensor_shapes(architecture, 'timm')
  tensors = {name: np.array(np.broadcast_to(zero, shape)) for name, shape in shapes.items()}
  path = tmp_path / 'timm.safetensors'
  weight_files.write(path, tensors, file_format='safetensors', key='')
  lines = torch_clients.closing_lines(path, architecture, layout='timm', file_format='safetensors')
  eval(' '.join(line.strip() for line in lines[1:3]), {'timm': timm})


@pytest.mark.parametrize(
  'file_format', ['pth', pytest.param('safetensors', marks=pytest.mark.slow)]
)
def test_timm_loads_our_file_strictly_and_computes_our_features(timm, tmp_path, file_format):
  from dropmae_jax.pytorch import reference

  params = jax.jit(mae.init_params, static_argnums=1)(jax.random.key(0), BASE)
  params = jax.tree.map(np.asarray, params)
  tensors = layouts.in_layout(layouts.to_torch(params, BASE), 'timm')
  path = tmp_path / f'timm.{file_format}'
  weight_files.write(path, tensors, file_format=file_format, key='', entries={})
  lines = torch_clients.closing_lines(path, BASE, layout='timm', file_format=file_format)
  # The call that the export prints is the one that is run.
  call = ' '.join(line.strip() for line in lines[1:3])
  net = eval(call, {'timm': timm}).eval()
  images = reference.fixed_images(224)
  with torch.inference_mode():
    theirs = net.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
  (ours,) = reference.jax_outputs(params, images, BASE, 'timm')
  assert np.abs(theirs - ours).max() / np.abs(ours).max() < reference.TOLERANCE


def lines_of(size, layout='full', path='out.pth', file_format='pth', **other):
  architecture = architecture_of_size(size, **other)
  lines = torch_clients.closing_lines(
    pathlib.Path(path), architecture, layout=layout, file_format=file_format
  )
  return '\n'.join(lines)


def test_a_file_says_who_can_read_it():
  base = lines_of('B')
  assert 'DropTrack: missing cls_token; unexpected mask_token' in base
  assert 'DropSeg: missing 37: 36 new heads of its own, cls_token' in base
  assert 'OSTrack: missing cls_token; unexpected 108' in base
  assert 'DropMAE, to resume: missing none' in base
  assert 'OSTrack has no frame identities' in base
  assert 'Warning' not in base
  large = lines_of('L', 'encoder')
  assert 'OSTrack: missing cls_token' in large
  assert 'DropTrack:' not in large
  assert 'DropTrack and DropSeg take ViT-B/16 only' in large
  assert 'DropMAE' not in large
  for size in ('XXS', 'S'):
    assert 'no tracker has a model of this size' in lines_of(size)
  assert 'OSTrack: missing none' in lines_of('B', 'mae')
  assert 'DropSeg: missing 36: 36 new heads of its own; unexpected none' in lines_of('B', 'mae')
  assert 'the class token is zero' in lines_of('B', 'mae')
  assert 'MAE fine-tuning: missing head.weight, head.bias' in lines_of('H', 'mae')
  assert "create_model('vit_huge_patch14_224'" in lines_of('H', 'timm')
  assert 'timm has no model of this size' in lines_of('XS', 'timm')
  assert 'read .pth only' in lines_of('B', path='out.safetensors', file_format='safetensors')


def test_tables_of_another_resolution_are_for_few():
  for layout in ('full', 'encoder', 'mae'):
    lines = lines_of('B', layout, image_size=256)
    assert 'Its position tables are of 256 pixels, and those that load it want the ones' in lines
    assert 'no tracker' not in lines
    assert 'These lists of keys' not in lines
  assert 'img_size=256' in lines_of('B', 'timm', image_size=256)
  assert 'img_size' not in lines_of('B', 'timm')


def test_no_tracker_takes_a_huge_model():
  for layout in ('full', 'encoder', 'mae'):
    assert 'no tracker has a model of this size' in lines_of('H', layout)
  assert 'DropMAE, to resume' in lines_of('H')
  assert 'These lists of keys' not in lines_of('H', 'encoder')
  assert 'DropMAE' not in lines_of('S')


def test_file_names_that_trackers_misread_are_warned_of():
  assert 'Warning: trackers take a file with "OSTrack"' in lines_of('B', path='OSTrack_b.pth')
  assert 'Warning: trackers take a path with "npz"' in lines_of('B', path='/my_npz/out.pth')
  assert 'Warning' not in lines_of('B', path='/OSTrack/out.pth')
