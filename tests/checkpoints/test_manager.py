"""Which checkpoints are kept, what is restored, and what is refused."""

import errno
import json
import os
import re
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import run_python, train_arguments
from test_commands import assert_same_weights, losses

from dropmae_jax import optimizer, sharding
from dropmae_jax.checkpoints import saved_weights
from dropmae_jax.checkpoints.manager import Checkpoints, NotSaved
from dropmae_jax.config import (
  CheckpointOptions,
  MeshOptions,
  Objective,
  OptimizerOptions,
  may_change,
)
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.runtime.errors import RunFailed, UserError
from dropmae_jax.train_step import TrainState, init_state

# When one array is damaged, orbax does not wait for the reads of the others.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

TINY = architecture_of_size(
  'XXS', image_size=16, decoder_width=32, decoder_depth=1, decoder_num_heads=2
)
DESCRIPTION = saved_weights.describe(TINY, Objective(mask_ratio=0.5), steps_per_epoch=3)
TX = optimizer.adamw(lambda _: 1e-3, OptimizerOptions())


def state_at(step) -> TrainState:
  state = init_state(jax.random.key(step), architecture=TINY, tx=TX)
  return state.replace(step=jnp.int32(step))


def abstract_on(mesh):
  shapes = jax.eval_shape(lambda: state_at(0))
  return sharding.abstract_on(mesh, shapes)


@pytest.fixture(scope='module')
def twelve_step_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('saved')
  checkpoints = Checkpoints(
    workdir, CheckpointOptions(every_steps=2, keep_last=2, keep_every=4), DESCRIPTION
  )
  for step in range(2, 13, 2):
    assert checkpoints.is_due(step)
    checkpoints.save(step, state_at(step))
  checkpoints.close()
  return workdir


@pytest.fixture
def saved(twelve_step_run, tmp_path):
  """A copy for one test."""
  return shutil.copytree(twelve_step_run, tmp_path, dirs_exist_ok=True)


def test_the_last_few_and_every_kth_are_kept(saved):
  steps = sorted(int(p.name) for p in (saved / saved_weights.FOLDER).iterdir())
  assert steps == [4, 8, 10, 12]


def steps_in(folder):
  return {path.name for path in folder.iterdir()}


def test_a_checkpoint_goes_when_every_file_of_a_newer_one_is_on_the_disk(tmp_path, monkeypatch):
  """After a power cut, only what was synced is there for certain."""
  folder, real, synced = tmp_path / saved_weights.FOLDER, os.fsync, []

  def fsync(descriptor):
    synced.append((os.readlink(f'/proc/self/fd/{descriptor}'), steps_in(folder)))
    real(descriptor)

  monkeypatch.setattr(os, 'fsync', fsync)
  checkpoints = Checkpoints(tmp_path, CheckpointOptions(keep_last=1), DESCRIPTION)
  checkpoints.save(2, state_at(2))
  checkpoints.finish(4, state_at(4))
  checkpoints.close()
  assert steps_in(folder) == {'4'}
  files = {str(path) for path in (folder / '4').rglob('*')} | {str(folder / '4'), str(folder)}
  meanwhile = [steps for path, steps in synced if path in files and '4' in steps]
  assert files <= {path for path, _ in synced}
  assert all('2' in steps for steps in meanwhile)


def test_a_checkpoint_that_does_not_reach_the_disk_is_not_kept(tmp_path, monkeypatch, caplog):
  """As where a quota or a network file system says so only when a file is synced."""

  def fsync(_):
    raise OSError(errno.EDQUOT, 'Disk quota exceeded')

  checkpoints = Checkpoints(tmp_path, CheckpointOptions(keep_last=1), DESCRIPTION)
  checkpoints.finish(2, state_at(2))
  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', fsync)
    with pytest.raises(NotSaved, match=r'step 4 could not be saved .* resumes from step 2'):
      checkpoints.finish(4, state_at(4))
  assert 'the checkpoint of step 4 could not be written' in caplog.text
  assert steps_in(tmp_path / saved_weights.FOLDER) == {'2'}
  checkpoints.finish(4, state_at(4))
  checkpoints.close()
  assert steps_in(tmp_path / saved_weights.FOLDER) == {'4'}


