"""The one-stream tracker: its model, its training, tracking of sequences, and scores.

Axes in the shapes of signatures, beside those of `dropmae_jax`:

  t  tokens of the template     x  tokens of the search image, l = t + x
  k  of these, the ones that are computed with
  s  cells along one side of a map of the head, x = s * s
"""
