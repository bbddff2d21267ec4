"""Wrong inputs of all commands: one sentence that names value and remedy, and status 2."""

import importlib
import os

import pytest
from conftest import ROOT, TINY, assert_one_sentence
from test_structure import ENTRY_POINTS

from dropmae_jax import main
from tfds_kinetics.messages import log

# What is given besides, unless a row has it.
COMPLETE = {
  'dropmae-train': ['--config=quickstart', '--workdir={tmp}/new', *TINY],
  'dropmae-build': ['--config=folder', '--videos={tmp}/junk', '--data_dir={tmp}/new'],
  'dropmae-convert': ['--checkpoint={run}', '--output={tmp}/new.safetensors', '--no-verify'],
  'dropmae-evaluate': ['davis', '--checkpoint={run}', '--root={davis}', '--output={tmp}/new'],
  'dropmae-figures': ['--checkpoint={run}', '--video={video}', '--output={tmp}/new.png'],
  'dropmae-inspect': ['--data_dir={data}', '--output={tmp}/new.png'],
  'dropmae-clips': ['--output={tmp}/new'],
  'dropmae-tracker': [
    'video',
    '--checkpoint={run}',
    '--video={video}',
    '--box=40,40,20,20',
    '--output={tmp}/new.mp4',
    '--search_size=64',
    '--search_factor=3',
  ],
}
# Command, arguments, and a part of the answer; `-NAME` takes an argument of COMPLETE away.
WRONG = """
train | --config.sede=1                     | there is no option --config.sede; did you mean --config.seed=1?
train | --batch_size=8                      | there is no option --batch_size; did you mean --config.batch_size=8?
train | --conifg=x                          | there is no option --conifg; did you mean --config=x?
train | stray                               | argument 'stray' is not understood; --help lists
train | -config                             | are required: --config; --help lists
train | -workdir                            | are required: --workdir; --help lists
train | --workdir=                          | argument --workdir: it is empty; --help lists
train | --workdir=gs:/b/run                 | gs:/b/run names no bucket; give gs://BUCKET/FOLDER
train | --config.init_from=gs:/b/w.pth      | config.init_from: gs:/b/w.pth names no bucket; give gs://BUCKET/FOLDER
train | --config.data_dir=gs://b/data       | config.data_dir: gs://b/data is an address, not a path of this machine
train | --workdir=~nobody-here/x            | ~nobody-here/x has no home folder; give the whole path
train | --workdir={tmp}/file                | {tmp}/file
train | --workdir={run} --config.model.image_size=64 | holds another model (image_size is 32 there and 64 here); give
train | --config=none                       | --config=none is neither a file nor the name of a config; valid are
train | --config=quickstrat                 | did you mean 'quickstart'?
train | --config={tmp}/none.py              | --config={tmp}/none.py is neither a file nor
train | --config=~nobody-here/x.py           | --config=~nobody-here/x.py: ~nobody-here/x.py has no home
train | --config={tmp}/broken.py            | --config={tmp}/broken.py cannot be read (invalid syntax
train | --config={tmp}/empty.py             | --config={tmp}/empty.py defines no get_config(); configs/ has
train | --config={tmp}/broken.json          | --config={tmp}/broken.json is not the config of a run (Extra data
train | --config={tmp}/list.json            | --config={tmp}/list.json is not the config of a run (
train | --config={tmp}/none.json            | --config={tmp}/none.json is neither a file nor
train | --config={tmp}/list.json:24gb       | --config={tmp}/list.json:24gb: a .json has no arguments; leave out :24gb
train | --config={tmp}/dotted.json          | --config={tmp}/dotted.json is not the config of a run (
train | --config={tmp}/flat.json --config.model.size=B | config.model=5 should be a group of fields
train | --config={tmp}/argument.py          | needs an argument; give one, as in --config={tmp}/argument.py:ARGUMENT
train | --config={tmp}/junk.yaml            | --config={tmp}/junk.yaml is not a Python file; give one, or a config.json
train | --profile_steps=                    | --profile_steps= is not FIRST:LAST
train | -workdir --dry_run=compile --target=h10 | --target=h10 names no device; did you mean 'h100'?
train | --target=h100                       | --target=h100 is for --dry_run; add that, or leave this out
train | --dry_run --num_videos=0            | --num_videos=0 is out of range; give a number above 0
train | --dry_run --target=3xh100           | is not divisible by 3 devices
train | --config.accumulation_steps=atuo    | argument --config.accumulation_steps: invalid
train | --profile_steps=13                  | --profile_steps=13 is not FIRST:LAST, two steps from 1; give
train | --profile_steps=13:10               | --profile_steps=13:10 is not FIRST:LAST
train | --config.seed=abc                   | argument --config.seed: invalid int value: 'abc'; --help lists
train | --config.data.shared_augmentation=1 | '1' is neither true nor false; --help lists
train | --config.optimizer.beta2=nan        | config.optimizer.beta2=nan is out of range; use at least 0
train | --config.objective.mask_ratio=0.99  | leaves 0 of 32 tokens visible
train | --config.objective.masking=rows     | config.objective.masking='rows' is unknown; valid are
train | --config.model.size=Q               | config.model.size='Q' is unknown; valid are
train | --config.data.resize=fats           | config.data.resize='fats' is unknown; did you mean 'fast'?
train | --config.remat=al                   | config.remat='al' is unknown; valid are
train | --config.num_steps=0                | config.num_steps=0 and num_epochs=0 leave the run without a length; set one
train | --config.batch_size=12              | batch_size=12 is not divisible by 8 devices
train | --config.mesh.fsdp=3                | fsdp=3
train | --config.data_dir={tmp}/none        | there is no dataset kinetics_frames/folder in data_dir='{tmp}/none'; build it with
train | --config.dataset=a=1,b              | dataset='a=1,b' is not understood at 'b'; give one name
train | --config.dataset=no_such:Videos     | dataset='no_such:Videos' cannot be imported (No module named 'no_such'); give
train | --config.split=tset                 | has no split 'tset' that tfds_kinetics wrote; there are: train, val
train | --config.scores=held_uot            | config.scores='held_uot' is unknown; did you mean 'held_out'?
train | --config.init_from={tmp}/none.pth   | config.init_from={tmp}/none.pth: {tmp}/none.pth is not a file
train | --config.init_from={tmp}/junk.pth   | config.init_from={tmp}/junk.pth: {tmp}/junk.pth
train | --config.init_from={tmp}/folder     | config.init_from={tmp}/folder: {tmp}/folder holds no checkpoint
train | --local_processes=0                 | --local_processes=0 is not a number of processes; give 1 or more
train | --local_processes=2 --process_id=1  | --local_processes=2 starts all processes of a run itself; give it alone
train | --local_processes=2 --process_id=0  | --local_processes=2 starts all processes of a run itself; give it alone
train | --num_processes=2                   | --num_processes
build | -videos                             | are required: --videos; --help lists
build | --videos=                           | argument --videos: it is empty; --help lists
build | --videos={tmp}/none                 | --videos={tmp}/none is not a folder; give the root of the video tree
build | --videos={tmp}/folder               | --videos={tmp}/folder holds no video; files that end in .mp4
build | --videos={tmp}/line%nend            | line\\nend is not a folder; give
build | --data_dir=s3://b/x                 | s3://b/x is an address, not a path of this machine; mount that storage
build | --data_dir={tmp}/file               | Not a directory: '{tmp}/file
build | --data_dir={tmp}/o\udce9            | o\\xe9 is not valid UTF-8; rename that folder
build | --config=kinetics500                | argument --config: invalid choice: 'kinetics500'
build | --config=kinetics400                | has no train folder, which --config=kinetics400 needs
build | --workers=x                         | argument --workers: invalid int value: 'x'; --help lists
build | --workers=0                         | --workers=0 is not in 1..4096; give a number from there
build | --short_side=0                      | --short_side=0 is not in 16..4096; give a number from there
build | --max_damage=2                      | --max_damage=2.0 is not in 0..1; give a number from there
build | --time_limit=nan                    | --time_limit=nan is not in 0.001..1000000; give a number from there
build | --short_sied=3                      | unrecognized arguments: --short_sied=3; --help lists
build | --shard_range=3/3                   | --shard_range=3/3 is not I/N with I in 0..N-1; give for example 0/16
build | --shard_range=                      | --shard_range= is not I/N
build | --shard_range=0/2 --finalise        | argument --finalise: not allowed with argument --shard_range; --help
build | --beam_options=--x                  | --beam_options has no meaning without --beam_runner; give that too
build | --beam_runner=x --workers=2         | --workers is not for --beam_runner; set it in --beam_options
build | --finalise                          | 1 of 1 shards are not in {tmp}/new
build | --verify                            | there is no dataset in {tmp}/new/kinetics_frames/folder/2.0.0; give
build | --annotations=gs://b/x              | gs://b/x is an address, not a path of this machine; mount that storage
build | --videos=file://{tmp}/no%20ne       | --videos={tmp}/no ne is not a folder; give the root of the video tree
convert | -checkpoint                       | one of the arguments --checkpoint --from_torch --list --compare is required
convert | -output                           | --checkpoint needs --output, the path to write to
convert | --output={tmp}/none/o.safetensors | the folder of --output={tmp}/none/o.safetensors does not exist; make it first
convert | --output={tmp}/a%nb.safetensors   | --output: the name 'a\\nb.safetensors' has control characters or is not UTF-8; give
convert | --output={tmp}/o\udce9.safetensors | --output: the name 'o\\udce9.safetensors' has control
convert | -checkpoint -no-verify --from_torch={tmp}/junk.safetensors --output={tmp}/a%nb | --output: the name 'a\\nb' has control
convert | --format=safetensors --output={tmp}/folder | --output={tmp}/folder
convert | --checkpoint={tmp}/folder         | {tmp}/folder holds no checkpoint; give the --workdir of a training run
convert | --checkpoint={tmp}/none           | {tmp}/none holds no checkpoint; give
convert | --checkpoint=file://{tmp}/none    | {tmp}/none holds no checkpoint; give
convert | --checkpoint=gs:/b/run            | gs:/b/run names no bucket; give gs://BUCKET/FOLDER; --help lists
convert | --output=ftp://host/o.pth         | ftp://host/o.pth is an address of a kind that is not read; give a path
convert | --step=3                          | {run} has no step 3; it has 4, 8
convert | --step=x                          | argument --step: invalid int value: 'x'; --help lists
convert | --layout=timn                     | argument --layout: invalid choice: 'timn'
convert | --format=zip                      | argument --format: invalid choice: 'zip'
convert | --image_size=33                   | image_size=33
convert | --model=B                         | --model does not go with --checkpoint; leave it out
convert | --list={tmp}/junk.pth             | not allowed with argument
convert | -checkpoint -output -no-verify --list={tmp}/none.pth | {tmp}/none.pth is not a file; give a .pth or .safetensors
convert | -checkpoint -output -no-verify --list={tmp}/junk.pth | {tmp}/junk.pth
convert | -checkpoint -output -no-verify --list={tmp}/junk.pth --step=3 | --step=3 is for checkpoints, and {tmp}/junk.pth is a file; leave
convert | -checkpoint -no-verify --from_torch={tmp}/junk.safetensors --output={tmp}/new | {tmp}/junk.safetensors
convert | -checkpoint -output -no-verify --compare {run} | argument --compare: expected 2 arguments; --help lists
evaluate | -davis                           | are required: benchmark; --help lists
evaluate | -root                            | are required: --root; --help lists
evaluate | --root={tmp}/folder              | --root={tmp}/folder has no ImageSets/2017/val.txt; give the folder
evaluate | -davis --root={tmp}/folder jhmdb | --root={tmp}/folder has no splits/*_test_split1.txt; give the folder
evaluate | -davis --root={tmp}/folder tapvid | --root={tmp}/folder holds no .pkl; give a file
evaluate | -davis --root={tmp}/folder vip   | --root={tmp}/folder has no lists/val_videos.txt; give the folder
evaluate | --split=tset                     | ImageSets/2017/tset.txt; give the folder
evaluate | -davis tapvid --scale=native     | --scale does not go with tapvid; leave it out
evaluate | --checkpoint={tmp}/folder        | {tmp}/folder holds no checkpoint; give the --workdir
evaluate | --checkpoint={tmp}/junk.pth      | {tmp}/junk.pth
evaluate | --checkpoint={tmp}/junk.pth --step=3 | --step=3 goes with a workdir, and {tmp}/junk.pth is none; leave it out
evaluate | --checkpoint=s3:/b                | argument --checkpoint: s3:/b names no bucket; give s3://BUCKET/FOLDER
evaluate | --root=gs://b/davis              | gs://b/davis is an address, not a path of this machine; mount that storage
evaluate | --output=gs://b/scores           | gs://b/scores is an address, not a path of this machine; mount that storage
evaluate | --step=3                         | {run} has no step 3; it has 4, 8
evaluate | --output={tmp}/junk              | --output={tmp}/junk is not empty; give a new folder
evaluate | --output={tmp}/file              | --output={tmp}/file cannot be written (File exists); give another folder
evaluate | --top_k=0                        | --top_k=0 is not in 1..1000
evaluate | --temperature=nan                | --temperature=nan is not in
evaluate | --input_size=480                 | argument --input_size: '480' is not HEIGHTxWIDTH in pixels
evaluate | --block=3                        | --block=3 is not in 1..2
evaluate | --readout=joint --identity=x     | --identity=x goes with --readout=single; leave it out
evaluate | --readout=joint --class_token=zero | --readout=joint has no place for a class token; add --class_token=none
evaluate | --readout=attention --temperature=1 | --temperature does not go with --readout=attention
evaluate | --model=B                        | --model=B goes with a file, and {run} is a workdir; leave it out
evaluate | --root={tmp}/file                | --root={tmp}/file has no ImageSets/2017/val.txt; give the folder
evaluate | --protcol=dino                   | there is no option --protcol; did you mean --protocol=dino?
figures | -video                            | are required: --video; --help lists
figures | --checkpoint={tmp}/folder         | {tmp}/folder holds no checkpoint; give the --workdir
figures | --video={tmp}/none.mp4            | --video={tmp}/none.mp4 is not a file; give a video
figures | --video={tmp}/junk/a.mp4          | --video={tmp}/junk/a.mp4 cannot be decoded (
figures | --video=s3://b/a.mp4              | s3://b/a.mp4 is an address, not a path of this machine; mount that storage
figures | --output={tmp}/folder             | {tmp}/folder is a folder
figures | --output={tmp}/none/o.png         | the folder of --output={tmp}/none/o.png does not exist; make it first
figures | --frames 5 2                      | --frames=[5, 2] must be an earlier and a later frame, from 0 on
figures | --frames=3                        | argument --frames: expected 2 arguments; --help lists
figures | --sede=2                          | there is no option --sede; did you mean --seed=2?
inspect | -data_dir                         | are required: --data_dir; --help lists
inspect | --data_dir={tmp}/folder           | there is no dataset kinetics_frames/folder in data_dir='{tmp}/folder'; build it with
inspect | --data_dir=gs://b/data            | gs://b/data is an address, not a path of this machine; mount that storage
inspect | --output={tmp}/folder             | {tmp}/folder is a folder
inspect | --pairs=0                         | --pairs=0 is not in 1..
inspect | --frame_gap=1                     | --frame_gap=1 is not in 2..
inspect | --image_size=x                    | argument --image_size: invalid int value: 'x'; --help lists
inspect | --resize=fats                     | --resize='fats' is unknown; did you mean 'fast'?
inspect | --split=test                      | has no split 'test' that tfds_kinetics wrote; there are: train, val
inspect | --dataset=a=0,b=1                 | dataset='a=0,b=1' is not understood at 'a=0'; give one name
clips | -output                             | are required: --output; --help lists
clips | --output={tmp}/junk                 | --output={tmp}/junk holds something other than these clips; remove it or name another
clips | --output={tmp}/file/clips           | --output={tmp}/file/clips cannot be written (Not a directory); give another folder
clips | --output=gs://b/clips               | gs://b/clips is an address, not a path of this machine; mount that storage
clips | --frames=0                          | --frames=0 is too small; give at least
clips | --height=17                         | --height=17 must be even, as h264 needs, and >= 16
clips | --frames=many                       | argument --frames: invalid int value: 'many'; --help lists
tracker | flollow                           | argument job: invalid choice: 'flollow' (choose from
tracker | -box                              | are required: --box; --help lists
tracker | --box=1,2,3                       | argument --box: '1,2,3' is not X,Y,W,H in pixels, such as
tracker | --box=9000,10,5,5                 | --box=9000,10,5,5 is not in the
tracker | --box=10,10,0,5                   | --box=10,10,0,5 is not in the
tracker | --video={tmp}/none.mp4            | --video={tmp}/none.mp4 cannot be used: it cannot be opened: No such file
tracker | --video={tmp}/junk/a.mp4          | --video={tmp}/junk/a.mp4 cannot be used: it cannot be opened: Invalid
tracker | --video={tmp}/folder              | --video={tmp}/folder cannot be used: it is not a file; give another
tracker | --output={tmp}/none/o.mp4         | the folder of --output={tmp}/none/o.mp4 does not exist; make it first
tracker | --output={tmp}/folder             | --output={tmp}/folder does not end in .mp4; give a name that does
tracker | --checkpoint={tmp}/folder         | {tmp}/folder holds no checkpoint; give the --workdir
tracker | --checkpoint={tmp}/none.pth       | {tmp}/none.pth is not a file; give a .pth or .safetensors
tracker | --checkpoint={tmp}/junk.pth       | {tmp}/junk.pth
tracker | --search_size=72                  | --search_size=72 is not a multiple of 16, two patches; give for example 64
tracker | --seed=-1                         | argument --seed: '-1' is not a number from 0
tracker | --search_size=0                   | argument --search_size: '0' is not a number from 1 to 9999
tracker | -search_factor                    | no published search factor for search_size=64; give --search_factor, such as 4
tracker | --output={video}                  | --output={video} is the video itself; give another name
tracker | --search_factor=nan               | --search_factor=nan is out of range; use at least 1
tracker | --keep_rate=0                     | --keep_rate=0 is out of range; use above 0, at most 1
tracker | --model=B                         | --model=B goes with a file, and {run} is a workdir; leave it out
tracker | --bxo=1,2,3,4                     | there is no option --bxo; did you mean --box=1,2,3,4?
tracker | --video=gs://b/a.mp4              | gs://b/a.mp4 is an address, not a path of this machine; mount that storage
tracker | run -box                          | there is no option --video
tracker | run -video -box --dataset=folder --root={tmp}/none | --root={tmp}/none is no folder; give the folder of the data set
tracker | run -video -box --dataset=otc --root={tmp} | argument --dataset: invalid choice: 'otc'
tracker | run -video -box --dataset=lasot --root={tmp}/folder | {tmp}/folder
tracker | run -video -box --dataset=lasot --root={tmp}/folder --batch=0 | argument --batch: '0' is not a number from 1
tracker | score -video -box -output -checkpoint -search_size -search_factor --dataset=otb --root={tmp}/folder | are required: --results
tracker | convert -video -box -search_factor --output={tmp}/folder | {tmp}/folder is a folder
""".strip().splitlines()  # noqa: E501
ROWS = [[part.strip() for part in row.split('|', 2)] for row in WRONG]