@pytest.mark.parametrize(
  ('devices', 'fsdp'),
  [
    pytest.param(1, 1, marks=pytest.mark.slow),
    (4, 2),
    pytest.param(4, 1, marks=pytest.mark.slow),
    pytest.param(8, 8, marks=pytest.mark.slow),
  ],
)
def test_restore_is_bit_for_bit_on_any_mesh(saved, devices, fsdp):
  checkpoints = Checkpoints(saved, CheckpointOptions(), DESCRIPTION)
  mesh = sharding.make_mesh(jax.devices()[:devices], MeshOptions(fsdp=fsdp))
  restored, notes = checkpoints.restore(abstract_on(mesh))
  checkpoints.close()
  assert notes == []
  expected = state_at(12)
  assert jax.tree.structure(restored) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(one, other)
    assert len(one.sharding.device_set) == devices


def test_weights_come_with_what_they_belong_to(saved):
  for folder in (saved, saved / saved_weights.FOLDER):
    weights = saved_weights.load_weights(folder)
    assert (weights.step, weights.architecture) == (12, TINY)
    assert weights.objective == Objective(mask_ratio=0.5)
    expected = state_at(12).params
    assert jax.tree.structure(weights.params) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(weights.params), jax.tree.leaves(expected), strict=True):
      np.testing.assert_array_equal(one, other)


def test_metadata_name_no_code_that_is_imported(saved, monkeypatch):
  (saved / 'planted.py').write_text('')
  monkeypatch.syspath_prepend(saved)
  changed = 0
  for path in saved.rglob('_*METADATA'):
    text, count = re.subn(r'"\w+(\.\w+)*\.[A-Z]\w*"', '"planted.Handler"', path.read_text())
    path.write_text(text)
    changed += count
  assert changed > 12
  assert saved_weights.load_weights(saved).step == 12
  assert 'planted' not in sys.modules


def test_saving_a_step_twice_changes_nothing(saved):
  checkpoints = Checkpoints(saved, CheckpointOptions(keep_last=9), DESCRIPTION)
  checkpoints.save(12, state_at(1))
  checkpoints.close()
  weights = saved_weights.load_weights(saved)
  np.testing.assert_array_equal(weights.params['mask_token'], state_at(12).params['mask_token'])


def test_another_model_is_refused(saved):
  other = saved_weights.describe(architecture_of_size('B'), Objective())
  checkpoints = Checkpoints(saved, CheckpointOptions(), other)
  with pytest.raises(UserError, match=r'holds another model \(image_size is 16 there and 224 here'):
    checkpoints.restore(abstract_on(sharding.make_mesh()))
  checkpoints.close()


@pytest.mark.parametrize(
  ('here', 'there', 'message'),
  [
    ({'num_heads': 4}, {}, 'num_heads is 2 there and 4 here'),
    ({}, {'of_later': 1}, 'of_later is 1'),
  ],
)
def test_what_shapes_do_not_show_is_another_model_too(tmp_path, here, there, message):
  def described(changes):
    return DESCRIPTION | {'architecture': DESCRIPTION['architecture'] | changes}

  first = Checkpoints(tmp_path, CheckpointOptions(), described(there))
  first.finish(2, state_at(2))
  first.close()
  second = Checkpoints(tmp_path, CheckpointOptions(), described(here))
  with pytest.raises(UserError, match=message):
    second.restore(abstract_on(sharding.make_mesh()))
  second.close()


@pytest.mark.parametrize(
  ('then', 'change'), [({}, {'seed_version': '1 -> 2'}), ({'seed_version': 2}, {})]
)
def test_code_that_draws_otherwise_from_a_seed_makes_another_run(tmp_path, then, change):
  first = Checkpoints(tmp_path, CheckpointOptions(), {**DESCRIPTION, 'config': {}, **then})
  first.save(2, state_at(2))
  first.close()
  now = {**DESCRIPTION, 'config': {}, 'seed_version': 2}
  second = Checkpoints(tmp_path, CheckpointOptions(), now)
  assert second.changes() == change
  second.close()
  assert not may_change('seed_version')


