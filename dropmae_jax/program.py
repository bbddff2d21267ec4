"""What a recipe has the devices do, jitted for a mesh."""

import pathlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dropmae_jax import attention, mae, optimizer, sharding
from dropmae_jax.command_line import BadInput
from dropmae_jax.recipe import Recipe
from dropmae_jax.train_step import Metrics, TrainState, init_state, train_step

# GPUs: nothing whose sums depend on what comes first.
_SAME_NUMBERS = {'xla_gpu_exclude_nondeterministic_ops': True}


class Program(NamedTuple):
  """What runs on the devices: fresh states, updates of them, and a state's shapes and places."""

  init: Callable[[jax.Array], TrainState]
  step: Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
  abstract_state: TrainState


def keep_compiled(workdir: pathlib.Path) -> None:
  """Has this process keep compiled programs in the folder `compiled` of a run, which may go on.

  Compiling takes minutes on GPUs and TPUs. And the compiler of GPUs chooses among kernels by timing
  them, so that what is compiled anew may round otherwise. CPUs may differ in what code they take:
  nothing is kept there, nor where JAX has been told of another place, as by
  JAX_COMPILATION_CACHE_DIR.
  """
  if jax.default_backend() != 'cpu' and jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(workdir / 'compiled'))


def attention_programs(recipe: Recipe, mesh: Mesh) -> attention.Programs:
  """Returns the attention that a recipe asks for.

  Raises:
    ValueError: the devices, or the sizes of the model, have none such.
  """
  return attention.programs_for(
    recipe.attention,
    mesh,
    tokens_per_frame=recipe.model.tokens_per_frame,
    num_heads=recipe.model.decoder_num_heads,
    head_width=recipe.model.decoder_width // recipe.model.decoder_num_heads,
    dtype=recipe.dtype,
  )


def build_program(recipe: Recipe, mesh: Mesh) -> Program:
  """Puts model, objective and optimizer of a recipe together, jitted for a mesh.

  The old state is donated to the step. Nothing is compiled before the first call.

  Raises:
    BadInput: the devices do not divide the batch, or do not run the attention asked for.
  """
  try:
    sharding.check_batch(recipe.batch_size, recipe.accumulation_steps, mesh)
    programs = attention_programs(recipe, mesh)
  except ValueError as error:
    raise BadInput(f'config: {error}') from error
  graphdef, _ = mae.abstract_model(recipe.model, dtype=jnp.dtype(recipe.dtype), remat=recipe.remat)
  schedule = optimizer.learning_rate(
    peak=recipe.peak_learning_rate,
    floor=recipe.optimizer.min_learning_rate,
    warmup_steps=recipe.optimizer.warmup_steps,
    num_steps=recipe.num_steps,
  )
  tx = optimizer.adamw(schedule, recipe.optimizer)
  step = partial(
    train_step,
    graphdef=graphdef,
    tx=tx,
    schedule=schedule,
    objective=recipe.objective,
    shared_flip=recipe.data.shared_augmentation,
    accumulation_steps=recipe.accumulation_steps,
    attention_programs=programs,
  )
  init = partial(init_state, architecture=recipe.model, tx=tx)
  # A state is born in its place, and never whole on one device.
  state = sharding.abstract_on(mesh, jax.eval_shape(init, jax.random.key(0)))
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  everywhere = sharding.replicated(mesh)
  return Program(
    init=jax.jit(init, out_shardings=places),
    step=jax.jit(
      step,
      donate_argnames='state',
      in_shardings=(places, sharding.batch_sharding(mesh), everywhere),
      out_shardings=(places, everywhere),
      compiler_options=_SAME_NUMBERS if sharding.platform_of(mesh) == 'gpu' else None,
    ),
    abstract_state=state,
  )
