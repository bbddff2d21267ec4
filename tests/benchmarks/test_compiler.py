"""What is read from compiled programs is what is in them; real steps send what can be counted."""

import collections
import types

import jax
import pytest

from benchmarks.compiler import hlo, hlo_text
from dropmae_jax import memory, optimizer
from dropmae_jax.config import Config, MeshOptions, Objective
from dropmae_jax.model import mae
from dropmae_jax.model.vit import architecture_of_size
from dropmae_jax.runtime import targets
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
    f'  %x = f32[16,4]{{1,0:T(8,128)}} parameter(0)\n{body}}}\n'
  )


def test_of_what_is_sliced_or_gathered_the_part_is_read():
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
    # Four numbers, written and read, and their index.
    ('', 16 + 16 + 4),
    # What is changed is on the chip.
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
    # It is only given another shape.
    ('ROOT %r = f32[8,4]{1,0} bitcast(%a', 256),
    # It is read through two bitcasts.
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


def test_main_memory_leaves_out_what_is_on_the_chip():
  compiled_program = program(
    '  %s = (f32[16,4]{1,0:S(1)}, f32[16,4]{1,0}, u32[]{:S(2)}) copy-start(%x)\n'
    '  %d = f32[16,4]{1,0:S(1)} copy-done(%s)\n'
    '  %y = f32[16,4]{1,0:T(8,128)S(1)} negate(%d)\n'
    '  %z = (f32[16,4]{1,0}, s8[99]{0}) custom-call(%y), custom_call_target="matmul"\n'
    '  ROOT %e = f32[16,4]{1,0} get-tuple-element(%z), index=0\n'
  )
  assert compiled_program.memory_bytes() == 256 + 256  # Read by the copy, written by the product.


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
    # Nothing tells how often: once.
    ('', LOOP.replace('direction=LT', 'direction=GT'), 1),
    ('', LOOP.replace('add(%i, %by)', 'add(%i, %i)'), 1),
    ('', LOOP.replace('constant(7)', 'constant(%p)'), 1),
  ],
)
def test_loops_are_multiplied_out(note, loop, rounds):
  assert program(f'{WHILE}{note}\n', loop).kernels() == {'all-reduce': rounds}