def test_weights_alone_are_read_but_not_trained_on(tmp_path):
  params = state_at(0).params
  saved_weights.save_weights(tmp_path / 'w', params, 7, DESCRIPTION)
  assert saved_weights.load_weights(tmp_path / 'w').step == 7
  with pytest.raises(UserError, match='is not empty; give a new folder'):
    saved_weights.save_weights(tmp_path / 'w', params, 8, DESCRIPTION)
  checkpoints = Checkpoints(tmp_path / 'w', CheckpointOptions(), DESCRIPTION)
  with pytest.raises(UserError, match='holds weights without optimizer state'):
    checkpoints.restore(abstract_on(sharding.make_mesh()))
  checkpoints.close()


def test_a_checkpoint_that_goes_while_it_is_read_is_not_missed(saved, monkeypatch, capfd):
  """As when training goes on: the newest one is another by then."""
  folder, real, reads = saved / saved_weights.FOLDER, ocp.CheckpointManager.restore, []

  def restore(self, step, *arguments, **options):
    reads.append(step)
    if len(reads) == 1:
      shutil.rmtree(folder / '12')
      if not (folder / '16').exists():
        (folder / '10').rename(folder / '16')
    return real(self, step, *arguments, **options)

  monkeypatch.setattr(ocp.CheckpointManager, 'restore', restore)
  weights = saved_weights.load_weights(saved, with_moments=True)
  assert (weights.step, weights.moments.count) == (16, 0)
  assert capfd.readouterr().err == ''
  reads.clear()
  shutil.copytree(folder / '8', folder / '12')
  with pytest.raises(UserError, match=r'has no step 12; it has 4, 8, 16\.'):
    saved_weights.load_weights(saved, step=12)


def test_an_empty_folder_is_refused(tmp_path):
  for folder in (tmp_path, tmp_path / 'none'):
    with pytest.raises(UserError, match='holds no checkpoint; give the --workdir'):
      saved_weights.load_weights(folder)


def restored(folder):
  checkpoints = Checkpoints(folder, CheckpointOptions(), DESCRIPTION)
  try:
    state, notes = checkpoints.restore(abstract_on(sharding.make_mesh(jax.devices()[:1])))
    return checkpoints.latest_step, state, notes
  finally:
    checkpoints.close()


def files_of(folder):
  """The files with a part of the state or of the description; sorted."""
  files = [path for path in folder.rglob('*') if path.is_file() and path.stat().st_size]
  return sorted(path for path in files if path.name != 'commit_success.txt')


def remove(path):
  path.unlink()


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 16
  path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize('deed', [truncate, remove, flip_a_bit])
def test_no_damage_of_any_file_reaches_the_training(saved, tmp_path, deed):
  """Either the saved state is restored, or the one before it, and a message says so."""
  newest = saved / saved_weights.FOLDER / '12'
  expected = {step: state_at(step).params['mask_token'] for step in (10, 12)}
  fell_back = 0
  for path in files_of(newest):
    copy = tmp_path / 'copy'
    shutil.copytree(saved / saved_weights.FOLDER, copy / saved_weights.FOLDER)
    deed(copy / path.relative_to(saved))
    step, state, notes = restored(copy)
    np.testing.assert_array_equal(state.params['mask_token'], expected[step])
    if step == 10:
      fell_back += 1
      (note,) = notes
      assert note.startswith('the checkpoint of step 12 is damaged (')
      assert note.endswith('it is set aside as 12.damaged')
      assert (copy / saved_weights.FOLDER / '12.damaged').is_dir()
      assert saved_weights.load_weights(copy).step == 10
    else:
      assert notes == []
    shutil.rmtree(copy)
  # The arrays of parameters and of both moments, and what says where they are.
  assert fell_back >= 5


def description_of(step_folder):
  """The file, and its content without the digest."""
  path = step_folder / 'description' / 'metadata'
  return path, saved_weights.verify_digest(json.loads(path.read_text()))


@pytest.mark.parametrize('part', ['params', 'opt_state'])
def test_an_array_that_is_not_the_saved_one_is_named(saved, part):
  """As after a flipped bit that the file format does not detect; for all readers."""
  path, stored = description_of(saved / saved_weights.FOLDER / '12')
  stored['checksums'][part][3] ^= 1 << 20
  path.write_text(json.dumps(saved_weights.add_digest(stored)))
  if part == 'params':
    with pytest.raises(
      UserError, match=r"step 12 .* cannot be read \(params\['.*\] is not what was saved"
    ):
      saved_weights.load_weights(saved)
  else:
    assert saved_weights.load_weights(saved).step == 12  # Weights are whole.
  step, _, (note,) = restored(saved)
  assert step == 10
  assert f'({part}[' in note


