"""Records of a dataset that cannot be read: some are lived with, more end the run."""

from collections.abc import Callable, Collection

from dropmae_jax.data.video_source import DamagedRecord


def too_many_damaged(sentences: Collection[str], most: int) -> DamagedRecord:
  """Returns the refusal of a dataset of which too much is damaged.

  Args:
    sentences: on the damaged records; the last one is told.
    most: how many are allowed.
  """
  return DamagedRecord(
    f'{list(sentences)[-1]} It is damaged record {len(sentences)} of this start, and'
    f' config.data.max_damaged_records={most}.'
  )


class DamagedRecords:
  """Counts the records of a dataset that could not be read, each once in the life of a process."""

  def __init__(self, most: int, say: Callable[[str], None]) -> None:
    """Begins to count.

    Args:
      most: how many are allowed.
      say: takes what the user should know.
    """
    self._most, self._say = most, say
    self._found: dict[str, None] = {}  # In the order that they were met.

  def tell(self, sentence: str) -> None:
    """Takes the sentence on a record, which names it.

    Raises:
      DamagedRecord: it is one record too many.
    """
    if sentence in self._found:
      return
    self._found[sentence] = None
    if len(self._found) > self._most:
      raise too_many_damaged(self._found, self._most)
    self._say(
      f'{sentence} Another video is taken instead; damaged record {len(self._found)} of at most'
      f' {self._most}.'
    )
