"""One update of the tracker, a pure function of (state, batch, seed key, tokens kept).

Batch statistics and focal losses are those of groups of samples, each as a process of the published
training has them; so a step does not depend on how many devices there are.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from dropmae_jax.model.attention import Attention, dense_attention
from dropmae_jax.tracking import head, losses, model
from dropmae_jax.tracking.elimination import Kept
from dropmae_jax.tracking.losses import GROUP_SIZE, Losses


@flax.struct.dataclass
class TrackerState:
  """All that an update reads and writes: arrays, or their shapes in an abstract state.

  Attributes:
    step: int32 [], the number of updates made.
    params: a pure dict, float32.
    statistics: running ones of the head, likewise.
    opt_state: optax's; holds both moments.
  """

  step: Any
  params: dict
  statistics: dict
  opt_state: Any


class Batch(NamedTuple):
  """Training samples: pixels are normalised, boxes are x, y, w, h as fractions of the search."""

  template: Float[Array, 'b h w c']
  search: Float[Array, 'b H W c']
  boxes: Float[Array, 'b 4']


class Metrics(NamedTuple):
  """What one update tells; the norm of the gradient is that before clipping."""

  losses: Losses
  learning_rate: Float[Array, '']
  gradient_norm: Float[Array, '']


def learning_rate(peak: float, *, steps_at_peak: int) -> optax.Schedule:
  """Returns the schedule of the head: the peak, and a tenth of it after so many updates."""
  return optax.piecewise_constant_schedule(peak, {steps_at_peak: 0.1})


def adamw(
  schedule: optax.Schedule, *, weight_decay: float = 1e-4, backbone_factor: float = 0.1
) -> optax.GradientTransformation:
  """Returns AdamW as published: all that is trained decays, biases and norms too.

  Args:
    schedule: the learning rate of the head.
    weight_decay: decoupled, times the learning rate.
    backbone_factor: the learning rate of the backbone over that of the head.
  """

  def slow_down(updates: dict, params: dict | None) -> dict:
    del params
    return updates | {'backbone': optax.tree.scale(backbone_factor, updates['backbone'])}

  return optax.chain(
    optax.adamw(
      schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay, mask=model.is_trained
    ),
    optax.stateless(slow_down),
  )


def init_state(params: dict, statistics: dict, tx: optax.GradientTransformation) -> TrackerState:
  """Returns parameters and running statistics with zero moments, at step 0."""
  step = jnp.zeros((), jnp.int32)
  return TrackerState(step=step, params=params, statistics=statistics, opt_state=tx.init(params))


def train_step(
  state: TrackerState,
  batch: Batch,
  seed_key: Key[Array, ''],
  kept: Kept,
  *,
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  clip_norm: float = 0.1,
  drop_path: float = 0.1,
  group_size: int = GROUP_SIZE,
  attend: Attention = dense_attention,
) -> tuple[TrackerState, Metrics]:
  """Applies one optimizer update.

  Args:
    state: of the last step.
    batch: the global batch.
    seed_key: the same at every step.
    kept: how many search tokens stay after each elimination. As an array it may change from epoch
      to epoch without a compilation; see `elimination.Kept`.
    graphdef: of the tracker.
    tx: the optimizer.
    schedule: the learning rate of every step, for the metrics.
    clip_norm: gradients of a larger norm, over all parameters, are scaled down to it.
    drop_path: the probability that a residual of the last block is dropped.
    group_size: samples that are normalised together and whose focal losses have one divisor; it
      divides the batch, or the whole batch is smaller.
    attend: see `Tracker.__call__`.
  """
  step_key = jax.random.fold_in(seed_key, state.step)

  def loss_fn(params: dict) -> tuple[Array, tuple[Losses, dict]]:
    tracker = nnx.merge(graphdef, params)
    keys = jax.random.split(step_key, len(batch.boxes))
    maps, statistics = tracker(
      batch.template,
      batch.search,
      state.statistics,
      kept=kept,
      residual_scales=model.draw_residual_scales(
        keys, depth=tracker.architecture.depth, rate=drop_path
      ),
      group_size=group_size,
      attend=attend,
    )
    parts = losses_of(maps, batch.boxes, group_size=group_size)
    return parts.total, (parts, statistics)

  (_, (parts, statistics)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  norm = optax.tree.norm(gradients)
  gradients = optax.tree.scale(jnp.minimum(1.0, clip_norm / (norm + 1e-6)), gradients)
  updates, opt_state = tx.update(gradients, state.opt_state, state.params)
  metrics = Metrics(
    losses=parts, learning_rate=jnp.asarray(schedule(state.step)), gradient_norm=norm
  )
  params = optax.apply_updates(state.params, updates)
  return TrackerState(state.step + 1, params, statistics, opt_state), metrics


def losses_of(
  maps: head.Maps, boxes: Float[Array, 'b 4'], *, group_size: int = GROUP_SIZE
) -> Losses:
  """Returns the losses of maps, those of boxes at the cell with the highest predicted score.

  Args:
    maps: of the head.
    boxes: the truth: x, y, w, h as fractions of the search image.
    group_size: samples whose focal losses have one divisor.
  """
  return losses.tracker_losses(maps.score, head.decode(maps), boxes, group_size=group_size)
