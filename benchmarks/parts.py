"""The training step and its parts, compiled and ready to be timed.

The whole steps are those of `train_step.build`. The parts are the same functions, forward and
backward, on random data of the same shapes; each is compiled alone, so XLA cannot fuse across them.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.rounds import Way
from dropmae_jax import optimizer, sharding, train_step
from dropmae_jax.config import Config
from dropmae_jax.kernels import implementations
from dropmae_jax.memory import memory_of
from dropmae_jax.model import attention, fast_asad, flops, mae, masking, patches, weighted_sampling
from dropmae_jax.model.asad import Logits, num_dropped
from dropmae_jax.model.attention import Attention
from dropmae_jax.model.chunks import ChunkCounts, chunk_counts, split_heads
from dropmae_jax.model.masking import Masking
from dropmae_jax.pytorch import layouts
from dropmae_jax.train_step import TrainState


class Part(NamedTuple):
  """Something to time, and its numbers.

  Attributes:
    way: runs it.
    times: how often a training step runs it.
    flops: of one call, by formula; None if it has no matrix product.
    compile_seconds: time of its compilation.
    memory: bytes on the device, by `memory_of`; None for PyTorch.
  """

  way: Way
  times: int = 1
  flops: int | None = None
  compile_seconds: float | None = None
  memory: dict[str, int] | None = None


class Workbench:
  """A batch on a device, and one training state that all steps update in turn.

  Attributes:
    configs: what is compared, by name.
    frames: the batch.
    state: the training state, which every step donates and replaces, as in training.
  """

  def __init__(self, configs: Mapping[str, Config], device: jax.Device) -> None:
    self.configs = configs
    first = next(iter(configs.values()))
    self.architecture, self.objective = first.model, first.objective
    self._mesh = sharding.make_mesh([device], first.mesh)
    self._in_turn = device.platform == 'cpu'
    self._batch = batch = first.batch_size
    self._visible = masking.num_visible(first.model.num_tokens, first.objective.mask_ratio)
    self._key = sharding.put_everywhere(jax.random.key(0), self._mesh)
    size = first.model.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 2, size, size, 3), np.uint8)
    self.frames = sharding.to_devices(pixels, self._mesh)
    self.state = train_step.build(first, self._mesh).init(self._key)

  def steps(self) -> Iterator[tuple[str, Part]]:
    """Compiles the training step of every config."""
    count = flops.step(self.architecture, self.objective.mask_ratio)
    for name, config in self.configs.items():
      step = train_step.build(config, self._mesh).step
      part = self._part(step, self.frames, self._key, on_state=True, pairs_flops=count)
      yield f'step_{name}', part

  def parts(self) -> Iterator[tuple[str, Part]]:
    """Compiles the parts; decoder and attention for every config."""
    first = next(iter(self.configs.values()))
    yield 'encoder', self._encoder(first)
    if 'dense_fused' in self.configs:
      yield 'encoder_fused', self._encoder(self.configs['dense_fused'])
    for name, config in self.configs.items():
      yield f'decoder_{name}', self._decoder(config)
      yield f'attention_{name}', self._attention(config)
    yield 'sampler', self._sampler(self.configs['asad'])
    yield 'optimizer', self._optimizer(first)

  @functools.cached_property
  def _params(self) -> dict:
    """A copy of the parameters that no step donates."""
    return jax.tree.map(jnp.copy, self.state.params)

  def _part(
    self,
    function: Callable,
    *arguments: Any,
    on_state: bool = False,
    times: int = 1,
    pairs_flops: int | None = None,
  ) -> Part:
    """Compiles a function of these arguments; with `on_state`, of the state, which it replaces."""
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
      memory_of(made),
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

  def _attentions(self, config: Config, keys: jax.Array, number: int) -> list[Attention]:
    return attention.decoder_attentions(
      keys,
      num_blocks=number,
      tokens_per_frame=self.architecture.tokens_per_frame,
      drop_rate=config.objective.attention_dropout,
      implementations=train_step.attention_implementations(config, self._mesh),
    )

  def _model(self, config: Config) -> tuple[nnx.GraphDef, dict, dict]:
    """Returns a model's graph, the parameters of its encoder and those of its decoder."""
    dtype = jnp.dtype(config.dtype)
    graphdef, _ = mae.abstract_model(config.model, dtype=dtype, remat=config.remat)
    encoder, decoder = (
      {name: leaf for name, leaf in self._params.items() if layouts.is_of_decoder(name) == part}
      for part in (False, True)
    )
    return graphdef, encoder, decoder

  def _encoder(self, config: Config) -> Part:
    graphdef, params, decoder_params = self._model(config)
    a = self.architecture
    attend = train_step.attention_implementations(config, self._mesh).dense

    def forward_and_backward(
      params: dict, decoder_params: dict, vectors: Any, masked: Masking, d_latents: Any
    ) -> Any:
      def encode(params: dict) -> jax.Array:
        model = nnx.merge(graphdef, params | decoder_params)
        return model.encode(vectors, masked, attend)

      latents, backward = jax.vjp(encode, params)
      return latents, backward(d_latents)

    vectors = patches.patchify(self._normal(2, a.image_size, a.image_size, 3), a.patch_size)
    return self._part(
      forward_and_backward,
      params,
      decoder_params,
      vectors,
      self._masking(),
      self._normal(self._visible, a.width),
      pairs_flops=flops.encoder(a, self.objective.mask_ratio),
    )

  def _decoder(self, config: Config) -> Part:
    graphdef, encoder_params, params = self._model(config)
    a = self.architecture

    def forward_and_backward(
      params: dict,
      encoder_params: dict,
      latents: Any,
      masked: Masking,
      keys: jax.Array,
      d_prediction: Any,
    ) -> Any:
      def decode(params: dict, latents: jax.Array) -> jax.Array:
        attentions = self._attentions(config, keys, a.decoder_depth)
        model = nnx.merge(graphdef, params | encoder_params)
        return model.decode(latents, masked, attentions, wanted=masked.masked)

      prediction, backward = jax.vjp(decode, params, latents)
      return prediction, backward(d_prediction)

    return self._part(
      forward_and_backward,
      params,
      encoder_params,
      self._normal(self._visible, a.width),
      self._masking(),
      self._keys(),
      self._normal(a.num_tokens - self._visible, a.patch_values),
      pairs_flops=flops.decoder(a, self.objective.mask_ratio),
    )

  def _attention(self, config: Config) -> Part:
    a = self.architecture

    def forward_and_backward(
      keys: jax.Array, query: Any, key: Any, value: Any, d_output: Any
    ) -> Any:
      (attend,) = self._attentions(config, keys, 1)
      output, backward = jax.vjp(attend, query, key, value)
      return output, backward(d_output)

    heads = a.decoder_num_heads
    shape = (a.num_tokens, heads, a.decoder_width // heads)
    arrays = [self._normal(*shape, dtype=config.dtype, seed=seed) for seed in range(4)]
    return self._part(
      forward_and_backward,
      self._keys(),
      *arrays,
      times=a.decoder_depth,
      pairs_flops=3 * flops.attention(a.num_tokens, a.decoder_width),
    )

  def _sampler(self, config: Config) -> Part:
    a = self.architecture
    n, heads = a.tokens_per_frame, a.decoder_num_heads
    chunks = chunks_here(self._batch, heads, a.num_tokens)
    shape = (chunks.total, -1, 2, heads // chunks.heads, n, n)
    own, other = (self._normal(2, heads, n, n, seed=seed).reshape(shape) for seed in range(2))
    count = num_dropped(n, config.objective.attention_dropout)
    sample = functools.partial(drops, chunks=chunks, count=count)
    return self._part(sample, self._keys(), Logits(own, other), times=a.decoder_depth)

  def _optimizer(self, config: Config) -> Part:
    schedule = optimizer.learning_rate(
      peak=config.peak_learning_rate, floor=0, warmup_steps=0, num_steps=config.num_steps
    )
    tx = optimizer.adamw(schedule, config.optimizer)

    def products(params: dict, gradients: dict) -> jax.Array:
      # A loss whose gradients are those given.
      pairs = zip(jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True)
      return sum(jnp.vdot(p, g) for p, g in pairs)

    def update(state: TrainState, gradients: dict) -> tuple[TrainState, jax.Array]:
      state, metrics = train_step.update(
        state, gradients, loss_fn=products, tx=tx, schedule=schedule, accumulation_steps=1
      )
      return state, metrics.gradient_norm

    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), self.state.params)
    return self._part(jax.jit(update, donate_argnums=0), gradients, on_state=True)


def chunks_here(batch_size: int, heads: int, tokens: int) -> ChunkCounts:
  """Returns the chunks in which a step on one device here draws, with attention='auto'."""
  at_once = implementations.logits_at_once(jax.default_backend())
  return chunk_counts((batch_size, tokens, heads), at_once)


def drops(keys: jax.Array, logits: Logits, *, chunks: ChunkCounts, count: int) -> jax.Array:
  """Marks the pairs of one layer that ASAD drops, chunk by chunk: the sampler.

  Args:
    keys: one per sample.
    logits: [g, c, f, k, i, n]: g chunks of k heads of c samples.
    chunks: into which samples and heads are split.
    count: how many pairs to drop per sample and head.
  """

  def draw(chunk: tuple[Logits, weighted_sampling.HeadSeeds]) -> jax.Array:
    logits, seeds = chunk
    return weighted_sampling.sample_drops(seeds, fast_asad.sampling_weights(logits), count)

  seeds = weighted_sampling.head_seeds(keys, chunks.heads * logits.own.shape[3])
  seeds = jax.tree.map(lambda each: split_heads(each, chunks), seeds)
  return jax.lax.map(draw, (logits, seeds))
