"""What a compiled program runs and moves, read from its text (HLO).

Messages between devices, bytes to and from memory, and kernels.
Loops are multiplied out; the number of their rounds is written beside them or in their condition.
"""

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.hlo_text import (
  ARRAY,
  Instruction,
  arrays,
  group_size,
  in_main_memory,
  num_bytes,
  read,
)

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


class Program:
  """A compiled program, taken apart."""

  def __init__(self, text: str, num_devices: int) -> None:
    """Reads `compiled.as_text()`; `num_devices` is the group where a collective names none."""
    self._computations, self._entry = read(text)
    self._num_devices = num_devices
    self._fused = {
      name.removeprefix('%')
      for instructions in self._computations.values()
      for instruction in instructions
      if instruction.opcode == 'fusion'
      for _, name in _CALLED.findall(instruction.attributes)
    }
    self._top_level = {
      instruction.name
      for name, instructions in self._computations.items()
      for instruction in instructions
      if name not in self._fused
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
      group = group_size(instruction.attributes, self._num_devices)
      if group > 1 and times is None:
        raise ValueError(f'{instruction.name} is in a loop of unknown length.')
      if group > 1:
        dtypes = '+'.join(sorted({dtype for dtype, _, _ in ARRAY.findall(sent)}))
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
    one that reads a part otherwise, as reading it whole; one that replaces a part counts as writing
    that. Loops of unknown length count once.
    """
    total = 0
    for instruction, _, times in self._walk(self._entry, 1, into_fusions=False):
      opcode = instruction.opcode
      if opcode in _BESIDE_KERNELS:
        # From one memory to the other: as many bytes as the smaller of both has, at each end.
        ends = [end for end in arrays(instruction.shape) if num_bytes(end) > 4][:2]
        moved = min(map(num_bytes, ends), default=0)
        total += (times or 1) * sum(moved for end in ends if in_main_memory(end))
      elif opcode not in _MOVES_NOTHING and not opcode.endswith(('-done', '-update', 'while')):
        total += (times or 1) * (self._written_bytes(instruction) + self._read_bytes(instruction))
    return total

  def expected_cycles(self) -> tuple[int, int]:
    """Returns what the compiler of TPUs expects its kernels to take, one after the other.

    That includes what they compute inside. It does not say it of those of Pallas, whose number is
    returned too, nor of some that are small. Other compilers say nothing at all.
    """
    cycles = of_pallas = 0
    for instruction, _, times in self._walk(self._entry, 1, into_fusions=False):
      if said := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes):
        cycles += (times or 1) * int(said[1])
      of_pallas += (times or 1) * ('"tpu_custom_call"' in instruction.attributes)
    return cycles, of_pallas

  def kernels(self) -> collections.Counter[str]:
    """Counts the instructions that a step runs as one kernel each, by opcode.

    A `custom-call` is a call of a library, which may run more than one. Moves between a TPU's two
    memories (`copy-start`, `slice-start`) are none: they run beside kernels; nor is what is done
    to a single number, which a TPU's scalar unit does. Loops of unknown length count once.
    """
    found: collections.Counter[str] = collections.Counter()
    for instruction, _, times in self._walk(self._entry, 1, into_fusions=False):
      if self._is_kernel(instruction):
        found[instruction.opcode] += times or 1
    return found

  def _is_kernel(self, instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if opcode in _MOVES_NOTHING | _RUNS_OTHERS | _BESIDE_KERNELS:
      return False
    sizes = any(sizes for _, sizes, _ in ARRAY.findall(instruction.shape))
    return (opcode in _MAKES_ANYTHING or sizes) and not opcode.endswith(('-done', '-update'))

  def _written_bytes(self, instruction: Instruction) -> int:
    """What a kernel writes to main memory; of an array that it changes in place, the new part."""
    written, results = arrays(instruction.shape), self._results(instruction)
    if len(results) != len(written):
      return sum(map(_main_memory_bytes, written))
    return sum(
      min(_main_memory_bytes(array), self._new_bytes(result))
      for array, result in zip(written, results, strict=True)
    )

  def _results(self, instruction: Instruction) -> list[Instruction]:
    """Lists what makes the results of a kernel."""
    *_, root = self._inside(instruction) or [instruction]
    made = map(self._instructions.get, root.operands) if root.opcode == 'tuple' else [root]
    return [self._behind_bitcasts(each) for each in made]

  def _behind_bitcasts(self, instruction: Instruction) -> Instruction:
    while instruction.opcode == 'bitcast':
      instruction = self._instructions[instruction.operands[0]]
    return instruction

  def _new_bytes(self, result: Instruction) -> int:
    changes = self._changes_in_place(result)
    return num_bytes((self._instructions[result.operands[1]] if changes else result).shape)

  def _changes_in_place(self, result: Instruction) -> bool:
    """Whether a result of a kernel is an array that it was given, of which a part is new."""
    if result.opcode != 'dynamic-update-slice':
      return False
    given = self._behind_bitcasts(self._instructions[result.operands[0]])
    return result.name in self._top_level or given.opcode == 'parameter'

  def _read_bytes(self, instruction: Instruction) -> int:
    """What a kernel reads of main memory; of an array that it only cuts or gathers, that part."""
    changed = {each.name for each in self._results(instruction) if self._changes_in_place(each)}
    total = 0
    for name in dict.fromkeys(instruction.operands):
      whole = sum(map(_main_memory_bytes, arrays(self._instructions[name].shape)))
      total += min(whole, self._bytes_read_of(name, instruction, whole, changed))
    return total

  def _bytes_read_of(self, name: str, user: Instruction, whole: int, changed: set[str]) -> int:
    """What an instruction reads of an operand, whose bytes are `whole`."""
    if user.operands[0] == name and user.name in changed:
      return 0
    if user.operands[0] == name and user.opcode in _READS_PART:
      return num_bytes(user.shape)
    if not (inside := self._inside(user)):
      return whole
    places = [f' parameter({k})' for k, operand in enumerate(user.operands) if operand == name]
    names = {each.name for each in inside if any(place in each.text for place in places)}
    for each in inside:
      names |= {each.name} if each.opcode == 'bitcast' and names & set(each.operands) else set()
    uses = [(own, each) for each in inside for own in names & set(each.operands)]
    uses = [use for use in uses if use[1].name not in names]
    return sum(self._bytes_read_of(*use, whole, changed) for use in uses) if uses else whole

  def _inside(self, instruction: Instruction) -> list[Instruction]:
    """Lists what a fusion is made of; of another instruction, nothing."""
    called = dict(_CALLED.findall(instruction.attributes)).get('calls', '')
    return self._computations.get(called.removeprefix('%'), [])

  def _operands(self, instruction: Instruction) -> str:
    return ' '.join(self._instructions[name].shape for name in dict.fromkeys(instruction.operands))

  def _walk(
    self, computation: str, times: int | None, *, into_fusions: bool
  ) -> Iterator[tuple[Instruction, str, int | None]]:
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

  def _calls(self, instruction: Instruction) -> Iterator[tuple[str, int | None]]:
    """Names the computations that an instruction runs, and how often, where that is known."""
    called = _CALLED.findall(instruction.attributes)
    rounds = 1 if instruction.opcode != 'while' else self._rounds(instruction, dict(called))
    for _, names in called:
      for name in names.strip('{}').split(','):
        yield name.strip().removeprefix('%'), rounds

  def _rounds(self, loop: Instruction, called: dict[str, str]) -> int | None:
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


def _main_memory_bytes(array: str) -> int:
  # GPU: products have scratch of a fixed size as a second result, of this type.
  return num_bytes(array) if in_main_memory(array) and not array.startswith('s8[') else 0


def _constant(instruction: Instruction) -> int | None:
  """The value of a whole number, if the instruction is one."""
  value = re.search(r'\bconstant\((\d+)\)', instruction.text)
  return int(value[1]) if value else None