def test_kernels_are_what_runs_by_itself():
  compiled_program = program(
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
  assert compiled_program.kernels() == {'fusion': 1, 'custom-call': 1, 'all-reduce': 4}


def test_cycles_are_those_that_the_compiler_writes():
  said = ', backend_config={"estimated_cycles":"1000"}'
  compiled_program = program(
    f'  %a = f32[16,4]{{1,0}} negate(%x){said}\n'
    '  %z = f32[16,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"\n'
    f'{WHILE}, backend_config={{"known_trip_count":{{"n":"3"}}}}\n',
    LOOP.replace('to_apply=%add', f'to_apply=%add{said}'),
  )
  assert compiled_program.expected_cycles() == (1000 + 3 * 1000, 1)


def collectives(mesh):
  """Compiles a real step on 8 devices; returns the bytes that each kind is handed, and memory.

  It is without ASAD, whose loops take long to compile; LLVM is spared too.
  """
  config = Config(
    data_dir='',
    num_steps=9,
    batch_size=8,
    model=SMALLEST,
    objective=Objective(attention_dropout=0),
    dtype='float32',
    mesh=mesh,
  )
  quick = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  step = memory.lower_step(config, jax.devices()[:DEVICES]).compile(quick)
  computations, _ = hlo_text.read(step.as_text())
  instructions = {each.name: each for listed in computations.values() for each in listed}
  handed_in = collections.Counter()
  for each in instructions.values():
    if each.opcode in ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all'):
      shapes = (instructions[name].shape for name in each.operands)
      handed_in[each.opcode] += sum(map(hlo_text.num_bytes, shapes))
  return handed_in, memory.memory_of(step)


def trained_bytes():
  """Bytes of the gradients that devices add up, and how many of them are of matrices."""
  total, matrices = 0, 0
  for path, leaf in jax.tree.leaves_with_path(mae.abstract_model(SMALLEST)[1]):
    name = path[0].key
    if name in optimizer.FIXED:
      continue
    if name.startswith('decoder_temporal'):
      # In the decoder, a frame's code is summed over its tokens after the sum over devices.
      total += 4 * SMALLEST.tokens_per_frame * leaf.shape[-1]
    else:
      total += 4 * leaf.size
      matrices += 4 * leaf.size * (len(leaf.shape) == 2)
  return total, matrices


def test_a_data_parallel_step_sends_every_gradient_once():
  handed_in, memory = collectives(MeshOptions())
  expected, _ = trained_bytes()
  assert handed_in == {'all-reduce': expected + 4}  # Beside them the loss.
  assert memory['total'] >= memory['argument'] > 3 * expected


def test_a_step_with_split_parameters_gathers_them():
  handed_in, memory = collectives(MeshOptions(fsdp=DEVICES))
  total, matrices = trained_bytes()
  assert handed_in['all-gather'] * DEVICES > 0.5 * matrices
  # Parameters and two moments: of matrices there is an eighth here.
  assert memory['argument'] < 3 * (total - matrices) + 3 * matrices / 8 + 20_000


@pytest.mark.parametrize(('name', 'remedy'), [('tpu_v6e', 'jax\\[tpu'), ('a100', 'jax-cuda12')])
def test_a_compiler_that_is_not_there_is_named(monkeypatch, name, remedy):
  def refuse(**_):
    raise RuntimeError('not installed\nand more')

  monkeypatch.setattr(targets.topologies, 'get_topology_desc', refuse)
  with pytest.raises(UserError, match=rf'\(not installed\).*pip install .*{remedy}'):
    targets.devices(name)


@pytest.mark.parametrize(
  ('text', 'name', 'number', 'topology'),
  [
    ('tpu_v5e', 'tpu_v5e', 1, 'v5e:2x2'),
    ('4xtpu_v6e', 'tpu_v6e', 4, 'v6e:2x2'),
    ('v5e-16', 'tpu_v5e', 16, 'v5e:4x4'),
    ('v4-8', 'tpu_v4', 4, 'v4:2x2x1'),
    ('rtx4090', 'rtx4090', 1, '1x1x1'),
    ('8xh100', 'h100', 8, '1x1x8'),
  ],
)
def test_one_word_names_kind_and_number(monkeypatch, text, name, number, topology):
  asked = []

  def record(**options):
    asked.append(options['topology' if 'topology' in options else 'topology_name'])
    return types.SimpleNamespace(devices=jax.devices() * 2)

  monkeypatch.setattr(targets.topologies, 'get_topology_desc', record)
  assert targets.parse(text) == (targets.TARGETS[name], number)
  assert len(targets.devices(text)) == number
  assert asked == [topology]


@pytest.mark.parametrize(
  ('text', 'remedy'),
  [
    ('8xh10', "did you mean '8xh100'"),
    ('', 'valid are: .*h200'),
    ('v5e-12', 'slices of 4, 8, 16'),
    ('v4-7', 'slices of 4, 8, 16'),
    ('0xh100', 'give 1 or more'),
    ('9999xcpu', 'name those'),
  ],
)
def test_a_word_that_names_no_devices_is_refused(text, remedy):
  with pytest.raises(UserError, match=f'--target={text}.*{remedy}'):
    targets.devices(text)


def test_a_gpu_is_described_by_its_numbers():
  config = targets.gpu_config(targets.TARGETS['a100'])
  for line in ('major: 8 minor: 0', 'core_count: 108', 'memory_bandwidth: 2039000000000'):
    assert line in config
  assert 'major: 8 minor: 9' in targets.gpu_config(targets.TARGETS['rtx4090'])
  assert config.count('{') == config.count('}')
