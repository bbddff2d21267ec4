"""Splits HLO, the text of a compiled program, into instructions."""

import math
import re
from typing import NamedTuple

# Bytes of an element; types of less than a byte do not occur.
ELEMENT_BYTES = {
  **dict.fromkeys(('pred', 's8', 'u8'), 1),
  **dict.fromkeys(('bf16', 'f16', 's16', 'u16'), 2),
  **dict.fromkeys(('f32', 's32', 'u32'), 4),
  **dict.fromkeys(('f64', 's64', 'u64', 'c64'), 8),
}
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'\s*([\w\-]+)\(')
ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')


class Instruction(NamedTuple):
  """One line.

  Attributes:
    name: without its `%`.
    shape: of its result, with layouts; of a tuple, all of them.
    opcode: such as 'fusion'.
    operands: their names.
    attributes: what follows the operands.
    text: all that follows the name.
  """

  name: str
  shape: str
  opcode: str
  operands: list[str]
  attributes: str
  text: str


def num_bytes(shape: str) -> int:
  """Bytes of an array or of a tuple of them, as HLO writes its type, without padding."""
  return sum(
    ELEMENT_BYTES[dtype] * math.prod(int(n) for n in sizes.split(',') if n)
    for dtype, sizes, _ in ARRAY.findall(shape)
    if dtype in ELEMENT_BYTES
  )


def arrays(shape: str) -> list[str]:
  """Lists the arrays of a type, which may be a tuple."""
  return [array[0] for array in re.finditer(ARRAY, shape)]


def in_main_memory(array: str) -> bool:
  """Whether an array is in main memory, not in on-chip memory."""
  return re.search(r'S\([1-9]\)', array) is None


def read(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
  """Splits a module into computations, and names the one that is run."""
  computations: dict[str, list[Instruction]] = {}
  current, entry = [], ''
  for line in hlo.splitlines():
    if start := _COMPUTATION.match(line):
      current = computations[start[1]] = []
      entry = start[1] if line.startswith('ENTRY') else entry
    elif match := _INSTRUCTION.match(line):
      current.append(_instruction(match[1], match[2]))
  return computations, entry


def _instruction(name: str, text: str) -> Instruction:
  """Parses one line; its type may hold spaces and brackets, so brackets are counted."""
  end = _closing(text, 0) if text.startswith('(') else text.index(' ')
  opcode = _OPCODE.match(text, end)
  if opcode is None:
    return Instruction(name, text[:end], '', [], text[end:], text)
  close = _closing(text, opcode.end() - 1)
  operands = re.findall(r'%([\w.\-]+)', text[opcode.end() : close])
  return Instruction(name, text[:end], opcode[1], operands, text[close:], text)


def _closing(text: str, start: int) -> int:
  """Returns the index after the bracket that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == '(') - (text[place] == ')')
    if depth == 0:
      return place + 1
  raise ValueError(f'no bracket closes {text[start : start + 40]!r}.')
