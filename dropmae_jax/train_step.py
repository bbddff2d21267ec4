"""One optimizer update: a pure function of (state, batch, seed key)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from dropmae_jax.config import Architecture, Objective
from dropmae_jax.model import attention, mae, pixels

# What a seed stands for: stream of pairs, crops, masks and drops. To be raised when code draws
# otherwise, as then a checkpoint would not go on as the run that it is of.
SEED_VERSION = 3


@flax.struct.dataclass
class TrainState:
  """All that an update reads and writes: arrays, or their shapes in an abstract state.

  Attributes:
    step: int32 [], the number of updates made.
    params: a pure dict, float32.
    opt_state: optax's; holds both moments.
  """

  step: Any
  params: dict
  opt_state: Any


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
  of_step = jax.random.fold_in(seed_key, step)
  streams = (jax.random.fold_in(of_step, stream) for stream in range(len(StepKeys._fields)))
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
  implementations: attention.Implementations,
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
