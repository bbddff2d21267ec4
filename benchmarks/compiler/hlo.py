"""What one device runs and moves in a compiled program, read from its text (HLO).

Loops are multiplied out; the number of their rounds stands beside them or in their condition.
"""

import collections
import re
from collections.abc import Iterator

from benchmarks.compiler.hlo_text import (
  ARRAY,
  Instruction,
  arrays,
  in_main_memory,
  num_bytes,
  read,
)

# Instructions that only name what is there, or whose bytes another one counts.
_MOVES_NOTHING = frozenset(
  ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id')
)
_READS_PART = frozenset(('slice', 'dynamic-slice', 'gather'))
_RUNS_OTHERS = frozenset(('while', 'call', 'conditional', 'async-start'))
_MAKES_ANYTHING = frozenset(('fusion', 'custom-call', 'reduce'))
_BESIDE_KERNELS = frozenset(('copy-start', 'slice-start'))

_CALLED = re.compile(
  r'\b(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)


class Program:
  """A compiled program, split into its instructions."""

  def __init__(self, text: str) -> None:
    """Reads `compiled.as_text()`."""
    self._computations, self._entry = read(text)
    fused = {
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
      if name not in fused
    }
    self._instructions = {
      instruction.name: instruction
      for instructions in self._computations.values()
      for instruction in instructions
    }

  def memory_bytes(self) -> int:
    """Returns an upper bound of the bytes that a step moves to and from main memory.

    Operands and results of every instruction that runs as one kernel count once each. Arrays that
    the compiler puts into on-chip memory (`S(1)` in their layout, TPU only) do not count. A kernel
    that slices or gathers from an operand counts as reading that part; one that overwrites a part
    in place, as writing that part. Loops of unknown length count once.
    """
    total = 0
    for instruction, times in self._walk(self._entry, 1):
      opcode = instruction.opcode
      if opcode in _BESIDE_KERNELS:
        # From one memory to the other: as many bytes as the smaller of both has, at each end.
        ends = [end for end in arrays(instruction.shape) if num_bytes(end) > 4][:2]
        moved = min(map(num_bytes, ends), default=0)
        total += times * sum(moved for end in ends if in_main_memory(end))
      elif opcode not in _MOVES_NOTHING and not opcode.endswith(('-done', '-update', 'while')):
        total += times * (self._written_bytes(instruction) + self._read_bytes(instruction))
    return total

  def expected_cycles(self) -> tuple[int, int]:
    """Returns the cycles that the compiler of TPUs expects, and the number of Pallas kernels.

    The cycles are those of all kernels, one after the other, with what they compute inside. The
    compiler gives none for Pallas kernels, nor for some small ones. Other compilers give none at
    all.
    """
    cycles = pallas_kernels = 0
    for instruction, times in self._walk(self._entry, 1):
      if estimate := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes):
        cycles += times * int(estimate[1])
      pallas_kernels += times * ('"tpu_custom_call"' in instruction.attributes)
    return cycles, pallas_kernels

  def kernels(self) -> collections.Counter[str]:
    """Counts the instructions that a step runs as one kernel each, by opcode.

    A `custom-call` is a call of a library, which may run more than one. Moves between a TPU's two
    memories (`copy-start`, `slice-start`) do not count, as they run beside kernels; nor does what
    is done to a single number, which a TPU's scalar unit does. Loops of unknown length count once.
    """
    counts: collections.Counter[str] = collections.Counter()
    for instruction, times in self._walk(self._entry, 1):
      if _is_kernel(instruction):
        counts[instruction.opcode] += times
    return counts

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
    """Lists the instructions that make the results of a kernel."""
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
    """Whether a result of a kernel is one of its operands with a part overwritten."""
    if result.opcode != 'dynamic-update-slice':
      return False
    given = self._behind_bitcasts(self._instructions[result.operands[0]])
    return result.name in self._top_level or given.opcode == 'parameter'

  def _read_bytes(self, instruction: Instruction) -> int:
    """What a kernel reads of main memory; of an array that it slices or gathers, that part."""
    changed = {each.name for each in self._results(instruction) if self._changes_in_place(each)}
    total = 0
    for name in dict.fromkeys(instruction.operands):
      whole = sum(map(_main_memory_bytes, arrays(self._instructions[name].shape)))
      total += min(whole, self._bytes_read_of(name, instruction, whole, changed))
    return total

  def _bytes_read_of(self, name: str, user: Instruction, whole: int, changed: set[str]) -> int:
    """What an instruction reads of an operand, which has `whole` bytes."""
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
    """Lists the instructions of a fusion; of another instruction, none."""
    called = dict(_CALLED.findall(instruction.attributes)).get('calls', '')
    return self._computations.get(called.removeprefix('%'), [])

  def _walk(self, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
    """Yields all instructions outside of fusions, with how often a step runs each."""
    for instruction in self._computations[computation]:
      yield instruction, times
      # Reductions and the like name the function of two numbers that they apply: nothing moves.
      if instruction.opcode in _RUNS_OTHERS:
        called = _CALLED.findall(instruction.attributes)
        rounds = self._rounds(instruction, dict(called)) if instruction.opcode == 'while' else 1
        for _, names in called:
          for name in names.strip('{}').split(','):
            yield from self._walk(name.strip().removeprefix('%'), times * rounds)

  def _rounds(self, loop: Instruction, called: dict[str, str]) -> int:
    """Rounds of a loop: as noted beside it, or by its condition; 1 where neither tells."""
    if trips := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
      return int(trips[1])
    condition, body = (
      self._computations[called[role].removeprefix('%')] for role in ('condition', 'body')
    )
    test, after = condition[-1], body[-1]
    if 'direction=LT' not in test.attributes or after.opcode != 'tuple':
      return 1
    counter, limit = (self._instructions[name] for name in test.operands)
    place = re.search(r'index=(\d+)', counter.attributes)
    step = self._instructions[after.operands[int(place[1])]] if place else counter
    added = [_constant(self._instructions[name]) for name in step.operands]
    known = [number for number in (_constant(limit), *added) if number]
    if step.opcode != 'add' or len(known) != 2:
      return 1
    return -(-known[0] // known[1])


def _is_kernel(instruction: Instruction) -> bool:
  opcode = instruction.opcode
  if opcode in _MOVES_NOTHING | _RUNS_OTHERS | _BESIDE_KERNELS:
    return False
  sizes = any(sizes for _, sizes, _ in ARRAY.findall(instruction.shape))
  return (opcode in _MAKES_ANYTHING or sizes) and not opcode.endswith(('-done', '-update'))


def _main_memory_bytes(array: str) -> int:
  # GPU: products have scratch of a fixed size as a second result, of this type.
  return num_bytes(array) if in_main_memory(array) and not array.startswith('s8[') else 0


def _constant(instruction: Instruction) -> int | None:
  """The value of a whole number, if the instruction is one."""
  value = re.search(r'\bconstant\((\d+)\)', instruction.text)
  return int(value[1]) if value else None
