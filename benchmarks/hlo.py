"""What a compiled program runs and moves, read from its text (HLO).

Messages between devices, bytes to and from memory, and kernels.
Loops are multiplied out; the number of their rounds is written beside them or in their condition.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of an element; types of less than a byte do not occur.
ELEMENT_BYTES = {
  **dict.fromkeys(('pred', 's8', 'u8'), 1),
  **dict.fromkeys(('bf16', 'f16', 's16', 'u16'), 2),
  **dict.fromkeys(('f32', 's32', 'u32'), 4),
  **dict.fromkeys(('f64', 's64', 'u64', 'c64'), 8),
}
# What a device sends, as a multiple of its operand's bytes, where g devices form a ring.
RING = {
  'all-reduce': lambda g: 2 * (g - 1) / g,
  'all-gather': lambda g: g - 1,
  'reduce-scatter': lambda g: (g - 1) / g,
  'all-to-all': lambda g: (g - 1) / g,
  'collective-permute': lambda g: 1,
}
# Instructions that only name what is there, or whose bytes another one counts.
_MOVES_NOTHING = frozenset(
  ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id')
)
_READS_PART = frozenset(('slice', 'dynamic-slice', 'gather'))
_RUNS_OTHERS = frozenset(('while', 'call', 'conditional', 'async-start'))
_MAKES_ANYTHING = frozenset(('fusion', 'custom-call', 'reduce'))
_BESIDE_KERNELS = frozenset(('copy-start', 'slice-start'))
# TPU: an all-reduce of which every device keeps its slice only, in a fusion of this name.
SCATTER_FUSION = 'all-reduce-scatter'

_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'\s*([\w\-]+)\(')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_CALLED = re.compile(
  r'\b(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)


class Collective(NamedTuple):
  """One instruction that sends.

  Attributes:
    kind: a key of `RING`.
    dtypes: of what it sends, such as 'bf16'; several are joined by '+'.
    operand_bytes: what one device hands in.
    group: devices that exchange.
    times: how often a step runs it; more than 1 in a loop.
    overlaps: it is written as a start and an end, with other work between.
  """

  kind: str
  dtypes: str
  operand_bytes: int
  group: int
  times: int
  overlaps: bool

  @property
  def sent_bytes(self) -> float:
    """What one device sends in a step, by the formula of a ring."""
    return self.times * self.operand_bytes * RING[self.kind](self.group)


class _Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  operands: list[str]
  attributes: str
  text: str


class Program:
  """A compiled program, taken apart."""

  def __init__(self, text: str, num_devices: int) -> None:
    """Reads `compiled.as_text()`; `num_devices` is the group where a collective names none."""
    self._computations, self._entry = _read(text)
    self._num_devices = num_devices
    self._fused = {
      name.removeprefix('%')
      for instructions in self._computations.values()
      for instruction in instructions
      if instruction.opcode == 'fusion'
      for _, name in _CALLED.findall(instruction.attributes)
    }
    self._instructions = {
      instruction.name: instruction
      for instructions in self._computations.values()
      for instruction in instructions
    }

  def collectives(self) -> list[Collective]:
    """Lists the collectives that send something.

    Raises:
      ValueError: one is in a loop whose number of rounds the text does not tell.
    """
    found, seen = [], set()
    for instruction, computation, times in self._walk(self._entry, 1, into_fusions=True):
      kind = instruction.opcode.removesuffix('-start')
      if kind not in RING:
        continue
      # TPU: a collective beside other work is named again in each fusion that it is spread over.
      spread = computation in self._fused
      channel = re.search(r'channel_id=\d+', instruction.attributes)
      if spread and channel and channel[0] in seen:
        continue
      seen |= {channel[0]} if spread and channel else set()
      if kind == 'all-reduce' and computation.startswith(SCATTER_FUSION):
        kind = 'reduce-scatter'
      sent = self._operands(instruction)
      group = _group_size(instruction.attributes, self._num_devices)
      if group > 1 and times is None:
        raise ValueError(f'{instruction.name} is in a loop of unknown length.')
      if group > 1:
        dtypes = '+'.join(sorted({dtype for dtype, _, _ in _ARRAY.findall(sent)}))
        overlaps = spread or instruction.opcode.endswith('-start')
        # GPU: start and end are written also of one that is waited for at once.
        overlaps &= '"is_sync":true' not in instruction.attributes
        found.append(Collective(kind, dtypes, num_bytes(sent), group, times, overlaps))
    return found

  def memory_bytes(self) -> int:
    """Bytes that a step reads from and writes to a device's main memory: an upper bound.

    Operands and results of every instruction that is run as one kernel count once each, but for
    arrays that the compiler has put into on-chip memory (`S(1)` in their layout, TPU only), as
    it has chosen to. A kernel that cuts or gathers a part of an operand counts as reading that;
    one that reads a part otherwise, as reading it whole. Loops of unknown length count once.
    """
    total = 0
    for instruction, _, times in self._walk(self._entry, 1, into_fusions=False):
      opcode = instruction.opcode
      if opcode in _BESIDE_KERNELS:
        # From one memory to the other: as many bytes as the smaller of both has, at each end.
        ends = [end for end in _arrays(instruction.shape) if num_bytes(end) > 4][:2]
        moved = min(map(num_bytes, ends), default=0)
        total += (times or 1) * sum(moved for end in ends if _in_main_memory(end))
      elif opcode not in _MOVES_NOTHING and not opcode.endswith(('-done', '-update', 'while')):
        arrays = _arrays(instruction.shape) + self._read_by(instruction)
        # GPU: products have scratch of a fixed size as a second result, of this type.
        arrays = [array for array in arrays if not array.startswith('s8[')]
        total += (times or 1) * sum(num_bytes(array) for array in arrays if _in_main_memory(array))
    return total

  def kernels(self) -> collections.Counter[str]:
    """Counts the instructions that a step runs as one kernel each, by opcode.

    A `custom-call` is a call of a library, which may run more than one. Moves between a TPU's two
    memories (`copy-start`, `slice-start`) are none: they run beside kernels; nor is what is done
    to a single number, which a TPU's scalar unit does. Loops of unknown length count once.
    """
    found: collections.Counter[str] = collections.Counter()
    for instruction, _, times in self._walk(self._entry, 1, into_fusions=False):
      opcode = instruction.opcode
      is_kernel = opcode not in _MOVES_NOTHING | _RUNS_OTHERS | _BESIDE_KERNELS
      sizes = any(sizes for _, sizes, _ in _ARRAY.findall(instruction.shape))
      is_kernel &= opcode in _MAKES_ANYTHING or sizes
      if is_kernel and not opcode.endswith(('-done', '-update')):
        found[opcode] += times or 1
    return found

  def _read_by(self, instruction: _Instruction) -> list[str]:
    """Lists the arrays that a kernel reads, with what it cuts or gathers of them instead."""
    found = []
    called = dict(_CALLED.findall(instruction.attributes)).get('calls', '')
    inside = self._computations.get(called.removeprefix('%'), [])
    for name in dict.fromkeys(instruction.operands):
      texts = [f' parameter({k})' for k, n in enumerate(instruction.operands) if n == name]
      given = {each.name for each in inside if any(text in each.text for text in texts)}
      uses = [each for each in inside if given & set(each.operands)]
      is_part = all(each.opcode in _READS_PART and each.operands[0] in given for each in uses)
      parts = uses if uses and is_part else [self._instructions[name]]
      found += [array for part in parts for array in _arrays(part.shape)]
    return found

  def _operands(self, instruction: _Instruction) -> str:
    return ' '.join(self._instructions[name].shape for name in dict.fromkeys(instruction.operands))

  def _walk(
    self, computation: str, times: int | None, *, into_fusions: bool
  ) -> Iterator[tuple[_Instruction, str, int | None]]:
    """Goes through all that is run, with the computation it is in and how often a step runs it."""
    for instruction in self._computations[computation]:
      yield instruction, computation, times
      if instruction.opcode.endswith(('-done', '-update')):
        continue
      # Reductions and the like name the function of two numbers that they apply: nothing moves.
      if instruction.opcode in _RUNS_OTHERS or (into_fusions and instruction.opcode == 'fusion'):
        for called, rounds in self._calls(instruction):
          inside = None if times is None or rounds is None else times * rounds
          yield from self._walk(called, inside, into_fusions=into_fusions)

  def _calls(self, instruction: _Instruction) -> Iterator[tuple[str, int | None]]:
    """Names the computations that an instruction runs, and how often, where that is known."""
    called = _CALLED.findall(instruction.attributes)
    rounds = 1 if instruction.opcode != 'while' else self._rounds(instruction, dict(called))
    for _, names in called:
      for name in names.strip('{}').split(','):
        yield name.strip().removeprefix('%'), rounds

  def _rounds(self, loop: _Instruction, called: dict[str, str]) -> int | None:
    """Rounds of a loop: as noted beside it, or the one number that its condition counts to."""
    if trips := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
      return int(trips[1])
    condition, body = (
      self._computations[called[role].removeprefix('%')] for role in ('condition', 'body')
    )
    test, after = condition[-1], body[-1]
    if 'direction=LT' not in test.attributes or after.opcode != 'tuple':
      return None
    counter, limit = (self._instructions[name] for name in test.operands)
    place = re.search(r'index=(\d+)', counter.attributes)
    step = self._instructions[after.operands[int(place[1])]] if place else counter
    added = [_constant(self._instructions[name]) for name in step.operands]
    known = [number for number in (_constant(limit), *added) if number]
    if step.opcode != 'add' or len(known) != 2:
      return None
    return -(-known[0] // known[1])


def _constant(instruction: _Instruction) -> int | None:
  """The value of a whole number, if the instruction is one."""
  value = re.search(r'\bconstant\((\d+)\)', instruction.text)
  return int(value[1]) if value else None


def num_bytes(shape: str) -> int:
  """Bytes of an array or of a tuple of them, as HLO writes its type, without padding."""
  return sum(
    ELEMENT_BYTES[dtype] * math.prod(int(n) for n in sizes.split(',') if n)
    for dtype, sizes, _ in _ARRAY.findall(shape)
    if dtype in ELEMENT_BYTES
  )


def _arrays(shape: str) -> list[str]:
  return [array[0] for array in re.finditer(_ARRAY, shape)]


def _in_main_memory(array: str) -> bool:
  return re.search(r'S\([1-9]\)', array) is None


def _read(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Splits a module into computations, and names the one that is run."""
  computations: dict[str, list[_Instruction]] = {}
  current, entry = [], ''
  for line in hlo.splitlines():
    if start := _COMPUTATION.match(line):
      current = computations[start[1]] = []
      entry = start[1] if line.startswith('ENTRY') else entry
    elif found := _INSTRUCTION.match(line):
      current.append(_instruction(found[1], found[2]))
  return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
  """Takes an instruction apart: its type may hold spaces and brackets, so these are counted."""
  end = _closing(text, 0) if text.startswith('(') else text.index(' ')
  opcode = _OPCODE.match(text, end)
  if opcode is None:
    return _Instruction(name, text[:end], '', [], text[end:], text)
  close = _closing(text, opcode.end() - 1)
  operands = re.findall(r'%([\w.\-]+)', text[opcode.end() : close])
  return _Instruction(name, text[:end], opcode[1], operands, text[close:], text)


def _closing(text: str, start: int) -> int:
  """Returns where the bracket that opens at `start` is closed: the place behind it."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == '(') - (text[place] == ')')
    if depth == 0:
      return place + 1
  raise ValueError(f'no bracket closes {text[start : start + 40]!r}.')


def _group_size(attributes: str, num_devices: int) -> int:
  """Devices of a group, in any of the ways in which replica groups are written."""
  if mesh := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    # Part of an axis is written 'axis':(before)size.
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]<=', attributes):
    return int(iota[1])
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return listed[1].count(',') + 1
  return num_devices
