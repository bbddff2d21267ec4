"""Checkpoints to PyTorch files and back.

python convert_to_torch.py --checkpoint=WORKDIR --output=FILE.pth
python convert_to_torch.py --from_torch=FILE.pth --output=DIR
"""

import argparse
import dataclasses
import pathlib

from dropmae_jax import checkpoint, command_line, mae, torch_export
from dropmae_jax.command_line import BadInput


def export(folder: pathlib.Path, output: str) -> str:
  """Writes the newest checkpoint of a run in the layout of the published files."""
  weights = checkpoint.load_weights(folder)
  params, architecture = weights.params, weights.architecture
  lines = []
  if architecture.patch_size in (14, 16) and architecture.image_size != 224:
    lines.append(f'position tables: those of 224 pixels (trained at {architecture.image_size})')
    params, architecture = torch_export.at_published_resolution(params, architecture)
  state = torch_export.to_torch(params, architecture)
  epoch = weights.step // weights.description.get('steps_per_epoch', 1)
  shape = dataclasses.asdict(architecture)
  args = {**weights.description, 'architecture': shape, 'step': weights.step}
  torch_export.write_pth(output, state, epoch=epoch, args=args)
  lines.append(torch_export.readers(architecture))
  head = f'{output}: {len(state)} tensors of step {weights.step}, under the key "model"'
  return '\n  '.join([head, *lines])


def import_(path: str, output: pathlib.Path) -> str:
  """Makes a checkpoint of ours from a .pth with its decoder."""
  state, args = torch_export.read_pth(path)
  if 'architecture' in args:
    architecture = mae.Architecture(**args['architecture'])
  else:
    architecture = torch_export.infer_architecture(state)
  params = torch_export.from_torch(state, architecture)
  objective = mae.Objective(**args.get('objective', {}))
  step = int(args.get('step', 0))
  known = {name: args[name] for name in ('frame_gap', 'steps_per_epoch', 'config') if name in args}
  description = checkpoint.describe(architecture, objective, **known)
  checkpoint.save_weights(output, params, step, description)
  return f'{output}: {len(state)} tensors, {architecture}'


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument('--checkpoint', type=pathlib.Path, help='a training workdir to export')
  source.add_argument('--from_torch', help='a .pth to import')
  parser.add_argument('--output', required=True, help='the .pth, or the folder, to write')
  arguments = parser.parse_args()
  if arguments.checkpoint is not None:
    print(export(arguments.checkpoint, arguments.output))
  else:
    try:
      print(import_(arguments.from_torch, pathlib.Path(arguments.output)))
    except (TypeError, ValueError) as error:
      raise BadInput(f'--from_torch={arguments.from_torch}: {error}') from error


if __name__ == '__main__':
  command_line.run(main)
