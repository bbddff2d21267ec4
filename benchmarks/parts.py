"""The training step, whole and in parts, compiled and ready to be timed.

The whole steps are those of `train.build`. Parts are the same functions on data of the
same shapes, forward and backward; what XLA fuses across their borders is not in them.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import compiled, flops
from benchmarks.rounds import Way
from dropmae_jax import optimizer, sharding, train, train_step
from dropmae_jax.config import Config
from dropmae_jax.kernels import implementations
from dropmae_jax.model import attention, fast_asad, mae, masking, patches, weighted_sampling
from dropmae_jax.model.asad import Logits, num_dropped
from dropmae_jax.model.attention import Attention
from dropmae_jax.model.chunks import Groups, cut, groups_of
from dropmae_jax.model.masking import Masking
from dropmae_jax.pytorch import layouts
from dropmae_jax.train_step import TrainState


class Part(NamedTuple):
  """Something to time, with what is known of it.

  Attributes:
    way: runs it.
    times: how often a step does so.
    flops: of one call, by formula; None where no matrix product is in it.
    compile_seconds: what it took to compile.
    memory: bytes on the device, of `compiled.memory_of`; None where nobody tells.
  """

  way: Way
  times: int = 1
  flops: int | None = None
  compile_seconds: float | None = None
  memory: dict[str, int] | None = None


class Workbench:
  """Data on a device, and a training state on which all steps take turns.

  Attributes:
    recipes: what is compared, by name.
    frames: a batch.
    state: the training state; every step of whichever recipe donates it, as in training.
  """

  def __init__(self, recipes: Mapping[str, Config], device: jax.Device) -> None:
    self.recipes = recipes
    first = next(iter(recipes.values()))
    self.architecture, self.objective = first.model, first.objective
    self._mesh = sharding.make_mesh([device], first.mesh)
    self._in_turn = device.platform == 'cpu'
    self._batch = batch = first.batch_size
    self._visible = masking.num_visible(first.model.num_tokens, first.objective.mask_ratio)
    self._key = sharding.put_everywhere(jax.random.key(0), self._mesh)
    size = first.model.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 2, size, size, 3), np.uint8)
    self.frames = sharding.to_devices(pixels, self._mesh)
    self.state = train.build(first, self._mesh).init(self._key)

  def steps(self) -> Iterator[tuple[str, Part]]:
    """Compiles the training step of every recipe."""
    count = flops.step(self.architecture, self.objective.mask_ratio)
    for name, recipe in self.recipes.items():
      step = train.build(recipe, self._mesh).step
      part = self._part(step, self.frames, self._key, on_state=True, pairs_flops=count)
      yield f'step_{name}', part

  def parts(self) -> Iterator[tuple[str, Part]]:
    """Compiles the parts, those with attention once for every recipe."""
    first = next(iter(self.recipes.values()))
    yield 'encoder', self._encoder(first)
    if 'dense_fused' in self.recipes:
      yield 'encoder_fused', self._encoder(self.recipes['dense_fused'])
    for name, recipe in self.recipes.items():
      yield f'decoder_{name}', self._decoder(recipe)
      yield f'attention_{name}', self._attention(recipe)
    yield 'sampler', self._sampler(next(filter(self._count, self.recipes.values())))
    yield 'optimizer', self._optimizer(first)

  @functools.cached_property
  def _params(self) -> dict:
    """Parameters that no step donates."""
    return jax.tree.map(jnp.copy, self.state.params)

  def _count(self, recipe: Config) -> int:
    return num_dropped(self.architecture.tokens_per_frame, recipe.objective.attention_dropout)

  def _part(
    self,
    function: Callable,
    *arguments: Any,
    on_state: bool = False,
    times: int = 1,
    pairs_flops: int | None = None,
  ) -> Part:
    """Compiles a function of these arguments; or of the state first, which it then replaces."""
    began = time.monotonic()
    jitted = function if hasattr(function, 'lower') else jax.jit(function)
    made = jitted.lower(*([self.state] if on_state else []), *arguments).compile()
    seconds = time.monotonic() - began

    def start() -> Any:
      if not on_state:
        return made(*arguments)
      self.state, _ = made(self.state, *arguments)
      return self.state

    return Part(
      Way(start, in_turn=self._in_turn),
      times,
      None if pairs_flops is None else self._batch * pairs_flops,
      seconds,
      compiled.memory_of(made),
    )

  def _normal(self, *shape: int, dtype: str = 'float32', seed: int = 0) -> jax.Array:
    key = jax.random.fold_in(self._key, seed)
    return jax.random.normal(key, (self._batch, *shape), dtype)

  def _keys(self) -> jax.Array:
    return jax.random.split(self._key, self._batch)

  def _masking(self) -> Masking:
    return masking.MASKING_SCHEMES[self.objective.masking](
      self._keys(),
      num_tokens=self.architecture.num_tokens,
      mask_ratio=self.objective.mask_ratio,
    )

  def _attentions(self, recipe: Config, keys: jax.Array, number: int) -> list[Attention]:
    return attention.decoder_attentions(
      keys,
      num_blocks=number,
      tokens_per_frame=self.architecture.tokens_per_frame,
      drop_rate=recipe.objective.attention_dropout,
      programs=train.attention_implementations(recipe, self._mesh),
    )

  def _model(self, recipe: Config) -> tuple[nnx.GraphDef, dict, dict]:
    """Returns a model's graph, and its parameters: those of the encoder and of the decoder."""
    dtype = jnp.dtype(recipe.dtype)
    graphdef, _ = mae.abstract_model(recipe.model, dtype=dtype, remat=recipe.remat)
    encoder, decoder = (
      {name: leaf for name, leaf in self._params.items() if layouts.is_of_decoder(name) == part}
      for part in (False, True)
    )
    return graphdef, encoder, decoder

  def _encoder(self, recipe: Config) -> Part:
    graphdef, params, rest = self._model(recipe)
    a = self.architecture
    attend = train.attention_implementations(recipe, self._mesh).dense

    def both(params: dict, rest: dict, vectors: Any, masked: Masking, upper: Any) -> Any:
      def encode(params: dict) -> jax.Array:
        return nnx.merge(graphdef, params | rest).encode(vectors, masked, attend)

      latents, pull = jax.vjp(encode, params)
      return latents, pull(upper)

    vectors = patches.patchify(self._normal(2, a.image_size, a.image_size, 3), a.patch_size)
    upper = self._normal(self._visible, a.width)
    count = flops.encoder(a, self.objective.mask_ratio)
    return self._part(both, params, rest, vectors, self._masking(), upper, pairs_flops=count)

  def _decoder(self, recipe: Config) -> Part:
    graphdef, rest, params = self._model(recipe)
    a = self.architecture

    def both(
      params: dict, rest: dict, latents: Any, masked: Masking, keys: jax.Array, upper: Any
    ) -> Any:
      def decode(params: dict, latents: jax.Array) -> jax.Array:
        attentions = self._attentions(recipe, keys, a.decoder_depth)
        model = nnx.merge(graphdef, params | rest)
        return model.decode(latents, masked, attentions, wanted=masked.masked)

      reconstruction, pull = jax.vjp(decode, params, latents)
      return reconstruction, pull(upper)

    latents, upper = (
      self._normal(self._visible, a.width),
      self._normal(a.num_tokens - self._visible, a.patch_values),
    )
    count = flops.decoder(a, self.objective.mask_ratio)
    return self._part(
      both, params, rest, latents, self._masking(), self._keys(), upper, pairs_flops=count
    )

  def _attention(self, recipe: Config) -> Part:
    a = self.architecture

    def both(keys: jax.Array, query: Any, key: Any, value: Any, upper: Any) -> Any:
      (attend,) = self._attentions(recipe, keys, 1)
      mixed, pull = jax.vjp(attend, query, key, value)
      return mixed, pull(upper)

    heads = a.decoder_num_heads
    shape = (a.num_tokens, heads, a.decoder_width // heads)
    arrays = [self._normal(*shape, dtype=recipe.dtype, seed=seed) for seed in range(4)]
    count = 3 * flops.attention(a.num_tokens, a.decoder_width)
    return self._part(both, self._keys(), *arrays, times=a.decoder_depth, pairs_flops=count)

  def _sampler(self, recipe: Config) -> Part:
    a = self.architecture
    n = a.tokens_per_frame
    groups = groups_here(self._batch, a.decoder_num_heads, a.num_tokens)
    logits = Logits(
      *(
        self._normal(2, a.decoder_num_heads, n, n, seed=seed).reshape(
          groups.number, -1, 2, a.decoder_num_heads // groups.of_heads, n, n
        )
        for seed in range(2)
      )
    )
    sample = functools.partial(drops, groups=groups, count=self._count(recipe))
    return self._part(sample, self._keys(), logits, times=a.decoder_depth)

  def _optimizer(self, recipe: Config) -> Part:
    schedule = optimizer.learning_rate(
      peak=recipe.peak_learning_rate, floor=0, warmup_steps=0, num_steps=recipe.num_steps
    )
    tx = optimizer.adamw(schedule, recipe.optimizer)

    def products(params: dict, gradients: dict) -> jax.Array:
      # A loss that has the gradients which are handed in.
      pairs = zip(jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True)
      return sum(jnp.vdot(p, g) for p, g in pairs)

    def update(state: TrainState, gradients: dict) -> tuple[TrainState, jax.Array]:
      state, metrics = train_step.update(
        state, gradients, loss_fn=products, tx=tx, schedule=schedule, accumulation_steps=1
      )
      return state, metrics.gradient_norm

    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), self.state.params)
    return self._part(jax.jit(update, donate_argnums=0), gradients, on_state=True)


def groups_here(batch_size: int, heads: int, tokens: int) -> Groups:
  """Returns in what groups a step on one device here draws, with the attention 'auto'."""
  at_once = implementations.logits_at_once(jax.default_backend())
  return groups_of((batch_size, tokens, heads), at_once)


def drops(keys: jax.Array, logits: Logits, *, groups: Groups, count: int) -> jax.Array:
  """The sampler: marks the pairs of one layer that ASAD drops.

  Args:
    keys: one per sample.
    logits: [g, c, f, k, i, n], of the groups.
    groups: of which each draws by itself.
    count: how many to drop.
  """

  def draw(group: tuple[Logits, weighted_sampling.HeadSeeds]) -> jax.Array:
    logits, seeds = group
    return weighted_sampling.sample_drops(seeds, fast_asad.sampling_weights(logits), count)

  seeds = weighted_sampling.head_seeds(keys, groups.of_heads * logits.own.shape[3])
  seeds = jax.tree.map(lambda each: cut(each, groups), seeds)
  return jax.lax.map(draw, (logits, seeds))
