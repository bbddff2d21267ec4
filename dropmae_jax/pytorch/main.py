"""Converts checkpoints to PyTorch files and back; see docs/convert.md.

dropmae-convert --checkpoint=WORKDIR --output=FILE.pth [--layout=encoder] [--step=N]
dropmae-convert --from_torch=FILE.pth --output=DIR [--model=B]
dropmae-convert --list=FILE_OR_DIR
dropmae-convert --compare FILE_OR_DIR FILE_OR_DIR
"""

import argparse
import re

from etils import epath

from dropmae_jax.model import vit
from dropmae_jax.pytorch import convert, inspect, layouts, weight_files
from dropmae_jax.runtime import cli
from dropmae_jax.runtime.errors import UserError

# The options of each job; any other option is an error.
_OPTIONS = {
  'checkpoint': {
    'output',
    'step',
    'layout',
    'format',
    'with_optimizer',
    'verify',
    'image_size',
    'fold_identities',
  },
  'from_torch': {'output', 'model', 'with_optimizer', 'verify', 'image_size'},
  'list': {'step'},
  'compare': set(),
}


def _sizes(text: str) -> tuple[int, ...]:
  if not re.fullmatch(r'\d+,\d+', text):
    raise argparse.ArgumentTypeError(f'{text!r} is not two sizes in pixels, such as 128,256')
  return tuple(map(int, text.split(',')))


def parse() -> argparse.Namespace:
  """Parses the command line; an option that was not given is None."""
  parser = cli.Parser(
    prog='dropmae-convert',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_mutually_exclusive_group(required=True).add_argument
  add('--checkpoint', type=epath.Path, metavar='DIR', help='a training workdir to export')
  add('--from_torch', type=epath.Path, metavar='FILE', help='a .pth or .safetensors to read')
  add('--list', type=epath.Path, metavar='PATH', help='list the tensors of a file or checkpoint')
  add(
    '--compare', type=epath.Path, nargs=2, metavar='PATH', help='compare two files or checkpoints'
  )
  add = parser.add_argument
  add('--output', type=epath.Path, metavar='PATH', help='the file or folder to write')
  add('--step', type=int, metavar='N', help='which checkpoint; default: the newest')
  add('--layout', choices=layouts.LAYOUTS, help='which program will load the file; default: full')
  add('--format', choices=weight_files.FORMATS, help='default: by the ending of --output')
  add(
    '--model',
    metavar='SIZE',
    help=f'size of the model, if the file does not tell: {", ".join(vit.SIZES)}',
  )
  add('--with_optimizer', action='store_true', default=None, help="convert AdamW's moments too")
  add(
    '--verify',
    action=argparse.BooleanOptionalAction,
    help='run both networks and compare them; done by default if PyTorch is installed',
  )
  add('--image_size', type=int, metavar='PIXELS', help='resample the position tables (bicubic)')
  add(
    '--fold_identities',
    nargs='?',
    type=_sizes,
    const=(128, 256),
    metavar='TEMPLATE,SEARCH',
    help='for trackers that drop the frame identities: put them into position tables for images of'
    ' these sizes (128,256); with --layout=encoder',
  )
  return parser.parse_args()


def main() -> int:
  """Runs the command line; returns 1 if `--compare` finds a difference, else 0."""
  given = {name: value for name, value in vars(parse()).items() if value is not None}
  job = next(name for name in _OPTIONS if name in given)
  source = given.pop(job)
  unfit = set(given) - _OPTIONS[job]
  if unfit:
    raise UserError(f'--{min(unfit)} does not go with --{job}; leave it out.')
  if 'output' in _OPTIONS[job] and 'output' not in given:
    raise UserError(f'--{job} needs --output, the path to write to.')
  same = True
  if job == 'checkpoint':
    output, step = given.pop('output'), given.pop('step', None)
    if 'fold_identities' in given:
      given.setdefault('layout', 'encoder')
    if 'format' in given:
      given['file_format'] = given.pop('format')
    lines = convert.export(source, output, convert.ExportOptions(**given), step=step)
  elif job == 'from_torch':
    lines = convert.import_(
      source, size=given.pop('model', None), folder=given.pop('output'), **given
    )
  elif job == 'list':
    lines = inspect.table(source, **given)
  else:
    lines, same = inspect.comparison(*source)
  for line in lines:
    cli.print_line(line)
  return 0 if same else 1


def command() -> None:
  """The entry point dropmae-convert."""
  cli.run(main)


if __name__ == '__main__':
  command()