def test_they_are_many_and_of_every_command():
  assert len(ROWS) >= 60
  assert {f'dropmae-{command}' for command, *_ in ROWS} == ENTRY_POINTS.keys()


@pytest.fixture
def places(trained, data_dir, clips, tmp_path):
  """What the rows name; `tmp` holds folders and files that are none of what is asked for."""
  tmp = tmp_path / 'tmp'
  for folder in ('folder', 'junk'):
    (tmp / folder).mkdir(parents=True)
  for name in ('junk/a.mp4', 'junk.pth', 'junk.safetensors', 'file'):
    (tmp / name).write_bytes(b'junk of some length')
  (tmp / 'broken.py').write_text('def get_config(:')
  (tmp / 'empty.py').write_text('')
  (tmp / 'broken.json').write_text('1 2')
  (tmp / 'dotted.json').write_text('{"a.b": 1}')
  (tmp / 'flat.json').write_text('{"model": 5}')
  (tmp / 'argument.py').write_text('def get_config(argument): pass')
  (tmp / 'junk.yaml').write_text('')
  (tmp / 'list.json').write_text('[1]')
  video = next(clips.glob('val/*/*.mp4'))
  davis = clips / 'davis'
  return {'tmp': tmp, 'run': trained, 'data': data_dir, 'video': video, 'davis': davis}


