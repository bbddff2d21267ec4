"""One optimizer update, a pure function of (state, batch, seed key), and `build`, which jits it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from dropmae_jax import optimizer, sharding
from dropmae_jax.config import Architecture, Config, Objective
from dropmae_jax.kernels import implementations
from dropmae_jax.model import asad, mae, masking, pixels
from dropmae_jax.model.attention import Implementations
from dropmae_jax.optimizer import TrainState
from dropmae_jax.runtime.errors import UserError

# The meaning of a seed: the stream of pairs, crops, masks and drops. To be raised when the code
# draws other numbers; checkpoints of an older version are then refused.
SEED_VERSION = 3


class Seeds(NamedTuple):
  """What the seed of a run stands for: initial parameters, the data's stream, the steps."""

  init: Key[Array, '']
  data: int
  steps: Key[Array, '']


def derive_seeds(seed: int) -> Seeds:
  """Derives what is random in a run from its one seed."""
  init, data, steps = jax.random.split(jax.random.key(seed), 3)
  return Seeds(init, int(jax.random.bits(data)), steps)


class StepKeys(NamedTuple):
  """The random keys of one update, one per sample; nothing else in a step is random."""

  augment: Key[Array, ' b']
  masking: Key[Array, ' b']
  asad: Key[Array, ' b']


class Metrics(NamedTuple):
  """What one update tells: the batch's mean loss, and the norm of its gradient."""

  loss: Float[Array, '']
  learning_rate: Float[Array, '']
  gradient_norm: Float[Array, '']


# The mean loss of a (micro-)batch, whose first axis is the sample's.
LossFn = Callable[[dict, Any], Float[Array, '']]


def init_state(
  key: Key[Array, ''], *, architecture: Architecture, tx: optax.GradientTransformation
) -> TrainState:
  """Returns fresh parameters and zero moments at step 0."""
  params = mae.init_params(key, architecture)
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def step_keys(seed_key: Key[Array, ''], step: Int[Array, ''], batch_size: int) -> StepKeys:
  """Derives the keys of a step; pure in (seed, step, sample), so resuming needs no other state."""
  step_key = jax.random.fold_in(seed_key, step)
  streams = (jax.random.fold_in(step_key, stream) for stream in range(len(StepKeys._fields)))
  return StepKeys(*(jax.random.split(stream, batch_size) for stream in streams))


def train_step(
  state: TrainState,
  frames: UInt8[Array, 'b f h w c'],
  seed_key: Key[Array, ''],
  *,
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  objective: Objective,
  shared_flip: bool,
  accumulation_steps: int,
  implementations: Implementations,
) -> tuple[TrainState, Metrics]:
  """Augments a batch of raw pairs, and updates the state by the gradient of the pre-training loss.

  Args:
    state: of the last step.
    frames: uint8 pairs of the global batch.
    seed_key: the same at every step.
    graphdef: of the model.
    tx: the optimizer.
    schedule: the learning rate of every step, for the metrics.
    objective: what is learned.
    shared_flip: both frames of a pair are mirrored alike.
    accumulation_steps: micro-batches that the batch is split into.
    implementations: how attention is computed.
  """

  def loss_fn(params: dict, batch: tuple[Array, StepKeys]) -> Float[Array, '']:
    raw, keys = batch
    return mae.pretraining_loss(
      nnx.merge(graphdef, params),
      pixels.flip_and_normalise(keys.augment, raw, shared=shared_flip),
      masking_keys=keys.masking,
      asad_keys=keys.asad,
      objective=objective,
      implementations=implementations,
    )

  keys = step_keys(seed_key, state.step, frames.shape[0])
  return update(
    state,
    (frames, keys),
    loss_fn=loss_fn,
    tx=tx,
    schedule=schedule,
    accumulation_steps=accumulation_steps,
  )


