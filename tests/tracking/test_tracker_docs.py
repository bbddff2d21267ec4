"""docs/tracker.md: its commands and options exist, and its tables are complete."""

import re
import shlex

import pytest
from conftest import ROOT

from benchmarks import tracker_cost
from dropmae_jax.tracking import main
from dropmae_jax.tracking.scoring import conventions
from dropmae_jax.tracking.sequences import benchmarks

TEXT = (ROOT / 'docs' / 'tracker.md').read_text()
SHELL = ''.join(re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL))
COMMANDS = re.findall(r'^dropmae-tracker (\w+) (.*)$', SHELL, re.MULTILINE)
COSTS = re.findall(r'^python -m benchmarks\.tracker_cost (.*)$', SHELL, re.MULTILINE)


def help_of(job, capsys):
  with pytest.raises(SystemExit):
    main.JOBS[job](['--help'])
  return capsys.readouterr().out


@pytest.mark.parametrize(('job', 'flags'), COMMANDS)
def test_options_of_commands_exist(job, flags, capsys):
  names = {each.partition('=')[0] for each in shlex.split(flags, comments=True)}
  assert names and names <= set(re.findall(r'--\w+', help_of(job, capsys)))


def test_options_that_are_named_exist(capsys):
  known = ''.join(help_of(job, capsys) for job in main.JOBS)
  outside = {'--parts', '--target'}  # Of the benchmark.
  assert set(re.findall(r'`(--\w+)', TEXT)) - outside <= set(re.findall(r'--\w+', known))
  assert {job for job, _ in COMMANDS} == set(main.JOBS)


@pytest.mark.parametrize('flags', COSTS)
def test_the_benchmark_understands_its_commands(flags, monkeypatch):
  monkeypatch.setattr('sys.argv', ['tracker_cost', *shlex.split(flags, comments=True)])
  tracker_cost.parse()


def table(first):
  (rows,) = re.findall(rf'^\| {re.escape(first)} .*\n\|[-|]+\n((?:\|.*\n)+)', TEXT, re.MULTILINE)
  return [[cell.strip() for cell in row.split('|')[1:-1]] for row in rows.splitlines()]


def test_every_data_set_has_a_row():
  assert [row[0].strip('`') for row in table('`--dataset`')] == list(benchmarks.BENCHMARKS)


def test_every_toolkit_has_a_column_and_its_data_sets():
  rows = {row[0]: row[1:] for row in table('| GOT-10k toolkit on GOT-10k')}
  toolkits = [cell.strip('`') for cell in rows['`--toolkit`']]
  assert set(toolkits) <= set(conventions.CONVENTIONS)
  of_data_sets = {}
  for toolkit, cell in zip(toolkits, rows['default for'], strict=True):
    for name in re.findall(r'`(\w+)`', cell):
      of_data_sets[name] = toolkit
  assert of_data_sets == dict(conventions.DEFAULTS)