def truncate_the_largest(folder):
  truncate(max(files_of(folder), key=lambda path: path.stat().st_size))


@pytest.mark.parametrize('part', ['params', 'opt_state', 'description'])
@pytest.mark.parametrize('deed', [shutil.rmtree, truncate_the_largest])
def test_a_checkpoint_without_all_of_its_parts_is_damaged(saved, part, deed):
  deed(saved / saved_weights.FOLDER / '12' / part)
  step, _, (note,) = restored(saved)
  assert step == 10
  assert note.startswith('the checkpoint of step 12 is damaged (')


@pytest.mark.parametrize('old', ['"width": 64', '"checksums"', '"sha256"'])
def test_a_description_that_was_changed_is_damaged_and_no_other_model(saved, old):
  path, _ = description_of(saved / saved_weights.FOLDER / '12')
  text = path.read_text()
  assert old in text
  changed = chr(ord(old[-2]) ^ 1)
  path.write_text(text.replace(old, old[:-2] + changed + old[-1], 1))
  step, _, (note,) = restored(saved)
  assert step == 10
  assert 'step 12 is damaged (the description is not what was saved)' in note


def planted(*_, **__):
  raise TypeError('planted')


@pytest.mark.parametrize('stage', [(ocp.CheckpointManager, 'restore'), (saved_weights, 'check')])
def test_a_shortage_of_memory_is_no_damage(saved, monkeypatch, stage):
  def fail(*_, **__):
    raise MemoryError('planted')

  before = sorted(path.name for path in (saved / saved_weights.FOLDER).iterdir())
  with monkeypatch.context() as patch:
    patch.setattr(*stage, fail)
    with pytest.raises(MemoryError, match='planted'):
      restored(saved)
  assert sorted(path.name for path in (saved / saved_weights.FOLDER).iterdir()) == before
  assert restored(saved)[0] == 12


SHORTAGES = [
  (OSError(errno.EMFILE, 'Too many open files'), 'raise the limit of open files'),
  (OSError(errno.ESTALE, 'Stale file handle'), 'mount its storage again'),
  # Of TensorStore.
  (ValueError('RESOURCE_EXHAUSTED: Failed: Too many open files'), 'raise the limit of open files'),
  (ValueError('RESOURCE_EXHAUSTED: Failed: No space left on device'), 'make room there'),
  (ValueError('RESOURCE_EXHAUSTED: Failed: Disk quota exceeded'), 'make room there'),
]


@pytest.mark.parametrize(('error', 'remedy'), SHORTAGES)
def test_what_a_machine_is_short_of_is_no_damage(saved, monkeypatch, error, remedy):
  def fail(*_, **__):
    raise error

  before = sorted(path.name for path in (saved / saved_weights.FOLDER).iterdir())
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'restore', fail)
    with pytest.raises(RunFailed, match=rf'cannot be read now \(.*\); {remedy}'):
      restored(saved)
  assert sorted(path.name for path in (saved / saved_weights.FOLDER).iterdir()) == before


def test_folders_are_not_synced_where_that_cannot_be_done(tmp_path, monkeypatch):
  def fsync(descriptor):
    if os.path.isdir(f'/proc/self/fd/{descriptor}'):
      raise OSError(errno.EINVAL, 'Invalid argument')

  monkeypatch.setattr(os, 'fsync', fsync)
  checkpoints = Checkpoints(tmp_path, CheckpointOptions(), DESCRIPTION)
  checkpoints.finish(2, state_at(2))
  checkpoints.close()
  assert steps_in(tmp_path / saved_weights.FOLDER) == {'2'}


def test_a_folder_that_is_no_step_is_not_read_as_one(saved, tmp_path):
  copied = tmp_path / 'copied'
  shutil.copytree(saved / saved_weights.FOLDER / '12', copied / saved_weights.FOLDER / '012')
  with pytest.raises(UserError, match='holds no checkpoint'):
    saved_weights.load_weights(copied)