def files_in(folders):
  """All files but locks, which say who held them."""
  files = (path for folder in folders for path in folder.rglob('*') if path.is_file())
  return {
    path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.name != 'lock'
  }


@pytest.mark.parametrize(('command', 'arguments', 'answer'), ROWS, ids=map(' '.join, ROWS))
def test_a_wrong_input_is_one_sentence_and_costs_nothing(
  places, run_here, monkeypatch, command, arguments, answer
):
  monkeypatch.chdir(ROOT)
  logger = main.logging.get_absl_logger()
  monkeypatch.setattr(logger, 'filters', list(logger.filters))
  monkeypatch.setattr(main.logging, 'set_verbosity', lambda _: None)
  monkeypatch.setattr(log, 'handlers', [])
  given = list(COMPLETE[f'dropmae-{command}'])
  if command == 'train':
    given += ['--config.data_dir={data}', '--config.batch_size=8']
  for argument in arguments.split():
    if command == 'tracker' and not argument.startswith('-'):
      given[0] = argument
    elif argument.startswith('-') and not argument.startswith('--'):
      given = [each for each in given if each.lstrip('-').partition('=')[0] != argument[1:]]
    else:
      given.append(argument.replace('%n', '\n'))
  kept = [places[name] for name in ('tmp', 'run', 'data')]
  before = files_in(kept)
  module = importlib.import_module(ENTRY_POINTS[f'dropmae-{command}'].partition(':')[0])
  done = run_here(module.main, *(each.format(**places) for each in given))
  assert_one_sentence(done, answer.format(**places))
  sentence = done.stderr.splitlines()[-1]
  assert sentence.startswith('error: ')
  # Or a command that can be copied.
  assert sentence[-1] in '.?' or 'build it with: ' in sentence
  assert 'usage' not in done.stderr
  assert files_in(kept) == before
  if command == 'train':
    assert not (places['tmp'] / 'new').exists()
  assert not os.path.exists('gs:')
