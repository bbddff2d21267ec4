"""What is read off compiled programs is what is in them; real steps send what can be counted."""

import importlib.util
import json
import re

import jax
import pytest
from conftest import ROOT, run_python

from benchmarks import compiled, hlo, scaling, targets
from dropmae_jax import optimizer
from dropmae_jax.config import Config, MeshOptions, Objective
from dropmae_jax.model import mae
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.runtime.errors import UserError

DEVICES = 8
# One block each: it compiles in seconds.
SMALLEST = architecture_of_size(
  'XXS', depth=1, decoder_depth=1, decoder_width=32, decoder_num_heads=2, image_size=16
)


def program(body, others=''):
  return hlo.Program(
    f'HloModule jit_step, is_scheduled=true\n\n{others}\n'
    f'ENTRY %main.1 (x: f32[16,4]) -> f32[] {{\n'
    f'  %x = f32[16,4]{{1,0:T(8,128)}} parameter(0)\n{body}}}\n',
    DEVICES,
  )


@pytest.mark.parametrize(
  ('instruction', 'kind', 'group', 'sent'),
  [
    # 16 x 4 float32 are 256 bytes.
    ('all-reduce(%x), replica_groups={}, to_apply=%add', 'all-reduce', 8, 2 * 7 / 8 * 256),
    ('all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}', 'all-reduce', 4, 2 * 3 / 4 * 256),
    ('all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}', 'all-gather', 2, 256),
    ('reduce-scatter(%x), replica_groups=[2,4]<=[8]', 'reduce-scatter', 4, 3 / 4 * 256),
    ('all-to-all(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}', 'all-to-all', 2, 128),
    ('collective-permute(%x), source_target_pairs={{0,1},{1,0}}', 'collective-permute', 8, 256),
    (
      "all-gather(%x), replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0))"
      " {'axis_0'}, dimensions={0}",
      'all-gather',
      4,
      3 * 256,
    ),
    ("all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 'all-reduce', 8, 448),
    ("all-reduce(%x), replica_groups=mesh['a'=8] {'a':(2)4}", 'all-reduce', 4, 384),
  ],
)
def test_a_collective_sends_by_the_formula_of_a_ring(instruction, kind, group, sent):
  (found,) = program(f'  ROOT %y = f32[16,4]{{1,0}} {instruction}\n').collectives()
  assert (found.kind, found.group, found.dtypes, found.times) == (kind, group, 'f32', 1)
  assert found.sent_bytes == pytest.approx(sent)
  assert not found.overlaps


def test_a_tuple_is_added_up_and_a_group_of_one_sends_nothing():
  (found,) = program(
    '  %h = bf16[3]{0} convert(%x)\n'
    '  %y = (f32[16,4]{1,0}, /*index=1*/bf16[3]{0}) all-reduce(%x, %h), replica_groups={}\n'
    '  ROOT %z = f32[16,4]{1,0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}\n'
  ).collectives()
  assert (found.operand_bytes, found.dtypes) == (256 + 6, 'bf16+f32')


@pytest.mark.parametrize(
  ('note', 'overlaps'),
  [('', True), (', backend_config={"is_sync":false}', True), (', {"is_sync":true}', False)],
)
def test_start_and_done_are_one(note, overlaps):
  (found,) = program(
    '  %s = (f32[16,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]'
    f'{note}\n  ROOT %d = f32[64,4]{{1,0}} all-gather-done(%s)\n'
  ).collectives()
  assert found.sent_bytes == 3 * 256
  assert found.overlaps == overlaps


LOOP = """%body (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %p = (s32[], f32[16,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %v = f32[16,4]{1,0} get-tuple-element(%p), index=1
  %by = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %by)
  %sum = f32[16,4]{1,0} all-reduce(%v), replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f32[16,4]{1,0}) tuple(%next, %sum)
}

%condition (q: (s32[], f32[16,4])) -> pred[] {
  %q = (s32[], f32[16,4]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(7)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}
"""
WHILE = '  ROOT %w = (s32[], f32[16,4]{1,0}) while(%x), condition=%condition, body=%body'


@pytest.mark.parametrize(
  ('note', 'loop', 'rounds'),
  [
    (', backend_config={"known_trip_count":{"n":"31"}}', LOOP, 31),
    ('', LOOP, 4),
    ('', LOOP.replace('constant(2)', 'constant(1)'), 7),
  ],
)
def test_loops_are_multiplied_out(note, loop, rounds):
  (found,) = program(f'{WHILE}{note}\n', loop).collectives()
  assert found.times == rounds
  assert found.sent_bytes == rounds * 448


@pytest.mark.parametrize('unknown', ['direction=GT', 'add(%i, %i)', 'constant(%p)'])
def test_a_loop_of_unknown_length_is_no_guess(unknown):
  known = {
    'direction=GT': 'direction=LT',
    'add(%i, %i)': 'add(%i, %by)',
    'constant(%p)': 'constant(7)',
  }
  loop = LOOP.replace(known[unknown], unknown)
  with pytest.raises(ValueError, match=r'^sum is in a loop of unknown length\.$'):
    program(f'{WHILE}\n', loop).collectives()


def test_a_collective_that_tpu_fusions_are_spread_over_counts_once():
  fusion = """%async_collective_fusion.{0} (a.{0}: f32[16,4]) -> f32[64,4] {{
  %a.{0} = f32[16,4]{{1,0}} parameter(0)
  ROOT %g.{0} = f32[64,4]{{1,0}} all-gather(%a.{0}), channel_id=7, replica_groups=[2,4]<=[8]
}}
"""
  calls = ''.join(
    f'  %f.{n} = f32[64,4]{{1,0}} fusion(%x), kind=kCustom, calls=%async_collective_fusion.{n}\n'
    for n in range(3)
  )
  (found,) = program(calls, ''.join(map(fusion.format, range(3)))).collectives()
  assert found.sent_bytes == 3 * 256
  assert found.overlaps


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
  fusion = """%all-reduce-scatter.1 (a: f32[16,4]) -> f32[2,4] {
  %a = f32[16,4]{1,0} parameter(0)
  ROOT %r = f32[16,4]{1,0} all-reduce(%a), channel_id=3, replica_groups={}
}
"""
  call = '  ROOT %f = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1\n'
  (found,) = program(call, fusion).collectives()
  assert found.kind == 'reduce-scatter'
  assert found.sent_bytes == 7 / 8 * 256


def test_of_what_is_cut_or_gathered_the_part_is_read():
  fusion = """%fused (a: f32[16,4], b: f32[16,4], i: s32[]) -> f32[1,4] {
  %a = f32[16,4]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1), metadata={}
  %i = s32[] parameter(2)
  %c = f32[1,4]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,4}
  %d = f32[1,4]{1,0} slice(%b), slice={[0:1], [0:4]}
  %e = f32[1,4]{1,0} reduce(%b, %i), dimensions={}, to_apply=%sum
  ROOT %f = f32[1,4]{1,0} add(%c, %e)
}
"""
  call = '  ROOT %r = f32[1,4]{1,0} fusion(%x, %y, %n), kind=kLoop, calls=%fused\n'
  given = '  %y = f32[16,4]{1,0} parameter(1)\n  %n = s32[] parameter(2)\n'
  assert program(given + call, fusion).memory_bytes() == 16 + 256 + 4 + 16
  outer = """%outer (o: f32[16,4], p: s32[]) -> f32[1,4] {
  %o = f32[16,4]{1,0} parameter(0)
  %b = f32[16,4]{1,0} bitcast(%o)
  %p = s32[] parameter(1)
  ROOT %g = f32[1,4]{1,0} fusion(%b, %p), kind=kLoop, calls=%inner
}
%inner (m: f32[16,4], q: s32[]) -> f32[1,4] {
  %m = f32[16,4]{1,0} parameter(0)
  %q = s32[] parameter(1)
  ROOT %l = f32[1,4]{1,0} dynamic-slice(%m, %q, %q), dynamic_slice_sizes={1,4}
}
"""
  nested = '  ROOT %r = f32[1,4]{1,0} fusion(%x, %n), kind=kLoop, calls=%outer\n'
  assert program('  %n = s32[] parameter(2)\n' + nested, outer).memory_bytes() == 16 + 4 + 16


@pytest.mark.parametrize(
  ('place', 'moved'),
  [
    # Four numbers, written and read, and where they belong.
    ('', 16 + 16 + 4),
    # What is changed lies on the chip.
    ('S(1)', 16 + 4),
  ],
)
def test_of_what_is_changed_in_place_the_new_part_moves(place, moved):
  fusion = """%fused (a: f32[8,4], b: f32[1,4], i: s32[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = f32[1,1,4]{2,1,0} bitcast(%b)
  ROOT %r = f32[8,4]{1,0} dynamic-update-slice(%a, %c, %i, %i)
}
"""
  given = f'  %o = f32[8,4]{{1,0{place}}} parameter(3)\n  %n = s32[] parameter(2)\n'
  new = '  %y = f32[1,4]{1,0} parameter(1)\n'
  call = f'  ROOT %f = f32[8,4]{{1,0{place}}} fusion(%o, %y, %n), kind=kLoop, calls=%fused\n'
  assert program(given + new + call, fusion).memory_bytes() == moved
  alone = f'  ROOT %f = f32[8,4]{{1,0{place}}} dynamic-update-slice(%o, %y, %n, %n)\n'
  assert program(given + new + alone).memory_bytes() == moved


@pytest.mark.parametrize(
  ('body', 'moved'),
  [
    # What is changed is made by the kernel: all of it is written.
    ('%m = f32[8,4]{1,0} negate(%a)\n  ROOT %r = f32[8,4]{1,0} dynamic-update-slice(%m', 256),
    # What is changed is not the result, and so it is read.
    (
      '%m = f32[8,4]{1,0} dynamic-update-slice(%a, %b, %i, %i)\n  ROOT %r = f32[8,4]{1,0} add(%m',
      256,
    ),
    # It only gets another shape.
    ('ROOT %r = f32[8,4]{1,0} bitcast(%a', 256),
    # It is read behind two other shapes.
    (
      '%m = f32[32]{0} bitcast(%a)\n  %k = f32[8,4]{1,0} bitcast(%m)\n'
      '  ROOT %r = f32[8,4]{1,0} negate(%k',
      256,
    ),
  ],
)
def test_what_is_not_changed_in_place_moves_whole(body, moved):
  fusion = f"""%fused (a: f32[8,4], b: f32[1,4], i: s32[]) -> f32[8,4] {{
  %a = f32[8,4]{{1,0}} parameter(0)
  %b = f32[1,4]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  {body}, %b, %i, %i)
}}
"""
  given = '  %o = f32[8,4]{1,0} parameter(3)\n  %n = s32[] parameter(2)\n'
  new = '  %y = f32[1,4]{1,0} parameter(1)\n'
  call = '  ROOT %f = f32[8,4]{1,0} fusion(%o, %y, %n), kind=kLoop, calls=%fused\n'
  assert program(given + new + call, fusion).memory_bytes() == moved + 16 + 4


def test_main_memory_leaves_out_what_lies_on_chip():
  found = program(
    '  %s = (f32[16,4]{1,0:S(1)}, f32[16,4]{1,0}, u32[]{:S(2)}) copy-start(%x)\n'
    '  %d = f32[16,4]{1,0:S(1)} copy-done(%s)\n'
    '  %y = f32[16,4]{1,0:T(8,128)S(1)} negate(%d)\n'
    '  %z = (f32[16,4]{1,0}, s8[99]{0}) custom-call(%y), custom_call_target="matmul"\n'
    '  ROOT %e = f32[16,4]{1,0} get-tuple-element(%z), index=0\n'
  )
  assert found.memory_bytes() == 256 + 256  # Read by the copy, written by the product.


def test_kernels_are_what_runs_by_itself():
  found = program(
    '  %s = (f32[16,4]{1,0:S(1)}, f32[16,4]{1,0}, u32[]{:S(2)}) copy-start(%x)\n'
    '  %d = f32[16,4]{1,0:S(1)} copy-done(%s)\n'
    '  %c = f32[] constant(1)\n'
    '  %f = f32[16,4]{1,0} fusion(%d), kind=kLoop, calls=%fused\n'
    '  %z = (f32[16,4]{1,0}, s8[99]{0}) custom-call(%f), custom_call_target="matmul"\n'
    '  %e = f32[16,4]{1,0} get-tuple-element(%z), index=0\n'
    f'{WHILE}\n',
    LOOP + '\n%fused (a: f32[16,4]) -> f32[16,4] {\n'
    '  %a = f32[16,4]{1,0} parameter(0)\n  ROOT %n = f32[16,4]{1,0} negate(%a)\n}\n',
  )
  # The loop sends four times; what it adds to is a number.
  assert found.kernels() == {'fusion': 1, 'custom-call': 1, 'all-reduce': 4}


def test_cycles_are_those_that_the_compiler_tells():
  said = ', backend_config={"estimated_cycles":"1000"}'
  found = program(
    f'  %a = f32[16,4]{{1,0}} negate(%x){said}\n'
    '  %z = f32[16,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"\n'
    f'{WHILE}, backend_config={{"known_trip_count":{{"n":"3"}}}}\n',
    LOOP.replace('to_apply=%add', f'to_apply=%add{said}'),
  )
  assert found.expected_cycles() == (1000 + 3 * 1000, 1)


def analyse(mesh):
  """A real step without ASAD, whose loops take long to compile; LLVM is spared too."""
  options = Config(
    data_dir='',
    num_steps=9,
    batch_size=8,
    model=SMALLEST,
    objective=Objective(attention_dropout=0),
    dtype='float32',
    mesh=mesh,
  )
  quick = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  step = compiled.lower_step(options, jax.devices()[:DEVICES]).compile(quick)
  return compiled.analyse(step, DEVICES)


def trained_bytes():
  """Bytes of the gradients that devices add up, and how many of them are of matrices."""
  total, matrices = 0, 0
  for path, leaf in jax.tree.leaves_with_path(mae.abstract_model(SMALLEST)[1]):
    name = path[0].key
    if name in optimizer.FIXED:
      continue
    if name.startswith('decoder_temporal'):
      # Where all tokens are there, a frame's code is added up over them last of all.
      total += 4 * SMALLEST.tokens_per_frame * leaf.shape[-1]
    else:
      total += 4 * leaf.size
      matrices += 4 * leaf.size * (len(leaf.shape) == 2)
  return total, matrices


def test_a_data_parallel_step_sends_every_gradient_once():
  found = analyse(MeshOptions())
  expected, _ = trained_bytes()
  handed_in = sum(row['operand_mb'] for row in found['collectives']) * 1e6
  assert handed_in == pytest.approx(expected + 4)  # Beside them the loss.
  assert {row['kind'] for row in found['collectives']} == {'all-reduce'}
  assert found['sent_bytes'] == pytest.approx(2 * 7 / 8 * handed_in)
  assert found['flops'] > 0
  memory = found['memory']
  assert memory['total'] >= memory['argument'] > 3 * expected
  projected = compiled.project(found, targets.TARGETS['cpu'])
  assert projected['messages'] == pytest.approx(found['sent_bytes'] / 10e9)
  assert projected['least'] <= projected['most']
  assert projected['efficiency_at_peak'] <= projected['efficiency_after'] <= 1


def test_a_step_with_split_parameters_gathers_them():
  found = analyse(MeshOptions(fsdp=DEVICES))
  total, matrices = trained_bytes()
  gathered = sum(row['operand_mb'] for row in found['collectives'] if row['kind'] == 'all-gather')
  assert gathered * 1e6 * DEVICES > 0.5 * matrices
  # Parameters and two moments: of matrices there is an eighth here.
  assert found['memory']['argument'] < 3 * (total - matrices) + 3 * matrices / 8 + 20_000


def row(pairs, total):
  return {'pairs_per_device': pairs, 'memory': {'total': total}}


def test_the_largest_batch_is_where_the_line_meets_the_limit():
  rows = [row(8, 3e9), row(16, 5.1e9), {'pairs_per_device': 20, 'refused': 'no'}, row(32, 9e9)]
  fit = scaling.largest_batches(rows, [16, 0.5])
  assert fit['bytes_per_pair'] == pytest.approx(0.25e9)
  assert fit['bytes_without_pairs'] == pytest.approx(1e9)
  assert fit['worst_error'] == pytest.approx(0.1 / 5.1)
  assert fit['largest'] == {'16 GB': 60, '0.5 GB': 0}
  assert scaling.largest_batches(rows[:1], [16]) == {}
  assert scaling.largest_batches(rows[:2], [16])['worst_error'] is None


def test_messages_between_boxes_go_over_the_network():
  found = {'flops': 989e12, 'main_memory_bytes': 4800e9, 'sent_bytes': 450e9}
  for group, seconds in ((8, 1), (16, 9)):
    projected = compiled.project({**found, 'groups': [group]}, targets.TARGETS['h200'])
    assert projected['messages'] == pytest.approx(seconds)
    assert projected['most'] == pytest.approx(2 + seconds)


def test_bad_input_is_one_sentence(monkeypatch, capsys, tmp_path):
  for flags, message in [
    ('--target=tpu_v5e --chips=3', '--chips=3 is no slice of tpu_v5e; choose one of 1, 2, 4'),
    ('--target=h200 --chips=12', '--chips=12 is not a number of whole boxes'),
    ('--target=cpu --chips=0', '--chips=0 is too small'),
    ('--target=cpu --pairs_per_device=4,x', "'x'; give numbers"),
    ('--target=cpu --pairs_per_device=0', '--pairs_per_device=0: give at least 1'),
    ('--target=cpu --fsdp=0', 'mesh.fsdp=0 is too small'),
    ('--target=cpu --image_size=30', 'is not a multiple of patch_size=16'),
    ('--target=cpu --chips=2 --fsdp=3', 'mesh.fsdp=3 do not share out the 2 devices'),
    ('--target=cpu --chips=2 --pairs_per_device=1 --accumulation_steps=2', 'is not divisible'),
    ('--target=h200 --target_config=none', 'is no file'),
    ('--target=abacus', "invalid choice: 'abacus'"),
    (f'--target=cpu --json={tmp_path}', 'is a folder'),
  ]:
    monkeypatch.setattr('sys.argv', ['scaling', *flags.split()])
    monkeypatch.setattr(scaling.jax.config, 'update', lambda name, value: None)
    with pytest.raises(SystemExit) as ended:
      scaling.command_line.run(scaling.main)
    assert ended.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


DOCUMENTATION = (ROOT / 'docs' / 'scaling.md').read_text()
COMMANDS = re.findall(r'^python -m benchmarks.scaling (.*)$', DOCUMENTATION, re.MULTILINE)
COMMANDS += re.findall(r'`(--target=\w+ [^`]*)`', DOCUMENTATION)


@pytest.mark.parametrize('flags', sorted(set(COMMANDS)))
def test_the_commands_of_the_documentation_are_understood(monkeypatch, flags):
  monkeypatch.setattr('sys.argv', ['scaling', *flags.split()])
  scaling.make_recipe(scaling.parse(), 8)


@pytest.mark.parametrize(('name', 'remedy'), [('tpu_v6e', 'jax\\[tpu'), ('a100', 'jax-cuda12')])
def test_a_compiler_that_is_not_there_is_named(monkeypatch, name, remedy):
  def refuse(**_):
    raise RuntimeError('not installed\nand more')

  monkeypatch.setattr(targets.topologies, 'get_topology_desc', refuse)
  with pytest.raises(UserError, match=rf'\(not installed\).*pip install .*{remedy}'):
    targets.devices(name, 1)


def test_a_wrong_description_is_not_taken_for_a_missing_compiler(monkeypatch, tmp_path):
  def refuse(**_):
    raise RuntimeError('Failed to parse GpuTargetConfigProto')

  monkeypatch.setattr(targets.topologies, 'get_topology_desc', refuse)
  path = tmp_path / 'gpu.txtpb'
  path.write_text('nonsense')
  with pytest.raises(UserError, match=r'gpu\.txtpb does not describe a GPU'):
    targets.devices('h200', 1, path)


def test_a_gpu_is_described_by_its_numbers():
  config = targets.gpu_config(targets.TARGETS['a100'])
  for line in ('major: 8 minor: 0', 'core_count: 108', 'memory_bandwidth: 2039000000000'):
    assert line in config
  assert config.count('{') == config.count('}')


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason="needs pip install 'jax[tpu]'")
def test_the_compiler_of_tpus_makes_the_step(tmp_path):
  output = tmp_path / 'out.json'
  done = run_python(
    '-m', 'benchmarks.scaling', '--target=tpu_v5e', '--chips=4', '--fsdp=2', '--model=XXS',
    '--image_size=32', '--pairs_per_device=2,4', '--quick', f'--json={output}', timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(output.read_text())
  assert [row['batch_size'] for row in found['results']] == [8, 16]
  assert all(row['sent_bytes'] > 0 for row in found['results'])
  assert 'projected efficiency' in done.stdout