def test_a_mistake_in_a_program_is_no_damage(saved, monkeypatch):
  """A bug fails for every checkpoint; nothing is renamed, and saving raises the error."""
  before = sorted(path.name for path in (saved / saved_weights.FOLDER).iterdir())
  for module, name in ((ocp.CheckpointManager, 'restore'), (saved_weights, 'check')):
    with monkeypatch.context() as patch:
      patch.setattr(module, name, planted)
      with pytest.raises(TypeError, match='planted'):
        restored(saved)
      with pytest.raises(TypeError, match='planted'):
        saved_weights.load_weights(saved)
  assert sorted(path.name for path in (saved / saved_weights.FOLDER).iterdir()) == before
  checkpoints = Checkpoints(saved, CheckpointOptions(), DESCRIPTION)
  with monkeypatch.context() as patch, pytest.raises(TypeError, match='planted'):
    patch.setattr(ocp.CheckpointManager, 'save', planted)
    checkpoints.save(14, state_at(14))
  checkpoints.finish(14, state_at(14))
  checkpoints.close()


def test_damage_that_looks_like_a_mistake_in_a_program_is_damage(saved):
  """Orbax raises an AttributeError for one checkpoint, but not for those before it."""
  path = saved / saved_weights.FOLDER / '12' / 'params' / 'array_metadatas' / 'process_0'
  path.write_text(path.read_text().replace('"array_metadata"', '"array_metadatb"'))
  with pytest.raises(UserError, match=r'step 12 .* cannot be read \(.*give another step: 4, 8, 10'):
    saved_weights.load_weights(saved)
  step, _, (note,) = restored(saved)
  assert step == 10
  assert note.endswith('it is set aside as 12.damaged')
  # The only one that is left: nothing tells a mistake from damage. A second kind does.
  for step in (4, 8):
    shutil.rmtree(saved / saved_weights.FOLDER / str(step))
  path = saved / saved_weights.FOLDER / '10' / 'params' / 'array_metadatas' / 'process_0'
  path.write_text(path.read_text().replace('"array_metadata"', '"array_metadatb"'))
  for read in (saved_weights.load_weights, restored):
    with pytest.raises(AttributeError) as caught:
      read(saved)
    assert 'step 10' in caught.value.__notes__[0]
  shutil.copytree(saved / saved_weights.FOLDER / '10', saved / saved_weights.FOLDER / '9')
  (saved / saved_weights.FOLDER / '9' / 'description' / 'metadata').write_text('{')
  with pytest.raises(UserError, match=r'no checkpoint in .* can be read \(step 10: .*; step 9: '):
    restored(saved)


@pytest.mark.parametrize('part', ['architecture', 'objective'])
def test_options_of_other_code_are_named(saved, part):
  path, stored = description_of(saved / saved_weights.FOLDER / '12')
  stored[part]['of_later'] = 1
  path.write_text(json.dumps(saved_weights.add_digest(stored)))
  with pytest.raises(
    UserError,
    match=r'step 12 .* \(it has of_later, which this version does not know\); give another',
  ):
    saved_weights.load_weights(saved)


def test_a_model_that_a_description_says_and_is_not_there_takes_no_memory(saved):
  path, stored = description_of(saved / saved_weights.FOLDER / '12')
  stored['architecture'] |= {'decoder_width': 16_384, 'decoder_num_heads': 1}
  path.write_text(json.dumps(saved_weights.add_digest(stored)))
  with pytest.raises(
    UserError, match=r'description is of \d{11} bytes, and \d+ are stored\); give'
  ):
    saved_weights.load_weights(saved)


def test_what_broken_saves_left_goes_with_the_next_start(saved):
  left = saved / saved_weights.FOLDER / '14.orbax-checkpoint-tmp'
  left.mkdir()
  assert restored(saved)[0] == 12
  assert not left.exists()


def test_checkpoints_without_sums_are_read_but_not_with_nan(tmp_path):
  for value, message in (
    (0.5, ''),
    (np.nan, r"params\['mask_token'\] has values that are not fin"),
  ):
    folder = tmp_path / str(value)
    params = jax.tree.map(np.asarray, state_at(0).params)
    params['mask_token'] = np.full_like(params['mask_token'], value)
    saved_weights.save_weights(folder, params, 7, DESCRIPTION)
    path, stored = description_of(folder / saved_weights.FOLDER / '7')
    del stored['checksums']
    path.write_text(json.dumps(stored))
    if message:
      with pytest.raises(UserError, match=message):
        saved_weights.load_weights(folder)
    else:
      assert saved_weights.load_weights(folder).params['mask_token'].max() == value