def update(
  state: TrainState,
  batch: Any,
  *,
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  accumulation_steps: int,
) -> tuple[TrainState, Metrics]:
  """Applies one optimizer update by the mean gradient over the micro-batches of a batch."""
  value_and_grad = jax.value_and_grad(loss_fn)
  if accumulation_steps == 1:
    loss, gradients = value_and_grad(state.params, batch)
  else:
    loss, gradients = _accumulate(value_and_grad, state.params, batch, accumulation_steps)
  updates, opt_state = tx.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = Metrics(
    loss=loss,
    learning_rate=jnp.asarray(schedule(state.step)),
    gradient_norm=optax.tree.norm(gradients),
  )
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def _accumulate(
  value_and_grad: Callable, params: dict, batch: Any, accumulation_steps: int
) -> tuple[Float[Array, ''], dict]:
  """Averages loss and gradient over micro-batches, each of which is spread over all devices."""
  # The micro-batch number is the inner axis, so that every device keeps the samples it holds.
  micro_batches = jax.tree.map(
    lambda x: rearrange(x, '(b a) ... -> a b ...', a=accumulation_steps), batch
  )

  def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
    result = value_and_grad(params, micro_batch)
    return jax.tree.map(lambda t, x: t + x / accumulation_steps, total, result), None

  zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  return jax.lax.scan(add, zero, micro_batches)[0]


class Model(NamedTuple):
  """What runs on the devices: fresh states, updates of them, and a state's shapes and places."""

  init: Callable[[jax.Array], TrainState]
  step: Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
  abstract_state: TrainState


def build(config: Config, mesh: Mesh) -> Model:
  """Puts model, objective and optimizer together, jitted for a mesh.

  The old state is donated to the step. Nothing is compiled before the first call.

  Raises:
    UserError: the devices do not divide the batch, or do not run the attention asked for; or a
      masking scheme or dropout rule of the user does not return what it must.
  """
  try:
    sharding.check_batch(config.batch_size, config.accumulation_steps, mesh)
    masking.check_scheme(
      config.objective.masking,
      num_tokens=config.model.num_tokens,
      mask_ratio=config.objective.mask_ratio,
    )
    asad.check_rule(
      config.objective.dropout_rule,
      tokens_per_frame=config.model.tokens_per_frame,
      drop_rate=config.objective.attention_dropout,
    )
    attention = attention_implementations(config, mesh)
  except ValueError as error:
    raise UserError(f'config: {error}') from error
  graphdef, _ = mae.abstract_model(config.model, dtype=jnp.dtype(config.dtype), remat=config.remat)
  schedule = optimizer.schedule_of(dataclasses.asdict(config))
  tx = optimizer.adamw(schedule, config.optimizer)
  step = functools.partial(
    train_step,
    graphdef=graphdef,
    tx=tx,
    schedule=schedule,
    objective=config.objective,
    shared_flip=config.data.shared_augmentation,
    accumulation_steps=config.accumulation_steps,
    implementations=attention,
  )
  init = functools.partial(init_state, architecture=config.model, tx=tx)
  # A state is born sharded, and never whole on one device.
  state = sharding.abstract_on(mesh, jax.eval_shape(init, jax.random.key(0)))
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  everywhere = sharding.replicated(mesh)
  # On GPUs, sums that would depend on the order in which threads come to them.
  deterministic = {'xla_gpu_exclude_nondeterministic_ops': True}
  return Model(
    init=jax.jit(init, out_shardings=places),
    step=jax.jit(
      step,
      donate_argnames='state',
      in_shardings=(places, sharding.batch_sharding(mesh), everywhere),
      out_shardings=(places, everywhere),
      compiler_options=deterministic if sharding.platform_of(mesh) == 'gpu' else None,
    ),
    abstract_state=state,
  )


def attention_implementations(config: Config, mesh: Mesh) -> Implementations:
  """Returns the attention that a config asks for.

  Raises:
    ValueError: the devices, or the sizes of the model, have none such.
  """
  return implementations.choose(
    config.attention,
    mesh,
    tokens_per_frame=config.model.tokens_per_frame,
    num_heads=config.model.decoder_num_heads,
    head_width=config.model.decoder_width // config.model.decoder_num_heads,
    dtype=config.dtype,
    rule=config.objective.dropout_rule,
  )