def test_where_none_is_whole_nothing_is_begun_anew(saved):
  for step in (4, 8, 10, 12):
    for path in files_of(saved / saved_weights.FOLDER / str(step) / 'params'):
      truncate(path)
  with pytest.raises(UserError, match=r'no checkpoint in .* can be read \(step 12: .*; step 4: '):
    restored(saved)
  assert sorted(int(p.name) for p in (saved / saved_weights.FOLDER).iterdir()) == [4, 8, 10, 12]


# From step 3 on the file system takes no file of more than 64 kB, until step 7 where it is given.
FULL = """
import pathlib, resource, time
from dropmae_jax import main
from dropmae_jax.runtime import report
real = report.Report.after_step
def after_step(self, step, metrics):
  real(self, step, metrics)
  while step == 3 and not pathlib.Path(WORKDIR, 'checkpoints', '2').exists():
    time.sleep(0.01)
  if step in LIMITS:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS[step], most))
report.Report.after_step = after_step
main.command()
"""


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(trained, data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=8', '--config.checkpoint.every_steps=2'
  )
  given = f'WORKDIR, LIMITS = {str(tmp_path)!r}, {{3: 65536, 7: resource.RLIM_INFINITY}}'
  done = run_python('-c', f'import resource\n{given}\n{FULL}', *arguments[2:])
  assert done.returncode == 0, done.stderr
  assert 'the checkpoint of step 4 could not be written (' in done.stdout
  assert 'the newest one is of step 2, and training goes on' in done.stdout
  assert 'absl' not in done.stderr  # Orbax logs there what the sentence says.
  steps = sorted(int(p.name) for p in (tmp_path / saved_weights.FOLDER).iterdir())
  assert steps[-1] == 8
  assert 4 not in steps
  assert losses(tmp_path) == losses(trained)
  assert_same_weights(tmp_path, trained)


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_is_no_success(data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=5', '--config.checkpoint.every_steps=2'
  )
  given = f'WORKDIR, LIMITS = {str(tmp_path)!r}, {{3: 65536}}'
  done = run_python('-c', f'{given}\n{FULL}', *arguments[2:])
  assert done.returncode == 1, done.stderr
  # Orbax's own threads write to the terminal too, also in the middle of a line.
  (told,) = re.findall(r'error: step 5 could not be saved in .*', done.stderr)
  assert 'make room there and give the same command, which resumes from step 2.' in told
  done = run_python(*arguments)
  assert done.returncode == 0, done.stderr
  assert 'resuming after step 2 of 5' in done.stdout


# Kills itself in the middle of the writing of the checkpoint of step 6, which waits for that.
KILLED_WHILE_SAVING = """
import os, pathlib, signal, threading, time
from dropmae_jax import main
from dropmae_jax.checkpoints import manager
real, rename = manager.Checkpoints.save, os.rename
def hold(old, new, **other):
  if pathlib.Path(new) == pathlib.Path(WORKDIR, 'checkpoints', '6'):
    threading.Event().wait()
  rename(old, new, **other)
os.rename = hold
def watch():
  folder = pathlib.Path(WORKDIR, 'checkpoints')
  while not list(folder.glob('6.*tmp*/params*')):
    time.sleep(0.0005)
  os.kill(os.getpid(), signal.SIGKILL)
def save(self, step, state, *losses):
  if step == 6:
    threading.Thread(target=watch).start()
  real(self, step, state, *losses)
manager.Checkpoints.save = save
main.command()
"""


def test_a_kill_while_a_checkpoint_is_written(trained, data_dir, tmp_path):
  arguments = train_arguments(
    data_dir, tmp_path, '--config.num_steps=8', '--config.checkpoint.every_steps=3'
  )
  given = f'WORKDIR = {str(tmp_path)!r}'
  done = run_python('-c', f'{given}\n{KILLED_WHILE_SAVING}', *arguments[2:])
  assert done.returncode == -signal.SIGKILL, done.stderr
  folder = tmp_path / saved_weights.FOLDER
  assert not (folder / '6').exists()
  assert list(folder.glob('6.*tmp*'))
  done = run_python(*arguments)
  assert done.returncode == 0, done.stderr
  assert 'resuming after step 3 of 8' in done.stdout
  assert losses(tmp_path) == losses(trained)
  assert_same_weights(tmp_path, trained)
